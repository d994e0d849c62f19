"""Which layers of a model fuse: the chains of calls behind convolutions and linear layers, agreed with each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fastnn import nn
from fastnn.fusion import FOLLOWERS, Step, Steps, followers, function_step, pool_window
from fastnn.tracing import Calls, has_hooks

__all__ = ["Fusion", "plan_fusions"]

_KINDS: dict[type, str] = {
    nn.Conv2d: "conv2d",
    nn.Linear: "linear",
    nn.ReLU: "relu",
    nn.MaxPool2d: "max_pool2d",
    torch.nn.ReLU: "relu",  # torch's are left where they must stay, which is then the reason
    torch.nn.MaxPool2d: "max_pool2d",
    torch.nn.BatchNorm2d: "batch_norm",
    torch.nn.Identity: "identity",
}


@dataclass(frozen=True)
class Fusion:
    """What a convolution or linear layer is to compute in its own pass.

    Attributes:
        steps: in order; a batch norm is the first.
        absorbed: names of the modules that do it now, in the order of the steps; calls in several places may be
            followed by a module each.
    """

    steps: tuple[Step, ...]
    absorbed: tuple[str, ...]


def plan_fusions(
    modules: Mapping[str, torch.nn.Module], calls: Calls, kept: Mapping[str, str], fold_batch_norm: bool
) -> tuple[dict[str, Fusion], dict[str, str]]:
    """What fuses, by the name of the convolution or linear layer, and why not more does.

    Args:
        modules: the model's, with fastnn's layers in it.
        calls: its calls.
        kept: modules that must stay as they are, and why; a batch norm is None of them.
        fold_batch_norm: whether a batch norm is a step.
    """
    planner = _Planner(modules, calls, kept, fold_batch_norm)
    chains: dict[str, list[Steps]] = {}
    reasons: dict[str, str] = {}
    for name, module in modules.items():
        kind = _KINDS.get(type(module), "")
        if kind not in FOLLOWERS or name in kept:
            continue
        reason = planner.reason_against(name, module)
        if not reason:
            ends = [followers(node, kind, planner.step) for node in calls.sites.get(name, ())]
            chains[name] = [steps for steps, _ in ends]
            reason = next(filter(None, (planner.why_it_ends(last, steps, kind) for steps, last in ends)), "")
        if reason:
            reasons[name] = reason
    fusions = {}
    for name, count in _agreed_lengths(chains, calls).items():
        ends_here = [steps[:count] for steps in chains[name]]
        if any(len(steps) > count for steps in chains[name]):
            reasons.setdefault(name, "what follows differs between its calls, or is called elsewhere, too")
        if count:
            absorbed = dict.fromkeys(calls.layer[node] for steps in ends_here for node, _ in steps)
            fusions[name] = Fusion(tuple(step for _, step in ends_here[0]), tuple(absorbed))
    return fusions, reasons


class _Planner:
    """Reads the nodes of a model's graphs."""

    def __init__(
        self, modules: Mapping[str, torch.nn.Module], calls: Calls, kept: Mapping[str, str], fold_batch_norm: bool
    ) -> None:
        self._modules = modules
        self._calls = calls
        self._kept = kept
        self._fold_batch_norm = fold_batch_norm

    def reason_against(self, name: str, module: Any) -> str:
        """Why nothing may fuse into this convolution or linear layer."""
        if name in self._calls.unknown:
            return self._calls.unknown[name]
        if module.activation is not None or getattr(module, "max_pool", None) is not None:
            return "it computes an activation or a pooling already"
        if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
            return "it has hooks"
        return ""

    def step(self, node: Node) -> Step | None:
        """What the call of a layer is to a chain; None for other nodes, ``Step("", reason)`` where it must not fuse."""
        name = self._calls.layer.get(node)
        if name is None:
            return None
        module: Any = self._modules[name]
        kind = _KINDS.get(type(module), "")
        if not kind or kind in FOLLOWERS:
            return None
        if name in self._kept:
            return Step("", f"{name} is kept: {self._kept[name]}")
        if name in self._calls.unknown:
            return Step("", self._calls.unknown[name])
        if has_hooks(module) or "forward" in vars(module):
            return Step("", f"{name} has hooks or another forward")
        if kind == "batch_norm":
            reason = self._reason_not_to_fold(module, node)
            return Step("", reason) if reason else Step(kind, name)
        if kind == "max_pool2d":
            window = pool_window(module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
            if module.return_indices or window is None:
                return Step("", f"{name} has dilation, ceil_mode or return_indices")
            return Step(kind, window)
        return Step(kind)

    def _reason_not_to_fold(self, batch_norm: Any, node: Node) -> str:
        if not self._fold_batch_norm:
            return "a batch norm follows (fold_batch_norm=True folds it)"
        if batch_norm.training or batch_norm.running_mean is None:
            return "the batch norm that follows takes the batch's own statistics"
        of_input = self._calls.layer.get(node.all_input_nodes[0], "")
        if not {of_input, self._calls.layer[node]}.isdisjoint(self._calls.tensors_read):
            return "forward reads the tensors that a batch norm would be folded into, or its own"
        convolution: Any = self._modules.get(of_input)
        if convolution is not None and (convolution._forward_pre_hooks or "weight" not in convolution._parameters):
            return "its weight, into which a batch norm would be folded, is computed anew for each call"
        return ""

    def why_it_ends(self, last: Node, steps: Steps, kind: str) -> str:
        """Why what follows a chain of calls is not part of it; "" where nothing that could be does."""
        missing = FOLLOWERS[kind] - {step.kind for _, step in steps}
        for user in last.users:
            step = self.step(user) or function_step(user)
            if step is not None and step.kind == "":
                return str(step.argument)
            if step is not None and step.kind in missing:
                if len(last.users) > 1:
                    return f"its result is used {len(last.users)} times"
                if user.meta["modes"] != last.meta["modes"]:
                    return f"{step.kind} runs under another grad or autocast mode"
                return f'{step.kind} is called as a function; torch.compile(model, backend="fastnn") fuses it'
        return ""


def _agreed_lengths(chains: Mapping[str, list[Steps]], calls: Calls) -> dict[str, int]:
    """How many steps of their chains fuse into each layer.

    All its calls must be followed by the same steps, and a module that becomes an Identity must have no other calls.
    Shortening one layer's chains leaves modules with such calls, so it is repeated until none is.
    """
    counts = {name: _common_length(ends) for name, ends in chains.items()}
    while True:
        before = dict(counts)
        fused = {node for name, ends in chains.items() for steps in ends for node, _ in steps[: counts[name]]}
        for name, ends in chains.items():
            for steps in ends:
                for index, (node, _) in enumerate(steps[: counts[name]]):
                    if not fused.issuperset(calls.sites[calls.layer[node]]):
                        counts[name] = index
                        break
        if counts == before:
            return counts


def _common_length(ends: list[Steps]) -> int:
    """How many steps all chains begin with."""
    for count, steps in enumerate(zip(*ends, strict=False)):
        if len({step for _, step in steps}) > 1:
            return count
    return min(map(len, ends), default=0)
