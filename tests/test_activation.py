"""relu, softmax and log_softmax against the float64 reference."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, SOFTMAX_CASES, SoftmaxCase, by_id, find, generator, integers, lay_out, random
from dispatch_log import fell_back, ran_kernels
from fuzzing import fuzz, running_on
from hypothesis import given
from hypothesis import strategies as st
from operator_checks import check_softmax
from tolerance import (
    assert_identical,
)

import fastnn
from fastnn import functional, reference

RELU_SHAPES = ((), (1,), (7,), (3, 17), (2, 3, 5, 65), (0, 4), (4099,))
VECTOR_LAYOUTS = ("contiguous", "transposed", "sliced", "offset", "expanded", "size1_strides")


@pytest.mark.parametrize("shape", RELU_SHAPES, ids=str)
def test_relu_matches_reference(shape: tuple[int, ...], isa: str, dtype: torch.dtype) -> None:
    rng = generator("relu", shape)
    x = integers(shape, dtype, rng).requires_grad_()
    some = x.numel() > 0
    with ran_kernels(*(["relu_forward"] if some else []), dtype=dtype):
        y = functional.relu(x)
    assert_identical(y, F.relu(x))
    grad = random(shape, dtype, rng)
    with ran_kernels(*(["relu_backward"] if some else []), dtype=dtype):
        (actual,) = torch.autograd.grad(y, x, grad)
    assert_identical(actual, torch.where(x > 0, grad, 0))


def test_relu_of_what_exceeds_the_caches(isa: str, dtype: torch.dtype) -> None:
    """From 16 MiB on, results are stored past the caches, whole lines of them; in place they are not."""
    count = (16 << 20) // dtype.itemsize + 37
    rng = generator("exceeds the caches", str(dtype))
    x, grad = integers((count,), dtype, rng).requires_grad_(), random((count,), dtype, rng)
    with ran_kernels("relu_forward", "relu_backward", dtype=dtype):
        y = functional.relu(x)
        (actual,) = torch.autograd.grad(y, x, grad)
    assert_identical(y, F.relu(x))
    assert_identical(actual, torch.where(x > 0, grad, 0))
    assert_identical(functional.relu(x.detach().clone(), inplace=True), y.detach())


@pytest.mark.parametrize("layout", ["channels_last", *VECTOR_LAYOUTS])
def test_relu_layouts(layout: str, isa: str, dtype: torch.dtype) -> None:
    values = lay_out(random((3, 5, 4, 7), dtype, generator("relu", layout)), layout)
    x = values.requires_grad_()
    y = functional.relu(x)
    assert_identical(y, F.relu(x))
    if layout in ("contiguous", "channels_last"):
        assert y.stride() == F.relu(x).stride()
    (actual,) = torch.autograd.grad(y.sum(), x)
    assert_identical(actual, (x > 0).to(dtype))


def test_relu_of_special_values_is_torchs(isa: str, dtype: torch.dtype) -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-40, -1e-40] * 3)
    outcomes = []
    for function in (functional.relu, reference.relu):
        x = values.to(dtype).requires_grad_()
        y = function(x)
        outcomes.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
    for actual, expected in zip(*outcomes, strict=True):
        assert_identical(actual, expected)


def test_relu_inplace(isa: str, dtype: torch.dtype) -> None:
    leaf = random((3, 17), dtype, generator("inplace")).requires_grad_()
    x = leaf * 1
    version = x._version
    y = functional.relu(x, inplace=True)
    assert y.data_ptr() == x.data_ptr()
    assert x._version > version
    assert_identical(x, F.relu(leaf))
    (grad,) = torch.autograd.grad(y.sum(), leaf)
    assert_identical(grad, (leaf > 0).to(dtype))


def test_relu_inplace_outside_inference_mode_raises() -> None:
    with torch.inference_mode():
        x = torch.tensor([-1.0, 1.0])
        functional.relu(x.clone(), inplace=True)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        functional.relu(x, inplace=True)


def test_relu_inplace_counts_as_a_modification() -> None:
    x = torch.tensor([-1.0, 1.0])
    before = x._version
    functional.relu(x, inplace=True)
    assert x._version > before


def test_relu_inplace_on_a_leaf_raises() -> None:
    with pytest.raises(RuntimeError, match="in-place"):
        functional.relu(torch.ones(3, requires_grad=True), inplace=True)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("case", by_id(SOFTMAX_CASES))
def test_softmax_matches_reference(case: SoftmaxCase, scale: float, isa: str, dtype: torch.dtype) -> None:
    check_softmax(case, dtype, scale)


@pytest.mark.parametrize("layout", VECTOR_LAYOUTS)
@pytest.mark.parametrize("case", find(SOFTMAX_CASES, "rows_4x10", "middle_2x5x7", "one_class"))
def test_softmax_layouts(case: SoftmaxCase, layout: str, isa: str, dtype: torch.dtype) -> None:
    check_softmax(case, dtype, 1.0, layout)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize(
    ("shape", "expected"),
    [((4, 32), "transposed"), ((3, 32), "along"), ((4, 33), "along"), ((4, 32, 2), "abreast")],
    ids=str,
)
def test_kernel_of_softmax(name: str, shape: tuple[int, ...], expected: str, isa: str, dtype: torch.dtype) -> None:
    x = random(shape, dtype, generator("kernel", name, shape))
    with ran_kernels(f"{name}_forward", dtype=dtype) as records:
        getattr(functional, name)(x, 1)
    assert [record.kernel for record in records] == [expected]


@pytest.mark.parametrize("rows", [slice(3), slice(3, 6), slice(6)], ids=["first", "last", "all"])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_of_special_values_is_torchs(name: str, rows: slice, isa: str, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    values = [[0, nan, 1], [-inf, 0, 1], [-inf, -inf, -inf], [inf, 0, 1], [1e30, -1e30, 0], [-inf, 5, -inf]]
    x = torch.tensor(values[rows], dtype=dtype)
    actual, expected = getattr(functional, name)(x, 1), getattr(F, name)(x, 1)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_without_dim_warns_as_torch(name: str) -> None:
    x = torch.ones(3, 4)
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        actual = getattr(functional, name)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = getattr(F, name)(x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_dtype_casts_first(name: str) -> None:
    x = torch.ones(3, 4, dtype=torch.bfloat16)
    assert getattr(functional, name)(x, 1, dtype=torch.float32).dtype == torch.float32
    wide = getattr(functional, name)(torch.ones(3, 4), 1, dtype=torch.float64)
    torch.testing.assert_close(wide, getattr(F, name)(torch.ones(3, 4), 1, dtype=torch.float64))


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_dim_out_of_range(name: str) -> None:
    with pytest.raises(IndexError, match=r"(?i)dim.*range"):
        getattr(functional, name)(torch.ones(3, 4), 2)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "relu"])
def test_other_dtypes_are_torchs(name: str) -> None:
    x = random((3, 4), torch.float64, generator(name)).to(torch.bfloat16)
    arguments = (x,) if name == "relu" else (x, 1)
    with fell_back():
        y = getattr(functional, name)(*arguments)
    assert torch.equal(y, getattr(F, name)(*arguments))


def test_scalar_softmax_is_torchs() -> None:
    x = torch.tensor(3.0)
    torch.testing.assert_close(functional.softmax(x, 0), F.softmax(x, 0))


@fuzz(60)
@given(
    shape=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    position=st.integers(0, 3),
    scale=st.sampled_from([0.1, 1.0, 20.0]),
    layout=st.sampled_from(["contiguous", "sliced", "offset"]),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(fastnn.available_isas()),
)
def test_softmax_of_any_shape(
    shape: list[int], position: int, scale: float, layout: str, dtype: torch.dtype, isa: str
) -> None:
    with running_on(isa):
        check_softmax(SoftmaxCase(str(shape), tuple(shape), position % len(shape)), dtype, scale, layout)


@fuzz(30)
@given(
    shape=st.lists(st.integers(0, 20), max_size=4),
    layout=st.sampled_from(VECTOR_LAYOUTS),
    inplace=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(fastnn.available_isas()),
)
def test_relu_of_any_shape(shape: list[int], layout: str, inplace: bool, dtype: torch.dtype, isa: str) -> None:
    rng = generator("relu", str(shape))
    values = integers(tuple(shape), dtype, rng)
    leaf = (lay_out(values, layout) if len(shape) > 1 and shape[0] else values).requires_grad_()
    grad = random(tuple(shape), dtype, rng)
    with running_on(isa):
        y = functional.relu(leaf.clone() if inplace else leaf, inplace)
        (actual,) = torch.autograd.grad(y, leaf, grad)
    assert_identical(y, F.relu(leaf))
    assert_identical(actual, torch.where(leaf > 0, grad, 0))
