"""Benchmarks on a GPU against PyTorch: writes benchmarks/results/<name of the GPU>.json and the table in README.md.

    python benchmarks/gpu.py [--mnist FOLDER] [--only SECTION] [--seconds N]
    python benchmarks/gpu.py --publish benchmarks/results/nvidia-h100-80gb-hbm3.json

Every section is measured in a process of its own, since an error on a GPU spoils all that its process does afterwards.
A section that fails, or takes longer than it may, leaves the rows that it had and the error's text in the results.
The sides take turns, in the same process, round by round; CUDA's events around many calls tell the time. Before that
the sides' outputs must agree. Both sides may round the factors of float32 products to tf32.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from gpu_sections import MAY_FAIL, ROUND_SECONDS, ROUNDS, SECTIONS, Device, Row, failed, run_section
from readme import README, rewritten, write_tables

import fastnn
from fastnn import bench
from fastnn.bench import machine

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------------------------- processes


def write_section(name: str, device: Device, file: Path) -> None:
    """Measures a section and appends each row to `file` as a line of JSON."""

    def add(row: Row) -> None:
        print(describe(row), flush=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    run_section(name, device, add)


def run_apart(name: str, arguments: Sequence[str], seconds: float) -> list[Row]:
    """Runs a section in a process of its own for so many seconds at most; returns the rows it got to."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        command = [sys.executable, str(Path(__file__).resolve()), "--section", name, "--rows", str(file), *arguments]
        # A group of its own: torch's compiler starts processes that must end with it.
        with (Path(folder) / "errors").open("w+", encoding="utf-8", errors="replace") as errors:
            process = subprocess.Popen(command, stderr=errors, start_new_session=True)
            why = ""
            try:
                code = process.wait(timeout=max(seconds, 1))
                if code:
                    errors.seek(0)
                    why = f"ended with code {code}: {errors.read()[-1500:].strip()}"
            except subprocess.TimeoutExpired:
                why = f"was not done in {seconds:.0f} s"
            finally:
                end_group(process)
        text = file.read_text(encoding="utf-8") if file.exists() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    if why:
        rows.append(failed(name, why))
        print(describe(rows[-1]), flush=True)
    return rows


