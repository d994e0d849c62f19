"""The layers of a Sequential as stages: kernel calls without a module, an autograd node or a check for each.

A stage computes a layer's output, and returns with it a function for the backward pass. Between stages activations stay
in channels_last order; a Flatten is one transposition. Where its tensors lie is the business of the `Memory` that it is
given: :mod:`fastnn.compiled` keeps real ones for its programs, :mod:`fastnn.sequential` records on stand-ins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastnn import _C
from fastnn.arguments import FUSED_POOL, pair, pool_arguments, pools_in_registers, wants_relu
from fastnn.autograd.common import allows_tf32
from fastnn.autograd.conv2d import Geometry, kernels_can_count, output_shape
from fastnn.autograd.max_pool2d import pool_size, winners_dtype
from fastnn.tracing import has_hooks

__all__ = [
    "PARAMETERS",
    "WEIGHTED",
    "Backward",
    "Memory",
    "NotCompilable",
    "Stage",
    "conv2d_stages",
    "has_stages",
    "linear_stages",
    "max_pool2d_stages",
    "relu_stages",
    "stages_of",
    "state_of",
    "watched",
]


class NotCompilable(ValueError):  # noqa: N818 - names the verdict, not a failure
    """The model, loss or optimizer is none that stages can express."""


class Memory:
    """Where stages get their tensors from."""

    precision: str  # "fp32", or "bf16" for what rounds factors on the way forward
    grads: Mapping[Tensor, Tensor]  # what the gradients of parameters are written to, of those that are wanted
    backward_follows: bool

    def at(self, parameter: Tensor | None) -> Any:
        """What kernels are called with for a parameter."""
        return parameter

    def grad_at(self, place: Tensor | None) -> Tensor | None:
        """What the gradient is written to of the parameter for which `at` gave this, if it is wanted."""
        return None if place is None else self.grads.get(place)

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
        """Uninitialised memory, row-major or channels_last."""
        raise NotImplementedError

    def new_like(self, tensor: Tensor) -> Tensor:
        """The same for a tensor's shape and dtype: images channels_last, others row-major."""
        return self.new(tuple(tensor.shape), tensor.dtype, channels_last=tensor.dim() == 4)


# Given grad_output and whether the input's gradient is wanted, returns that or None.
Backward = Callable[[Tensor, bool], "Tensor | None"]
# Given the input, returns the output and what computes the gradients.
Stage = Callable[[Memory, Tensor], tuple[Tensor, Backward]]
_Layer = TypeVar("_Layer", bound=torch.nn.Module)


# A layer's parameters that kernels read.
PARAMETERS = ("weight", "bias")
WEIGHTED = (torch.nn.Conv2d, torch.nn.Linear)


def _backward_with_weight(
    kernel: Callable[..., None], memory: Memory, input: Tensor, weight: Any, bias: Any, *saved: Any
) -> Backward:
    """Calls ``kernel(grad_input, grad_weight, grad_bias, grad_output, input, weight, *saved)``; weight and bias are
    what ``memory.at`` gave."""

    def backward(grad_output: Tensor, needs_input: bool) -> Tensor | None:
        grad_input = memory.new_like(input) if needs_input else None
        kernel(grad_input, memory.grad_at(weight), memory.grad_at(bias), grad_output, input, weight, *saved)
        return grad_input

    return backward


def _backward_to_input(kernel: Callable[..., None], memory: Memory, input: Tensor, *saved: Any) -> Backward:
    """Calls ``kernel(grad_input, grad_output, *saved)`` if the input's gradient is wanted."""

    def backward(grad_output: Tensor, needs_input: bool) -> Tensor | None:
        if not needs_input:
            return None
        grad_input = memory.new_like(input)
        kernel(grad_input, grad_output, *saved)
        return grad_input

    return backward


