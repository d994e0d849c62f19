"""exp and log of csrc/cpu/simd/math.h: the bounds that its header states, against a wider type."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import generator
from torch import Tensor

from fastnn import _C

EXP_ULPS = 1.1
LOG_ULPS = 1.0

# Where the results of exp reach from zero to infinity, subnormal numbers included.
EXP_RANGE = {torch.float32: (-105.0, 89.5), torch.float64: (-747.0, 710.5)}


def run(kernel: Callable[[Tensor, Tensor], None], x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    kernel(y, x)
    return y


def assert_ulps(actual: Tensor, x: Tensor, exact: Callable[[np.ndarray], np.ndarray], bound: float) -> None:
    """Finite results within `bound` units in the last place of the exact one, others its rounding."""
    wide = exact(x.numpy().astype(np.longdouble))
    with np.errstate(over="ignore"):
        rounded = wide.astype(actual.numpy().dtype)
    ordinary = np.isfinite(rounded) & (rounded != 0)
    np.testing.assert_array_equal(actual.numpy()[~ordinary], rounded[~ordinary])
    unit = np.spacing(np.abs(rounded[ordinary])).astype(np.longdouble)
    error = np.abs(actual.numpy()[ordinary].astype(np.longdouble) - wide[ordinary]) / unit
    worst = int(error.argmax())
    assert error[worst] <= bound, f"{error[worst]:.4f} ulp at {x.numpy()[ordinary][worst]!r}"


def test_exp(isa: str, dtype: torch.dtype) -> None:
    least, most = EXP_RANGE[dtype]
    rng = generator("exp", dtype)
    spread = torch.linspace(least, most, 200_003, dtype=torch.float64)
    near = torch.randn(100_000, generator=rng, dtype=torch.float64)
    x = torch.cat([spread, near, near * 1e-3]).to(dtype)
    assert_ulps(run(_C.exponentials, x), x, np.exp, EXP_ULPS)


def test_log(isa: str, dtype: torch.dtype) -> None:
    rng = generator("log", dtype)
    near = 1 + 0.3 * torch.randn(100_000, generator=rng, dtype=torch.float64)
    bits = torch.randint(1, torch.iinfo(torch.int32).max, (200_000,), generator=rng, dtype=torch.int32)
    if dtype == torch.float32:
        anything = bits.view(torch.float32)
    else:
        anything = (bits.long() << 32 | bits.flip(0).long()).view(torch.float64)
    x = torch.cat([near.to(dtype), anything])
    x = x[(x > 0) & x.isfinite()]
    assert_ulps(run(_C.logarithms, x), x, np.log, LOG_ULPS)


@pytest.mark.parametrize("name", ["exp", "log"])
def test_special_values(name: str, isa: str, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1.0, -1.0, 1e4, -1e4] * 3, dtype=dtype)
    actual = run(_C.exponentials if name == "exp" else _C.logarithms, x)
    torch.testing.assert_close(actual, getattr(torch, name)(x), equal_nan=True)
