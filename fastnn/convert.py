"""Models of torch's layers made into models of fastnn's, and back.

A layer is converted by giving the module that it is another class: the object, its parameters, buffers, hooks, flags
and whatever else refers to it stay. A ReLU or max-pooling that a convolution computes in its own pass becomes an
``Identity`` in the same way. What fuses is read from torch.fx graphs (:mod:`fastnn.tracing`), never from the order in
which a model holds its layers.
"""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastnn import nn
from fastnn.fusion import window_argument
from fastnn.layer_fusion import Fusion, plan_fusions
from fastnn.sequential import PARTS
from fastnn.tracing import Calls, calls_of

__all__ = ["ConversionReport", "conversion_report", "convert", "revert"]

_LAYERS: dict[type, type] = {getattr(torch.nn, name): getattr(nn, name) for name in nn.__all__ if name != "Sequential"}
_OURS = frozenset(_LAYERS.values())
_ARGUMENTS = ("activation", "max_pool")  # what fastnn's layers have and torch's have not


@dataclass
class ConversionReport:
    """What :func:`convert` did to a model; names are those of ``named_modules``.

    Attributes:
        replaced: layers that run on fastnn's kernels now, with the class that they had.
        fused: what each convolution or linear layer computes in its own pass, in order: modules that are an
            ``Identity`` now.
        not_fused: convolutions and linear layers with something after them that could have fused, and why it did not.
        kept: layers of torch.nn, and modules that torch.jit compiled, that are as they were, and why.

    ``print(report)`` shows all of it.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    not_fused: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        tables = {"replaced": self.replaced, "not fused": self.not_fused, "kept": self.kept}
        counts = {"replaced": len(self.replaced), "fused": len(self.fused), **{k: len(v) for k, v in tables.items()}}
        lines = [", ".join(f"{count} {title}" for title, count in counts.items())]
        lines += [f"fused: {' + '.join((name, *others))}" for name, others in self.fused.items()]
        for title, table in tables.items():
            for reason in dict.fromkeys(table.values()):
                names = ", ".join(name or "(the model)" for name in table if table[name] == reason)
                lines += textwrap.wrap(f"{title}, {reason}: {names}", 120, subsequent_indent="  ")
        return "\n".join(lines)


@dataclass
class _Before:
    """What :func:`revert` gives a module back: its class, fusing arguments, and tensors where folding changed them."""

    layer: type
    arguments: dict[str, Any]
    tensors: tuple[dict[str, Any], dict[str, Any]] | None = None


def convert(
    model: torch.nn.Module,
    *,
    inplace: bool = False,
    filter_fn: Callable[[torch.nn.Module, str], bool] | None = None,
    fold_batch_norm: bool = False,
) -> torch.nn.Module:
    """The model with fastnn's layers in the place of torch's, fused where that is right.

    Every ``torch.nn`` layer that :mod:`fastnn.nn` has is replaced where it stands: ``Conv2d``, ``Linear``,
    ``MaxPool2d``, ``ReLU``, ``Softmax``, ``LogSoftmax`` and the losses; so is, without a word in the report, a
    ``Sequential`` that holds some of them. A ``Conv2d`` takes over a ``ReLU`` and a ``MaxPool2d`` that follow it, in
    either order, and a ``Linear`` a ``ReLU``; these become ``Identity``. Parameters are the same objects, also in a
    copy, so that optimizers go on and tied weights stay tied; so are buffers and hooks. Device, dtype, training mode,
    names and ``state_dict`` keys stay.

    Fusing follows the calls that ``forward`` makes as torch.fx traces them, in training and evaluation, with and
    without gradients and optional arguments, all of which must agree. It needs layers that are modules: a ReLU called
    as a function (``F.relu``, ``x.relu()``) stays in ``forward``, and ``torch.compile(model, backend="fastnn")`` fuses
    it. A result that ``forward`` stores, as in an attribute, stays what it was. In a module that torch.fx cannot trace
    a ``Sequential`` or another module with a ``forward`` fuses inside if the code only ever calls it; layers that the
    code calls itself do not fuse. So it is where the code draws random numbers, as to skip a layer at random, or asks
    whether something is a tensor (``isinstance``, ``torch.is_tensor``) or has an attribute that tensors have not.
    Nothing fuses in a model whose ``forward`` decides by the classes of its layers. Code that calls a fused layer other
    than through ``forward`` - another method, a loop outside the model - sees what it computes now.

    The calls are recorded once, here, with stand-ins for arguments, whose ``type()`` is another, and which are no True,
    False or member of an Enum unless such a value is the argument's default. What else decides the calls is frozen as
    it stands: attributes other than ``training``, global variables, autocast and inference mode, random numbers from
    CUDA or from a generator of the model's own. Once the ReLU of ``if self.use: x = self.relu(x)`` has fused,
    ``use = False`` does not take it away. Set such attributes before; to change one later, :func:`revert`, set it and
    convert again; or let ``filter_fn`` leave that ReLU or pooling as it is, which keeps it from fusing.

    Left as they are: subclasses, which may compute something else, so also parametrized layers; layers whose
    ``forward`` was replaced; what torch.jit compiled; with a reason in the report. Hooks that see a result between two
    layers keep these from fusing.

    Args:
        model: any module; a layer or a loss by itself, too.
        inplace: whether to convert ``model`` itself rather than a copy.
        filter_fn: called with each layer and its name; where it returns False the layer stays as it is.
        fold_batch_norm: whether to fold each ``BatchNorm2d`` that follows a ``Conv2d`` into new weights and a new
            bias, for a model in eval mode. They are new parameters, no longer those of an optimizer, tied to no
            others, and the batch norm's are gone from the ``state_dict``: load checkpoints before.

    Returns:
        The model or its copy, with a report for :func:`conversion_report`.

    Raises:
        TypeError: where ``model`` is no module.
        ValueError: where batch norms are to be folded in training mode.

    Equivalent to (in results, to rounding)::

        model if inplace else copy.deepcopy(model)  # with the same parameters and buffers
    """
    _require_module("convert", model)
    if fold_batch_norm and model.training:
        raise ValueError("fold_batch_norm: expected a model in eval mode, got one in training mode")
    if not inplace:
        model = _copy(model)
    modules = dict(model.named_modules())
    report = ConversionReport()
    for name, module in modules.items():
        reason = _reason_to_keep(name, module, filter_fn)
        if reason:
            report.kept[name] = reason
        elif type(module) in _LAYERS:
            report.replaced[name] = type(module).__name__
            _remember(module)
            module.__class__ = _LAYERS[type(module)]
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.activation = None
            if isinstance(module, nn.Conv2d):
                module.max_pool = None
    for module in modules.values():
        has_ours = any(type(layer) in _OURS for layer in module.children())
        if type(module) is torch.nn.Sequential and has_ours and "forward" not in vars(module):
            _remember(module)
            module.__class__ = nn.Sequential
    kept = {name: reason for name, reason in report.kept.items() if reason != _NO_BATCH_NORM}
    calls = _calls(model)
    fusions, report.not_fused = plan_fusions(modules, calls, kept, fold_batch_norm)
    if fusions and not _makes_the_same_calls(model, fusions, calls):
        report.not_fused |= dict.fromkeys(fusions, "forward asks what its layers are, which fusing would change")
        fusions = {}
    for name, fusion in fusions.items():
        _fuse(modules, name, fusion)
        report.fused[name] = fusion.absorbed
        for other in fusion.absorbed:
            report.replaced.pop(other, None)
            report.kept.pop(other, None)
    vars(model)["_conversion_report"] = report
    return model


def conversion_report(model: torch.nn.Module) -> ConversionReport:
    """What the last :func:`convert` that returned this model did.

    Raises:
        ValueError: where none did, or :func:`revert` has undone it.
    """
    report = vars(model).get("_conversion_report")
    if report is None:
        raise ValueError(f"model: expected one that fastnn.convert returned, got {type(model).__name__}")
    return report


def revert(model: torch.nn.Module, *, inplace: bool = False) -> torch.nn.Module:
    """The model as it was before :func:`convert`: torch's layers, nothing fused, the same parameters and keys.

    Layers that were fastnn's before stay so. Where batch norms were folded, the tensors from before are back, as they
    were then.

    Args:
        model: any module; one inside a converted model, too.
        inplace: whether to revert ``model`` itself rather than a copy with the same parameters and buffers.

    Raises:
        TypeError: where ``model`` is no module.
        ValueError: where a layer was parametrized after a batch norm had been folded into it.
    """
    _require_module("revert", model)
    for name, module in model.named_modules():
        before = vars(module).get("_before_convert")
        if before is not None and before.tensors is not None and type(module) not in _CONVERTED:
            raise ValueError(
                f"model: expected {name} to be as convert left it, since a batch norm was folded into it, "
                f"got a {type(module).__name__}"
            )
    if not inplace:
        model = _copy(model)
    for module in model.modules():
        before = vars(module).pop("_before_convert", None)
        if before is None:
            continue
        vars(module).pop(PARTS, None)
        if type(module) in _CONVERTED:
            module.__class__ = before.layer
            for name in _ARGUMENTS:
                vars(module).pop(name, None)
        else:  # a class that was made of ours since, as a parametrization does
            vars(module).update({name: None for name in _ARGUMENTS if name in vars(module)})
        vars(module).update(before.arguments)
        if before.tensors is not None:
            module._parameters, module._buffers = before.tensors
    vars(model).pop("_conversion_report", None)
    return model


def _copy(model: torch.nn.Module) -> torch.nn.Module:
    """New modules around the same parameters, buffers and other tensors that are attributes."""
    shared: dict[int, Any] = {}
    for module in model.modules():
        before: _Before | None = vars(module).get("_before_convert")
        for named in (module._parameters, module._buffers, vars(module), *((before and before.tensors) or ())):
            shared.update({id(value): value for value in named.values() if isinstance(value, torch.Tensor)})
    copied = copy.deepcopy(model, shared)
    for old, new in zip(model.modules(), copied.modules(), strict=True):
        if isinstance(old, torch.jit.ScriptModule):  # torch copies its tensors all the same
            for name, tensor in (*old._parameters.items(), *old._buffers.items()):
                setattr(new, name, tensor)
    return copied


def _calls(model: torch.nn.Module) -> Calls:
    """The model's calls, traced on a copy of its modules."""
    try:
        copied = _copy(model)
    except Exception as error:  # a module may hold anything, and not everything can be copied
        reason = f"the model cannot be copied to be traced: {error}"
        return Calls(unknown={name: reason for name, _ in model.named_modules()})
    return calls_of(copied)


