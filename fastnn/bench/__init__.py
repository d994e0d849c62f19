"""``fastnn bench``: the kernels against torch's, operator by operator.

`timing` measures, `operators` holds the cases, `machine` says what they ran on; here they become a table and
a JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import fastnn
from fastnn._extras import require
from fastnn._files import atomic_path
from fastnn.bench import machine
from fastnn.bench.operators import OPERATORS, Case
from fastnn.bench.timing import (
    MIN_ROUNDS,
    Disagreement,
    check_sides,
    compare,
    geometric_mean,
    interleave,
    keep_pages,
    repeated,
    significant,
)
from fastnn.runtime import thread_limit

__all__ = [
    "QUICK_ROUND_SECONDS",
    "ROUND_SECONDS",
    "Disagreement",
    "describe_spread",
    "file_to_write",
    "main",
    "measure",
    "run",
    "select",
    "summarise",
    "threads_and_isa",
    "write_json",
]

# A round of 50 ms is long against the clock's noise and short against the changes of a machine's load.
ROUND_SECONDS = 0.05
QUICK_ROUND_SECONDS = 0.005

Result = dict[str, Any]


def main(args: Sequence[str]) -> int | None:
    """The command: parses `args`, prints a table per operator and returns the exit code."""
    options = _parse(args)
    cases = [case for case in select(options.operator, options.quick) if options.match in case.name]
    if not cases:
        raise ValueError(f"--match: no case of {', '.join(options.operator)} contains {options.match!r}")
    if options.list:
        print("\n".join(case.name for case in cases))
        return None
    with keep_pages(), threads_and_isa(options.threads, options.isa):
        try:
            document = run(
                cases,
                rounds=options.rounds,
                round_seconds=QUICK_ROUND_SECONDS if options.quick else ROUND_SECONDS,
                quick=options.quick,
            )
        except Disagreement as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if options.json is not None:
        write_json(options.json, document)
    return None


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fastnn bench",
        description="Time fastnn's kernels against torch's (channels_last, fused optimizers), both in turns "
        "in one process; a ratio above 1 means that fastnn is faster. Everything takes about half an hour.",
    )
    parser.add_argument("--operator", action="append", choices=sorted(OPERATORS), help="only this one; may be repeated")
    parser.add_argument("--match", default="", metavar="TEXT", help="only cases whose name contains this text")
    parser.add_argument("--quick", action="store_true", help="few shapes and short rounds: a minute or two")
    parser.add_argument("--threads", type=_positive, metavar="N", help="of both sides; all when left out")
    parser.add_argument("--isa", choices=fastnn.available_isas(), help="force fastnn's kernels of this ISA")
    parser.add_argument(
        "--rounds", type=int, default=9, metavar="N", help=f"at least {MIN_ROUNDS}; %(default)s when left out"
    )
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the results to this file")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    options = parser.parse_args(args)
    if options.rounds < MIN_ROUNDS:
        parser.error(f"--rounds: expected at least {MIN_ROUNDS}, got {options.rounds}")
    options.operator = options.operator or list(OPERATORS)
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def file_to_write(text: str) -> Path:
    """The type of an option for results: what cannot be written is told before anything is measured."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {str(path.parent)!r} does not exist")
    return path


def select(operators: Sequence[str], quick: bool) -> list[Case]:
    """The cases of these operators, in the order of the table."""
    return [case for operator in OPERATORS if operator in operators for case in OPERATORS[operator](quick)]


@contextmanager
def threads_and_isa(threads: int | None = None, isa: str | None = None) -> Iterator[None]:
    """Runs the block with so many threads, of both sides, and these kernels; None leaves either as it is."""
    before = fastnn.get_isa()
    fastnn.set_isa(isa or before)
    try:
        with thread_limit(threads):
            yield
    finally:
        fastnn.set_isa(before)


def run(cases: Sequence[Case], *, rounds: int, round_seconds: float, quick: bool = False) -> dict[str, Any]:
    """Times all cases, prints a table per operator, and returns the JSON document.

    Raises:
        Disagreement: the sides of a case did not compute the same; the message names the case.
    """
    console = require("rich.console", "fastnn bench").Console(width=None if sys.stdout.isatty() else 130)
    document: dict[str, Any] = {
        "machine": machine.describe(),
        "settings": {"rounds": rounds, "round_seconds": round_seconds, "quick": quick},
        "results": [],
    }
    console.print(machine.summary(document["machine"]), highlight=False, markup=False)
    for operator in dict.fromkeys(case.operator for case in cases):
        chosen = [case for case in cases if case.operator == operator]
        results = []
        # The bar goes to stderr, so that the tables can be sent to a file.
        track = require("rich.progress", "fastnn bench").track
        errors = require("rich.console", "fastnn bench").Console(stderr=True)
        for case in track(chosen, operator, console=errors, transient=True, disable=not errors.is_terminal):
            results.append(measure(case, rounds, round_seconds))
        console.print(_table(operator, results), markup=False)
        document["results"] += results
    document["summary"] = summarise(document["results"])
    for operator, facts in document["summary"].items():
        console.print(f"{operator}: {describe_summary(facts)}", highlight=False, markup=False)
    return document


