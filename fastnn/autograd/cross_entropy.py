"""cross_entropy: the kernels' autograd.Function, ``torch.ops.fastnn.cross_entropy`` and its backward op.

For backward the forward pass keeps two or three numbers per sample, from which its softmax is made again, and
the divisor of the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnn import _C, reference
from fastnn.autograd.common import (
    KernelFunction,
    define_op,
    dense,
    differentiable_backward,
    empty_like_if,
    empty_scalar,
    goes_through_op,
    goes_through_torch,
    sum_dtype,
    wanted,
)

REDUCTIONS = ("none", "mean", "sum")  # in the order of torch's numbers


def loss_shape(input: Tensor, reduction: int) -> Sequence[int]:
    """Of a loss per class line of `input`, reduced or not."""
    return (*input.shape[:1], *input.shape[2:]) if reduction == 0 and input.dim() > 1 else ()


def empty_loss(input: Tensor, reduction: int) -> Tensor:
    if reduction == 0:
        return input.new_empty(loss_shape(input, reduction))
    return empty_scalar(input)


def empty_statistics(input: Tensor, target: Tensor) -> Tensor:
    """For two or, where the target holds probabilities, three numbers per sample, and the divisor."""
    shape = input.shape
    samples = 1 if len(shape) == 1 else shape[0]
    for size in shape[2:]:
        samples *= size
    size = (3 if target.is_floating_point() else 2) * samples + 1
    return input.new_empty(size, dtype=sum_dtype(input.dtype))


def cross_entropy_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The loss, and what backward needs if `keep`."""
    output = empty_loss(input, reduction)
    statistics = empty_statistics(input, target) if keep else None
    if weight is not None:
        weight = dense(weight)
    _C.cross_entropy_forward(
        output, statistics, dense(input), dense(target), weight, ignore_index, reduction, label_smoothing
    )
    return output, statistics


def cross_entropy_backward(
    grad_output: Tensor,
    statistics: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of input and target, where needed."""
    input = dense(input)
    grad_input = torch.empty_like(input) if needed[0] else None
    grad_target = torch.empty_like(input) if needed[1] else None
    _C.cross_entropy_backward(
        grad_input,
        grad_target,
        dense(grad_output),
        statistics,
        input,
        dense(target),
        None if weight is None else dense(weight),
        ignore_index,
        reduction,
        label_smoothing,
    )
    return grad_input, grad_target


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, target, weight, *ctx.options = inputs
    statistics = output[1]
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, target, weight, statistics)


def _backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 6
    input, target, weight, statistics = ctx.saved_tensors
    needed = ctx.needs_input_grad[:2]
    rest = (None,) * 4
    if goes_through_op(grad_output):
        grads = cross_entropy_backward_op(grad_output, statistics, input, target, weight, *ctx.options, needed)
        return *wanted(grads, needed), *rest
    ignore_index, reduction, label_smoothing = ctx.options
    if goes_through_torch(grad_output):

        def function(x: Tensor, t: Tensor) -> Tensor:
            return reference.cross_entropy(
                x,
                t,
                weight,
                ignore_index=ignore_index,
                reduction=REDUCTIONS[reduction],
                label_smoothing=label_smoothing,
            )

        return *differentiable_backward(function, (input, target), needed, grad_output), *rest
    return *cross_entropy_backward(
        grad_output,
        statistics,
        input,
        target,
        weight,
        ignore_index,
        reduction,
        label_smoothing,
        needed,
    ), *rest


class CrossEntropyFunction(KernelFunction):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        reduction: int,
        label_smoothing: float,
    ) -> Tensor:
        output, statistics = cross_entropy_forward(input, target, weight, ignore_index, reduction, label_smoothing)
        ctx.options = ignore_index, reduction, label_smoothing
        ctx.save_for_backward(input, target, weight, statistics)
        return output

    backward = staticmethod(_backward)


_OPTIONS = "int ignore_index, int reduction, float label_smoothing"

cross_entropy_op = define_op(
    f"cross_entropy(Tensor input, Tensor target, Tensor? weight, {_OPTIONS}) -> (Tensor, Tensor)",
    cross_entropy_forward,
    lambda input, target, weight, ignore_index, reduction, label_smoothing: (
        input.new_empty(loss_shape(input, reduction)),
        empty_statistics(input, target),
    ),
    backward=_backward,
    setup_context=_save,
)

cross_entropy_backward_op = define_op(
    "cross_entropy_backward(Tensor grad_output, Tensor statistics, Tensor input, Tensor target, "
    f"Tensor? weight, {_OPTIONS}, bool[2] needed) -> (Tensor, Tensor)",
    lambda grad_output, statistics, input, *others: tuple(
        input.new_empty(0) if grad is None else grad
        for grad in cross_entropy_backward(grad_output, statistics, input, *others)
    ),
    lambda grad_output, statistics, input, *others: tuple(
        empty_like_if(need, input, input.shape) for need in others[-1]
    ),
)
