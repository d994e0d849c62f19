"""nll_loss: the kernels' autograd.Function, ``torch.ops.fastnn.nll_loss`` and its backward op."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastnn import _C, reference
from fastnn.autograd.common import (
    KernelFunction,
    define_op,
    dense,
    differentiable_backward,
    empty_dense,
    empty_divisor,
    goes_through_op,
    goes_through_torch,
)
from fastnn.autograd.cross_entropy import REDUCTIONS, empty_loss, loss_shape


def nll_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: int
) -> tuple[Tensor, Tensor]:
    """The loss and the divisor of its mean."""
    output = empty_loss(input, reduction)
    divisor = empty_divisor(input)
    if weight is not None:
        weight = dense(weight)
    _C.nll_loss_forward(output, divisor, dense(input), dense(target), weight, ignore_index, reduction)
    return output, divisor


def nll_loss_backward(
    grad_output: Tensor,
    divisor: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
) -> Tensor:
    grad_input = empty_dense(input)
    if weight is not None:
        weight = dense(weight)
    _C.nll_loss_backward(grad_input, dense(grad_output), divisor, dense(target), weight, ignore_index, reduction)
    return grad_input


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, target, weight, *ctx.options = inputs
    divisor = output[1]
    ctx.mark_non_differentiable(divisor)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, target, weight, divisor)


def _backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 5
    input, target, weight, divisor = ctx.saved_tensors
    if goes_through_op(grad_output):
        grad_input = nll_loss_backward_op(grad_output, divisor, input, target, weight, *ctx.options)
    elif goes_through_torch(grad_output):
        ignore_index, reduction = ctx.options

        def function(x: Tensor) -> Tensor:
            return reference.nll_loss(x, target, weight, ignore_index=ignore_index, reduction=REDUCTIONS[reduction])

        (grad_input,) = differentiable_backward(function, (input,), (True,), grad_output)
    else:
        grad_input = nll_loss_backward(grad_output, divisor, input, target, weight, *ctx.options)
    return grad_input, None, None, None, None


class NllLossFunction(KernelFunction):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: int
    ) -> Tensor:
        output, divisor = nll_loss_forward(input, target, weight, ignore_index, reduction)
        ctx.options = ignore_index, reduction
        ctx.save_for_backward(input, target, weight, divisor)
        return output

    backward = staticmethod(_backward)


nll_loss_op = define_op(
    "nll_loss(Tensor input, Tensor target, Tensor? weight, int ignore_index, int reduction) -> (Tensor, Tensor)",
    nll_loss_forward,
    lambda input, target, weight, ignore_index, reduction: (
        input.new_empty(loss_shape(input, reduction)),
        empty_divisor(input),
    ),
    backward=_backward,
    setup_context=_save,
)

nll_loss_backward_op = define_op(
    "nll_loss_backward(Tensor grad_output, Tensor divisor, Tensor input, Tensor target, Tensor? weight, "
    "int ignore_index, int reduction) -> Tensor",
    nll_loss_backward,
    lambda grad_output, divisor, input, *others: input.new_empty(input.shape),
)
