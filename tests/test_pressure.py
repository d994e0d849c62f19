"""Changes between forward and backward, threads, forks, thread counts at any moment, arrays beyond 2^31 elements."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import generator, random
from tolerance import assert_identical
from torch import Tensor

import fastnn
from fastnn import _C, functional, nn, optim, reference

LABELS = torch.tensor([1, 0, 4, 2])
WEIGHT = torch.arange(1.0, 6.0, dtype=torch.float64)


@dataclass(frozen=True)
class Operator:
    """``shapes`` are those of the differentiable arguments, ``others`` tensors after them, by name."""

    id: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    others: dict[str, Tensor] = field(default_factory=dict)
    kwargs: dict[str, Any] = field(default_factory=dict)

    def make(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Leaves that are no leaves, so that they may be changed in place, and the others."""
        rng = generator("pressure", self.id)
        tensors = [random(shape, torch.float64, rng).requires_grad_() * 1 for shape in self.shapes]
        return tensors, {name: value.clone() for name, value in self.others.items()}

    def call(self, module: Any, tensors: list[Tensor], others: dict[str, Tensor]) -> Tensor:
        return getattr(module, self.name)(*tensors, **others, **self.kwargs)


CONV = ((2, 3, 6, 6), (4, 3, 3, 3), (4,))
OPERATORS = (
    Operator("linear", "linear", ((4, 6), (5, 6), (5,))),
    Operator("linear_relu", "linear", ((4, 6), (5, 6), (5,)), kwargs={"activation": "relu"}),
    Operator("conv2d", "conv2d", CONV, kwargs={"padding": 1}),
    Operator("conv2d_relu", "conv2d", CONV, kwargs={"activation": "relu"}),
    Operator("conv2d_relu_pool", "conv2d", CONV, kwargs={"activation": "relu", "max_pool": 2}),
    Operator("conv2d_relu_pool_overlapping", "conv2d", CONV, kwargs={"activation": "relu", "max_pool": (3, 1, 1)}),
    Operator("max_pool2d", "max_pool2d", ((2, 3, 6, 6),), kwargs={"kernel_size": 2}),
    Operator("relu", "relu", ((4, 5),)),
    Operator("softmax", "softmax", ((4, 5),), kwargs={"dim": 1}),
    Operator("log_softmax", "log_softmax", ((4, 5),), kwargs={"dim": 1}),
    Operator("cross_entropy", "cross_entropy", ((4, 5),), {"target": LABELS, "weight": WEIGHT}),
    Operator("cross_entropy_probabilities", "cross_entropy", ((4, 5), (4, 5)), {"weight": WEIGHT}),
    Operator("nll_loss", "nll_loss", ((4, 5),), {"target": LABELS, "weight": WEIGHT}),
    Operator("mse_loss", "mse_loss", ((4, 5), (4, 5)), {"weight": torch.full((4, 5), 2.0, dtype=torch.float64)}),
)
each_operator = pytest.mark.parametrize("operator", [pytest.param(o, id=o.id) for o in OPERATORS])


# Changes between forward and backward


def gradients_after_change(operator: Operator, module: Any, place: int | str | None) -> list[Tensor] | None:
    """The gradients where the argument at `place` ("output": the result) was changed after forward; None for an
    error."""
    tensors, others = operator.make()
    output = operator.call(module, tensors, others)
    changed = output if place == "output" else {**dict(enumerate(tensors)), **others}.get(place)
    if changed is not None:
        with torch.no_grad():
            changed.zero_()
    try:
        return list(torch.autograd.grad(output, tensors, torch.ones_like(output), allow_unused=True))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return None


# Losses that keep their arguments for the backward pass, where torch keeps what it has computed from them.
KEEP_ARGUMENTS = ("cross_entropy", "cross_entropy_probabilities", "mse_loss")


@each_operator
def test_changing_what_backward_needs_raises_as_in_torch(operator: Operator) -> None:
    """Where torch raises fastnn does; where neither does, the gradients are those without the change."""
    undisturbed = gradients_after_change(operator, functional, None)
    assert undisturbed is not None
    raised = 0
    for place in (*range(len(operator.shapes)), *operator.others, "output"):
        actual = gradients_after_change(operator, functional, place)
        expected = gradients_after_change(operator, reference, place)
        if operator.id not in KEEP_ARGUMENTS or expected is None:
            assert (actual is None) == (expected is None), f"argument {place}"
        if actual is None:
            raised += 1
            continue
        for a, b in zip(actual, undisturbed, strict=True):
            assert torch.equal(a, b)
    assert raised


