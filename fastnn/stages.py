"""The layers of a Sequential as stages: kernel calls without a module, an autograd node or a check for each.

A stage computes a layer's output, and returns with it a function for the backward pass. Between stages activations stay
in channels_last order; a Flatten is one transposition. Where its tensors lie is the business of the `Memory` that it is
given: :mod:`fastnn.compiled` keeps real ones for its programs, :mod:`fastnn.sequential` records on stand-ins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastnn import _C
from fastnn.arguments import FUSED_POOL, pair, pool_arguments, pools_in_registers, wants_relu
from fastnn.autograd.common import allows_tf32
from fastnn.autograd.conv2d import Geometry, output_shape
from fastnn.autograd.max_pool2d import pool_size, winners_dtype
from fastnn.tracing import has_hooks

__all__ = [
    "PARAMETERS",
    "WEIGHTED",
    "Backward",
    "Memory",
    "NotCompilable",
    "Stage",
    "arguments_of",
    "everything_is_watched",
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

    def grad_of(self, parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else self.grads.get(parameter)

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


# A layer's parameters that kernels read.
PARAMETERS = ("weight", "bias")
WEIGHTED = (torch.nn.Conv2d, torch.nn.Linear)


def _backward_with_weight(
    kernel: Callable[..., None], memory: Memory, input: Tensor, weight: Tensor, bias: Tensor | None, *saved: Any
) -> Backward:
    """Calls ``kernel(grad_input, grad_weight, grad_bias, grad_output, input, weight, *saved)``."""

    def backward(grad_output: Tensor, needs_input: bool) -> Tensor | None:
        grad_input = memory.new_like(input) if needs_input else None
        grads = grad_input, memory.grad_of(weight), memory.grad_of(bias)
        kernel(*grads, grad_output, input, memory.at(weight), *saved)
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
        sizes = output_shape(input.shape, layer.weight.shape, geometry, fused)
        shape = tuple(max(size, 0) for size in sizes)  # where no output fits, the kernel's check says so
        output = memory.new(shape, input.dtype, channels_last=True)
        winner = memory.new(shape, torch.uint8, channels_last=True) if fused and memory.backward_follows else None
        weight, bias = layer.weight, layer.bias
        precision = "tf32" if allows_tf32(input, "conv") else memory.precision
        _C.conv2d_forward(output, winner, input, memory.at(weight), memory.at(bias), *geometry, relu, fused, precision)
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
        weight, bias = layer.weight, layer.bias
        output = memory.new((len(input), len(weight)), input.dtype)
        tf32 = allows_tf32(input, "matmul")
        _C.linear_forward(output, input, memory.at(weight), memory.at(bias), relu, tf32)
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


def stages_of(layer: torch.nn.Module) -> list[Stage]:
    """The stages of one layer of a Sequential; exact types alone, since a subclass may compute something else.

    Raises:
        NotCompilable: for a layer that stages cannot express.
    """
    if watched(layer):
        raise NotCompilable(f"{layer}: expected a layer without hooks")
    if "forward" in vars(layer) or layer._compiled_call_impl is not None:
        raise NotCompilable(f"{layer}: expected a layer with the forward of its class")
    if isinstance(layer, WEIGHTED) and not layer._parameters.keys() >= set(PARAMETERS):
        raise NotCompilable(f"{layer}: expected weight and bias that are its parameters")
    if "_stages" in vars(type(layer)):  # see fastnn.nn
        return layer._stages()  # type: ignore[operator]
    if type(layer) is torch.nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1):
        return [_flatten_stage]
    if type(layer) is torch.nn.Identity:
        return []
    raise NotCompilable(f"{layer}: expected a layer of fastnn.nn, Flatten or Identity")


# What the stages of a layer are made from, by its kind.
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    conv2d_stages: ("activation", "max_pool", "stride", "padding", "padding_mode", "dilation", "groups"),
    linear_stages: ("activation",),
    max_pool2d_stages: ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    relu_stages: (),
}


def _arguments_of(kind: type) -> tuple[str, ...] | None:
    """What the stages of layers of exactly this class are made from; None where there are no stages."""
    if kind is torch.nn.Flatten:
        return "start_dim", "end_dim"
    if kind is torch.nn.Identity:
        return ()
    return _ARGUMENTS.get(vars(kind).get("_stages"))


def arguments_of(layer: torch.nn.Module) -> list[Any]:
    """What a layer's stages are made from, besides its parameters."""
    names = _arguments_of(type(layer)) or ()
    return [*map(vars(layer).get, names)]


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
    kind, attributes = type(layer), vars(layer)
    arguments = _arguments_of(kind)
    if arguments is None:
        return layer, kind
    parameters = layer._parameters
    present = "weight" in parameters, parameters.get("bias") is None, len(parameters)
    replaced = "forward" in attributes, layer._compiled_call_impl
    return layer, kind, has_hooks(layer), replaced, present, *map(attributes.get, arguments)
