"""cross_entropy, nll_loss and mse_loss against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CROSS_ENTROPY_CASES, DTYPES, NLL_CASES, LossCase, by_id, find, generator, random
from dispatch_log import fell_back, ran_kernels
from fuzzing import fuzz, running_on
from hypothesis import assume, given
from hypothesis import strategies as st
from operator_checks import check_cross_entropy, check_mse_loss, check_nll_loss, make_loss_case
from tolerance import (
    assert_identical,
)
from torch import Tensor

import fastnn
from fastnn import functional, reference

MSE_SHAPES = ((7,), (3, 17), (2, 3, 5, 4), (), (4099,))
REDUCTIONS = ("mean", "sum", "none")


@pytest.mark.parametrize("case", by_id(CROSS_ENTROPY_CASES))
def test_cross_entropy_matches_reference(case: LossCase, isa: str, dtype: torch.dtype) -> None:
    check_cross_entropy(case, dtype)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset", "expanded"])
@pytest.mark.parametrize("case", find(CROSS_ENTROPY_CASES, "10_classes", "probabilities", "images"))
def test_cross_entropy_layouts(case: LossCase, layout: str, isa: str, dtype: torch.dtype) -> None:
    check_cross_entropy(case, dtype, layout)


@pytest.mark.parametrize("case", by_id(NLL_CASES))
def test_nll_loss_matches_reference(case: LossCase, isa: str, dtype: torch.dtype) -> None:
    check_nll_loss(case, dtype)


@st.composite
def loss_cases(draw: st.DrawFn, name: str) -> LossCase:
    """A loss of any shape and options; at least one sample counts."""
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, 40)), *draw(st.lists(st.integers(1, 9), max_size=2)))
    kwargs: dict[str, Any] = {"reduction": draw(st.sampled_from(REDUCTIONS))}
    target = draw(st.sampled_from(["indices", "probabilities"])) if name == "cross_entropy" else "indices"
    if name == "cross_entropy":
        kwargs["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
    if target == "indices" and draw(st.booleans()):
        kwargs["ignore_index"] = draw(st.integers(0, shape[1] - 1))
    case = LossCase(f"{shape}", shape, target, draw(st.booleans()), target == "indices" and draw(st.booleans()), kwargs)
    _, targets, _, _ = make_loss_case(case, torch.float32)
    assume(target != "indices" or bool((targets != kwargs.get("ignore_index", -100)).any()))
    return case


@fuzz(60)
@given(case=loss_cases("cross_entropy"), dtype=st.sampled_from(DTYPES), isa=st.sampled_from(fastnn.available_isas()))
def test_cross_entropy_of_any_shape(case: LossCase, dtype: torch.dtype, isa: str) -> None:
    with running_on(isa):
        check_cross_entropy(case, dtype)


@fuzz(30)
@given(case=loss_cases("nll_loss"), dtype=st.sampled_from(DTYPES), isa=st.sampled_from(fastnn.available_isas()))
def test_nll_loss_of_any_shape(case: LossCase, dtype: torch.dtype, isa: str) -> None:
    with running_on(isa):
        check_nll_loss(case, dtype)


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_all_ignored_is_torchs(name: str, dtype: torch.dtype) -> None:
    target = torch.full((3,), -100)
    outcomes = []
    for module in (functional, reference):
        x = torch.zeros(3, 4, dtype=dtype, requires_grad=True)
        loss = getattr(module, name)(x, target)
        outcomes.append((loss, *torch.autograd.grad(loss, x)))
    for actual, expected in zip(*outcomes, strict=True):
        assert_identical(actual, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["class numbers", "probabilities"])
@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (9, 4, 0), (2, 4, 3, 0)], ids=str)
def test_without_samples_losses_are_torchs(shape: tuple[int, ...], name: str, kind: str, reduction: str) -> None:
    target = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    if kind == "probabilities":
        if name == "nll_loss":
            pytest.skip("takes class numbers alone")
        target = torch.zeros(shape)
    outcomes = []
    for module in (functional, F):
        x = torch.zeros(shape, requires_grad=True)
        loss = getattr(module, name)(x, target, reduction=reduction)
        outcomes.append((loss.detach(), *torch.autograd.grad(loss.sum(), x)))
    for actual, expected in zip(*outcomes, strict=True):
        assert_identical(actual, expected)


def test_large_logits_do_not_overflow(isa: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[1e4, -1e4, 0.0], [3e38, 0.0, -3e38]], dtype=dtype, requires_grad=True)
    target = torch.tensor([0, 0])
    loss = functional.cross_entropy(x, target)
    assert_identical(loss, torch.zeros((), dtype=dtype))
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


def test_nan_logit_gives_nan_loss(isa: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[float("nan"), 0.0], [0.0, 1.0]], dtype=dtype)
    losses = functional.cross_entropy(x, torch.tensor([1, 1]), reduction="none")
    assert losses[0].isnan()
    assert not losses[1].isnan()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_infinite_weight_of_an_absent_class_changes_nothing(reduction: str, isa: str, dtype: torch.dtype) -> None:
    x = random((5, 3), dtype, generator("absent")).requires_grad_()
    arguments = torch.tensor([0, 1, 0, 0, 1]), torch.tensor([0.2, 0.5, float("inf")], dtype=dtype)
    ours, theirs = (module.cross_entropy(x, *arguments, reduction=reduction) for module in (functional, F))
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(loss.sum(), x)[0] for loss in (ours, theirs)]
    assert grads[0].isfinite().all()
    torch.testing.assert_close(*grads)


def test_class_weight_zero_hides_an_infinite_log() -> None:
    x = torch.tensor([[0.0, -float("inf")], [0.0, 1.0]])
    for target in (torch.tensor([0, 1]), torch.tensor([1, 1])):
        actual = functional.cross_entropy(x, target, reduction="none")
        torch.testing.assert_close(actual, F.cross_entropy(x, target, reduction="none"))


@pytest.mark.parametrize(
    ("target", "error"),
    [
        (torch.tensor([0, 4, 1]), r"(?i)target.*(bounds|range|4)"),
        (torch.tensor([0, -1, 1]), r"(?i)target.*(bounds|range|-1)"),
        (torch.tensor([0, 1]), r"(?i)(target|batch).*(3|2)"),
        (torch.zeros(3, 4, dtype=torch.int64), r"(?i)target|scalar|long|float"),
        (torch.zeros(3, 5), r"(?i)target|shape|size"),
    ],
    ids=["too_large", "negative", "wrong_count", "integer_matrix", "wrong_classes"],
)
def test_cross_entropy_wrong_targets(target: Tensor, error: str) -> None:
    with pytest.raises((IndexError, ValueError, RuntimeError, TypeError), match=error):
        functional.cross_entropy(torch.zeros(3, 4), target)


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_wrong_class_weight(name: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)weight"):
        getattr(functional, name)(torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.ones(5))


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", "mse_loss"])
def test_unknown_reduction(name: str) -> None:
    target = torch.zeros(3, 4) if name == "mse_loss" else torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"(?i)reduction|is not a valid value"):
        getattr(functional, name)(torch.zeros(3, 4), target, reduction="average")


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", "mse_loss"])
@pytest.mark.filterwarnings("ignore:size_average")
@pytest.mark.parametrize("legacy", [{"size_average": False}, {"reduce": False}, {"size_average": True}], ids=str)
def test_legacy_reductions(name: str, legacy: dict[str, bool]) -> None:
    x = random((3, 4), torch.float32, generator("legacy"))
    target = torch.ones(3, 4) if name == "mse_loss" else torch.tensor([0, 1, 2])
    actual, expected = (getattr(module, name)(x, target, **legacy) for module in (functional, reference))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", MSE_SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
def test_mse_loss_matches_reference(
    shape: tuple[int, ...], reduction: str, weighted: bool, isa: str, dtype: torch.dtype
) -> None:
    check_mse_loss(shape, reduction, weighted, dtype)


@fuzz(30)
@given(
    shape=st.lists(st.integers(1, 20), max_size=4),
    reduction=st.sampled_from(REDUCTIONS),
    weighted=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(fastnn.available_isas()),
)
def test_mse_loss_of_any_shape(shape: list[int], reduction: str, weighted: bool, dtype: torch.dtype, isa: str) -> None:
    with running_on(isa):
        check_mse_loss(tuple(shape), reduction, weighted, dtype)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_mse_loss_broadcasts_as_torch() -> None:
    x, t = torch.arange(12.0).reshape(3, 4), torch.arange(4.0)
    torch.testing.assert_close(functional.mse_loss(x, t), F.mse_loss(x, t))


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weighted_mse_loss_broadcasts_as_torch(reduction: str) -> None:
    x, weight, t = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0.5], [1.0], [4.0]]), torch.arange(4.0)[None]
    ours, theirs = (module.mse_loss(x, t, reduction=reduction, weight=weight) for module in (functional, F))
    torch.testing.assert_close(ours, theirs)


def test_mse_loss_warns_when_it_broadcasts() -> None:
    with pytest.warns(UserWarning, match="target size"):
        functional.mse_loss(torch.zeros(3, 4), torch.zeros(4))


def test_the_class_of_one_sample_may_be_a_vector_of_one() -> None:
    x, target = random((5,), torch.float32, generator("one sample")), torch.tensor([3])
    for name in ("cross_entropy", "nll_loss"):
        for reduction in ("none", "mean", "sum"):
            with ran_kernels(name):
                loss = getattr(functional, name)(x, target, reduction=reduction)
            expected = getattr(F, name)(x, target, reduction=reduction)
            assert loss.shape == expected.shape
            torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match=r"target: expected shape \(\) for input of shape \(5,\), got \(2,\)"):
        functional.cross_entropy(x, torch.tensor([3, 4]))


def test_other_dtypes_are_torchs() -> None:
    x = random((3, 4), torch.float64, generator("bf16")).to(torch.bfloat16)
    with fell_back():
        loss = functional.cross_entropy(x, torch.tensor([0, 1, 2]))
    assert torch.equal(loss, F.cross_entropy(x, torch.tensor([0, 1, 2])))
