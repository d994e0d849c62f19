"""Layers: torch.nn's classes with ``forward`` on fastnn's kernels.

Each subclasses its torch namesake, so parameters, ``state_dict`` keys, initialisation, repr and pickling are
torch's own, and a checkpoint moves both ways.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnn import functional
from fastnn.arguments import pool_arguments, wants_relu
from fastnn.sequential import call_in_order
from fastnn.stages import conv2d_stages, has_stages, linear_stages, max_pool2d_stages, relu_stages

__all__ = [
    "Conv2d",
    "CrossEntropyLoss",
    "Linear",
    "LogSoftmax",
    "MSELoss",
    "MaxPool2d",
    "NLLLoss",
    "ReLU",
    "Sequential",
    "Softmax",
]


@has_stages(linear_stages, "activation")
class Linear(torch.nn.Linear):
    """``torch.nn.Linear`` with an optional fused activation.

    Args:
        in_features, out_features, bias, device, dtype: as in :class:`torch.nn.Linear`.
        activation: None or ``"relu"``, applied to the output in the same pass.

    Shape:
        ``(*, in_features)`` to ``(*, out_features)``.

    Equivalent to::

        torch.nn.Linear(in_features, out_features, bias)

    and with ``activation="relu"`` to::

        torch.nn.Sequential(torch.nn.Linear(in_features, out_features, bias), torch.nn.ReLU())
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        wants_relu(activation)  # a wrong one is named here, not at the first input
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.activation is None else f", activation={self.activation!r}")


@has_stages(conv2d_stages, "activation", "max_pool", "stride", "padding", "padding_mode", "dilation", "groups")
class Conv2d(torch.nn.Conv2d):
    """``torch.nn.Conv2d`` with an optional fused activation and max-pooling.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in :class:`torch.nn.Conv2d`; all four padding modes.
        activation: None or ``"relu"``, applied to the convolution's output in the same pass.
        max_pool: None, a window size, or ``(kernel_size, stride, padding)``; see :func:`fastnn.functional.conv2d`.

    Shape:
        ``(batch, in_channels, height, width)`` or ``(in_channels, height, width)`` to the same with out_channels.

    Equivalent to::

        torch.nn.Conv2d(1, 32, 3)

    and with ``activation="relu", max_pool=2`` to::

        torch.nn.Sequential(torch.nn.Conv2d(1, 32, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        max_pool: Any = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        wants_relu(activation), pool_arguments(max_pool)  # wrong ones are named here, not at the first image
        self.activation = activation
        self.max_pool = max_pool

    def forward(self, input: Tensor) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return functional.conv2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            activation=self.activation,
            max_pool=self.max_pool,
        )

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        return text if self.max_pool is None else text + f", max_pool={self.max_pool!r}"


@has_stages(max_pool2d_stages, "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
class MaxPool2d(torch.nn.MaxPool2d):
    """``torch.nn.MaxPool2d``; see :func:`fastnn.functional.max_pool2d`.

    Args:
        kernel_size, stride, padding, dilation, return_indices, ceil_mode: as in :class:`torch.nn.MaxPool2d`.

    Shape:
        ``(batch, channels, height, width)`` or ``(channels, height, width)`` to the same, pooled.

    Equivalent to::

        torch.nn.MaxPool2d(kernel_size, stride, padding, dilation, return_indices, ceil_mode)
    """

    def forward(self, input: Tensor) -> Any:
        return functional.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


@has_stages(relu_stages)
class ReLU(torch.nn.ReLU):
    """``torch.nn.ReLU``; see :func:`fastnn.functional.relu`.

    Args:
        inplace: whether to overwrite the input.

    Shape:
        Any, kept.

    Equivalent to::

        torch.nn.ReLU(inplace)
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.relu(input, self.inplace)


class Sequential(torch.nn.Sequential):
    """``torch.nn.Sequential`` that runs layers of this module which follow each other as one operator.

    Such a chain begins with a ``Conv2d`` or a ``Linear`` and takes in all that follow of ``Conv2d``, ``Linear``,
    ``MaxPool2d``, ``ReLU``, ``torch.nn.Flatten()`` and ``torch.nn.Identity``. Results and gradients are the same bits
    as layer by layer. A training step of a small network saves a seventh of its time, Python's and autograd's; a
    prediction of one digit, from the second of a shape on, takes little more than half of it.

    The layers are called one by one, as torch's Sequential does, where fastnn's kernels do not serve, and where
    something may look between them: hooks on a layer or on saved tensors, subclasses, autocast, torch.func, compilers.

    A chain has one node in the graph; where autograd records nothing (before the first layer that is trained, too) it
    has none, and takes the memory of two layers. ``torch.autograd.grad`` for some of its parameters computes the
    gradients of all of them, and what lies between layers is freed when the whole backward pass is over.

    Args:
        layers: as in :class:`torch.nn.Sequential`, modules or one OrderedDict of them.

    Equivalent to::

        torch.nn.Sequential(*layers)
    """

    runs_layers_in_order = True

    def forward(self, input: Tensor) -> Any:
        if torch.compiler.is_compiling():  # a graph holds the layers' operators
            return super().forward(input)
        return call_in_order(self, input)


class Softmax(torch.nn.Softmax):
    """``torch.nn.Softmax``; see :func:`fastnn.functional.softmax`.

    Args:
        dim: the dimension along which the result sums to 1.

    Shape:
        Any, kept.

    Equivalent to::

        torch.nn.Softmax(dim)
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """``torch.nn.LogSoftmax``; see :func:`fastnn.functional.log_softmax`.

    Args:
        dim: the dimension along which the exponentials of the result sum to 1.

    Shape:
        Any, kept.

    Equivalent to::

        torch.nn.LogSoftmax(dim)
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.log_softmax(input, self.dim, _stacklevel=5)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss``; see :func:`fastnn.functional.cross_entropy`.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as in
            :class:`torch.nn.CrossEntropyLoss`.

    Shape:
        Logits ``(batch, classes, ...)`` and targets ``(batch, ...)`` to a scalar, or ``(batch, ...)``.

    Equivalent to::

        torch.nn.CrossEntropyLoss(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class NLLLoss(torch.nn.NLLLoss):
    """``torch.nn.NLLLoss``; see :func:`fastnn.functional.nll_loss`.

    Args:
        weight, size_average, ignore_index, reduce, reduction: as in :class:`torch.nn.NLLLoss`.

    Shape:
        Log-probabilities ``(batch, classes, ...)`` and targets ``(batch, ...)`` to a scalar, or
        ``(batch, ...)``.

    Equivalent to::

        torch.nn.NLLLoss(weight, size_average, ignore_index, reduce, reduction)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.nll_loss(input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction)


class MSELoss(torch.nn.MSELoss):
    """``torch.nn.MSELoss``; see :func:`fastnn.functional.mse_loss`.

    Args:
        size_average, reduce, reduction: as in :class:`torch.nn.MSELoss`.

    Shape:
        Input and target of one shape to a scalar, or to that shape unreduced.

    Equivalent to::

        torch.nn.MSELoss(size_average, reduce, reduction)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(input, target, reduction=self.reduction)
