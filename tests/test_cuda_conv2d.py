"""linear and conv2d on CUDA's kernels in the emulator: the same bits under every schedule, near the float64 formula.

tests/test_cuda_operators.py runs all shapes under one schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import generator, integers, random
from emulated import SCHEDULES, each_dtype, emulator, scheduled
from tolerance import assert_close_bound, assert_identical, computed_in, product_bound, rounded_bound, tf32_bound
from torch import Tensor

TURING = 75  # compute capability of devices that get the plain products


@dataclass(frozen=True)
class Shape:
    batch: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    relu: bool = False
    pool: bool = False
    channels_last_weight: bool = True

    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        return (self.stride,) * 2, (self.padding,) * 2, (1, 1), self.groups


# Odd tails everywhere: rows, columns and sums that end inside a block, channels that are no whole chunks.
SHAPES = {
    "chunks": Shape(3, 16, 24, 7, 9, 3, padding=1, relu=True),
    "values": Shape(2, 3, 5, 9, 7, 3, stride=2, padding=1),
    "pooled": Shape(3, 8, 40, 9, 8, 3, relu=True, pool=True),
    "pooled_values": Shape(2, 1, 33, 8, 11, 3, pool=True),
    "few_taps": Shape(3, 2, 34, 9, 8, 2, stride=2, padding=1, relu=True),
    "pooled_few_taps": Shape(5, 1, 40, 13, 30, 3, padding=1, relu=True, pool=True),
    "groups": Shape(2, 16, 24, 6, 5, 3, padding=1, groups=2, channels_last_weight=False),
    "depthwise": Shape(2, 37, 37, 7, 6, 3, padding=1, groups=37),
    "split_sum": Shape(1, 96, 16, 4, 4, 3, padding=1, relu=True),
    "pooled_colours": Shape(3, 3, 36, 9, 11, 3, padding=1, relu=True, pool=True),
    # For each shape of blocks - 128 x 32, 128 x 64, 128 x 128 - one whose outputs take it, and one whose weights do.
    "narrow": Shape(4, 12, 20, 13, 11, 3, padding=1, relu=True, pool=True),
    "narrow_weight": Shape(2, 3, 72, 16, 15, 3, padding=1),
    "tall": Shape(4, 40, 56, 12, 13, 3, padding=1, pool=True),
    "tall_weight": Shape(2, 6, 72, 16, 15, 3, padding=1),
    "wide": Shape(2, 72, 136, 12, 11, 3, padding=1, relu=True),
}


def make(name: str, dtype: torch.dtype, fill: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s, rng = SHAPES[name], generator("cuda conv2d", name, fill)
    values = integers if fill == "integers" else random
    x = values((s.batch, s.in_channels, s.height, s.width), dtype, rng)
    w = values((s.out_channels, s.in_channels // s.groups, s.kernel, s.kernel), dtype, rng)
    if s.channels_last_weight:
        w = w.contiguous(memory_format=torch.channels_last)
    size = F.conv2d(x[:1].double(), w.double(), None, s.stride, s.padding, 1, s.groups).shape[2:]
    out = [side // 2 if s.pool else side for side in size]
    grad = values((s.batch, s.out_channels, *out), dtype, rng)
    channels_last = torch.channels_last
    return x.contiguous(memory_format=channels_last), w, values((s.out_channels,), dtype, rng), grad


def run(name: str, x: Tensor, w: Tensor, b: Tensor, grad: Tensor, precision: str = "fp32") -> list[Tensor]:
    """Output, winners (or nothing), and the gradients of input, weight and bias; all start as NaN."""
    s = SHAPES[name]
    y = torch.full_like(grad, float("nan"), memory_format=torch.channels_last)
    winner = torch.full_like(y, 99, dtype=torch.uint8) if s.pool else None
    emulator.conv2d_forward(y, winner, x, w, b, *s.geometry(), s.relu, s.pool, precision)
    if s.pool:
        alone = torch.full_like(y, float("nan"))
        emulator.conv2d_forward(alone, None, x, w, b, *s.geometry(), s.relu, s.pool, precision)
        assert torch.equal(alone.nan_to_num(7), y.nan_to_num(7))
    grads = [torch.full_like(t, float("nan")) for t in (x, w, b)]
    output = y if s.relu and not s.pool else None
    grad = grad.contiguous(memory_format=torch.channels_last)
    emulator.conv2d_backward(*grads, grad, x, w, output, winner, *s.geometry(), precision)
    return [y, *([] if winner is None else [winner]), *grads]


@pytest.mark.parametrize("capability", [90, TURING])
@each_dtype
@pytest.mark.parametrize("name", SHAPES)
def test_every_schedule_gives_the_same_bits_and_integers_are_exact(
    name: str, dtype: torch.dtype, capability: int
) -> None:
    tensors = make(name, dtype, "integers")
    results = []
    for schedule in SCHEDULES:
        with scheduled(schedule, capability):
            results.append(run(name, *tensors))
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            assert torch.equal(first, again)

    s, (x, w, b, grad) = SHAPES[name], tensors
    leaves = [t.double().requires_grad_() for t in (x, w, b)]
    z = F.conv2d(*leaves, s.stride, s.padding, 1, s.groups)
    z = z.relu() if s.relu else z
    expected = F.max_pool2d(z, 2) if s.pool else z
    assert_identical(results[0][0], expected, "output")
    grads = torch.autograd.grad(expected, leaves, grad.double())
    for what, actual, wanted in zip(("grad_input", "grad_weight", "grad_bias"), results[0][-3:], grads, strict=True):
        assert_identical(actual, wanted, what)


# What serves outputs, and weights' gradients, of these shapes.
KERNELS = {
    "values": ("tf32x3", "tf32x3"),
    "pooled_colours": ("tf32x3", "tf32x3"),
    "few_taps": ("direct", "tf32x3"),
    "pooled_values": ("direct", "sparse"),
    "pooled_few_taps": ("direct", "sparse"),
    "depthwise": ("depthwise", "depthwise"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_goes_by_the_shape(name: str) -> None:
    emulator.trace_start()
    run(name, *make(name, torch.float32, "random"))
    records = emulator.trace_stop()
    for operator, kernel in zip(("conv2d_forward", "conv2d_grad_weight"), KERNELS[name], strict=True):
        assert {record[1] for record in records if record[0] == operator} == {kernel}


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_a_split_sum_is_near_the_formula_under_every_schedule(precision: str) -> None:
    name = "split_sum"
    x, w, b, grad = make(name, torch.float32, "random")
    s = SHAPES[name]
    emulator.trace_start()
    results = []
    for schedule in SCHEDULES:
        with scheduled(schedule):
            results.append(run(name, x, w, b, grad, precision)[0])
    kernels = {record[1] for record in emulator.trace_stop() if record[0].startswith("conv2d")}
    assert kernels == {"tf32" if precision == "tf32" else "tf32x3"}
    assert all(torch.equal(results[0], other) for other in results[1:])
    expected = F.conv2d(x.double(), w.double(), b.double(), 1, s.padding).relu()
    magnitude = F.conv2d(x.double().abs(), w.double().abs(), b.double().abs(), 1, s.padding)
    roundings = 9 * s.in_channels + 1
    if precision == "tf32":
        bound = tf32_bound(roundings, magnitude)
    else:
        bound = product_bound(roundings, torch.float32, magnitude, ["tf32x3"])
    assert_close_bound(results[0], expected, bound)


@each_dtype
@pytest.mark.parametrize("name", ["pooled", "pooled_values", "pooled_few_taps", "pooled_colours"])
def test_what_is_not_finite_spoils_the_weight_gradients_that_it_does_in_torch(name: str, dtype: torch.dtype) -> None:
    """Also where the gradient is 0, since 0 times it is NaN."""
    s, (x, w, b, grad) = SHAPES[name], make(name, dtype, "integers")
    x[0, 0, 0, 1], x[1, -1, 0, 0] = torch.inf, torch.nan
    grad_weight = run(name, x, w, b, grad)[-2]
    leaves = [t.double().requires_grad_() for t in (x, w, b)]
    z = F.conv2d(*leaves, s.stride, s.padding)
    expected = F.max_pool2d(z.relu() if s.relu else z, 2)
    wanted = torch.autograd.grad(expected, leaves[1], grad.double())[0].isfinite()
    assert 0 < wanted.sum() < wanted.numel()
    assert torch.equal(grad_weight.isfinite(), wanted)


@each_dtype
@pytest.mark.parametrize("capability", [90, TURING])
def test_linear_under_every_schedule(dtype: torch.dtype, capability: int) -> None:
    rng = generator("cuda linear")
    x, w, b = random((19, 300), dtype, rng), random((21, 300), dtype, rng), random((21,), dtype, rng)
    results = []
    for schedule in SCHEDULES:
        with scheduled(schedule, capability):
            y = torch.full((19, 21), float("nan"), dtype=dtype)
            emulator.linear_forward(y, x, w, b, True)
            results.append(y)
    assert all(torch.equal(results[0], other) for other in results[1:])
    expected = F.linear(x.double(), w.double(), b.double()).relu()
    magnitude = F.linear(x.double().abs(), w.double().abs(), b.double().abs())
    bound = product_bound(301, computed_in(dtype), magnitude, ["tf32x3"])
    assert_close_bound(results[0], expected, rounded_bound(bound, expected, dtype))
