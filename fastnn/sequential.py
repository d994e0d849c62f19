"""Layers of a Sequential that follow each other as one call, and one node of autograd.

To call layers as modules, with a node and tensors for each, takes a small network as long as half of its kernels. A
chain of layers records the calls of its stages (:mod:`fastnn.stages`) once for each shape of input, in one program for
the forward and one for the backward pass, and gives these the tensors of each call: no memory is kept between calls.
Where autograd records nothing, a shape's second call makes a program that keeps nothing for a backward pass.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from fastnn.autograd.conv2d import (
    channels_last,
    channels_last_strides,
    layout_of,
    lies_as_kernels_read,
    result_format,
)
from fastnn.stages import PARAMETERS, WEIGHTED, Backward, Memory, stages_of, state_of

__all__ = ["PARTS", "call_in_order"]

# That a chain keeps with a backward pass, and without. With another it starts anew.
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

    def __init__(self, parameters: Mapping[Tensor, Tensor], device: torch.device, backward_follows: bool) -> None:
        self.parameters = parameters  # what stands for each
        self.backward_follows = backward_follows
        self.made: list[Tensor] = []
        self._device = device

    def at(self, parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else self.parameters[parameter]

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
        # The layout that a tensor without memory has; the address comes from a tensor of no elements on the device.
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        strides = torch.empty(shape, device="meta", memory_format=memory_format).stride()
        self.made.append(_C.stand_in(torch.empty(0, dtype=dtype, device=self._device), shape, strides))
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
    """The same for tensors of which each is made from the one before alone, as without winners for a backward pass, and
    in the backward pass."""
    room = max(map(_room, tensors), default=0)
    return [i % 2 * room for i in range(len(tensors))], 2 * room


class _Plan:
    """The forward pass of a chain as a program, for one shape of input and one layout of the parameters.

    It holds no parameter: these may be replaced.

    Args:
        layers: of the chain.
        source: an input as the first stage reads it.
        parameters: of the chain, and the number of the layer that each belongs to.
        backward_follows: whether there is a backward pass.
        saves_output: whether it reads the output.
    """

    def __init__(
        self,
        layers: Sequence[torch.nn.Module],
        source: Tensor,
        parameters: Sequence[tuple[int, Tensor]],
        backward_follows: bool,
        saves_output: bool,
    ) -> None:
        of_layers = [stages_of(layer) for layer in layers]
        given = {parameter: _stand_in(parameter) for _, parameter in parameters}
        memory = _StandIns(given, source.device, backward_follows)
        stands_for_source = output = _stand_in(source)
        backwards: list[Backward] = []

        def forward() -> None:
            nonlocal output
            for stage in itertools.chain.from_iterable(of_layers):
                output, backward = stage(memory, output)
                backwards.append(backward)

        self._program = _C.Program()
        self._program.record(forward)
        memory.parameters = {}
        self._output = output
        self._shape = tuple(output.shape)
        activations = [tensor for tensor in memory.made if tensor is not output]
        layout = _side_by_side if backward_follows else _by_turns
        offsets, self._activation_bytes = layout(activations)
        slots = [stands_for_source, *given.values()]
        places = [*zip(activations, offsets, strict=True)]
        self._program.place([*slots, output], [(t, len(slots) + 1, offset) for t, offset in places])
        self.backward_pass: _BackwardPlan | None = None
        if backward_follows:
            first_stages = [*itertools.accumulate(map(len, of_layers), initial=0)]
            trained = [(first_stages[number], given[parameter]) for number, parameter in parameters]
            self.backward_pass = _BackwardPlan(memory, backwards, slots, trained, output, saves_output, places)

    def forward(
        self, source: Tensor, parameters: Sequence[Tensor], named: torch.memory_format
    ) -> tuple[Tensor, Tensor] | None:
        """The output, and the memory of what lies before it; None where a tensor is laid out in another way.

        `named` is the format that strides of images of one channel or pixel are named by.
        """
        strides = self._output.stride() if len(self._shape) == 2 else channels_last_strides(self._shape, named)
        output = source.new_empty_strided(self._shape, strides)
        activations = source.new_empty(self._activation_bytes, dtype=torch.uint8)
        return (output, activations) if self._program.run_on([source, *parameters, output, activations]) else None


class _BackwardPlan:
    """The backward pass of a plan as programs, one for each choice of gradients.

    Args:
        memory: of the forward pass.
        stages: of the backward pass, in the order of the forward pass.
        given: what stands for the input and the parameters.
        parameters: what stands for them, and the number of the stage that each belongs to.
        output: what stands for the output.
        saves_output: whether the stages read it.
        activations: what stands for them, and where each begins in their memory.
    """

    def __init__(
        self,
        memory: _StandIns,
        stages: Sequence[Backward],
        given: Sequence[Tensor],
        parameters: Sequence[tuple[int, Tensor]],
        output: Tensor,
        saves_output: bool,
        activations: Sequence[tuple[Tensor, int]],
    ) -> None:
        self._memory, self._stages, self._given, self._parameters = memory, stages, given, parameters
        self._output, self._saved_output, self._activations = output, [output] if saves_output else [], activations
        self._programs: dict[tuple[bool, ...], tuple[_C.Program, int]] = {}
        self._recording = threading.Lock()

    def _record(self, needed: tuple[bool, ...]) -> tuple[_C.Program, int]:
        """The pass to these of the input and the parameters, and the bytes that its stages hand on."""
        needs_input, *needs = needed
        trained = [pair for pair, need in zip(self._parameters, needs, strict=True) if need]
        memory = self._memory
        memory.made, memory.grads = [], {parameter: _stand_in(parameter) for _, parameter in trained}
        grad_output = _stand_in(self._output)
        grad: Tensor | None = grad_output
        first = -1 if needs_input else min(number for number, _ in trained)

        def backward_pass() -> None:
            nonlocal grad
            for number in reversed(range(max(first, 0), len(self._stages))):
                assert grad is not None
                grad = self._stages[number](grad, number > first)

        program = _C.Program()
        program.record(backward_pass)
        between = [tensor for tensor in memory.made if tensor is not grad]
        offsets, between_bytes = _by_turns(between)
        grad_input = [grad] if needs_input and grad is not None else []
        slots = [*self._given, grad_output, *memory.grads.values(), *self._saved_output, *grad_input]
        pieces = [(tensor, len(slots), offset) for tensor, offset in self._activations]
        pieces += [(tensor, len(slots) + 1, offset) for tensor, offset in zip(between, offsets, strict=True)]
        program.place(slots, pieces)
        return program, between_bytes

    def run(
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
            if needed not in self._programs:
                self._programs[needed] = self._record(needed)
            program, between_bytes = self._programs[needed]
        grad_input, *grads = (
            torch.empty_like(t) if need else None for t, need in zip((source, *parameters), needed, strict=True)
        )
        between = source.new_empty(between_bytes, dtype=torch.uint8)
        made = [tensor for tensor in (*grads, output, grad_input) if tensor is not None]
        done = program.run_on([source, *parameters, grad_output, *made, activations, between])
        return (grad_input, *grads) if done else None


# ----------------------------------------------------------------------------------------------------------- a chain


class _Chain:
    """Layers that follow each other as one call. All have stages, the first and the last at least one."""

    def __init__(self, layers: Sequence[torch.nn.Module]) -> None:
        self._layers = layers
        self._input_dims = _input_dims(layers[0])
        self._returns_images = self._input_dims == 4 and not any(isinstance(x, torch.nn.Flatten) for x in layers)
        last: Any = layers[-1]
        # Whether the backward pass reads the output, as a ReLU's does.
        self.saves_output = isinstance(last, torch.nn.ReLU) or (
            getattr(last, "activation", None) is not None and getattr(last, "max_pool", None) is None
        )
        # Each parameter's place: the number of its layer, the layer, and its name.
        self._places = [
            (number, layer, name)
            for number, layer in enumerate(layers)
            if isinstance(layer, WEIGHTED)
            for name in PARAMETERS
            if layer._parameters[name] is not None
        ]
        # By shape of the input and torch's switches, without a backward pass and with.
        self._plans: dict[bool, dict[Any, _Plan | None]] = {False: {}, True: {}}
        self._cuts: dict[int, list[_Part]] = {}
        self._unread: dict[tuple[bool, ...], list[int]] = {}

    def __call__(self, input: Any) -> Any:
        parameters: list[Any] = [layer._parameters[name] for _, layer, name in self._places]
        way = self._way(input, parameters)
        if way == "record":
            begin = 0 if input.requires_grad else self._first_trained(parameters)
            if begin > 0:  # autograd sees nothing of the layers before it
                return _through(self._cut_at(begin), input)
            results = self._compute(input, parameters, backward_follows=True)
            if results is not None:
                return _ChainFunction.run((self, *results), input, *parameters)
        elif way == "kernel":
            results = self._compute(input, parameters, backward_follows=False)
            if results is not None:
                _, output, _, memory_format = results
                return output.contiguous(memory_format=memory_format)
        return _through(self._layers, input)

    def _way(self, input: Any, parameters: list[Tensor]) -> str | None:
        """``"kernel"``, or ``"record"`` where autograd records the call; None where kernels do not serve it."""
        if (
            forward_ad._current_level < 0
            and _hooks_on_saved_tensors(True) is None
            and (way := _C.quick_way(input, *parameters)) is not None
            and input.dim() == self._input_dims
            and input.numel() > 0
            and not any(map(Tensor.is_neg, parameters))  # no part of a tensor's layout, by which programs know it
        ):
            return way
        return None

    def _first_trained(self, parameters: Sequence[Tensor]) -> int:
        """The number of the first layer with a parameter that requires a gradient."""
        for (number, _, _), parameter in zip(self._places, parameters, strict=True):
            if parameter.requires_grad:
                return number
        raise AssertionError("autograd records a call without trained parameters")

    def _cut_at(self, begin: int) -> list[_Part]:
        """The parts of the layers before `begin`, and of those from there on."""
        if begin not in self._cuts:
            self._cuts[begin] = [*_parts_from(self._layers[:begin]), *_parts_from(self._layers[begin:])]
        return self._cuts[begin]

    def _compute(
        self, input: Tensor, parameters: list[Tensor], backward_follows: bool
    ) -> tuple[_Plan, Tensor, Tensor, torch.memory_format] | None:
        """The plan for this call, the output, memory with what the backward pass needs, and the format in which the
        layers return it; None where no plan can express the call or is worth its making, or the layers have to say
        what does not fit."""
        memory_format = torch.contiguous_format
        if self._returns_images:
            memory_format = result_format(*(layout_of(tensor) for tensor in (input, *parameters) if tensor.dim() == 4))
        plans = self._plans[backward_follows]
        key = input.shape, allows_tf32(input, "conv"), allows_tf32(input, "matmul")
        plan = plans.get(key)
        if plan is not None:
            results = plan.forward(_as_read(input), parameters, memory_format)
            if results is not None:
                return plan, *results, memory_format
        if key not in plans and len(plans) >= MOST_PLANS:
            plans.clear()
        if key not in plans and not backward_follows:
            plans[key] = None  # to make a plan takes longer than the layers do, and this may be the shape's only call
            return None
        if len(set(parameters)) < len(parameters) or not all(map(lies_as_kernels_read, parameters)):
            return None
        source = _as_read(input)
        numbered = [(number, p) for (number, *_), p in zip(self._places, parameters, strict=True)]
        try:
            plan = _Plan(self._layers, source, numbered, backward_follows, self.saves_output)
        except (ValueError, IndexError, RuntimeError):
            return None
        plans[key] = plan
        results = plan.forward(source, parameters, memory_format)
        return None if results is None else (plan, *results, memory_format)

    def unread_in(self, needed: tuple[bool, ...]) -> list[int]:
        """Which of the input and the parameters the backward pass to these of them does not read: the numbers."""
        if needed not in self._unread:
            needs_input, needs_first_weight, *_ = needed
            unread = [] if needs_first_weight else [0]
            for i, (number, _, name) in enumerate(self._places, start=1):
                if name == "bias" or (number == 0 and not needs_input):
                    unread.append(i)
            self._unread[needed] = unread
        return self._unread[needed]

    def layer_by_layer(self, input: Tensor, *parameters: Tensor) -> Tensor:
        """The output by the layers' own operators, with these for their parameters."""
        named: list[dict[str, Tensor]] = [{} for _ in self._layers]
        for (number, _, name), parameter in zip(self._places, parameters, strict=True):
            named[number][name] = parameter
        for layer, own in zip(self._layers, named, strict=True):
            input = torch.func.functional_call(layer, own, (input,))
        return input


