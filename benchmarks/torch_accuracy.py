"""The reference network in plain PyTorch at its best, from process start to its test accuracy; no fastnn.

    python torch_accuracy.py MNIST_FOLDER EPOCHS BATCH LR SCHEDULE THREADS SEED

Adam with the schedules of `fastnn train`: constant, cosine (a step per epoch) or one-cycle (a step per batch). Prints
the same line at the end: ``test accuracy 99.02% ...``.
"""

import gzip
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn


def read_idx(folder: Path, stem: str) -> np.ndarray:
    path = folder / stem
    content = path.read_bytes() if path.exists() else gzip.decompress((folder / f"{stem}.gz").read_bytes())
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", dimensions, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def load(folder: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 images (n, height, width, 1), so that a batch is channels_last, and int64 labels."""
    images = torch.tensor(read_idx(folder, f"{part}-images-idx3-ubyte")).float().div_(255).unsqueeze(3)
    return images, torch.tensor(read_idx(folder, f"{part}-labels-idx1-ubyte")).long()


def main() -> None:
    folder, epochs, batch, lr, schedule, threads, seed = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(int(seed))
    images, labels = load(Path(folder), "train")
    test_images, test_labels = load(Path(folder), "t10k")
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1600, 64),
        nn.ReLU(inplace=True),
        nn.Linear(64, 10),
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), float(lr), fused=True)
    schedulers = torch.optim.lr_scheduler
    by_batch = by_epoch = None
    if schedule == "one-cycle":
        steps = int(epochs) * -(-len(labels) // int(batch))
        by_batch = schedulers.OneCycleLR(optimizer, float(lr), total_steps=steps)
    elif schedule == "cosine":
        by_epoch = schedulers.CosineAnnealingLR(optimizer, int(epochs))
    elif schedule != "constant":
        raise SystemExit(f"expected the schedule constant, cosine or one-cycle, got {schedule}")
    for _ in range(int(epochs)):
        for index in torch.randperm(len(labels)).split(int(batch)):
            optimizer.zero_grad(set_to_none=True)
            logits = model(images.index_select(0, index).permute(0, 3, 1, 2))
            nn.functional.cross_entropy(logits, labels.index_select(0, index)).backward()
            optimizer.step()
            if by_batch:
                by_batch.step()
        if by_epoch:
            by_epoch.step()
    with torch.inference_mode():
        parts = [model(part.permute(0, 3, 1, 2)).argmax(1) for part in test_images.split(256)]
        correct = int((torch.cat(parts) == test_labels).sum())
    print(f"test accuracy {correct / len(test_labels):.2%} ({correct} of {len(test_labels)} images)", flush=True)


main()
