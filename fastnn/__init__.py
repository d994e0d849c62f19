"""Hand-written kernels for small convolutional and dense networks, as drop-in PyTorch layers."""

import importlib as _importlib
import os as _os
import sys as _sys

if _os.environ.get("FASTNN_CUDA_EMULATOR") == "1":  # for tests: CUDA's kernels on the CPU, for CPU tensors
    _sys.modules["fastnn._C"] = _importlib.import_module("fastnn._C_emulator")

from fastnn import runtime  # first: it initialises the extension module  # isort: skip
from fastnn import functional, nn, optim
from fastnn.classifier import CNNClassifier
from fastnn.convert import conversion_report, convert, revert
from fastnn.dynamo import compile_backend
from fastnn.runtime import available_isas, build_info, explain_dispatch, get_isa, set_isa

__version__: str = runtime.build_info()["version"]

__all__ = [
    "CNNClassifier",
    "available_isas",
    "build_info",
    "compile_backend",
    "conversion_report",
    "convert",
    "explain_dispatch",
    "functional",
    "get_isa",
    "nn",
    "optim",
    "revert",
    "set_isa",
]
