"""Optimizers: torch.optim's classes with the update on fastnn's kernels, all tensors of a group in one pass.

Each subclasses its torch namesake: constructor arguments, parameter groups, hooks, learning-rate schedulers and
state keys are torch's own, and a ``state_dict`` moves both ways. Dense parameters whose device and dtype have kernels
take them; others, and ``differentiable=True``, take torch's update with the same result.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.optim.sgd import sgd as torch_sgd

from fastnn import _C
from fastnn.runtime import kernel_dtypes_at, note_fallback, runs_on_cuda

__all__ = ["SGD", "Adam", "AdamW", "convert"]

_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
_GRAD_TYPES = frozenset((Tensor,))
_is_neg = Tensor.is_neg


def _is_covered(param: Tensor, grad: Tensor, state: dict[str, Any]) -> bool:
    """Whether a kernel serves this parameter: its device and dtype have kernels, its gradient is strided, and its state
    of the same dtype."""
    return (
        _are_plain([param], [grad])
        and _has_kernel(param)
        and grad.dtype is param.dtype
        and grad.device == param.device
        and grad.layout is torch.strided
        and all(t.dtype is param.dtype for name, t in state.items() if name != "step" and isinstance(t, Tensor))
    )


def _has_kernel(param: Tensor) -> bool:
    return param.dtype in (kernel_dtypes_at(param) or ())


def _are_plain(params: list[Tensor], grads: list[Tensor]) -> bool:
    """Whether memory is all there is to these tensors: no subclasses, no negative bits."""
    return (
        _PLAIN_TYPES.issuperset(map(type, params))
        and _GRAD_TYPES.issuperset(map(type, grads))
        and not any(map(_is_neg, params))
        and not any(map(_is_neg, grads))
    )


def _share_memory(params: list[Tensor]) -> bool:
    """Whether two of them, without gaps each, have an element in common."""
    ranges = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in params if p.numel() > 0)
    return any(begin < end for (_, end), (begin, _) in itertools.pairwise(ranges))


def _laid_out_as(param: Tensor, tensor: Tensor) -> Tensor:
    """The same values with the parameter's strides, or those of a dense copy where the parameter has gaps."""
    copy = torch.empty_like(param)
    return tensor if tensor.stride() == copy.stride() else copy.copy_(tensor)


def _reason_for_torch(group: dict[str, Any], param: Tensor) -> str:
    """Why a group's options need torch's update of a parameter, or ""."""
    if torch.compiler.is_compiling():
        return "torch.compile"
    if group["differentiable"]:
        return "differentiable=True"
    return "capturable=True" if group.get("capturable") and not runs_on_cuda(param) else ""


def _number(value: float | Tensor, param: Tensor) -> float | Tensor:
    """An option as the kernels take it: a tensor stays one, which they read when they run."""
    return value.to(param.device, torch.float64) if isinstance(value, Tensor) else float(value)


def _steps(params: list[Tensor], states: list[dict[str, Any]]) -> list[Tensor]:
    """The step counts of Adam, where the kernels want them: on CUDA in the device's memory, as float32."""
    if runs_on_cuda(params[0]):
        for param, state in zip(params, states, strict=True):
            step = state["step"]
            if step.device != param.device or step.dtype is not torch.float32:
                state["step"] = step.to(param.device, torch.float32)
    return [state["step"] for state in states]


def _without_dynamo(name: str) -> Any:
    """A method of torch's optimizers that does not import torch._dynamo, which takes a second.

    Where nothing has imported it yet, nothing is being compiled, and what torch wraps with it does as well alone.
    """
    wrapped = getattr(torch.optim.Optimizer, name)
    plain = inspect.unwrap(wrapped)

    @functools.wraps(plain)
    def method(self: torch.optim.Optimizer, *args: Any, **options: Any) -> Any:
        return (wrapped if "torch._dynamo" in sys.modules else plain)(self, *args, **options)

    return method


