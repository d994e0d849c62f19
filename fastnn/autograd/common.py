"""What every operator shares: the choice between kernel, op and torch, op registration, double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionMeta
from torch.utils.flop_counter import register_flop_formula

from fastnn import _C
from fastnn.runtime import kernel_dtypes_at, note_fallback, runs_on_cuda

_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))

# What torch's autocast does on CUDA: operators in its 16-bit dtype, operators in float32, and operators that it leaves.
_NARROWED_BY_AUTOCAST = frozenset(("linear", "conv2d"))
_WIDENED_BY_AUTOCAST = frozenset(("softmax", "log_softmax", "cross_entropy", "nll_loss", "mse_loss"))
_LEFT_BY_AUTOCAST = frozenset(("relu", "max_pool2d"))

_is_compiling = torch.compiler.is_compiling
_is_autocast_enabled = torch._C._is_any_autocast_enabled
_are_functorch_transforms_active = torch._C._are_functorch_transforms_active
_is_tracing = torch._C._get_tracing_state
_number_of_dispatch_modes = torch._C._len_torch_dispatch_stack
_has_storage = torch._C._has_storage


def route(operator: str, first: Tensor, second: Tensor | None = None, third: Tensor | None = None) -> str:
    """Which way a call goes, by its floating-point arguments: ``"kernel"``, or ``"record"`` for a kernel that autograd
    must record; ``"op"``, ``"torch"``, or ``"cast"`` where autocast wants it in a dtype that CUDA's kernels have (see
    :func:`in_autocast_dtype`)."""
    if not _is_compiling() and forward_ad._current_level < 0:
        way = _C.quick_way(first, second, third)
        if way is not None:
            return way
    return _route_with_care(operator, first, second, third)


def _route_with_care(operator: str, first: Tensor, *others: Tensor | None) -> str:
    """The same for every argument and mode, with the reason on record where torch serves."""
    tensors = (first, *others)
    plain = True
    for tensor in tensors:
        if tensor is None and first is not None:
            continue
        if type(tensor) not in _PLAIN_TYPES:
            plain = False
            if not isinstance(tensor, Tensor):
                if isinstance(tensor, torch.fx.Proxy):
                    return "op"
                raise TypeError(f"{operator}: expected torch.Tensor arguments, got {type(tensor).__name__}")
            if not isinstance(tensor, FakeTensor):
                return _fall_back(operator, f"tensor subclass {type(tensor).__name__}")
    if _is_autocast_enabled() and torch.is_autocast_enabled(first.device.type):
        serves = plain and runs_on_cuda(first) and not _is_compiling()
        if serves and (operator in _NARROWED_BY_AUTOCAST or operator in _WIDENED_BY_AUTOCAST):
            return "cast"
        if not serves or operator not in _LEFT_BY_AUTOCAST:
            return _fall_back(operator, "autocast")
    dtype, on_cpu = first.dtype, first.is_cpu
    dtypes = kernel_dtypes_at(first)
    if dtypes is None:
        return _fall_back(operator, f"device {first.device}")
    if dtype not in dtypes:
        return _fall_back(operator, f"dtype {dtype}")
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype is not dtype:
            return _fall_back(operator, f"dtypes {dtype} and {tensor.dtype}")
        if tensor.layout is not torch.strided:
            return _fall_back(operator, f"layout {tensor.layout}")
        if tensor.is_nested:
            return _fall_back(operator, "nested tensor")
        if not (on_cpu and tensor.is_cpu) and tensor.device != first.device:
            if tensor.is_meta or first.is_meta:
                raise ValueError(f"{operator}: expected tensors on one device, got some on meta, which have no memory")
            return _fall_back(operator, f"devices {first.device} and {tensor.device}")
    if not on_cpu and first.is_meta:
        plain = False
    if _are_functorch_transforms_active():
        return _fall_back(operator, "torch.func transform")
    if forward_ad._current_level >= 0:  # the ops have no tangents
        return _fall_back(operator, "forward-mode differentiation")
    if _is_compiling() or not plain or _number_of_dispatch_modes() > 0:  # a TorchDispatchMode sees ops
        return "op"
    if _is_tracing() is not None:
        return _fall_back(operator, "torch.jit tracing")
    return "record" if needs_grad(*tensors) else "kernel"


def in_autocast_dtype(
    operator: str, function: Callable[..., Tensor], *tensors: Tensor | None, **options: Any
) -> Tensor:
    """``function(*tensors, **options)`` on tensors in the dtype that autocast has for the operator, as autocast casts
    them: all floating-point tensors but those of float64."""
    first = tensors[0]
    assert first is not None
    device = first.device.type
    dtype = torch.float32 if operator in _WIDENED_BY_AUTOCAST else torch.get_autocast_dtype(device)
    cast = [t if t is None or t.dtype is torch.float64 or not t.is_floating_point() else t.to(dtype) for t in tensors]
    with torch.autocast(device, enabled=False):
        return function(*cast, **options)


def _fall_back(operator: str, reason: str) -> str:
    if not _is_compiling():
        note_fallback(operator, reason)
    return "torch"


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must record this call."""
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return torch.is_grad_enabled()
    return False


