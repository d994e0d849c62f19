"""Reading the arguments that operators and layers share: pairs, activations, pooling windows."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

Pair = tuple[int, int]  # (height, width)

# The window that a convolution pools in registers: (kernel_size, stride, padding).
FUSED_POOL = ((2, 2), (2, 2), (0, 0))


# Channels of groups, as many out as in, whose kernels keep channels in vectors and have no window in registers to pool.
NARROW_GROUPS = (1, 2, 4, 8)


def pools_in_registers(weight: torch.Tensor, groups: int) -> bool:
    """Whether the kernels of a convolution with this weight take ``FUSED_POOL``."""
    members = weight.shape[1]
    return groups == 1 or members not in NARROW_GROUPS or weight.shape[0] != groups * members


def wants_relu(activation: str | None) -> bool:
    """Whether ``activation=`` asks for a ReLU."""
    if activation is None:
        return False
    if activation == "relu":
        return True
    raise ValueError(f'activation: expected None or "relu", got {activation!r}')


def pair(name: str, value: int | Sequence[int]) -> Pair:
    """(height, width) of an argument that takes one number for both."""
    # What layers keep, without the care for other integers.
    if type(value) is int:
        return value, value
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int:
        return value
    numbers = [_number(one) for one in (value if isinstance(value, (tuple, list)) else (value,))]
    if 1 <= len(numbers) <= 2 and all(number is not None for number in numbers):
        return numbers[0], numbers[-1]
    raise ValueError(f"{name}: expected an int or a pair of ints, got {value!r}")


def _number(value: Any) -> Any:
    """An int, a torch.SymInt as it is, or None for what is neither: numpy's integers and tensors of one are ints."""
    if isinstance(value, torch.SymInt):
        return value
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def pool_arguments(max_pool: Any) -> tuple[Pair, Pair, Pair] | None:
    """(kernel_size, stride, padding) from the forms that ``max_pool=`` takes; ValueError for what pools nothing."""
    if max_pool is None:
        return None
    if type(max_pool) is int and max_pool == 2:
        return FUSED_POOL
    if _number(max_pool) is not None:
        max_pool = (max_pool, max_pool, 0)
    if not isinstance(max_pool, (tuple, list)) or len(max_pool) != 3:
        raise ValueError(f"max_pool: expected None, an int or (kernel_size, stride, padding), got {max_pool!r}")
    kernel_size, stride, padding = max_pool
    kernel_size = pair("max_pool", kernel_size)
    if min(kernel_size) < 1:
        raise ValueError(f"max_pool: expected a kernel_size of at least 1, got {kernel_size}")
    stride = kernel_size if stride is None else pair("max_pool", stride)
    if min(stride) < 1:
        raise ValueError(f"max_pool: expected a stride of at least 1, got {stride}")
    padding = pair("max_pool", padding)
    if not all(0 <= padding[d] <= kernel_size[d] // 2 for d in range(2)):
        raise ValueError(f"max_pool: expected a padding from 0 to half of the kernel_size {kernel_size}, got {padding}")
    return kernel_size, stride, padding
