"""relu's CUDA kernels in the emulator: exact, whatever the addresses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import generator, integers, lay_out, random
from emulated import each_dtype, each_schedule, emulator, ran_on_the_emulator, scheduled
from tolerance import assert_identical

SHAPES = ((), (1,), (7,), (3, 17), (2, 3, 5, 65), (0, 4), (4099,))
VARIANTS = {"contiguous": "vector", "offset": "scalar"}


def forward(x: torch.Tensor) -> torch.Tensor:
    output = torch.full_like(x, float("nan"))
    emulator.relu_forward(output, x)
    return output


def backward(grad: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    grad_input = torch.full_like(grad, float("nan"))
    emulator.relu_backward(grad_input, grad, output)
    return grad_input


@each_dtype
@pytest.mark.parametrize("layout", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_torch(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    rng = generator("relu", shape)
    x, grad = (lay_out(fill(shape, dtype, rng), layout) for fill in (integers, random))
    assert_identical(forward(x), torch.relu(x))
    assert_identical(backward(grad, torch.relu(x)), torch.where(x > 0, grad, 0))
    emulator.relu_forward(x, x)
    assert bool((x >= 0).all())


@each_dtype
def test_special_values(dtype: torch.dtype) -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-40, -1e-40] * 3).to(dtype)
    assert_identical(forward(values), torch.relu(values))
    x = values.clone().requires_grad_()
    torch.relu(x).backward(torch.ones_like(x))
    assert_identical(backward(torch.ones_like(values), torch.relu(values)), x.grad)


@each_schedule
@pytest.mark.parametrize("layout", VARIANTS)
def test_same_bits_under_every_schedule(layout: str, schedule: Any) -> None:
    for dtype in (torch.float32, torch.float16):
        x = lay_out(random((5, 613), dtype, generator("relu")), layout)
        with scheduled(schedule):
            with ran_on_the_emulator("relu_forward", VARIANTS[layout]):
                output = forward(x)
            with ran_on_the_emulator("relu_backward", VARIANTS[layout]):
                grad_input = backward(x, output)
        assert torch.equal(output, torch.relu(x))
        assert torch.equal(grad_input, output)
