"""Fixtures shared by the operator tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Set before libgomp loads with torch: threads that spin at barriers make the suite eight times slower as soon
# as other processes want the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from device import DEVICE, ON_CUDA, expected_isa

import fastnn

if DEVICE.type == "cuda":
    # The bounds are float32's; what asks for tf32 allows it itself.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def pytest_report_header(config: pytest.Config) -> str:
    isas = ", ".join(fastnn.available_isas())
    where = f"CUDA kernels on {expected_isa()}" if ON_CUDA else f"CPU ISAs {isas}"
    return f"fastnn: {where}; torch {torch.__version__}; {torch.get_num_threads()} threads"


@pytest.fixture(params=[expected_isa()] if ON_CUDA else fastnn.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with the kernels of each ISA this processor has, or of the GPU."""
    if ON_CUDA:
        yield request.param
        return
    before = fastnn.get_isa()
    fastnn.set_isa(request.param)
    yield request.param
    fastnn.set_isa(before)


@pytest.fixture(params=(torch.float32, torch.float64), ids=("float32", "float64"))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    value: torch.dtype = request.param
    return value
