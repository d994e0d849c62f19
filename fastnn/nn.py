"""Layers: torch.nn's classes with ``forward`` on fastnn's kernels.

Each subclasses its torch namesake, so parameters, ``state_dict`` keys, initialisation, repr and pickling are
torch's own, and a checkpoint moves both ways.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnn import functional

__all__ = ["Linear"]


class Linear(torch.nn.Linear):
    """``torch.nn.Linear`` with an optional fused activation.

    Args:
        in_features, out_features, bias, device, dtype: as in :class:`torch.nn.Linear`.
        activation: None or ``"relu"``, applied to the output in the same pass.

    Shape:
        ``(*, in_features)`` to ``(*, out_features)``.

    Equivalent to::

        torch.nn.Sequential(torch.nn.Linear(in_features, out_features), torch.nn.ReLU())
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
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.activation is None else f", activation={self.activation!r}")
