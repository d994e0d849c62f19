"""Compiled steps and their replays: on the CPU's kernels, on a GPU, or on CUDA's kernels in the emulator."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from device import DEVICE, KERNEL_DTYPES, ON_CUDA
from dispatch_log import ran_kernels
from tolerance import assert_identical

import fastnn
from fastnn import nn, optim
from fastnn.compiled import STEPS_PER_REPLAY
from fastnn.training import Batches, compile_step, make_step


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        nn.Conv2d(1, 8, 3, activation="relu", max_pool=2),
        nn.Conv2d(8, 12, 3, padding=1, activation="relu"),
        nn.MaxPool2d(2),
        torch.nn.Flatten(),
        nn.Linear(12 * 9, 16, activation="relu"),
        nn.Linear(16, 5),
    ).to(DEVICE)


def data(count: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    images = torch.rand(count, 1, 14, 14, generator=rng).to(DEVICE, dtype)
    return images, torch.randint(5, (count,), generator=rng).to(DEVICE)


OPTIMIZERS: dict[str, Any] = {
    "adam": lambda parameters: optim.Adam(parameters, lr=2e-3),
    "adamw": lambda parameters: optim.AdamW(parameters, lr=2e-3, amsgrad=True),
    "sgd": lambda parameters: optim.SGD(parameters, lr=0.05, momentum=0.9),
    "torch": lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_compiled_steps_end_at_the_bits_of_autograd(name: str, dtype: torch.dtype) -> None:
    compiled = network().to(dtype)
    eager = copy.deepcopy(compiled)
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in (compiled, eager)]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7) for optimizer in optimizers]
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    step = compile_step(compiled, loss, optimizers[0])
    images, targets = data(24, dtype)
    for i in range(6):
        rows = torch.arange(4 * i, 4 * i + (4 if i % 3 else 3), device=DEVICE) % 24  # two batch sizes
        with ran_kernels("conv2d_forward", "cross_entropy_backward"):
            got, correct = step.on_rows(images, targets, rows)
        assert int(correct) == int((eager(images[rows]).argmax(1) == targets[rows]).sum())
        optimizers[1].zero_grad()
        value = loss(eager(images[rows]), targets[rows])
        value.backward()
        optimizers[1].step()
        assert_identical(got, value.detach(), "loss")
        for scheduler in schedulers:
            scheduler.step()
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert_identical(ours, theirs)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "torch"])
def test_several_steps_at_once_end_at_the_bits_of_single_ones(name: str) -> None:
    """A replay takes several steps with a schedule that moves learning rate and betas or momentum after each."""
    models = network(), network()
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in models]
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, 180) for optimizer in optimizers]
    steps = [
        compile_step(model, nn.CrossEntropyLoss(), optimizer)
        for model, optimizer in zip(models, optimizers, strict=True)
    ]
    images, targets = data(4 * 43 - 2)
    for epoch in range(4):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch)).to(DEVICE)
        losses, correct = steps[0].on_batches(images, targets, order, 4, schedulers[0].step)
        right = 0
        for i, rows in enumerate(order.split(4)):
            loss, its = steps[1].on_rows(images, targets, rows)
            assert torch.equal(losses[i], loss)
            right += int(its)
            schedulers[1].step()
        assert len(losses) == i + 1
        assert int(correct) == right
        launched = {launch for recording in steps[0]._recordings.values() for launch in recording.launches}
        several = () if name == "torch" else STEPS_PER_REPLAY[DEVICE.type]
        assert launched == {f"{steps} of rows" for steps in (1, *several)}
        assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_in_the_users_hands_and_one_from_rows_agree() -> None:
    models = network(), network()
    steps = [compile_step(m, nn.CrossEntropyLoss(), optim.SGD(m.parameters(), lr=0.1)) for m in models]
    images, targets = data(8)
    rows = torch.tensor([3, 1, 7], device=DEVICE)
    for _ in range(4):
        first = steps[0](images[rows], targets[rows])
        second = steps[1].on_rows(images, targets, rows)
        assert torch.equal(first[0], second[0])
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_a_replay_was_made_from_may_change() -> None:
    """A loaded or emptied optimizer state, another option and other data take effect at once."""
    models = network(), network()
    optimizers = [optim.Adam(model.parameters(), lr=1e-2) for model in models]
    step = compile_step(models[0], nn.CrossEntropyLoss(), optimizers[0])
    images, targets = data(8)
    loss = nn.CrossEntropyLoss()
    rows = torch.arange(5, device=DEVICE)
    for i in range(14):
        if i == 3:
            for optimizer in optimizers:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if i == 5:
            for optimizer in optimizers:
                optimizer.param_groups[0]["weight_decay"] = 0.1
        if i == 6:
            for optimizer in optimizers:
                optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2, device=DEVICE))], "lr": 0.1})
        if i == 7:
            images, targets = images.flip(0).contiguous(), targets.flip(0).contiguous()
        if i == 10:
            for optimizer in optimizers:
                optimizer.state.clear()
        step.on_rows(images, targets, rows)
        optimizers[1].zero_grad()
        loss(models[1](images[:5]), targets[:5]).backward()
        optimizers[1].step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_replays_run_every_kernel_and_count_as_modifications() -> None:
    model = network()
    step = compile_step(model, nn.CrossEntropyLoss(), optim.Adam(model.parameters()))
    images, targets = data(8)
    several = max(STEPS_PER_REPLAY[DEVICE.type])
    order = torch.arange(8 * several, device=DEVICE) % 8
    for _ in range(2):
        step.on_batches(images, targets, order, 8)
    versions = [parameter._version for parameter in model.parameters()]
    values = [parameter.clone() for parameter in model.parameters()]
    with fastnn.explain_dispatch() as log:
        step.on_batches(images, targets, order, 8)
    if DEVICE.type == "cpu":  # a graph's kernels leave no record
        ran = Counter(record.operator for record in log)
        assert ran["gather_images"] == ran["cross_entropy_backward"] == ran["adam_step"] == several
        assert ran["conv2d_forward"] == 2 * several
    assert all(p._version > version for p, version in zip(model.parameters(), versions, strict=True))
    assert not any(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))


def test_an_update_that_torch_makes_is_not_left_out_of_replays() -> None:
    models = network(), network()
    optimizers = [optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for model in models]
    step = compile_step(models[0], nn.CrossEntropyLoss(), optimizers[0])
    images, targets = data(4)
    for i in range(6):
        with fastnn.explain_dispatch() as log:
            step.on_rows(images, targets, torch.arange(4, device=DEVICE))
        if i > 1:
            assert [record.kernel for record in log if record.operator.startswith("sgd")] == ["torch", "momentum"]
        optimizers[1].zero_grad()
        nn.CrossEntropyLoss()(models[1](images), targets).backward()
        optimizers[1].step()
        if i == 1:  # no kernel takes buffers of another dtype
            for model, optimizer in zip(models, optimizers, strict=True):
                state = optimizer.state[model[0].weight]
                state["momentum_buffer"] = state["momentum_buffer"].to(torch.bfloat16)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(ON_CUDA, reason="there the kernel refuses wrong rows")
def test_wrong_rows_are_refused_before_a_replay() -> None:
    model = network()
    step = compile_step(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.1))
    images, targets = data(6)
    for _ in range(3):
        step.on_rows(images, targets, torch.tensor([0, 5]))
    before = [parameter.clone() for parameter in model.parameters()]
    for wrong, error, words in (
        (torch.tensor([0, 6]), ValueError, "index: expected numbers from 0 to 5, got 6"),
        (torch.tensor([-1, 2]), ValueError, "index: expected numbers from 0 to 5, got -1"),
        (torch.tensor([0.0, 1.0]), TypeError, "index: expected int64 of one dimension, got torch.float32"),
        (torch.tensor([[0, 1]]), TypeError, r"index: expected int64 of one dimension, got torch.int64 of shape \(1, 2"),
    ):
        with pytest.raises(error, match=words):
            step.on_rows(images, targets, wrong)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_step_of_a_device_is_a_program() -> None:
    model = network()
    images, targets = data(6)
    batches = Batches(images.cpu(), targets.cpu(), 3, device=DEVICE)
    assert batches.images.device == DEVICE or DEVICE.type == "cuda"
    with ran_kernels("conv2d_forward"):
        make_step(model, nn.CrossEntropyLoss(), optim.Adam(model.parameters()), batches)(
            batches, torch.arange(3, device=DEVICE)
        )


def classifier_and_images() -> tuple[fastnn.CNNClassifier, Any, Any]:
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (48, 12, 12), generator=rng, dtype=torch.uint8)
    labels = torch.arange(48) % 2
    images[labels == 1, 3:9, 3:9] += 150  # a bright square
    model = fastnn.CNNClassifier((1, 12, 12), 2, conv_channels=(8,), hidden=(8,)).to(DEVICE)
    return model, images.numpy(), labels.numpy()


def test_a_classifier_learns() -> None:
    model, images, labels = classifier_and_images()
    history = model.fit(images, labels, epochs=6, batch_size=8, lr=1e-2, seed=0, progress=False)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert model.evaluate(images, labels)["accuracy"] > 0.9


def test_a_classifier_moves_between_devices(tmp_path: Any) -> None:
    pytest.importorskip("safetensors")
    model, images, _ = classifier_and_images()
    probabilities = model.predict_proba(images)
    model.save(tmp_path / "model.safetensors")
    loaded = fastnn.CNNClassifier.load(tmp_path / "model.safetensors")
    assert next(loaded.parameters()).device.type == "cpu"
    assert abs(loaded.predict_proba(images) - probabilities).max() < 1e-5


@pytest.mark.skipif(DEVICE.type != "cuda", reason="graphs and streams are a GPU's")
def test_layers_work_in_the_users_own_graph_and_stream() -> None:
    model, images = network(), data(4)[0]
    expected = model(images)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(model(images), expected)
    torch.cuda.current_stream().wait_stream(stream)
    still, graph = images.clone(), torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = model(still)
    for shift in range(3):
        still.copy_(images.roll(shift, 0))
        graph.replay()
        assert torch.equal(output, model(still))


@pytest.mark.skipif(DEVICE.type != "cuda" or torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_second_device() -> None:
    model, images = network().to("cuda:1"), data(4)[0].to("cuda:1")
    with fastnn.explain_dispatch() as log:
        model(images).sum().backward()
    assert {record.device for record in log} == {"cuda:1"}


@pytest.mark.skipif(DEVICE.type != "cuda" or torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("first", [None, "cuda:0"], ids=["alone", "after_another"])
def test_compiled_steps_train_on_a_device_that_is_not_current(first: str | None) -> None:
    for device in filter(None, (first, "cuda:1")):
        model, (images, labels) = network().to(device), (t.to(device) for t in data(4))
        step = compile_step(model, fastnn.nn.CrossEntropyLoss(), fastnn.optim.SGD(model.parameters(), lr=0.1))
        losses = [float(step(images, labels)) for _ in range(12)]
        assert losses == sorted(losses, reverse=True) and len(set(losses)) == len(losses)