def _makes_the_same_calls(model: torch.nn.Module, fusions: Mapping[str, Fusion], calls: Calls) -> bool:
    """Whether ``forward`` calls what it did where these are fused."""
    copied = _copy(model)
    modules = dict(copied.named_modules())
    for name, fusion in fusions.items():
        _fuse(modules, name, fusion)
    return calls_of(copied).graphs == calls.graphs


def _require_module(function: str, model: Any) -> None:
    if isinstance(model, torch.optim.Optimizer):
        raise TypeError(f"model: expected a torch.nn.Module (fastnn.optim.{function} takes optimizers), got {model!r}")
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _reason_to_keep(
    name: str, module: torch.nn.Module, filter_fn: Callable[[torch.nn.Module, str], bool] | None
) -> str:
    """Why a layer stays as it is; "" for those to convert, for containers and for users' own modules."""
    layer = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by torch.jit"
    if layer in _LAYERS or layer in _OURS or layer is torch.nn.BatchNorm2d:
        if "forward" in vars(module):
            return "its forward was replaced"
        if filter_fn is not None and not filter_fn(module, name):
            return "filter_fn"
        return "" if layer is not torch.nn.BatchNorm2d else _NO_BATCH_NORM
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "parametrized"
    for known in _LAYERS:
        if isinstance(module, known):
            return f"a subclass of {known.__name__}, which may compute something else"
    if layer.__module__.startswith("torch.nn.modules") and not isinstance(module, _NO_LAYERS):
        return f"fastnn has no {layer.__name__}"
    return ""


