"""Which layers a model calls, where, and what becomes of their results: torch.fx graphs of its ``forward``.

A model is traced as a whole. A module inside it that torch.fx cannot trace is a single node of its owner's graph and
is traced by itself; where that fails too, the calls of the layers it owns are unknown.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import pickle
import random
import sys
import textwrap
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import TraceError
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["Calls", "calls_of", "has_hooks", "runs_in_order"]

# Their owner may call them piece by piece, so that the owner's code decides what follows what.
_CONTAINERS = (torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict)
# Ways to reach a child without its name; code that uses one may call any child in any way.
_NAMELESS = frozenset(
    (
        "children",
        "modules",
        "named_children",
        "named_modules",
        "get_submodule",
        "_modules",
        "__dict__",
        "getattr",
        "vars",
    )
)


@dataclass
class Calls:
    """The calls of a model's layers, by the names that ``named_modules`` gives them.

    Attributes:
        sites: the nodes that call a layer, of every graph that was traced.
        layer: the name of the layer that a node calls.
        unknown: layers that code which torch.fx cannot trace may call, and why it cannot; or that are called past
            ``__call__``.
        tensors_read: names of modules whose parameters or buffers a ``forward`` reads that is not their own.
        graphs: all of them as text.
    """

    sites: dict[str, list[Node]] = field(default_factory=dict)
    layer: dict[Node, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    tensors_read: set[str] = field(default_factory=set)
    graphs: list[str] = field(default_factory=list)


def calls_of(model: torch.nn.Module) -> Calls:
    """The calls that ``model.forward`` makes, in training and in evaluation, with and without gradients and optional
    arguments.

    Whatever else decides its path - attributes, global state - is taken as it stands; code that draws random numbers
    or asks what a tensor is counts as code that torch.fx cannot trace. Tracing sets training modes and runs `forward`,
    which may do anything to its module: give it a copy.
    """
    calls = Calls()
    names = {module: name for name, module in model.named_modules()}
    roots, opaque_types = [model], set[type]()
    with _same_random_numbers_after(), warnings.catch_warnings(), _noting_direct_calls(model) as called_directly:
        warnings.simplefilter("ignore")  # of user code that meets proxies; a call of the model gives its own
        for root in roots:  # grows
            if _is_layer(root):
                continue
            graphs, reason = _trace(root, opaque_types)
            found: list[torch.nn.Module] = []
            for graph in graphs:
                calls.graphs.append(str(graph))
                for node in graph.nodes:
                    if node.op == "call_module":
                        module = root.get_submodule(str(node.target))
                        found.append(module)
                        calls.layer[node] = names[module]
                        calls.sites.setdefault(names[module], []).append(node)
                    elif node.op == "get_attr":
                        owner = root.get_submodule(str(node.target).rpartition(".")[0])
                        calls.tensors_read.add(names[owner])
            if reason:
                reason = f"{type(root).__name__}.forward cannot be traced: {reason}"
                for child, is_known in _children_of_opaque(root):
                    if is_known:
                        found.append(child)
                    else:
                        calls.unknown.setdefault(names[child], reason)
            roots += [module for module in dict.fromkeys(found) if module not in roots and not _is_layer(module)]
    calls.unknown |= {names[module]: "its forward is called directly, past its hooks" for module in called_directly}
    return calls


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether hooks see the module's calls."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def runs_in_order(module: torch.nn.Module) -> bool:
    """Whether calling a Sequential calls its layers one after another and does nothing to what they compute.

    A class whose own ``forward`` does says so by ``runs_layers_in_order``.
    """
    if not isinstance(module, torch.nn.Sequential) or "forward" in vars(module):
        return False
    owner = next(class_ for class_ in type(module).__mro__ if "forward" in vars(class_))
    return owner is torch.nn.Sequential or "runs_layers_in_order" in vars(owner)


def _is_layer(module: torch.nn.Module) -> bool:
    """Whether a graph holds a call of this module as one node: torch or fastnn wrote it, or torch.jit compiled it."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    origin = type(module).__module__.split(".")
    known = origin[:2] in (["torch", "nn"], ["fastnn", "nn"]) or origin[:3] == ["torch", "ao", "nn"]
    return known and not isinstance(module, _CONTAINERS)


