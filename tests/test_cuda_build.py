"""What nvcc made of the kernels, from the report that every build with CUDA leaves beside the module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fastnn
from fastnn import _C

if not _C.is_emulator() and not fastnn.build_info()["cuda"]:
    pytest.skip("built without CUDA", allow_module_level=True)


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, Any]]:
    report = Path(fastnn.__file__).with_name("cuda_resources.json")
    if _C.is_emulator() and not report.exists():
        pytest.skip("built without CUDA")
    return json.loads(report.read_text())


def test_no_kernel_spills(kernels: list[dict[str, Any]]) -> None:
    spilling = [kernel for kernel in kernels if kernel["spilled_bytes"]]
    assert not spilling, "\n".join(
        f"{k['kernel']} on {k['architecture']}: {k['spilled_bytes']} bytes" for k in spilling
    )


def test_every_operator_is_in_the_report_for_every_architecture(kernels: list[dict[str, Any]]) -> None:
    names = {}
    for kernel in kernels:
        names.setdefault(kernel["architecture"], set()).add(kernel["kernel"])
    assert names
    operators = ("gemm", "depthwise", "max_pool2d", "relu", "softmax", "cross_entropy", "nll_loss", "mse_loss", "adam")
    for architecture, kernels_of in names.items():
        for operator in (*operators, "sgd", "transpose", "gather_images", "count_correct"):
            assert any(operator in name for name in kernels_of), f"{operator} was not compiled for {architecture}"


def test_two_blocks_of_a_product_fit_on_a_multiprocessor(kernels: list[dict[str, Any]]) -> None:
    """But of 128 x 128 in tf32x3, of which one does."""
    products = [kernel for kernel in kernels if "gemm_kernel" in kernel["kernel"]]
    largest = [
        k for k in products if "Tf32ProductsILb1E" in k["kernel"] and "BlockShapeILi2ELi4ELi4ELi4E" in k["kernel"]
    ]
    assert largest
    assert max(kernel["registers"] for kernel in products if kernel not in largest) * 256 * 2 <= 65536
