"""linear: the kernels' autograd.Function, ``torch.ops.fastnn.linear`` and ``torch.ops.fastnn.linear_backward``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnn import _C, reference
from fastnn.autograd.common import (
    KernelFunction,
    allows_tf32,
    define_op,
    dense,
    differentiable_backward,
    empty_like_if,
    goes_through_op,
    goes_through_torch,
    wanted,
    wanted_in_this_pass,
)


def linear_forward(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    output = input.new_empty(*input.shape[:-1], weight.shape[0])
    tf32 = allows_tf32(input, "matmul")
    _C.linear_forward(output, dense(input), dense(weight), None if bias is None else dense(bias), relu, tf32)
    return output


def linear_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, output: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, where needed; `output` is given where a ReLU is to be undone."""
    input, weight = dense(input), dense(weight)
    grad_input = torch.empty_like(input) if needed[0] else None
    grad_weight = torch.empty_like(weight) if needed[1] else None
    grad_bias = weight.new_empty(weight.shape[0]) if needed[2] else None
    _C.linear_backward(
        grad_input,
        grad_weight,
        grad_bias,
        dense(grad_output),
        input,
        weight,
        output,
        allows_tf32(input, "matmul"),
    )
    return grad_input, grad_weight, grad_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, relu = inputs
    ctx.save_for_backward(input, weight, bias, output if relu else None)
    ctx.relu = relu


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias, output = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    if goes_through_op(grad_output):
        return *wanted(linear_backward_op(grad_output, input, weight, output, needed), needed), None
    if goes_through_torch(grad_output):
        activation = "relu" if ctx.relu else None
        return *differentiable_backward(
            lambda x, w, b: reference.linear(x, w, b, activation=activation),
            (input, weight, bias),
            needed,
            grad_output,
        ), None
    needed = wanted_in_this_pass(ctx, needed, weight)
    return *linear_backward(grad_output, input, weight, output, needed), None


class LinearFunction(KernelFunction):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        output = linear_forward(input, weight, bias, relu)
        ctx.save_for_backward(input, weight, bias, output if relu else None)
        ctx.relu = relu
        return output

    backward = staticmethod(_backward)


linear_op = define_op(
    "linear(Tensor input, Tensor weight, Tensor? bias, bool relu) -> Tensor",
    linear_forward,
    lambda input, weight, bias, relu: input.new_empty((*input.shape[:-1], weight.shape[0])),
    backward=_backward,
    setup_context=_save,
)

linear_backward_op = define_op(
    "linear_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? output, bool[3] needed) "
    "-> (Tensor, Tensor, Tensor)",
    lambda grad_output, input, weight, output, needed: tuple(
        input.new_empty(0) if grad is None else grad
        for grad in linear_backward(grad_output, input, weight, output, needed)
    ),
    lambda grad_output, input, weight, output, needed: (
        empty_like_if(needed[0], input, input.shape),
        empty_like_if(needed[1], weight, weight.shape),
        empty_like_if(needed[2], weight, weight.shape[:1]),
    ),
)
