"""cross_entropy, nll_loss and mse_loss on CUDA, in the emulator: bounds from the arithmetic, the same bits in every
schedule, and how many launches a loss takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CROSS_ENTROPY_CASES, NLL_CASES, LossCase, by_id, generator, integers, random
from emulated import DTYPES, each_dtype, each_schedule, emulator, ran_on_the_emulator, scheduled
from operator_checks import class_dim, make_loss_case, weighted_target
from test_losses import MSE_SHAPES, REDUCTIONS
from tolerance import (
    assert_close_bound,
    assert_identical,
    computed_in,
    log_softmax_bound,
    rounded_bound,
    rounding_bound,
    softmax_relative_error,
    unit_roundoff,
)
from torch import Tensor

from fastnn import reference
from fastnn.autograd.common import empty_divisor
from fastnn.autograd.cross_entropy import empty_statistics, loss_shape

NAN = float("nan")
# Each way through the kernels, in one block and in several.
WAYS = (
    (LossCase("rows_128x10", (128, 10)), "warp_rows", 1),
    (LossCase("rows_600x10", (600, 10), weight=True, ignore=True), "warp_rows", 2),
    (LossCase("warp_a_row", (9, 200), kwargs={"label_smoothing": 0.1}), "warp_rows", 1),
    (LossCase("block_a_row", (3, 257), weight=True, kwargs={"label_smoothing": 0.1}), "block_rows", 1),
    (LossCase("wide_rows", (5, 4099)), "block_rows", 2),
    (LossCase("thread_a_line", (3, 5, 130), weight=True), "lines", 1),
    (LossCase("lines_70x4x40", (70, 4, 40), ignore=True), "lines", 2),
    (LossCase("8_threads_a_line", (2, 37, 35), target="probabilities", weight=True), "lines", 1),
    (LossCase("16_threads_a_line", (3, 33, 4), kwargs={"label_smoothing": 0.1}), "lines", 1),
)
WAY_IDS = [case.id for case, _, _ in WAYS]
REDUCTION_NUMBERS = {"none": 0, "mean": 1, "sum": 2}


def options_of(kwargs: dict[str, Any]) -> tuple[int, int]:
    return kwargs.get("ignore_index", -100), REDUCTION_NUMBERS[kwargs.get("reduction", "mean")]


def empty_loss(x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    return x.new_full(loss_shape(x, options_of(kwargs)[1]), NAN)


def cross_entropy_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, kwargs: dict[str, Any], keep: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Loss and statistics."""
    output = empty_loss(x, kwargs)
    statistics = empty_statistics(x, target).fill_(NAN) if keep else None
    emulator.cross_entropy_forward(
        output, statistics, x, target, weight, *options_of(kwargs), kwargs.get("label_smoothing", 0.0)
    )
    return output, statistics


