"""Fixtures shared by the operator tests: the ISA under test and the proof that its kernels ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

import fastnn

Recorder = Callable[..., AbstractContextManager[list[Any]]]


def pytest_report_header(config: pytest.Config) -> str:
    isas = ", ".join(fastnn.available_isas())
    return f"fastnn: CPU ISAs {isas}; torch {torch.__version__}; {torch.get_num_threads()} threads"


@pytest.fixture(params=fastnn.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with the kernels of each ISA this processor has."""
    before = fastnn.get_isa()
    fastnn.set_isa(request.param)
    yield request.param
    fastnn.set_isa(before)


@pytest.fixture(params=(torch.float32, torch.float64), ids=("float32", "float64"))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    value: torch.dtype = request.param
    return value


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
        assert record.isa == fastnn.get_isa(), f"{record.operator} ran on {record.isa}"
        assert record.device == "cpu"
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
