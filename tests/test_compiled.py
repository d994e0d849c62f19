"""compile_step: the same training as through autograd, whatever it can express, and a clear word where it cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import fastnn
from fastnn import _C, compiled, nn, optim
from fastnn.compiled import CompiledForward
from fastnn.runtime import thread_limit
from fastnn.training import (
    AutogradStep,
    Batches,
    CompiledStep,
    NotCompilable,
    compile_step,
    make_forward,
    make_step,
)

DTYPES = [torch.float32, torch.float64]


def mnist_like() -> torch.nn.Sequential:
    return torch.nn.Sequential(
        nn.Conv2d(1, 32, 3, activation="relu", max_pool=2),
        nn.Conv2d(32, 64, 3, activation="relu", max_pool=2),
        torch.nn.Flatten(),
        nn.Linear(1600, 64, activation="relu"),
        nn.Linear(64, 10),
    )


def cifar_like() -> torch.nn.Sequential:
    relu = nn.ReLU()
    return torch.nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, activation="relu", max_pool=2),
        torch.nn.Identity(),
        nn.Conv2d(16, 24, 5, padding=2, activation="relu", max_pool=(3, 2, 1)),
        nn.Conv2d(24, 24, 3, padding=1, groups=24),
        relu,
        nn.Conv2d(24, 32, 3, stride=2, bias=False),
        relu,
        nn.MaxPool2d(2),
        torch.nn.Flatten(),
        nn.Linear(32, 10),
    )


def odd_sizes() -> torch.nn.Sequential:
    return torch.nn.Sequential(
        nn.Conv2d(2, 5, 3, max_pool=2), torch.nn.Flatten(), nn.Linear(5 * 4 * 5, 7, activation="relu"), nn.Linear(7, 3)
    )


MODELS: dict[str, tuple[Callable[[], torch.nn.Sequential], tuple[int, int, int], int]] = {
    "mnist": (mnist_like, (1, 28, 28), 10),
    "cifar": (cifar_like, (3, 20, 20), 10),
    "odd": (odd_sizes, (2, 11, 13), 3),
}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda parameters: optim.Adam(parameters, lr=2e-3),
    "sgd": lambda parameters: optim.SGD(parameters, lr=0.05, momentum=0.9),
    "torch adam": lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
}


def data(
    shape: tuple[int, int, int], classes: int, count: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, *shape, generator=generator, dtype=dtype)
    return images, torch.randint(classes, (count,), generator=generator)


def both(
    build: Callable[[], torch.nn.Sequential], dtype: torch.dtype
) -> tuple[torch.nn.Sequential, torch.nn.Sequential]:
    torch.manual_seed(0)
    model = build().to(dtype)
    return model, copy.deepcopy(model)


def autograd_step(model: Any, loss: Any, optimizer: Any, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    value = loss(model(images), targets)
    value.backward()
    optimizer.step()
    return value.detach()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_fifty_steps_end_at_the_bits_of_autograd(name: str, dtype: torch.dtype, optimizer: str) -> None:
    build, shape, classes = MODELS[name]
    compiled, eager = both(build, dtype)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    step = compile_step(compiled, loss, OPTIMIZERS[optimizer](compiled.parameters()))
    eager_optimizer = OPTIMIZERS[optimizer](eager.parameters())
    images, targets = data(shape, classes, 90, dtype)
    for i in range(50):
        rows = torch.arange(9 * i, 9 * i + (9 if i % 5 else 4)) % 90  # two batch sizes
        got, correct = step(images[rows], targets[rows])
        right = int((eager(images[rows]).argmax(1) == targets[rows]).sum())
        expected = autograd_step(eager, loss, eager_optimizer, images[rows], targets[rows])
        assert torch.equal(got, expected)
        assert int(correct) == right
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("isa", fastnn.available_isas())
def test_every_isa_runs_its_own_kernels(isa: str) -> None:
    before = fastnn.get_isa()
    fastnn.set_isa(isa)
    try:
        model, _ = both(mnist_like, torch.float32)
        step = compile_step(model, nn.CrossEntropyLoss(), optim.Adam(model.parameters()))
        images, targets = data((1, 28, 28), 10, 8, torch.float32)
        step(images, targets)
        with fastnn.explain_dispatch() as log:
            step(images, targets)
    finally:
        fastnn.set_isa(before)
    assert {record.isa for record in log} == {isa}
    assert {"conv2d_forward", "conv2d_grad_weight", "linear_backward", "cross_entropy_backward", "adam_step"} <= {
        record.operator for record in log
    }
    assert "sparse" in {record.kernel for record in log if record.operator == "conv2d_grad_input"}


def test_the_thread_count_does_not_change_a_bit() -> None:
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        model, _ = both(mnist_like, torch.float32)
        step = compile_step(model, nn.CrossEntropyLoss(), optim.Adam(model.parameters()))
        images, targets = data((1, 28, 28), 10, 32, torch.float32)
        for _ in range(5):
            step(images, targets)
        results.append([parameter.clone() for parameter in model.parameters()])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_rows_of_uint8_images_are_gathered_and_scaled() -> None:
    compiled, eager = both(odd_sizes, torch.float32)
    loss = nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (20, 2, 11, 13), generator=generator, dtype=torch.uint8)
    targets = torch.randint(3, (20,), generator=generator)
    rows = torch.tensor([3, 19, 0, 3])
    step = compile_step(compiled, loss, optim.SGD(compiled.parameters(), lr=0.1))
    got, _ = step.on_rows(images, targets, rows)
    expected = autograd_step(eager, loss, optim.SGD(eager.parameters(), lr=0.1), images[rows] / 255, targets[rows])
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="index: expected numbers from 0 to 19, got 20"):
        step.on_rows(images, targets, torch.tensor([0, 20]))


def test_frozen_parameters_stay_and_the_rest_trains() -> None:
    compiled, eager = both(mnist_like, torch.float32)
    for model in (compiled, eager):
        model[0].requires_grad_(False)
        model[3].weight.requires_grad_(False)
    loss = nn.CrossEntropyLoss()
    images, targets = data((1, 28, 28), 10, 6, torch.float32)
    step = compile_step(compiled, loss, optim.SGD(compiled.parameters(), lr=0.1))
    optimizer = optim.SGD(eager.parameters(), lr=0.1)
    for _ in range(3):
        assert torch.equal(step(images, targets)[0], autograd_step(eager, loss, optimizer, images, targets))
    assert all(torch.equal(a, b) for a, b in zip(compiled.parameters(), eager.parameters(), strict=True))
    assert compiled[0].weight.grad is None


def test_parameters_that_moved_are_found_again() -> None:
    compiled, eager = both(odd_sizes, torch.float32)
    loss = nn.CrossEntropyLoss()
    images, targets = data((2, 11, 13), 3, 6, torch.float32)
    step = compile_step(compiled, loss, optim.SGD(compiled.parameters(), lr=0.1))
    optimizer = optim.SGD(eager.parameters(), lr=0.1)
    step(images, targets)
    autograd_step(eager, loss, optimizer, images, targets)
    compiled[0].weight.data = compiled[0].weight.data.clone()
    for _ in range(2):
        assert torch.equal(step(images, targets)[0], autograd_step(eager, loss, optimizer, images, targets))


def moved(tensors: Iterable[Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gives each tensor other memory; returns the one they had, in which nobody may write, and a copy of it."""
    copies = []
    for tensor in tensors:
        copies.append((tensor.data, tensor.data.clone()))
        tensor.data = tensor.data.clone()
    return copies