def cross_entropy_backward(
    grad: Tensor, statistics: Tensor | None, x: Tensor, target: Tensor, weight: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the input and of probabilities."""
    grad_input = torch.full_like(x, NAN)
    grad_target = torch.full_like(x, NAN) if target.is_floating_point() else None
    smoothing = kwargs.get("label_smoothing", 0.0)
    emulator.cross_entropy_backward(
        grad_input, grad_target, grad, statistics, x, target, weight, *options_of(kwargs), smoothing
    )
    return grad_input, grad_target


def nll_loss_forward(x: Tensor, target: Tensor, weight: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Loss and divisor."""
    output, divisor = empty_loss(x, kwargs), empty_divisor(x).fill_(NAN)
    emulator.nll_loss_forward(output, divisor, x, target, weight, *options_of(kwargs))
    return output, divisor


def nll_loss_backward(
    grad: Tensor, divisor: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, kwargs: dict[str, Any]
) -> Tensor:
    grad_input = torch.full_like(x, NAN)
    emulator.nll_loss_backward(grad_input, grad, divisor, target, weight, *options_of(kwargs))
    return grad_input


def mse_loss_forward(x: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    """Loss and divisor."""
    output = x.new_full(x.shape if reduction == "none" else (), NAN)
    divisor = empty_divisor(x).fill_(NAN)
    emulator.mse_loss_forward(output, divisor, x, target, weight, REDUCTION_NUMBERS[reduction])
    return output, divisor


def mse_loss_backward(
    grad: Tensor, divisor: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor]:
    grads = torch.full_like(x, NAN), torch.full_like(x, NAN)
    emulator.mse_loss_backward(*grads, grad, divisor, x, target, weight, REDUCTION_NUMBERS[reduction])
    return grads


def check_cross_entropy(case: LossCase, dtype: torch.dtype, variant: str | None = None) -> None:
    """As test_losses.py does: what is kept between the passes has the precision of the arithmetic."""
    x, target, weight, kwargs = make_loss_case(case, dtype)
    compute = computed_in(dtype)
    x64 = x.double().requires_grad_()
    probabilities = target.is_floating_point()
    target64 = target.double().requires_grad_() if probabilities else target
    weight64 = None if weight is None else weight.double()
    dim = class_dim(x)
    classes = x.shape[dim]
    samples = x.numel() // classes
    u = unit_roundoff(compute) * (2 if dtype == torch.float64 else 1)
    per_sample = kwargs.get("reduction") == "none"

    with ran_on_the_emulator("cross_entropy_forward", variant):
        loss, statistics = cross_entropy_forward(x, target, weight, kwargs)
    loss64 = reference.cross_entropy(x64, target64, weight64, **kwargs)
    q = weighted_target(x, target64.detach(), weight64, kwargs)
    logs = F.log_softmax(x64.detach(), dim)
    log_bound = log_softmax_bound(x, dim, compute)
    total = (lambda values: values.sum(dim)) if per_sample else torch.sum
    roundings = classes + (0 if per_sample else 2 * samples) + 8
    bound = total(q * log_bound) + roundings * u * total(q * logs.abs()) + torch.finfo(compute).tiny
    assert_close_bound(loss, loss64, rounded_bound(bound, loss64, dtype), "loss")

    grad = random(tuple(loss.shape), dtype, generator("grad", case.id))
    with ran_on_the_emulator("cross_entropy_backward", variant):
        grad_input, grad_target = cross_entropy_backward(grad, statistics, x, target, weight, kwargs)
    wanted = (x64, target64) if probabilities else (x64,)
    expected, *expected_target = torch.autograd.grad(loss64, wanted, grad.double())
    upstream = grad.double().abs().unsqueeze(dim) if per_sample and loss.dim() else grad.double().abs()
    mass = q.sum(dim, keepdim=True)
    probability = logs.exp()
    relative = softmax_relative_error(x, dim, compute)
    parts = relative * probability * mass + (roundings + 2) * u * (q + probability * mass)
    bound = 1.01 * parts * upstream + torch.finfo(compute).tiny
    assert_close_bound(grad_input, expected, rounded_bound(bound, expected, dtype), "grad_input")
    if probabilities:
        assert grad_target is not None
        slope = torch.ones_like(x64) if weight64 is None else weight64.view(-1, *[1] * (x.dim() - 1 - dim))
        slope = slope * (1 if kwargs.get("reduction", "mean") != "mean" else 1 / samples) * upstream
        bound = 1.01 * slope * (log_bound + (roundings + 4) * u * logs.abs())
        (expected,) = expected_target
        limit = rounded_bound(bound + torch.finfo(compute).tiny, expected, dtype)
        assert_close_bound(grad_target, expected, limit, "grad_target")


@each_dtype
@pytest.mark.parametrize("case", by_id(CROSS_ENTROPY_CASES))
def test_cross_entropy_matches_reference(case: LossCase, dtype: torch.dtype) -> None:
    check_cross_entropy(case, dtype)


@each_dtype
@pytest.mark.parametrize(("case", "variant", "launches"), WAYS, ids=WAY_IDS)
def test_every_way_of_cross_entropy(case: LossCase, variant: str, launches: int, dtype: torch.dtype) -> None:
    check_cross_entropy(case, dtype, variant)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("case", "variant", "launches"), WAYS, ids=WAY_IDS)
def test_launches_of_cross_entropy(case: LossCase, variant: str, launches: int, reduction: str) -> None:
    """A second one adds up what the blocks found; without statistics a loss per sample needs no sum."""
    x, target, weight, kwargs = make_loss_case(case, torch.float32)
    kwargs["reduction"] = reduction
    emulator.trace_start()
    cross_entropy_forward(x, target, weight, kwargs, keep=False)
    ran = [record[1] for record in emulator.trace_stop()]
    assert ran == [variant, "total"][: 1 if reduction == "none" else launches]


def check_nll_loss(case: LossCase, dtype: torch.dtype, variant: str | None = None) -> None:
    x, target, weight, kwargs = make_loss_case(case, dtype)
    x64 = x.double().requires_grad_()
    weight64 = None if weight is None else weight.double()
    compute = computed_in(dtype)
    with ran_on_the_emulator("nll_loss_forward", variant):
        loss, divisor = nll_loss_forward(x, target, weight, kwargs)
    loss64 = reference.nll_loss(x64, target, weight64, **kwargs)
    magnitude = reference.nll_loss(-x.double().abs(), target, weight64, **kwargs)
    roundings = 2 * x.numel() // x.shape[class_dim(x)] + 4
    assert_close_bound(
        loss, loss64, rounded_bound(rounding_bound(roundings, compute, magnitude), loss64, dtype), "loss"
    )
    grad = random(tuple(loss.shape), dtype, generator("grad", case.id))
    with ran_on_the_emulator("nll_loss_backward"):
        actual = nll_loss_backward(grad, divisor, x, target, weight, kwargs)
    (expected,) = torch.autograd.grad(loss64, x64, grad.double())
    bound = rounding_bound(roundings, compute, expected.abs())
    assert_close_bound(actual, expected, rounded_bound(bound, expected, dtype), "grad_input")


@each_dtype
@pytest.mark.parametrize("case", by_id(NLL_CASES))
def test_nll_loss_matches_reference(case: LossCase, dtype: torch.dtype) -> None:
    check_nll_loss(case, dtype, "one_block")


@pytest.mark.parametrize("case", by_id([LossCase("5000_rows", (5000, 3)), LossCase("images", (2, 3, 61, 70))]))
def test_nll_loss_of_many_samples(case: LossCase) -> None:
    check_nll_loss(case, torch.float32, "blocks")


@each_dtype
def test_nll_loss_of_integers_is_exact(dtype: torch.dtype) -> None:
    rng = generator("exact")
    x, target = integers((64, 5), dtype, rng), torch.randint(0, 5, (64,), generator=rng)
    for reduction in REDUCTIONS:
        loss, divisor = nll_loss_forward(x, target, None, {"reduction": reduction})
        assert_identical(loss, F.nll_loss(x.double(), target, reduction=reduction))
        assert divisor == 64


def check_mse_loss(
    shape: tuple[int, ...], reduction: str, weighted: bool, dtype: torch.dtype, variant: str | None = None
) -> None:
    rng = generator("mse", shape)
    x, t = random(shape, dtype, rng), random(shape, dtype, rng)
    w = (torch.rand(shape, generator=rng, dtype=torch.float64) + 0.5).to(dtype) if weighted else None
    w64 = None if w is None else w.double()
    leaves64 = [v.double().requires_grad_() for v in (x, t)]
    compute = computed_in(dtype)
    with ran_on_the_emulator("mse_loss_forward", variant):
        loss, divisor = mse_loss_forward(x, t, w, reduction)
    loss64 = reference.mse_loss(*leaves64, reduction=reduction, weight=w64)
    # x - t is rounded once and then squared; with "mean" the weights are summed as well.
    roundings = 6 + (0 if reduction == "none" else 2 * x.numel())
    bound = rounding_bound(roundings, compute, loss64.detach())
    assert_close_bound(loss, loss64, rounded_bound(bound, loss64, dtype), "loss")
    if reduction == "none":
        assert divisor == 1
    grad = random(tuple(loss.shape), dtype, rng)
    with ran_on_the_emulator("mse_loss_backward"):
        grads = mse_loss_backward(grad, divisor, x, t, w, reduction)
    grads64 = torch.autograd.grad(loss64, leaves64, grad.double())
    for actual, expected in zip(grads, grads64, strict=True):
        bound = rounding_bound(roundings, compute, expected.abs())
        assert_close_bound(actual, expected, rounded_bound(bound, expected, dtype), "gradient")


@each_dtype
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("shape", MSE_SHAPES, ids=str)
def test_mse_loss_matches_reference(shape: tuple[int, ...], weighted: bool, reduction: str, dtype: torch.dtype) -> None:
    check_mse_loss(shape, reduction, weighted, dtype, "elementwise" if reduction == "none" else "one_block")


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
def test_mse_loss_of_many_elements(weighted: bool) -> None:
    check_mse_loss((33001,), "mean", weighted, torch.float32, "blocks")


@each_dtype
def test_mse_loss_of_integers_is_exact(dtype: torch.dtype) -> None:
    rng = generator("exact")
    x, t = (torch.randint(-1, 2, (8, 8), generator=rng).to(dtype) for _ in range(2))
    for reduction in REDUCTIONS:
        assert_identical(
            mse_loss_forward(x, t, None, reduction)[0], F.mse_loss(x.double(), t.double(), reduction=reduction)
        )


def test_mean_of_more_than_float16_counts() -> None:
    """The divisor is above 65504, the largest float16."""
    x = torch.full((70000,), 3.0, dtype=torch.float16)
    one = torch.ones((), dtype=torch.float16)
    loss, divisor = mse_loss_forward(x, torch.zeros_like(x), None, "mean")
    assert loss == 9
    grad_input, _ = mse_loss_backward(one, divisor, x, torch.zeros_like(x), None, "mean")
    assert bool((grad_input == torch.tensor(6 / 70000).half()).all())

    rows, target = torch.zeros(70000, 2, dtype=torch.float16), torch.ones(70000, dtype=torch.int64)
    _, divisor = nll_loss_forward(rows, target, None, {})
    grad_input = nll_loss_backward(one, divisor, rows, target, None, {})
    assert bool((grad_input == torch.tensor([0, -1 / 70000]).half()).all())
    _, statistics = cross_entropy_forward(rows, target, None, {})
    grad_input, _ = cross_entropy_backward(one, statistics, rows, target, None, {})
    assert bool((grad_input == torch.tensor([0.5 / 70000, -0.5 / 70000]).half()).all())


@each_schedule
@pytest.mark.parametrize(("case", "variant", "launches"), WAYS, ids=WAY_IDS)
def test_schedules_agree_on_cross_entropy(
    case: LossCase, variant: str, launches: int, schedule: tuple[str, bool]
) -> None:
    x, target, weight, kwargs = make_loss_case(case, torch.float32)
    grad = torch.tensor(1.5)

    def run() -> list[Tensor | None]:
        loss, statistics = cross_entropy_forward(x, target, weight, kwargs)
        return [loss, statistics, *cross_entropy_backward(grad, statistics, x, target, weight, kwargs)]

    expected = run()
    emulator.trace_start()
    with scheduled(schedule):
        assert_same(run(), expected)
    ran = [record[:3] for record in emulator.trace_stop()]
    assert ("cross_entropy_forward", variant, "emulator") in ran
    assert ("cross_entropy_backward", variant, "emulator") in ran


@each_schedule
def test_schedules_agree_on_nll_and_mse_loss(schedule: tuple[str, bool]) -> None:
    x, target, weight, kwargs = make_loss_case(
        LossCase("5000_rows", (5000, 3), weight=True, ignore=True), torch.float32
    )
    small = [v[:97].contiguous() for v in (x, target)]
    grad = torch.tensor(1.5)

    def run() -> list[Tensor | None]:
        results: list[Tensor | None] = []
        for values, classes in ((x, target), small):
            loss, divisor = nll_loss_forward(values, classes, weight, kwargs)
            results += [loss, divisor, nll_loss_backward(grad, divisor, values, classes, weight, kwargs)]
        for count in (1000, 33001):
            a, b = (torch.linspace(-1, end, count) for end in (1, 2))
            loss, divisor = mse_loss_forward(a, b, b, "mean")
            results += [loss, divisor, *mse_loss_backward(grad, divisor, a, b, b, "mean")]
        return results

    expected = run()
    with scheduled(schedule), ran_on_the_emulator("mse_loss_forward", "blocks"):
        assert_same(run(), expected)


def assert_same(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a is e is None or (a is not None and e is not None and torch.equal(a, e))


@each_dtype
@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_all_ignored_is_torchs(name: str, dtype: torch.dtype) -> None:
    x, target = torch.zeros(3, 4, dtype=dtype), torch.full((3,), -100)
    x64 = x.double().requires_grad_()
    expected = getattr(F, name)(x64, target)
    if name == "cross_entropy":
        loss, statistics = cross_entropy_forward(x, target, None, {})
        grad_input, _ = cross_entropy_backward(torch.ones_like(loss), statistics, x, target, None, {})
    else:
        loss, divisor = nll_loss_forward(x, target, None, {})
        grad_input = nll_loss_backward(torch.ones_like(loss), divisor, x, target, None, {})
    assert loss.isnan()
    assert_identical(loss, expected)
    assert_identical(grad_input, torch.autograd.grad(expected, x64)[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (9, 4, 0)], ids=str)
def test_no_samples(shape: tuple[int, ...], reduction: str) -> None:
    x, target = torch.zeros(shape), torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    kwargs = {"reduction": reduction}
    expected = F.cross_entropy(x, target, reduction=reduction)
    for loss, statistics in (cross_entropy_forward(x, target, None, kwargs), nll_loss_forward(x, target, None, kwargs)):
        assert_identical(loss, expected)
        assert statistics is not None
        assert statistics.view(-1)[-1] == 0
    nll_loss_backward(torch.ones_like(expected), torch.zeros(()), x, target, None, kwargs)
    loss, divisor = mse_loss_forward(x, x, None, reduction)
    assert_identical(loss, F.mse_loss(x, x, reduction=reduction))
    mse_loss_backward(torch.ones_like(loss), divisor, x, x, None, reduction)


@pytest.mark.parametrize("wrong", [4, -1])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2), (300, 4)], ids=str)
def test_targets_out_of_bounds(shape: tuple[int, ...], wrong: int) -> None:
    """A device's assertion, as torch's: the emulator raises it."""
    x, target = torch.zeros(shape), torch.ones((shape[0], *shape[2:]), dtype=torch.int64)
    target.view(-1)[-1] = wrong
    with pytest.raises(RuntimeError, match="Target out of bounds"):
        cross_entropy_forward(x, target, None, {})
    with pytest.raises(RuntimeError, match="Target out of bounds"):
        nll_loss_forward(x, target, None, {})


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "float64"])
def test_large_logits_do_not_overflow(dtype: torch.dtype) -> None:
    x = torch.tensor([[1e4, -1e4, 0.0], [3e38, 0.0, -3e38]], dtype=dtype)
    target = torch.tensor([0, 0])
    loss, statistics = cross_entropy_forward(x, target, None, {})
    assert_identical(loss, torch.zeros((), dtype=dtype))
    assert cross_entropy_backward(torch.ones_like(loss), statistics, x, target, None, {})[0].isfinite().all()


@each_dtype
def test_special_logits_are_torchs(dtype: torch.dtype) -> None:
    inf = float("inf")
    x = torch.tensor([[NAN, 0], [0, 1], [0, -inf], [0, -inf], [inf, 0], [-inf, -inf]], dtype=dtype)
    target = torch.tensor([1, 1, 0, 1, 0, 1])
    losses, _ = cross_entropy_forward(x, target, None, {"reduction": "none"})
    expected = F.cross_entropy(x.float(), target, reduction="none")
    torch.testing.assert_close(losses, expected.to(dtype), equal_nan=True)
    losses, _ = nll_loss_forward(x, target, None, {"reduction": "none"})
    torch.testing.assert_close(losses, F.nll_loss(x, target, reduction="none"), equal_nan=True)
