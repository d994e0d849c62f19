"""Layers of a Sequential that follow each other as one node of autograd.

To call layers as modules, with a node and tensors for each, takes a small network as long as half of its kernels. A run
of layers records the calls of its stages (:mod:`fastnn.stages`) once for each shape of input, in one program for the
forward and one for the backward pass, and then gives these the tensors of each call: no memory is kept between calls.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastnn import _C
from fastnn.autograd.common import (
    KernelFunction,
    allows_tf32,
    dense,
    differentiable_backward,
    goes_through_op,
    goes_through_torch,
)
from fastnn.autograd.conv2d import channels_last, prefers_channels_last
from fastnn.stages import NotCompilable, Stage, recorded, stages_of, watched

__all__ = ["run_in_order"]

# That a run keeps: one for each shape of input. More, and it starts anew.
MOST_PLANS = 32


def run_in_order(model: torch.nn.Sequential, input: Any) -> Any:
    """What the model's layers make of `input`, one after another."""
    for part in _parts_of(model):
        input = part(input)
    return input


# ------------------------------------------------------------------------------------------------------------- a run


class _Pieces:
    """Memory for the stages of one pass: pieces of one tensor of bytes, which each run of the program takes anew."""

    precision = "fp32"

    def __init__(self, like: Tensor) -> None:
        self._like = like  # of this device
        self.tensors: list[Tensor] = []

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        tensor = torch.empty(shape, dtype=dtype, device=self._like.device, memory_format=memory_format)
        self.tensors.append(tensor)
        return tensor

    def new_like(self, tensor: Tensor) -> Tensor:
        return self.new(tuple(tensor.shape), tensor.dtype, channels_last=tensor.dim() == 4)


