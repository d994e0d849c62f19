"""How many examples hypothesis draws: a few in the ordinary suite, FASTNN_FUZZ times as many under `make fuzz`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

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