MOVES: dict[str, Callable[[Any, Any, Any], Iterable[torch.Tensor]]] = {
    "parameters": lambda model, other, optimizer: model.parameters(),
    "gradients": lambda model, other, optimizer: [parameter.grad for parameter in model.parameters()],
    "parameters of another model": lambda model, other, optimizer: other.parameters(),
    "state": lambda model, other, optimizer: [
        tensor for state in optimizer.state.values() for name, tensor in state.items() if name != "step"
    ],
}


@pytest.mark.parametrize("move", MOVES)
def test_nobody_writes_where_tensors_were_before_they_moved(move: str) -> None:
    (ours, theirs), (other, other_eager) = both(odd_sizes, torch.float32), both(odd_sizes, torch.float32)
    loss = nn.CrossEntropyLoss()
    images, targets = data((2, 11, 13), 3, 6, torch.float32)
    optimizer, eager = (
        optim.Adam([*a.parameters(), *b.parameters()]) for a, b in ((ours, other), (theirs, other_eager))
    )
    step, other_step = (compile_step(model, loss, optimizer) for model in (ours, other))
    assert torch.equal(other_step(images, targets)[0], autograd_step(other_eager, loss, eager, images, targets))
    for _ in range(3):
        assert torch.equal(step(images, targets)[0], autograd_step(theirs, loss, eager, images, targets))
    before = moved(MOVES[move](ours, other, optimizer))
    for _ in range(3):
        assert torch.equal(step(images, targets)[0], autograd_step(theirs, loss, eager, images, targets))
    assert all(torch.equal(old, copy) for old, copy in before)


