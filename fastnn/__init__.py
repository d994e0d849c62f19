"""Hand-written kernels for small convolutional and dense networks, as drop-in PyTorch layers."""

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
