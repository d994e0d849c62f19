"""The operators as functions: torch.nn.functional's names, signatures and results, on fastnn's kernels.

Dense tensors in any memory layout run on the kernels: float32 and float64 on the CPU, and bfloat16 and float16 too on
CUDA, where float32 products follow torch's switches for tf32. Everything else - other dtypes and devices, autocast,
torch.func transforms, jit tracing - runs on torch's own operators with the same result;
:func:`fastnn.explain_dispatch` tells which it was. Results have the memory format that torch's have.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnn import reference
from fastnn.arguments import FUSED_POOL, Pair, pair, pool_arguments, pools_in_registers, wants_relu
from fastnn.autograd.common import in_autocast_dtype, needs_grad, route
from fastnn.autograd.conv2d import Conv2dFunction, Geometry, conv2d_forward, conv2d_op, kernels_can_count
from fastnn.autograd.cross_entropy import (
    REDUCTIONS,
    CrossEntropyFunction,
    cross_entropy_forward,
    cross_entropy_op,
)
from fastnn.autograd.linear import LinearFunction, linear_forward, linear_op
from fastnn.autograd.max_pool2d import MaxPool2dFunction, max_pool2d_forward, max_pool2d_op
from fastnn.autograd.mse_loss import MseLossFunction, mse_loss_forward, mse_loss_op
from fastnn.autograd.nll_loss import NllLossFunction, nll_loss_forward, nll_loss_op
from fastnn.autograd.relu import ReluFunction, ReluInplaceFunction, relu_forward, relu_inplace, relu_op
from fastnn.autograd.softmax import SoftmaxOperator, log_softmax_operator, softmax_operator
from fastnn.runtime import note_fallback

__all__ = [
    "conv2d",
    "cross_entropy",
    "linear",
    "log_softmax",
    "max_pool2d",
    "mse_loss",
    "nll_loss",
    "relu",
    "softmax",
]


for _name in __all__:  # a graph of torch.fx holds them as they are
    torch.fx.wrap(_name)


def _missing(name: str) -> TypeError:
    return TypeError(f"{name}: expected a torch.Tensor, got None")


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
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
    relu = wants_relu(activation)
    if weight is None:
        raise _missing("weight")
    way = route("linear", input, weight, bias)
    try:
        if way == "record":
            return LinearFunction.run(input, weight, bias, relu)
        if way == "kernel":
            return linear_forward(input, weight, bias, relu)
    except ValueError as error:
        try:
            output = reference.linear(input, weight, bias, activation=activation)
        except RuntimeError:
            raise error from None
        note_fallback("linear", "a weight of one dimension or a bias that torch expands")
        return output
    if way == "cast":
        return in_autocast_dtype("linear", linear, input, weight, bias, activation=activation)
    if way == "op":
        return linear_op(input, weight, bias, relu)
    return reference.linear(input, weight, bias, activation=activation)


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

    3x3 and 5x5 convolutions of stride 1 with at least 16 channels use Winograd's F(4x4, 3x3), F(2x2, 3x3) and
    F(2x2, 5x5) in float32 (Lavin and Gray, 2015) where that takes fewer multiplications, the weights' transformation
    counted in; 3x3 with fewer channels F(1x4, 3x3) in the forward pass. Their rounding is larger than a direct sum's
    (docs/performance.md states the bounds).

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
        window = max_pool if isinstance(max_pool, tuple) else (max_pool,)
        if max_pool is not None: output = torch.nn.functional.max_pool2d(output, *window)
    """
    relu = wants_relu(activation)
    pool = pool_arguments(max_pool)
    if weight is None:
        raise _missing("weight")
    way = route("conv2d", input, weight, bias)
    if way == "cast":
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return in_autocast_dtype(
            "conv2d", conv2d, input, weight, bias, **options, activation=activation, max_pool=max_pool
        )
    if way == "torch":
        return reference.conv2d(
            input, weight, bias, stride, padding, dilation, groups, activation=activation, max_pool=max_pool
        )
    if input.dim() == 3:
        output = conv2d(
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
        return output if pool is None else output.contiguous()  # as torch pools (channels, height, width)
    stride, dilation = pair("stride", stride), pair("dilation", dilation)
    if isinstance(padding, str):
        input, padding = _resolve_padding(input, weight, stride, padding, dilation)
    geometry = Geometry(stride, pair("padding", padding), dilation, groups)
    if way != "op" and not kernels_can_count(input, weight, geometry):
        note_fallback("conv2d", "images of 2^31 values")
        return reference.conv2d(input, weight, bias, *geometry, activation=activation, max_pool=max_pool)
    fused = pool == FUSED_POOL and _leaves_a_window(input, weight, geometry) and pools_in_registers(weight, groups)
    if way == "op":
        output = conv2d_op(input, weight, bias, *geometry, relu, fused)[0]
    elif way == "record":
        output = Conv2dFunction.run(input, weight, bias, *geometry, relu, fused)
    else:
        output = conv2d_forward(input, weight, bias, geometry, relu, fused, with_winner=False)[0]
    if pool is None or fused:
        return output
    return max_pool2d(output, *pool)


def _resolve_padding(input: Tensor, weight: Tensor, stride: Pair, padding: str, dilation: Pair) -> tuple[Tensor, Pair]:
    """Numbers for ``"valid"`` and ``"same"``; the odd element of an uneven padding goes to the end, as in torch."""
    if padding == "valid":
        return input, (0, 0)
    if weight.dim() != 4:  # not a convolution: the binding says in what way
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
    if input.dim() != 4 or weight.dim() != 4:
        return False
    _, _, height, width = input.shape
    _, _, kernel_height, kernel_width = weight.shape
    stride, padding, dilation, _ = geometry
    return (
        height + 2 * padding[0] - dilation[0] * (kernel_height - 1) > stride[0]
        and width + 2 * padding[1] - dilation[1] * (kernel_width - 1) > stride[1]
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
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"ceil_mode: expected a bool, got {ceil_mode!r}")
    kernel = pair("kernel_size", kernel_size)
    window = (
        kernel,
        kernel if stride is None or (isinstance(stride, (tuple, list)) and not stride) else pair("stride", stride),
        pair("padding", padding),
        pair("dilation", dilation),
    )
    if way == "op":
        output, winners = max_pool2d_op(input, *window, ceil_mode, return_indices)
        return (output, winners) if return_indices else output
    if way == "record":
        return MaxPool2dFunction.run(input, *window, ceil_mode, return_indices)
    output, winners = max_pool2d_forward(input, *window, ceil_mode, torch.int64 if return_indices else None)
    return (output, winners) if return_indices else output


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``max(input, 0)`` elementwise; NaN stays NaN, and the gradient at 0 is 0.

    Args:
        input: any shape.
        inplace: whether to overwrite ``input`` and return it.

    Returns:
        The shape and strides of ``input``.

    Raises:
        RuntimeError: where a leaf that requires a gradient would be overwritten.
        TypeError: where ``input`` is no tensor.

    Equivalent to::

        torch.nn.functional.relu(input, inplace)
    """
    way = route("relu", input)
    if way == "torch":
        return reference.relu(input, inplace)
    if inplace:
        return _relu_inplace(input, way)
    if way == "op":
        return relu_op(input)
    if way == "record":
        return ReluFunction.run(input)
    return relu_forward(input)


def _relu_inplace(input: Tensor, way: str) -> Tensor:
    if way == "op":
        return input.copy_(relu_op(input))
    if way == "record":
        leaf = input if input.is_leaf else input._base
        if leaf is not None and leaf.is_leaf and leaf.requires_grad:
            view = "" if leaf is input else "view of a "
            raise RuntimeError(f"a {view}leaf Variable that requires grad is being used in an in-place operation.")
        return ReluInplaceFunction.run(input)
    counted = not input.is_inference()
    if not counted and not torch.is_inference_mode_enabled():
        return reference.relu(input, inplace=True)  # which says why not
    relu_inplace(input)
    if counted:
        torch.autograd.graph.increment_version(input)
    return input


def _along_dim(
    operator: SoftmaxOperator,
    name: str,
    input: Tensor,
    dim: int | None,
    stacklevel: int,
    dtype: torch.dtype | None,
) -> Tensor:
    if dim is None:
        dim = torch.nn.functional._get_softmax_dim(  # type: ignore[attr-defined]
            name, input.dim(), stacklevel + 1
        )
    if isinstance(dim, bool):
        raise TypeError(f"dim: expected an int, got {dim}")
    if dtype is not None:
        input = input.to(dtype=dtype)
    way = route(name, input)
    if way == "torch":
        return operator.reference(input, dim)
    if way == "cast":
        return in_autocast_dtype(name, softmax if name == "softmax" else log_softmax, input, dim=dim)
    dims = input.dim() or 1
    if not -dims <= dim < dims:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-dims}, {dims - 1}], but got {dim})")
    if input.dim() == 0:
        return _along_dim(operator, name, input.reshape(1), 0, stacklevel, None).reshape(())
    if dim < 0:
        dim += dims
    if way == "op":
        return operator.op(input, dim)
    if way == "record":
        return operator.function.run(input, dim)
    return operator.forward(input, dim)


def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """``exp(input_i) / sum_j exp(input_j)`` along a dimension, the largest element subtracted first.

    Args:
        input: any shape.
        dim: the dimension along which the result sums to 1; None is deprecated, as in torch.
        dtype: to which ``input`` is cast first.

    Returns:
        The shape of ``input``.

    Raises:
        IndexError: where ``dim`` is out of range.
        TypeError: where ``input`` is no tensor.

    Equivalent to::

        torch.nn.functional.softmax(input, dim, dtype=dtype)
    """
    return _along_dim(softmax_operator, "softmax", input, dim, _stacklevel, dtype)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """``log(softmax(input))`` along a dimension, without the rounding of a tiny softmax.

    Arguments, result and errors are those of :func:`softmax`.

    Equivalent to::

        torch.nn.functional.log_softmax(input, dim, dtype=dtype)
    """
    return _along_dim(log_softmax_operator, "log_softmax", input, dim, _stacklevel, dtype)


def _reduction_number(size_average: bool | None, reduce: bool | None, reduction: str) -> int:
    """torch's number of a reduction, the deprecated arguments having the last word."""
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    if reduction in REDUCTIONS:
        return REDUCTIONS.index(reduction)
    return torch.nn._reduction.get_enum(reduction)


def _requires_weight_grad(operator: str, weight: Tensor) -> bool:
    """Whether torch must run the loss because its weights are differentiated, which no kernel does."""
    if not needs_grad(weight):
        return False
    note_fallback(operator, "the gradient of weight")
    return True


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of logits against classes, softmax and loss in one pass.

    Args:
        input: logits, ``(batch, classes, ...)`` or ``(classes,)``.
        target: int64 class numbers, the shape of ``input`` without its classes; or the probability of each
            class, the shape and dtype of ``input``.
        weight: ``(classes,)``, the weight of each class, or None for ones.
        size_average, reduce: deprecated in torch; see ``reduction``.
        ignore_index: target of samples that do not count; class numbers alone.
        reduction: ``"none"``, ``"sum"``, or ``"mean"``: the sum divided by the weights of the samples'
            classes, or by the number of samples where targets are probabilities.
        label_smoothing: how much of each target, from 0 to 1, is spread evenly over the classes.

    Returns:
        A scalar; with ``"none"`` the shape of ``input`` without its classes.

    Raises:
        IndexError: where a target is no class and not ``ignore_index``.
        ValueError, TypeError: for shapes, dtypes and options that do not fit; names what was expected and
            what came.

    Equivalent to::

        torch.nn.functional.cross_entropy(input, target, weight, ignore_index=ignore_index,
                                          reduction=reduction, label_smoothing=label_smoothing)
    """
    number = _reduction_number(size_average, reduce, reduction)
    if target is None:
        raise _missing("target")
    integral = getattr(target, "dtype", None) in _CLASS_DTYPES
    way = route("cross_entropy", input, weight, None if integral else target)
    if way == "torch" or (weight is not None and _requires_weight_grad("cross_entropy", weight)):
        return reference.cross_entropy(
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=REDUCTIONS[number],
            label_smoothing=label_smoothing,
        )
    if way == "cast":
        options = {"ignore_index": ignore_index, "reduction": REDUCTIONS[number], "label_smoothing": label_smoothing}
        return in_autocast_dtype("cross_entropy", cross_entropy, input, target, weight, **options)
    target = _class_numbers(target, input)
    if way == "op":
        if input.is_meta and not target.is_meta:
            raise ValueError(f"target: expected a tensor on meta as input, got one on {target.device}")
        return cross_entropy_op(input, target, weight, ignore_index, number, label_smoothing)[0]
    if way == "record":
        return CrossEntropyFunction.run(input, target, weight, ignore_index, number, label_smoothing)
    return cross_entropy_forward(input, target, weight, ignore_index, number, label_smoothing, keep=False)[0]


# Of class numbers, as in torch.
_CLASS_DTYPES = (torch.int64, torch.uint8)


def _class_numbers(target: Tensor, input: Tensor) -> Tensor:
    """The target as kernels take it. torch has uint8 as well, and for the classes of one sample a vector of one."""
    if target.dtype is torch.uint8:
        target = target.long()
    if input.dim() == 1 and target.dtype is torch.int64 and target.shape == (1,):
        target = target.reshape(())
    return target


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood: ``-weight[target] * input[target]`` of each sample.

    Args:
        input: log-probabilities, ``(batch, classes, ...)`` or ``(classes,)``.
        target: int64 class numbers, the shape of ``input`` without its classes.
        weight: ``(classes,)``, the weight of each class, or None for ones.
        size_average, reduce: deprecated in torch; see ``reduction``.
        ignore_index: target of samples that do not count.
        reduction: ``"none"``, ``"sum"``, or ``"mean"``: the sum divided by the weights of the samples'
            classes.

    Returns:
        A scalar; with ``"none"`` the shape of ``input`` without its classes.

    Raises:
        IndexError: where a target is no class and not ``ignore_index``.
        ValueError, TypeError: for shapes and dtypes that do not fit; names what was expected and what
            came.

    Equivalent to::

        torch.nn.functional.nll_loss(input, target, weight, ignore_index=ignore_index, reduction=reduction)
    """
    number = _reduction_number(size_average, reduce, reduction)
    way = route("nll_loss", input, weight)
    if way == "torch" or (weight is not None and _requires_weight_grad("nll_loss", weight)):
        return reference.nll_loss(input, target, weight, ignore_index=ignore_index, reduction=REDUCTIONS[number])
    if way != "op" and not isinstance(target, Tensor):
        raise TypeError(f"target: expected a torch.Tensor, got {type(target).__name__}")
    if way == "cast":
        options = {"ignore_index": ignore_index, "reduction": REDUCTIONS[number]}
        return in_autocast_dtype("nll_loss", nll_loss, input, target, weight, **options)
    target = _class_numbers(target, input)
    if way == "op":
        if input.is_meta and not target.is_meta:
            raise ValueError(f"target: expected a tensor on meta as input, got one on {target.device}")
        return nll_loss_op(input, target, weight, ignore_index, number)[0]
    if way == "record":
        return NllLossFunction.run(input, target, weight, ignore_index, number)
    return nll_loss_forward(input, target, weight, ignore_index, number)[0]


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Squared error ``weight * (input - target)^2`` of each element.

    Args:
        input: any shape.
        target: the shape of ``input``; others broadcast with a warning, as in torch.
        size_average, reduce: deprecated in torch; see ``reduction``.
        reduction: ``"none"``, ``"sum"``, or ``"mean"``: the sum divided by the sum of weights.
        weight: the shape of ``input``, or None for ones.

    Returns:
        A scalar; with ``"none"`` the shape of ``input``.

    Raises:
        ValueError, RuntimeError: for shapes and options that do not fit.
        TypeError: where an argument is no tensor.

    Equivalent to::

        torch.nn.functional.mse_loss(input, target, reduction=reduction, weight=weight)
    """
    number = _reduction_number(size_average, reduce, reduction)
    if target is None:
        raise _missing("target")
    way = route("mse_loss", input, target, weight)
    if way == "torch" or (weight is not None and _requires_weight_grad("mse_loss", weight)):
        return reference.mse_loss(input, target, reduction=REDUCTIONS[number], weight=weight)
    if way == "cast":
        name = REDUCTIONS[number]
        return in_autocast_dtype(
            "mse_loss", lambda x, t, w: mse_loss(x, t, reduction=name, weight=w), input, target, weight
        )
    if weight is not None and weight.shape != input.shape:
        raise ValueError(f"weight: expected the shape of input, {tuple(input.shape)}, got {tuple(weight.shape)}")
    if target.shape != input.shape:
        return _broadcast_mse_loss(input, target, number, weight)
    if way == "op":
        return mse_loss_op(input, target, weight, number)[0]
    if way == "record":
        return MseLossFunction.run(input, target, weight, number)
    return mse_loss_forward(input, target, weight, number)[0]


def _broadcast_mse_loss(input: Tensor, target: Tensor, number: int, weight: Tensor | None) -> Tensor:
    warnings.warn(
        f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
        "This will likely lead to incorrect results due to broadcasting. "
        "Please ensure they have the same size.",
        stacklevel=3,
    )
    wide_input, wide_target = torch.broadcast_tensors(input, target)
    if weight is None:
        return mse_loss(wide_input, wide_target, reduction=REDUCTIONS[number])
    wide_weight = weight.expand(wide_input.shape)
    if REDUCTIONS[number] != "mean":
        return mse_loss(wide_input, wide_target, reduction=REDUCTIONS[number], weight=wide_weight)
    # The mean divides by the weights as they came, each counted once.
    return mse_loss(wide_input, wide_target, reduction="sum", weight=wide_weight) / weight.sum()
