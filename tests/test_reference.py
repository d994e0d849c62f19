"""The oracles themselves: the reference against torch, and the tolerances against arithmetic of known
error."""

from __future__ import annotations

import inspect
import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import generator, random
from tolerance import assert_close_bound, rounding_bound, winograd, winograd_bound, winograd_row
from torch import Tensor

from fastnn import functional, reference

OPERATORS = (
    "conv2d",
    "cross_entropy",
    "linear",
    "log_softmax",
    "max_pool2d",
    "mse_loss",
    "nll_loss",
    "relu",
    "softmax",
)


@pytest.mark.parametrize("name", OPERATORS)
def test_signatures_are_those_of_the_public_functions(name: str) -> None:
    ours, public = (inspect.signature(getattr(module, name)).parameters for module in (reference, functional))
    assert list(ours) == list(public)
    assert [p.default for p in ours.values()] == [p.default for p in public.values()]
    assert [p.kind for p in ours.values()] == [p.kind for p in public.values()]


# torch wraps max_pool2d, and its convolution is a builtin: these have no signature to read.
@pytest.mark.parametrize("name", sorted(set(OPERATORS) - {"conv2d", "linear", "max_pool2d"}))
def test_signatures_are_torchs(name: str) -> None:
    ours = inspect.signature(getattr(reference, name)).parameters
    torchs = inspect.signature(getattr(F, name)).parameters
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in torchs.values()]


def gradients(steps: int) -> list[Tensor]:
    rng = generator("gradients")
    return [random((7,), torch.float64, rng) for _ in range(steps)]


def torch_steps(optimizer_type: Any, options: dict[str, Any]) -> list[Tensor]:
    parameter = torch.linspace(-1, 1, 7, dtype=torch.float64).requires_grad_()
    optimizer = optimizer_type([parameter], **options)
    values = []
    for grad in gradients(5):
        parameter.grad = grad.clone()
        optimizer.step()
        values.append(parameter.detach().clone())
    return values


SGD_OPTIONS = [
    {
        "lr": 0.1,
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "maximize": maximize,
    }
    for momentum, dampening, nesterov, weight_decay, maximize in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.1), (False, True)
    )
    if not nesterov or (momentum and not dampening)
]


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=lambda o: ",".join(k for k, v in o.items() if v and k != "lr"))
def test_sgd_step_is_torchs(options: dict[str, Any]) -> None:
    parameter, buffer = torch.linspace(-1, 1, 7, dtype=torch.float64), None
    for grad, expected in zip(gradients(5), torch_steps(torch.optim.SGD, options), strict=True):
        parameter, buffer = reference.sgd_step(parameter, grad, buffer, **options)
        torch.testing.assert_close(parameter, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True], ids=["", "maximize"])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_adam_steps_are_torchs(name: str, amsgrad: bool, weight_decay: float, maximize: bool) -> None:
    options = {"lr": 0.1, "amsgrad": amsgrad, "weight_decay": weight_decay, "maximize": maximize}
    step = getattr(reference, f"{name.lower()}_step")
    parameter = torch.linspace(-1, 1, 7, dtype=torch.float64)
    moments: tuple[Any, ...] = (torch.zeros_like(parameter), torch.zeros_like(parameter), None)
    expectations = torch_steps(getattr(torch.optim, name), options)
    for count, (grad, expected) in enumerate(zip(gradients(5), expectations, strict=True), start=1):
        parameter, *moments = step(parameter, grad, *moments, step=count, **options)
        torch.testing.assert_close(parameter, expected, rtol=1e-13, atol=1e-13)


def test_bound_accepts_float32_and_refuses_bfloat16() -> None:
    rng = generator("bound")
    x, w = random((40, 300), torch.float32, rng), random((30, 300), torch.float32, rng)
    exact = F.linear(x.double(), w.double())
    bound = rounding_bound(301, torch.float32, F.linear(x.double().abs(), w.double().abs()))
    assert_close_bound(F.linear(x, w), exact, bound)
    with pytest.raises(AssertionError, match=r"worst at \(\d+, \d+\)"):
        assert_close_bound(F.linear(x.bfloat16().float(), w), exact, bound)
    with pytest.raises(AssertionError, match="out of bounds"):
        assert_close_bound(F.linear(x, w).index_fill(0, torch.tensor([3]), float("nan")), exact, bound)


@pytest.mark.parametrize("channels", [1, 16, 64])
@pytest.mark.parametrize("offset", [0.0, 10.0], ids=["", "far_from_zero"])
@pytest.mark.parametrize("kernel", ["winograd_1x4", "winograd_2x2", "winograd_4x4", "winograd_2x2_5x5"])
@pytest.mark.parametrize("size", [(12, 10), (11, 7), (1, 2)], ids=str)
def test_winograd_bound_holds_for_winograd_in_float32(
    channels: int, offset: float, kernel: str, size: tuple[int, int]
) -> None:
    rng = generator("winograd", channels)
    taps = 5 if kernel.endswith("5x5") else 3
    x = random((2, channels, *(outputs + taps - 1 for outputs in size)), torch.float32, rng) + offset
    w = random((8, channels, taps, taps), torch.float32, rng)
    convolve = {
        "winograd_1x4": winograd_row,
        "winograd_2x2": partial(winograd, largest=2),
        "winograd_4x4": partial(winograd, largest=4),
        "winograd_2x2_5x5": partial(winograd, largest=2),
    }[kernel]
    exact = F.conv2d(x.double(), w.double())
    assert_close_bound(convolve(x.double(), w.double()), exact, 1e-9)
    bound = winograd_bound(x, w, torch.float32, [kernel])
    assert_close_bound(convolve(x, w), exact, bound)
    # Tight enough to find a wrong kernel: well below the values themselves.
    assert (bound / F.conv2d(x.double().abs(), w.double().abs())).max() < 1e-3
