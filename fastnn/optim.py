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
    """Whether a kernel serves this parameter: on the CPU, float32 or float64, with a strided gradient."""
    return (
        type(param) in _PLAIN_TYPES
        and type(grad) is Tensor
        and param.dtype in _KERNEL_DTYPES
        and grad.dtype is param.dtype
        and param.is_cpu
        and grad.is_cpu
        and grad.layout is torch.strided
        and not grad.is_neg()
        and not param.is_neg()
    )


def _laid_out_as(param: Tensor, tensor: Tensor) -> Tensor:
    """The same values with the parameter's strides, or those of a dense copy where the parameter has gaps."""
    copy = torch.empty_like(param)
    return tensor if tensor.stride() == copy.stride() else copy.copy_(tensor)


class _KernelUpdate(torch.optim.Optimizer):
    """``step`` of the optimizers below: torch's update for what no kernel serves, then one kernel call a dtype."""

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False: GradScaler then unscales the gradients itself instead of handing its scale to step()."""
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """torch's constructors set it for fused=True."""

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
            covered, rest = self._split(group)
            if rest:  # first: what torch refuses then leaves every parameter as it was
                with torch.set_grad_enabled(group["differentiable"]):
                    self._update_with_torch(group, rest)
            for params in covered.values():
                self._update_with_kernel(group, params)

    def _update_with_torch(self, group: dict[str, Any], params: list[Tensor]) -> None:
        raise NotImplementedError

    def _update_with_kernel(self, group: dict[str, Any], params: list[Tensor]) -> None:
        raise NotImplementedError

    def _split(self, group: dict[str, Any]) -> tuple[dict[torch.dtype, list[Tensor]], list[Tensor]]:
        """The parameters with a gradient: those for a kernel by dtype, and those for torch."""
        params = [param for param in group["params"] if param.grad is not None]
        reason = ""
        if torch.compiler.is_compiling():
            reason = "torch.compile"
        elif group["differentiable"]:
            reason = "differentiable=True"
        elif group.get("capturable"):
            reason = "capturable=True"
        elif len({param.data_ptr() for param in params}) < sum(param.numel() > 0 for param in params):
            reason = "parameters that share memory"
        covered: dict[torch.dtype, list[Tensor]] = {}
        rest = params
        if not reason:
            rest = []
            for param in params:
                if _is_covered(param, param.grad):
                    covered.setdefault(param.dtype, []).append(param)
                else:
                    rest.append(param)
        if rest and not torch.compiler.is_compiling():
            reason = reason or f"{rest[0].dtype} {rest[0].layout} on {rest[0].device}"
            note_fallback(type(self).__name__.lower(), reason)
        return covered, rest

    def _call(self, kernel: Callable[..., None], params: list[Tensor], lists: dict[str, list[Tensor]]) -> None:
        """``kernel(params, *lists)``, on copies where strides differ; then counts the modification.

        `lists` are the gradients, by the name "grad", and the state tensors by their names. The binding checks all
        strides before it changes anything: the usual case, where they agree, is not checked here again.
        """
        try:
            kernel(params, *lists.values())
        except ValueError:
            dense = [_laid_out_as(param, param.detach()) for param in params]
            for key, tensors in lists.items():
                for i, (param, tensor) in enumerate(zip(params, tensors, strict=True)):
                    tensors[i] = _laid_out_as(param, tensor)
                    if key != "grad":
                        self.state[param][key] = tensors[i]
            kernel(dense, *lists.values())
            with torch.no_grad():
                for param, copy in zip(params, dense, strict=True):
                    if copy.data_ptr() != param.data_ptr():
                        param.copy_(copy)
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

    def _update_with_kernel(self, group: dict[str, Any], params: list[Tensor]) -> None:
        new = [param for param in params if not self.state[param]]
        if new:  # torch's own code makes the state
            self._init_group({**group, "params": new}, [], [], [], [], [], [])
        states = [self.state[param] for param in params]
        keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")
        lists: dict[str, list[Tensor]] = {"grad": [param.grad for param in params]}  # type: ignore[misc]
        lists.update({key: [state[key] for state in states] for key in keys})
        steps = [state["step"] for state in states]
        beta1, beta2 = group["betas"]

        def kernel(params: list[Tensor], grads: list[Tensor], *moments: list[Tensor]) -> None:
            exp_avgs, exp_avg_sqs, *rest = moments
            _C.adam_step(
                params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                rest[0] if rest else [],
                steps,
                float(group["lr"]),
                float(beta1),
                float(beta2),
                float(group["eps"]),
                float(group["weight_decay"]),
                group["decoupled_weight_decay"],
                group["amsgrad"],
                group["maximize"],
            )

        self._call(kernel, params, lists)
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

    def _update_with_kernel(self, group: dict[str, Any], params: list[Tensor]) -> None:
        momentum = group["momentum"]
        lists: dict[str, list[Tensor]] = {"grad": [param.grad for param in params]}  # type: ignore[misc]
        first: list[bool] = []
        if momentum != 0:
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
                float(group["lr"]),
                float(momentum),
                float(group["dampening"]),
                float(group["weight_decay"]),
                group["nesterov"],
                group["maximize"],
            )

        self._call(kernel, params, lists)
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