class _ChainFunction(KernelFunction):
    @staticmethod
    def forward(
        ctx: Any, done: tuple[_Chain, _Plan, Tensor, Tensor, torch.memory_format], input: Tensor, *parameters: Tensor
    ) -> Tensor:
        chain, plan, output, activations, memory_format = done
        ctx.chain, ctx.plan = chain, plan.backward_pass
        given = [input, *parameters]
        saved: list[Tensor | None] = [*given, activations, output if chain.saves_output else None]
        ctx.unread = unread = []
        for i in chain.unread_in(ctx.needs_input_grad[1:]):
            unread.append((i, given[i], None if given[i].is_inference() else given[i]._version))
            saved[i] = None
        ctx.save_for_backward(*saved)
        return output.contiguous(memory_format=memory_format)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = [*ctx.saved_tensors]
        for i, tensor, _ in ctx.unread:
            saved[i] = tensor
        input, *parameters, activations, output = saved
        needed = ctx.needs_input_grad[1:]
        by_layers = goes_through_op(grad_output) or goes_through_torch(grad_output)
        grads: Sequence[Tensor | None] | None = None
        if not by_layers:
            if needed[0]:  # else the pass is hardly for some of the parameters alone
                needed = wanted_in_this_pass(ctx, needed, input)
            if not any(needed):  # the pass ends at the output, whose node runs all the same
                return (None,) * len(ctx.needs_input_grad)
            grads = ctx.plan.run(needed, _as_read(grad_output), _as_read(input), parameters, output, activations)
        if grads is None:  # or a parameter is laid out in another way than it was
            _check_unchanged(ctx.unread)
            grads = differentiable_backward(ctx.chain.layer_by_layer, (input, *parameters), needed, grad_output)
            grads = grads if by_layers else [None if grad is None else grad.detach() for grad in grads]
        grad_input, *rest = grads
        if grad_input is not None and grad_input.dim() == 4:
            grad_input = grad_input.contiguous(memory_format=result_format(layout_of(input), layout_of(parameters[0])))
        return None, grad_input, *rest