def has_step_of_class(optimizer: torch.optim.Optimizer) -> bool:
    """Whether calling the optimizer's step calls that of its class, at most through a scheduler's wrapper."""
    step = vars(optimizer).get("step")
    return step is None or getattr(step, "__wrapped__", None) is type(optimizer).step


def is_hooked(optimizer: Any) -> bool:
    """Whether hooks see the optimizer's steps."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def _is_profiled() -> bool:
    """Whether torch's profiler, or its compiler, is to see what happens."""
    return torch.compiler.is_compiling() or torch._C._autograd._profiler_enabled()


# The code of what torch makes of a class's step.
_TORCHS_WRAPPER = torch.optim.Optimizer.profile_hook_step(lambda self: None).__code__  # type: ignore[attr-defined]


class _KernelUpdate(torch.optim.Optimizer):
    """``step`` of the optimizers below: torch's update for what no kernel serves, then one kernel call a dtype."""

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False: GradScaler then unscales the gradients itself instead of handing its scale to step()."""
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """torch's constructors set it for fused=True."""

    # torch wraps these to keep them out of compiled graphs, and for that imports torch._dynamo.
    add_param_group = _without_dynamo("add_param_group")
    state_dict = _without_dynamo("state_dict")
    load_state_dict = _without_dynamo("load_state_dict")
    _zero_grad = _without_dynamo("zero_grad")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Takes the gradients away, or with ``set_to_none=False`` fills them with zeros."""
        if _is_profiled() or not set_to_none:
            self._zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; `closure` reevaluates the model and returns the loss."""
        # An overriding class's step, which calls this one, is wrapped by torch: hooks are called there.
        is_wrapped = getattr(type(self).step, "__code__", None) is _TORCHS_WRAPPER
        if not is_wrapped and (_is_profiled() or is_hooked(self)):
            return self._wrapped_step() if closure is None else self._wrapped_step(closure)
        return self._step(closure)

    # Keeps torch from wrapping it to call hooks and tell the profiler, also where there is neither: 6 microseconds.
    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    _wrapped_step = torch.optim.Optimizer.profile_hook_step(_step)

    def update(self) -> bool:
        """``step`` without closure and hooks; whether kernels did it alone, each on the tensors themselves."""
        alone = True
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            for param in group["params"]:
                grad = param.grad
                if grad is not None:
                    params.append(param)
                    grads.append(grad)
            if params and not self._try_kernel(group, params, grads):
                self._update_apart(group, params)
                alone = False
        return alone

    def _try_kernel(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> bool:
        """Updates a group that one kernel call serves - the usual case - or changes nothing and returns False.

        The binding checks every tensor before it changes any; asking first would take as long as the update.
        """
        first = params[0]
        if _reason_for_torch(group, first) or not _has_kernel(first):
            return False
        if not _are_plain(params, grads):
            return False
        try:
            self._update_with_kernel(group, params, grads, self._call)
        except (TypeError, ValueError, RuntimeError):
            return False
        return True

    def _update_apart(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Updates what no kernel serves with torch, then the rest with one kernel call a dtype."""
        reason = _reason_for_torch(group, params[0]) or (
            "parameters that share memory" if _share_memory(params) else ""
        )
        covered: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        rest = []
        for param in params:
            grad = param.grad
            assert grad is not None
            if not reason and _is_covered(param, grad, self.state.get(param, {})):
                covered.setdefault((param.device, param.dtype), []).append(param)
            else:
                rest.append(param)
        if rest:  # first: what torch refuses then leaves every parameter as it was
            if not torch.compiler.is_compiling():
                reason = reason or f"{rest[0].dtype} {rest[0].layout} on {rest[0].device}"
                note_fallback(type(self).__name__.lower(), reason)
            with torch.set_grad_enabled(self.defaults["differentiable"]):  # as torch's step
                self._update_with_torch(group, rest)
        for served in covered.values():
            grads = [param.grad for param in served]
            self._update_with_kernel(group, served, grads, self._call_on_copies)  # type: ignore[arg-type]

    def _update_with_torch(self, group: dict[str, Any], params: list[Tensor]) -> None:
        raise NotImplementedError

    def _update_with_kernel(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], call: Callable[..., None]
    ) -> None:
        raise NotImplementedError

    def _call_on_copies(
        self, kernel: Callable[..., None], params: list[Tensor], lists: dict[str, list[Tensor]]
    ) -> None:
        """As `_call`, where strides differ on copies."""
        dense = [_laid_out_as(param, param.detach()) for param in params]
        for tensors in lists.values():
            tensors[:] = map(_laid_out_as, params, tensors)
        self._call(kernel, dense, lists)
        for key in lists.keys() - {"grad"}:
            for param, tensor in zip(params, lists[key], strict=True):
                self.state[param][key] = tensor
        with torch.no_grad():
            for param, copy in zip(params, dense, strict=True):
                if copy.data_ptr() != param.data_ptr():
                    param.copy_(copy)

    @staticmethod
    def _call(kernel: Callable[..., None], params: list[Tensor], lists: dict[str, list[Tensor]]) -> None:
        """``kernel(params, *lists)``, which then count as modified.

        `lists` are the gradients, by the name "grad", and the state tensors by their names.
        """
        kernel(params, *lists.values())
        changed = list(params)
        for key, tensors in lists.items():
            if key != "grad":
                changed += tensors
        torch.autograd.graph.increment_version(changed)


class Adam(_KernelUpdate, torch.optim.Adam):
    """Adam (Kingma and Ba, 2015), with torch's options and state.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as in
            :class:`torch.optim.Adam`.
        foreach, fused, capturable, differentiable: as in torch for parameters that no kernel serves; the kernels
            always update all tensors at once.

    Equivalent to::

        torch.optim.Adam(params, lr, betas, eps, weight_decay, amsgrad, fused=True)
    """

    def _update_with_kernel(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], call: Callable[..., None]
    ) -> None:
        states = [self.state[param] for param in params]
        if not all(states):  # torch's own code makes the state
            new = [param for param, state in zip(params, states, strict=True) if not state]
            self._init_group({**group, "params": new, "foreach": False}, [], [], [], [], [], [])
        keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")
        lists: dict[str, list[Tensor]] = {"grad": grads}
        lists.update({key: [state[key] for state in states] for key in keys})
        steps = _steps(params, states)
        lr, beta1, beta2 = (_number(value, params[0]) for value in (group["lr"], *group["betas"]))

        def kernel(params: list[Tensor], grads: list[Tensor], *moments: list[Tensor]) -> None:
            exp_avgs, exp_avg_sqs, *rest = moments
            _C.adam_step(
                params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                rest[0] if rest else [],
                steps,
                lr,
                beta1,
                beta2,
                float(group["eps"]),
                float(group["weight_decay"]),
                group["decoupled_weight_decay"],
                group["amsgrad"],
                group["maximize"],
            )

        call(kernel, params, lists)
        torch.autograd.graph.increment_version(steps)

    def _update_with_torch(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads: list[Tensor] = []
        exp_avgs: list[Tensor] = []
        exp_avg_sqs: list[Tensor] = []
        max_exp_avg_sqs: list[Tensor] = []
        steps: list[Tensor] = []
        self._init_group({**group, "params": params}, [], grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
        beta1, beta2 = group["betas"]
        torch_adam(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            steps,
            amsgrad=group["amsgrad"],
            has_complex=any(param.is_complex() for param in params),
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            foreach=group["foreach"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            fused=group["fused"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
        )


class AdamW(Adam, torch.optim.AdamW):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), with torch's options and state.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: as in :class:`torch.optim.AdamW`.
        foreach, fused, capturable, differentiable: as in torch for parameters that no kernel serves; the kernels
            always update all tensors at once.

    Equivalent to::

        torch.optim.AdamW(params, lr, betas, eps, weight_decay, amsgrad, fused=True)
    """


class SGD(_KernelUpdate, torch.optim.SGD):
    """Stochastic gradient descent with momentum (Sutskever et al., 2013), with torch's options and state.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in :class:`torch.optim.SGD`.
        foreach, fused, differentiable: as in torch for parameters that no kernel serves.

    Equivalent to::

        torch.optim.SGD(params, lr, momentum, dampening, weight_decay, nesterov, fused=True)
    """

    def _update_with_kernel(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], call: Callable[..., None]
    ) -> None:
        lr, momentum = (_number(value, params[0]) for value in (group["lr"], group["momentum"]))
        lists: dict[str, list[Tensor]] = {"grad": grads}
        first: list[bool] = []
        if isinstance(momentum, Tensor) or momentum != 0:
            held = [self.state[param].get("momentum_buffer") for param in params]
            first = [buffer is None for buffer in held]
            lists["momentum_buffer"] = [
                torch.empty_like(param) if buffer is None else buffer
                for param, buffer in zip(params, held, strict=True)
            ]

        def kernel(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor] | None = None) -> None:
            _C.sgd_step(
                params,
                grads,
                buffers or [],
                first,
                lr,
                momentum,
                float(group["dampening"]),
                float(group["weight_decay"]),
                group["nesterov"],
                group["maximize"],
            )

        call(kernel, params, lists)
        if any(first):  # only now do they hold anything
            for param, buffer in zip(params, lists["momentum_buffer"], strict=True):
                self.state[param]["momentum_buffer"] = buffer

    def _update_with_torch(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads: list[Tensor] = []
        buffers: list[Tensor | None] = []
        has_sparse_grad = self._init_group({**group, "params": params}, [], grads, buffers)
        torch_sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=has_sparse_grad,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            foreach=group["foreach"],
            fused=group["fused"],
        )
        if group["momentum"] != 0:
            for param, buffer in zip(params, buffers, strict=True):
                self.state[param]["momentum_buffer"] = buffer


