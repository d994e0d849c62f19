"""The operators as functions: torch.nn.functional's names, signatures and results, on fastnn's kernels.

Dense CPU tensors of float32 and float64, in any memory layout, run on the kernels. Everything else - other
dtypes and devices, autocast, torch.func transforms, jit tracing - runs on torch's own operators with the same
result; :func:`fastnn.explain_dispatch` tells which it was. Results have the memory format that torch's have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnn import reference
from fastnn.autograd.common import needs_grad, route
from fastnn.autograd.conv2d import Conv2dFunction, Geometry, Pair, conv2d_forward, conv2d_op
from fastnn.autograd.linear import LinearFunction, linear_forward, linear_op
from fastnn.autograd.max_pool2d import MaxPool2dFunction, max_pool2d_forward, max_pool2d_op

__all__ = ["conv2d", "linear", "max_pool2d"]


def _wants_relu(activation: str | None) -> bool:
    if activation is None:
        return False
    if activation == "relu":
        return True
    raise ValueError(f'activation: expected None or "relu", got {activation!r}')


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """Affine map ``input @ weight.T + bias``, with an optional ReLU in the same pass.

    Args:
        input: ``(*, in_features)``, any number of leading dimensions.
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)`` or None.
        activation: None or ``"relu"``.

    Returns:
        ``(*, out_features)``.

    Raises:
        ValueError: for shapes that do not fit or an unknown activation; names what was expected and what came.
        TypeError: where an argument is no tensor.

    Equivalent to::

        output = torch.nn.functional.linear(input, weight, bias)
        if activation == "relu": output = torch.relu(output)
    """
    relu = _wants_relu(activation)
    way = route("linear", input, weight, bias)
    if way == "kernel":
        if needs_grad(input, weight, bias):
            return LinearFunction.apply(input, weight, bias, relu)
        return linear_forward(input, weight, bias, relu)
    if way == "op":
        return linear_op(input, weight, bias, relu)
    return reference.linear(input, weight, bias, activation=activation)


def _pair(name: str, value: int | Sequence[int]) -> Pair:
    """(height, width) of an argument that takes one number for both."""
    if isinstance(value, (int, torch.SymInt)):
        return value, value
    if isinstance(value, (tuple, list)) and all(isinstance(v, (int, torch.SymInt)) for v in value):
        if len(value) == 2:
            return value[0], value[1]
        if len(value) == 1:
            return value[0], value[0]
    raise ValueError(f"{name}: expected an int or a pair of ints, got {value!r}")


def _pool_arguments(max_pool: Any) -> tuple[Pair, Pair, Pair] | None:
    """(kernel_size, stride, padding) from the forms that ``max_pool=`` takes."""
    if max_pool is None:
        return None
    if isinstance(max_pool, int):
        max_pool = (max_pool, max_pool, 0)
    if not isinstance(max_pool, (tuple, list)) or len(max_pool) != 3:
        raise ValueError(
            f"max_pool: expected None, an int or (kernel_size, stride, padding), got {max_pool!r}"
        )
    kernel_size, stride, padding = max_pool
    kernel_size = _pair("max_pool", kernel_size)
    if min(kernel_size) < 1:
        raise ValueError(f"max_pool: expected a kernel_size of at least 1, got {kernel_size}")
    return (
        kernel_size,
        kernel_size if stride is None else _pair("max_pool", stride),
        _pair("max_pool", padding),
    )


_FUSED_POOL = ((2, 2), (2, 2), (0, 0))


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    max_pool: Any = None,
) -> Tensor:
    """2-D convolution (cross-correlation), with an optional ReLU and max-pooling in the same pass.

    3x3 convolutions of stride 1 with at least 16 channels use Winograd's F(2x2, 3x3) in float32 (Lavin and Gray,
    2015), whose rounding differs from a direct sum's by a few units in the last place.

    Args:
        input: ``(batch, in_channels, height, width)`` or ``(in_channels, height, width)``.
        weight: ``(out_channels, in_channels / groups, kernel_height, kernel_width)``.
        bias: ``(out_channels,)`` or None.
        stride, dilation: a number or (height, width), at least 1.
        padding: a number or (height, width) of zeros on each side, ``"valid"`` (none) or ``"same"`` (stride 1 only).
        groups: divides in_channels and out_channels.
        activation: None or ``"relu"``, applied before pooling.
        max_pool: None, a window size (its stride the same), or ``(kernel_size, stride, padding)`` of numbers or
            pairs. 2x2 windows of stride 2 are fused into the convolution; others run as a second kernel.

    Returns:
        ``(batch, out_channels, out_height, out_width)``, in channels_last where input or weight is, as in torch.

    Raises:
        ValueError: for shapes or arguments that do not fit; names what was expected and what came.
        TypeError: where an argument is no tensor.

    Equivalent to::

        output = torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)
        if activation == "relu": output = torch.relu(output)
        if max_pool is not None: output = torch.nn.functional.max_pool2d(output, max_pool)
    """
    relu = _wants_relu(activation)
    pool = _pool_arguments(max_pool)
    way = route("conv2d", input, weight, bias)
    if way == "torch":
        return reference.conv2d(
            input, weight, bias, stride, padding, dilation, groups, activation=activation, max_pool=max_pool
        )
    if input.dim() == 3:
        return conv2d(
            input.unsqueeze(0),
            weight,
            bias,
            stride,
            padding,
            dilation,
            groups,
            activation=activation,
            max_pool=max_pool,
        ).squeeze(0)
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    if isinstance(padding, str):
        input, padding = _resolve_padding(input, weight, stride, padding, dilation)
    geometry = Geometry(stride, _pair("padding", padding), dilation, groups)
    # Depthwise kernels keep channels in vectors and have no window in registers to pool.
    fused = (
        pool == _FUSED_POOL
        and (groups == 1 or groups != weight.shape[0])
        and _leaves_a_window(input, weight, geometry)
    )
    if way == "op":
        output = conv2d_op(input, weight, bias, *geometry, relu, fused)[0]
    elif needs_grad(input, weight, bias):
        output = Conv2dFunction.apply(input, weight, bias, *geometry, relu, fused)
    else:
        output = conv2d_forward(input, weight, bias, geometry, relu, fused)[0]
    if pool is None or fused:
        return output
    return max_pool2d(output, *pool)


def _resolve_padding(
    input: Tensor, weight: Tensor, stride: Pair, padding: str, dilation: Pair
) -> tuple[Tensor, Pair]:
    """Numbers for ``"valid"`` and ``"same"``; the odd element of an uneven padding goes to the end, as in torch."""
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise ValueError(f'padding: expected "same", "valid", an int or a pair of ints, got {padding!r}')
    if stride != (1, 1):
        raise ValueError(f'stride: expected 1 with padding="same", got {stride}')
    total = [dilation[d] * (weight.shape[2 + d] - 1) for d in range(2)]
    if total[0] % 2 or total[1] % 2:
        input = torch.nn.functional.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    return input, (total[0] // 2, total[1] // 2)


def _leaves_a_window(input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether the convolution's output holds at least one 2x2 window."""
    return (
        input.dim() == 4
        and weight.dim() == 4
        and all(
            input.shape[2 + d] + 2 * geometry.padding[d] - geometry.dilation[d] * (weight.shape[2 + d] - 1)
            > geometry.stride[d]
            for d in range(2)
        )
    )


