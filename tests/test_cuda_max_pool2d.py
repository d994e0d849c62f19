"""max_pool2d's CUDA kernels in the emulator: values, indices and gradients are exact, so all must match bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import FILLS, POOL_CASES, PoolCase, by_id, find, generator, lay_out, pair
from emulated import each_dtype, each_schedule, emulator, ran_on_the_emulator, scheduled
from fuzzing import fuzz, pool_cases
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close_bound, assert_identical, rounded_bound, rounding_bound

LAYOUTS = ("contiguous", "channels_last")

# 16 channels are whole vectors in every dtype.
VECTOR_CASES = (
    PoolCase("16_channels", (2, 16, 7, 6), {"kernel_size": 2}),
    PoolCase("16_channels_overlap", (2, 16, 7, 9), {"kernel_size": 3, "stride": 2, "padding": 1}),
    PoolCase("24_channels_dilation", (1, 24, 9, 8), {"kernel_size": (2, 3), "stride": 1, "dilation": (3, 2)}),
)
# Cells with gaps and with padding, one wider than cells may be, more taps than a byte counts, one window for all.
MORE_CASES = (
    *VECTOR_CASES,
    PoolCase("gap", (2, 3, 11, 10), {"kernel_size": 2, "stride": 3, "padding": 1}),
    PoolCase("gap_beyond_cells", (1, 3, 11, 13), {"kernel_size": 2, "stride": (5, 2)}),
    PoolCase("many_taps", (2, 3, 19, 18), {"kernel_size": (17, 16), "stride": 1, "padding": 2}),
    PoolCase("one_window", (2, 3, 4, 3), {"kernel_size": (4, 3), "stride": 1 << 31}),
)


def window(kwargs: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    """``(kernel_size, stride, padding, dilation)`` as the binding takes them."""
    kernel = pair(kwargs["kernel_size"])
    stride = kwargs.get("stride")
    return kernel, pair(stride or kernel), pair(kwargs.get("padding", 0)), pair(kwargs.get("dilation", 1))


def winners_dtypes(case: PoolCase) -> tuple[torch.dtype, ...]:
    kernel = pair(case.kwargs["kernel_size"])
    return (torch.int64, torch.uint8) if kernel[0] * kernel[1] <= 256 else (torch.int64,)


def forward(case: PoolCase, x: torch.Tensor, y: torch.Tensor, winners_dtype: torch.dtype | None) -> Any:
    """The output and its winners, in the layout of `y`."""
    output = torch.full_like(y, -77)
    winners = None if winners_dtype is None else torch.full_like(y, 7).to(winners_dtype)
    emulator.max_pool2d_forward(output, winners, x, *window(case.kwargs))
    return output, winners


def backward(case: PoolCase, x: torch.Tensor, grad: torch.Tensor, winners: torch.Tensor) -> torch.Tensor:
    grad_input = torch.full_like(x, float("nan"))
    emulator.max_pool2d_backward(grad_input, grad, winners, *window(case.kwargs))
    return grad_input


def arranged(images: torch.Tensor, layout: str) -> torch.Tensor:
    """``lay_out``, but the binding takes images without a batch as contiguous alone."""
    return lay_out(images, layout if images.dim() == 4 else "contiguous")


def check(case: PoolCase, fill: str, dtype: torch.dtype, layout: str) -> None:
    rng = generator("max_pool2d", case.id, fill)
    x = arranged(FILLS[fill](case.input, dtype, rng), layout)
    x64 = x.double().requires_grad_()
    kwargs = case.kwargs | {"stride": tuple(min(s, 1 << 30) for s in window(case.kwargs)[1])}  # torch takes 32 bits
    y64, indices64 = F.max_pool2d(x64, **kwargs, return_indices=True)
    y = arranged(y64.detach().to(dtype), layout)
    grad = arranged(FILLS[fill](tuple(y.shape), dtype, rng), layout)
    (grad64,) = torch.autograd.grad(y64, x64, grad.double(), retain_graph=True)
    (magnitude,) = torch.autograd.grad(y64, x64, grad.double().abs())

    assert_identical(forward(case, x, y, None)[0], y64.detach(), "output alone")
    grads = []
    for winners_dtype in winners_dtypes(case):
        output, winners = forward(case, x, y, winners_dtype)
        assert_identical(output, y64.detach(), "output")
        if winners_dtype == torch.int64:
            assert torch.equal(winners, indices64)
        grads.append(backward(case, x, grad, winners))
    assert all(torch.equal(grads[0], other) for other in grads[1:])
    if fill == "integers":
        assert_identical(grads[0], grad64, "grad_input")
    else:
        # Overlapping windows add their gradients up, in float32 for the 16-bit formats.
        kernel = pair(case.kwargs["kernel_size"])
        arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
        bound = rounding_bound(kernel[0] * kernel[1], arithmetic, magnitude)
        assert_close_bound(grads[0], grad64, rounded_bound(bound, grad64, dtype), "grad_input")


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", by_id(POOL_CASES + MORE_CASES))
def test_matches_torch(case: PoolCase, layout: str, dtype: torch.dtype) -> None:
    for fill in FILLS:
        check(case, fill, dtype, layout)


VARIANTS = {
    ("16_channels", "channels_last", torch.uint8): ("channels_last_vector", "cells_channels_last_vector"),
    ("16_channels", "channels_last", torch.int64): ("channels_last", "cells_channels_last"),
    ("16_channels", "contiguous", torch.uint8): ("channels_first", "cells_channels_first"),
    ("16_channels_overlap", "channels_last", torch.uint8): ("channels_last_vector", "gather_channels_last_vector"),
    ("16_channels_overlap", "contiguous", torch.int64): ("channels_first", "gather_channels_first"),
    ("channels70", "channels_last", torch.int64): ("channels_last", "cells_channels_last"),
    ("ceil_pad", "channels_last", torch.uint8): ("channels_last", "gather_channels_last"),
    ("ceil_stride_beyond", "contiguous", torch.uint8): ("channels_first", "cells_channels_first"),
    ("gap_beyond_cells", "contiguous", torch.uint8): ("channels_first", "gather_channels_first"),
}


@each_schedule
@pytest.mark.parametrize(("key", "names"), VARIANTS.items(), ids=lambda value: "-".join(map(str, value)))
def test_every_variant_gives_the_same_bits_under_every_schedule(key: Any, names: Any, schedule: Any) -> None:
    id, layout, winners_dtype = key
    (case,) = (case for case in POOL_CASES + MORE_CASES if case.id == id)
    for dtype in (torch.float32, torch.bfloat16):
        rng = generator(id)
        x = lay_out(FILLS["random"](case.input, dtype, rng), layout)
        y = lay_out(F.max_pool2d(x, **case.kwargs), layout)
        grad = lay_out(FILLS["random"](tuple(y.shape), dtype, rng), layout)
        output, winners = forward(case, x, y, winners_dtype)
        grad_input = backward(case, x, grad, winners)
        with scheduled(schedule):
            with ran_on_the_emulator("max_pool2d_forward", names[0]):
                again = forward(case, x, y, winners_dtype)
            assert torch.equal(again[0], output)
            assert torch.equal(again[1], winners)
            with ran_on_the_emulator("max_pool2d_backward", names[1]):
                assert torch.equal(backward(case, x, grad, winners), grad_input)


@each_dtype
@pytest.mark.parametrize("case", find(VECTOR_CASES, "16_channels", "16_channels_overlap"))
def test_unaligned_images_take_no_vectors(case: PoolCase, dtype: torch.dtype) -> None:
    rng = generator("unaligned", case.id)
    batch, channels, height, width = case.input
    values = FILLS["integers"]((batch, height, width, channels), dtype, rng)
    x = lay_out(values, "offset").permute(0, 3, 1, 2)
    y64 = F.max_pool2d(x.double(), **case.kwargs)
    y = lay_out(y64.to(dtype), "channels_last")
    with ran_on_the_emulator("max_pool2d_forward", "channels_last"):
        output, winners = forward(case, x, y, torch.uint8)
    assert_identical(output, y64)
    grad = FILLS["integers"]((batch, *y.shape[2:], channels), dtype, rng)
    unaligned = backward(case, values.permute(0, 3, 1, 2), lay_out(grad, "offset").permute(0, 3, 1, 2), winners)
    aligned = backward(case, values.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2), winners)
    assert torch.equal(unaligned, aligned)


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_special_values_and_ties(special: float, layout: str, dtype: torch.dtype) -> None:
    case = PoolCase("special", (2, 16, 9, 9), {"kernel_size": 3, "stride": 2, "padding": 1})
    rng = generator("special", special)
    values = FILLS["integers"](case.input, dtype, rng)
    values = torch.where(torch.rand(values.shape, generator=rng) < 0.3, special, values)
    values[0, 0] = special
    x = lay_out(values, layout)
    x64 = x.double().requires_grad_()
    y64, indices64 = F.max_pool2d(x64, **case.kwargs, return_indices=True)
    (grad64,) = torch.autograd.grad(y64, x64, torch.ones_like(y64))
    y = lay_out(y64.detach().to(dtype), layout)
    for winners_dtype in winners_dtypes(case):
        output, winners = forward(case, x, y, winners_dtype)
        assert_identical(output, y64.detach())
        assert_identical(backward(case, x, torch.ones_like(y), winners), grad64)
        if winners_dtype == torch.int64:
            assert torch.equal(winners, indices64)


@each_dtype
def test_window_that_sees_padding_alone(dtype: torch.dtype) -> None:
    """Both taps of the dilated window lie left and right of the single pixel."""
    case = PoolCase("padding", (1, 1, 1, 1), {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 2})
    x = torch.ones(case.input, dtype=dtype)
    for winners_dtype in winners_dtypes(case):
        output, winners = forward(case, x, x, winners_dtype)
        assert output.item() == -float("inf")
        assert backward(case, x, x, winners).item() == 0
    assert forward(case, x, x, torch.int64)[1].item() == -1


@fuzz(60)
@given(case=pool_cases(), layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from((torch.float32, torch.bfloat16)))
def test_any_geometry(case: PoolCase, layout: str, dtype: torch.dtype) -> None:
    check(case, "integers", dtype, layout)
