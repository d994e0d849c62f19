"""Whole networks in the rest of torch's world: compilers, exporters, copies, checkpoints, parametrizations, hooks.

tests/test_autograd_rules.py asks the same of every operator alone.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from cases import generator, random
from dispatch_log import fell_back, kernels_of, ran_kernels
from networks import CLASSES, assert_near, fused_network, make_batch, network
from tolerance import assert_identical
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrizations, prune, spectral_norm
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

import fastnn
from fastnn import functional, nn, optim


def gradients(loss: Tensor, model: torch.nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, tuple(model.parameters()))


def train(model: torch.nn.Module, layers: Any, optimizers: Any, steps: int = 3) -> Tensor:
    """The network's output after a few steps."""
    images, targets = make_batch()
    optimizer = optimizers.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        layers.CrossEntropyLoss()(model(images), targets).backward()
        optimizer.step()
    return model(images).detach()


# ---- compilers and exporters


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_forward_loss_and_backward_compile_as_one_graph(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    model, loss_function = fused_network(), nn.CrossEntropyLoss()

    def compute(images: Tensor, targets: Tensor) -> Tensor:
        return loss_function(model(images), targets)

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(compute, fullgraph=True, dynamic=dynamic, backend=counter)
    graphs = []
    for count in (4, 6, 9) if dynamic else (4, 4):
        batch = make_batch(count)
        expected = compute(*batch)
        with ran_kernels("conv2d_forward", "linear_forward", "cross_entropy_forward", "conv2d_grad", "linear_backward"):
            loss = compiled(*batch)
            grads = gradients(loss, model)
        assert_near(loss, expected)
        assert_near(grads, gradients(expected, model))
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1  # all of them made by the first call


@pytest.mark.parametrize(("name", "options"), [("Adam", {}), ("SGD", {"momentum": 0.9})], ids=["adam", "sgd"])
def test_compiled_optimizers_update_as_torchs_compiled_ones(name: str, options: dict[str, float]) -> None:
    """Without fullgraph: torch's own optimizers break the graph once, to make their state."""
    results = []
    for optimizers in (optim, torch.optim):
        torch._dynamo.reset()
        model = network(torch.nn)
        optimizer = getattr(optimizers, name)(model.parameters(), lr=0.1, **options)
        step = torch.compile(optimizer.step, backend="aot_eager")
        for _ in range(3):
            for index, parameter in enumerate(model.parameters()):
                parameter.grad = torch.full_like(parameter, index + 0.5)
            step()
        results.append(tuple(parameter.detach() for parameter in model.parameters()))
    # Graphs compute Adam's corrections of the bias in float32, as the step count is: 16 roundings of updates of 0.1.
    torch.testing.assert_close(*results, rtol=0, atol=0.1 * 16 * 2**-24 if name == "Adam" else 1e-14)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export_keeps_the_operators_and_survives_a_file(dynamic: bool) -> None:
    model = fused_network()
    images, _ = make_batch(4)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    called = [str(node.target) for node in program.graph.nodes if "fastnn" in str(node.target)]
    assert called == ["fastnn.conv2d.default", "fastnn.linear.default", "fastnn.linear.default"]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for count in (4, 7) if dynamic else (4,):
        images, _ = make_batch(count)
        with ran_kernels("conv2d_forward", "linear_forward"):
            output = loaded(images)
        assert_identical(output, model(images))


def test_networks_are_built_on_meta_and_filled_later() -> None:
    with torch.device("meta"):
        model = fused_network()
        output = model(torch.empty(5, 1, 8, 8, dtype=torch.float64))
    assert output.is_meta and output.shape == (5, CLASSES)
    expected = fused_network()
    model.to_empty(device="cpu").load_state_dict(expected.state_dict())
    images, _ = make_batch()
    assert_identical(model(images), expected(images))


def test_a_symbolic_trace_calls_our_functions() -> None:
    images, _ = make_batch()
    for model in (fused_network(), nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Softmax(dim=1)).double()):
        model.eval()
        expected = model(images)
        traced = torch.fx.symbolic_trace(model)
        targets = {node.target for node in traced.graph.nodes}
        assert functional.conv2d in targets
        with ran_kernels("conv2d_forward"):
            assert_identical(traced(images), expected)
        assert_identical(model(images), expected)


