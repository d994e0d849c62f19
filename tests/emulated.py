"""fastnn._C_emulator: the CUDA kernels on the CPU, under every schedule that the emulator offers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import fastnn  # noqa: F401 - loads torch's OpenMP first

emulator: Any = pytest.importorskip("fastnn._C_emulator", reason="built without FASTNN_EMULATOR")
emulator.initialise(
    torch.Tensor,
    torch.nn.Parameter,
    torch.get_num_threads,
    torch.OutOfMemoryError,
    torch.is_grad_enabled,
    (),
)

ORDERS = ("forward", "reverse", "random", "greedy")
SCHEDULES = list(itertools.product(ORDERS, (False, True)))
SCHEDULE_IDS = [f"{order}-{'eager' if eager else 'lazy'}" for order, eager in SCHEDULES]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=SCHEDULE_IDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=[str(dtype)[6:] for dtype in DTYPES])


@contextmanager
def scheduled(schedule: tuple[str, bool] = ("forward", False), capability: int = 90) -> Iterator[None]:
    """Launches in the block run under this order of threads, with asynchronous copies eager or lazy."""
    order, eager = schedule
    emulator.set_schedule(order, 1, eager, capability)
    try:
        yield
    finally:
        emulator.set_schedule("forward", 1, False, 90)


@contextmanager
def ran_on_the_emulator(operation: str, variant: str | None = None) -> Iterator[None]:
    """The block must run `operation`, and `variant` of it, on the emulator."""
    emulator.trace_start()
    try:
        yield
    finally:
        records = emulator.trace_stop()
    assert any(
        record[0] == operation and record[2] == "emulator" and variant in (None, record[1]) for record in records
    ), records
