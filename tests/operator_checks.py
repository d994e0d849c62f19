"""One case of each operator, forward and backward, against the float64 reference: for every test of operators, on
whatever device and kernels it runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases import FILLS, Conv2dCase, LinearCase, LossCase, PoolCase, SoftmaxCase, generator, lay_out, random
from device import DEVICE
from dispatch_log import kernels_of, ran_kernels
from tolerance import (
    assert_close_bound,
    assert_identical,
    log_softmax_bound,
    product_bound,
    rounding_bound,
    softmax_bound,
    softmax_relative_error,
    unit_roundoff,
    winograd_bound,
    winograd_grad_input_bound,
    winograd_grad_weight_bound,
)
from torch import Tensor

from fastnn import functional, reference


def check_linear(case: LinearCase, fill: str, dtype: torch.dtype, layout: str = "contiguous") -> list[str]:
    """Forward and backward of one case: integers bit for bit, random numbers within the rounding bound."""
    rng = generator("linear", case.id, fill)
    relu = case.kwargs.get("activation") == "relu"
    out_features, in_features = case.weight
    weight_layout = "contiguous" if layout == "expanded" else layout
    x = lay_out(FILLS[fill](case.input, dtype, rng), layout).requires_grad_()
    w = lay_out(FILLS[fill](case.weight, dtype, rng), weight_layout).requires_grad_()
    b = FILLS[fill]((out_features,), dtype, rng).requires_grad_() if case.bias else None
    leaves = [t for t in (x, w, b) if t is not None]
    some = x.numel() > 0

    with ran_kernels(*(["linear_forward"] if some else []), dtype=dtype) as records:
        y = functional.linear(x, w, b, **case.kwargs)

    leaves64 = [t.detach().double().requires_grad_() for t in leaves]
    x64, w64, b64 = (*leaves64, None)[:3]
    y64 = reference.linear(x64, w64, b64, **case.kwargs)
    pre = F.linear(x64, w64, b64).detach()
    grad = FILLS[fill](tuple(y.shape), dtype, rng)
    rows = y.numel() // out_features

    if fill == "random":
        absolute = [t.detach().abs() for t in leaves64]
        bound = product_bound(in_features + 1, dtype, F.linear(*absolute), kernels_of(records, "linear_forward"))
        assert_close_bound(y, y64, bound, "output")
        # Whether a ReLU so near to zero is open may differ: no gradient goes there.
        grad = torch.where(pre.abs() <= bound, 0, grad) if relu else grad
    else:
        assert_identical(y, y64, "output")

    grad_layout = layout if layout in ("sliced", "transposed") and grad.dim() > 1 else "contiguous"
    with ran_kernels(*(["linear_backward"] if some else []), dtype=dtype) as records:
        grads = torch.autograd.grad(y, leaves, lay_out(grad, grad_layout))
    grads64 = torch.autograd.grad(y64, leaves64, grad.double())

    passed = (grad.double() * (pre > 0) if relu else grad.double()).abs().reshape(rows, out_features)
    x_rows = x64.detach().abs().reshape(rows, in_features)
    ran = kernels_of(records, "linear_backward")
    bounds = (
        product_bound(out_features + 1, dtype, passed @ w64.detach().abs(), ran).reshape(case.input),
        product_bound(rows + 1, dtype, passed.T @ x_rows, ran),
        product_bound(rows + 1, dtype, passed.sum(0), ran),
    )
    names = ("grad_input", "grad_weight", "grad_bias")
    for name, actual, expected, limit in zip(names, grads, grads64, bounds, strict=False):
        assert actual.dtype == dtype
        if fill == "random":
            assert_close_bound(actual, expected, limit, name)
        else:
            assert_identical(actual, expected, name)
    return ran


class Sizes(NamedTuple):
    """Reduction lengths of the three products."""

    forward: int
    grad_input: int
    grad_weight: int


def reductions(case: Conv2dCase, conv_output: Tensor) -> Sizes:
    out_channels, group_channels, kernel_height, kernel_width = case.weight
    taps = kernel_height * kernel_width
    # Overlapping pool windows first add their gradients up at one pixel of the convolution.
    overlap = case.pool[0][0] * case.pool[0][1] if case.pool else 0
    groups = case.kwargs.get("groups", 1)
    return Sizes(
        group_channels * taps,
        out_channels // groups * taps + overlap,
        conv_output.numel() // out_channels + overlap,
    )


def is_winograd(kernels: list[str]) -> bool:
    return any("winograd" in kernel for kernel in kernels)


def rounds_integers(kernels: list[str]) -> bool:
    """Tiles of both axes multiply by square roots."""
    return is_winograd(kernels) and "winograd_1x4" not in kernels


def pool_values(case: Conv2dCase, values: Tensor) -> Tensor:
    return F.max_pool2d(values, *case.pool) if case.pool else values


def ambiguous(case: Conv2dCase, pre: Tensor, bound: Tensor) -> Tensor:
    """Outputs whose ReLU or pool winner a rounding within the bound could change."""
    pooled, limit = pool_values(case, pre), pool_values(case, bound)
    relu = case.kwargs.get("activation") == "relu"
    unsure = pooled.abs() <= limit if relu else torch.zeros_like(pooled, dtype=torch.bool)
    if case.pool and case.pool[0] != (1, 1) and pooled.numel():
        kernel, stride, (vertical, horizontal) = case.pool
        planes = pre.reshape(-1, 1, *pre.shape[-2:])
        planes = F.pad(planes, (horizontal, horizontal, vertical, vertical), value=-torch.inf)
        windows = F.unfold(planes, kernel, stride=stride)
        first, second = windows.topk(2, dim=1).values.unbind(1)
        close = (first - second).reshape(pooled.shape) <= 2 * limit
        unsure |= close & (pooled >= -limit) if relu else close
    return unsure


def check_conv2d(case: Conv2dCase, fill: str, dtype: torch.dtype, layout: str = "contiguous") -> None:
    """Forward and backward of one case: integers bit for bit but where Winograd multiplies by square roots; else within
    the rounding bound."""
    rng = generator("conv2d", case.id, fill)
    x = lay_out(FILLS[fill](case.input, dtype, rng), layout).requires_grad_()
    weight_layout = "contiguous" if layout == "expanded" else layout
    w = lay_out(FILLS[fill](case.weight, dtype, rng), weight_layout).requires_grad_()
    b = FILLS[fill](case.weight[:1], dtype, rng).requires_grad_() if case.bias else None
    leaves = [t for t in (x, w, b) if t is not None]
    some = x.numel() > 0

    with ran_kernels(*(["conv2d_forward"] if some else []), dtype=dtype) as forward_records:
        y = functional.conv2d(x, w, b, **case.kwargs)

    leaves64 = [t.detach().double().requires_grad_() for t in leaves]
    pre64 = F.conv2d(*leaves64, **case.convolution)
    activated = F.relu(pre64) if case.kwargs.get("activation") else pre64
    y64 = pool_values(case, activated)
    absolute = [t.detach().abs().requires_grad_() for t in leaves64]
    pre_magnitude = F.conv2d(*absolute, **case.convolution)
    sizes = reductions(case, pre64)
    grad = FILLS[fill](tuple(y.shape), dtype, rng)

    ran = kernels_of(forward_records, "conv2d_forward")
    if fill == "random" or rounds_integers(ran):
        if is_winograd(ran):
            bound = winograd_bound(x.detach(), w.detach(), dtype, ran, **case.convolution)
            bound = bound + rounding_bound(1, dtype, pre_magnitude.detach())
        else:
            bound = product_bound(sizes.forward + 1, dtype, pre_magnitude.detach(), ran)
        assert_close_bound(y, y64, pool_values(case, bound), "output")
        grad = torch.where(ambiguous(case, pre64.detach(), bound), 0, grad)
    else:
        assert_identical(y, y64, "output")

    operators = ("conv2d_grad_input", "conv2d_grad_weight") if some else ()
    grad_layout = layout if layout in ("channels_last", "sliced", "transposed") else "contiguous"
    with ran_kernels(*operators, dtype=dtype) as backward_records:
        grads = torch.autograd.grad(y, leaves, lay_out(grad, grad_layout))
    (passed,) = torch.autograd.grad(y64, pre64, grad.double().abs(), retain_graph=True)
    grads64 = torch.autograd.grad(y64, leaves64, grad.double())
    magnitudes = torch.autograd.grad(pre_magnitude, absolute, passed)

    names = ("grad_input", "grad_weight", "grad_bias")
    lengths = (sizes.grad_input, sizes.grad_weight, sizes.grad_weight)
    for name, actual, expected, magnitude, length in zip(names, grads, grads64, magnitudes, lengths, strict=False):
        assert actual.dtype == dtype
        ran = kernels_of(backward_records, f"conv2d_{name}")
        if fill == "integers" and not rounds_integers(ran):
            assert_identical(actual, expected, name)
            continue
        bound = product_bound(length + 1, dtype, magnitude, kernels_of(backward_records, "conv2d_grad"))
        if is_winograd(ran) and name == "grad_input":
            bound = bound + winograd_grad_input_bound(x.detach(), passed, w.detach(), dtype, ran, **case.convolution)
        elif is_winograd(ran):
            bound = bound + winograd_grad_weight_bound(x.detach(), passed, w.shape[-1], dtype, **case.convolution)
        assert_close_bound(actual, expected, bound, name)


def check_max_pool2d(case: PoolCase, fill: str, dtype: torch.dtype, layout: str = "contiguous") -> None:
    rng = generator("max_pool2d", case.id, fill)
    x = lay_out(FILLS[fill](case.input, dtype, rng), layout).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    some = x.numel() > 0
    with ran_kernels(*(["max_pool2d_forward"] if some else []), dtype=dtype):
        y, indices = functional.max_pool2d(x, **case.kwargs, return_indices=True)
    alone = functional.max_pool2d(x, **case.kwargs)
    y64, indices64 = F.max_pool2d(x64, **case.kwargs, return_indices=True)
    assert_identical(y, y64, "output")
    assert_identical(alone, y64, "output without indices")
    assert indices.dtype == torch.int64
    assert not indices.requires_grad
    assert torch.equal(indices, indices64)

    grad = FILLS[fill](tuple(y.shape), dtype, rng)
    with ran_kernels(*(["max_pool2d_backward"] if some else []), dtype=dtype):
        (grad_input,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    (grad_alone,) = torch.autograd.grad(alone, x, grad)
    (grad64,) = torch.autograd.grad(y64, x64, grad.double(), retain_graph=True)
    assert_identical(grad_alone, grad_input, "gradient without indices")
    if fill == "integers":
        assert_identical(grad_input, grad64, "grad_input")
    else:
        # Overlapping windows add their gradients up.
        kernel = case.kwargs["kernel_size"]
        overlap = kernel**2 if isinstance(kernel, int) else kernel[0] * kernel[1]
        (magnitude,) = torch.autograd.grad(y64, x64, grad.double().abs())
        assert_close_bound(grad_input, grad64, rounding_bound(overlap, dtype, magnitude), "grad_input")


def check_softmax(case: SoftmaxCase, dtype: torch.dtype, scale: float, layout: str = "contiguous") -> None:
    rng = generator("softmax", case.id, scale)
    x = lay_out(random(case.input, dtype, rng) * scale, layout).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    classes = x.shape[case.dim]
    grad = random(case.input, dtype, rng)
    some = x.numel() > 0
    u = unit_roundoff(dtype)

    with ran_kernels(*(["softmax"] if some else []), dtype=dtype):
        y = functional.softmax(x, case.dim)
    y64 = F.softmax(x64, case.dim)
    assert y.dtype == dtype
    if some:
        assert_close_bound(y, y64, softmax_bound(x.detach(), case.dim, dtype), "softmax")
    with ran_kernels(*(["softmax"] if some else []), dtype=dtype):
        (actual,) = torch.autograd.grad(y, x, grad)
    (expected,) = torch.autograd.grad(y64, x64, grad.double(), retain_graph=True)
    if some:
        # grad_input = y * (grad - sum y * grad), with the rounded y.
        relative = softmax_relative_error(x.detach(), case.dim, dtype)
        mean = (y64 * grad.double().abs()).sum(case.dim, keepdim=True)
        magnitude = (y64 * (grad.double().abs() + mean)).detach()
        factor = (2 * relative.amax(case.dim, keepdim=True) / u + classes + 4) * u
        bound = magnitude * factor * 2 + 4 * torch.finfo(dtype).tiny
        assert_close_bound(actual, expected, bound, "softmax gradient")

    with ran_kernels(*(["log_softmax"] if some else []), dtype=dtype):
        z = functional.log_softmax(x, case.dim)
    z64 = F.log_softmax(x64, case.dim)
    if some:
        limit = log_softmax_bound(x.detach(), case.dim, dtype)
        assert_close_bound(z, z64, limit, "log_softmax")
    with ran_kernels(*(["log_softmax"] if some else []), dtype=dtype):
        (actual,) = torch.autograd.grad(z, x, grad)
    (expected,) = torch.autograd.grad(z64, x64, grad.double())
    if some:
        # grad_input = grad - exp(z) * sum grad, with the rounded z.
        total = grad.double().abs().sum(case.dim, keepdim=True)
        magnitude = grad.double().abs() + y64.detach() * total
        bound = magnitude * 2 * (limit + (classes + 12) * u)
        assert_close_bound(actual, expected, bound, "log_softmax gradient")


def class_dim(x: Tensor) -> int:
    return 0 if x.dim() == 1 else 1


def make_loss_case(case: LossCase, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
    rng = generator("loss", case.id)
    x = random(case.input, dtype, rng) * 2
    classes = x.shape[class_dim(x)]
    kwargs = dict(case.kwargs)
    if case.target == "probabilities":
        target = F.softmax(random(case.input, torch.float64, rng), class_dim(x)).to(dtype)
    else:
        shape = case.input[:1] + case.input[2:] if len(case.input) > 1 else ()
        target = torch.randint(0, classes, shape, generator=rng).to(DEVICE)
        if case.ignore:
            target.view(-1)[::3] = kwargs.get("ignore_index", -100)
    weight = None
    if case.weight:
        weight = (torch.rand(classes, generator=rng, dtype=torch.float64) + 0.5).to(DEVICE, dtype)
    return x, target, weight, kwargs


def weighted_target(x: Tensor, target: Tensor, weight: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """``q`` of loss = -sum_c q_c log_softmax(x)_c in float64, the class weights and the divisor included."""
    dim = class_dim(x)
    classes = x.shape[dim]
    smoothing = kwargs.get("label_smoothing", 0.0)
    shape = [1] * x.dim()
    shape[dim] = classes
    w = (torch.ones(classes, dtype=torch.float64, device=x.device) if weight is None else weight.double()).view(shape)
    if target.is_floating_point():
        q = (target.double() * (1 - smoothing) + smoothing / classes) * w
        divisor = torch.tensor(x.numel() / classes, device=x.device)
    else:
        kept = (target != kwargs.get("ignore_index", -100)).unsqueeze(dim)
        safe = torch.where(kept, target.unsqueeze(dim), 0)
        hot = torch.zeros_like(x, dtype=torch.float64).scatter_(dim, safe, 1.0)
        q = (hot * w * (1 - smoothing) + smoothing / classes * w) * kept
        divisor = (hot * w * kept).sum()
    return q / divisor if kwargs.get("reduction", "mean") == "mean" else q


def check_cross_entropy(case: LossCase, dtype: torch.dtype, layout: str = "contiguous") -> None:
    x, target, weight, kwargs = make_loss_case(case, dtype)
    x = lay_out(x, layout).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    target64 = target.double() if target.is_floating_point() else target
    weight64 = None if weight is None else weight.double()
    dim = class_dim(x)
    classes = x.shape[dim]
    samples = x.numel() // classes
    u = unit_roundoff(dtype) * (2 if dtype == torch.float64 else 1)
    per_sample = kwargs.get("reduction") == "none"

    with ran_kernels("cross_entropy", dtype=dtype):
        loss = functional.cross_entropy(x, target, weight, **kwargs)
    loss64 = reference.cross_entropy(x64, target64, weight64, **kwargs)
    assert loss.dtype == dtype
    q = weighted_target(x.detach(), target64, weight64, kwargs)
    logs = F.log_softmax(x64.detach(), dim)
    total = (lambda values: values.sum(dim)) if per_sample else torch.sum
    oracle = total(-q * logs)
    torch.testing.assert_close(oracle, loss64.detach(), rtol=1e-12, atol=1e-12)
    # Terms of one sample, then samples, then the divisor's own sum and its division; four roundings make q.
    roundings = classes + (0 if per_sample else 2 * samples) + 8
    bound = total(q * log_softmax_bound(x.detach(), dim, dtype)) + roundings * u * total(q * logs.abs())
    assert_close_bound(loss, loss64, bound + torch.finfo(dtype).tiny, "loss")

    grad = random(tuple(loss.shape), dtype, generator("grad", case.id))
    with ran_kernels(dtype=dtype):
        (actual,) = torch.autograd.grad(loss, x, grad)
    (expected,) = torch.autograd.grad(loss64, x64, grad.double())
    upstream = grad.double().abs().unsqueeze(dim) if per_sample and loss.dim() else grad.double().abs()
    mass = q.sum(dim, keepdim=True)
    probability = logs.exp()
    relative = softmax_relative_error(x.detach(), dim, dtype)
    parts = relative * probability * mass + (roundings + 2) * u * (q + probability * mass)
    assert_close_bound(actual, expected, 1.01 * parts * upstream + torch.finfo(dtype).tiny, "grad_input")


def check_nll_loss(case: LossCase, dtype: torch.dtype) -> None:
    x, target, weight, kwargs = make_loss_case(case, dtype)
    x = x.requires_grad_()
    x64 = x.detach().double().requires_grad_()
    weight64 = None if weight is None else weight.double()
    with ran_kernels("nll_loss", dtype=dtype):
        loss = functional.nll_loss(x, target, weight, **kwargs)
    loss64 = reference.nll_loss(x64, target, weight64, **kwargs)
    magnitude = reference.nll_loss(-x64.detach().abs(), target, weight64, **kwargs)
    roundings = 2 * x.numel() // x.shape[class_dim(x)] + 4
    assert_close_bound(loss, loss64, rounding_bound(roundings, dtype, magnitude), "loss")
    grad = random(tuple(loss.shape), dtype, generator("grad", case.id))
    (actual,) = torch.autograd.grad(loss, x, grad)
    (expected,) = torch.autograd.grad(loss64, x64, grad.double())
    assert_close_bound(actual, expected, rounding_bound(roundings, dtype, expected.abs()), "grad_input")


def check_mse_loss(shape: tuple[int, ...], reduction: str, weighted: bool, dtype: torch.dtype) -> None:
    rng = generator("mse", shape)
    x, t = random(shape, dtype, rng).requires_grad_(), random(shape, dtype, rng).requires_grad_()
    w = (torch.rand(shape, generator=rng, dtype=torch.float64) + 0.5).to(DEVICE, dtype) if weighted else None
    leaves64 = [v.detach().double().requires_grad_() for v in (x, t)]
    with ran_kernels("mse_loss", dtype=dtype):
        loss = functional.mse_loss(x, t, reduction=reduction, weight=w)
    loss64 = reference.mse_loss(*leaves64, reduction=reduction, weight=None if w is None else w.double())
    # x - t is rounded once and then squared; with "mean" the weights are summed as well.
    roundings = 6 + (0 if reduction == "none" else 2 * x.numel())
    assert_close_bound(loss, loss64, rounding_bound(roundings, dtype, loss64.detach()), "loss")
    grad = random(tuple(loss.shape), dtype, rng)
    with ran_kernels("mse_loss", dtype=dtype):
        grads = torch.autograd.grad(loss, (x, t), grad)
    grads64 = torch.autograd.grad(loss64, leaves64, grad.double())
    for actual, expected in zip(grads, grads64, strict=True):
        assert_close_bound(actual, expected, rounding_bound(roundings, dtype, expected.abs()), "gradient")
