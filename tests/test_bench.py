"""The benchmark harness: what it measures is right, and what is wrong it refuses to measure."""

from __future__ import annotations

import gc
import gzip
import json
import mmap
import struct
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fastnn
import fastnn.bench
from fastnn.bench import machine, timing
from fastnn.bench.operators import NETWORKS, OPERATORS, Case, Sides, tensor_sizes
from fastnn.bench.timing import OURS, Disagreement, Spread, check_outputs, check_sides, compare, interleave, repeated
from fastnn.cli import app

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))  # its scripts import each other by name

import convert  # noqa: E402
import gpu  # noqa: E402
import nets  # noqa: E402
import readme  # noqa: E402
import run  # noqa: E402
import training  # noqa: E402
import workers  # noqa: E402

# ---------------------------------------------------------------------------------------------------- timing


def test_a_spread_is_the_median_with_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0, 7.0, 6.0]) == Spread(median=4.0, q1=2.5, q3=5.5)


def test_a_comparison_takes_the_fastest_opponent_and_ratios_within_a_round() -> None:
    # In the last round everything is ten times slower, which leaves the ratios as they are.
    samples = {OURS: [1.0, 2.0, 10.0], "slow": [9.0, 9.0, 90.0], "quick": [2.0, 4.0, 20.0]}
    comparison = compare(samples)
    assert comparison.opponent == "quick"
    assert comparison.ratio == Spread(2.0, 2.0, 2.0)
    assert comparison.ours.median == 2.0
    assert compare(samples, theirs="slow").ratio.median == 9.0


def test_rounds_take_turns_and_begin_with_another_side_each_time() -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return float(len(order))

    samples = interleave({name: lambda name=name: side(name) for name in "abc"}, 7)
    assert "".join(order) == "abcbcacab" * 2 + "abc"
    assert all(len(values) == 7 for values in samples.values())
    assert samples["a"][:3] == [1.0, 6.0, 8.0]


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 7, got 6"):
        interleave({OURS: lambda: 1.0}, 6)


def test_a_round_repeats_short_calls_and_makes_long_ones_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call_of(seconds: float) -> Any:
        def call() -> None:
            calls.append(seconds)
            now[0] += seconds

        return call

    for seconds, expected in ((1e-4, 100), (0.5, 1)):
        calls: list[float] = []
        one_round = repeated(call_of(seconds), round_seconds=0.01)
        calls.clear()
        assert one_round() == pytest.approx(seconds)
        assert len(calls) == expected


def test_nothing_is_collected_while_a_call_is_timed() -> None:
    collecting = []
    repeated(lambda: collecting.append(gc.isenabled()), 1e-6)()
    assert collecting[-1] is False
    assert gc.isenabled()


def test_geometric_mean() -> None:
    assert timing.geometric_mean([2.0, 0.5, 8.0]) == pytest.approx(2.0)


