"""max_pool2d: the kernels' autograd.Function, ``torch.ops.fastnn.max_pool2d`` and its backward op.

Beside the output stands, for backward, each window's winner: one byte with its place in the window, or
torch's int64 index where the caller asks for it or the window has more than 256 places.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastnn import _C, reference
from fastnn.arguments import Pair
from fastnn.autograd.common import (
    KernelFunction,
    define_op,
    differentiable_backward,
    goes_through_op,
    goes_through_torch,
)
from fastnn.autograd.conv2d import prefers_channels_last

MAX_BYTE_TAPS = 256


def _axis_size(name: str, size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Number of windows along one axis."""
    if kernel < 1:
        raise ValueError(f"kernel_size: expected at least 1 along {name}, got {kernel}")
    if stride < 1:
        raise ValueError(f"stride: expected at least 1 along {name}, got {stride}")
    if dilation < 1:
        raise ValueError(f"dilation: expected at least 1 along {name}, got {dilation}")
    reach = (kernel - 1) * dilation + 1
    if padding < 0 or padding > reach // 2:
        raise ValueError(f"padding: expected 0 to {reach // 2} along {name}, half of the kernel's reach, got {padding}")
    room = size + 2 * padding - reach
    if ceil_mode:
        count = (room + stride - 1) // stride + 1
        # The last window must start inside the image or its left padding.
        if (count - 1) * stride >= size + padding:
            count -= 1
    else:
        count = room // stride + 1
    if size < 1 or count < 1:
        raise ValueError(
            f"input: expected a {name} of at least {reach - 2 * padding} for kernel_size {kernel}, padding "
            f"{padding} and dilation {dilation}, got {size}: the output size would be {count}"
        )
    return count


def pool_size(
    height: int, width: int, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> Pair:
    """``(out_height, out_width)`` of a pooled image.

    Raises:
        ValueError: for parameters out of range and images that no window fits.
    """
    return (
        _axis_size("height", height, kernel_size[0], stride[0], padding[0], dilation[0], ceil_mode),
        _axis_size("width", width, kernel_size[1], stride[1], padding[1], dilation[1], ceil_mode),
    )


@lru_cache(maxsize=256)
def _output_layout(
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of the output for an input's shape; kept, for they take as long to work out as a tiny image."""
    check_image(shape)
    *leading, height, width = shape
    pooled = torch.empty(
        (*leading, *pool_size(height, width, kernel_size, stride, padding, dilation, ceil_mode)),
        dtype=torch.uint8,
        device="meta",
        memory_format=memory_format,
    )
    return tuple(pooled.shape), pooled.stride()


def _image_format(input: Tensor) -> torch.memory_format:
    """The format of torch's output."""
    return torch.channels_last if prefers_channels_last(input) else torch.contiguous_format


def _dense_image(input: Tensor, memory_format: torch.memory_format) -> Tensor:
    if input.is_contiguous(memory_format=memory_format) and not input.is_neg():
        return input
    return input.resolve_neg().contiguous(memory_format=memory_format)


def check_image(shape: Sequence[int]) -> None:
    if len(shape) not in (3, 4) or shape[-3] == 0:
        raise ValueError(
            "input: expected non-empty images of shape (channels, height, width) or (batch, channels, "
            f"height, width), got {tuple(shape)}"
        )


def max_pool2d_forward(
    input: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    winners_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """The output, and the winners as bytes (uint8) or indices (int64) or not at all."""
    memory_format = _image_format(input)
    shape, strides = _output_layout(input.shape, memory_format, kernel_size, stride, padding, dilation, ceil_mode)
    output = input.new_empty_strided(shape, strides)
    winners = None if winners_dtype is None else torch.empty_like(output, dtype=winners_dtype)
    _C.max_pool2d_forward(output, winners, _dense_image(input, memory_format), kernel_size, stride, padding, dilation)
    return output, winners


def max_pool2d_backward(
    grad_output: Tensor,
    input: Tensor,
    winners: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    memory_format = _image_format(input)
    grad_input = torch.empty_like(input, memory_format=memory_format)
    grad_output = _dense_image(grad_output, memory_format)
    _C.max_pool2d_backward(grad_input, grad_output, winners, kernel_size, stride, padding, dilation)
    return grad_input


def winners_dtype(kernel_size: Pair, return_indices: bool) -> torch.dtype:
    return torch.int64 if return_indices or kernel_size[0] * kernel_size[1] > MAX_BYTE_TAPS else torch.uint8


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, *ctx.window, ctx.ceil_mode, _ = inputs
    winners = output[1]
    ctx.mark_non_differentiable(winners)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, winners)


def _backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 7
    input, winners = ctx.saved_tensors
    if goes_through_op(grad_output):
        grad_input = max_pool2d_backward_op(grad_output, input, winners, *ctx.window)
    elif goes_through_torch(grad_output):
        arguments = (*ctx.window, ctx.ceil_mode)
        (grad_input,) = differentiable_backward(
            lambda x: reference.max_pool2d(x, *arguments), (input,), (True,), grad_output
        )
    else:
        grad_input = max_pool2d_backward(grad_output, input, winners, *ctx.window)
    return grad_input, None, None, None, None, None, None


class MaxPool2dFunction(KernelFunction):
    """Returns ``(output, indices)`` with return_indices, else the output alone."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        ceil_mode: bool,
        return_indices: bool,
    ) -> Any:
        output, winners = max_pool2d_forward(
            input,
            kernel_size,
            stride,
            padding,
            dilation,
            ceil_mode,
            winners_dtype(kernel_size, return_indices),
        )
        ctx.window = kernel_size, stride, padding, dilation
        ctx.ceil_mode = ceil_mode
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, winners)
        if not return_indices:
            return output
        ctx.mark_non_differentiable(winners)
        return output, winners

    backward = staticmethod(_backward)


def _max_pool2d(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    return_indices: bool,
) -> tuple[Tensor, Tensor]:
    window = (tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation))
    return max_pool2d_forward(input, *window, ceil_mode, winners_dtype(window[0], return_indices))  # type: ignore


def _max_pool2d_fake(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    return_indices: bool,
) -> tuple[Tensor, Tensor]:
    check_image(input.shape)
    *leading, height, width = input.shape
    shape = (*leading, *pool_size(height, width, kernel_size, stride, padding, dilation, ceil_mode))  # type: ignore
    output = input.new_empty(shape).contiguous(memory_format=_image_format(input))
    return output, torch.empty_like(output, dtype=winners_dtype(kernel_size, return_indices))  # type: ignore


_WINDOW = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation"

max_pool2d_op = define_op(
    f"max_pool2d(Tensor input, {_WINDOW}, bool ceil_mode, bool return_indices) -> (Tensor, Tensor)",
    _max_pool2d,
    _max_pool2d_fake,
    backward=_backward,
    setup_context=_save,
)

max_pool2d_backward_op = define_op(
    f"max_pool2d_backward(Tensor grad_output, Tensor input, Tensor winners, {_WINDOW}) -> Tensor",
    max_pool2d_backward,
    lambda grad_output, input, winners, kernel_size, stride, padding, dilation: torch.empty_like(
        input, memory_format=_image_format(input)
    ),
)
