"""How far a kernel may be from the float64 oracle: bounds computed from the arithmetic, none of them guessed.

With unit roundoff ``u = eps / 2``, a sum of ``k`` products evaluated in any order differs from the exact one
by at most ``k*u / (1 - k*u) * sum |a||b|`` (Higham, Accuracy and Stability of Numerical Algorithms, section
3.1). Adding a bias makes it ``k + 1``. ReLU and max-pooling are 1-Lipschitz, so a bound on their input,
pooled the same way, is one on their output. Every function here returns a float64 tensor to hand to
:func:`assert_close_bound`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# exp and log of the kernels, in units in the last place. libm has 1; a polynomial exp without table reaches
# 2.
EXP_ULPS = 4
LOG_ULPS = 4

# Winograd F(2x2,3x3) computes Y = A^T [(G g G^T) * (B^T d B)] A. Along one axis, with |d| <= D and |g| <= H,
# the three products behind one output are at most 2D * H, 2D * 3H/2 and 2D * 3H/2: 8 D H, where the direct
# sum has 3 D H. Two axes: 64 D H. D is the largest |input| that the output sees and H the largest |weight| of
# the 3x3 filter.
WINOGRAD_AMPLIFICATION = 64
# Additions on the way of one product besides the sum over channels: 2 in B^T d B, 4 in G g G^T (its halvings
# are exact), the product itself, and 4 in A^T m A.
WINOGRAD_TRANSFORM_ROUNDINGS = 11


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def rounding_bound(roundings: int, dtype: torch.dtype, magnitude: Tensor) -> Tensor:
    """Bound of ``roundings`` successive roundings on a sum whose terms' absolute values add up to
    ``magnitude``.

    A float64 kernel is compared with a float64 oracle that rounds just as often, hence twice the bound. The
    smallest normal number allows for products that underflow.
    """
    error = roundings * unit_roundoff(dtype)
    relative = error / (1 - error)
    if dtype == torch.float64:
        relative *= 2
    return magnitude.double() * relative + roundings * torch.finfo(dtype).tiny


def stored_bound(bound: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    """``bound`` of a result computed in float32, after it is stored in a 16-bit format (others store it as it is)."""
    if dtype.itemsize > 2:
        return bound
    tiny = torch.finfo(dtype).tiny
    return bound + unit_roundoff(dtype) * (expected.double().abs() + bound).clamp_min(tiny)


def _taps(channels: int, weight: Tensor) -> Iterator[Tensor]:
    """Depthwise filters that pick one tap of the kernel each."""
    height, width = weight.shape[2:]
    for tap in range(height * width):
        picked = torch.zeros(channels, 1, height * width, dtype=torch.float64)
        picked[:, :, tap] = 1
        yield picked.view(channels, 1, height, width)


def winograd_bound(input: Tensor, weight: Tensor, dtype: torch.dtype, **convolution: Any) -> Tensor:
    """Bound of F(2x2,3x3) for a convolution, whatever the place of its tiles."""
    values, channels = input.double().abs(), input.shape[-3]
    geometry = {**convolution, "groups": channels}
    seen = [F.conv2d(values, tap, **geometry) for tap in _taps(channels, weight)]
    largest_input = torch.stack(seen).amax(0)
    largest_weight = weight.double().abs().amax((2, 3), keepdim=True)
    sums = F.conv2d(largest_input, largest_weight, groups=convolution.get("groups", 1))
    roundings = weight.shape[1] + WINOGRAD_TRANSFORM_ROUNDINGS
    return rounding_bound(roundings, dtype, WINOGRAD_AMPLIFICATION * sums)


def winograd_bf16_bound(input: Tensor, weight: Tensor, **convolution: Any) -> Tensor:
    """The same where both factors of every product are first rounded to bfloat16's 8 bits.

    ``(1 + 2^-9)^2 - 1 = 2^-8 + 2^-18`` of each product, and float32's roundings of the sums of the rounded ones.
    Factors below the smallest normal number count as zero.
    """
    exact = winograd_bound(input, weight, torch.float32, **convolution)
    roundings = weight.shape[1] + WINOGRAD_TRANSFORM_ROUNDINGS
    factors = 2**-8 + 2**-18
    tiny = torch.finfo(torch.float32).tiny
    largest = max(input.abs().max().item(), weight.abs().max().item(), 1.0)
    per_product = exact / (roundings * unit_roundoff(torch.float32))  # of |products|, and a little more
    return exact * (1 + factors) + per_product * factors + 64 * weight.shape[1] * tiny * largest


def winograd_grad_input_bound(
    input: Tensor, grad_output: Tensor, weight: Tensor, dtype: torch.dtype, **convolution: Any
) -> Tensor:
    """The same for the input gradient, which is a convolution of ``grad_output`` by the turned filters.

    With a stride it is one convolution per phase of the input pixels, and a phase may have 3x3 taps too.
    """
    values, channels = grad_output.double().abs(), grad_output.shape[-3]
    geometry = {**convolution, "groups": channels}
    shape = (*input.shape[:-3], channels, *input.shape[-2:])
    largest_grad = torch.zeros(shape, dtype=torch.float64)
    for tap in _taps(channels, weight):
        image = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        (reached,) = torch.autograd.grad(F.conv2d(image, tap, **geometry), image, values)
        largest_grad = torch.maximum(largest_grad, reached)
    largest_weight = weight.double().abs().amax((2, 3), keepdim=True)
    groups = convolution.get("groups", 1)
    sums = F.conv_transpose2d(largest_grad, largest_weight, groups=groups)
    roundings = channels // groups + WINOGRAD_TRANSFORM_ROUNDINGS
    return rounding_bound(roundings, dtype, WINOGRAD_AMPLIFICATION * sums)


def softmax_relative_error(input: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Relative error of ``softmax(input, dim)``, elementwise, for inputs that are exact in ``dtype``.

    ``input - max`` is rounded once, and an absolute error in an exponent is a relative one of the power. The
    sum's error is the mean of its terms' errors, weighted by the probabilities, and one rounding per
    addition.
    """
    u = unit_roundoff(dtype)
    shifted = (input.double() - input.double().amax(dim, keepdim=True)).abs()
    power = u * shifted + EXP_ULPS * 2 * u
    probability = F.softmax(input.double(), dim)
    total = (probability * power).sum(dim, keepdim=True) + input.shape[dim] * u
    relative = power + total + 2 * u
    # Second-order terms are below 1 % as long as the first-order bound is.
    return relative * 1.01 * (2 if dtype == torch.float64 else 1)