# ---- modes that see every operation


def test_floating_point_operations_are_counted_as_torch_counts_its_own() -> None:
    images, targets = make_batch()
    counts = []
    for layers in (nn, torch.nn):
        model = network(layers)
        with FlopCounterMode(display=False) as counter:
            layers.CrossEntropyLoss()(model(images), targets).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_fake_tensors_of_a_mode_go_through_real_layers() -> None:
    model = fused_network()
    images, _ = make_batch()
    with FakeTensorMode(allow_non_fake_inputs=True):
        output = model(images)
    assert isinstance(output, FakeTensor)
    assert output.shape == model(images).shape


def test_a_policy_of_what_to_keep_sees_the_operators() -> None:
    model, (images, _) = network(nn), make_batch()
    expected = gradients(model(images).square().sum(), model)
    seen: list[Any] = []

    def policy(context: Any, operator: Any, *args: Any, **options: Any) -> CheckpointPolicy:
        seen.append(operator)
        keep = operator in (torch.ops.fastnn.conv2d.default, torch.ops.fastnn.linear.default)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    output = checkpoint(model, images, use_reentrant=False, context_fn=contexts)
    actual = gradients(output.square().sum(), model)
    assert torch.ops.fastnn.conv2d.default in seen
    for ours, theirs in zip(actual, expected, strict=True):
        assert_identical(ours, theirs)


# ---- derivatives


def test_gradients_of_single_samples_by_torch_func() -> None:
    """vmap over grad over functional_call, as torch's documentation does it."""
    images, targets = make_batch()
    results = []
    for layers in (nn, torch.nn):
        model, loss_function = network(layers), layers.CrossEntropyLoss()

        def loss(
            parameters: dict[str, Tensor],
            image: Tensor,
            target: Tensor,
            model: torch.nn.Module = model,
            loss_function: Any = loss_function,
        ) -> Tensor:
            logits = torch.func.functional_call(model, parameters, (image[None],))
            return loss_function(logits, target[None])

        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
        if layers is nn:
            with fell_back():
                results.append(per_sample(parameters, images, targets))
        else:
            results.append(per_sample(parameters, images, targets))
    assert_near(*results)