@contextmanager
def _noting_direct_calls(model: torch.nn.Module) -> Iterator[set[torch.nn.Module]]:
    """The layers whose ``forward`` runs meanwhile: for a call of the layer, torch.fx makes a node instead."""
    called: set[torch.nn.Module] = set()

    def noting(layer: torch.nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            called.add(layer)
            return type(layer).forward(layer, *args, **kwargs)

        return forward

    watched = [
        module
        for module in model.modules()
        if _is_layer(module) and not isinstance(module, torch.jit.ScriptModule) and "forward" not in vars(module)
    ]
    for layer in watched:
        vars(layer)["forward"] = noting(layer)
    try:
        yield called
    finally:
        for layer in watched:
            del vars(layer)["forward"]


def _random_state() -> tuple[object, ...]:
    """What the next random numbers of torch (on the CPU), Python and numpy depend on."""
    with _disable_current_modes():  # of fake tensors, which have no numbers
        of_torch = torch.get_rng_state().numpy().tobytes()
    return of_torch, random.getstate(), pickle.dumps(np.random.get_state(legacy=False))


@contextmanager
def _same_random_numbers_after() -> Iterator[None]:
    """Draws in the block are as if they had not been made."""
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class _Proxy(Proxy):
    """Ends the trace where code asks it what a tensor would answer otherwise.

    It cannot say that its class is Tensor: C++ would believe it, too, and read memory that a proxy has not.
    """

    @property  # type: ignore[misc]  # of object's, which can be set
    def __class__(self) -> type:
        _expect_no_question("isinstance", "is_tensor")
        return _Proxy

    def __getattr__(self, name: str) -> Any:
        if not hasattr(torch.Tensor, name):
            _expect_no_question("hasattr", "getattr")
        return super().__getattr__(name)


def _expect_no_question(*functions: str) -> None:
    """Raises where code outside of torch, by one of these functions, may have called the method that calls this."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_name in ("__instancecheck__", "is_tensor"):
        frame = frame.f_back
    of_torch = str(frame.f_globals.get("__name__")).partition(".")[0] == "torch"
    if not of_torch and not set(functions).isdisjoint(frame.f_code.co_names):
        raise TraceError("it asks for the class or attributes of a tensor, which may decide what it calls")


class _Tracer(torch.fx.Tracer):
    proxy_buffer_attributes = True  # in-place updates of a buffer are recorded and not made

    def __init__(self, opaque_types: set[type]) -> None:
        super().__init__()
        self.opaque_types = opaque_types
        self.entered: list[torch.nn.Module] = []
        self.random_state = _random_state()
        self.alive: weakref.WeakValueDictionary[Node, Proxy] = weakref.WeakValueDictionary()

    def proxy(self, node: Node) -> Proxy:
        self.alive[node] = proxy = _Proxy(node, self)
        return proxy

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch._C._is_any_autocast_enabled()
        node.meta["modes"] = modes  # `with` statements run while they are traced, and leave no node
        return node

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return _is_layer(m) or type(m) in self.opaque_types or has_hooks(m)

    def call_module(self, m: torch.nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.is_leaf_module(m, ""):
            return super().call_module(m, forward, args, kwargs)
        self.expect_no_random_numbers()  # of the module that calls this one
        self.entered.append(m)
        output = super().call_module(m, forward, args, kwargs)
        self.expect_no_random_numbers()
        self.entered.pop()  # stays after an exception: the last one's code raised it
        return output

    def expect_no_random_numbers(self) -> None:
        """Operators on proxies draw none while they are traced: what does is code whose path may depend on them."""
        if _random_state() != self.random_state:
            raise ValueError("it draws random numbers, which may decide what it calls")


def _trace(root: torch.nn.Module, opaque_types: set[type]) -> tuple[list[Graph], str]:
    """The graphs of a module's ``forward``, or none and why not; adds to `opaque_types` what it could not enter."""
    if "forward" in vars(root) or type(root).__call__ is not torch.nn.Module.__call__:
        return [], "the call does not lead to it"
    parameters = inspect.signature(type(root).forward).parameters.values()
    variants = list(itertools.product((True, False), (True, False), _arguments_given(parameters)))
    while True:
        tracer = _Tracer(opaque_types)
        try:
            graphs = []
            for training, with_grad, given in variants:
                for module in root.modules():
                    module.training = training
                tracer = _Tracer(opaque_types)
                with torch.set_grad_enabled(with_grad):
                    graphs.append(tracer.trace(root, given or None))
                graphs[-1].output(tuple(tracer.alive))  # what the code has stored somewhere is a result, too
                tracer.expect_no_random_numbers()
            return graphs, ""
        except Exception as error:
            if not tracer.entered:
                return [], _first_line(error)
            opaque_types.add(type(tracer.entered[-1]))


def _arguments_given(parameters: Iterable[inspect.Parameter]) -> list[dict[str, Any]]:
    """The arguments of ``forward`` that are no proxies: none, all optional ones as by default, and these with another
    one of few values in the place of each, which code may ask for by ``is``."""
    optional = {p.name: p.default for p in parameters if p.default is not p.empty}
    given: list[dict[str, Any]] = [{}]
    if optional:
        given.append(optional)
    for name, default in optional.items():
        of_few = (True, False) if isinstance(default, bool) else type(default) if isinstance(default, Enum) else ()
        given += [optional | {name: value} for value in of_few if value is not default]
    return given


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]


def _children_of_opaque(owner: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, bool]]:
    """The modules that an untraceable module may call, and whether it calls them, if at all, as a whole."""
    for name, child in owner.named_children():
        if _is_layer(child):
            yield child, False
        elif _is_called_whole(owner, name, child):
            yield child, True
        elif isinstance(child, _CONTAINERS):
            yield from _children_of_opaque(child)
        else:
            yield from ((module, False) for module in child.modules())


def _is_called_whole(owner: torch.nn.Module, name: str, child: torch.nn.Module) -> bool:
    """Whether no code of the owner reaches into a child: one with a forward that it only calls, or in a container."""
    if type(owner).__module__.startswith("torch.nn.modules"):
        return not isinstance(child, _CONTAINERS)
    has_forward = not isinstance(child, _CONTAINERS) or runs_in_order(child)
    return has_forward and _only_calls(owner, name)


def _only_calls(owner: torch.nn.Module, name: str) -> bool:
    """Whether the code of the owner's class calls ``self.<name>(...)`` and does nothing else with it.

    ``__init__`` is left out. Code that cannot be read, or that may reach its children without their names, is taken to
    do something else.
    """
    is_called = False
    for class_ in type(owner).__mro__[: type(owner).__mro__.index(torch.nn.Module)]:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(class_)))
        except (OSError, TypeError, SyntaxError):
            return False
        (definition,) = tree.body
        assert isinstance(definition, ast.ClassDef)
        body = [part for part in definition.body if getattr(part, "name", "") != "__init__"]
        nodes = [node for part in body for node in ast.walk(part)]
        called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
        owners = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
        for node in nodes:
            word = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if word in _NAMELESS or (word == name and id(node) not in called):
                return False
            if word == "self" and id(node) not in owners:  # handed on to other code
                return False
            is_called = is_called or word == name
    return is_called