def test_a_parameter_that_takes_another_shape_at_its_place_is_read_anew() -> None:
    model = torch.nn.Sequential(nn.Linear(8, 8, activation="relu"), nn.Linear(8, 8))
    step = compile_step(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.1))
    images, targets = torch.rand(4, 8), torch.arange(4)
    step(images, targets)
    model[1].weight.data, model[1].bias.data = model[1].weight.data[:5], model[1].bias.data[:5]
    expected = nn.CrossEntropyLoss()(model(images), targets)
    assert torch.equal(step(images, targets)[0], expected)
    model[0].weight.data = model[0].weight.data.t()
    with pytest.raises(NotCompilable, match="contiguous or channels_last memory"):
        step(images, targets)


def test_gradients_of_before_move_nothing() -> None:
    model = odd_sizes()
    other = torch.nn.Parameter(torch.ones(3))
    loss = nn.CrossEntropyLoss()
    images, targets = data((2, 11, 13), 3, 6, torch.float32)
    optimizer = optim.SGD([*model.parameters(), other], lr=0.1)
    (loss(model(images), targets) + other.sum()).backward()
    model[0].requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    compile_step(model, loss, optimizer)(images, targets)
    assert torch.equal(model[0].weight, frozen) and model[0].weight.grad is None
    assert torch.equal(other, torch.ones(3)) and other.grad is None


def test_schedulers_hooks_and_targets_count_in_every_step() -> None:
    model, _ = both(odd_sizes, torch.float32)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    step = compile_step(model, nn.CrossEntropyLoss(), optimizer)
    images, targets = data((2, 11, 13), 3, 6, torch.float32)
    step(images, targets)
    scheduler.step()  # the learning rate is now 0
    before = [parameter.clone() for parameter in model.parameters()]
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    step(images, targets)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert calls == [1]
    with pytest.raises(IndexError, match="Target 3 is out of bounds"):
        step(images, torch.full_like(targets, 3))


def test_a_call_before_the_update_sees_and_changes_what_the_step_found() -> None:
    model, other = both(odd_sizes, torch.float64)
    images, targets = data((2, 11, 13), 3, 6, torch.float64)

    def clip(loss: torch.Tensor, correct: torch.Tensor) -> None:
        assert 0 <= int(correct) <= 6
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        loss.mul_(2)

    optimizer = optim.SGD(model.parameters(), lr=0.5)
    loss, _ = compile_step(model, nn.CrossEntropyLoss(), optimizer, before_update=clip)(images, targets)
    expected = nn.CrossEntropyLoss()(other(images), targets)
    expected.backward()
    assert torch.nn.utils.clip_grad_norm_(other.parameters(), 0.01) > 0.01
    optim.SGD(other.parameters(), lr=0.5).step()
    assert torch.equal(loss, 2 * expected)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


class WithWeightDecay(lr_scheduler.OneCycleLR):
    """The weight decay follows the learning rate."""

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = group["lr"]