def _bytes_of(tensor: Tensor) -> int:
    """With what is left of the last 256: every piece begins where memory of an allocator's may."""
    return -(tensor.numel() * tensor.element_size() // -256) * 256


class _Plan:
    """The forward and backward pass of a run as programs, for one shape of input and choice of gradients.

    Args:
        stages: of the run.
        source: an input as the first stage reads it.
        parameters: with the number of the stage that each belongs to.
        needed: whether the input's gradient, and each parameter's, is wanted.
        saves_output: whether the backward pass reads the output.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        source: Tensor,
        parameters: Sequence[tuple[int, Tensor]],
        needed: Sequence[bool],
        saves_output: bool,
    ) -> None:
        self._needs_input, *self._needs = needed
        trained = [pair for pair, need in zip(parameters, self._needs, strict=True) if need]
        given = [source, *(parameter for _, parameter in parameters)]
        grads: dict[Tensor, Tensor] = {}

        self._forward, memory = _C.Program(), _Pieces(source)
        output, backwards = source, []
        with recorded(self._forward):
            for stage in stages:
                output, backward = stage(memory, output, grads)
                backwards.append(backward)
        activations = [tensor for tensor in memory.tensors if tensor is not output]
        *offsets, self._activation_bytes = itertools.accumulate(map(_bytes_of, activations), initial=0)
        placed = list(zip(activations, offsets, strict=True))
        self._output_layout = tuple(output.shape), output.stride()
        slots = [*given, output]
        self._forward.place(slots, [(tensor, len(slots), offset) for tensor, offset in placed])

        self._backward, memory.tensors = _C.Program(), []
        grads.update((parameter, torch.empty_like(parameter)) for _, parameter in trained)
        first = -1 if self._needs_input else min(number for number, _ in trained)
        grad_output = torch.empty_like(output)
        grad: Tensor | None = grad_output
        with recorded(self._backward):
            for number in reversed(range(max(first, 0), len(stages))):
                assert grad is not None
                grad = backwards[number](grad, number > first)
        # A stage makes at most one tensor. When it makes it, the one before the last has been read.
        self._half = max(map(_bytes_of, memory.tensors), default=0)
        between = [tensor for tensor in memory.tensors if tensor is not grad]
        optional = [output if saves_output else None, grad if self._needs_input else None]
        slots = [*given, grad_output, *grads.values(), *(tensor for tensor in optional if tensor is not None)]
        self._backward.place(
            slots,
            [(tensor, len(slots), offset) for tensor, offset in placed]
            + [(tensor, len(slots) + 1, i % 2 * self._half) for i, tensor in enumerate(between)],
        )

    def forward(self, source: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
        """The output, and the memory of what lies before it; None where a tensor is laid out in another way."""
        output = source.new_empty_strided(*self._output_layout)
        activations = source.new_empty(self._activation_bytes, dtype=torch.uint8)
        return (output, activations) if self._forward.run_on([source, *parameters, output, activations]) else None

    def backward(
        self,
        grad_output: Tensor,
        source: Tensor,
        parameters: Sequence[Tensor],
        output: Tensor | None,
        activations: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the input and of the parameters; None for those that the plan leaves out."""
        grads = [torch.empty_like(p) if need else None for p, need in zip(parameters, self._needs, strict=True)]
        grad_input = torch.empty_like(source) if self._needs_input else None
        between = source.new_empty(2 * self._half, dtype=torch.uint8)
        tensors = (source, *parameters, grad_output, *grads, output, grad_input, activations, between)
        if not self._backward.run_on([tensor for tensor in tensors if tensor is not None]):
            raise RuntimeError("Sequential: expected saved tensors as they were, got some of another shape or dtype")
        return grad_input, *grads


class _Run:
    """Layers that follow each other, with the stages of each, as one call."""

    def __init__(self, layers: Sequence[tuple[torch.nn.Module, list[Stage]]]) -> None:
        self._layers = [layer for layer, _ in layers]
        self._stages: list[Stage] = []
        self._weighted: list[tuple[int, torch.nn.Module]] = []  # with the number of their stage
        for layer, stages in layers:
            if isinstance(layer, _WEIGHTED):
                self._weighted.append((len(self._stages), layer))
            self._stages += stages
        self._input_dims = _input_dims(self._layers[0])
        last: Any = self._layers[-1]
        # Whether the backward pass reads the output, as a ReLU's does.
        self.saves_output = isinstance(last, torch.nn.ReLU) or (
            getattr(last, "activation", None) is not None and getattr(last, "max_pool", None) is None
        )
        self._plans: dict[Any, _Plan] = {}

    def __call__(self, input: Any) -> Any:
        parameters = [p for _, layer in self._weighted for p in _parameters_of(layer) if p is not None]
        done = self._run(input, parameters) if self._is_recorded(input, parameters) else None
        if done is not None:
            return _RunFunction.run(input, (self, *done), *parameters)
        for layer in self._layers:
            input = layer(input)
        return input

    def _is_recorded(self, input: Any, parameters: list[Tensor]) -> bool:
        """Whether kernels serve the call, autograd records it, and a plan can express it."""
        return (
            forward_ad._current_level < 0
            and _C.quick_way(input, *parameters) == "record"
            and input.dim() == self._input_dims
            and input.numel() > 0
            and len(set(parameters)) == len(parameters)
            and all(map(_lies_as_kernels_read, parameters))
        )

    def _run(self, input: Tensor, parameters: list[Tensor]) -> tuple[_Plan, Tensor, Tensor] | None:
        """The plan for this call, the output, and memory with what the backward pass needs; None where the layers have
        to say what does not fit."""
        source = _as_read(input)
        needed = tuple([tensor.requires_grad for tensor in (input, *parameters)])
        key = source.shape, needed, allows_tf32(source, "conv"), allows_tf32(source, "matmul")
        plan = self._plans.get(key)
        results = None if plan is None else plan.forward(source, parameters)
        if plan is None or results is None:
            numbered = [(i, p) for i, layer in self._weighted for p in _parameters_of(layer) if p is not None]
            try:
                plan = _Plan(self._stages, source, numbered, needed, self.saves_output)
            except (ValueError, RuntimeError):
                return None
            if len(self._plans) == MOST_PLANS:
                self._plans.clear()
            self._plans[key] = plan
            results = plan.forward(source, parameters)
        return None if results is None else (plan, *results)

    def result_format(self, input: Tensor) -> torch.memory_format:
        """torch's rule for the images that convolutions make."""
        return _result_format(input, *(_parameters_of(layer)[0] for _, layer in self._weighted))

    def layer_by_layer(self, input: Tensor, *parameters: Tensor) -> Tensor:
        """The output by the layers' own operators, with these for their parameters."""
        given = iter(parameters)
        for layer in self._layers:
            named: dict[str, Tensor] = {}
            if isinstance(layer, _WEIGHTED):
                named = {name: next(given) for name in ("weight", "bias") if layer._parameters[name] is not None}
            input = torch.func.functional_call(layer, named, (input,))
        return input


class _RunFunction(KernelFunction):
    @staticmethod
    def forward(ctx: Any, input: Tensor, done: tuple[_Run, _Plan, Tensor, Tensor], *parameters: Tensor) -> Tensor:
        run, plan, output, activations = done
        ctx.run, ctx.plan = run, plan
        ctx.save_for_backward(input, *parameters, activations, output if run.saves_output else None)
        return output if output.dim() == 2 else output.contiguous(memory_format=run.result_format(input))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, *parameters, activations, output = ctx.saved_tensors
        grads: Sequence[Tensor | None]
        if goes_through_op(grad_output) or goes_through_torch(grad_output):
            needed = ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]
            grads = differentiable_backward(ctx.run.layer_by_layer, (input, *parameters), needed, grad_output)
        else:
            grads = ctx.plan.backward(_as_read(grad_output), _as_read(input), parameters, output, activations)
        grad_input, *rest = grads
        if grad_input is not None and grad_input.dim() == 4:
            grad_input = grad_input.contiguous(memory_format=_result_format(input, parameters[0]))
        return grad_input, None, *rest