# (operator, special value in, seen in) -> how the places that are not finite compare with torch's, where not the same.
CONVOLUTIONS = ("conv2d", "conv2d_relu", "conv2d_relu_pool", "conv2d_relu_pool_overlapping")
ELSEWHERE = {
    # Where weights meet the padding, torch multiplies them by zero in float64; fastnn leaves out what it can.
    **{(name, 1, "output"): "fewer" for name in CONVOLUTIONS},
    # So with the output's gradient, for the weight's.
    ("conv2d", "grad_output", 1): "fewer",
    # The same places, but NaN and infinities among them differ: torch takes its sums in another order.
    ("cross_entropy_probabilities", 1, "output"): "same",
    ("cross_entropy_probabilities", "grad_output", 0): "same",
}


def assert_same_kinds(actual: Tensor, expected: Tensor, relation: str | None, where: str) -> None:
    ours, theirs = ~actual.isfinite(), ~expected.isfinite()
    if relation is None:
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(actual), kind(expected)), where
    elif relation == "same":
        assert torch.equal(ours, theirs), where
    else:
        few, many = (ours, theirs) if relation == "fewer" else (theirs, ours)
        assert not (few & ~many).any(), where
    both = ~(ours | theirs)
    torch.testing.assert_close(actual[both], expected[both], rtol=1e-12, atol=1e-12, msg=where)


@each_operator
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_special_values_go_where_they_go_in_torch(operator: Operator, special: float) -> None:
    """Into each argument in turn, and into the gradient of the output: forward and backward."""
    for place in (*range(len(operator.shapes)), "grad_output"):
        results = []
        for module in (functional, reference):
            tensors, others = operator.make()
            if place != "grad_output":
                tensors = [t.detach().clone() for t in tensors]
                tensors[place].view(-1)[tensors[place].numel() // 2] = special
                tensors = [t.requires_grad_() for t in tensors]
            output = operator.call(module, tensors, others)
            grad = torch.ones_like(output)
            if place == "grad_output":
                grad.view(-1)[grad.numel() // 2] = special
            results.append((output.detach(), *torch.autograd.grad(output, tensors, grad)))
        for name, actual, expected in zip(("output", *range(9)), *results, strict=False):
            relation = ELSEWHERE.get((operator.id, place, name))
            assert_same_kinds(actual, expected, relation, f"{special} in {place}, seen in {name}")


# Threads


SEEDED = threading.Lock()  # torch's generator is one for all threads


def network() -> torch.nn.Sequential:
    with SEEDED:
        torch.manual_seed(0)
        return torch.nn.Sequential(
            nn.Conv2d(1, 16, 3, activation="relu", max_pool=2),
            nn.Conv2d(16, 16, 3, padding=1, activation="relu"),
            torch.nn.Flatten(),
            nn.Linear(16 * 36, 8, activation="relu"),
            nn.Linear(8, 3),
        )


IMAGES, TARGETS = torch.randn(16, 1, 14, 14, generator=generator("pressure")), torch.arange(16) % 3


def trained(kind: str, between: Callable[[int], object] = lambda number: None, steps: int = 12) -> list[Tensor]:
    """The parameters after some steps, `between` called before each."""
    model, loss_function = network(), nn.CrossEntropyLoss()
    optimizer = optim.Adam(model.parameters(), lr=1e-2)
    compiled = fastnn.training.compile_step(model, loss_function, optimizer) if kind == "compiled" else None
    for number in range(steps):
        between(number)
        if compiled is not None:
            compiled(IMAGES, TARGETS)
            continue
        optimizer.zero_grad()
        loss_function(model(IMAGES), TARGETS).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("kind", ["autograd", "compiled"])
def test_set_num_threads_at_any_moment(kind: str) -> None:
    threads = torch.get_num_threads()
    expected = trained(kind)
    try:
        # Far more than this machine has, too: a loop has at most as many threads as tasks.
        actual = trained(kind, lambda number: torch.set_num_threads((1, 2, 7, 64, 3)[number % 5]))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(actual, expected, strict=True):
        assert_identical(a, b)


def run_together(works: list[Callable[[], object]]) -> None:
    """Runs them in threads of their own; raises what the first of them raised."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def test_threads_train_at_once_while_settings_change() -> None:
    """Every thread gets the bits that it gets alone, whoever sets the thread count or looks at the record meanwhile."""
    threads, expected, stop = torch.get_num_threads(), trained("autograd"), threading.Event()

    def train_and_compare(kind: str) -> None:
        for _ in range(3):
            for a, b in zip(trained(kind), expected, strict=True):
                assert_identical(a, b)

    def meddle() -> None:
        count = 0
        while not stop.is_set():
            count += 1
            torch.set_num_threads(1 + count % 5)
            with fastnn.explain_dispatch():
                fastnn.set_isa(fastnn.get_isa())
            fastnn.build_info()

    meddler = threading.Thread(target=meddle, daemon=True)
    meddler.start()
    try:
        run_together([lambda kind=kind: train_and_compare(kind) for kind in ("autograd", "compiled") * 2])
    finally:
        stop.set()
        meddler.join(60)
        torch.set_num_threads(threads)
    assert not meddler.is_alive()


def test_one_graph_is_run_backward_in_another_thread() -> None:
    model, results = network(), []
    loss = nn.CrossEntropyLoss()(model(IMAGES), TARGETS)
    run_together([lambda: results.append(torch.autograd.grad(loss, list(model.parameters())))])
    again = nn.CrossEntropyLoss()(model(IMAGES), TARGETS)
    for a, b in zip(results[0], torch.autograd.grad(again, list(model.parameters())), strict=True):
        assert_identical(a, b)


FORK = """
    import os, signal, torch, fastnn
    import test_pressure as pressure

    torch.set_num_threads(2)
    expected = pressure.trained("compiled")  # fastnn's own threads are running now

    def child():
        signal.alarm(60)
        torch.set_num_threads(1)  # torch's own pool does not live on in a child
        for kind in ("compiled", "autograd"):
            for a, b in zip(pressure.trained(kind), expected, strict=True):
                assert torch.equal(a, b)

    children = []
    for _ in range(3):
        number = os.fork()
        if number == 0:
            code = 1
            try:
                child()
                code = 0
            finally:
                os._exit(code)
        children.append(number)
    codes = [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in children]
    for a, b in zip(pressure.trained("compiled"), expected, strict=True):
        assert torch.equal(a, b)
    print(*codes)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forks_after_own_threads_ran_train_alike() -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORK)],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert result.stdout.split() == ["0", "0", "0"], result.stderr


