"""Keeps what ptxas says of each kernel: registers, shared memory, spills.

As the CUDA compiler's launcher (`resources.py compile nvcc ...`) it runs the command and writes the kernels of the
object file into <object>.resources.json. `resources.py collect FOLDER FILE` gathers those of a folder in one file.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def kernels_in(output: str) -> list[dict[str, object]]:
    """One entry a kernel and architecture, from the output of `nvcc --resource-usage`."""
    kernels: list[dict[str, object]] = []
    for line in output.splitlines():
        if entry := ENTRY.search(line):
            kernels.append({"kernel": entry[1], "architecture": entry[2], "spilled_bytes": 0})
        elif kernels and (stack := STACK.search(line)):
            kernels[-1].setdefault("stack_bytes", int(stack[1]))
            kernels[-1]["spilled_bytes"] = max(int(kernels[-1]["spilled_bytes"]), int(stack[2]))  # type: ignore[call-overload]
        elif kernels and (used := USED.search(line)):
            kernels[-1].update(registers=int(used[1]), shared_bytes=int(used[2] or 0))
    return kernels


def compile_and_record(command: list[str]) -> int:
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    # ptxas's report would bury the warnings.
    print("\n".join(line for line in done.stderr.splitlines() if not is_report(line)), end="", file=sys.stderr)
    if done.returncode == 0 and "-o" in command:
        target = Path(command[command.index("-o") + 1])
        target.with_name(target.name + ".resources.json").write_text(json.dumps(kernels_in(done.stderr)))
    return done.returncode


def is_report(line: str) -> bool:
    return line.startswith("ptxas info") or "bytes stack frame" in line or not line.strip()


def collect(folder: Path, file: Path) -> None:
    kernels = [kernel for part in sorted(folder.rglob("*.resources.json")) for kernel in json.loads(part.read_text())]
    file.write_text(json.dumps(kernels, indent=1))


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        sys.exit(compile_and_record(sys.argv[2:]))
    collect(Path(sys.argv[2]), Path(sys.argv[3]))