def max_pool2d(
    input: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The maximum of each window of an image.

    NaN is larger than every number; among equal values the first in row-major order wins, and it alone
    receives the gradient. Outside the image lies -inf. Channels-last images are pooled as they lie.

    Args:
        input: ``(batch, channels, height, width)`` or ``(channels, height, width)``.
        kernel_size: window size, a number or ``(vertical, horizontal)``, as all sizes here.
        stride: step from window to window; None for ``kernel_size``.
        padding: rows and columns around the image, at most half of the window.
        dilation: step between the elements of a window.
        ceil_mode: whether a last window that the image fills only in part counts.
        return_indices: whether to return int64 indices into the plane, ``row * width + column``, too.

    Returns:
        ``(batch, channels, out_height, out_width)``, in the memory format of the input; with
        ``return_indices`` the pair ``(output, indices)``.

    Raises:
        ValueError: for shapes and parameters that do not fit; names what was expected and what came.
        TypeError: where ``input`` is no tensor.

    Equivalent to::

        torch.nn.functional.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode=ceil_mode,
                                       return_indices=return_indices)
    """
    way = route("max_pool2d", input)
    if way == "torch":
        return reference.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    kernel = _pair("kernel_size", kernel_size)
    window = (
        kernel,
        kernel if stride is None else _pair("stride", stride),
        _pair("padding", padding),
        _pair("dilation", dilation),
    )
    if way == "op":
        output, winners = max_pool2d_op(input, *window, ceil_mode, return_indices)
        return (output, winners) if return_indices else output
    if needs_grad(input):
        return MaxPool2dFunction.apply(input, *window, ceil_mode, return_indices)
    output, winners = max_pool2d_forward(input, *window, ceil_mode, torch.int64 if return_indices else None)
    return (output, winners) if return_indices else output
