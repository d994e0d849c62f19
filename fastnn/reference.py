"""Every fastnn operator in plain, differentiable PyTorch.

This module defines what the kernels compute. It is the oracle of the tests (run in float64), the baseline of
the benchmarks, and the formula used where a kernel cannot be: inside ``create_graph=True`` backward passes
and torch.func transforms. The functions have the names, signatures and defaults of :mod:`fastnn.functional`,
work on every dtype and device that torch supports, and can be differentiated any number of times.

The optimizer steps are single-tensor and functional: they take the old values and return the new ones, so a
test can run them in float64 beside a fused float32 update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "AdamState",
    "SGDState",
    "adam_step",
    "adamw_step",
    "conv2d",
    "cross_entropy",
    "linear",
    "log_softmax",
    "max_pool2d",
    "mse_loss",
    "nll_loss",
    "relu",
    "sgd_step",
    "softmax",
]

Size2 = int | tuple[int, int]
Pool = Size2 | tuple[Size2, Size2, Size2] | None


def _activate(output: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return output
    if activation == "relu":
        return F.relu(output)
    raise ValueError(f'activation: expected None or "relu", got {activation!r}')


def _pool_arguments(max_pool: Pool) -> tuple[Any, Any, Any]:
    """``(kernel_size, stride, padding)`` from the short forms of ``max_pool``."""
    if isinstance(max_pool, int):
        return max_pool, max_pool, 0
    if isinstance(max_pool, (tuple, list)) and len(max_pool) == 3:
        kernel_size, stride, padding = max_pool
        return kernel_size, stride, padding
    raise ValueError(f"max_pool: expected None, an int or (kernel_size, stride, padding), got {max_pool!r}")


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """``output[..., o] = act(sum_i input[..., i] * weight[o, i] + bias[o])``.

    Shapes: input ``(..., in_features)``, weight ``(out_features, in_features)``, bias ``(out_features,)``,
    output ``(..., out_features)``.
    """
    return _activate(F.linear(input, weight, bias), activation)


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
    max_pool: Pool = None,
) -> Tensor:
    """``output = pool(act(conv(input, weight) + bias))``, the convolution being a cross-correlation.

    ``conv[n, o, y, x] = sum_{c, i, j} input[n, g + c, row, column] * weight[o, c, i, j]`` where ``row =
    y*stride + i*dilation - padding``, ``column`` is built from ``x`` and ``j`` as ``row`` is from ``y`` and
    ``i``, ``g`` is the first input channel of ``o``'s group and the input is zero outside the image.

    Shapes: input ``(batch, in_channels, height, width)`` or without batch, weight ``(out_channels,
    in_channels / groups, kernel_height, kernel_width)``, bias ``(out_channels,)``.
    """
    output = _activate(F.conv2d(input, weight, bias, stride, padding, dilation, groups), activation)
    if max_pool is None:
        return output
    kernel_size, pool_stride, pool_padding = _pool_arguments(max_pool)
    return F.max_pool2d(output, kernel_size, pool_stride, pool_padding)


def max_pool2d(
    input: Tensor,
    kernel_size: Size2,
    stride: Size2 | None = None,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """``output[n, c, y, x] = max_{i, j} input[n, c, y*stride + i*dilation - padding, column]``.

    The column is built from ``x`` and ``j`` as the row is from ``y`` and ``i``; outside the image lies -inf.
    NaN is larger than every number; among equal values the first in row-major order wins, and it alone
    receives the gradient. With ``return_indices`` the result is ``(output, indices)``, an index being ``row *
    width + column``.
    """
    # torch's stubs know return_indices as a literal only.
    max_pool: Any = F.max_pool2d
    return max_pool(input, kernel_size, stride, padding, dilation, ceil_mode=ceil_mode, return_indices=return_indices)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``output = max(input, 0)``; NaN stays NaN; the gradient at 0 is 0."""
    return F.relu(input, inplace)