SCHEDULES: dict[str, tuple[Callable[[], Any], Callable[..., Any]]] = {
    "of a tensor": (
        lambda: torch.tensor(0.1),
        partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.2, step_size_up=5, cycle_momentum=False),
    ),
    "of a weight decay": (lambda: 0.1, partial(WithWeightDecay, max_lr=0.2, total_steps=50)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_takes_effect_after_its_step(name: str) -> None:
    rate, schedule = SCHEDULES[name]
    compiled, eager = both(odd_sizes, torch.float32)
    optimizers = [optim.SGD(model.parameters(), lr=rate()) for model in (compiled, eager)]
    schedulers = [schedule(optimizer) for optimizer in optimizers]
    loss = nn.CrossEntropyLoss()
    images, targets = data((2, 11, 13), 3, 6, torch.float32)
    index = torch.arange(3 * 50) % 6
    losses, _ = compile_step(compiled, loss, optimizers[0]).on_batches(images, targets, index, 3, schedulers[0].step)
    for got, rows in zip(losses, index.split(3), strict=True):
        assert torch.equal(got, autograd_step(eager, loss, optimizers[1], images[rows], targets[rows]))
        schedulers[1].step()
    assert all(torch.equal(a, b) for a, b in zip(compiled.parameters(), eager.parameters(), strict=True))


def test_a_rate_of_zero_after_a_tensor_moves_nothing() -> None:
    model, _ = both(odd_sizes, torch.float32)
    optimizer = optim.SGD(model.parameters(), lr=torch.tensor(0.5))
    step = compile_step(model, nn.CrossEntropyLoss(), optimizer)
    images, targets = data((2, 11, 13), 3, 6, torch.float32)
    for _ in range(2):
        step(images, targets)
    optimizer.param_groups[0]["lr"] = 0.0
    before = [parameter.clone() for parameter in model.parameters()]
    step(images, targets)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_step_that_replaces_the_optimizers_is_called() -> None:
    compiled, eager = both(odd_sizes, torch.float32)
    loss = nn.CrossEntropyLoss()
    images, targets = data((2, 11, 13), 3, 6, torch.float32)
    calls: list[Any] = []

    def clipping(model: torch.nn.Module) -> torch.optim.Optimizer:
        optimizer = optim.SGD(model.parameters(), lr=1.0)
        inner = optimizer.step

        def step(closure: Any = None) -> Any:
            calls.append(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            return inner(closure)

        optimizer.step = step  # type: ignore[method-assign]
        return optimizer

    step, optimizer = compile_step(compiled, loss, clipping(compiled)), clipping(eager)
    for _ in range(3):
        assert torch.equal(step(images, targets)[0], autograd_step(eager, loss, optimizer, images, targets))
    assert calls == [compiled, eager] * 3
    assert all(torch.equal(a, b) for a, b in zip(compiled.parameters(), eager.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_linear_layers_take_rows(dtype: torch.dtype) -> None:
    def build() -> torch.nn.Sequential:
        return torch.nn.Sequential(nn.Linear(5, 7, activation="relu"), nn.Linear(7, 3))

    compiled, eager = both(build, torch.float32)
    loss = nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(3)
    features = torch.randint(256, (20, 5), generator=generator).to(dtype)
    inputs = features / 255 if dtype is torch.uint8 else features
    targets = torch.randint(3, (20,), generator=generator)
    step = compile_step(compiled, loss, optim.SGD(compiled.parameters(), lr=0.1))
    optimizer = optim.SGD(eager.parameters(), lr=0.1)
    for rows in torch.arange(20).split(8):
        got, _ = step.on_rows(features, targets, rows)
        assert torch.equal(got, autograd_step(eager, loss, optimizer, inputs[rows], targets[rows]))
        got, _ = step(inputs[rows], targets[rows])
        assert torch.equal(got, autograd_step(eager, loss, optimizer, inputs[rows], targets[rows]))
    assert torch.equal(CompiledForward(compiled).on_batches(features, torch.arange(8), 8), eager(inputs[:8]))


class Doubling(torch.nn.Sequential):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def with_hook() -> torch.nn.Module:
    model = odd_sizes()
    model[0].register_forward_hook(lambda *_: None)
    return model


def with_parameter_hook() -> torch.nn.Module:
    model = odd_sizes()
    model[0].weight.register_hook(lambda grad: grad)
    return model


def with_shared_weight() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Flatten(), nn.Linear(286, 286), nn.Linear(286, 286), nn.Linear(286, 3))
    model[2].weight = model[1].weight
    return model


def with_the_same_layer_twice() -> torch.nn.Module:
    layer = nn.Linear(286, 286)
    return torch.nn.Sequential(torch.nn.Flatten(), layer, layer, nn.Linear(286, 3))


REFUSED: dict[str, tuple[Callable[[], torch.nn.Module], str]] = {
    "own forward": (lambda: Doubling(*odd_sizes()), "Sequential without hooks, got Doubling"),
    "torch layer": (lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(286, 3)), "layer of fastnn.nn"),
    "dropout": (lambda: odd_sizes().append(torch.nn.Dropout()), "layer of fastnn.nn"),
    "forward hook": (with_hook, "without hooks"),
    "parameter hook": (with_parameter_hook, "parameters without hooks"),
    "shared weight": (with_shared_weight, "none of them shared"),
    "shared layer": (with_the_same_layer_twice, "none of them shared"),
    "mixed dtypes": (lambda: odd_sizes().append(nn.Linear(3, 3).double()), "all of one dtype of float32, float64"),
    "circular padding": (
        lambda: torch.nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")),
        "numeric zero padding",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_program_cannot_express_is_named_and_trains_through_autograd(name: str) -> None:
    build, words = REFUSED[name]
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NotCompilable, match=words):
        compile_step(model, nn.CrossEntropyLoss(), optimizer)
    images, targets = data((2, 11, 13), 3, 4, torch.float32)
    with fastnn.explain_dispatch() as log:
        step = make_step(model, nn.CrossEntropyLoss(), optimizer, Batches(images, targets, 4))
    assert isinstance(step, AutogradStep)
    assert [record.operator for record in log] == ["training_step"]


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.CrossEntropyLoss(reduction="sum"), lambda x, y: x.sum()])
def test_other_losses_go_through_autograd(loss: Any) -> None:
    model = odd_sizes()
    with pytest.raises(NotCompilable, match="CrossEntropyLoss of the mean"):
        compile_step(model, loss, optim.SGD(model.parameters()))


def test_images_of_a_wrong_shape_are_refused() -> None:
    model = odd_sizes()
    step = compile_step(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters()))
    assert isinstance(step, CompiledStep)
    with pytest.raises(ValueError, match="images: expected shape"):
        step(torch.rand(2, 11, 13), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="weight: expected shape"):
        step(torch.rand(2, 2, 9, 9), torch.zeros(2, dtype=torch.int64))


