"""linear: the kernels' autograd.Function, ``torch.ops.fastnn.linear`` and ``torch.ops.fastnn.linear_backward``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastnn import _C
from fastnn.autograd.common import (
    KernelFunction,
    allows_tf32,
    before_relu,
    define_op,
    dense,
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
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, where needed; `output` is given where a ReLU is to be undone, `input` where
    the weight's gradient is needed, and `weight` where the input's is."""
    features = grad_output.shape[-1], _in_features(input, weight)
    grad_input = grad_output.new_empty(*grad_output.shape[:-1], features[1]) if needed[0] else None
    grad_weight = grad_output.new_empty(*features) if needed[1] else None
    grad_bias = grad_output.new_empty(features[0]) if needed[2] else None
    # The kernel reads no more than the shape of what is not given.
    if input is None:
        input = grad_output.new_empty(*grad_output.shape[:-1], features[1]) if grad_input is None else grad_input
    if weight is None:
        weight = grad_output.new_empty(*features) if grad_weight is None else grad_weight
    _C.linear_backward(
        grad_input,
        grad_weight,
        grad_bias,
        dense(grad_output),
        dense(input),
        dense(weight),
        None if output is None else dense(output),
        allows_tf32(grad_output, "matmul"),
    )
    return grad_input, grad_weight, grad_bias


def _in_features(input: Tensor | None, weight: Tensor | None) -> int:
    """0 where neither is given: the bias's gradient knows nothing of them."""
    given = weight if input is None else input
    return 0 if given is None else given.shape[-1]


def _differentiable_backward(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The same by torch's operations."""
    grad = before_relu(grad_output, output)
    batch = math.prod(grad.shape[:-1])
    rows = grad.reshape(batch, grad.shape[-1])
    grad_input = grad @ weight if needed[0] and weight is not None else None
    grad_weight = rows.T @ input.reshape(batch, input.shape[-1]) if needed[1] and input is not None else None
    return grad_input, grad_weight, rows.sum(0) if needed[2] else None


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, relu = inputs
    needs_input, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None, output if relu else None)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, output = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    if goes_through_op(grad_output):
        return *wanted(linear_backward_op(grad_output, input, weight, output, needed), needed), None
    if goes_through_torch(grad_output):
        return *_differentiable_backward(grad_output, input, weight, output, needed), None
    if input is not None and weight is not None:
        needed = wanted_in_this_pass(ctx, needed, weight)
    return *linear_backward(grad_output, input, weight, output, needed), None


class LinearFunction(KernelFunction):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        output = linear_forward(input, weight, bias, relu)
        _save(ctx, (input, weight, bias, relu), output)
        return output

    backward = staticmethod(_backward)


linear_op = define_op(
    "linear(Tensor input, Tensor weight, Tensor? bias, bool relu) -> Tensor",
    linear_forward,
    lambda input, weight, bias, relu: input.new_empty((*input.shape[:-1], weight.shape[0])),
    backward=_backward,
    setup_context=_save,
    flops=lambda input, weight, *_, **__: 2 * math.prod(input) * weight[0],
)

linear_backward_op = define_op(
    "linear_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor? output, bool[3] needed) "
    "-> (Tensor, Tensor, Tensor)",
    lambda grad_output, input, weight, output, needed: tuple(
        grad_output.new_empty(0) if grad is None else grad
        for grad in linear_backward(grad_output, input, weight, output, needed)
    ),
    lambda grad_output, input, weight, output, needed: (
        empty_like_if(needed[0], grad_output, (*grad_output.shape[:-1], _in_features(input, weight))),
        empty_like_if(needed[1], grad_output, (grad_output.shape[-1], _in_features(input, weight))),
        empty_like_if(needed[2], grad_output, grad_output.shape[-1:]),
    ),
    flops=lambda grad_output, input, weight, output, needed, **_: (
        2 * math.prod(grad_output) * (weight or input or [0])[-1] * (needed[0] + needed[1])
    ),
)
