"""transpose, gather_images and count_correct in the emulator: all of them exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import generator, integers, lay_out, random
from emulated import each_dtype, each_schedule, emulator, ran_on_the_emulator, scheduled

MATRICES = {
    (3, 5, 7): "tiled",
    (2, 32, 32): "tiled",
    (1, 33, 65): "tiled",
    (2, 64, 25): "tiled",
    (1, 2, 300): "tiled",
    (4, 1, 9): "copy",
    (4, 700, 1): "copy",
    (0, 3, 4): "tiled",
    (2, 0, 3): "tiled",
}


def transpose(matrices: torch.Tensor) -> torch.Tensor:
    batch, rows, columns = matrices.shape
    output = torch.full((batch, columns, rows), float("nan"), dtype=matrices.dtype)
    emulator.transpose(output, matrices)
    return output


@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "offset"])
@pytest.mark.parametrize(("shape", "variant"), MATRICES.items(), ids=str)
def test_transpose(shape: tuple[int, ...], variant: str, layout: str, dtype: torch.dtype) -> None:
    matrices = lay_out(random(shape, dtype, generator("transpose", shape)), layout)
    with ran_on_the_emulator("transpose", variant):
        output = transpose(matrices)
    assert torch.equal(output, matrices.transpose(1, 2))


@each_schedule
def test_transpose_under_every_schedule(schedule: Any) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        matrices = random((2, 70, 45), dtype, generator("transpose"))
        with scheduled(schedule), ran_on_the_emulator("transpose", "tiled"):
            assert torch.equal(transpose(matrices), matrices.transpose(1, 2))


def gather(images: torch.Tensor, index: list[int], divisor: float, dtype: torch.dtype) -> torch.Tensor:
    output = torch.full((len(index), *images.shape[1:]), float("nan"), dtype=dtype)
    output = output.contiguous(memory_format=torch.channels_last)
    rows = torch.tensor(index, dtype=torch.int64)
    targets, chosen = 3 * torch.arange(len(images)), torch.full((len(index),), -1)
    emulator.gather_images(output, images, rows, divisor, chosen, targets)
    assert torch.equal(chosen, 3 * rows)
    return output


@each_dtype
@pytest.mark.parametrize("from_bytes", [True, False], ids=["uint8", "same_dtype"])
@pytest.mark.parametrize("shape", [(5, 1, 28, 28), (4, 3, 9, 7), (2, 17, 1, 1), (3, 1, 3, 1)], ids=str)
def test_gather_images(shape: tuple[int, ...], from_bytes: bool, dtype: torch.dtype) -> None:
    rng = generator("gather", shape)
    images = torch.randint(0, 256, shape, generator=rng).to(torch.uint8) if from_bytes else random(shape, dtype, rng)
    index = [1, 0, 1, shape[0] - 1]
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    for divisor in (255.0, 1.0, 0.3):
        with ran_on_the_emulator("gather_images", "uint8" if from_bytes else "copy"):
            output = gather(images, index, divisor, dtype)
        expected = images[index].to(computed) / torch.tensor(divisor, dtype=computed)
        assert torch.equal(output, expected.to(dtype))
    assert gather(images, [], 1.0, dtype).numel() == 0


@pytest.mark.parametrize("wrong", [-1, 5, 1 << 40])
def test_an_index_outside_the_images_stops_the_kernel(wrong: int) -> None:
    images = torch.zeros(5, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="gather_images: an index is outside the images"):
        gather(images, [0, wrong], 255.0, torch.float32)
    assert not gather(images, [0, 4], 255.0, torch.float32).any()


@each_schedule
def test_gather_images_under_every_schedule(schedule: Any) -> None:
    images = torch.randint(0, 256, (6, 3, 20, 20), generator=generator("gather")).to(torch.uint8)
    with scheduled(schedule), ran_on_the_emulator("gather_images", "uint8"):
        output = gather(images, [5, 2, 2], 255.0, torch.float32)
    assert torch.equal(output, images[[5, 2, 2]].float() / 255)


def count(logits: torch.Tensor, target: torch.Tensor) -> int:
    correct = torch.tensor(-1)
    emulator.count_correct(correct, logits, target)
    return int(correct)


# numpy's argmax: the first of equal values, and of NaNs, which count as largest.
def expected_count(logits: torch.Tensor, target: torch.Tensor) -> int:
    return int((logits.double().numpy().argmax(1) == target.numpy()).sum()) if len(logits) else 0


def make_scores(batch: int, classes: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with many ties, some NaN and rows of nothing else or of -inf; half of the targets are right."""
    rng = generator("count", batch, classes)
    logits = integers((batch, classes), dtype, rng)
    logits[torch.rand(batch, classes, generator=rng) < 0.02] = float("nan")
    logits[::7] = -float("inf")
    logits[3::7] = float("nan")
    logits[5::7, -1] = 4
    right = torch.from_numpy(logits.double().numpy().argmax(1)) if batch else torch.zeros(0, dtype=torch.int64)
    target = torch.where(torch.rand(batch, generator=rng) < 0.5, right, integers((batch,), torch.int64, rng))
    return logits, target


@each_dtype
@pytest.mark.parametrize("classes", [1, 2, 8, 9, 10, 33, 100, 1000])
def test_count_correct(classes: int, dtype: torch.dtype) -> None:
    for batch in (0, 1, 5, 200):
        logits, target = make_scores(batch, classes, dtype)
        lanes = next(lanes for lanes in (1, 2, 4, 8, 16, 32) if lanes * 8 >= classes or lanes == 32)
        with ran_on_the_emulator("count_correct", "one_block" if batch * lanes <= 256 else "blocks"):
            assert count(logits, target) == expected_count(logits, target)


def test_count_correct_of_more_rows_than_blocks_take_at_once() -> None:
    logits, target = make_scores(70_000, 3, torch.float32)
    assert count(logits, target) == expected_count(logits, target)


@each_schedule
@pytest.mark.parametrize(("batch", "variant"), [(60, "one_block"), (500, "blocks")])
def test_count_correct_under_every_schedule(batch: int, variant: str, schedule: Any) -> None:
    logits, target = make_scores(batch, 20, torch.float16)
    with scheduled(schedule), ran_on_the_emulator("count_correct", variant):
        assert count(logits, target) == expected_count(logits, target)
