"""Every operator through the public functions on CUDA's kernels: on a GPU, or on the emulator.

The checks are those of the CPU's tests, in the four dtypes that CUDA's kernels have.
"""

from __future__ import annotations

import pytest
import test_conv2d as conv2d
import test_linear as linear
import torch
from cases import CONV2D_CASES, FILLS, LINEAR_CASES, Conv2dCase, LinearCase, by_id
from device import KERNEL_DTYPES, ON_CUDA

pytestmark = pytest.mark.skipif(
    not ON_CUDA, reason="runs with FASTNN_TEST_DEVICE=cuda, or with FASTNN_CUDA_EMULATOR=1 on the emulator"
)

each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
each_fill = pytest.mark.parametrize("fill", FILLS)


@each_dtype
@each_fill
@pytest.mark.parametrize("case", by_id(LINEAR_CASES))
def test_linear(case: LinearCase, fill: str, dtype: torch.dtype) -> None:
    linear.check(case, fill, dtype)


@each_dtype
@each_fill
@pytest.mark.parametrize("case", by_id(CONV2D_CASES))
def test_conv2d(case: Conv2dCase, fill: str, dtype: torch.dtype) -> None:
    conv2d.check(case, fill, dtype)