def test_a_classifier_refuses_images_of_another_shape_than_its_own() -> None:
    model = fastnn.CNNClassifier((1, 12, 12), 2, (4,), (8,))
    step = compile_step(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters()))
    images = torch.rand(4, 1, 13, 13)  # with as many features as 12x12
    for call in (model, lambda images: step(images, torch.zeros(4, dtype=torch.int64))):
        with pytest.raises(ValueError, match=r"input: expected shape \(n, 1, 12, 12\), got \(4, 1, 13, 13\)"):
            call(images)


# Changes between two steps: each takes a model and its loss, and both ways of a step must follow.
CHANGES: dict[str, Callable[[torch.nn.Sequential, torch.nn.CrossEntropyLoss], object]] = {
    "a layer is frozen": lambda model, loss: model[2].requires_grad_(False),
    "a parameter takes part again": lambda model, loss: model[0].bias.requires_grad_(True),
    "another layer": lambda model, loss: model.__setitem__(2, copy.deepcopy(model[2]).requires_grad_(False)),
    "other parameters": lambda model, loss: model.load_state_dict(
        {name: tensor * 0.5 for name, tensor in model.state_dict().items()}, assign=True
    ),
    "no ReLU": lambda model, loss: setattr(model[2], "activation", None),
    "label smoothing": lambda model, loss: setattr(loss, "label_smoothing", 0.3),
    "class weights": lambda model, loss: setattr(loss, "weight", torch.tensor([1.0, 2.0, 0.5])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_since_the_last_step_counts(change: str) -> None:
    runs = []
    for by_program in (True, False):
        torch.manual_seed(0)
        model, loss = odd_sizes(), nn.CrossEntropyLoss()
        model[0].bias.requires_grad_(False)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        step = compile_step(model, loss, optimizer) if by_program else partial(autograd_step, model, loss, optimizer)
        images, targets = data((2, 11, 13), 3, 6, torch.float32)
        losses = []
        for i in range(6):
            if i == 3:
                CHANGES[change](model, loss)
            value = step(images, targets)
            losses.append((value[0] if by_program else value).clone())
        runs.append((losses, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(a, b)


def test_a_hook_that_came_later_is_named_and_fit_goes_on_without_programs() -> None:
    model = odd_sizes()
    loss = nn.CrossEntropyLoss()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    images, targets = data((2, 11, 13), 3, 6, torch.float32)
    compiled_step = compile_step(model, loss, optimizer)
    step = make_step(model, loss, optimizer, Batches(images, targets, 6))
    rows = torch.arange(6)
    step(Batches(images, targets, 6), rows)
    seen: list[torch.Tensor] = []
    handle = model[2].register_forward_hook(lambda module, args, output: seen.append(output))
    for _ in range(2):
        with pytest.raises(NotCompilable, match="without hooks"):
            compiled_step(images, targets)
    step(Batches(images, targets, 6), rows)
    assert len(seen) == 1
    handle.remove()
    step(Batches(images, targets, 6), rows)
    compiled_step(images, targets)
    assert len(seen) == 1


def test_hooks_on_the_loss_and_optimizers_with_closures_go_through_autograd() -> None:
    model = odd_sizes()
    loss = nn.CrossEntropyLoss()
    loss.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(NotCompilable, match="loss: expected one without hooks"):
        compile_step(model, loss, optim.SGD(model.parameters()))
    with pytest.raises(NotCompilable, match="takes no closure, got LBFGS"):
        compile_step(model, nn.CrossEntropyLoss(), torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="takes no closure, got LBFGS"):
        AutogradStep(model, nn.CrossEntropyLoss(), torch.optim.LBFGS(model.parameters()))
    strided = nn.CrossEntropyLoss(torch.ones(6)[::2])
    with pytest.raises(NotCompilable, match="contiguous"):
        compile_step(model, strided, optim.SGD(model.parameters()))


@pytest.mark.parametrize(
    ("images", "targets", "error", "message"),
    [
        (torch.rand(4, 2, 11, 13).double(), torch.zeros(4, dtype=torch.int64), TypeError, "images: expected torch.fl"),
        (torch.ones(4, 2, 11, 13).byte(), torch.zeros(4, dtype=torch.int64), TypeError, "got torch.uint8"),
        (
            torch.rand(4, 2, 11, 13, requires_grad=True),
            torch.zeros(4, dtype=torch.int64),
            ValueError,
            r"images\.detach",
        ),
        (torch.rand(4, 2, 11, 13), torch.rand(4), TypeError, "targets: expected class numbers of torch.int64"),
        (torch.rand(4, 2, 11, 13), torch.tensor([2]), ValueError, r"targets: expected shape \(4,\)"),
    ],
)
def test_a_call_takes_nothing_that_it_would_have_to_convert(
    images: torch.Tensor, targets: torch.Tensor, error: type[Exception], message: str
) -> None:
    model = odd_sizes()
    step = compile_step(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters()))
    with pytest.raises(error, match=message):
        step(images, targets)


# bf16


@pytest.mark.skipif(not _C.has_bf16(), reason="this processor has no AVX512-BF16")
def test_a_step_in_bf16_runs_its_kernel_and_stays_near_float32() -> None:
    images, targets = data((1, 28, 28), 10, 32, torch.float32)
    losses = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        model = mnist_like()
        step = compile_step(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.05), precision=precision)
        with fastnn.explain_dispatch() as log:
            losses[precision] = [step(images, targets)[0].item() for _ in range(20)]
        kernels = {record.kernel for record in log if record.operator == "conv2d_forward"}
        assert kernels == {"winograd_1x4", "winograd_bf16" if precision == "bf16" else "winograd_4x4"}
        assert all(parameter.dtype is torch.float32 for parameter in model.parameters())
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_bf16_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    model = odd_sizes()
    arguments = (nn.CrossEntropyLoss(), optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="precision: expected 'fp32' or 'bf16', got 'fp16'"):
        compile_step(model, *arguments, precision="fp16")
    monkeypatch.setattr(_C, "has_bf16", lambda: False)
    with pytest.raises(ValueError, match="needs a processor with AVX512-BF16"):
        compile_step(model, *arguments, precision="bf16")
    monkeypatch.setattr(_C, "has_bf16", lambda: True)
    with pytest.raises(NotCompilable, match=r"expected 'fp32' for torch\.float64"):
        compile_step(model.double(), *arguments, precision="bf16")
    images, targets = data((2, 11, 13), 3, 4, torch.float32)
    with pytest.raises(NotCompilable, match=r"layer of fastnn\.nn"):  # no silent float32
        make_step(odd_sizes().append(torch.nn.Dropout()), *arguments, Batches(images, targets, 4), "bf16")


# the forward pass alone


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_compiled_forward_gives_the_bits_of_the_model(name: str, dtype: torch.dtype) -> None:
    build, shape, classes = MODELS[name]
    torch.manual_seed(0)
    model = build().to(dtype).eval()
    images, targets = data(shape, classes, 11, dtype)
    forward = make_forward(model, Batches(images, targets, 4, dtype))
    parts = torch.arange(10, -1, -1).split(4)
    with torch.no_grad(), fastnn.explain_dispatch() as log:
        expected = torch.cat([model(images[rows].contiguous(memory_format=torch.channels_last)) for rows in parts])
        assert torch.equal(forward(torch.cat(parts)), expected)
    assert log and all(record.kernel != "torch" for record in log)


@pytest.mark.parametrize("limit", [compiled.SIDE_BY_SIDE_BYTES, 0])
def test_batches_side_by_side_have_the_bits_of_one_thread(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "SIDE_BY_SIDE_BYTES", limit)
    build, shape, classes = MODELS["cifar"]
    torch.manual_seed(0)
    model = build().eval()
    images, _ = data(shape, classes, 47, torch.float32)
    index = torch.randperm(47)
    outputs = {}
    for threads in (1, 2, 3, 8):
        with thread_limit(threads):
            forward = CompiledForward(model)
            outputs[threads] = forward.on_batches(images, index, 4)
            assert torch.equal(forward.on_batches(images, index, 4), outputs[threads])  # again, in the same memory
        # 11 whole batches: 9 of three threads side by side, for example, 2 one after the other, and one of 3 images.
        memories = {number for number, *_ in forward._recordings}
        assert memories == set(range(threads if limit else 1))
    assert all(torch.equal(outputs[threads], outputs[1]) for threads in outputs)
    with torch.no_grad():
        torch.testing.assert_close(outputs[1], model(images[index]), rtol=1e-5, atol=1e-6)


def test_a_forward_pass_may_give_images() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3)).eval()
    images, _ = data((3, 8, 9), 2, 7, torch.float32)
    with thread_limit(2), torch.no_grad():
        output = CompiledForward(model).on_batches(images, torch.arange(7), 2)
        torch.testing.assert_close(output, model(images), rtol=1e-5, atol=1e-6)
    assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": []}, "programs: expected as many as rows and outputs, at least one, got 1, 0 and 1"),
        ({"index": torch.arange(3)}, r"index: expected whole batches of 2 rows, .* got \(3,\) and \(4, 5\)"),
        ({"output": torch.empty(2, 5)}, r"index: expected whole batches of 2 rows, .* got \(4,\) and \(2, 5\)"),
        ({"output": torch.empty(4, 10)[:, ::2]}, "output: expected a dense tensor on the CPU"),
        ({"index": torch.arange(4, dtype=torch.int32)}, "index: expected int64, got int32"),
    ],
    ids=["no rows", "half a batch", "a short output", "strides", "int32"],
)
def test_batches_of_programs_refuse_what_does_not_fit(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "programs": [_C.Program()],
        "rows": [torch.arange(2)],
        "outputs": [torch.empty(2, 5)],
        "index": torch.arange(4),
        "output": torch.empty(4, 5),
    }
    _C.run_batches(**arguments)
    with pytest.raises((TypeError, ValueError), match=message):
        _C.run_batches(**{**arguments, **changed})


def test_an_error_of_one_thread_is_raised_and_the_next_call_works() -> None:
    build, shape, classes = MODELS["cifar"]
    model = build().eval()
    images, _ = data(shape, classes, 16, torch.float32)
    with thread_limit(2):
        forward = CompiledForward(model)
        expected = forward.on_batches(images, torch.arange(16), 2)
        with pytest.raises(ValueError, match="index: expected numbers from 0 to 15, got 16"):
            forward.on_batches(images, torch.arange(1, 17), 2)
        assert torch.equal(forward.on_batches(images, torch.arange(16), 2), expected)


def test_a_forward_pass_that_no_program_expresses_runs_the_model() -> None:
    model = odd_sizes().append(torch.nn.Dropout()).eval()
    images, targets = data((2, 11, 13), 3, 4, torch.float32)
    with fastnn.explain_dispatch() as log:
        forward = make_forward(model, Batches(images, targets, 4))
    assert [record.operator for record in log] == ["forward_pass"]
    assert torch.equal(forward(torch.arange(4)), model(images))
