"""softmax and log_softmax on CUDA, in the emulator: bounds from the arithmetic, the same bits in every schedule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import SOFTMAX_CASES, SoftmaxCase, by_id, generator, lay_out, random
from emulated import each_dtype, each_schedule, emulator, ran_on_the_emulator, scheduled
from tolerance import (
    EXP_ULPS,
    assert_close_bound,
    computed_in,
    log_softmax_bound,
    rounded_bound,
    softmax_bound,
    unit_roundoff,
)
from torch import Tensor

NAMES = ("softmax", "log_softmax")
# Each way through the kernels: one lane to all of a warp for a row, blocks of both sizes, several bundles of lines,
# lines of one thread and of many.
WAYS = (
    (SoftmaxCase("lane_a_row", (67, 4), 1), "warp_rows"),
    (SoftmaxCase("rows_300x10", (300, 10), 1), "warp_rows"),
    (SoftmaxCase("warp_a_row", (9, 256), 1), "warp_rows"),
    (SoftmaxCase("block_a_row", (3, 257), 1), "block_rows"),
    (SoftmaxCase("wide_row", (2, 4099), 1), "block_rows"),
    (SoftmaxCase("thread_a_line", (3, 5, 130), 1), "lines"),
    (SoftmaxCase("8_threads_a_line", (2, 37, 35), 1), "lines"),
    (SoftmaxCase("32_threads_a_line", (70, 3), 0), "lines"),
)


def forward(name: str, x: Tensor, dim: int) -> Tensor:
    output = torch.full_like(x, float("nan"), memory_format=torch.contiguous_format)
    getattr(emulator, f"{name}_forward")(output, x, dim % x.dim())
    return output


def backward(name: str, grad: Tensor, output: Tensor, dim: int) -> Tensor:
    grad_input = torch.full_like(output, float("nan"))
    getattr(emulator, f"{name}_backward")(grad_input, grad, output, dim % output.dim())
    return grad_input


def check(name: str, x: Tensor, dim: int, variant: str | None) -> None:
    dtype = x.dtype
    compute = computed_in(dtype)
    u = unit_roundoff(compute) * (2 if dtype == torch.float64 else 1)
    with ran_on_the_emulator(f"{name}_forward", variant):
        output = forward(name, x, dim)
    expected = getattr(F, name)(x.double(), dim)
    limit: Callable[..., Tensor] = softmax_bound if name == "softmax" else log_softmax_bound
    assert_close_bound(output, expected, rounded_bound(limit(x, dim, compute), expected, dtype), name)

    # Of the rounded output, which is what backward reads.
    grad = random(tuple(x.shape), dtype, generator("grad", tuple(x.shape)))
    with ran_on_the_emulator(f"{name}_backward", variant):
        actual = backward(name, grad, output, dim)
    g, y, classes = grad.double(), output.double(), x.shape[dim]
    if name == "softmax":
        expected = y * (g - (g * y).sum(dim, keepdim=True))
        magnitude = y * (g.abs() + (classes + 3) * (g * y).abs().sum(dim, keepdim=True))
    else:
        expected = g - y.exp() * g.sum(dim, keepdim=True)
        magnitude = g.abs() + (classes + 2 * EXP_ULPS + 2) * y.exp() * g.abs().sum(dim, keepdim=True)
    bound = 1.01 * u * (magnitude + expected.abs()) + 4 * torch.finfo(compute).tiny
    assert_close_bound(actual, expected, rounded_bound(bound, expected, dtype), f"{name} gradient")


@each_dtype
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("case", by_id(case for case in SOFTMAX_CASES if 0 not in case.input))
def test_matches_reference(case: SoftmaxCase, scale: float, name: str, dtype: torch.dtype) -> None:
    check(name, random(case.input, dtype, generator("softmax", case.id, scale)) * scale, case.dim, None)


@each_dtype
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("case", "variant"), WAYS, ids=[case.id for case, _ in WAYS])
def test_every_way(case: SoftmaxCase, variant: str, name: str, dtype: torch.dtype) -> None:
    check(name, random(case.input, dtype, generator("way", case.id)), case.dim, variant)


@pytest.mark.parametrize("name", NAMES)
def test_unaligned_memory(name: str) -> None:
    check(name, lay_out(random((5, 7), torch.float16, generator("offset")), "offset"), 1, "warp_rows")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_do(name: str) -> None:
    x = torch.zeros(0, 10)
    assert backward(name, x, forward(name, x, 1), 1).shape == x.shape


@each_schedule
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("case", "variant"), WAYS, ids=[case.id for case, _ in WAYS])
def test_schedules_agree(case: SoftmaxCase, variant: str, name: str, schedule: tuple[str, bool]) -> None:
    x = random(case.input, torch.float32, generator("schedule", case.id))
    grad = random(case.input, torch.float32, generator("schedule grad", case.id))
    output = forward(name, x, case.dim)
    with scheduled(schedule):
        with ran_on_the_emulator(f"{name}_forward", variant):
            assert torch.equal(forward(name, x, case.dim), output)
        with ran_on_the_emulator(f"{name}_backward", variant):
            grad_input = backward(name, grad, output, case.dim)
    assert torch.equal(grad_input, backward(name, grad, output, case.dim))


@each_dtype
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("across", [False, True], ids=["rows", "lines"])
def test_special_values_are_torchs(across: bool, name: str, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    rows = [[0, nan, 1], [-inf, 0, 1], [-inf, -inf, -inf], [inf, 0, 1], [6e4, -6e4, 0], [-inf, 5, -inf]]
    x = torch.tensor(rows, dtype=dtype)
    x, dim = (x.t().contiguous(), 0) if across else (x, 1)
    torch.testing.assert_close(forward(name, x, dim), getattr(F, name)(x, dim), equal_nan=True)
