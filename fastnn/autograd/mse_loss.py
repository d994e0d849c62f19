"""mse_loss: the kernels' autograd.Function, ``torch.ops.fastnn.mse_loss`` and its backward op.

Input, target and weight have one shape; their elements are read in the order in which the input's lie.
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
    empty_divisor,
    empty_scalar,
    gapless,
    goes_through_op,
    goes_through_torch,
    laid_out_as,
    wanted,
)
from fastnn.autograd.cross_entropy import REDUCTIONS


def mse_loss_forward(input: Tensor, target: Tensor, weight: Tensor | None, reduction: int) -> tuple[Tensor, Tensor]:
    """The loss and the divisor of its mean."""
    input = gapless(input)
    output = torch.empty_like(input) if reduction == 0 else empty_scalar(input)
    divisor = empty_divisor(input)
    if weight is not None:
        weight = laid_out_as(input, weight)
    _C.mse_loss_forward(output, divisor, input, laid_out_as(input, target), weight, reduction)
    return output, divisor


def mse_loss_backward(
    grad_output: Tensor,
    divisor: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of input and target, where needed."""
    input = gapless(input)
    grad_input = torch.empty_like(input) if needed[0] else None
    grad_target = torch.empty_like(input) if needed[1] else None
    _C.mse_loss_backward(
        grad_input,
        grad_target,
        laid_out_as(input, grad_output) if reduction == 0 else dense(grad_output),
        divisor,
        input,
        laid_out_as(input, target),
        None if weight is None else laid_out_as(input, weight),
        reduction,
    )
    return grad_input, grad_target


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, target, weight, ctx.reduction = inputs
    divisor = output[1]
    ctx.mark_non_differentiable(divisor)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, target, weight, divisor)


def _backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 4
    input, target, weight, divisor = ctx.saved_tensors
    needed = ctx.needs_input_grad[:2]
    reduction = ctx.reduction
    if goes_through_op(grad_output):
        grads = mse_loss_backward_op(grad_output, divisor, input, target, weight, reduction, needed)
        return *wanted(grads, needed), None, None
    if goes_through_torch(grad_output):
        return (
            *differentiable_backward(
                lambda x, t: reference.mse_loss(x, t, reduction=REDUCTIONS[reduction], weight=weight),
                (input, target),
                needed,
                grad_output,
            ),
            None,
            None,
        )
    return *mse_loss_backward(grad_output, divisor, input, target, weight, reduction, needed), None, None


class MseLossFunction(KernelFunction):
    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, reduction: int) -> Tensor:
        output, divisor = mse_loss_forward(input, target, weight, reduction)
        ctx.reduction = reduction
        ctx.save_for_backward(input, target, weight, divisor)
        return output

    backward = staticmethod(_backward)


mse_loss_op = define_op(
    "mse_loss(Tensor input, Tensor target, Tensor? weight, int reduction) -> (Tensor, Tensor)",
    mse_loss_forward,
    lambda input, target, weight, reduction: (
        torch.empty_like(input) if reduction == 0 else input.new_empty(()),
        empty_divisor(input),
    ),
    backward=_backward,
    setup_context=_save,
)

mse_loss_backward_op = define_op(
    "mse_loss_backward(Tensor grad_output, Tensor divisor, Tensor input, Tensor target, Tensor? weight, "
    "int reduction, bool[2] needed) -> (Tensor, Tensor)",
    lambda grad_output, divisor, input, *others: tuple(
        input.new_empty(0) if grad is None else grad for grad in mse_loss_backward(grad_output, divisor, input, *others)
    ),
    lambda grad_output, divisor, input, *others: tuple(
        torch.empty_like(input) if need else input.new_empty(0) for need in others[-1]
    ),
)
