"""conv2d, optionally with ReLU and 2x2 max-pooling in the same pass: autograd.Function and ``torch.ops.fastnn`` ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnn import _C, reference
from fastnn.arguments import Pair
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
)


class Geometry(NamedTuple):
    """How a convolution reads its input; pairs are (height, width)."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


def channels_last(tensor: Tensor) -> Tensor:
    """The same (n, c, h, w) values stored as n, h, w, c, with the negative bit applied."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor.contiguous(memory_format=torch.channels_last)


def prefers_channels_last(tensor: Tensor) -> bool:
    """Whether torch takes this tensor's strides for channels_last: its own rule, size-1 dimensions included."""
    sizes, strides = tensor.shape, tensor.stride()
    if len(sizes) != 4 or strides[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * sizes[d] if sizes[d] > 1 else strides[d]
    return True


def _kernel_layout(weight: Tensor) -> Tensor:
    """The weight in one of the two layouts that the kernels read."""
    if weight.is_neg():
        weight = weight.resolve_neg()
    if weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    return weight.contiguous()


def output_shape(input: Tensor, weight: Tensor, geometry: Geometry, pool: bool) -> tuple[int, int, int, int]:
    sizes = []
    for d in range(2):
        span = geometry.dilation[d] * (weight.shape[2 + d] - 1) + 1
        size = (input.shape[2 + d] + 2 * geometry.padding[d] - span) // geometry.stride[d] + 1
        sizes.append(size // 2 if pool else size)
    return input.shape[0], weight.shape[0], sizes[0], sizes[1]


def _result_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """torch's rule for a convolution's results: channels_last where the input or the weight is."""
    if prefers_channels_last(input) or prefers_channels_last(weight):
        return torch.channels_last
    return torch.contiguous_format


def _empty_images(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _precision(input: Tensor) -> str:
    return "tf32" if allows_tf32(input, "conv") else "fp32"


def conv2d_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, relu: bool, pool: bool
) -> tuple[Tensor, Tensor | None]:
    """The output, and with `pool` each maximum's place in its window (uint8, channels_last)."""
    try:
        shape = output_shape(input, weight, geometry, pool)
        output = _empty_images(shape, input)
    except (IndexError, RuntimeError, ZeroDivisionError):  # not a convolution: the binding says in what way
        shape = (0, 0, 0, 0)
        output = input.new_empty(shape)
    winner = torch.empty_like(output, dtype=torch.uint8) if pool else None
    source = channels_last(input) if input.dim() == 4 else input
    _C.conv2d_forward(
        output,
        winner,
        source,
        _kernel_layout(weight),
        None if bias is None else dense(bias),
        *geometry,
        relu,
        _precision(input),
    )
    return output.contiguous(memory_format=_result_format(input, weight)), winner


def conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor | None,
    winner: Tensor | None,
    geometry: Geometry,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, where needed; `output` undoes a ReLU, `winner` pooling (and its ReLU)."""
    grad_input = grad_weight = grad_bias = None
    weight = _kernel_layout(weight)
    if needed[0]:
        grad_input = _empty_images(input.shape, input)
    if needed[1]:
        grad_weight = torch.empty_like(weight)
    if needed[2]:
        grad_bias = weight.new_empty(weight.shape[0])
    _C.conv2d_backward(
        grad_input,
        grad_weight,
        grad_bias,
        channels_last(grad_output),
        channels_last(input),
        weight,
        None if output is None else channels_last(output),
        winner,
        *geometry,
        _precision(input),
    )
    if grad_input is not None:
        grad_input = grad_input.contiguous(memory_format=_result_format(input, weight))
    return grad_input, grad_weight, grad_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
    input, weight, bias, stride, padding, dilation, groups, relu, pool = inputs
    result, winner = output
    ctx.save_for_backward(input, weight, bias, result if relu and not pool else None, winner if pool else None)
    ctx.geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    ctx.relu = relu


def _backward(ctx: Any, grad_output: Tensor, _grad_winner: Tensor | None = None) -> tuple[Tensor | None, ...]:
    input, weight, bias, output, winner = ctx.saved_tensors
    geometry, relu, pool = ctx.geometry, ctx.relu, winner is not None
    needed = ctx.needs_input_grad[:3]
    rest = (None,) * 6
    if goes_through_op(grad_output):
        grads = conv2d_backward_op(grad_output, input, weight, output, winner, *geometry, needed)
        return *wanted(grads, needed), *rest
    if goes_through_torch(grad_output):

        def function(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            activation, max_pool = "relu" if relu else None, 2 if pool else None
            return reference.conv2d(x, w, b, *geometry, activation=activation, max_pool=max_pool)

        return *differentiable_backward(function, (input, weight, bias), needed, grad_output), *rest
    return *conv2d_backward(grad_output, input, weight, output, winner, geometry, needed), *rest


class Conv2dFunction(KernelFunction):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
        relu: bool,
        pool: bool,
    ) -> Tensor:
        output, winner = conv2d_forward(input, weight, bias, Geometry(stride, padding, dilation, groups), relu, pool)
        _save(ctx, (input, weight, bias, stride, padding, dilation, groups, relu, pool), (output, winner))
        return output

    backward = staticmethod(_backward)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    relu: bool,
    pool: bool,
) -> tuple[Tensor, Tensor]:
    output, winner = conv2d_forward(input, weight, bias, Geometry(stride, padding, dilation, groups), relu, pool)
    return output, input.new_empty(0, dtype=torch.uint8) if winner is None else winner


def _conv2d_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    relu: bool,
    pool: bool,
) -> tuple[Tensor, Tensor]:
    shape = output_shape(input, weight, Geometry(stride, padding, dilation, groups), pool)
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=_result_format(input, weight))
    if not pool:
        return output, input.new_empty(0, dtype=torch.uint8)
    return output, torch.empty(shape, dtype=torch.uint8, device=input.device, memory_format=torch.channels_last)


conv2d_op = define_op(
    "conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "SymInt groups, bool relu, bool pool) -> (Tensor, Tensor)",
    _conv2d,
    _conv2d_fake,
    backward=_backward,
    setup_context=_save,
)


def _conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor | None,
    winner: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    geometry = Geometry(stride, padding, dilation, groups)
    grads = conv2d_backward(grad_output, input, weight, output, winner, geometry, needed)
    return tuple(input.new_empty(0) if grad is None else grad for grad in grads)


def _conv2d_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor | None,
    winner: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    grad_input = empty_like_if(needed[0], input, input.shape)
    if needed[0]:
        grad_input = grad_input.contiguous(memory_format=_result_format(input, weight))
    grad_weight = torch.empty_like(_kernel_layout(weight)) if needed[1] else weight.new_empty(0)
    return grad_input, grad_weight, empty_like_if(needed[2], weight, weight.shape[:1])


conv2d_backward_op = define_op(
    "conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? output, Tensor? winner, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, bool[3] needed) "
    "-> (Tensor, Tensor, Tensor)",
    _conv2d_backward,
    _conv2d_backward_fake,
)