def end_group(process: subprocess.Popen[Any]) -> None:
    """Ends the process and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --------------------------------------------------------------------------------------------------------- results


def gpu_facts() -> dict[str, Any]:
    """The GPU and the versions, which every number belongs to."""
    facts = machine.describe()
    properties = torch.cuda.get_device_properties(0)
    gpu = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": getattr(properties, "L2_cache_size", None),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "architectures": fastnn.build_info().get("cuda_architectures"),
    }
    return {"gpu": gpu, **facts}


def driver_version() -> str | None:
    """What nvidia-smi says; None where it is missing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def kebab(name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` becomes ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def format_time(microseconds: float) -> str:
    """``31.4 us``, ``2.31 ms`` or ``1.20 s``."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:.2f} {unit}"
    return f"{microseconds:.1f} us"


def title(row: Row) -> str:
    parts = [row["what"]]
    parts += [f"batch {row['batch']}"] if "batch" in row else []
    return ", ".join([*parts, row["precision"]] if "precision" in row else parts)


def verdict(row: Row) -> str:
    """What was to be reached, and whether it was."""
    wanted = ""
    if row.get("target") is not None:
        wanted = f"{row['target']:g}x"
    elif row.get("most") is not None:
        wanted = f"at most {format_time(row['most'])}"
    return f"{wanted} {'reached' if row['reached'] else 'MISSED'}" if wanted else ""


def cells(row: Row) -> list[str]:
    """A row of the table: what, ours, theirs, ratio, target."""
    if "error" in row:
        return [title(row), "not measured: " + " ".join(row["error"].split())[:200], "", "", ""]
    if "accuracy" in row:
        return [title(row), f"{row['seconds']:.2f} s, {row['accuracy']:.2%} right", "", "", ""]
    ours = format_time(row["microseconds"]["median"]) if "microseconds" in row else ""
    if "microseconds" in row and "ratio" not in row:
        ours += f" ({format_time(row['microseconds']['low'])} - {format_time(row['microseconds']['high'])})"
    theirs = row.get("against", "")
    if "their_microseconds" in row:
        theirs = f"{format_time(row['their_microseconds']['median'])} ({theirs})"
    ratio = row.get("ratio")
    times = f"{ratio['median']:.2f}x ({ratio['low']:.2f} - {ratio['high']:.2f})" if ratio else ""
    return [title(row), ours, theirs, times, verdict(row)]


def describe(row: Row) -> str:
    """One line for people."""
    return ": ".join(filter(None, [cells(row)[0], ", ".join(filter(None, cells(row)[1:]))]))


def table(document: Mapping[str, Any]) -> str:
    """Markdown of all rows but single convolutions, of which the means tell, with what they were measured on."""
    facts, settings = document["machine"], document["settings"]
    gpu, versions = facts["gpu"], facts["versions"]
    lines = ["| | fastnn | against | ratio (lowest - highest) | target |", "|---|---:|---:|---:|---|"]
    rows = [row for section in document["sections"].values() for row in section if "flops" not in row]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    origin = (
        f"Measured on {facts['date']}: {gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}, "
        f"cuDNN {gpu['cudnn']}; fastnn {versions['fastnn']}, torch {versions['torch']}. Medians of "
        f"{settings['rounds']} interleaved rounds. {settings['float32_products']}."
    )
    return "\n".join([*lines, "", origin])


def merged(old: Mapping[str, Any], facts: Mapping[str, Any], sections: Mapping[str, list[Row]]) -> dict[str, Any]:
    """The document with these sections anew; others stay where they were measured on the same GPU and versions."""
    same = all(old.get("machine", {}).get(key) == facts[key] for key in ("gpu", "versions"))
    kept = old.get("sections", {}) if same else {}
    together = {**kept, **sections}
    order = [name for name in SECTIONS if name in together]
    return {
        "machine": dict(facts),
        "settings": {
            "rounds": ROUNDS,
            "round_seconds": ROUND_SECONDS,
            "float32_products": "Both sides may round factors of float32 products to tf32",
            "clock": "CUDA events around many calls; fit and MNIST by the wall clock",
        },
        "sections": {name: together[name] for name in order},
    }


def has_errors(sections: Mapping[str, Sequence[Row]]) -> bool:
    """Whether something was not measured that every machine with a GPU can measure."""
    return any("error" in row for name, rows in sections.items() if name not in MAY_FAIL for row in rows)


# --------------------------------------------------------------------------------------------------------- command


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="also train on the four IDX files in here")
    parser.add_argument("--only", action="append", choices=list(SECTIONS), help="this one; may be repeated")
    parser.add_argument("--seconds", type=float, default=400, help="sections that do not begin by then are left out")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="instead of benchmarks/results, and no README")
    parser.add_argument(
        "--publish", type=Path, metavar="FILE", help="measure nothing: README.md gets this file's table"
    )
    parser.add_argument("--readme", type=Path, metavar="FILE", default=README, help="instead of README.md")
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.publish and not torch.cuda.is_available():
        print("benchmarks/gpu.py: expected a GPU that torch sees, got none", file=sys.stderr)
        return 2
    if options.section:
        write_section(options.section, Device("cuda", mnist=options.mnist), options.rows)
        return 0
    try:
        if options.publish:
            publish(options.readme, json.loads(options.publish.read_text(encoding="utf-8")))
            return 0
        if not options.results:  # minutes of measuring must not end at a missing marker
            rewritten(options.readme, {})
    except (OSError, ValueError, KeyError) as error:
        print(f"benchmarks/gpu.py: {error}", file=sys.stderr)
        return 2
    if not fastnn.build_info()["cuda"]:
        print("benchmarks/gpu.py: expected fastnn built with CUDA, got a build without", file=sys.stderr)
        return 2
    if options.mnist is None and "mnist" in (options.only or ()):
        print("benchmarks/gpu.py: expected --mnist FOLDER with --only mnist, got none", file=sys.stderr)
        return 2
    return run(options)


def run(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a section's process is ended, too
    facts = gpu_facts()
    path: Path = (options.results or ROOT / "benchmarks" / "results") / f"{kebab(facts['gpu']['name'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    names = [name for name in SECTIONS if name in (options.only or SECTIONS) and (name != "mnist" or options.mnist)]
    sections: dict[str, list[Row]] = {}
    deadline = time.monotonic() + options.seconds
    document: dict[str, Any] = merged(old, facts, {})
    for name in names:
        left = deadline - time.monotonic()
        if left < 1:
            sections[name] = [failed(name, "no time was left")]
        else:
            extra = ["--mnist", str(options.mnist)] if name == "mnist" else []
            sections[name] = run_apart(name, extra, min(left, SECTIONS[name][1]))
        # After each, so that an interrupt loses one at most.
        document = merged(old, facts, sections)
        bench.write_json(path, document)
    print(f"\n{table(document)}\n\nwrote {path}")
    if not options.results:
        publish(options.readme, document)
    return 1 if has_errors(sections) else 0


def publish(readme: Path, document: Mapping[str, Any]) -> None:
    """Puts the table into the README."""
    write_tables(readme, {"gpu": table(document)})
    print(f"wrote the table in {readme}")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
