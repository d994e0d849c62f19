"""A backend for torch.compile: graphs of torch's functions on fastnn's, fused, whatever the model looks like.

Nothing here imports torch._dynamo, which takes a second: it calls the backend, and finds it by name through the entry
point in ``pyproject.toml``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

from fastnn import functional
from fastnn.autograd.conv2d import conv2d_op
from fastnn.autograd.linear import linear_op
from fastnn.fusion import followers, function_step, window_argument

__all__ = ["compile_backend"]

# The functions that kernels fuse into, and those that stay alone. torch's have the same signatures.
_FUSING: dict[Any, Callable[..., Any]] = {torch.conv2d: functional.conv2d, F.linear: functional.linear}
_ALONE: dict[Any, Callable[..., Any]] = {
    getattr(F, name): getattr(functional, name)
    for name in ("relu", "max_pool2d", "softmax", "log_softmax", "cross_entropy", "nll_loss", "mse_loss")
}
_ALONE[torch.relu] = functional.relu
_METHODS: dict[Any, Callable[..., Any]] = {"relu": functional.relu}


def compile_backend(graph_module: GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
    """``backend=`` of torch.compile: ``"fastnn"`` where the package is installed, else this function.

    Convolutions and linear layers, called as modules or as functions, compute the ReLU and the max-pooling that
    follow them in their own pass; other functions that :mod:`fastnn.functional` has run there, too. The rest of the
    graph runs operator by operator as torch does without a compiler, and autograd differentiates all of it. To have
    the rest compiled by inductor, take ``torch.compile(fastnn.convert(model))``.

    Args:
        graph_module: what torch.compile captured; it is changed.
        example_inputs: unused, since the kernels take any shape.

    Equivalent to (in results, to rounding)::

        torch.compile(model, backend="eager")
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target is getattr and not node.users:  # left by fastnn's own checks, and a use of its tensor
            graph.erase_node(node)
        elif node.target in (conv2d_op, linear_op):
            _call_function(graph, node)
    _mark_modes(graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _FUSING:
            node.target = _FUSING[node.target]
        if node.target in _FUSING.values() and not node.kwargs.get("activation") and not node.kwargs.get("max_pool"):
            _fuse(graph, node)
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _ALONE:
            node.target = _ALONE[node.target]
        elif node.op == "call_method" and node.target in _METHODS:
            node.op, node.target = "call_function", _METHODS[node.target]
    graph.lint()
    graph_module.recompile()
    return graph_module.forward


def _call_function(graph: Graph, node: Node) -> None:
    """Puts the public function in the place of an operator that a layer of fastnn's left in the graph."""
    result = node
    options: dict[str, Any] = {}
    if node.target is conv2d_op:
        *arguments, relu, pool = node.args
        options = {"max_pool": 2} if pool else {}
        result = next(user for user in node.users if user.target is operator.getitem and user.args[1] == 0)
    else:
        *arguments, relu = node.args
    if relu:
        options["activation"] = "relu"
    with graph.inserting_before(node):
        function = functional.conv2d if node.target is conv2d_op else functional.linear
        result.replace_all_uses_with(graph.call_function(function, tuple(arguments), options))
    for old in dict.fromkeys((result, node)):
        graph.erase_node(old)


def _mark_modes(graph: Graph) -> None:
    """Tells chains apart that a change of grad mode or autocast lies between, which are calls in the graph."""
    changes = 0
    for node in graph.nodes:
        node.meta["modes"] = changes
        changes += node.op == "call_function" and node.is_impure()


def _fuse(graph: Graph, node: Node) -> None:
    kind = "conv2d" if node.target is functional.conv2d else "linear"
    steps, _ = followers(node, kind, function_step)
    for absorbed, step in steps:
        if step.kind == "relu":
            node.update_kwarg("activation", "relu")
        else:
            node.update_kwarg("max_pool", window_argument(step.argument))
        absorbed.replace_all_uses_with(node)
        graph.erase_node(absorbed)
