"""Layers of a Sequential that follow each other as one call, and one node of autograd.

To call layers as modules, with a node and tensors for each, takes a small network as long as half of its kernels. A
chain of layers records the calls of its stages (:mod:`fastnn.stages`) once for each shape of input, in one program for
the forward and one for the backward pass, and gives these the tensors of each call: no memory is kept between calls.
Where autograd records nothing, the program is one that keeps nothing for a backward pass.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import Proxy

from fastnn import _C
from fastnn.autograd.common import (
    KernelFunction,
    allows_tf32,
    dense,
    differentiable_backward,
    goes_through_op,
    goes_through_torch,
    wanted_in_this_pass,
)
from fastnn.autograd.conv2d import channels_last, layout_of, lies_as_kernels_read, result_format
from fastnn.stages import PARAMETERS, WEIGHTED, Backward, Memory, Stage, arguments_of, stages_of, state_of

__all__ = ["PARTS", "call_in_order"]

# That a chain keeps: one for each shape of input. With another it starts anew.
MOST_PLANS = 32

_hooks_on_saved_tensors = torch._C._autograd._top_saved_tensors_default_hooks
_jit_tracing_state = torch._C._get_tracing_state
# Where a Sequential has its parts, in its ``__dict__``.
PARTS = "_parts_in_order"
_Part = Callable[[Any], Any]


def call_in_order(model: torch.nn.Sequential, input: Any) -> Any:
    """What the model's layers make of `input`, one after another."""
    # torch.fx has stand-ins for parameters, too; torch.jit would record what is looked up to make a chain.
    if isinstance(input, Proxy) or _jit_tracing_state() is not None:
        return _through(model._modules.values(), input)
    return _through(_parts_of(model), input)


def _through(parts: Iterable[_Part], input: Any) -> Any:
    for part in parts:
        input = part(input)
    return input


# ------------------------------------------------------------------------------------------------------------ a plan


