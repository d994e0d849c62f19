"""The benchmarks of a GPU: what they compute from times, what they print, and that their code runs, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # its scripts import each other by name

import gpu  # noqa: E402
import gpu_all  # noqa: E402
import gpu_sections  # noqa: E402
from gpu_sections import OURS, Device, Disagreement  # noqa: E402

SAMPLES = {OURS: [1e-5, 2e-5, 4e-5], "torch": [4e-5, 6e-5, 20e-5]}


def test_a_comparison_takes_ratios_within_a_round() -> None:
    row = gpu_sections.compared("step", SAMPLES, OURS, "torch", 4.0, batch=32)
    assert (row["ratio"]["low"], row["ratio"]["median"], row["ratio"]["high"]) == (3.0, 4.0, 5.0)
    assert row["microseconds"]["median"] == 20.0
    assert row["their_microseconds"]["high"] == 200.0
    assert row["reached"]
    assert not gpu_sections.compared("step", SAMPLES, OURS, "torch", 4.1)["reached"]


def test_rows_are_told_in_a_line() -> None:
    row = gpu_sections.compared("step", SAMPLES, OURS, "torch", 4.0, batch=32, precision="tf32")
    assert gpu.describe(row) == "step, batch 32, tf32: 20.0 us, 60.0 us (torch), 4.00x (3.00 - 5.00), 4x reached"
    row = gpu_sections.absolute("fit", [0.5, 0.7, 0.6], 3e5)
    assert gpu.describe(row) == "fit: 600.00 ms (500.00 ms - 700.00 ms), at most 300.00 ms MISSED"
    assert gpu.describe(gpu_sections.failed("adam", ValueError("no\nmemory"))) == (
        "adam: not measured: ValueError: no memory"
    )
    row = {"what": "MNIST", "seconds": 1.5, "accuracy": 0.9912}
    assert gpu.describe(row) == "MNIST: 1.50 s, 99.12% right"


def test_the_geometric_mean_of_blocks_has_the_target() -> None:
    rows: list[dict[str, Any]] = []
    gpu_sections.add_means(rows.append, {"tf32, forward": [2.0, 0.5], "bf16, forward": [0.25, 1.0], "none": []})
    means = {row["what"]: row["ratio"]["median"] for row in rows}
    assert means == {
        "conv blocks, tf32, forward: geometric mean of 2": 1.0,
        "conv blocks, bf16, forward: geometric mean of 2": 0.5,
        "conv blocks, all: geometric mean of 4": 0.7071,
    }
    assert [row["reached"] for row in rows] == [True, False, False]


@pytest.mark.parametrize(
    ("name", "kebab"),
    [("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"), ("NVIDIA GeForce RTX 4090 (D)", "nvidia-geforce-rtx-4090-d")],
)
def test_results_are_named_after_the_gpu(name: str, kebab: str) -> None:
    assert gpu.kebab(name) == kebab


MACHINE = {
    "gpu": {"name": "NVIDIA H100", "driver": "600.1", "cuda": "13.0", "cudnn": 91000},
    "versions": {"fastnn": "0.1.0", "torch": "2.13.0"},
    "date": "2026-01-01",
}


def test_the_document_keeps_other_sections_of_the_same_gpu_and_versions() -> None:
    row = gpu_sections.absolute("step", SAMPLES[OURS], 30.0, batch=32, precision="tf32")
    first = gpu.merged({}, MACHINE, {"steps": [row]})
    second = gpu.merged(json.loads(json.dumps(first)), MACHINE, {"mnist": [gpu_sections.failed("mnist", "no files")]})
    assert list(second["sections"]) == ["mnist", "steps"]
    assert gpu.has_errors(second["sections"])
    newer = {**MACHINE, "versions": {"fastnn": "0.2.0", "torch": "2.13.0"}}
    assert list(gpu.merged(second, newer, {"adam": []})["sections"]) == ["adam"]
    table = gpu.table(second)
    assert "| step, batch 32, tf32 | 20.0 us (10.0 us - 40.0 us) |  |  | at most 30.0 us reached |" in table
    assert "| mnist | not measured: no files |" in table
    assert "NVIDIA H100, driver 600.1, CUDA 13.0, cuDNN 91000; fastnn 0.1.0, torch 2.13.0." in table


def test_the_readme_gets_the_table_of_a_results_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = gpu_sections.absolute("step", SAMPLES[OURS], 30.0, batch=32, precision="tf32")
    single = gpu_sections.compared("conv block 3x3", SAMPLES, OURS, "torch", None, flops=10)
    results, readme = tmp_path / "gpu.json", tmp_path / "README.md"
    results.write_text(json.dumps(gpu.merged({}, MACHINE, {"steps": [row], "blocks": [single]})))
    readme.write_text("before\n<!-- benchmarks:gpu -->\nold\n<!-- /benchmarks -->\nafter\n")
    command = ["--publish", str(results), "--readme", str(readme)]
    assert gpu.main(command) == 0
    text = readme.read_text()
    assert "| step, batch 32, tf32 | 20.0 us" in text
    assert "conv block 3x3" not in text  # in the file alone
    assert "old" not in text
    readme.write_text("no markers")
    assert gpu.main(command) == 2
    assert f"{readme}: expected <!-- benchmarks:gpu -->" in capsys.readouterr().err
    assert readme.read_text() == "no markers"


def test_only_what_torchs_compiler_cannot_do_is_no_failure() -> None:
    row = gpu_sections.failed("compiled", "was not done in 90 s")
    assert not gpu.has_errors({"compiled": [row]})
    assert gpu.has_errors({"compiled": [row], "steps": [row]})


@pytest.mark.parametrize("section", ["steps", "fit", "adam", "blocks"])
def test_sections_run(section: str) -> None:
    rows: list[dict[str, Any]] = []
    gpu_sections.run_section(section, Device("cpu", quick=True), rows.append)
    assert rows
    assert not [row["error"] for row in rows if "error" in row]
    assert all(gpu.describe(row) for row in rows)


def test_steps_whose_losses_differ_are_refused() -> None:
    images = torch.zeros(4, 1, 28, 28, dtype=torch.uint8)
    step = gpu_sections.our_step(Device("cpu"), images, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(Disagreement, match=r"step 1: the loss of fastnn is 2\.\d+, that of other 3"):
        gpu_sections.check_losses({OURS: step, "other": lambda rows: torch.tensor(3.0)}, [torch.arange(4)])


def test_an_error_in_a_section_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = []
    gpu_sections.run_section("mnist", Device("cpu"), rows.append)
    assert rows == [{"what": "mnist", "error": "ValueError: expected a folder with MNIST's files, got none"}]


def test_a_section_that_dies_or_hangs_leaves_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, os, time\n"
        'open(sys.argv[4], \'a\').write(\'{"what": "first", "error": "x"}\\n\')\n'
        "if sys.argv[2] == 'fit': time.sleep(60)\n"
        "print('CUDA error', file=sys.stderr); sys.stderr.flush(); os.abort()\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    first, second = gpu.run_apart("adam", [], 60)
    assert first["what"] == "first"
    assert second["error"] == "ended with code -6: CUDA error"
    assert gpu.run_apart("fit", [], 2)[1]["error"] == "was not done in 2 s"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["benchmarks/gpu.py", "tests/every_operator.py"])
def test_without_a_gpu_the_scripts_say_so(script: str) -> None:
    done = subprocess.run([sys.executable, ROOT / script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr == f"{script}: expected a GPU that torch sees, got none\n"


def test_every_operator_runs_on_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastnn._C_emulator", reason="built without FASTNN_EMULATOR")
    monkeypatch.setenv("FASTNN_CUDA_EMULATOR", "1")
    command = [sys.executable, "tests/every_operator.py", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "in bfloat16, float16, float32, float64: 0 failures" in done.stdout


# ------------------------------------------------------------------------------------------------------- the steps


def test_all_steps_run_and_the_failed_ones_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    steps = gpu_all.Steps()
    assert steps.run("good", [sys.executable, "-c", "print('hello')"], 60) == (0, "hello\n")
    assert steps.run("bad", [sys.executable, "-c", "raise SystemExit(3)"], 60)[0] == 3
    assert steps.run("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 6)[0] is None
    assert steps.run("missing", ["no-such-program"], 60)[0] == 127
    steps.skip("absent", "nothing to do")
    assert steps.failed == ["bad", "slow", "missing"]
    assert steps.results["slow"] == "not done in time"
    assert "hello\n" in capsys.readouterr().out


def test_a_step_past_its_time_ends_what_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "child = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
        "try: time.sleep(60)\n"
        "finally: child.kill(); child.wait()\n"
    )
    assert gpu_all.run_command([sys.executable, "-c", code], 3, {})[0] is None
    assert not Path("/proc", pid.read_text()).exists()


def test_the_benchmarks_get_their_time() -> None:
    steps = gpu_all.Steps(deadline=time.monotonic() + gpu_all.BENCHMARK_SECONDS)
    assert steps.run("late", [sys.executable, "-c", ""], 60)[0] is None
    assert steps.run("last", [sys.executable, "-c", ""], 60, reserve=0)[0] == 0


UNSUPPORTED = [
    (1, "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the", True),
    (gpu_all.FOUND_ERRORS, "========= Invalid __global__ read: not supported\n", False),
    (1, "Traceback: not supported", False),
    (None, "========= not supported", False),
    (0, "========= ERROR SUMMARY: 0 errors", False),
]


@pytest.mark.parametrize(("code", "output", "expected"), UNSUPPORTED)
def test_only_a_sanitizer_that_cannot_work_is_left_out(code: int | None, output: str, expected: bool) -> None:
    assert gpu_all.is_unsupported(code, output) is expected
