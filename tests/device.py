"""Where the operator tests run: the CPU's kernels; CUDA's on a GPU (FASTNN_TEST_DEVICE=cuda); or CUDA's on the emulator
(FASTNN_CUDA_EMULATOR=1)."""

from __future__ import annotations

import os

import torch

import fastnn
from fastnn import _C
from fastnn.runtime import kernel_dtypes

DEVICE = torch.device(os.environ.get("FASTNN_TEST_DEVICE", "cpu"))
ON_CUDA = DEVICE.type == "cuda" or _C.is_emulator()
KERNEL_DTYPES = sorted(kernel_dtypes(DEVICE) or (), key=str)


def expected_isa() -> str:
    """What the record of a kernel must name as its instruction set."""
    if _C.is_emulator():
        return "emulator"
    if DEVICE.type == "cuda":
        major, minor = torch.cuda.get_device_capability(DEVICE)
        return f"sm_{major}{minor}"
    return fastnn.get_isa()


def expected_device() -> str:
    """What it must name as its device."""
    return f"cuda:{DEVICE.index or 0}" if ON_CUDA else "cpu"
