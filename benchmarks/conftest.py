"""pytest-benchmark's result files say what the timings ran on."""

from __future__ import annotations

from typing import Any

import pytest

from fastnn.bench import machine


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fastnn"] = machine.describe()


def pytest_report_header(config: pytest.Config) -> str:
    return f"benchmarks: {machine.summary(machine.describe())}"
