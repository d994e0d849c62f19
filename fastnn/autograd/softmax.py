"""softmax and log_softmax: the kernels' autograd.Functions and the ops of both, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastnn import _C, reference
from fastnn.autograd.common import KernelFunction, define_op, dense, empty_dense, goes_through_op, goes_through_torch


class SoftmaxOperator:
    """One of the two operators: both save their output, and differ in the kernels alone.

    `gradient` is the backward kernel's formula in torch operations, for what is differentiated again: the
    saved output leads back to the input.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[[Tensor, Tensor, int], None],
        backward: Callable[[Tensor, Tensor, Tensor, int], None],
        gradient: Callable[[Tensor, Tensor, int], Tensor],
        reference: Callable[[Tensor, int], Tensor],
    ) -> None:
        self._forward_kernel, self._backward_kernel, self._gradient = forward, backward, gradient
        self.reference = reference
        operator = self

        class Function(KernelFunction):
            @staticmethod
            def forward(ctx: Any, input: Tensor, dim: int) -> Tensor:
                output = operator.forward(input, dim)
                ctx.save_for_backward(output)
                ctx.dim = dim
                return output

            @staticmethod
            def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None]:
                return operator._differentiate(ctx, grad_output)

        self.function = Function
        self.op = define_op(
            f"{name}(Tensor input, int dim) -> Tensor",
            self.forward,
            lambda input, dim: input.new_empty(input.shape),
            backward=self._differentiate,
            setup_context=self._save,
        )
        self.backward_op = define_op(
            f"{name}_backward(Tensor grad_output, Tensor output, int dim) -> Tensor",
            self.backward,
            lambda grad_output, output, dim: output.new_empty(output.shape),
        )

    def forward(self, input: Tensor, dim: int) -> Tensor:
        output = empty_dense(input)
        self._forward_kernel(output, dense(input), dim)
        return output

    def backward(self, grad_output: Tensor, output: Tensor, dim: int) -> Tensor:
        grad_input = empty_dense(output)
        self._backward_kernel(grad_input, dense(grad_output), dense(output), dim)
        return grad_input

    def _save(self, ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.dim = inputs[1]

    def _differentiate(self, ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None]:
        (output,) = ctx.saved_tensors
        dim = ctx.dim
        if goes_through_op(grad_output):
            return self.backward_op(grad_output, output, dim), None
        if goes_through_torch(grad_output):
            return self._gradient(grad_output, output, dim), None
        return self.backward(grad_output, output, dim), None


def _softmax_gradient(grad_output: Tensor, output: Tensor, dim: int) -> Tensor:
    return output * (grad_output - (grad_output * output).sum(dim, keepdim=True))


def _log_softmax_gradient(grad_output: Tensor, output: Tensor, dim: int) -> Tensor:
    return grad_output - output.exp() * grad_output.sum(dim, keepdim=True)


softmax_operator = SoftmaxOperator(
    "softmax", _C.softmax_forward, _C.softmax_backward, _softmax_gradient, reference.softmax
)
log_softmax_operator = SoftmaxOperator(
    "log_softmax",
    _C.log_softmax_forward,
    _C.log_softmax_backward,
    _log_softmax_gradient,
    reference.log_softmax,
)