def conv2d_stages(layer: Any) -> list[Stage]:
    """Of a ``fastnn.nn.Conv2d``: with another pooling than the fused one two."""
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise NotCompilable(f"{layer}: expected numeric zero padding")
    pool = pool_arguments(layer.max_pool)
    relu = wants_relu(layer.activation)
    geometry = Geometry(
        pair("stride", layer.stride), pair("padding", layer.padding), pair("dilation", layer.dilation), layer.groups
    )
    if min(geometry.stride) < 1:
        raise NotCompilable(f"{layer}: expected a stride of at least 1")
    fused = pool == FUSED_POOL and pools_in_registers(layer.weight, layer.groups)

    def stage(memory: Memory, input: Tensor) -> tuple[Tensor, Backward]:
        if input.dim() != 4:
            raise NotCompilable(f"{layer}: expected images, got shape {tuple(input.shape)}")
        if not kernels_can_count(input, layer.weight, geometry):
            raise NotCompilable(f"{layer}: expected images of less than 2^31 values, got shape {tuple(input.shape)}")
        *_, height, width = output_shape(input.shape, layer.weight.shape, geometry, pool=False)
        if fused and height > 0 and width > 0:  # where no output fits, the kernel's check says so
            pool_size(height, width, *FUSED_POOL, dilation=(1, 1), ceil_mode=False)  # where no window fits, this one
        sizes = output_shape(input.shape, layer.weight.shape, geometry, fused)
        shape = tuple(max(size, 0) for size in sizes)
        output = memory.new(shape, input.dtype, channels_last=True)
        winner = memory.new(shape, torch.uint8, channels_last=True) if fused and memory.backward_follows else None
        weight, bias = memory.at(layer.weight), memory.at(layer.bias)
        precision = "tf32" if allows_tf32(input, "conv") else memory.precision
        _C.conv2d_forward(output, winner, input, weight, bias, *geometry, relu, fused, precision)
        saved = output if relu and not fused else None, winner, *geometry, "tf32" if precision == "tf32" else "fp32"
        return output, _backward_with_weight(_C.conv2d_backward, memory, input, weight, bias, *saved)

    if pool is None or fused:
        return [stage]
    return [stage, _max_pool2d_stage(*pool, dilation=(1, 1), ceil_mode=False)]


def linear_stages(layer: Any) -> list[Stage]:
    """Of a ``fastnn.nn.Linear``."""
    relu = wants_relu(layer.activation)

    def stage(memory: Memory, input: Tensor) -> tuple[Tensor, Backward]:
        if input.dim() != 2:
            raise NotCompilable(f"{layer}: expected rows, got shape {tuple(input.shape)}")
        weight, bias = memory.at(layer.weight), memory.at(layer.bias)
        output = memory.new((len(input), len(layer.weight)), input.dtype)
        tf32 = allows_tf32(input, "matmul")
        _C.linear_forward(output, input, weight, bias, relu, tf32)
        saved = output if relu else None, tf32
        return output, _backward_with_weight(_C.linear_backward, memory, input, weight, bias, *saved)

    return [stage]