class _StandIns(Memory):
    """Memory for stages that are recorded: each tensor has an address of its own, and nothing is there."""

    precision = "fp32"

    def __init__(self, parameters: Sequence[Tensor], backward_follows: bool) -> None:
        self.backward_follows = backward_follows
        self.made: list[Tensor] = []
        self.parameters = {parameter: _stand_in(parameter) for parameter in parameters}

    def at(self, parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else self.parameters[parameter]

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
        # The layout that a tensor without memory has; the address comes from a tensor of no elements on the device.
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        strides = torch.empty(shape, device="meta", memory_format=memory_format).stride()
        device = next(iter(self.parameters.values())).device
        self.made.append(_C.stand_in(torch.empty(0, dtype=dtype, device=device), shape, strides))
        return self.made[-1]


def _stand_in(tensor: Tensor) -> Tensor:
    return _C.stand_in(tensor, tensor.shape, tensor.stride())


def _room(tensor: Tensor) -> int:
    """Bytes for a tensor that others follow: every one begins where an allocator might put it."""
    return -(tensor.numel() * tensor.element_size() // -256) * 256


def _side_by_side(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each of these begins in memory for all of them, and its bytes."""
    *offsets, total = itertools.accumulate(map(_room, tensors), initial=0)
    return offsets, total


def _by_turns(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """The same for what stages hand on: a stage makes at most one tensor, and when it makes it, the one before the last
    has been read."""
    room = max(map(_room, tensors), default=0)
    return [i % 2 * room for i in range(len(tensors))], 2 * room


class _Plan:
    """The passes of a chain as programs, for one shape of input.

    Args:
        stages: of the chain.
        source: an input as the first stage reads it.
        parameters: of the chain, with the number of the stage that each belongs to.
        backward_follows: whether there is a backward pass.
        saves_output: whether it reads the output.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        source: Tensor,
        parameters: Sequence[tuple[int, Tensor]],
        backward_follows: bool,
        saves_output: bool,
    ) -> None:
        self._parameters = parameters
        self._memory = memory = _StandIns([p for _, p in parameters], backward_follows)
        self._given = [_stand_in(source), *memory.parameters.values()]
        self._stages_back: list[Backward] = []
        self._backwards: dict[tuple[bool, ...], tuple[_C.Program, int]] = {}
        self._recording = threading.Lock()

        output = self._given[0]

        def forward() -> None:
            nonlocal output
            for stage in stages:
                output, backward = stage(memory, output)
                self._stages_back.append(backward)

        self._forward = _C.Program()
        self._forward.record(forward)
        self._output = output
        self._saved_output = [output] if saves_output else []
        self._output_layout = tuple(output.shape), output.stride()
        self._activations = [tensor for tensor in memory.made if tensor is not output]
        layout = _side_by_side if backward_follows else _by_turns
        self._offsets, self._activation_bytes = layout(self._activations)
        slots = [*self._given, output]
        self._forward.place(slots, self._activations_in(len(slots)))

    def _activations_in(self, slot: int) -> list[tuple[Tensor, int, int]]:
        return [(t, slot, i) for t, i in zip(self._activations, self._offsets, strict=True)]

    def _record_backward(self, needed: tuple[bool, ...]) -> tuple[_C.Program, int]:
        """The backward pass to these of the input and the parameters, and the bytes that its stages hand on."""
        needs_input, *needs = needed
        trained = [pair for pair, need in zip(self._parameters, needs, strict=True) if need]
        memory = self._memory
        # Laid out as the parameters were when the forward pass was recorded.
        memory.made, memory.grads = [], {p: _stand_in(memory.parameters[p]) for _, p in trained}
        grad_output = _stand_in(self._output)
        grad: Tensor | None = grad_output
        first = -1 if needs_input else min(number for number, _ in trained)

        def backward_pass() -> None:
            nonlocal grad
            for number in reversed(range(max(first, 0), len(self._stages_back))):
                assert grad is not None
                grad = self._stages_back[number](grad, number > first)

        program = _C.Program()
        program.record(backward_pass)
        between = [tensor for tensor in memory.made if tensor is not grad]
        offsets, between_bytes = _by_turns(between)
        grad_input = [grad] if needs_input and grad is not None else []
        slots = [*self._given, grad_output, *memory.grads.values(), *self._saved_output, *grad_input]
        program.place(
            slots,
            self._activations_in(len(slots)) + [(t, len(slots) + 1, i) for t, i in zip(between, offsets, strict=True)],
        )
        return program, between_bytes

    def forward(self, source: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
        """The output, and the memory of what lies before it; None where a tensor is laid out in another way."""
        output = source.new_empty_strided(*self._output_layout)
        activations = source.new_empty(self._activation_bytes, dtype=torch.uint8)
        return (output, activations) if self._forward.run_on([source, *parameters, output, activations]) else None

    def backward(
        self,
        needed: tuple[bool, ...],
        grad_output: Tensor,
        source: Tensor,
        parameters: Sequence[Tensor],
        output: Tensor | None,
        activations: Tensor,
    ) -> tuple[Tensor | None, ...] | None:
        """The gradients of the input and of the parameters, None for those that are not needed; or None where a tensor
        is laid out in another way."""
        with self._recording:  # threads that run one model
            if needed not in self._backwards:
                self._backwards[needed] = self._record_backward(needed)
            program, between_bytes = self._backwards[needed]
        grad_input, *grads = (
            torch.empty_like(t) if need else None for t, need in zip((source, *parameters), needed, strict=True)
        )
        between = source.new_empty(between_bytes, dtype=torch.uint8)
        tensors = (source, *parameters, grad_output, *grads, output, grad_input, activations, between)
        done = program.run_on([tensor for tensor in tensors if tensor is not None])
        return (grad_input, *grads) if done else None


# ----------------------------------------------------------------------------------------------------------- a chain

_Staged = tuple[torch.nn.Module, list[Stage]]  # a layer and its stages


class _Chain:
    """Layers that follow each other as one call. The first and the last have stages."""

    def __init__(self, layers: Sequence[_Staged]) -> None:
        self._layers = layers
        self._stages = [stage for _, stages in layers for stage in stages]
        self._input_dims = _input_dims(layers[0][0])
        last: Any = layers[-1][0]
        # Whether the backward pass reads the output, as a ReLU's does.
        self.saves_output = isinstance(last, torch.nn.ReLU) or (
            getattr(last, "activation", None) is not None and getattr(last, "max_pool", None) is None
        )
        # Each parameter's place: the numbers of its stage and of its layer, the layer, and its name.
        self._places: list[tuple[int, int, torch.nn.Module, str]] = []
        number = 0
        for i, (layer, stages) in enumerate(layers):
            if isinstance(layer, WEIGHTED):
                present = (name for name in PARAMETERS if layer._parameters[name] is not None)
                self._places += [(number, i, layer, name) for name in present]
            number += len(stages)
        self._plans: dict[Any, _Plan] = {}
        self._halves: dict[int, list[_Part]] = {}

    def __call__(self, input: Any) -> Any:
        parameters: list[Any] = [layer._parameters[name] for _, _, layer, name in self._places]
        way = self._way(input, parameters)
        if way == "record":
            needed = [tensor.requires_grad for tensor in (input, *parameters)]
            first = needed.index(True)
            begin = 0 if first == 0 else self._places[first - 1][1]
            if begin > 0:  # autograd sees nothing of the layers before it
                return _through(self._halves_at(begin), input)
        results = None if way is None else self._compute(input, parameters, way == "record")
        if results is None:
            return _through((layer for layer, _ in self._layers), input)
        if way == "record":
            return _ChainFunction.run(input, (self, *results), *parameters)
        _, output, _ = results
        return _as_layers_return(output, input, parameters)

    def _way(self, input: Any, parameters: list[Tensor]) -> str | None:
        """``"kernel"``, or ``"record"`` where autograd records the call; None where kernels do not serve it, or no plan
        can express it."""
        if (
            forward_ad._current_level < 0
            and _hooks_on_saved_tensors(True) is None
            and (way := _C.quick_way(input, *parameters)) is not None
            and input.dim() == self._input_dims
            and input.numel() > 0
            and not any(map(Tensor.is_neg, parameters))
        ):
            return way
        return None

    def _halves_at(self, begin: int) -> list[_Part]:
        """What the layers before `begin` are, and those from there on."""
        if begin not in self._halves:
            self._halves[begin] = [*_parts_from(self._layers[:begin]), *_parts_from(self._layers[begin:])]
        return self._halves[begin]

    def _compute(
        self, input: Tensor, parameters: list[Tensor], backward_follows: bool
    ) -> tuple[_Plan, Tensor, Tensor] | None:
        """The plan for this call, the output, and memory with what the backward pass needs; None where the layers have
        to say what does not fit."""
        source = _as_read(input)
        key = backward_follows, source.shape, allows_tf32(source, "conv"), allows_tf32(source, "matmul")
        plan = self._plans.get(key)
        results = None if plan is None else plan.forward(source, parameters)
        if plan is None or results is None:
            if len(set(parameters)) < len(parameters) or not all(map(lies_as_kernels_read, parameters)):
                return None
            numbered = [(number, p) for (number, *_), p in zip(self._places, parameters, strict=True)]
            try:
                plan = _Plan(self._stages, source, numbered, backward_follows, self.saves_output)
            except (ValueError, IndexError, RuntimeError):
                return None
            results = plan.forward(source, parameters)
            if len(self._plans) == MOST_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return None if results is None else (plan, *results)

    def layer_by_layer(self, input: Tensor, *parameters: Tensor) -> Tensor:
        """The output by the layers' own operators, with these for their parameters."""
        named: list[dict[str, Tensor]] = [{} for _ in self._layers]
        for (_, i, _, name), parameter in zip(self._places, parameters, strict=True):
            named[i][name] = parameter
        for (layer, _), own in zip(self._layers, named, strict=True):
            input = torch.func.functional_call(layer, own, (input,))
        return input


class _ChainFunction(KernelFunction):
    @staticmethod
    def forward(ctx: Any, input: Tensor, done: tuple[_Chain, _Plan, Tensor, Tensor], *parameters: Tensor) -> Tensor:
        chain, plan, output, activations = done
        ctx.chain, ctx.plan = chain, plan
        ctx.save_for_backward(input, *parameters, activations, output if chain.saves_output else None)
        return _as_layers_return(output, input, parameters)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, *parameters, activations, output = ctx.saved_tensors
        needed = ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]
        by_layers = goes_through_op(grad_output) or goes_through_torch(grad_output)
        grads: Sequence[Tensor | None] | None = None
        if not by_layers:
            if needed[0]:  # else the pass is hardly for some of the parameters alone
                needed = wanted_in_this_pass(ctx, needed, input)
            if not any(needed):  # the pass ends at the output, whose node runs all the same
                return (None,) * len(ctx.needs_input_grad)
            grads = ctx.plan.backward(needed, _as_read(grad_output), _as_read(input), parameters, output, activations)
        if grads is None:  # or a parameter is laid out in another way than it was
            grads = differentiable_backward(ctx.chain.layer_by_layer, (input, *parameters), needed, grad_output)
            grads = grads if by_layers else [None if grad is None else grad.detach() for grad in grads]
        grad_input, *rest = grads
        if grad_input is not None and grad_input.dim() == 4:
            grad_input = grad_input.contiguous(memory_format=result_format(layout_of(input), layout_of(parameters[0])))
        return grad_input, None, *rest


def _as_read(tensor: Tensor) -> Tensor:
    """Images in channels_last, rows in row-major order."""
    return channels_last(tensor) if tensor.dim() == 4 else dense(tensor)


def _as_layers_return(output: Tensor, input: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """A chain's output in the layout that its layers give it."""
    if output.dim() == 2:
        return output
    images = (tensor for tensor in (input, *parameters) if tensor.dim() == 4)
    return output.contiguous(memory_format=result_format(*map(layout_of, images)))


# --------------------------------------------------------------------------------------------- a Sequential's chains


class _Parts:
    """What a Sequential calls one after another - chains, and layers that are in none -, kept in its ``__dict__``.

    A copy of the Sequential begins without: deep ones and pickles have none, and a shallow one, which shares this
    object, is not the owner.
    """

    def __init__(self, owner: torch.nn.Sequential) -> None:
        self.owner = weakref.ref(owner)
        self.made: tuple[list[tuple[Any, ...]], list[_Part]] | None = None  # from which state; other threads read it

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _parts_of(model: torch.nn.Sequential) -> list[_Part]:
    """Made anew where a layer, its class, hooks or arguments changed."""
    known: _Parts | None = vars(model).get(PARTS)
    if known is None or known.owner() is not model:
        known = vars(model)[PARTS] = _Parts(model)
    state, made = state_of(model), known.made
    if made is None or made[0] != state:
        made = known.made = state, list(_split(model._modules.values()))
    return made[1]


def _split(layers: Iterable[Any]) -> Iterator[_Part]:
    """Chains, which a convolution or a linear layer begins, and the layers that are in none."""
    chain: list[_Staged] = []
    dims: int | None = None  # that the chain's output has
    for layer in layers:
        takes = _input_dims(layer)
        try:
            stages = stages_of(layer)
        except ValueError:
            stages = None
        if any(isinstance(value, list) for value in arguments_of(layer)):  # it may change in place
            stages = None
        if stages is None or (takes is not None and takes != dims):
            yield from _parts_from(chain)
            chain = []
        if stages is None or not (chain or isinstance(layer, WEIGHTED)):
            yield layer
            continue
        chain.append((layer, stages))
        dims = 2 if isinstance(layer, torch.nn.Flatten) else takes or dims
    yield from _parts_from(chain)


def _parts_from(layers: Sequence[_Staged]) -> list[_Part]:
    """A chain, if there is enough for one; what comes after its last kernel is called by itself."""
    end = len(layers)
    while end > 0 and isinstance(layers[end - 1][0], (torch.nn.Flatten, torch.nn.Identity)):
        end -= 1
    several = sum(bool(stages) for _, stages in layers[:end]) > 1
    begin: list[_Part] = [_Chain(layers[:end])] if several else [layer for layer, _ in layers[:end]]
    return [*begin, *(layer for layer, _ in layers[end:])]


def _input_dims(layer: torch.nn.Module) -> int | None:
    """The dimensions of the input that a layer's stages take; None where they take any."""
    if isinstance(layer, (torch.nn.Conv2d, torch.nn.MaxPool2d)):
        return 4
    return 2 if isinstance(layer, torch.nn.Linear) else None