# More than 2^31 elements, of which few are ever touched: numpy's zeros take no memory until they are written, and what
# is read of them is one page.

BEYOND = 2**31 + 2**16


def untouched(*shape: int, dtype: Any = np.float32) -> Tensor:
    return torch.from_numpy(np.zeros(shape, dtype))


@pytest.fixture
def little_memory() -> Any:
    """Fails where the test made this process grow by a gigabyte."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")

    def resident() -> int:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return sum(int(lines[key].split()[0]) for key in ("RssAnon", "RssShmem"))

    before = resident()
    yield
    assert resident() - before < 1 << 20  # KiB


def test_linear_beyond_2_to_31(little_memory: None, isa: str) -> None:
    x = untouched(BEYOND // 2**16, 2**16)
    x[-1, -1] = 3
    y = functional.linear(x, torch.ones(2, 2**16))
    assert_identical(y[-1], torch.tensor([3.0, 3.0]))
    assert not y[:-1].any()


def test_conv2d_beyond_2_to_31(little_memory: None, isa: str) -> None:
    x = untouched(1, BEYOND // 2**10, 2**10, 1).permute(0, 3, 1, 2)
    x[0, 0, -8, -8] = 3
    y = functional.conv2d(x, torch.full((1, 1, 1, 1), 2.0), stride=8)
    assert y[0, 0, -1, -1] == 6
    assert y.count_nonzero() == 1


def test_max_pool2d_beyond_2_to_31(little_memory: None, isa: str) -> None:
    x = untouched(1, 1, 2**19 + 2, 2**12 + 2)  # the last window of stride 64 ends at the last pixel
    x[0, 0, -1, -1] = 3
    y, indices = functional.max_pool2d(x, 2, stride=64, return_indices=True)
    assert y[0, 0, -1, -1] == 3
    assert indices[0, 0, -1, -1] == x.numel() - 1 > 2**31


def test_class_losses_beyond_2_to_31(little_memory: None) -> None:
    x = untouched(3, BEYOND // 2)
    x[2, -1] = -5
    assert functional.nll_loss(x, torch.tensor([0, 1, BEYOND // 2 - 1]), reduction="sum") == 5


def test_mse_loss_beyond_2_to_31(little_memory: None, isa: str) -> None:
    x = untouched(BEYOND)
    x[-1] = 3
    assert functional.mse_loss(x, untouched(BEYOND), reduction="sum") == 9


def test_gather_images_beyond_2_to_31(little_memory: None) -> None:
    images = untouched(BEYOND // 2**10, 1, 32, 32, dtype=np.uint8)
    images[-1, 0, -1, -1] = 255
    batch = torch.empty(1, 1, 32, 32).contiguous(memory_format=torch.channels_last)
    _C.gather_images(batch, images, torch.tensor([len(images) - 1]), 255.0)
    assert batch.sum() == batch[0, 0, -1, -1] == 1


@pytest.mark.parametrize("size", [2**31, 2**40])
def test_shapes_beyond_memory_are_worked_out_on_meta(size: int) -> None:
    x = torch.empty(size, 1, 8, 8, device="meta")
    y = functional.conv2d(x, torch.empty(4, 1, 3, 3, device="meta"), activation="relu", max_pool=2)
    assert y.shape == (size, 4, 3, 3)
    z = functional.linear(y.flatten(1), torch.empty(5, 36, device="meta"))
    assert functional.softmax(z, 1).shape == (size, 5)
