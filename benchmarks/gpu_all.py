"""All that `make gpu` does, step by step: build, tests, compute-sanitizer, MNIST, benchmarks.

    python benchmarks/gpu_all.py [--mnist FOLDER]

Every step runs, also after one that failed; the exit code is then 1. A step that takes too long is ended, so that the
whole stays under ten minutes and the benchmarks get their time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 590.0
BENCHMARK_SECONDS = 180.0  # kept for the last step
BUILD_SECONDS, TEST_SECONDS, SANITIZER_SECONDS, MNIST_SECONDS = 240.0, 150.0, 90.0, 75.0

PASSED = "passed"
FOUND_ERRORS = 99  # what compute-sanitizer then ends with
# What it says where it cannot work at all.
UNSUPPORTED = ("not supported", "unsupported", "insufficient driver", "permission", "unable to find injection")

TESTS = tuple(f"tests/test_{name}.py" for name in ("cuda_operators", "sequential", "training_devices", "cuda_build"))
EVERY_OPERATOR = (sys.executable, "tests/every_operator.py", "--device", "cuda")


@dataclass
class Steps:
    """Runs commands one after another and remembers how each ended."""

    results: dict[str, str] = field(default_factory=dict)
    deadline: float = field(default_factory=lambda: time.monotonic() + SECONDS)

    def run(
        self,
        name: str,
        command: Sequence[str],
        seconds: float,
        environment: dict[str, str] | None = None,
        reserve: float = BENCHMARK_SECONDS,
    ) -> tuple[int | None, str]:
        """Runs a command for so many seconds at most, with its output shown; returns its code and output.

        The code is None where the time was over.
        """
        seconds = min(seconds, self.deadline - time.monotonic() - reserve)
        print(f"\n=== {name} ({max(seconds, 0):.0f} s at most)\n$ {' '.join(command)}", flush=True)
        began = time.monotonic()
        code, output = run_command(command, seconds, environment or {}) if seconds > 5 else (None, "")
        self.results[name] = PASSED if code == 0 else "not done in time" if code is None else f"ended with code {code}"
        print(f"=== {name}: {self.results[name]}, {time.monotonic() - began:.0f} s", flush=True)
        return code, output

    def skip(self, name: str, why: str) -> None:
        """Notes a step that cannot run here, which is no failure."""
        self.results[name] = f"left out: {why}"
        print(f"\n=== {name}: {self.results[name]}", flush=True)

    @property
    def failed(self) -> list[str]:
        return [name for name, result in self.results.items() if result != PASSED and not result.startswith("left out")]


def run_command(command: Sequence[str], seconds: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """The command's exit code, None past its time, and what it printed, which is shown as well."""
    # This folder's package and tests, whatever else is installed.
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            print(error, flush=True)
            return 127, str(error)
        code: int | None = None
        shown = 0
        ends = time.monotonic() + seconds
        try:
            while code is None and time.monotonic() < ends:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=1)
                shown = show(output, shown)
        finally:
            end(process)
        show(output, shown)
        output.seek(0)
        return code, output.read()


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and what it started: asked first, since the benchmarks have to end processes of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def show(output: IO[str], shown: int) -> int:
    """Prints what is new of a file that a process writes to; returns how many bytes have been printed."""
    new = os.pread(output.fileno(), 1 << 24, shown)
    sys.stdout.write(new.decode(errors="replace"))
    sys.stdout.flush()
    return shown + len(new)


def build(steps: Steps) -> None:
    """Installs the package as it lies here; where pip will not, the extension is built in place, which is enough."""
    flags = f"-DCMAKE_CUDA_ARCHITECTURES=native {os.environ.get('CMAKE_ARGS', '')}".strip()
    environment = {"CMAKE_ARGS": flags, "FASTNN_CUDA": "ON"}
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    code, output = steps.run("build", pip, BUILD_SECONDS, environment)
    if code and not compiles_wrong(output):
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        steps.run("build", command, BUILD_SECONDS, environment)


def compiles_wrong(output: str) -> bool:
    """Whether a failed installation got to the compiler, which a second try would ask the same."""
    return "FAILED:" in output  # ninja's


def sanitize(steps: Steps, tool: str) -> None:
    """Every operator under a tool of compute-sanitizer."""
    program = find_sanitizer()
    if program is None:
        steps.skip(tool, "compute-sanitizer was not found")
        return
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND_ERRORS), "--print-limit", "20"]
    if tool == "memcheck":
        # torch asks the driver for things that may fail, and goes on.
        command += ["--report-api-errors", "no"]
    # Each tensor in memory of its own: between two of one block of torch's nobody would see an access go astray.
    code, output = steps.run(
        tool, [*command, *EVERY_OPERATOR], SANITIZER_SECONDS, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    )
    if is_unsupported(code, output):
        steps.skip(tool, "compute-sanitizer does not work here, see above")


def find_sanitizer() -> str | None:
    """The program, on the path or beside nvcc."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"]
    places += [str(Path(nvcc).resolve().parent)] if nvcc else []
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def is_unsupported(code: int | None, output: str) -> bool:
    """Whether compute-sanitizer gave up by itself, before it had found anything."""
    said = [line.lower() for line in output.splitlines() if line.startswith("=========")]
    return code not in (0, None, FOUND_ERRORS) and any(words in line for line in said for words in UNSUPPORTED)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mnist", metavar="FOLDER", help="also train on the four IDX files in here")
    options = parser.parse_args(arguments)
    steps = Steps()
    build(steps)
    # Without the options of pyproject.toml, one of which is a plugin's.
    pytest = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "--maxfail=50", *TESTS]
    steps.run("tests", pytest, TEST_SECONDS, {"FASTNN_TEST_DEVICE": "cuda"})
    steps.run("every operator", EVERY_OPERATOR, 45)
    for tool in ("memcheck", "racecheck"):
        sanitize(steps, tool)
    benchmarks = [sys.executable, "benchmarks/gpu.py"]
    if options.mnist:
        folder = str(Path(options.mnist).absolute())
        steps.run("MNIST", [*benchmarks, "--only", "mnist", "--mnist", folder], MNIST_SECONDS)
    else:
        steps.skip("MNIST", "make gpu MNIST=FOLDER trains on the four IDX files in FOLDER")
    left = steps.deadline - time.monotonic()
    steps.run("benchmarks", [*benchmarks, "--seconds", f"{left - 20:.0f}"], left, reserve=0)
    print()
    for name, result in steps.results.items():
        print(f"{name}: {result}")
    return 1 if steps.failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
