"""Optimizers: torch.optim's classes with the update on fastnn's kernels, all tensors of a group in one pass.

Each subclasses its torch namesake: constructor arguments, parameter groups, hooks, learning-rate schedulers and
state keys are torch's own, and a ``state_dict`` moves both ways. Dense float32 and float64 parameters on the CPU
take the kernels; others, and ``differentiable=True``, take torch's update with the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam
from torch.optim.sgd import sgd as torch_sgd

from fastnn import _C
from fastnn.runtime import note_fallback

__all__ = ["SGD", "Adam", "AdamW"]

_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
_KERNEL_DTYPES = (torch.float32, torch.float64)


def _is_covered(param: Tensor, grad: Tensor) -> bool:
    """Whether a kernel serves this parameter: dense, on the CPU, float32 or float64."""
    return (
        type(param) in _PLAIN_TYPES
        and type(grad) is Tensor
        and param.dtype in _KERNEL_DTYPES
        and grad.dtype is param.dtype
        and param.is_cpu
        and grad.is_cpu
        and grad.layout is torch.strided
        and (param.is_contiguous() or _is_dense(param))
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _in_layout_of(param: Tensor, tensor: Tensor) -> Tensor:
    """The same values with the parameter's strides and without a negative bit."""
    if tensor.stride() == param.stride() and not tensor.is_neg():
        return tensor
    return torch.empty_like(param).copy_(tensor)


class _KernelUpdate(torch.optim.Optimizer):
    """``step`` of the optimizers below: `_update_group` once for each parameter group."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; `closure` reevaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    def update(self) -> None:
        """``step`` without closure and hooks."""
        for group in self.param_groups:
            self._update_group(group)

    def _update_group(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _lay_out_state(self, params: list[Tensor], tensors: list[Tensor], key: str) -> None:
        """Gives state that was loaded, or made before the parameter changed its memory format, the strides of today."""
        for i, (param, tensor) in enumerate(zip(params, tensors, strict=True)):
            if tensor.stride() != param.stride():
                tensors[i] = self.state[param][key] = _in_layout_of(param, tensor)

    def _split(self, operator: str, group: dict[str, Any]) -> tuple[dict[torch.dtype, list[Tensor]], list[Tensor]]:
        """The parameters with a gradient: those for a kernel by dtype, and those for torch."""
        covered: dict[torch.dtype, list[Tensor]] = {}
        rest = []
        reason = ""
        if torch.compiler.is_compiling():
            reason = "torch.compile"
        elif group["differentiable"]:
            reason = "differentiable=True"
        elif group.get("capturable"):
            reason = "capturable=True"
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            if not reason and _is_covered(param, grad):
                covered.setdefault(param.dtype, []).append(param)
            else:
                rest.append(param)
        if rest and not torch.compiler.is_compiling():
            note_fallback(operator, reason or f"{rest[0].dtype} {rest[0].layout} on {rest[0].device}")
        return covered, rest


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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # GradScaler then unscales gradients itself instead of handing its scale to step().
        self._step_supports_amp_scaling = False

    def _update_group(self, group: dict[str, Any]) -> None:
        covered, rest = self._split("adam", group)
        beta1, beta2 = group["betas"]
        for params in covered.values():
            grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = self._gather({**group, "params": params})
            self._lay_out_state(params, exp_avgs, "exp_avg")
            self._lay_out_state(params, exp_avg_sqs, "exp_avg_sq")
            if max_exp_avg_sqs:
                self._lay_out_state(params, max_exp_avg_sqs, "max_exp_avg_sq")
            _C.adam_step(
                params,
                [_in_layout_of(param, grad) for param, grad in zip(params, grads, strict=True)],
                exp_avgs,
                exp_avg_sqs,
                max_exp_avg_sqs,
                steps,
                float(group["lr"]),
                float(beta1),
                float(beta2),
                group["eps"],
                float(group["weight_decay"]),
                group["decoupled_weight_decay"],
                group["amsgrad"],
                group["maximize"],
            )
            torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs, *steps])
        if rest:
            with torch.set_grad_enabled(group["differentiable"]):
                grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = self._gather({**group, "params": rest})
                torch_adam(
                    rest,
                    grads,
                    exp_avgs,
                    exp_avg_sqs,
                    max_exp_avg_sqs,
                    steps,
                    amsgrad=group["amsgrad"],
                    has_complex=any(param.is_complex() for param in rest),
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

    def _gather(self, group: dict[str, Any]) -> tuple[list[Tensor], ...]:
        """Gradients and state of a group's parameters; torch's own code makes the state on the first step."""
        params: list[Tensor] = []
        lists: tuple[list[Tensor], ...] = ([], [], [], [], [])
        self._init_group(group, params, *lists)
        return lists


class AdamW(Adam, torch.optim.AdamW):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), with torch's options and state.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: as in :class:`torch.optim.AdamW`.

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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step_supports_amp_scaling = False

    def _update_group(self, group: dict[str, Any]) -> None:
        covered, rest = self._split("sgd", group)
        momentum = group["momentum"]
        for params in covered.values():
            buffers: list[Tensor] = []
            first: list[bool] = []
            if momentum != 0:
                for param in params:
                    state = self.state[param]
                    buffer = state.get("momentum_buffer")
                    first.append(buffer is None)
                    if buffer is None:
                        buffer = state["momentum_buffer"] = torch.empty_like(param)
                    buffers.append(buffer)
                self._lay_out_state(params, buffers, "momentum_buffer")
            _C.sgd_step(
                params,
                [_in_layout_of(param, param.grad) for param in params],  # type: ignore[arg-type]
                buffers,
                first,
                float(group["lr"]),
                float(momentum),
                float(group["dampening"]),
                float(group["weight_decay"]),
                group["nesterov"],
                group["maximize"],
            )
            torch.autograd.graph.increment_version([*params, *buffers])
        if rest:
            with torch.set_grad_enabled(group["differentiable"]):
                grads: list[Tensor] = []
                held: list[Tensor | None] = []
                has_sparse_grad = self._init_group({**group, "params": rest}, [], grads, held)
                torch_sgd(
                    rest,
                    grads,
                    held,
                    has_sparse_grad=has_sparse_grad,
                    weight_decay=group["weight_decay"],
                    momentum=momentum,
                    lr=group["lr"],
                    dampening=group["dampening"],
                    nesterov=group["nesterov"],
                    maximize=group["maximize"],
                    foreach=group["foreach"],
                    fused=group["fused"],
                )
                if momentum != 0:
                    for param, buffer in zip(rest, held, strict=True):
                        self.state[param]["momentum_buffer"] = buffer
