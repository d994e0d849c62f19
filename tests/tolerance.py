"""How far a kernel may be from the float64 oracle: bounds computed from the arithmetic, none of them guessed.

With unit roundoff ``u = eps / 2``, a sum of ``k`` products evaluated in any order differs from the exact one
by at most ``k*u / (1 - k*u) * sum |a||b|`` (Higham, Accuracy and Stability of Numerical Algorithms, section
3.1). Adding a bias makes it ``k + 1``. ReLU and max-pooling are 1-Lipschitz, so a bound on their input,
pooled the same way, is one on their output. Every function here returns a float64 tensor to hand to
:func:`assert_close_bound`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# exp and log of the kernels, in units in the last place. libm has 1; a polynomial exp without table reaches
# 2.
EXP_ULPS = 4
LOG_ULPS = 4

# Roundings on the way of one product of Winograd's algorithm besides the sum over channels, where no instruction fuses
# a multiplication with an addition. Along one axis at most 5 in B^T d (two of its additions scaled, one constant
# rounded), 3 in G g of 3 taps (one addition, one scaled by a rounded constant, and that product), 5 of 5 taps (three
# additions, one of them scaled), and 5 in A^T m (three additions, one of them scaled by a rounded constant); twice that
# for two axes, and the product itself. The weight's gradient has no more: 5, 4 in A dy and 4 in G^T u, or 5, 3 and 5.
# By the number of taps along an axis:
WINOGRAD_TRANSFORM_ROUNDINGS = {3: 27, 5: 31}


# The same along the one axis of tiles of 1x4, besides two sums over channels and kernel rows: 3 in B^T d (two
# additions, one of an inexact product), 2 in G g, 2 in A^T m, the product itself, the factor of 2/3 and its product.
WINOGRAD_ROW_ROUNDINGS = 10


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """What CUDA kernels compute values of `dtype` in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounded_bound(bound: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a result within `bound` of `expected` in what its kernel computes in, after it is rounded to `dtype`."""
    if computed_in(dtype) == dtype:
        return bound
    info = torch.finfo(dtype)
    return bound + (expected.detach().abs() + bound) * info.eps / 2 + info.smallest_normal * info.eps / 2


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


def product_bound(roundings: int, dtype: torch.dtype, magnitude: Tensor, kernels: list[str]) -> Tensor:
    """Bound of a sum of products by one of these kernels, whose terms' absolute values add up to ``magnitude``.

    "tf32x3" writes each factor as ``high + low + rest`` with ``|rest| <= 2^-22 |factor|``, and leaves out the product
    of the two low parts, at most ``2^-22`` of the whole: ``3 * 2^-22`` of each product. Eight products at a time are
    summed by three instructions of nine terms each, which are cut off rather than rounded, an error of up to ``2 u`` a
    term; these sums are added with rounding.
    """
    if "tf32x3" not in kernels:
        return rounding_bound(roundings, dtype, magnitude)
    return rounding_bound(3 * 9 * 2 + roundings // 8 + 2, dtype, magnitude) + 3 * 2.0**-22 * magnitude.double()


# Of a factor of 10 bits of mantissa: it is multiplied by 1 + 0.72 * 2^-11, then loses up to 2^-10 of itself.
TF32_ROUNDING = 1.29 * 2.0**-11


def tf32_bound(length: int, magnitude: Tensor) -> Tensor:
    """Both factors rounded, and a sum of so many products that the tensor cores cut off, 2 u an addition."""
    factors = 2 * TF32_ROUNDING + TF32_ROUNDING**2
    return magnitude.double() * (factors + 2 * (length + 1) * 2.0**-24 * (1 + factors))


def _winograd_tile(outputs: int, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """A^T, G and B^T of a tile of 2 or 4 outputs of 3 taps, or 2 of 5; the points are 0, +-1/sqrt(2), +-sqrt(2) and
    infinity."""
    root = 0.5**0.5
    points = [0, root, -root, 2 * root, -2 * root][: outputs + taps - 2]
    if len(points) == 3:
        scales = [1, 1, 1]
        source = [[1, 0, -2, 0], [0, root, 1, 0], [0, -root, 1, 0], [0, -0.5, 0, 1]]
    else:
        scales = [1, -2 / 3, -2 / 3, 1 / 6, 1 / 6]
        source = [[1, 0, -2.5, 0, 1, 0]]
        source += [[0, -point * (2.5 - point**2), -(2.5 - point**2), point, 1, 0] for point in points[1:]]
        source += [[0, 1, 0, -2.5, 0, 1]]
    of_output, of_weight = ([1] * len(points), scales) if taps == 5 else (scales, [1] * len(points))
    output = [
        [scale * point**k for point, scale in zip(points, of_output, strict=True)] + [float(k == outputs - 1)]
        for k in range(outputs)
    ]
    filters = [[scale * point**k for k in range(taps)] for point, scale in zip(points, of_weight, strict=True)]
    filters += [[float(k == taps - 1) for k in range(taps)]]
    return tuple(torch.tensor(m, dtype=torch.float64) for m in (output, filters, source))  # type: ignore[return-value]


def _winograd_cut(length: int, largest: int) -> list[int]:
    """Tiles of an axis of so many outputs, of up to `largest`."""
    tiles: list[int] = []
    while sum(tiles) < length:
        tiles.append(4 if largest == 4 and length - sum(tiles) > 2 else 2)
    return tiles


def _winograd_axis(length: int, tiles: list[int], taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a whole axis of so many outputs."""
    more = taps - 1
    parts = [_winograd_tile(tile, taps) for tile in tiles]
    points, reach = sum(tile + more for tile in tiles), sum(tiles)
    output, source = torch.zeros(reach, points).double(), torch.zeros(points, reach + more).double()
    point = pixel = 0
    for tile, (of_output, _, of_source) in zip(tiles, parts, strict=True):
        output[pixel : pixel + tile, point : point + tile + more] = of_output
        source[point : point + tile + more, pixel : pixel + tile + more] = of_source
        point, pixel = point + tile + more, pixel + tile
    return output[:length], torch.cat([g for _, g, _ in parts]), source[:, : length + more]


def winograd(input: Tensor, weight: Tensor, largest: int, groups: int = 1, absolute: bool = False) -> Tensor:
    """Winograd's 3x3 or 5x5 convolution of a batch without padding, in the dtype of its inputs.

    ``absolute`` takes the absolute value of every number on the way: what its rounding errors are proportional to.
    """
    prepare = torch.abs if absolute else torch.Tensor.clone
    taps = weight.shape[-1]
    lengths = [size - taps + 1 for size in input.shape[2:]]
    (a_y, g_y, b_y), (a_x, g_x, b_x) = (
        [prepare(m).to(input.dtype) for m in _winograd_axis(length, _winograd_cut(length, largest), taps)]
        for length in lengths
    )
    v = b_y @ prepare(input).unflatten(1, (groups, -1)) @ b_x.T
    u = g_y @ prepare(weight).unflatten(0, (groups, -1)) @ g_x.T
    m = torch.einsum("ngcyx,gocyx->ngoyx", v, u)
    return (a_y @ m @ a_x.T).flatten(1, 2)


def winograd_row(input: Tensor, weight: Tensor, groups: int = 1, absolute: bool = False) -> Tensor:
    """Winograd's F(1x4, 3x3), else as :func:`winograd`; the points are 0, +-1, +-1/2 and infinity."""
    prepare = torch.abs if absolute else torch.Tensor.clone
    points = [1, -1, 0.5, -0.5]
    output = [[float(k == 0), *(point**k for point in points), float(k == 3)] for k in range(4)]
    filters = [[6, 0, 0], [1, 1, 1], [1, -1, 1], [-4, -2, -1], [-4, 2, -1], [0, 0, 1.5]]
    source = [[0.25, 0, -1.25, 0, 1, 0]]
    source += [[0, -point * (1.25 - point**2), -(1.25 - point**2), point, 1, 0] for point in points]
    source += [[0, 0.25, 0, -1.25, 0, 1]]
    a, g, b = (prepare(torch.tensor(m, dtype=input.dtype)) for m in (output, filters, source))
    width = input.shape[-1] - 2
    tiles = -(-width // 4)
    patches = F.pad(prepare(input), (0, 4 * tiles - width)).unfold(3, 6, 4).unfold(2, 3, 1)
    v = torch.einsum("px,ncytxk->ncytpk", b, patches).unflatten(1, (groups, -1))
    u = torch.einsum("px,ockx->ocpk", g, prepare(weight)).unflatten(0, (groups, -1))
    m = torch.einsum("ngcytpk,gocpk->ngoytp", v, u)
    return (torch.einsum("xp,ngoytp->ngoytx", a, m) * (2 / 3)).flatten(1, 2).flatten(3)[..., :width]


def _winograd_magnitude(values: Tensor, weight: Tensor, largest: int, groups: int) -> Tensor:
    """Of a batch; with pooling the cut is that of whole windows: the larger of both."""
    magnitude = winograd(values, weight, largest, groups, absolute=True)
    height, width = (size // 2 * 2 for size in magnitude.shape[2:])
    if not height or not width:
        return magnitude
    more = weight.shape[-1] - 1
    even = winograd(values[:, :, : height + more, : width + more], weight, largest, groups, absolute=True)
    magnitude[:, :, :height, :width] = torch.maximum(magnitude[:, :, :height, :width], even)
    return magnitude


def _padding(padding: Any, taps: int) -> tuple[int, int]:
    """Of a square kernel, from a number, a pair or a word."""
    padding = {"same": taps // 2, "valid": 0}[padding] if isinstance(padding, str) else padding
    return (padding, padding) if isinstance(padding, int) else padding


def _largest_tile(kernels: list[str]) -> int:
    return 4 if "winograd_4x4" in kernels else 2


def winograd_bound(
    input: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    kernels: list[str],
    *,
    padding: Any = 0,
    groups: int = 1,
    **_: Any,
) -> Tensor:
    """Bound of a convolution by one of these kernels."""
    vertical, horizontal = _padding(padding, weight.shape[-1])
    batch = input.double().reshape(-1, *input.shape[-3:])
    padded = F.pad(batch, (horizontal, horizontal, vertical, vertical))
    if "winograd_1x4" in kernels:
        magnitude = winograd_row(padded, weight.double(), groups, absolute=True)
        roundings = 2 * 3 * weight.shape[1] + WINOGRAD_ROW_ROUNDINGS
    else:
        magnitude = _winograd_magnitude(padded, weight.double(), _largest_tile(kernels), groups)
        roundings = weight.shape[1] + WINOGRAD_TRANSFORM_ROUNDINGS[weight.shape[-1]]
    bound = rounding_bound(roundings, dtype, magnitude)
    return bound.reshape(*input.shape[:-3], *bound.shape[1:])


def winograd_grad_weight_bound(
    input: Tensor,
    grad_output: Tensor,
    taps: int,
    dtype: torch.dtype,
    *,
    padding: Any = 0,
    groups: int = 1,
    **_: Any,
) -> Tensor:
    """Bound of the weight gradient, whose tiles are all 4x4, or 2x2 for 5x5 taps."""
    vertical, horizontal = _padding(padding, taps)
    values = F.pad(input.double().abs().reshape(-1, *input.shape[-3:]), (horizontal, horizontal, vertical, vertical))
    grad = grad_output.double().abs().reshape(-1, *grad_output.shape[-3:])
    tile = 7 - taps
    counts = [-(-size // tile) for size in grad.shape[2:]]
    (a_y, g_y, b_y), (a_x, g_x, b_x) = (
        [m.abs() for m in _winograd_axis(size, [tile] * count, taps)]
        for size, count in zip(grad.shape[2:], counts, strict=True)
    )
    v = b_y @ values.unflatten(1, (groups, -1)) @ b_x.T
    d = a_y.T @ grad.unflatten(1, (groups, -1)) @ a_x
    du = torch.einsum("ngcyx,ngoyx->gocyx", v, d)
    magnitude = (g_y.T @ du @ g_x).flatten(0, 1)
    tiles = len(grad) * counts[0] * counts[1]
    return rounding_bound(tiles + WINOGRAD_TRANSFORM_ROUNDINGS[taps], dtype, magnitude)


def winograd_bf16_bound(input: Tensor, weight: Tensor, **convolution: Any) -> Tensor:
    """The same where both factors of every product are first rounded to bfloat16's 8 bits.

    ``(1 + 2^-9)^2 - 1 = 2^-8 + 2^-18`` of each product, and float32's roundings of the sums of the rounded ones.
    Factors below the smallest normal number count as zero.
    """
    exact = winograd_bound(input, weight, torch.float32, ["winograd_bf16"], **convolution)
    roundings = weight.shape[1] + WINOGRAD_TRANSFORM_ROUNDINGS[3]
    factors = 2**-8 + 2**-18
    tiny = torch.finfo(torch.float32).tiny
    largest = max(input.abs().max().item(), weight.abs().max().item(), 1.0)
    per_product = exact / (roundings * unit_roundoff(torch.float32))  # of |products|, and a little more
    return exact * (1 + factors) + per_product * factors + 64 * weight.shape[1] * tiny * largest


def winograd_grad_input_bound(
    input: Tensor,
    grad_output: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    kernels: list[str],
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    **_: Any,
) -> Tensor:
    """The same for the input gradient, which is a convolution of ``grad_output`` by the turned filters.

    With a stride it is one convolution per phase of the input pixels, and a phase may have 3x3 or 5x5 taps too.
    """
    strides, dilations = ((v, v) if isinstance(v, int) else v for v in (stride, dilation))
    paddings = _padding(padding, weight.shape[-1])
    grad = grad_output.double().reshape(-1, *grad_output.shape[-3:])
    turned = weight.double().unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    magnitude = torch.zeros(len(grad), *input.shape[-3:], dtype=torch.float64)
    served = 3  # taps along an axis of the phases that Winograd serves: others have one more or less

    def taps(axis: int, phase: int) -> tuple[list[int], list[int]]:
        """Kernel indices of a phase and the gradient's pixels that they read, from the last one down."""
        numerators = {k: phase + paddings[axis] - k * dilations[axis] for k in range(weight.shape[2 + axis])}
        places = [k for k in reversed(numerators) if numerators[k] % strides[axis] == 0]
        return places, [numerators[k] // strides[axis] for k in places]

    for phase_y in range(strides[0]):
        for phase_x in range(strides[1]):
            (rows, above), (columns, beside) = taps(0, phase_y), taps(1, phase_x)
            of_phase = magnitude[:, :, phase_y :: strides[0], phase_x :: strides[1]]
            count = len(above)
            if count not in (3, 5) or not all(o == list(range(o[0], o[0] + count)) for o in (above, beside)):
                continue
            height, width = of_phase.shape[2:]
            below, right = (
                o[-1] + size - of_grad
                for o, size, of_grad in zip((above, beside), (height, width), grad.shape[2:], strict=True)
            )
            pads = (-beside[0], right, -above[0], below)
            served = count
            filters = turned[:, :, rows][:, :, :, columns]
            of_phase += _winograd_magnitude(F.pad(grad, pads), filters, _largest_tile(kernels), groups)
    roundings = weight.shape[0] // groups + WINOGRAD_TRANSFORM_ROUNDINGS[served]
    return rounding_bound(roundings, dtype, magnitude).reshape(input.shape)


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
