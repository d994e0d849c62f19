"""relu: the kernels' autograd.Functions, ``torch.ops.fastnn.relu`` and ``torch.ops.fastnn.relu_backward``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnn import _C
from fastnn.autograd.common import (
    KernelFunction,
    before_relu,
    define_op,
    gapless,
    goes_through_op,
    goes_through_torch,
    laid_out_as,
)


def relu_forward(input: Tensor) -> Tensor:
    input = gapless(input)
    output = torch.empty_like(input)
    _C.relu_forward(output, input)
    return output


def relu_inplace(input: Tensor) -> None:
    """Overwrites `input`; the caller tells autograd."""
    values = gapless(input)
    _C.relu_forward(values, values)
    if values is not input:
        input.copy_(values)


def relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    output = gapless(output)
    grad_input = torch.empty_like(output)
    _C.relu_backward(grad_input, laid_out_as(output, grad_output), output)
    return grad_input


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad_output: Tensor) -> Tensor | None:
    (output,) = ctx.saved_tensors
    if goes_through_op(grad_output):
        grad_input: Tensor = relu_backward_op(grad_output, output)
        return grad_input
    if goes_through_torch(grad_output):
        return before_relu(grad_output, output)
    return relu_backward(grad_output, output)


class ReluFunction(KernelFunction):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        output = relu_forward(input)
        ctx.save_for_backward(output)
        return output

    backward = staticmethod(_backward)


class ReluInplaceFunction(KernelFunction):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        relu_inplace(input)
        ctx.mark_dirty(input)
        ctx.save_for_backward(input)
        return input

    backward = staticmethod(_backward)


relu_op = define_op(
    "relu(Tensor input) -> Tensor",
    relu_forward,
    torch.empty_like,
    backward=_backward,
    setup_context=_save,
)

relu_backward_op = define_op(
    "relu_backward(Tensor grad_output, Tensor output) -> Tensor",
    relu_backward,
    lambda grad_output, output: torch.empty_like(output),
)
