"""The emulator itself: its primitives, and broken kernels that it must catch; and every CUDA kernel's memory accesses.

The cases are C++, csrc/cuda/emulator/tests. FASTNN_EMULATOR_TEST names another build of them: with the address
sanitizer, arrays have exactly their size and no access outside goes unseen.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

import fastnn

PROGRAM = Path(os.environ.get("FASTNN_EMULATOR_TEST", Path(fastnn.__file__).parent / "fastnn_emulator_test"))
if not PROGRAM.exists():
    pytest.skip("built without FASTNN_EMULATOR", allow_module_level=True)

ORDERS = ("forward", "reverse", "random", "greedy")
LAZY, EAGER = ({f"{order}-{copies}" for order in ORDERS} for copies in ("lazy", "eager"))
ALL = LAZY | EAGER


def in_order(*orders: str) -> set[str]:
    return {schedule for schedule in ALL if schedule.split("-")[0] in orders}


# Of each broken kernel, the schedules that catch it, and what they say.
WRONG, OUTSIDE = "expected .*, got ", "AddressSanitizer: heap-buffer-overflow"
CAUGHT = {
    "tree_sum_without_barrier": (ALL, WRONG),
    "tree_sum_of_uninitialised_memory": (ALL, "got -?nan"),
    "row_sums_without_barrier_before_reading": (ALL, "got -?nan"),
    "row_sums_without_barrier_after_reading": (in_order("greedy"), WRONG),
    "pipeline_without_wait": (LAZY, "got -?nan"),
    "pipeline_with_wait_for_too_few": (LAZY, "got -?nan"),
    "pipeline_without_barrier_before_reading": (ALL, "got -?nan"),
    "pipeline_without_barrier_before_refill": (EAGER, WRONG),
    "pipeline_of_misaligned_copies": (ALL, "copy from memory that is not aligned"),
    "neighbours_without_barrier": (in_order("forward", "random", "greedy"), "got -?nan"),
    "neighbours_before_without_barrier": (in_order("reverse", "random"), "got -?nan"),
    "neighbours_read_after_the_end": (ALL, f"got -?nan|{OUTSIDE}"),
    "neighbours_write_after_the_end": (ALL, f"is written to after its end|{OUTSIDE}"),
    "neighbours_read_after_shared_memory": (ALL, f"got -?nan|{OUTSIDE}"),
    "neighbours_write_after_shared_memory": (ALL, f"a write outside of shared memory|{OUTSIDE}"),
    "barriers_that_differ": (ALL, "threads wait at different barriers"),
    "barrier_of_half_a_warp": (ALL, "deadlock"),
    "shuffle_of_half_a_warp": (ALL, "deadlock"),
    "operations_that_differ": (ALL, "lanes of a warp are at different operations"),
    "vector_misaligned": (ALL, "misaligned address"),  # in the sanitizers' build alone
}

# Memory accesses hardly depend on the order, and the other tests of the kernels run them all.
OPERATOR_SCHEDULES = ("forward-lazy", "greedy-lazy", "reverse-eager")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True)


CASES = run("--list").stdout.split()
BROKEN = [case.removeprefix("broken/") for case in CASES if case.startswith("broken/")]


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("broken/")])
def test_passes(case: str) -> None:
    schedules = OPERATOR_SCHEDULES if case.startswith("operator/") else sorted(ALL)
    result = run(case, *(word for schedule in schedules for word in ("--schedule", schedule)))
    assert result.returncode == 0, result.stdout + result.stderr
    assert set(re.findall(r"(\S+): passed$", result.stdout, re.M)) == set(schedules)


@pytest.mark.parametrize("kernel", BROKEN)
def test_broken_kernel_is_caught(kernel: str) -> None:
    schedules, reason = CAUGHT[kernel]
    # A process for each: the sanitizers end it.
    results = {schedule: run(f"broken/{kernel}", "--schedule", schedule) for schedule in sorted(ALL)}
    assert {schedule for schedule, result in results.items() if result.returncode != 0} == schedules
    for schedule in schedules:
        assert re.search(reason, results[schedule].stdout + results[schedule].stderr), results[schedule]


def test_no_schedule_catches_all() -> None:
    assert set(BROKEN) <= set(CAUGHT)
    for schedule in ALL:
        assert any(schedule not in schedules for schedules, _ in CAUGHT.values()), schedule
