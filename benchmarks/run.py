"""All benchmarks: writes benchmarks/results/cpu-<isa>.json and the tables between the markers in README.md.

    python benchmarks/run.py [--mnist FOLDER] [--cifar SOURCE] [--keras-python PYTHON] [--only operators|training]

The README has tables of processors with AVX-512 and of those with AVX2 alone. One stands between a marker such as
``<!-- benchmarks:avx2-training -->`` or ``<!-- benchmarks:avx2-operators -->`` and ``<!-- /benchmarks -->``; nothing
else of the README is touched. With ``--only`` the other half stays as the last run wrote it. Results of a forced ISA
(``FASTNN_ISA``) go to their own file and not into the README.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import training
from readme import README, TABLES, rewritten, write_tables

import fastnn
from fastnn import bench
from fastnn.bench import machine
from fastnn.bench.operators import OPERATORS
from fastnn.bench.timing import keep_pages

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("operators", "training")
OPERATOR_ROUNDS = 9


# ---------------------------------------------------------------------------------------------------- tables


def training_table(section: Mapping[str, Any]) -> str:
    """Markdown of the rows of `training.run`."""
    lines = ["| | fastnn | compared with | ratio |", "|---|---:|---:|---:|"]
    skipped: dict[str, list[str]] = {}  # by the reason
    for result in section["results"]:
        title = f"{result['net']} net: {result['what']}" + (f", batch {result['batch']}" if "batch" in result else "")
        if "skipped" in result:
            skipped.setdefault(result["skipped"], []).append(title)
            continue
        ours, theirs = (training.format_value(result[side]["median"], result["unit"]) for side in ("ours", "theirs"))
        lines.append(f"| {title} | {ours} | {theirs} ({result['against']}) | {_ratio(result['ratio'])} |")
    data = dict.fromkeys(f"{r['net']} net {r['data']}" for r in section["results"] if "data" in r)
    lines += ["", f"{_origin(section)} Images: {'; '.join(data)}."] if data else ["", _origin(section)]
    if skipped:
        rows = "; ".join(f"{', '.join(dict.fromkeys(titles))} ({reason})" for reason, titles in skipped.items())
        lines.append(f"Not measured: {rows}.")
    return "\n".join(lines)


def operators_table(section: Mapping[str, Any]) -> str:
    """Markdown of the summary of `fastnn.bench.run`."""
    lines = ["| operator | cases | geometric mean | lowest |", "|---|---:|---:|---|"]
    for name, facts in section["summary"].items():
        lines.append(
            f"| {name} | {facts['cases']} | {facts['geometric_mean']:.2f}x "
            f"| {facts['lowest']:.2f}x ({facts['lowest_case']}) |"
        )
    return "\n".join([*lines, "", f"{_origin(section)} Times of PyTorch over times of fastnn."])


def _ratio(spread: Mapping[str, float]) -> str:
    return f"**{spread['median']:.2f}x** ({spread['q1']:.2f}-{spread['q3']:.2f})"


def _origin(section: Mapping[str, Any]) -> str:
    return (
        f"Written by `make bench` on {section['machine']['date']}: {machine.summary(section['machine'])}. Medians of "
        f"{section['settings']['rounds']} interleaved rounds (quartiles in brackets), the same threads on both sides."
    )


# --------------------------------------------------------------------------------------------------- command


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    training.add_options(parser)
    parser.add_argument("--only", choices=SECTIONS, help="this half alone; the other stays as it was")
    parser.add_argument("--operator", action="append", choices=list(OPERATORS), help="only this one; may be repeated")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="instead of benchmarks/results")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="instead of README.md")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (ValueError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, bench.Disagreement) else 2
    return 0


def run(options: argparse.Namespace) -> None:
    if (options.quick or options.operator or options.rows) and not (options.results and options.readme):
        raise ValueError("a partial run is not for publication: give --results and --readme as well")
    results: Path = options.results or ROOT / "benchmarks" / "results"
    readme: Path = options.readme or README
    isa = fastnn.get_isa()
    path = results / f"cpu-{isa}.json"
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    tables = [_table(isa, section) for section in SECTIONS]
    publishes = isa == fastnn.available_isas()[-1] and set(tables) <= set(TABLES)
    if publishes:  # an hour of measuring must not end at a missing marker
        rewritten(readme, dict.fromkeys(tables, ""))
    sections = SECTIONS if options.only is None else (options.only,)
    plan = training.plan_of(options) if "training" in sections else None
    for section in sections:
        document[section] = training.run(plan) if section == "training" else measure_operators(options)
        # After each half, so that an interrupt loses one at most.
        results.mkdir(parents=True, exist_ok=True)
        bench.write_json(path, {name: document[name] for name in SECTIONS if name in document})
    print(f"wrote {path}")
    if publishes:
        publish(readme, isa, document)
        print(f"wrote the tables in {readme}")
    else:
        print(
            f"{readme} has tables of a processor's best ISA, avx512 or avx2; the results of {isa} are in {path} alone"
        )


def _table(isa: str, section: str) -> str:
    return f"{isa}-{section}"


def measure_operators(options: argparse.Namespace) -> dict[str, Any]:
    with keep_pages(), bench.threads_and_isa(options.threads):
        cases = bench.select(options.operator or list(OPERATORS), options.quick)
        seconds = bench.QUICK_ROUND_SECONDS if options.quick else bench.ROUND_SECONDS
        return bench.run(cases, rounds=OPERATOR_ROUNDS, round_seconds=seconds, quick=options.quick)


def publish(readme: Path, isa: str, document: Mapping[str, Any]) -> None:
    """Rewrites the marked tables of the README."""
    makers = {"operators": operators_table, "training": training_table}
    tables = {
        _table(isa, name): make(document[name]) if name in document else "Not measured yet: `make bench`."
        for name, make in makers.items()
    }
    write_tables(readme, tables)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
