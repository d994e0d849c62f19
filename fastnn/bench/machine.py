"""What a timing ran on: without it a number means nothing to the next reader."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastnn

# Instruction sets that change which kernels run, ours or torch's.
TELLING_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "sve", "bf16")

# Variables that change how fast either side runs.
TELLING_VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "ATEN_CPU_CAPABILITY", "FASTNN_ISA")


def describe() -> dict[str, Any]:
    """Processor, instruction sets, threads, versions and settings, as JSON takes them."""
    facts = fastnn.build_info()
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "cpu_flags": cpu_flags(),
        "system": f"{platform.system()} {platform.machine()}",
        "isa": facts["isa"],
        "isas_available": facts["isas_available"],
        "threads": torch.get_num_threads(),
        "versions": {
            "fastnn": facts["version"],
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "compiler": facts["compiler"],
        },
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(TELLING_VARIABLES)
        },
        # Other processes' work at the start: above zero, the spread says how much they disturbed.
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def summary(machine: dict[str, Any]) -> str:
    """One line: ``AMD EPYC (family 25, model 17), 2 threads, avx512; fastnn 0.1.0, torch 2.13.0``."""
    threads = machine["threads"]
    versions = machine["versions"]
    return (
        f"{machine['cpu']}, {threads} {'thread' if threads == 1 else 'threads'}, {machine['isa']}; "
        f"fastnn {versions['fastnn']}, torch {versions['torch']}"
    )


def usable_cores() -> int:
    """Processors that this process may run on, which containers often limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's name, with family and model, because virtual machines shorten the name to the brand."""
    facts = _cpuinfo()
    name = facts.get("model name")
    if name:
        return f"{name} (family {facts.get('cpu family')}, model {facts.get('model')})"
    if facts.get("CPU part"):  # aarch64
        return f"implementer {facts.get('CPU implementer')}, part {facts['CPU part']}"
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor() or "unknown"


def cpu_flags() -> list[str]:
    """The instruction sets of this processor that matter here; empty where the system does not tell."""
    facts = _cpuinfo()
    present = set((facts.get("flags") or facts.get("Features") or "").split())
    return [flag for flag in TELLING_FLAGS if flag in present]


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields on Linux."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(errors="replace").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