def _check_unchanged(tensors: Iterable[tuple[int, Tensor, int | None]]) -> None:
    """What autograd asks of saved tensors, for those with their versions that the backward pass alone does not read."""
    for _, tensor, version in tensors:
        if version is not None and tensor._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"expected a tensor of shape {tuple(tensor.shape)} at version {version}, got {tensor._version}"
            )


def _as_read(tensor: Tensor) -> Tensor:
    """Images in channels_last, rows in row-major order."""
    return channels_last(tensor) if tensor.dim() == 4 else dense(tensor)


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
    chain: list[torch.nn.Module] = []
    dims: int | None = None  # that the chain's output has
    for layer in layers:
        takes = _input_dims(layer)
        fits = _may_be_chained(layer)
        if not fits or (takes is not None and takes != dims):
            yield from _parts_from(chain)
            chain = []
        if not fits or not (chain or isinstance(layer, WEIGHTED)):
            yield layer
            continue
        chain.append(layer)
        dims = 2 if isinstance(layer, torch.nn.Flatten) else takes or dims
    yield from _parts_from(chain)


def _may_be_chained(layer: Any) -> bool:
    try:
        stages_of(layer)
    except ValueError:
        return False
    return True


def _parts_from(layers: Sequence[torch.nn.Module]) -> list[_Part]:
    """A chain, if there is enough for one; what comes after its last kernel is called by itself."""
    end = len(layers)
    while end > 0 and isinstance(layers[end - 1], (torch.nn.Flatten, torch.nn.Identity)):
        end -= 1
    several = sum(not isinstance(layer, torch.nn.Identity) for layer in layers[:end]) > 1
    begin: list[_Part] = [_Chain(layers[:end])] if several else [*layers[:end]]
    return [*begin, *layers[end:]]


def _input_dims(layer: Any) -> int | None:
    """The dimensions of the input that a layer's stages take; None where they take any."""
    if isinstance(layer, (torch.nn.Conv2d, torch.nn.MaxPool2d)):
        return 4
    return 2 if isinstance(layer, torch.nn.Linear) else None