def measure(case: Case, rounds: int, round_seconds: float) -> Result:
    """Checks and times one case; the result is ready for JSON, times in seconds."""
    sides = case.make()
    try:
        kernels = check_sides(sides.calls, sides.tolerance, sides.norm)
    except Disagreement as error:
        raise Disagreement(f"{case.name}: {error}") from error
    # One side's call is quicker when its tensors are still in the cache, so rounds, not calls, take turns.
    samples = interleave({side: repeated(call, round_seconds) for side, call in sides.calls.items()}, rounds)
    comparison = compare(samples)
    return {
        "operator": case.operator,
        "network": case.network,
        "shape": case.shape,
        "stage": case.stage,
        "flops": case.flops,
        "isa": fastnn.get_isa(),
        "threads": torch.get_num_threads(),
        "kernels": kernels,
        "fastnn": comparison.ours.to_json(),
        "torch": comparison.theirs.to_json(),
        "opponent": comparison.opponent,
        "ratio": comparison.ratio.to_json(),
    }


def summarise(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Of each operator, and of each of several stages: the geometric mean of the ratios and the lowest."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result["operator"], []).append(result)
    for operator in list(groups):
        stages = dict.fromkeys(result["stage"] for result in groups[operator])
        if len(stages) > 1:
            for stage in stages:
                group = [result for result in groups[operator] if result["stage"] == stage]
                groups[f"{operator} {stage}"] = group
    summary = {}
    for name in sorted(groups):
        worst = min(groups[name], key=lambda result: float(result["ratio"]["median"]))
        summary[name] = {
            "cases": len(groups[name]),
            "geometric_mean": significant(geometric_mean([r["ratio"]["median"] for r in groups[name]])),
            "lowest": worst["ratio"]["median"],
            "lowest_case": " ".join((worst["network"], worst["shape"], worst["stage"])),
        }
    return summary


def describe_summary(facts: dict[str, Any]) -> str:
    return (
        f"geometric mean {facts['geometric_mean']:.2f}x over {facts['cases']} cases, "
        f"lowest {facts['lowest']:.2f}x ({facts['lowest_case']})"
    )


def describe_spread(spread: dict[str, float], unit: str = "x") -> str:
    """``1.52x (1.48-1.55)``: median and quartiles."""
    return f"{spread['median']:.2f}{unit} ({spread['q1']:.2f}-{spread['q3']:.2f})"


def _table(operator: str, results: Sequence[Result]) -> Any:
    """The table of one operator: µs of a call, dense GFLOP/s, and the ratio with its quartiles."""
    table = require("rich.table", "fastnn bench").Table(title=operator, title_justify="left")
    for heading in ("network", "shape", "stage"):
        table.add_column(heading)
    for heading in ("fastnn µs", "GFLOP/s", "torch µs", "ratio (quartiles)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        ours, theirs = result["fastnn"]["median"], result["torch"]["median"]
        suffix = result["opponent"].removeprefix("torch")
        table.add_row(
            result["network"],
            result["shape"],
            result["stage"],
            f"{ours * 1e6:.1f}",
            f"{result['flops'] / ours / 1e9:.1f}" if result["flops"] else "",
            f"{theirs * 1e6:.1f}{suffix}",
            describe_spread(result["ratio"]),
        )
    return table


def write_json(path: str | os.PathLike[str], document: dict[str, Any]) -> None:
    """Writes the document whole or not at all, one result a line, so that two files differ by results."""
    with atomic_path(path) as temporary:
        temporary.write_text(to_json(document) + "\n", encoding="utf-8")


def to_json(value: Any, indent: str = "") -> str:
    """JSON in which objects are opened, and of a list of objects each takes one line."""
    inner = indent + "  "
    if isinstance(value, dict) and value:
        lines = (f"{inner}{json.dumps(key)}: {to_json(item, inner)}" for key, item in value.items())
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        lines = (inner + json.dumps(item, ensure_ascii=False) for item in value)
        return "[\n" + ",\n".join(lines) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)