_OPTIMIZERS: dict[type, type] = {getattr(torch.optim, name): globals()[name] for name in ("SGD", "Adam", "AdamW")}


def convert(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Makes a torch optimizer one of this module's, in the middle of training, too.

    The object stays and becomes another class: parameter groups, state, hooks, and the learning-rate schedulers and
    gradient scalers that refer to it go on as before.

    Args:
        optimizer: a ``torch.optim.SGD``, ``Adam`` or ``AdamW``; one of this module's is left as it is.

    Returns:
        ``optimizer``.

    Raises:
        TypeError: for other classes, subclasses too, since their update may be another; and where something other than
            a scheduler replaced ``optimizer.step``.

    Equivalent to (but for what refers to the old one)::

        new = fastnn.optim.Adam(optimizer.param_groups)
        new.load_state_dict(optimizer.state_dict())
    """
    before: Any = type(optimizer)
    if before in _OPTIMIZERS.values():
        return optimizer
    if before not in _OPTIMIZERS:
        raise TypeError(f"optimizer: expected a torch.optim.SGD, Adam or AdamW, got {before.__name__}")
    if not has_step_of_class(optimizer):
        raise TypeError(f"optimizer: expected the step of {before.__name__}, got one that replaces it")
    optimizer.__class__ = _OPTIMIZERS[before]
    optimizer._patch_step_function()  # what a constructor does, since the class's step may not run hooks yet
    if "step" in vars(optimizer):
        _tell_schedulers(optimizer)
    return optimizer


def _tell_schedulers(optimizer: Any) -> None:
    """Puts the class's step under what learning-rate schedulers lay around it: they look whether it was called."""
    reference, function = weakref.ref(optimizer), type(optimizer).step

    @functools.wraps(function)
    def step(*args: Any, **kwargs: Any) -> Any:
        owner: Any = reference()
        owner._opt_called = True
        return function(owner, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = step
