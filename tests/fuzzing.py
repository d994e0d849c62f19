"""What hypothesis draws, and how many examples: few in the ordinary suite, FASTNN_FUZZ times as many in `make fuzz`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from cases import PoolCase
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st

import fastnn

FACTOR = int(os.environ.get("FASTNN_FUZZ", "1"))


def fuzz(examples: int) -> Callable[[Any], Any]:
    """Marks a test as one that `make fuzz` runs, with this many examples in the ordinary suite."""
    chosen = settings(
        max_examples=examples * FACTOR,
        deadline=None,
        derandomize=FACTOR == 1,  # the ordinary suite repeats itself; a longer run finds other examples every time
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    return lambda test: pytest.mark.fuzz(chosen(test))


@contextmanager
def running_on(isa: str) -> Iterator[None]:
    """Runs the block with the kernels of this ISA: what the `isa` fixture does, inside one example."""
    before = fastnn.get_isa()
    fastnn.set_isa(isa)
    try:
        yield
    finally:
        fastnn.set_isa(before)


@st.composite
def pool_cases(draw: st.DrawFn) -> PoolCase:
    """A max-pooling that torch can check."""
    pairs = st.tuples
    shape = draw(pairs(st.integers(0, 3), st.integers(1, 20), st.integers(1, 14), st.integers(1, 14)))
    kernel = draw(pairs(st.integers(1, 4), st.integers(1, 4)))
    stride = draw(st.none() | pairs(st.integers(1, 5), st.integers(1, 5)))
    dilation = draw(pairs(st.integers(1, 3), st.integers(1, 3)))
    padding = tuple(k // 2 if draw(st.booleans()) else 0 for k in kernel)
    axes = list(zip(shape[2:], padding, dilation, kernel, strict=True))
    assume(all(n + 2 * p >= d * (k - 1) + 1 for n, p, d, k in axes))
    # Dilation can put every tap of a window into the padding; torch's backward then writes outside its buffer.
    assume(all(p == 0 or any(0 <= d * i - p < n for i in range(k)) for n, p, d, k in axes))
    kwargs = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    return PoolCase("fuzz", shape, {**kwargs, "ceil_mode": draw(st.booleans())})
