"""Networks that other people designed: those of two training scripts, and small ones of pytorchcv's classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pytorchcv.models.mobilenetv3 import mobilenetv3_small_w1
from pytorchcv.models.resnet import ResNet
from pytorchcv.models.unet import UNet
from pytorchcv.models.vgg import VGG
from torch import Tensor, nn


class MnistNet(nn.Module):
    """The network of PyTorch's MNIST example: log-probabilities of (n, 1, 28, 28) images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.conv2(F.relu(self.conv1(images))))
        features = self.dropout1(F.max_pool2d(maps, 2)).flatten(1)
        return F.log_softmax(self.fc2(self.dropout2(F.relu(self.fc1(features)))), dim=1)


class CifarNet(nn.Module):
    """The network of PyTorch's CIFAR-10 tutorial: logits of (n, 3, 32, 32) images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.pool(F.relu(self.conv1(images)))
        features = torch.flatten(self.pool(F.relu(self.conv2(maps))), 1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(features)))))


def resnet18(widths: tuple[int, int, int, int] = (64, 128, 256, 512)) -> nn.Module:
    model = ResNet([[width] * 2 for width in widths], widths[0], bottleneck=False, conv1_stride=True, num_classes=10)
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)  # theirs wants 224x224 images
    return model


def mobilenet_v3_small() -> nn.Module:
    model = mobilenetv3_small_w1(num_classes=10)
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)
    return model


def vgg11(widths: tuple[int, int, int, int, int] = (64, 128, 256, 512, 512)) -> nn.Module:
    first, second, *others = widths
    return VGG([[first], [second], *([width] * 2 for width in others)], num_classes=10)


def unet(widths: tuple[int, int, int, int, int] = (64, 128, 256, 512, 512)) -> nn.Module:
    first, *others = widths
    return UNet([others, [*others[-2::-1], first]], first, num_classes=5)


@dataclass(frozen=True)
class Network:
    """A model to make, the shape of its images without the batch, and a small version of it."""

    id: str
    make: Callable[[], nn.Module]
    images: tuple[int, int, int]
    make_small: Callable[[], nn.Module]
    small_images: tuple[int, int, int]


NETWORKS = (
    Network("MNIST example", MnistNet, (1, 28, 28), MnistNet, (1, 28, 28)),
    Network("CIFAR-10 tutorial", CifarNet, (3, 32, 32), CifarNet, (3, 32, 32)),
    Network("ResNet-18", resnet18, (3, 64, 64), lambda: resnet18((16, 24, 32, 32)), (3, 48, 48)),
    Network("MobileNetV3-small", mobilenet_v3_small, (3, 64, 64), mobilenet_v3_small, (3, 64, 64)),
    Network("VGG-11", vgg11, (3, 224, 224), lambda: vgg11((8, 8, 16, 16, 2)), (3, 224, 224)),
    Network("U-Net", unet, (3, 64, 64), lambda: unet((8, 8, 16, 16, 16)), (3, 32, 32)),
)


def first_result(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What the model is for, of those that return more."""
    return output[0] if isinstance(output, tuple) else output