class _KernelFunctionMeta(FunctionMeta):
    def __init__(self: Any, name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> None:
        super().__init__(name, bases, attributes)
        if "backward" in attributes:
            self._backward_cls.apply = self.backward


class KernelFunction(torch.autograd.Function, metaclass=_KernelFunctionMeta):
    """An autograd.Function that :func:`route` guards: ``run`` is ``apply`` without its care for torch.func, and
    autograd calls ``backward`` without asking first whether the class has a ``vjp`` instead."""

    run: Callable[..., Any] = torch._C._FunctionBase.__dict__["apply"]


def dense(tensor: Tensor) -> Tensor:
    """The same values in row-major order, with the negative bit applied."""
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.resolve_neg().contiguous()


# On allocations: new_empty(2, 3) takes two thirds of the time of new_empty((2, 3)), and empty_like and
# new_empty_strided take half of that of torch.empty(..., dtype=, device=).


def empty_dense(like: Tensor) -> Tensor:
    """Uninitialised memory of this shape in row-major order (half the time of torch.empty with a shape)."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def empty_scalar(like: Tensor) -> Tensor:
    return like.new_empty_strided((), ())


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels keep sums of such values in: float32 for those of 16 bits."""
    return torch.float32 if dtype.itemsize == 2 else dtype


def empty_divisor(like: Tensor) -> Tensor:
    """For the divisor of a mean."""
    return like.new_empty_strided((), (), dtype=sum_dtype(like.dtype))


def allows_tf32(tensor: Tensor, operator: str) -> bool:
    """Whether torch's switch for `operator`, "matmul" or "conv", lets this tensor's products be rounded to tf32."""
    return tensor.is_cuda and torch._C._get_fp32_precision_getter("cuda", operator) == "tf32"


def gapless(tensor: Tensor) -> Tensor:
    """The same values without gaps between them, in any order of dimensions; the negative bit applied."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.is_contiguous():
        return tensor
    like = torch.empty_like(tensor)
    return tensor if like.stride() == tensor.stride() else like.copy_(tensor)


def laid_out_as(like: Tensor, tensor: Tensor) -> Tensor:
    """The same values with the strides of `like`, which has no gaps; the negative bit applied."""
    if tensor.stride() == like.stride() and not tensor.is_neg():
        return tensor
    return torch.empty_like(like).copy_(tensor)


_library = torch.library.Library("fastnn", "DEF")


def define_op(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> Any:
    """Registers ``torch.ops.fastnn.<name>`` for CPU and CUDA tensors and returns its overload.

    `flops` is what FlopCounterMode counts for a call, from its arguments with shapes for tensors.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    _library.impl(name, implementation, "CPU")
    _library.impl(name, implementation, "CUDA")
    torch.library.register_fake(f"fastnn::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"fastnn::{name}", backward, setup_context=setup_context, lib=_library)
    operator = getattr(torch.ops.fastnn, name)
    if flops is not None:
        register_flop_formula(operator)(flops)
    return operator.default


def goes_through_op(grad_output: Tensor) -> bool:
    """Whether backward must call its op: for a compiler or a tracer, which runs it on tensors without memory, for
    tensors on meta, and for a TorchDispatchMode, which sees ops. These have no tangents."""
    has_memory = type(grad_output) is Tensor and not grad_output.is_meta
    sees_ops = not has_memory or _is_compiling() or _number_of_dispatch_modes() > 0
    return sees_ops and forward_ad._current_level < 0


def goes_through_torch(grad_output: Tensor) -> bool:
    """Whether backward must use torch's operations: its result is differentiated again, by either mode, or vmap batches
    it."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or not _has_storage(grad_output)


# Elements of input and weight from which on a gradient takes longer than the question whether anyone wants it.
_WORTH_ASKING = 1 << 14

_engine_will_run = torch._C._will_engine_execute_node


def wanted_in_this_pass(ctx: Any, needed: tuple[bool, ...], largest: Tensor) -> tuple[bool, ...]:
    """`needed`, of the function's first tensors, without the gradients that this backward pass is not for:
    ``autograd.grad(loss, images)`` leaves out those of the weights. torch's operators do so by themselves, and
    ``ctx.needs_input_grad`` does not tell. `largest` is the input or weight whose size says whether to ask."""
    if largest.numel() < _WORTH_ASKING or sum(needed) < 2:
        return needed
    edges = ctx.next_functions
    return tuple([need and _runs(edges[i][0]) for i, need in enumerate(needed)])


def _runs(node: Any) -> bool:
    try:
        return _engine_will_run(node)
    except RuntimeError:  # a leaf that autograd.grad was asked for, or a backward pass that the engine does not run
        return True


def empty_like_if(needed: bool, like: Tensor, shape: Sequence[int]) -> Tensor:
    """What a backward op's fake returns: a gradient of this shape, or the empty tensor that stands for none."""
    return like.new_empty(shape if needed else (0,))


def wanted(grads: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """A backward op's results as autograd takes them: None where no gradient was needed."""
    return tuple(grad if need else None for grad, need in zip(grads, needed, strict=True))


def before_relu(grad_output: Tensor, output: Tensor | None) -> Tensor:
    """The gradient before the ReLU that gave `output`, if there was one, by torch's operations.

    It is a function of `output` whose derivative is zero: a second derivative of a ReLU is zeros, not absent.
    """
    return grad_output if output is None else torch.ops.aten.threshold_backward(grad_output, output, 0)


def differentiable_backward(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad_output: Tensor,
) -> list[Tensor | None]:
    """Gradients of `function` (plain PyTorch) that can be differentiated again: backward under create_graph=True.

    The function is evaluated anew on aliases of its inputs, so that each gradient is the partial derivative even
    where one input was computed from another. Where vmap batches a backward pass that nobody differentiates again,
    they require no gradient, like a kernel's.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [
            torch.ops.aten.alias(x) if need and x is not None else x for x, need in zip(inputs, needed, strict=True)
        ]
        sources = [x for x, need in zip(aliases, needed, strict=True) if need and x is not None]
        output = function(*aliases)
    grads = iter(torch.autograd.grad(output, sources, grad_output, create_graph=create_graph))
    return [next(grads) if need and x is not None else None for x, need in zip(inputs, needed, strict=True)]
