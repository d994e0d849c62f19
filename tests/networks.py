"""One small network, of fastnn's layers or torch's, and data for it: for tests of whole networks."""

from __future__ import annotations

from typing import Any

import torch
from cases import generator, random
from torch import Tensor

from fastnn import nn

CLASSES = 3


def network(layers: Any, dtype: torch.dtype = torch.float64) -> torch.nn.Sequential:
    """Of the layers of ``fastnn.nn`` or ``torch.nn``, always with the same first parameters."""
    torch.manual_seed(0)
    return layers.Sequential(  # type: ignore[no-any-return]
        layers.Conv2d(1, 4, 3, dtype=dtype),
        layers.ReLU(),
        layers.MaxPool2d(2),
        torch.nn.Flatten(),
        layers.Linear(36, 8, dtype=dtype),
        layers.ReLU(),
        layers.Linear(8, CLASSES, dtype=dtype),
    )


def fused_network(dtype: torch.dtype = torch.float64) -> torch.nn.Sequential:
    """The same network with ReLU and pooling inside the layers, which a Sequential of torch's calls one by one."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        nn.Conv2d(1, 4, 3, activation="relu", max_pool=2, dtype=dtype),
        torch.nn.Flatten(),
        nn.Linear(36, 8, activation="relu", dtype=dtype),
        nn.Linear(8, CLASSES, dtype=dtype),
    )


def make_batch(count: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 8, 8) and class numbers."""
    return random((count, 1, 8, 8), dtype, generator("batch", str(count))), torch.arange(count) % CLASSES


def assert_near(actual: Any, expected: Any) -> None:
    """For float64 on both sides, where only the order of the additions differs."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
