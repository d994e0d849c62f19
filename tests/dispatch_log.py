"""The proof, from fastnn.explain_dispatch, of which kernel and which ISA ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from device import expected_device, expected_isa

import fastnn


def kernels_of(log: Any, *operators: str) -> list[str]:
    """The variants that ran for the operators whose names start like the given ones."""
    return [record.kernel for record in log if record.operator.startswith(operators)]


@contextmanager
def ran_kernels(*operators: str, dtype: torch.dtype | None = None) -> Iterator[list[Any]]:
    """Fails unless every operator named ran, each on our kernels, of the ISA that is set.

    A name matches the operators that start with it. The records are in the list after the block.
    """
    records: list[Any] = []
    with fastnn.explain_dispatch() as log:
        yield records
    records.extend(log)
    for record in records:
        assert record.kernel != "torch", f"{record.operator} fell back to torch: {record.reason}"
        assert record.isa == expected_isa(), f"{record.operator} ran on {record.isa}"
        assert record.device == expected_device()
        if dtype is not None:
            assert record.dtype == str(dtype).removeprefix("torch.")
    names = [record.operator for record in records]
    for operator in operators:
        assert any(name.startswith(operator) for name in names), f"{operator} is not among {names}"


@contextmanager
def fell_back() -> Iterator[None]:
    """Fails unless the block ran torch's operators, each with a reason on record."""
    with fastnn.explain_dispatch() as log:
        yield
    records = list(log)
    assert records, "nothing was recorded"
    for record in records:
        assert record.kernel == "torch", f"{record.operator} ran {record.kernel}"
        assert record.reason