def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """``output_i = exp(input_i - max) / sum_j exp(input_j - max)`` along ``dim``."""
    return F.softmax(input, dim, _stacklevel + 1, dtype)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """``output_i = (input_i - max) - log(sum_j exp(input_j - max))`` along ``dim``."""
    return F.log_softmax(input, dim, _stacklevel + 1, dtype)


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
    """``loss = -sum_c q_c * weight_c * log_softmax(input)_c`` per sample, then reduced.

    ``q = (1 - label_smoothing) * target + label_smoothing / classes``, the target being one-hot when it holds
    class indices. ``"mean"`` divides by ``sum weight[target]`` over the samples that are not ignored when the
    target holds indices, and by the number of samples when it holds probabilities.
    """
    return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``loss = -weight[target] * input[target]`` per sample; ``"mean"`` divides by ``sum weight[target]``."""
    return F.nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction)


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """``loss = weight * (input - target)^2`` elementwise; ``"mean"`` divides by ``sum weight`` (the count
    without)."""
    # torch's stubs do not know weight yet.
    loss: Any = F.mse_loss
    result: Tensor = loss(input, target, size_average, reduce, reduction, weight)
    return result


class SGDState(NamedTuple):
    """What :func:`sgd_step` returns. ``momentum_buffer`` is None as long as momentum is 0."""

    parameter: Tensor
    momentum_buffer: Tensor | None


class AdamState(NamedTuple):
    """What :func:`adam_step` and :func:`adamw_step` return. ``max_exp_avg_sq`` is None without amsgrad."""

    parameter: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None


def sgd_step(
    parameter: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    lr: float | Tensor = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> SGDState:
    """One step of torch.optim.SGD.

    ``d = ±grad + weight_decay * parameter``; the buffer starts as ``d`` and becomes ``momentum * buffer + (1
    - dampening) * d``; then ``parameter -= lr * (d + momentum * buffer)`` with Nesterov and ``lr * buffer``
    without.
    """
    direction = -grad if maximize else grad
    direction = direction + weight_decay * parameter
    if momentum != 0:
        if momentum_buffer is None:
            momentum_buffer = direction.clone()
        else:
            momentum_buffer = momentum * momentum_buffer + (1 - dampening) * direction
        direction = direction + momentum * momentum_buffer if nesterov else momentum_buffer
    return SGDState(parameter - lr * direction, momentum_buffer)


def _adam(
    parameter: Tensor,
    direction: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    step: int,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    amsgrad: bool,
) -> AdamState:
    beta1, beta2 = betas
    exp_avg = beta1 * exp_avg + (1 - beta1) * direction
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * direction * direction
    second_moment = exp_avg_sq
    if amsgrad:
        # The maximum is taken over the moments before their bias correction, as torch does.
        max_exp_avg_sq = exp_avg_sq if max_exp_avg_sq is None else torch.maximum(max_exp_avg_sq, exp_avg_sq)
        second_moment = max_exp_avg_sq
    denominator = (second_moment / (1 - beta2**step)).sqrt() + eps
    parameter = parameter - lr * (exp_avg / (1 - beta1**step)) / denominator
    return AdamState(parameter, exp_avg, exp_avg_sq, max_exp_avg_sq if amsgrad else None)


def adam_step(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    *,
    step: int,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
) -> AdamState:
    """One step of torch.optim.Adam; ``step`` counts from 1.

    ``d = ±grad + weight_decay * parameter``; ``m = beta1 m + (1 - beta1) d``; ``v = beta2 v + (1 - beta2)
    d^2``; ``parameter -= lr * (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)``. With amsgrad the
    largest ``v`` so far stands in for ``v``.
    """
    direction = (-grad if maximize else grad) + weight_decay * parameter
    return _adam(parameter, direction, exp_avg, exp_avg_sq, max_exp_avg_sq, step, lr, betas, eps, amsgrad)


def adamw_step(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    *,
    step: int,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
) -> AdamState:
    """One step of torch.optim.AdamW: Adam, but the decay ``parameter *= 1 - lr * weight_decay`` comes first
    and stays out of the moments."""
    parameter = parameter * (1 - lr * weight_decay)
    direction = -grad if maximize else grad
    return _adam(parameter, direction, exp_avg, exp_avg_sq, max_exp_avg_sq, step, lr, betas, eps, amsgrad)
