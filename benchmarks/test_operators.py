"""Every case of `fastnn bench` under pytest-benchmark, for comparing two versions of a kernel.

    pytest benchmarks -o addopts= -k "conv2d and ResNet-18" --benchmark-autosave
    pytest benchmarks -o addopts= -k "conv2d and ResNet-18" --benchmark-compare

Sides of a case share a group, so the table shows them together; they run one after the other, though, so take ratios
from `fastnn bench`, whose sides take turns.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import fastnn
from fastnn.bench import select
from fastnn.bench.operators import OPERATORS, Case, Sides
from fastnn.bench.timing import OURS, check_sides


@pytest.fixture(
    scope="module", params=select(list(OPERATORS), quick=False), ids=lambda case: case.name.replace("→", "to")
)
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.param
    return chosen


@pytest.fixture(scope="module")
def sides(case: Case) -> Sides:
    """The case's tensors, made once and checked: the sides agree and ours is ours."""
    made = case.make()
    check_sides(made.calls, made.tolerance, made.norm)
    return made


@pytest.mark.parametrize("side", [OURS, "torch"])
def test_operator(benchmark: BenchmarkFixture, case: Case, sides: Sides, side: str) -> None:
    benchmark.group = case.name
    benchmark.extra_info.update(isa=fastnn.get_isa(), threads=torch.get_num_threads(), flops=case.flops)
    # Optimizers have two of torch's sides; the fused one stands for both here.
    name = next(name for name in sides.calls if name.startswith(side))
    benchmark(sides.calls[name])
