"""conv2d, optionally with ReLU and 2x2 max-pooling in the same pass: autograd.Function and ``torch.ops.fastnn`` ops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnn import _C, reference
from fastnn.arguments import Pair
from fastnn.autograd.common import (
    KernelFunction,
    allows_tf32,
    before_relu,
    define_op,
    dense,
    differentiable_backward,
    empty_like_if,
    goes_through_op,
    goes_through_torch,
    wanted,
    wanted_in_this_pass,
)
from fastnn.runtime import runs_on_cuda


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
    return _runs_channels_last(tensor.shape, tensor.stride())


def _runs_channels_last(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    if len(sizes) != 4 or strides[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * sizes[d] if sizes[d] > 1 else strides[d]
    return True


def lies_as_kernels_read(weight: Tensor) -> bool:
    """Whether memory is the values in one of the two layouts that the kernels read."""
    in_order = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    return in_order and not weight.is_neg()


def _kernel_layout(weight: Tensor) -> Tensor:
    """The weight in one of the two layouts that the kernels read."""
    if weight.is_neg():
        weight = weight.resolve_neg()
    return weight if lies_as_kernels_read(weight) else weight.contiguous()


def output_shape(
    input: Sequence[int], weight: Sequence[int], geometry: Geometry, pool: bool
) -> tuple[int, int, int, int]:
    """The output's shape from those of input and weight."""
    sizes = []
    for d in range(2):
        span = geometry.dilation[d] * (weight[2 + d] - 1) + 1
        size = (input[2 + d] + 2 * geometry.padding[d] - span) // geometry.stride[d] + 1
        sizes.append(size // 2 if pool else size)
    return input[0], weight[0], sizes[0], sizes[1]


def kernels_can_count(input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether the kernels of the input's device hold images of this size: CUDA's count pixels and values in 32 bits
    (`check_sizes` in csrc/cuda/conv2d.cuh)."""
    if not runs_on_cuda(input) or input.dim() != 4 or weight.dim() != 4 or min(geometry.stride) < 1:
        return True  # the binding says what does not fit
    _, outputs, *output_size = output_shape(input.shape, weight.shape, geometry, pool=False)
    pixels = math.prod(input.shape[2 + d] + 2 * geometry.padding[d] for d in range(2))
    channels = max(input.shape[1], outputs) if geometry.stride == (1, 1) else input.shape[1]
    return pixels < 1 << 30 and pixels * channels < 1 << 31 and math.prod(output_size) * outputs < 1 << 31


_Sizes = tuple[int, ...]
_Layout = tuple[_Sizes, _Sizes]  # shape and strides


def layout_of(tensor: Tensor) -> _Layout:
    return tensor.shape, tensor.stride()


def result_format(*layouts: _Layout) -> torch.memory_format:
    """torch's rule for the results of convolutions: channels_last where the input or a weight is."""
    prefers = any(_runs_channels_last(*layout) for layout in layouts)
    return torch.channels_last if prefers else torch.contiguous_format


@lru_cache(maxsize=1024)
def channels_last_strides(shape: _Sizes, named: torch.memory_format) -> _Sizes:
    """Of images in channels_last. Those of one channel or pixel lie in memory as in both formats; their strides are
    those of `named`."""
    images = torch.empty(shape, dtype=torch.uint8, device="meta", memory_format=torch.channels_last)
    if images.is_contiguous():
        images = torch.empty_like(images, memory_format=named)
    return images.stride()


@lru_cache(maxsize=1024)
def _output_layout(
    input: _Layout, weight: _Layout, geometry: Geometry, pool: bool
) -> tuple[_Sizes, _Sizes, torch.memory_format]:
    """Shape and strides of the output in channels_last, and the format that torch's would have, from the shapes and
    strides of input and weight; kept, for they take as long to work out as a tiny image."""
    shape = output_shape(input[0], weight[0], geometry, pool)
    memory_format = result_format(input, weight)
    return shape, channels_last_strides(shape, memory_format), memory_format


def _precision(input: Tensor) -> str:
    return "tf32" if allows_tf32(input, "conv") else "fp32"


def conv2d_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    relu: bool,
    pool: bool,
    with_winner: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The output, and with `pool` each maximum's place in its window (uint8, channels_last), which backward reads."""
    try:
        shape, strides, memory_format = _output_layout(layout_of(input), layout_of(weight), geometry, pool)
    except (IndexError, RuntimeError, ZeroDivisionError):  # not a convolution: the binding says in what way
        shape = strides = (0, 0, 0, 0)
        memory_format = torch.contiguous_format
    output = input.new_empty_strided(shape, strides)
    winner = torch.empty_like(output, dtype=torch.uint8) if pool and with_winner else None
    source = channels_last(input) if input.dim() == 4 else input
    _C.conv2d_forward(
        output,
        winner,
        source,
        _kernel_layout(weight),
        None if bias is None else dense(bias),
        *geometry,
        relu,
        pool,
        _precision(input),
    )
    return output.contiguous(memory_format=memory_format), winner


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
    source, kernel = channels_last(input), _kernel_layout(weight)
    grad_input = torch.empty_like(source) if needed[0] else None
    grad_weight = torch.empty_like(kernel) if needed[1] else None
    grad_bias = weight.new_empty(weight.shape[0]) if needed[2] else None
    _C.conv2d_backward(
        grad_input,
        grad_weight,
        grad_bias,
        channels_last(grad_output),
        source,
        kernel,
        None if output is None else channels_last(output),
        None if winner is None else channels_last(winner),
        *geometry,
        _precision(input),
    )
    if grad_input is not None:
        memory_format = _output_layout(layout_of(input), layout_of(weight), geometry, winner is not None)[2]
        grad_input = grad_input.contiguous(memory_format=memory_format)
    return grad_input, grad_weight, grad_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
    input, weight, bias, stride, padding, dilation, groups, relu, pool = inputs
    result, winner = output
    ctx.save_for_backward(input, weight, result if relu and not pool else None, winner if pool else None)
    ctx.bias = bias if pool else None  # of which no value is read: it may change
    ctx.geometry = _geometry(stride, padding, dilation, groups)


def _before_activation(
    grad_output: Tensor,
    output: Tensor | None,
    winner: Tensor | None,
    sources: Sequence[Tensor | None],
    shape: tuple[int, int, int, int],
) -> Tensor:
    """The gradient of the convolution, of this shape, from that of what ReLU and pooling left, by torch's operations.

    `output` undoes a ReLU, `winner` pooling (and its ReLU), as a function of the `sources`, whose derivative is zero.
    """
    if winner is None:
        return before_relu(grad_output, output)
    # Of a window's four places, row by row; 4 where ReLU cut the maximum.
    rows, columns = (torch.arange(size, device=winner.device) for size in winner.shape[2:])
    lost = winner == 4
    places = (2 * rows.unsqueeze(1) + winner // 2) * shape[3] + 2 * columns + winner % 2
    planes = *shape[:2], winner.shape[2] * winner.shape[3]
    zero = torch.stack([source[:0].sum() for source in sources if source is not None]).sum()
    shares = torch.where(lost, zero, grad_output).reshape(planes)
    zeros = grad_output.new_zeros(*shape[:2], shape[2] * shape[3])
    return zeros.scatter_add(2, places.masked_fill(lost, 0).reshape(planes), shares).reshape(shape)


def _backward(ctx: Any, grad_output: Tensor, _grad_winner: Tensor | None = None) -> tuple[Tensor | None, ...]:
    input, weight, output, winner = ctx.saved_tensors
    geometry = ctx.geometry
    needed = ctx.needs_input_grad[:3]
    rest = (None,) * 6
    if goes_through_op(grad_output):
        grads = conv2d_backward_op(grad_output, input, weight, output, winner, *geometry, needed)
        return *wanted(grads, needed), *rest
    if goes_through_torch(grad_output):
        shape = output_shape(input.shape, weight.shape, geometry, pool=False)
        grad = _before_activation(grad_output, output, winner, (input, weight, ctx.bias), shape)
        grads = [None, None]
        if any(needed[:2]):
            grads = differentiable_backward(
                lambda x, w: reference.conv2d(x, w, None, *geometry), (input, weight), needed[:2], grad
            )
        return *grads, grad.sum((0, 2, 3)) if needed[2] else None, *rest
    needed = wanted_in_this_pass(ctx, needed, input)
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
        geometry = Geometry(stride, padding, dilation, groups)
        output, winner = conv2d_forward(input, weight, bias, geometry, relu, pool)
        _save(ctx, (input, weight, bias, *geometry, relu, pool), (output, winner))
        return output

    backward = staticmethod(_backward)


def _geometry(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Geometry:
    """From the lists that operators are called with."""
    return Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)  # type: ignore[arg-type]


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    pool: bool,
) -> tuple[Tensor, Tensor]:
    geometry = _geometry(stride, padding, dilation, groups)
    output, winner = conv2d_forward(input, weight, bias, geometry, relu, pool)
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
    shape = output_shape(input.shape, weight.shape, Geometry(stride, padding, dilation, groups), pool)
    memory_format = result_format(layout_of(input), layout_of(weight))
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format)
    if not pool:
        return output, input.new_empty(0, dtype=torch.uint8)
    return output, torch.empty(shape, dtype=torch.uint8, device=input.device, memory_format=torch.channels_last)


def _flops(input: Sequence[int], weight: Sequence[int], *geometry: Any) -> int:
    """Two for each product and its addition, as torch counts a convolution."""
    return 2 * math.prod(output_shape(input, weight, _geometry(*geometry), pool=False)) * math.prod(weight[1:])


conv2d_op = define_op(
    "conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "SymInt groups, bool relu, bool pool) -> (Tensor, Tensor)",
    _conv2d,
    _conv2d_fake,
    backward=_backward,
    setup_context=_save,
    flops=lambda input, weight, bias, stride, padding, dilation, groups, *_, **__: _flops(
        input, weight, stride, padding, dilation, groups
    ),
)


def _conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor | None,
    winner: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    geometry = _geometry(stride, padding, dilation, groups)
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
        memory_format = result_format(layout_of(input), layout_of(weight))
        grad_input = grad_input.contiguous(memory_format=memory_format)
    grad_weight = torch.empty_like(_kernel_layout(weight)) if needed[1] else weight.new_empty(0)
    return grad_input, grad_weight, empty_like_if(needed[2], weight, weight.shape[:1])


conv2d_backward_op = define_op(
    "conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? output, Tensor? winner, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, bool[3] needed) "
    "-> (Tensor, Tensor, Tensor)",
    _conv2d_backward,
    _conv2d_backward_fake,
    flops=lambda grad_output, input, weight, output, winner, stride, padding, dilation, groups, needed, **_: (
        (needed[0] + needed[1]) * _flops(input, weight, stride, padding, dilation, groups)
    ),
)
