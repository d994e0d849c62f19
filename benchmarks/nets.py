"""What both sides of a training benchmark share: the networks, the images, and PyTorch's loop at its best."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastnn
from fastnn import data
from fastnn.bench import threads_and_isa
from fastnn.classifier import CNNClassifier

Epoch = Callable[[], float]  # trains one epoch and returns its seconds


@dataclass(frozen=True)
class Net:
    """Blocks of 3x3 convolution, ReLU and 2x2 max-pool, then dense layers, then 10 logits."""

    name: str
    input_shape: tuple[int, int, int]
    conv_channels: tuple[int, ...]
    hidden: tuple[int, ...]
    padding: int

    def classifier(self) -> CNNClassifier:
        """fastnn's model, always with the same first parameters."""
        torch.manual_seed(0)
        return CNNClassifier(
            self.input_shape, 10, self.conv_channels, self.hidden, padding=self.padding, classes=range(10)
        )

    def torch_model(self) -> torch.nn.Sequential:
        """The same network of torch's layers, with the same first parameters, channels_last."""
        layers: list[torch.nn.Module] = []
        channels = self.input_shape[0]
        for out_channels in self.conv_channels:
            layers += [
                torch.nn.Conv2d(channels, out_channels, 3, padding=self.padding),
                torch.nn.ReLU(inplace=True),
                torch.nn.MaxPool2d(2),
            ]
            channels = out_channels
        features = self._features()
        layers.append(torch.nn.Flatten())
        for width in self.hidden:
            layers += [torch.nn.Linear(features, width), torch.nn.ReLU(inplace=True)]
            features = width
        layers.append(torch.nn.Linear(features, 10))
        return self._started(torch.nn.Sequential(*layers))

    def layer_model(self) -> torch.nn.Sequential:
        """The same network of fastnn's layers, as a user of torch writes it."""
        layers: list[torch.nn.Module] = []
        channels = self.input_shape[0]
        for out_channels in self.conv_channels:
            layers.append(
                fastnn.nn.Conv2d(channels, out_channels, 3, padding=self.padding, activation="relu", max_pool=2)
            )
            channels = out_channels
        features = self._features()
        layers.append(torch.nn.Flatten())
        for width in self.hidden:
            layers.append(fastnn.nn.Linear(features, width, activation="relu"))
            features = width
        layers.append(fastnn.nn.Linear(features, 10))
        return self._started(fastnn.nn.Sequential(*layers))

    def _features(self) -> int:
        _, height, width = self.input_shape
        for _ in self.conv_channels:
            height, width = ((size + 2 * self.padding - 2) // 2 for size in (height, width))
        return self.conv_channels[-1] * height * width

    def _started(self, model: torch.nn.Sequential) -> torch.nn.Sequential:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad():
            for parameter, source in zip(model.parameters(), self.classifier().parameters(), strict=True):
                parameter.copy_(source)
        return model


REFERENCE = Net("reference", (1, 28, 28), (32, 64), (64,), 0)
CIFAR = Net("CIFAR-sized", (3, 32, 32), (32, 64, 128), (256,), 1)
NETS = {net.name: net for net in (REFERENCE, CIFAR)}


@dataclass(frozen=True)
class Images:
    """Images in memory, in the forms that the sides train on.

    Attributes:
        raw: uint8 (n, channels, height, width).
        labels: int64 (n,), 0 to 9.
        source: where they came from, for the results.
    """

    raw: Tensor
    labels: Tensor
    source: str

    def __len__(self) -> int:
        return len(self.raw)

    @property
    def scaled(self) -> Tensor:
        """float32 in 0..1."""
        return self.raw.float().div_(255)

    def first(self, count: int) -> Images:
        """So many images, over again from the first where there are fewer."""
        if count <= len(self):
            return Images(self.raw[:count], self.labels[:count], self.source)
        index = torch.arange(count) % len(self)
        source = f"{self.source}, {len(self)} repeated to {count}"
        return Images(self.raw[index], self.labels[index], source)


def load_images(net: Net, source: str | os.PathLike[str] | None) -> tuple[Images, Images]:
    """Training and test images of the net's shape from `source`, which is anything that ``fastnn train`` takes.

    Without a source the reference net gets scikit-learn's digits and others get random images.
    """
    if source is None and net is not REFERENCE:
        return random_images(net, 10_000, 0), random_images(net, 1_000, 1)
    train, test = data.load("digits" if source is None else source, image_size=net.input_shape[1:])
    loaded = []
    for part in (train, test):
        if part.images.shape[1] != net.input_shape[0] or len(part.classes) != 10:
            raise ValueError(
                f"{source}: expected images of {net.input_shape[0]} channels in 10 classes, "
                f"got {part.images.shape[1]} channels in {len(part.classes)}"
            )
        name = "scikit-learn digits" if source is None else part.name.replace(os.fspath(source), "").strip("/ ")
        # In a new order, since folders of pictures come sorted by class.
        order = np.random.default_rng(0).permutation(len(part.labels))
        images, labels = part.images[order], part.labels[order]
        loaded.append(Images(torch.from_numpy(images), torch.from_numpy(labels), name or net.name))
    return loaded[0], loaded[1]


def random_images(net: Net, count: int, seed: int) -> Images:
    """Noise around a picture per class, so that there is something to learn and gradients shrink as usual."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    pictures = torch.rand((10, *net.input_shape), generator=torch.Generator().manual_seed(99))
    noise = torch.rand((count, *net.input_shape), generator=generator)
    raw = (127.5 * (pictures[labels] + noise)).to(torch.uint8)
    return Images(raw, labels, "random images")


def loop_epoch(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    *,
    loss_function: Callable[[Tensor, Tensor], Tensor] = torch.nn.functional.cross_entropy,
    autocast: bool = False,
    shuffle: bool = True,
) -> None:
    """One epoch of the training loop that a user of torch writes, without anything that costs time.

    The images lie in memory as (n, height, width, channels), so that a gathered batch is channels_last without a
    copy; nothing reads the loss.
    """
    order = torch.randperm(len(labels)) if shuffle else torch.arange(len(labels))
    for index in order.split(batch_size):
        batch = images.index_select(0, index).permute(0, 3, 1, 2)
        target = labels.index_select(0, index)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
            loss = loss_function(model(batch), target)
        loss.backward()
        optimizer.step()


def torch_epoch(net: Net, images: Images, batch_size: int, *, autocast: bool = False) -> Epoch:
    """torch at its best: channels_last, fused Adam, float32 images in memory."""
    model = net.torch_model()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    return _timed_loop(model, optimizer, images, batch_size, autocast=autocast)


def layer_epoch(net: Net, images: Images, batch_size: int) -> Epoch:
    """The same loop with fastnn's layers, loss and optimizer."""
    model = net.layer_model()
    optimizer = fastnn.optim.Adam(model.parameters(), 1e-3)
    return _timed_loop(model, optimizer, images, batch_size, loss_function=fastnn.functional.cross_entropy)


def _timed_loop(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, images: Images, batch_size: int, **options: Any
) -> Epoch:
    pixels, labels = images.scaled.permute(0, 2, 3, 1).contiguous(), images.labels

    def epoch(count: int | None = None) -> float:
        began = time.perf_counter()
        loop_epoch(model, optimizer, pixels[:count], labels[:count], batch_size, **options)
        return time.perf_counter() - began

    epoch(4 * batch_size)  # the first steps choose and compile kernels
    return epoch


def fit_epoch(
    net: Net, pixels: Tensor, labels: Tensor, batch_size: int, *, isa: str | None = None, **options: Any
) -> Epoch:
    """`CNNClassifier.fit` in its steady state: from the end of its first epoch to the end of its second.

    The time holds everything that an epoch does: shuffling, batches, steps, metrics, the copy of the state.
    """
    model = net.classifier()

    def epoch() -> float:
        ends: list[float] = []
        with threads_and_isa(isa=isa):
            model.fit(
                pixels,
                labels,
                epochs=2,
                batch_size=batch_size,
                progress=False,
                callbacks=[lambda *_: ends.append(time.perf_counter())],
                **options,
            )
        return ends[1] - ends[0]

    return epoch
