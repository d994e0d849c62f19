"""linear: every ISA, dtype and layout against the float64 reference, and the errors of wrong shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    FILLS,
    LAYOUTS,
    LINEAR_CASES,
    LinearCase,
    Wrong,
    by_id,
    find,
    generator,
    random,
)
from device import ON_CUDA
from dispatch_log import fell_back
from fuzzing import fuzz, running_on
from hypothesis import given
from hypothesis import strategies as st
from operator_checks import check_linear
from tolerance import assert_identical
from torch import Tensor

import fastnn
from fastnn import functional, reference


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("case", by_id(LINEAR_CASES))
def test_matches_reference(case: LinearCase, fill: str, isa: str, dtype: torch.dtype) -> None:
    check_linear(case, fill, dtype)


@pytest.mark.skipif(ON_CUDA, reason="the CPU's kernels")
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("sizes", [(300, 37), (2081, 3), (5, 1), (3001, 91), (40_001, 7)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_gradients_of_the_smallest_batches_walk_along_rows(
    rows: int, sizes: tuple[int, int], fill: str, isa: str, dtype: torch.dtype
) -> None:
    """From 2^18 weights and 8 outputs on, blocks of rows have sums of their own."""
    case = LinearCase("rows", (rows, sizes[0]), (sizes[1], sizes[0]), kwargs={"activation": "relu"})
    assert check_linear(case, fill, dtype) == ["streamed" if rows <= 4 else "gemm"]


@pytest.mark.skipif(ON_CUDA, reason="the CPU's kernels")
@pytest.mark.parametrize("fill", FILLS)
def test_large_weights_are_packed_in_passes(fill: str, isa: str) -> None:
    """48 rows are packed, and 18 MB of weights, more than a pass of 16 MiB, with a last panel that is partial."""
    check_linear(LinearCase("passes", (48, 1900), (2403, 1900), kwargs={"activation": "relu"}), fill, torch.float32)


@pytest.mark.skipif(ON_CUDA, reason="the CPU's kernels")
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("sizes", [(512, 256), (259, 512), (512, 130)], ids=str)
@pytest.mark.parametrize("rows", [9, 35])
def test_rows_and_columns_that_share_sets_of_a_cache(
    rows: int, sizes: tuple[int, int], fill: str, isa: str, dtype: torch.dtype
) -> None:
    """Whole KiB apart: gradients pack both factors, one, or with fewer rows none."""
    case = LinearCase("sets", (rows, sizes[0]), (sizes[1], sizes[0]), kwargs={"activation": "relu"})
    assert check_linear(case, fill, dtype) == ["gemm"]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "channels_last"])
@pytest.mark.parametrize("case", find(LINEAR_CASES, "4x8_to_3", "relu", "3d_2x3x17_to_5", "one_row"))
def test_layouts(case: LinearCase, layout: str, isa: str, dtype: torch.dtype) -> None:
    check_linear(case, "integers", dtype, layout)


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        pytest.param(case, wrong, id=f"{case.id}-{wrong.argument}-{wrong.shape}")
        for case in LINEAR_CASES
        for wrong in case.wrong
    ],
)
def test_wrong_shapes(case: LinearCase, wrong: Wrong) -> None:
    arguments = {
        "input": torch.zeros(case.input),
        "weight": torch.zeros(case.weight),
        "bias": torch.zeros(case.weight[0]),
    }
    arguments[wrong.argument] = torch.zeros(wrong.shape)
    with pytest.raises((ValueError, RuntimeError), match=wrong.words):
        functional.linear(**arguments)


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match=r"activation: expected .*relu.*got 'gelu'"):
        functional.linear(torch.zeros(2, 3), torch.zeros(4, 3), activation="gelu")


@pytest.mark.parametrize(("rows", "inputs"), [(3, 257), (3, 2081), (301, 257)])
def test_same_bits_for_every_thread_count(rows: int, inputs: int, isa: str, dtype: torch.dtype) -> None:
    rng = generator("threads")
    x, w = random((rows, inputs), dtype, rng).requires_grad_(), random((129, inputs), dtype, rng).requires_grad_()
    grad = random((rows, 129), dtype, rng)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = functional.linear(x, w, activation="relu")
            results.append((y.detach(), *torch.autograd.grad(y, (x, w), grad)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert torch.equal(actual, expected)


def test_mixed_dtypes_raise() -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"(?i)float|double|dtype"):
        functional.linear(torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.int64], ids=str)
def test_other_dtypes_are_torchs(dtype: torch.dtype) -> None:
    rng = generator("linear", dtype)
    x, w, b = (random(s, torch.float64, rng).mul(4).to(dtype) for s in ((5, 8), (3, 8), (3,)))
    with fell_back():
        y = functional.linear(x, w, b)
    assert y.dtype == dtype
    assert torch.equal(y, F.linear(x, w, b))


def test_nan_and_infinity_pass_through_relu() -> None:
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [-float("inf"), 1.0], [0.0, 0.0]])
    w = torch.eye(2)
    expected = reference.linear(x, w, activation="relu")
    assert_identical(functional.linear(x, w, activation="relu"), expected)


def nan_gradient(function: object, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    return torch.autograd.grad(function(*leaves, activation="relu").sum(), leaves)


def test_gradient_at_nan_and_at_zero_is_torchs() -> None:
    x = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [1.0, -1.0]])
    w = torch.tensor([[1.0, 2.0], [-1.0, 1.0]])
    expected = nan_gradient(reference.linear, x, w)
    for actual, wanted in zip(nan_gradient(functional.linear, x, w), expected, strict=True):
        assert_identical(actual, wanted)


@fuzz(60)
@given(
    leading=st.lists(st.integers(0, 5), max_size=3),
    in_features=st.integers(1, 70),
    out_features=st.integers(1, 70),
    bias=st.booleans(),
    relu=st.booleans(),
    fill=st.sampled_from(sorted(FILLS)),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(fastnn.available_isas()),
)
def test_any_geometry(
    leading: list[int],
    in_features: int,
    out_features: int,
    bias: bool,
    relu: bool,
    fill: str,
    dtype: torch.dtype,
    isa: str,
) -> None:
    kwargs = {"activation": "relu"} if relu else {}
    shape = (*leading, in_features)
    case = LinearCase(f"{shape}_{out_features}", shape, (out_features, in_features), bias, kwargs)
    with running_on(isa):
        check_linear(case, fill, dtype)


@pytest.mark.parametrize("arguments", [((4,), ()), ((4, 3), (1,)), ((4, 3), ()), ((4, 3), (3, 4))], ids=str)
def test_what_torch_expands_goes_to_torch(arguments: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    weight_shape, bias_shape = arguments
    source = generator("expanded", str(arguments))
    input = random((2, 5, weight_shape[-1]), torch.float64, source)
    weight = random(weight_shape, torch.float64, source).requires_grad_()
    bias = random(bias_shape, torch.float64, source).requires_grad_()
    if weight.dim() == 2 and bias_shape == (3, 4):
        with pytest.raises(ValueError, match=r"bias: expected shape \(4,\), got \(3, 4\)"):
            functional.linear(input, weight, bias)
        return
    with fell_back():
        actual = functional.linear(input, weight, bias)
    assert_identical(actual, F.linear(input, weight, bias))


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_only_what_gradients_need_is_kept(needed: tuple[int, int, int], activation: str | None) -> None:
    """A frozen weight's layer does not hold its input, an input without gradient not the weight; with the right
    gradients, first and second ones."""
    source = generator("kept", str(needed))
    tensors = [random(shape, torch.float64, source) for shape in ((3, 2, 6), (5, 6), (5,))]
    for tensor, need in zip(tensors, needed, strict=True):
        tensor.requires_grad_(bool(need))
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):  # type: ignore[func-returns-value]
        output = functional.linear(*tensors, activation=activation)
    expected = reference.linear(*tensors, activation=activation)
    assert tensors[2].data_ptr() not in kept
    assert (tensors[0].data_ptr() in kept) == bool(needed[1])
    assert (tensors[1].data_ptr() in kept) == bool(needed[0])
    grad = random((3, 2, 5), torch.float64, source).requires_grad_()
    firsts = [torch.autograd.grad(o, wanted, grad, create_graph=True, retain_graph=True) for o in (output, expected)]
    for ours, theirs in zip(*firsts, strict=True):
        torch.testing.assert_close(ours, theirs)
    seconds = [torch.autograd.grad(sum(g.square().sum() for g in first), grad) for first in firsts]
    torch.testing.assert_close(*seconds)
    for ours, theirs in zip(torch.autograd.grad(output, wanted, grad), firsts[1], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_hooks_of_saved_tensors_may_change_strides() -> None:
    x = random((5, 6), torch.float32, generator("hooks")).requires_grad_()
    weight = random((7, 6), torch.float32, generator("hooks", "weight"))

    def gradient() -> Tensor:
        return torch.autograd.grad(functional.linear(x, weight, activation="relu").sum(), x)[0]

    expected = gradient()
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.t().contiguous().t(), lambda saved: saved):
        assert torch.equal(gradient(), expected)
