"""What one kernel computes of a graph: a convolution or linear layer and what alone uses its result.

Shared by :mod:`fastnn.convert`, whose graphs call layers, and :mod:`fastnn.dynamo`, whose graphs call functions: each
says by a :class:`Step` what a node is, and by ``node.meta["modes"]`` under which grad and autocast modes it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from fastnn.arguments import FUSED_POOL, pair

__all__ = ["FOLLOWERS", "Step", "Steps", "followers", "function_step", "pool_window", "window_argument"]


@dataclass(frozen=True)
class Step:
    """What a node does to its only input.

    Attributes:
        kind: ``"relu"``, ``"max_pool2d"``, ``"batch_norm"`` or ``"identity"``; anything else never fuses.
        argument: the window of a max-pooling; which batch norm it is.
    """

    kind: str
    argument: Any = None


Steps = list[tuple[Node, Step]]

RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)
POOLS = (F.max_pool2d, torch.max_pool2d)
_POOL_WINDOW = {"kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
_POOL_ARGUMENTS = ("input", *_POOL_WINDOW, "return_indices")

# What a kernel computes after its sum. ReLU and max-pooling commute - the largest element of a window is rounded and
# cut off alike before and after, and the same one receives the gradient - so either may come first.
FOLLOWERS = {"conv2d": frozenset(("batch_norm", "relu", "max_pool2d")), "linear": frozenset(("relu",))}


def followers(node: Node, kind: str, read: Callable[[Node], Step | None]) -> tuple[Steps, Node]:
    """The steps that fuse into the `node` of this kind of operator, each the only use of what is before it.

    Also the last node that was passed, whose users are why the chain ends there.
    """
    wanted = FOLLOWERS[kind]
    found: Steps = []
    while len(node.users) == 1:
        (user,) = node.users
        step = read(user)
        if step is None or user.all_input_nodes != [node] or user.meta.get("modes") != node.meta.get("modes"):
            break
        if step.kind != "identity":
            if step.kind not in wanted:
                break
            wanted -= {step.kind, "batch_norm"}  # a batch norm is folded into the sum, so it comes first
            found.append((user, step))
        node = user
    return found, node


def function_step(node: Node) -> Step | None:
    """What a call of torch's functions and methods is to a chain; None for other nodes."""
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return Step("relu")
    if node.op != "call_function":
        return None
    if node.target in RELUS:
        return Step("relu")
    if node.target in POOLS:
        arguments = dict(zip(_POOL_ARGUMENTS, node.args, strict=False)) | node.kwargs
        if arguments.get("return_indices"):
            return None
        window = pool_window(*(arguments.get(name, default) for name, default in _POOL_WINDOW.items()))
        return None if window is None else Step("max_pool2d", window)
    return None


def pool_window(kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any) -> Any:
    """(kernel_size, stride, padding) in pairs of a max-pooling that fuses; None for other windows."""
    if ceil_mode or pair("dilation", dilation) != (1, 1):
        return None
    kernel = pair("kernel_size", kernel_size)
    return kernel, pair("stride", stride) if stride else kernel, pair("padding", padding)


def window_argument(window: Any) -> Any:
    """The short form that ``max_pool=`` takes of the most frequent window."""
    return 2 if window == FUSED_POOL else window