def _max_pool2d_stage(kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Stage:
    window = (kernel_size, stride, padding, dilation)

    def stage(memory: Memory, input: Tensor) -> tuple[Tensor, Backward]:
        if input.dim() != 4:
            raise NotCompilable(f"MaxPool2d: expected images, got shape {tuple(input.shape)}")
        height, width = pool_size(input.shape[2], input.shape[3], *window, ceil_mode)
        shape = (input.shape[0], input.shape[1], height, width)
        output = memory.new(shape, input.dtype, channels_last=True)
        dtype = winners_dtype(kernel_size, return_indices=False)
        winners = memory.new(shape, dtype, channels_last=True) if memory.backward_follows else None
        _C.max_pool2d_forward(output, winners, input, *window)
        return output, _backward_to_input(_C.max_pool2d_backward, memory, input, winners, *window)

    return stage


def _relu_stage(memory: Memory, input: Tensor) -> tuple[Tensor, Backward]:
    output = memory.new_like(input)
    _C.relu_forward(output, input)
    return output, _backward_to_input(_C.relu_backward, memory, input, output)


def _flatten_stage(memory: Memory, input: Tensor) -> tuple[Tensor, Backward]:
    if input.dim() == 2:
        return input, lambda grad_output, needs_input: grad_output
    batch, channels, height, width = input.shape
    pixels = height * width
    stored = input.permute(0, 2, 3, 1).view(batch, pixels, channels)
    if pixels == 1 or channels == 1:  # the same order either way
        flat = stored.view(batch, channels * pixels)
    else:
        flat = memory.new((batch, channels * pixels), input.dtype)
        _C.transpose(flat.view(batch, channels, pixels), stored)

    def backward(grad_output: Tensor, needs_input: bool) -> Tensor | None:
        if not needs_input:
            return None
        if flat.data_ptr() == stored.data_ptr():
            return grad_output.view(batch, height, width, channels).permute(0, 3, 1, 2)
        grad_input = memory.new_like(input)
        to = grad_input.permute(0, 2, 3, 1).view(batch, pixels, channels)
        _C.transpose(to, grad_output.view(batch, channels, pixels))
        return grad_input

    return flat, backward


def max_pool2d_stages(layer: Any) -> list[Stage]:
    """Of a ``fastnn.nn.MaxPool2d``."""
    if layer.return_indices:
        raise NotCompilable(f"{layer}: expected return_indices=False")
    kernel_size, stride = pair("kernel_size", layer.kernel_size), pair("stride", layer.stride)
    padding, dilation = pair("padding", layer.padding), pair("dilation", layer.dilation)
    return [_max_pool2d_stage(kernel_size, stride, padding, dilation, layer.ceil_mode)]


def relu_stages(layer: Any) -> list[Stage]:
    """Of a ``fastnn.nn.ReLU``; ``inplace`` says nothing about a result that nobody else sees."""
    return [_relu_stage]


def _flatten_stages(layer: Any) -> list[Stage]:
    if (layer.start_dim, layer.end_dim) != (1, -1):
        raise NotCompilable(f"{layer}: expected start_dim 1 and end_dim -1")
    return [_flatten_stage]


def _identity_stages(layer: Any) -> list[Stage]:
    return []


class _Kind(NamedTuple):
    """How the layers of a class are stages, and the attributes that these are made from, besides the parameters."""

    stages: Callable[[Any], list[Stage]]
    arguments: tuple[str, ...]


# By exact types: a subclass may compute something else.
_KINDS: dict[type, _Kind] = {
    torch.nn.Flatten: _Kind(_flatten_stages, ("start_dim", "end_dim")),
    torch.nn.Identity: _Kind(_identity_stages, ()),
}


def has_stages(stages: Callable[[Any], list[Stage]], *arguments: str) -> Callable[[type[_Layer]], type[_Layer]]:
    """Decorates a class of layers whose stages `stages` makes from these attributes and the parameters."""

    def note(class_: type[_Layer]) -> type[_Layer]:
        _KINDS[class_] = _Kind(stages, arguments)
        return class_

    return note


def stages_of(layer: Any) -> list[Stage]:
    """The stages of one layer of a Sequential.

    Raises:
        NotCompilable: for a layer that stages cannot express.
    """
    kind = _KINDS.get(type(layer))
    if kind is None:
        raise NotCompilable(f"{layer}: expected a layer of fastnn.nn, Flatten or Identity")
    if watched(layer):
        raise NotCompilable(f"{layer}: expected a layer without hooks")
    if "forward" in vars(layer) or layer._compiled_call_impl is not None:
        raise NotCompilable(f"{layer}: expected a layer with the forward of its class")
    if isinstance(layer, WEIGHTED) and (not layer._parameters.keys() >= set(PARAMETERS) or layer.weight is None):
        raise NotCompilable(f"{layer}: expected weight and bias that are its parameters")
    for name in kind.arguments:
        if not _stays(vars(layer).get(name)):
            raise NotCompilable(f"{layer}: expected a {name} that cannot change in place: a number, or a tuple of them")
    return kind.stages(layer)


def _stays(value: Any) -> bool:
    """Whether a layer's argument is what it is until another takes its place."""
    if isinstance(value, tuple):
        return all(map(_stays, value))
    return value is None or isinstance(value, (Integral, str))


def everything_is_watched() -> bool:
    """Whether hooks see the calls of all modules."""
    return bool(torch.nn.modules.module._has_any_global_hook())


def watched(module: torch.nn.Module) -> bool:
    """Whether hooks see the module's calls, its own or everybody's."""
    return has_hooks(module) or everything_is_watched()


def state_of(model: torch.nn.Module) -> list[tuple[Any, ...]]:
    """What the stages of a Sequential were made from: its layers, their classes, hooks and arguments."""
    return [(everything_is_watched(),), *map(_state_of_layer, model._modules.values())]


def _state_of_layer(layer: Any) -> tuple[Any, ...]:
    kind = _KINDS.get(type(layer))
    if kind is None:
        return layer, type(layer)
    attributes, parameters = vars(layer), layer._parameters
    present = "weight" in parameters, "bias" in parameters
    absent = parameters.get("weight") is None, parameters.get("bias") is None
    replaced = "forward" in attributes, layer._compiled_call_impl
    return layer, kind, has_hooks(layer), replaced, present, absent, *map(attributes.get, kind.arguments)