# What a module is after it was converted.
_CONVERTED = (*_OURS, nn.Sequential, torch.nn.Identity)
# Its reason to stay unless it is folded.
_NO_BATCH_NORM = "fastnn has no BatchNorm2d"
_NO_LAYERS = (torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Identity)


def _remember(module: torch.nn.Module) -> _Before:
    """The module's note for :func:`revert`, made when it is first changed."""
    arguments: dict[str, Any] = {name: vars(module)[name] for name in _ARGUMENTS if name in vars(module)}
    before: _Before = vars(module).setdefault("_before_convert", _Before(type(module), arguments))
    return before


def _fuse(modules: Mapping[str, Any], name: str, fusion: Fusion) -> None:
    """Makes the layer compute the steps, and the modules that did so until now pass their input on."""
    layer, absorbed = modules[name], [modules[other] for other in fusion.absorbed]
    _remember(layer)
    for step in fusion.steps:
        if step.kind == "batch_norm":
            _fold(layer, absorbed[0])
        elif step.kind == "relu":
            layer.activation = "relu"
        else:
            layer.max_pool = window_argument(step.argument)
    for module in absorbed:
        _remember(module)
        module.__class__ = torch.nn.Identity


def _fold(convolution: nn.Conv2d, batch_norm: Any) -> None:
    """Makes the convolution compute ``batch_norm(convolution(input))``; the fold is computed in float64."""
    for module in (convolution, batch_norm):
        before = _remember(module)
        if before.tensors is None:
            before.tensors = dict(module._parameters), dict(module._buffers)
    given: dict[str, Any] = {}
    for named in vars(batch_norm)["_before_convert"].tensors:  # another convolution may have folded it before
        given |= {name: tensor.detach().double() for name, tensor in named.items() if tensor is not None}
    weight, bias = convolution.weight, convolution.bias
    scale = given.get("weight", 1.0) / (given["running_var"] + batch_norm.eps).sqrt()
    shift = (0.0 if bias is None else bias.detach().double()) - given["running_mean"]
    folded = weight.detach().double() * scale.view(-1, 1, 1, 1), shift * scale + given.get("bias", 0.0)
    convolution.weight, convolution.bias = (
        torch.nn.Parameter(tensor.to(weight.dtype), weight.requires_grad) for tensor in folded
    )
    batch_norm._parameters, batch_norm._buffers = {}, {}