def _as_read(tensor: Tensor) -> Tensor:
    """Images in channels_last, rows in row-major order."""
    return channels_last(tensor) if tensor.dim() == 4 else dense(tensor)


_WEIGHTED = (torch.nn.Conv2d, torch.nn.Linear)


def _parameters_of(layer: Any) -> tuple[Tensor, Tensor | None]:
    return layer._parameters["weight"], layer._parameters["bias"]


def _lies_as_kernels_read(parameter: Tensor) -> bool:
    return parameter.is_contiguous() or parameter.is_contiguous(memory_format=torch.channels_last)


def _result_format(*tensors: Tensor) -> torch.memory_format:
    """torch's rule for what convolutions make of an input and weights."""
    return torch.channels_last if any(map(prefers_channels_last, tensors)) else torch.contiguous_format


# ------------------------------------------------------------------------------------------------ a Sequential's runs

# What stages are made from, of all layers.
_ARGUMENTS = (
    *("activation", "max_pool", "kernel_size", "stride", "padding", "padding_mode", "dilation", "groups"),
    *("out_channels", "out_features", "ceil_mode", "return_indices", "start_dim", "end_dim"),
)
_State = list[tuple[Any, ...]]  # what tells whether a Sequential's layers are as they were

_parts: weakref.WeakKeyDictionary[torch.nn.Module, tuple[_State, list[Callable[[Any], Any]]]]
_parts = weakref.WeakKeyDictionary()


def _parts_of(model: torch.nn.Sequential) -> list[Callable[[Any], Any]]:
    """The model's layers, runs of them together; made anew where a layer, its class, hooks or arguments changed."""
    state = [_state_of(layer) for layer in model._modules.values()]
    known = _parts.get(model)
    if known is None or known[0] != state:
        known = _parts[model] = state, list(_split(model._modules.values()))
    return known[1]


def _state_of(layer: Any) -> tuple[Any, ...]:
    attributes = vars(layer)
    if not _may_be_stages(type(layer)):
        return (layer,)
    replaced = "forward" in attributes, *layer._parameters
    return layer, type(layer), watched(layer), replaced, *map(attributes.get, _ARGUMENTS)


def _may_be_stages(kind: type) -> bool:
    return "_stages" in vars(kind) or kind in (torch.nn.Flatten, torch.nn.Identity)


def _split(layers: Iterable[Any]) -> Iterator[Callable[[Any], Any]]:
    """Runs, which a convolution or a linear layer begins, and the layers that are in none."""
    run: list[tuple[torch.nn.Module, list[Stage]]] = []
    dims: int | None = None  # that the run's output has

    def end() -> list[Callable[[Any], Any]]:
        after: list[Callable[[Any], Any]] = []
        while run and isinstance(run[-1][0], (torch.nn.Flatten, torch.nn.Identity)):  # the output is not theirs
            after.insert(0, run.pop()[0])
        several = sum(bool(stages) for _, stages in run) > 1
        parts = [_Run(run)] if several else [layer for layer, _ in run]
        run.clear()
        return [*parts, *after]

    for layer in layers:
        takes = _input_dims(layer)
        try:
            stages = stages_of(layer)
        except NotCompilable:
            yield from end()
            yield layer
            continue
        if takes is not None and takes != dims:
            yield from end()
        if not run and not isinstance(layer, _WEIGHTED):
            yield layer
            continue
        run.append((layer, stages))
        dims = 2 if isinstance(layer, torch.nn.Flatten) else takes or dims
    yield from end()


def _input_dims(layer: torch.nn.Module) -> int | None:
    """The dimensions of the input that a layer's stages take; None where they take any."""
    if isinstance(layer, (torch.nn.Conv2d, torch.nn.MaxPool2d)):
        return 4
    return 2 if isinstance(layer, torch.nn.Linear) else None
