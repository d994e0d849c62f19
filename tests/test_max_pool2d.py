"""max_pool2d: values, indices and gradients are exact, so all of it must match bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, FILLS, LAYOUTS, POOL_CASES, PoolCase, by_id, find, generator
from dispatch_log import fell_back
from fuzzing import fuzz, pool_cases, running_on
from hypothesis import given
from hypothesis import strategies as st
from operator_checks import check_max_pool2d
from tolerance import assert_identical

import fastnn
from fastnn import functional, reference


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("case", by_id(POOL_CASES))
def test_matches_reference(case: PoolCase, fill: str, isa: str, dtype: torch.dtype) -> None:
    check_max_pool2d(case, fill, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", find(POOL_CASES, "2_odd", "3_stride2_pad1", "ceil_pad", "channels70"))
def test_layouts(case: PoolCase, layout: str, isa: str, dtype: torch.dtype) -> None:
    check_max_pool2d(case, "integers", dtype, layout)


@pytest.mark.parametrize("case", find(POOL_CASES, "2", "3_stride2_pad1"))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_output_has_the_memory_format_of_the_input(case: PoolCase, memory_format: torch.memory_format) -> None:
    x = torch.ones(case.input).contiguous(memory_format=memory_format)
    assert functional.max_pool2d(x, **case.kwargs).stride() == F.max_pool2d(x, **case.kwargs).stride()


@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1), (3, 1, 1)], ids=str)
def test_gradients_that_exceed_the_caches_have_the_bits_of_their_images(
    window: tuple[int, int, int], isa: str, dtype: torch.dtype
) -> None:
    """From 16 MiB on they are stored past the caches; a single image has 2 or 4 MiB."""
    x = FILLS["integers"]((8, 32, 128, 128), dtype, generator("exceeds the caches", str(window)))
    x = x.contiguous(memory_format=torch.channels_last)

    def gradient(images: torch.Tensor) -> torch.Tensor:
        images = images.detach().requires_grad_()
        y = functional.max_pool2d(images, *window)
        return torch.autograd.grad(y.square().sum() / 2, images)[0]

    assert_identical(gradient(x), torch.cat([gradient(x[i : i + 1]) for i in range(8)]))


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_special_values_and_ties(special: float, isa: str, dtype: torch.dtype) -> None:
    rng = generator("special", special)
    values = FILLS["integers"]((2, 3, 9, 9), dtype, rng)
    values = torch.where(torch.rand(values.shape, generator=rng) < 0.3, special, values)
    values[0, 0] = special
    outcomes = []
    for function in (functional.max_pool2d, reference.max_pool2d):
        x = values.clone().requires_grad_()
        y, indices = function(x, 3, 2, 1, return_indices=True)
        outcomes.append((y, indices, *torch.autograd.grad(y, x, torch.ones_like(y))))
    for actual, expected in zip(*outcomes, strict=True):
        assert_identical(actual, expected)


@pytest.mark.parametrize(
    ("shape", "kwargs", "words"),
    [
        ((2, 3), {"kernel_size": 2}, r"(?i)input|3D|dim"),
        ((1, 3, 4, 4), {"kernel_size": 5}, r"(?i)output size|small|kernel"),
        ((1, 3, 4, 4), {"kernel_size": 0}, r"(?i)kernel|stride"),
        ((1, 3, 4, 4), {"kernel_size": 2, "stride": 0}, r"(?i)stride"),
        ((1, 3, 4, 4), {"kernel_size": 2, "padding": 2}, r"(?i)pad"),
        ((1, 3, 4, 4), {"kernel_size": 2, "padding": -1}, r"(?i)pad"),
        ((1, 3, 4, 4), {"kernel_size": 2, "dilation": 0}, r"(?i)dilation"),
        ((1, 0, 4, 4), {"kernel_size": 2}, r"(?i)zero|non-empty|empty|dim"),
    ],
    ids=str,
)
def test_wrong_parameters(shape: tuple[int, ...], kwargs: dict, words: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=words):
        functional.max_pool2d(torch.zeros(shape), **kwargs)


def test_other_dtypes_are_torchs() -> None:
    x = torch.arange(48.0).reshape(1, 1, 6, 8).to(torch.bfloat16)
    with fell_back():
        y = functional.max_pool2d(x, 2)
    assert torch.equal(y, F.max_pool2d(x, 2))


def test_window_that_sees_padding_alone(isa: str, dtype: torch.dtype) -> None:
    """Both taps of the dilated window lie left and right of the single pixel (torch writes out of bounds
    here)."""
    x = torch.ones(1, 1, 1, 1, dtype=dtype, requires_grad=True)
    y = functional.max_pool2d(x, 2, stride=1, padding=1, dilation=2)
    assert y.item() == -float("inf")
    assert torch.autograd.grad(y, x, torch.ones_like(y))[0].item() == 0


def test_an_empty_stride_is_the_window() -> None:
    x = torch.arange(48.0).reshape(1, 1, 6, 8)
    assert torch.equal(functional.max_pool2d(x, 2, []), F.max_pool2d(x, 2, []))


@fuzz(80)
@given(
    case=pool_cases(),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(fastnn.available_isas()),
)
def test_any_geometry(case: PoolCase, layout: str, dtype: torch.dtype, isa: str) -> None:
    with running_on(isa):
        check_max_pool2d(case, "integers", dtype, layout)
