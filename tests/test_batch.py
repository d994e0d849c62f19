"""gather_images on the CPU, whose few and many channels have code of their own: exact."""

from __future__ import annotations

import pytest
import torch

import fastnn
from fastnn import _C


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("from_bytes", [True, False], ids=["uint8", "same_dtype"])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (32, 32)], ids=str)
@pytest.mark.parametrize("channels", [0, 1, 2, 3, 4, 5, 17])
def test_gather_images(isa: str, channels: int, size: tuple[int, int], from_bytes: bool, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(channels)
    images = torch.randint(0, 256, (6, channels, *size), generator=rng, dtype=torch.uint8)
    if not from_bytes:
        images = images.to(dtype) + torch.rand(images.shape, generator=rng, dtype=dtype)
    index, targets = torch.tensor([3, 0, 5, 5]), 7 * torch.arange(6)
    for divisor in (255.0, 1.0, 0.3):
        # A guard image behind the batch's.
        memory = torch.full((len(index) + 1, *size, channels), float("nan"), dtype=dtype)
        output, chosen = memory[:-1].permute(0, 3, 1, 2), torch.full((len(index),), -1)
        with fastnn.explain_dispatch() as log:
            _C.gather_images(output, images, index, divisor, chosen, targets)
        assert [(record.operator, record.isa) for record in log] == [("gather_images", isa)]
        assert torch.equal(output, images[index].to(dtype) / torch.tensor(divisor, dtype=dtype))
        assert torch.equal(chosen, targets[index])
        assert memory[-1].isnan().all()