DIFFERENT: dict[str, tuple[Any, Any, str]] = {
    "value": (torch.ones(1000), torch.ones(1000).index_fill(0, torch.tensor([7]), 1.01), "differ by 0.01"),
    "nan": (torch.ones(3), torch.tensor([1.0, float("nan"), 1.0]), "differ by nan"),
    "shape": (torch.ones(2, 3), torch.ones(3, 2), r"returned \(2, 3\), torch \(3, 2\)"),
    "count": ([torch.ones(2)], [torch.ones(2), torch.ones(2)], "returned 1 tensors, torch 2"),
    "second": ([torch.ones(2), torch.ones(2)], [torch.ones(2), torch.zeros(2)], "output 1: "),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_outputs_that_differ_are_refused(case: str) -> None:
    ours, theirs, words = DIFFERENT[case]
    with pytest.raises(Disagreement, match=words):
        check_outputs({OURS: ours, "torch": theirs}, 1e-3)


def test_rounding_is_accepted_and_by_rms_a_maximum_that_moved() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    check_outputs({OURS: x, "torch": x * (1 + 1e-6)}, 1e-3)
    moved = x.clone()
    moved[0], moved[1] = x[1], x[0]
    check_outputs({OURS: x, "torch": moved}, 1e-2, "rms")
    with pytest.raises(Disagreement):
        check_outputs({OURS: x, "torch": x.roll(1)}, 1e-2, "rms")


def test_a_side_of_ours_that_ran_on_torch_is_refused() -> None:
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    calls = {OURS: lambda: fastnn.functional.linear(x, x), "torch": lambda: torch.nn.functional.linear(x, x)}
    with pytest.raises(Disagreement, match=r"linear fell back to torch: dtype torch\.bfloat16"):
        check_sides(calls, 1e-3)
    calls[OURS] = calls["torch"]
    with pytest.raises(Disagreement, match="none of our kernels ran"):
        check_sides(calls, 1e-3)


# ----------------------------------------------------------------------------------------------------- cases


def every_case(quick: bool) -> list[Case]:
    return fastnn.bench.select(list(OPERATORS), quick)


@pytest.mark.parametrize("quick", [True, False])
def test_cases_have_names_of_their_own(quick: bool) -> None:
    names = [case.name for case in every_case(quick)]
    assert len(set(names)) == len(names)
    assert {case.operator for case in every_case(quick)} == set(OPERATORS)


def test_the_convolutions_are_those_that_the_networks_have() -> None:
    # One 224x224 image through each layer once; ResNet-18 repeats most of its layers, VGG-16 some.
    assert NETWORKS["VGG-16"][1].flops(1) == 2 * 64 * 64 * 9 * 224 * 224
    assert [shape.out_size for shape in NETWORKS["LeNet-5"]] == [28, 10, 1]
    for network, shapes in NETWORKS.items():
        for shape in shapes if network != "LeNet-5" else ():
            assert shape.out_size == -(-shape.size // shape.stride), f"{network} {shape}"
    assert any(shape.groups > 1 for shape in NETWORKS["MobileNet"])
    quick = {case.shape for case in OPERATORS["conv2d"](True)}
    assert any("depthwise" in shape for shape in quick)
    assert not any(case.stage == "grad_input" and "x3x224" in case.shape for case in OPERATORS["conv2d"](False))


SMALLEST = {
    (case.operator, case.stage): case
    for case in sorted(every_case(True), key=lambda case: -(case.flops or 0))
    if case.operator != "overhead"
}


@pytest.mark.parametrize("operator,stage", SMALLEST)
def test_both_sides_of_each_operator_agree(operator: str, stage: str) -> None:
    sides = SMALLEST[operator, stage].make()
    assert next(iter(sides.calls)) == OURS
    assert check_sides(sides.calls, sides.tolerance, sides.norm)


@pytest.mark.parametrize("case", list(OPERATORS["overhead"](True)), ids=lambda case: case.shape.split(",")[0])
def test_both_sides_of_each_tiny_call_agree(case: Case) -> None:
    sides = case.make()
    assert check_sides(sides.calls, sides.tolerance, sides.norm)


@pytest.mark.parametrize("count", [1, 2, 50, 500])
def test_tensor_sizes_add_up(count: int) -> None:
    sizes = tensor_sizes(count, 10**5)
    assert len(sizes) == count
    assert sum(sizes) == 10**5
    assert min(sizes) > 0


# --------------------------------------------------------------------------------------------------- command

MACHINE_KEYS = {
    "cpu": str,
    "cores": int,
    "cpu_flags": list,
    "system": str,
    "isa": str,
    "isas_available": list,
    "threads": int,
    "versions": dict,
    "torch_cpu_capability": str,
    "float32_matmul_precision": str,
    "environment": dict,
    "date": str,
}
RESULT_KEYS = {
    "operator": str,
    "network": str,
    "shape": str,
    "stage": str,
    "flops": int,
    "isa": str,
    "threads": int,
    "kernels": list,
    "fastnn": dict,
    "torch": dict,
    "opponent": str,
    "ratio": dict,
}


def has_keys(document: dict[str, Any], keys: dict[str, type]) -> None:
    for key, kind in keys.items():
        assert isinstance(document[key], kind), key


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    before = torch.get_num_threads(), fastnn.get_isa()
    arguments = ["bench", "--quick", "--operator", "linear", "--threads", "1", "--isa", "baseline", "--rounds", "7"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(path)])
    assert done.exit_code == 0, done.output
    assert (torch.get_num_threads(), fastnn.get_isa()) == before
    assert "1 thread, baseline; fastnn" in done.stdout
    for words in ("32x1600 → 64", "grad_weight", "GFLOP/s", "geometric mean"):
        assert words in done.stdout
    document = json.loads(path.read_text())
    has_keys(document["machine"], MACHINE_KEYS)
    assert document["settings"] == {
        "rounds": 7,
        "round_seconds": fastnn.bench.QUICK_ROUND_SECONDS,
        "quick": True,
    }
    assert len(document["results"]) == len(list(OPERATORS["linear"](True)))
    for result in document["results"]:
        has_keys(result, RESULT_KEYS)
        assert (result["isa"], result["threads"]) == ("baseline", 1)
        for spread in (result["fastnn"], result["torch"], result["ratio"]):
            assert 0 < spread["q1"] <= spread["median"] <= spread["q3"]
    assert document["summary"]["linear"]["cases"] == len(document["results"])
    assert document["summary"]["linear"]["lowest"] == min(r["ratio"]["median"] for r in document["results"])
    # One result a line, so that two files differ by results.
    assert sum('"operator"' in line for line in path.read_text().splitlines()) == len(document["results"])


BAD_OPTIONS = {
    "rounds": (["--rounds", "3"], "expected at least 7, got 3"),
    "operator": (["--operator", "conv9d"], "invalid choice: 'conv9d'"),
    "threads": (["--threads", "0"], "expected at least 1, got 0"),
    "match": (["--operator", "relu", "--match", "nonesuch"], "no case of relu contains 'nonesuch'"),
    "json": (["--json", "gone/bench.json"], "the folder 'gone' does not exist"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_end_with_code_2(case: str) -> None:
    arguments, words = BAD_OPTIONS[case]
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert words in done.stderr


def test_match_and_list_name_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert fastnn.bench.main(["--operator", "conv2d", "--match", "depthwise forward", "--list"]) is None
    lines = capsys.readouterr().out.splitlines()
    networks = [line.split()[1] for line in lines]
    assert networks == ["MobileNet"] * 9 * 3 + ["ConvNeXt-T"] * 4 * 3  # depthwise layers, of three batch sizes


def test_a_case_whose_sides_differ_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    x = torch.ones(2, 2)

    def wrong() -> Sides:
        return Sides({OURS: lambda: fastnn.functional.linear(x, x), "torch": lambda: x})

    monkeypatch.setitem(OPERATORS, "relu", lambda quick: iter([Case("relu", "net", "2x2", "forward", None, wrong)]))
    path = tmp_path / "bench.json"
    assert fastnn.bench.main(["--operator", "relu", "--json", str(path)]) == 1
    assert "error: relu net 2x2 forward: output 0: fastnn and torch differ by 1 (max)" in capsys.readouterr().err
    assert not path.exists()


def test_the_machine_is_described_in_one_line() -> None:
    facts = machine.describe()
    assert json.loads(json.dumps(facts)) == facts
    line = machine.summary(facts)
    assert facts["cpu"] in line
    assert f"torch {torch.__version__}" in line
    assert machine.summary({**facts, "threads": 1}).count("1 thread,") == 1


# --------------------------------------------------------------------------------------------- tables, results

README = """# Title
<!-- benchmarks:avx512-training -->
of another processor
<!-- /benchmarks -->
<!-- benchmarks:avx2-training -->
old
| table |
<!-- /benchmarks -->
between
<!-- benchmarks:avx2-operators -->
<!-- /benchmarks -->
after
"""


def test_tables_are_rewritten_and_nothing_else() -> None:
    tables = {"avx2-training": "T1\nT2\n", "avx2-operators": "O"}
    changed = readme.rewrite(README, tables)
    assert changed == README.replace("old\n| table |\n", "T1\nT2\n").replace("operators -->\n", "operators -->\nO\n")
    assert readme.rewrite(changed, tables) == changed
    assert readme.rewrite(changed, {"avx2-training": "T3"}) == changed.replace("T1\nT2\n", "T3\n")


def test_the_readme_shows_the_results() -> None:
    tables = {}
    for isa in ("avx2", "avx512"):
        document = json.loads((BENCHMARKS / "results" / f"cpu-{isa}.json").read_text(encoding="utf-8"))
        tables[f"{isa}-operators"] = run.operators_table(document["operators"])
        tables[f"{isa}-training"] = run.training_table(document["training"])
    text = readme.README.read_text(encoding="utf-8")
    assert readme.rewrite(text, tables) == text
    gpus = [json.loads(path.read_text(encoding="utf-8")) for path in (BENCHMARKS / "results").glob("nvidia-*.json")]
    assert text in [readme.rewrite(text, {"gpu": gpu.table(document)}) for document in gpus]  # the last one measured


# Its tables are those of the processor at hand.
BEST_ISA = fastnn.available_isas()[-1]
OWN_README = README.replace("avx512-training", "gpu").replace("avx2", BEST_ISA)
has_tables = pytest.mark.skipif(
    f"{BEST_ISA}-training" not in readme.TABLES, reason=f"the README has no tables of {BEST_ISA}"
)

MARKER = f"<!-- benchmarks:{BEST_ISA}-operators -->"
BAD_README = {
    "no markers": ("# Title\n", f"expected {MARKER}"),
    "one marker": (OWN_README.replace(MARKER, "<!-- benchmarks:gpu -->"), f"expected {MARKER}"),
    "not closed": (f"{MARKER}\nold\n", "expected <!-- /benchmarks --> after"),
    "closed late": (OWN_README.replace("<!-- /benchmarks -->\nb", "b"), "expected <!-- /benchmarks --> after"),
    "unknown": (OWN_README.replace("benchmarks:gpu", "benchmarks:tpu"), "got tpu"),
}


@has_tables
@pytest.mark.parametrize("case", BAD_README)
def test_a_readme_without_its_markers_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, words = BAD_README[case]
    readme = tmp_path / "README.md"
    readme.write_text(text)
    # Before anything is measured, so this returns at once.
    assert run.main(["--readme", str(readme), "--results", str(tmp_path / "results")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert str(readme) in error
    assert readme.read_text() == text
    assert not (tmp_path / "results").exists()


def test_a_partial_run_does_not_overwrite_published_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--quick"]) == 2
    assert "give --results and --readme" in capsys.readouterr().err


@has_tables
def test_run_writes_results_and_tables_and_keeps_the_other_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(OWN_README)
    folders = ["--readme", str(readme), "--results", str(results), "--quick", "--threads", "1"]
    assert run.main([*folders, "--only", "operators", "--operator", "overhead"]) == 0
    text = readme.read_text()
    assert "| overhead | 8 | " in text
    assert "Not measured yet" in text
    path = results / f"cpu-{fastnn.get_isa()}.json"
    assert list(json.loads(path.read_text())) == ["operators"]

    monkeypatch.setattr(training, "ROWS", {"predict": (training.predict, (nets.REFERENCE,))})
    assert run.main([*folders, "--only", "training"]) == 0
    text = readme.read_text()
    assert "| reference net: predict_proba, 256 images | " in text
    assert "scikit-learn digits" in text
    assert "| overhead | 8 | " in text
    assert text.startswith(OWN_README.partition(f"<!-- benchmarks:{BEST_ISA}-training")[0])
    assert text.endswith("after\n")
    document = json.loads(path.read_text())
    has_keys(document["training"]["machine"], MACHINE_KEYS)
    (result,) = document["training"]["results"]
    assert (result["net"], result["threads"], result["unit"]) == ("reference", 1, "images/s")
    assert result["ratio"]["median"] > 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--cifar", "a folder or an .npz file; got 'nowhere'"),
        ("--keras-python", "expected an interpreter, got 'nowhere'"),
    ],
)
def test_what_cannot_be_read_is_told_before_anything_is_measured(
    option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main(["--quick", option, "nowhere"]) == 2
    out, error = capsys.readouterr()
    assert message in error
    assert out == ""


def test_results_of_a_forced_isa_stay_out_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if len(fastnn.available_isas()) == 1:
        pytest.skip("this processor runs the baseline kernels alone")
    monkeypatch.setattr(training, "ROWS", {})
    readme = tmp_path / "README.md"
    readme.write_text(OWN_README)
    with fastnn.bench.threads_and_isa(isa="baseline"):
        assert run.main(["--readme", str(readme), "--results", str(tmp_path), "--quick", "--only", "training"]) == 0
    assert (tmp_path / "cpu-baseline.json").exists()
    assert readme.read_text() == OWN_README


# --------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("net", nets.NETS.values(), ids=lambda net: net.name)
def test_all_models_of_a_net_start_and_train_alike(net: nets.Net) -> None:
    train, _ = nets.load_images(net, None)
    training.check_same_training(net, train, 16)


def test_a_training_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = nets.load_images(nets.REFERENCE, None)
    epoch = nets.loop_epoch

    def slower(model: Any, optimizer: Any, *args: Any, **options: Any) -> None:
        optimizer.param_groups[0]["lr"] /= 2
        epoch(model, optimizer, *args, **options)

    monkeypatch.setattr(training, "loop_epoch", slower)
    with pytest.raises(Disagreement, match="reference, batch 16, logits after five steps: output 0"):
        training.check_same_training(nets.REFERENCE, train, 16)


def test_images_are_repeated_where_there_are_too_few() -> None:
    train, _ = nets.load_images(nets.REFERENCE, None)
    more = train.first(len(train) + 5)
    assert torch.equal(more.raw[-5:], train.raw[:5])
    assert more.source == f"scikit-learn digits, {len(train)} repeated to {len(train) + 5}"


def test_an_epoch_of_fit_is_timed_in_its_steady_state() -> None:
    train = nets.load_images(nets.REFERENCE, None)[0].first(64)
    isa = fastnn.get_isa()
    epoch = nets.fit_epoch(nets.REFERENCE, train.scaled, train.labels, 32, isa="baseline")
    assert 0 < epoch() < 60
    assert fastnn.get_isa() == isa


FORMATS = [
    (41_234.0, "images/s", "41,200 images/s"),
    (512.3, "images/s", "512 images/s"),
    (11.4e6, "bytes", "11.4 MB"),
    (0.0123, "s", "12.3 ms"),
    (3.214, "s", "3.21 s"),
]


@pytest.mark.parametrize(("value", "unit", "text"), FORMATS)
def test_values_are_written_for_people(value: float, unit: str, text: str) -> None:
    assert training.format_value(value, unit) == text


def test_targets_are_those_of_processors_with_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastnn, "available_isas", lambda: ["baseline", "avx2"])
    plan = training.Plan(None, None, None, 2, 7, None, False)
    plan.add("epochs", nets.REFERENCE, "fit", "PyTorch", {OURS: [1.0] * 7, "torch": [8.0] * 7}, target=9.0)
    assert training.describe(plan.results[0]).endswith("ratio 8.00x (8.00-8.00)")


def test_rows_say_whether_the_target_was_reached_and_why_one_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastnn, "available_isas", lambda: ["baseline", "avx2", "avx512"])
    plan = training.Plan(None, None, None, 2, 7, None, False)
    seconds = {OURS: [1.0] * 7, "torch": [8.0] * 7}
    plan.add("epochs", nets.REFERENCE, "fit", "PyTorch", seconds, target=7.0, images=800, batch=32)
    plan.add("epochs", nets.REFERENCE, "fit", "PyTorch", seconds, target=9.0)
    plan.skip("keras", nets.REFERENCE, "one epoch", "no TensorFlow here")
    plan.skip("keras", nets.CIFAR, "one epoch", "no TensorFlow here")
    first, second, third, _ = map(training.describe, plan.results)
    assert first == (
        "reference: fit, batch 32: 800 images/s, PyTorch: 100 images/s, ratio 8.00x (8.00-8.00), target 7.0x reached"
    )
    assert second.endswith("target 9.0x MISSED")
    assert third == "reference: one epoch: skipped, no TensorFlow here"
    section = {"machine": machine.describe(), "settings": {"rounds": 7}, "results": plan.results}
    table = run.training_table(section)
    assert "| reference net: fit, batch 32 | 800 images/s | 100 images/s (PyTorch) | **8.00x** (8.00-8.00) |" in table
    titles = "reference net: one epoch, CIFAR-sized net: one epoch"
    assert f"Not measured: {titles} (no TensorFlow here)." in table


def test_the_time_to_an_accuracy_ends_at_its_line() -> None:
    code = "print('test accuracy 99.12% (9912 of 10000 images)'); import time; time.sleep(1)"
    seconds, percent = training.seconds_to_accuracy([sys.executable, "-c", code])
    assert percent == 99.12
    assert 0 < seconds < 30
    with pytest.raises(RuntimeError, match="ended with code 3"):
        training.seconds_to_accuracy([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_worker_answers_and_its_end_is_told() -> None:
    code = "import sys; print('{\"a\": 1}', flush=True); [print(2.5, flush=True) for _ in sys.stdin]"
    with closing(workers.Worker([sys.executable, "-c", code])) as worker:
        assert worker.facts == {"a": 1}
        assert worker.ask() == 2.5
    assert worker.process.returncode == 0
    with pytest.raises(RuntimeError, match="ended with code 4"):
        workers.Worker([sys.executable, "-c", "raise SystemExit(4)"])


def test_peak_memory_sees_what_was_freed_again() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux can count the peak afresh")
    before = workers._reset_peak()
    with mmap.mmap(-1, 64 << 20) as memory:  # malloc might find as much among what earlier tests freed
        np.frombuffer(memory, dtype=np.uint8)[:] = 1
    assert 60 << 20 < workers._peak() - before < 100 << 20
    assert workers._reset_peak() < before + (32 << 20)


def test_the_torch_side_of_the_time_to_accuracy_runs(tmp_path: Path) -> None:
    for part, count in (("train", 64), ("t10k", 32)):
        images = struct.pack(">4I", 0x803, count, 28, 28) + bytes(count * 784)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        labels = struct.pack(">2I", 0x801, count) + bytes([3] * count)
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    command = workers.script("torch_accuracy.py", tmp_path, 4, 16, 0.01, "one-cycle", 1, 0)
    assert training.seconds_to_accuracy(command)[1] == 100.0


def test_the_speed_of_a_network_before_and_after_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(convert, "QUICK_ROUND_SECONDS", 0.0)
    convert.main(["--only", "CIFAR-10 tutorial", "--batch", "2", "--quick", "--json", str(tmp_path / "speed.json")])
    assert "CIFAR-10 tutorial, training, batch 2: " in capsys.readouterr().out
    rows = json.loads((tmp_path / "speed.json").read_text())["results"]
    assert [(row["what"], row["side"]) for row in rows] == [
        (what, side) for what in ("training", "prediction") for side in (OURS, convert.COMPILED)
    ]
    torch._dynamo.reset()


def test_bad_options_of_the_training_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert training.main(["--rounds", "3"]) == 2
    assert training.main(["--threads", "0"]) == 2
    assert training.main(["--mnist", "gone/mnist", "--rows", "predict"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "error: --rounds: expected at least 7, got 3"
    assert errors[1] == "error: --threads: expected at least 1, got 0"
    assert "gone/mnist" in errors[2]


COUNT_FAULTS = """
import itertools, resource
import torch
from fastnn.bench import timing

def fewest_faults():
    counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
    for _ in range(8):
        torch.ones(1 << 24)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return min(after - before for before, after in itertools.pairwise(counts))

before = fewest_faults()
with timing.keep_pages() as kept:
    print(int(kept), before, fewest_faults())
"""


def test_large_results_keep_their_pages() -> None:
    """Of 16,384 pages of 4 KiB, or 32 of 2 MiB; in a process of its own, whose heap has no gap as large."""
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, timeout=120, check=True)
    kept, before, faults = map(int, done.stdout.split())
    if not kept:
        pytest.skip("the C library is not glibc")
    assert before > 16
    assert faults < 16


# ------------------------------------------------------------------------------------------- torch at its best


def test_torchs_optimizers_are_fused_and_foreach(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Adam(torch.optim.Adam):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self.defaults)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    sides = next(iter(OPERATORS["adam"](quick=True))).make()
    assert set(sides.calls) == {OURS, "torch fused", "torch foreach"}
    assert [options["fused"] for options in made] == [True, None]
    assert [options["foreach"] for options in made] == [None, True]


@pytest.mark.parametrize("operator", ["conv2d", "max_pool2d"])
def test_torchs_images_are_channels_last(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    function = getattr(torch.nn.functional, operator)

    def spy(input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(input)
        return function(input, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, operator, spy)
    for case in OPERATORS[operator](quick=True):
        case.make().calls["torch"]()
    assert given
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images in given)


def test_torchs_training_loop_is_channels_last_and_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = []

    def timed_loop(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> Any:
        loops.append((model, optimizer))

    monkeypatch.setattr(nets, "_timed_loop", timed_loop)
    nets.torch_epoch(nets.CIFAR, nets.random_images(nets.CIFAR, 8, 0), 4)
    ((model, optimizer),) = loops
    assert type(optimizer) is torch.optim.Adam and optimizer.defaults["fused"]
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_the_batches_of_the_training_loop_are_channels_last() -> None:
    given = []
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(36, 10))
    model.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    images = nets.random_images(nets.Net("tiny", (3, 5, 5), (), (), 0), 8, 0)
    nets._timed_loop(model, torch.optim.SGD(model.parameters()), images, 4)
    assert given
    assert all(batch.is_contiguous(memory_format=torch.channels_last) for batch in given)