def softmax_bound(input: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    probability = F.softmax(input.double(), dim)
    return probability * softmax_relative_error(input, dim, dtype) + 2 * torch.finfo(dtype).tiny


def log_softmax_bound(input: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """``(input - max) - log(sum)``: the log turns the sum's relative error into an absolute one."""
    u = unit_roundoff(dtype)
    values = input.double()
    shifted = (values - values.amax(dim, keepdim=True)).abs()
    log_total = shifted.neg().exp().sum(dim, keepdim=True).log()
    result = F.log_softmax(values, dim).abs()
    absolute = u * (shifted + result + LOG_ULPS * 2 * log_total)
    bound = absolute + softmax_relative_error(input, dim, dtype).amax(dim, keepdim=True)
    return bound * (2 if dtype == torch.float64 else 1)


def _assert_same_shape(actual: Tensor, expected: Tensor, name: str) -> None:
    wanted, got = tuple(expected.shape), tuple(actual.shape)
    assert wanted == got, f"{name}: expected shape {wanted}, got {got}"


def assert_close_bound(actual: Tensor, expected64: Tensor, bound: Tensor | float, name: str = "result") -> None:
    """Every element within its own bound of the oracle; the message names the worst one."""
    _assert_same_shape(actual, expected64, name)
    if actual.numel() == 0:
        return
    limits = torch.as_tensor(bound, dtype=torch.float64).expand_as(expected64)
    error = (actual.detach().double() - expected64.detach()).abs()
    special = ~expected64.detach().isfinite() | ~actual.detach().isfinite()
    agree = torch.isclose(actual.detach().double(), expected64.detach(), rtol=0, atol=0, equal_nan=True)
    error = torch.where(special, torch.where(agree, 0.0, torch.inf), error)
    ratio = torch.where(error == 0, 0.0, error / limits)
    worst = int(ratio.argmax())
    if ratio.flatten()[worst] <= 1:
        return
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), actual.shape))
    raise AssertionError(
        f"{name}: {int((ratio > 1).sum())} of {ratio.numel()} elements are out of bounds; worst at {place}: "
        f"got {float(actual[place]):.9g}, expected {float(expected64[place]):.9g}, "
        f"error {float(error[place]):.3g} is "
        f"{float(ratio[place]):.3g} times its bound {float(limits[place]):.3g}"
    )


def assert_identical(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Bit for bit, NaN equal to NaN, and -0 equal to 0: which zero a sum gives depends on its order."""
    expected = expected.to(actual.dtype)
    _assert_same_shape(actual, expected, name)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    if bool(same.all()):
        return
    place = tuple(int(i) for i in (~same).nonzero()[0])
    raise AssertionError(
        f"{name}: {int((~same).sum())} of {same.numel()} elements differ; first at {place}: "
        f"got {float(actual[place])!r}, expected {float(expected[place])!r}"
    )