def test_a_gradient_penalty_trains_through_the_second_derivative() -> None:
    results = []
    for layers in (nn, torch.nn):
        model = network(layers)
        images = make_batch()[0].requires_grad_()
        (grad,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
        results.append(gradients(grad.square().sum(), model)[::2])  # of the weights: biases of the last layer have none
    assert_near(*results)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_activations_are_computed_again_to_the_same_bits(use_reentrant: bool) -> None:
    model = fused_network()
    images, targets = make_batch()
    images.requires_grad_()
    losses = nn.CrossEntropyLoss()
    inputs = (images, *model.parameters())
    expected = torch.autograd.grad(losses(model(images), targets), inputs)
    model.zero_grad()
    images.grad = None
    with ran_kernels("conv2d_forward", "conv2d_grad_weight") as records:
        losses(checkpoint(model, images, use_reentrant=use_reentrant), targets).backward()
    assert len(kernels_of(records, "conv2d_forward")) == 2  # once on the way forward, once for the backward
    for leaf, grad in zip(inputs, expected, strict=True):
        assert_identical(leaf.grad, grad)


# ---- copies and files


def through_torch_save(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


def through_state_dict(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    torch.save(model.state_dict(), folder / "state.pt")
    other = every_layer(seed=1)
    other.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    return other


def through_safetensors(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    safetensors.torch.save_model(model, str(folder / "model.safetensors"))
    other = every_layer(seed=1)
    assert safetensors.torch.load_model(other, folder / "model.safetensors") == (set(), [])
    return other


COPIERS: dict[str, Callable[[torch.nn.Module, Path], torch.nn.Module]] = {
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "torch_save": through_torch_save,
    "state_dict": through_state_dict,
    "safetensors": through_safetensors,
}


def every_layer(seed: int = 0) -> torch.nn.ModuleDict:
    torch.manual_seed(seed)
    return torch.nn.ModuleDict(
        {
            "conv2d": nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect", activation="relu", max_pool=(3, 2, 1)),
            "max_pool2d": nn.MaxPool2d(2, ceil_mode=True),
            "linear": nn.Linear(8, 5, bias=False, activation="relu"),
            "relu": nn.ReLU(inplace=True),
            "softmax": nn.Softmax(dim=1),
            "log_softmax": nn.LogSoftmax(dim=1),
            "cross_entropy": nn.CrossEntropyLoss(torch.arange(1.0, 9.0), label_smoothing=0.1, reduction="sum"),
            "nll_loss": nn.NLLLoss(torch.arange(1.0, 9.0), ignore_index=1),
            "mse_loss": nn.MSELoss(reduction="none"),
        }
    )


def outputs_of(model: torch.nn.ModuleDict) -> list[Tensor]:
    rows, targets = random((4, 8), torch.float32, generator("rows")), torch.tensor([1, 0, 7, 2])
    images, _ = make_batch(dtype=torch.float32)
    arguments: dict[str, tuple[Tensor, ...]] = {"conv2d": (images,), "max_pool2d": (images,)}
    arguments |= {"cross_entropy": (rows, targets), "nll_loss": (rows, targets), "mse_loss": (rows, rows + 1)}
    return [layer(*(tensor.clone() for tensor in arguments.get(name, (rows,)))) for name, layer in model.items()]


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS.keys())
def test_copies_of_every_layer_compute_the_same_bits(
    copier: Callable[[torch.nn.Module, Path], torch.nn.Module], tmp_path: Path
) -> None:
    model = every_layer()
    other = copier(model, tmp_path)
    assert repr(other) == repr(model)
    for ours, expected in zip(outputs_of(other), outputs_of(model), strict=True):
        assert_identical(ours, expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert all(parameter.any() for parameter in model.parameters())  # a copy, not a view


@pytest.mark.parametrize("ours_first", [False, True], ids=["from_torch", "to_torch"])
def test_parameters_move_between_torchs_layers_and_ours(ours_first: bool) -> None:
    source, target = (network(layers) for layers in ((nn, torch.nn) if ours_first else (torch.nn, nn)))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.5)
    assert not target.load_state_dict(source.state_dict()).missing_keys
    images, _ = make_batch()
    assert_near(target(images), source(images))


# ---- what wraps parameters and layers


def each_layer_with(change: Callable[[torch.nn.Module], Any]) -> Callable[[torch.nn.Sequential], None]:
    def apply(model: torch.nn.Sequential) -> None:
        for layer in model:
            if hasattr(layer, "weight"):
                change(layer)

    return apply


def prune_everywhere(model: torch.nn.Sequential) -> None:
    pairs = [(layer, "weight") for layer in model if hasattr(layer, "weight")]
    prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=0.3)


def prune_for_good(layer: torch.nn.Module) -> None:
    prune.remove(prune.l1_unstructured(layer, "weight", amount=0.5), "weight")


WRAPPERS: dict[str, Callable[[torch.nn.Sequential], None]] = {
    "spectral_norm": each_layer_with(spectral_norm),
    "spectral_norm_parametrization": each_layer_with(parametrizations.spectral_norm),
    "weight_norm": each_layer_with(parametrizations.weight_norm),
    "orthogonal": each_layer_with(parametrizations.orthogonal),
    "prune_global": prune_everywhere,
    "prune_structured": each_layer_with(lambda layer: prune.ln_structured(layer, "weight", 0.5, n=2, dim=0)),
    "prune_removed": each_layer_with(prune_for_good),
}


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrapped_parameters_train_as_torchs_do(wrapper: Callable[[torch.nn.Sequential], None]) -> None:
    ours, theirs = network(nn), network(torch.nn)
    for model in (ours, theirs):
        torch.manual_seed(1)  # some of them draw first vectors
        wrapper(model)
    with ran_kernels("conv2d_forward", "linear_forward", "conv2d_grad_weight", "linear_backward", "sgd_step"):
        output = train(ours, nn, optim)
    assert_near(output, train(theirs, torch.nn, torch.optim))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert_near(list(ours.state_dict().values()), list(theirs.state_dict().values()))


def test_hooks_see_what_they_see_in_torchs_layers() -> None:
    """All kinds of them, in the same order and with the same tensors; those that return a tensor replace one."""

    def run(layers: Any) -> tuple[list[str], dict[str, Tensor]]:
        model, order, seen = network(layers), [], {}

        def note(key: str, values: Tensor | tuple[Tensor, ...]) -> None:
            order.append(key)
            seen[key] = (values if isinstance(values, Tensor) else values[0]).detach().clone()

        def note_layer(layer: torch.nn.Module, name: str) -> None:
            layer.register_forward_pre_hook(lambda _, inputs: note(f"{name} forward pre", inputs))
            layer.register_forward_hook(lambda _, inputs, output: note(f"{name} forward", output))
            layer.register_full_backward_pre_hook(lambda _, grads: note(f"{name} backward pre", grads))
            layer.register_full_backward_hook(lambda _, grads, __: note(f"{name} backward", grads))

        def note_parameter(parameter: torch.nn.Parameter, name: str) -> None:
            parameter.register_hook(lambda grad: note(f"{name} gradient", grad))
            parameter.register_post_accumulate_grad_hook(lambda leaf: note(f"{name} accumulated", leaf.grad))

        for name, layer in model.named_children():
            note_layer(layer, name)
        for name, parameter in model.named_parameters():
            note_parameter(parameter, name)
        model[1].register_forward_pre_hook(lambda layer, inputs: (inputs[0] * 2,))
        model[4].register_forward_hook(lambda layer, inputs, output: output + 1)
        model[6].register_full_backward_hook(lambda layer, grads, _: (grads[0] * 3,))
        images, targets = make_batch()
        layers.CrossEntropyLoss()(model(images.requires_grad_()), targets).backward()
        return order, seen

    with ran_kernels("conv2d_forward", "linear_forward", "conv2d_grad_weight", "linear_backward"):
        order, seen = run(nn)
    expected_order, expected = run(torch.nn)
    assert len(seen) == len(order) == 7 * 4 + 6 * 2
    assert_near(seen, expected)
    # Which parameter of a layer comes first is each operator's own affair.
    assert [key for key in order if "ward" in key] == [key for key in expected_order if "ward" in key]


# ---- worker processes


class Projected(Dataset):
    """Rows that a kernel computes in whatever process asks for them."""

    def __init__(self) -> None:
        self.layer = nn.Linear(16, 4)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, bool]:
        with fastnn.explain_dispatch() as log, torch.no_grad():
            row = self.layer(torch.full((16,), float(index)))
        return row, kernels_of(log, "linear_forward") == ["dot"]


def test_spawned_loader_workers_run_kernels() -> None:
    """Forked ones: tests/test_binding.py."""
    data = Projected()
    loader = DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context="spawn", timeout=60)
    batches: Iterator[Any] = iter(loader)
    for start, (rows, by_kernel) in zip((0, 2, 4), batches, strict=True):
        expected = functional.linear(
            torch.arange(start, start + 2.0)[:, None].expand(2, 16), data.layer.weight, data.layer.bias
        )
        assert by_kernel.all()
        torch.testing.assert_close(rows, expected.detach())
