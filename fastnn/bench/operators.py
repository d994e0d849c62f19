"""The cases: every operator over shapes that real networks have, as the same call on fastnn and on torch.

torch runs at its best: channels_last images and weights, fused and foreach optimizers (the faster counts).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnn import convert, functional, optim
from fastnn.bench.timing import OURS, Call

BATCHES = (1, 8, 32)
QUICK_BATCHES = (8,)

# Accepted differences, as fractions of the output's root mean square. A float32 sum of 10^6 terms is off by
# up to 1e-4 where the other side adds in another order; an index that is wrong by one shows as nearly 1.
TOLERANCE = 1e-3
# Rounding sends the gradient through about one maximum in 10^6 to a neighbour: a root mean square of 1e-3.
WINNER_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Sides:
    """The same computation on each side, ours under :data:`timing.OURS`. Each call returns its result."""

    calls: Mapping[str, Call]
    tolerance: float = TOLERANCE
    norm: str = "max"


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        operator: the function's name, in fastnn as in torch.
        network: where the shape comes from.
        shape: the sizes, for people.
        stage: ``forward`` (no gradients), ``grad_input``, ``grad_weight`` (each alone, of a graph that is
            kept), ``backward`` (all gradients of a graph that is kept), ``forward+backward`` or ``step``.
        flops: of the dense computation; None where memory or the call itself is the limit.
        make: builds the tensors.
    """

    operator: str
    network: str
    shape: str
    stage: str
    flops: int | None
    make: Callable[[], Sides]

    @property
    def name(self) -> str:
        return " ".join((self.operator, self.network, self.shape, self.stage))


def on_both(make: Callable[[Any], Call], tolerance: float = TOLERANCE, norm: str = "max") -> Sides:
    """Sides that differ only in the module of functions: fastnn's or torch's."""
    return Sides({OURS: make(functional), "torch": make(torch.nn.functional)}, tolerance, norm)


def _gradients(output: Tensor, leaves: Sequence[Tensor]) -> Call:
    """A call that computes these gradients of a graph that is kept, and nothing else."""
    grad_output = _ones_or_normal(output)
    return lambda: torch.autograd.grad(output, leaves, grad_output, retain_graph=True)


def _forward_and_gradients(forward: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Call:
    grad_output = _ones_or_normal(forward())
    return lambda: torch.autograd.grad(forward(), leaves, grad_output)


def _ones_or_normal(output: Tensor) -> Tensor:
    """The gradient that reaches an operator: 1 for a loss, else random, the same on both sides."""
    if output.dim() == 0:
        return torch.ones_like(output)
    grad_output = torch.empty_like(output, requires_grad=False)
    return grad_output.copy_(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))


def _normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Images are channels_last as `Module.to` makes them: of one channel, `contiguous` would leave NCHW's strides."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(memory_format=torch.channels_last) if values.dim() == 4 else values


# ----------------------------------------------------------------------------------------------------- conv2d


class ConvShape(NamedTuple):
    """A convolution of a square image, padded so that stride 1 keeps the size unless said otherwise."""

    in_channels: int
    out_channels: int
    size: int
    kernel: int
    stride: int = 1
    groups: int = 1
    padding: int | None = None

    @property
    def pad(self) -> int:
        return self.kernel // 2 if self.padding is None else self.padding

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.pad - self.kernel) // self.stride + 1

    def flops(self, batch: int) -> int:
        taps = self.in_channels // self.groups * self.kernel**2
        return 2 * batch * self.out_channels * self.out_size**2 * taps

    def text(self, batch: int) -> str:
        extra = f" /{self.stride}" if self.stride > 1 else ""
        if self.groups > 1:
            extra += " depthwise" if self.groups == self.in_channels else f" groups {self.groups}"
        return (
            f"{batch}x{self.in_channels}x{self.size}x{self.size} → {self.out_channels}, "
            f"{self.kernel}x{self.kernel}{extra}"
        )


def _depthwise(channels: int, size: int, stride: int = 1, kernel: int = 3) -> ConvShape:
    return _grouped(channels, size, stride, channels, kernel)


def _grouped(channels: int, size: int, stride: int = 1, groups: int = 32, kernel: int = 3) -> ConvShape:
    return ConvShape(channels, channels, size, kernel, stride, groups)


def _patches(in_channels: int, out_channels: int, size: int, kernel: int) -> ConvShape:
    return ConvShape(in_channels, out_channels, size, kernel, stride=kernel, padding=0)


# Every different convolution of each network, at 224x224 unless said otherwise.
NETWORKS: dict[str, tuple[ConvShape, ...]] = {
    "ResNet-18": (
        ConvShape(3, 64, 224, 7, 2),
        ConvShape(64, 64, 56, 3),
        ConvShape(64, 128, 56, 3, 2),
        ConvShape(64, 128, 56, 1, 2),
        ConvShape(128, 128, 28, 3),
        ConvShape(128, 256, 28, 3, 2),
        ConvShape(128, 256, 28, 1, 2),
        ConvShape(256, 256, 14, 3),
        ConvShape(256, 512, 14, 3, 2),
        ConvShape(256, 512, 14, 1, 2),
        ConvShape(512, 512, 7, 3),
    ),
    # Those that ResNet-18 does not have.
    "ResNet-50": (
        ConvShape(64, 64, 56, 1),
        ConvShape(64, 256, 56, 1),
        ConvShape(256, 64, 56, 1),
        ConvShape(256, 128, 56, 1),
        ConvShape(128, 128, 56, 3, 2),
        ConvShape(256, 512, 56, 1, 2),
        ConvShape(128, 512, 28, 1),
        ConvShape(512, 128, 28, 1),
        ConvShape(256, 256, 28, 3, 2),
        ConvShape(512, 1024, 28, 1, 2),
        ConvShape(256, 1024, 14, 1),
        ConvShape(1024, 256, 14, 1),
        ConvShape(512, 512, 14, 3, 2),
        ConvShape(1024, 2048, 14, 1, 2),
        ConvShape(512, 2048, 7, 1),
        ConvShape(2048, 512, 7, 1),
    ),
    "VGG-16": (
        ConvShape(3, 64, 224, 3),
        ConvShape(64, 64, 224, 3),
        ConvShape(64, 128, 112, 3),
        ConvShape(128, 128, 112, 3),
        ConvShape(128, 256, 56, 3),
        ConvShape(256, 256, 56, 3),
        ConvShape(256, 512, 28, 3),
        ConvShape(512, 512, 28, 3),
        ConvShape(512, 512, 14, 3),
    ),
    "MobileNet": (
        ConvShape(3, 32, 224, 3, 2),
        _depthwise(32, 112),
        ConvShape(32, 64, 112, 1),
        _depthwise(64, 112, 2),
        ConvShape(64, 128, 56, 1),
        _depthwise(128, 56),
        ConvShape(128, 128, 56, 1),
        _depthwise(128, 56, 2),
        ConvShape(128, 256, 28, 1),
        _depthwise(256, 28),
        ConvShape(256, 256, 28, 1),
        _depthwise(256, 28, 2),
        ConvShape(256, 512, 14, 1),
        _depthwise(512, 14),
        ConvShape(512, 512, 14, 1),
        _depthwise(512, 14, 2),
        ConvShape(512, 1024, 7, 1),
        _depthwise(1024, 7),
        ConvShape(1024, 1024, 7, 1),
    ),
    # 32x4d: its groups of 4 to 32 channels.
    "ResNeXt-50": (
        _grouped(128, 56),
        _grouped(256, 56, 2),
        _grouped(256, 28),
        _grouped(512, 28, 2),
        _grouped(512, 14),
        _grouped(1024, 14, 2),
        _grouped(1024, 7),
    ),
    "ConvNeXt-T": (
        _patches(3, 96, 224, 4),
        _depthwise(96, 56, kernel=7),
        ConvShape(96, 384, 56, 1),
        ConvShape(384, 96, 56, 1),
        _patches(96, 192, 56, 2),
        _depthwise(192, 28, kernel=7),
        ConvShape(192, 768, 28, 1),
        ConvShape(768, 192, 28, 1),
        _patches(192, 384, 28, 2),
        _depthwise(384, 14, kernel=7),
        ConvShape(384, 1536, 14, 1),
        ConvShape(1536, 384, 14, 1),
        _patches(384, 768, 14, 2),
        _depthwise(768, 7, kernel=7),
        ConvShape(768, 3072, 7, 1),
        ConvShape(3072, 768, 7, 1),
    ),
    "GoogLeNet": (
        ConvShape(16, 32, 28, 5),
        ConvShape(32, 96, 28, 5),
        ConvShape(16, 48, 14, 5),
        ConvShape(24, 64, 14, 5),
        ConvShape(32, 64, 14, 5),
        ConvShape(32, 128, 14, 5),
        ConvShape(32, 128, 7, 5),
        ConvShape(48, 128, 7, 5),
    ),
    # On patches of 40x40, as it is trained.
    "DnCNN": (
        ConvShape(1, 64, 40, 3),
        ConvShape(64, 64, 40, 3),
        ConvShape(64, 1, 40, 3),
    ),
    # On digits of 28x28, padded once.
    "LeNet-5": (
        ConvShape(1, 6, 28, 5),
        ConvShape(6, 16, 14, 5, padding=0),
        ConvShape(16, 120, 5, 5, padding=0),
    ),
}
QUICK_STEP = 5  # leaves each network an early and a late layer, MobileNet depthwise and pointwise ones

BLOCKS: dict[str, tuple[ConvShape, ...]] = {
    "reference model": (ConvShape(1, 32, 28, 3, padding=0), ConvShape(32, 64, 13, 3, padding=0)),
    "CIFAR-sized": (ConvShape(3, 32, 32, 3), ConvShape(32, 64, 16, 3), ConvShape(64, 128, 8, 3)),
    "VGG-16": (ConvShape(64, 64, 224, 3), ConvShape(128, 128, 112, 3), ConvShape(256, 256, 56, 3)),
}


def conv2d(quick: bool) -> Iterator[Case]:
    for network, shapes in NETWORKS.items():
        for shape in shapes[::QUICK_STEP] if quick else shapes:
            for batch in QUICK_BATCHES if quick else BATCHES:
                for stage in ("forward", "grad_input", "grad_weight"):
                    if stage == "grad_input" and shape.in_channels <= 3:
                        continue  # no network wants its pictures' gradient
                    yield Case(
                        "conv2d",
                        network,
                        shape.text(batch),
                        stage,
                        shape.flops(batch),
                        partial(_conv2d_sides, shape, batch, stage),
                    )


def _conv_tensors(shape: ConvShape, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    taps = shape.in_channels // shape.groups * shape.kernel**2
    input = _normal(batch, shape.in_channels, shape.size, shape.size)
    weight = _normal(
        shape.out_channels,
        shape.in_channels // shape.groups,
        shape.kernel,
        shape.kernel,
        scale=taps**-0.5,
        seed=2,
    )
    return input, weight, _normal(shape.out_channels, seed=3)


def _conv2d_sides(shape: ConvShape, batch: int, stage: str) -> Sides:
    input, weight, _ = _conv_tensors(shape, batch)
    # The fused bias costs nothing on either side, and half of these networks have none.
    arguments = (None, shape.stride, shape.pad, 1, shape.groups)
    if stage == "forward":
        return on_both(lambda module: lambda: module.conv2d(input, weight, *arguments))
    # Only what the stage is about requires a gradient, so that neither side computes the other one.
    leaf = input if stage == "grad_input" else weight
    leaf.requires_grad_()
    return on_both(lambda module: _gradients(module.conv2d(input, weight, *arguments), (leaf,)))


def conv2d_block(quick: bool) -> Iterator[Case]:
    """conv2d + bias + ReLU + 2x2 max-pool, which is one call here and three in torch."""
    for network, shapes in BLOCKS.items():
        for shape in shapes[-1:] if quick else shapes:
            for batch in QUICK_BATCHES if quick else (*BATCHES, 128) if shape.size < 100 else BATCHES:
                for stage in ("forward", "backward"):
                    yield Case(
                        "conv2d_block",
                        network,
                        shape.text(batch) + ", ReLU, pool 2",
                        stage,
                        shape.flops(batch) * (1 if stage == "forward" else 1 + (shape.in_channels > 3)),
                        partial(_conv2d_block_sides, shape, batch, stage),
                    )


def _conv2d_block_sides(shape: ConvShape, batch: int, stage: str) -> Sides:
    input, weight, bias = _conv_tensors(shape, batch)
    torch_functions = torch.nn.functional

    def ours() -> Tensor:
        return functional.conv2d(input, weight, bias, 1, shape.pad, activation="relu", max_pool=2)

    def theirs() -> Tensor:
        output = torch_functions.relu(torch_functions.conv2d(input, weight, bias, 1, shape.pad), inplace=True)
        return torch_functions.max_pool2d(output, 2)

    if stage == "forward":
        return Sides({OURS: ours, "torch": theirs})
    leaves = [weight, bias] if shape.in_channels <= 3 else [input, weight, bias]
    for leaf in leaves:
        leaf.requires_grad_()
    calls = {OURS: _gradients(ours(), leaves), "torch": _gradients(theirs(), leaves)}
    return Sides(calls, WINNER_TOLERANCE, "rms")


# ------------------------------------------------------------------------------------- the other functions

LINEAR = (  # network, in_features, out_features
    ("reference model", 1600, 64),
    ("reference model", 64, 10),
    ("CIFAR-sized", 2048, 256),
    ("ResNet-18", 512, 1000),
    ("ResNet-50", 2048, 1000),
    ("VGG-16", 25088, 4096),
    ("VGG-16", 4096, 4096),
)
QUICK_LINEAR = LINEAR[:3]


def linear(quick: bool) -> Iterator[Case]:
    for network, in_features, out_features in QUICK_LINEAR if quick else LINEAR:
        for batch in (32,) if quick else (*BATCHES, 128):
            for stage in ("forward", "grad_input", "grad_weight"):
                yield Case(
                    "linear",
                    network,
                    f"{batch}x{in_features} → {out_features}",
                    stage,
                    2 * batch * in_features * out_features,
                    partial(_linear_sides, batch, in_features, out_features, stage),
                )


def _linear_sides(batch: int, in_features: int, out_features: int, stage: str) -> Sides:
    input = _normal(batch, in_features)
    weight = _normal(out_features, in_features, scale=in_features**-0.5, seed=2)
    bias = _normal(out_features, seed=3)
    if stage == "forward":
        return on_both(lambda module: lambda: module.linear(input, weight, bias))
    leaf = input if stage == "grad_input" else weight
    leaf.requires_grad_()
    return on_both(lambda module: _gradients(module.linear(input, weight, bias), (leaf,)))


def _function_cases(operator: str, rows: Sequence[tuple[str, tuple[int, ...], tuple[Any, ...], str]]) -> Iterator[Case]:
    """Cases of a function of one tensor: (network, shape, further arguments, how to show these)."""
    for network, shape, arguments, text in rows:
        for stage in ("forward", "forward+backward"):
            yield Case(
                operator,
                network,
                "x".join(map(str, shape)) + text,
                stage,
                None,
                partial(_function_sides, operator, shape, arguments, stage),
            )


def _function_sides(operator: str, shape: tuple[int, ...], arguments: tuple[Any, ...], stage: str) -> Sides:
    input = _normal(*shape)
    if operator in ("cross_entropy", "nll_loss"):
        arguments = (torch.arange(shape[0]) % shape[1], *arguments)
    elif operator == "mse_loss":
        arguments = (_normal(*shape, seed=2), *arguments)
    if stage == "forward":
        return on_both(lambda module: lambda: getattr(module, operator)(input, *arguments))
    input.requires_grad_()
    return on_both(
        lambda module: _forward_and_gradients(lambda: getattr(module, operator)(input, *arguments), (input,))
    )


def max_pool2d(quick: bool) -> Iterator[Case]:
    rows = [
        ("reference model", (32, 32, 26, 26), (2,), ", 2x2"),
        ("CIFAR-sized", (32, 64, 16, 16), (2,), ", 2x2"),
        ("ResNet-18", (8, 64, 112, 112), (3, 2, 1), ", 3x3 /2"),
        ("VGG-16", (8, 64, 224, 224), (2,), ", 2x2"),
        ("GoogLeNet", (8, 480, 28, 28), (3, 2, 1), ", 3x3 /2"),
        ("GoogLeNet", (8, 192, 28, 28), (3, 1, 1), ", 3x3"),
    ]
    return _function_cases("max_pool2d", rows[:2] if quick else rows)


def relu(quick: bool) -> Iterator[Case]:
    rows = [
        ("reference model", (32, 32, 26, 26), (), ""),
        ("reference model", (32, 64), (), ""),
        ("ResNet-18", (8, 64, 56, 56), (), ""),
        ("VGG-16", (8, 64, 224, 224), (), ""),
    ]
    return _function_cases("relu", rows[:2] if quick else rows)


LOGITS = [
    ("reference model", 32, 10),
    ("reference model", 128, 10),
    ("ImageNet", 32, 1000),
    ("words", 64, 32000),
]


def _logit_rows(quick: bool, arguments: tuple[Any, ...]) -> list[tuple[str, tuple[int, ...], tuple[Any, ...], str]]:
    return [(network, (n, classes), arguments, "") for network, n, classes in LOGITS[: 2 if quick else None]]


def softmax(quick: bool) -> Iterator[Case]:
    return _function_cases("softmax", _logit_rows(quick, (1,)))


def log_softmax(quick: bool) -> Iterator[Case]:
    return _function_cases("log_softmax", _logit_rows(quick, (1,)))


def cross_entropy(quick: bool) -> Iterator[Case]:
    return _function_cases("cross_entropy", _logit_rows(quick, ()))


def mse_loss(quick: bool) -> Iterator[Case]:
    return _function_cases("mse_loss", _logit_rows(quick, ()))


# ------------------------------------------------------------------------------------------------- sequential


def _perceptron(*widths: int) -> list[torch.nn.Module]:
    """Linear layers with ReLUs between them."""
    layers: list[torch.nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    return layers[:-1]


def _conv_blocks(*shapes: ConvShape) -> list[torch.nn.Module]:
    """Convolution, ReLU and 2x2 max-pooling, and a Flatten behind them."""
    layers: list[torch.nn.Module] = []
    for shape in shapes:
        convolution = torch.nn.Conv2d(shape.in_channels, shape.out_channels, shape.kernel, padding=shape.pad)
        layers += [convolution, torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
    return [*layers, torch.nn.Flatten()]


# Network, shape of its input without the batch, layers.
SEQUENTIALS: tuple[tuple[str, tuple[int, ...], Callable[[], list[torch.nn.Module]]], ...] = (
    ("policy 8-64-64-4", (8,), lambda: _perceptron(8, 64, 64, 4)),
    ("perceptron 784-256-128-10", (784,), lambda: _perceptron(784, 256, 128, 10)),
    ("LeNet-5", (1, 28, 28), lambda: _conv_blocks(*NETWORKS["LeNet-5"][:2]) + _perceptron(400, 120, 84, 10)),
    ("reference model", (1, 28, 28), lambda: _conv_blocks(*BLOCKS["reference model"]) + _perceptron(1600, 64, 10)),
    ("CIFAR-sized", (3, 32, 32), lambda: _conv_blocks(*BLOCKS["CIFAR-sized"]) + _perceptron(2048, 256, 10)),
)
QUICK_SEQUENTIALS = SEQUENTIALS[:3:2]


def sequential(quick: bool) -> Iterator[Case]:
    """Whole networks as :func:`fastnn.convert` makes them of torch's Sequential, called from Python."""
    for network, shape, layers in QUICK_SEQUENTIALS if quick else SEQUENTIALS:
        for batch in QUICK_BATCHES if quick else (*BATCHES, 128):
            for stage in ("forward", "forward+backward"):
                text = "x".join(map(str, (batch, *shape)))
                yield Case(
                    "sequential", network, text, stage, None, partial(_sequential_sides, layers, batch, shape, stage)
                )


def _sequential_sides(
    layers: Callable[[], list[torch.nn.Module]], batch: int, shape: tuple[int, ...], stage: str
) -> Sides:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = torch.nn.Sequential(*layers()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ours = convert(theirs)  # around the same parameters
    input = _normal(batch, *shape)

    def side(model: torch.nn.Module) -> Call:
        if stage == "forward+backward":
            return _forward_and_gradients(lambda: model(input), list(model.parameters()))

        def forward() -> Tensor:
            with torch.no_grad():
                return model(input)

        return forward

    return Sides({OURS: side(ours), "torch": side(theirs)}, WINNER_TOLERANCE, "rms")


# ------------------------------------------------------------------------------------------------- optimizers

TENSORS = (1, 50, 500)
ELEMENTS = (10**5, 10**6, 10**7)  # in all tensors together


def _optimizer_cases(
    operator: str, variants: Mapping[str, dict[str, Any]], make: Mapping[str, Any], quick: bool
) -> Iterator[Case]:
    for text, options in variants.items():
        for count in TENSORS:
            for elements in ELEMENTS[:1] if quick else ELEMENTS:
                tensors = "1 tensor" if count == 1 else f"{count} tensors"
                yield Case(
                    operator,
                    "-",
                    f"{tensors}, 10^{round(math.log10(elements))} numbers{text}",
                    "step",
                    None,
                    partial(_optimizer_sides, make, count, elements, options),
                )


def _optimizer_sides(make: Mapping[str, Any], count: int, elements: int, options: dict[str, Any]) -> Sides:
    def side(name: str, extra: dict[str, Any]) -> Call:
        # From zero, the parameters are the updates themselves: nothing large hides a wrong one.
        params = [torch.zeros(size, requires_grad=True) for size in tensor_sizes(count, elements)]
        for seed, param in enumerate(params):
            param.grad = _normal(*param.shape, seed=seed)
        optimizer = make[name](params, lr=1e-3, **options, **extra)

        def step() -> list[Tensor]:
            optimizer.step()
            return params

        return step

    return Sides(
        {
            OURS: side(OURS, {}),
            "torch fused": side("torch", {"fused": True}),
            "torch foreach": side("torch", {"foreach": True}),
        }
    )


def tensor_sizes(count: int, elements: int) -> list[int]:
    """Sizes that add up to `elements`: weights alternate with biases of a 64th of their size."""
    layers, odd = divmod(count, 2)
    parts = [64, 1] * layers + [64] * odd
    bounds = [elements * sum(parts[:index]) // sum(parts) for index in range(count + 1)]
    return [stop - start for start, stop in pairwise(bounds)]


def adam(quick: bool) -> Iterator[Case]:
    return _optimizer_cases("adam", {"": {}}, {OURS: optim.Adam, "torch": torch.optim.Adam}, quick)


def sgd(quick: bool) -> Iterator[Case]:
    variants: dict[str, dict[str, Any]] = {", momentum": {"momentum": 0.9}}
    if not quick:
        variants = {"": {}, **variants}
    return _optimizer_cases("sgd", variants, {OURS: optim.SGD, "torch": torch.optim.SGD}, quick)


# --------------------------------------------------------------------------------------------------- overhead


def overhead(quick: bool) -> Iterator[Case]:
    """Calls on tensors so small that only the way to the kernel takes time: batch 1, 8 features."""
    for name in (
        "linear",
        "conv2d",
        "max_pool2d",
        "relu",
        "softmax",
        "log_softmax",
        "cross_entropy",
        "mse_loss",
    ):
        yield Case(
            "overhead",
            "-",
            f"{name}, batch 1, 8 features",
            "forward+backward",
            None,
            partial(_overhead_sides, name),
        )


def _overhead_sides(name: str) -> Sides:
    image = name in ("conv2d", "max_pool2d")
    input = (_normal(1, 8, 4, 4) if image else _normal(1, 8)).requires_grad_()
    leaves = [input]
    others: tuple[Any, ...] = ()
    if name in ("linear", "conv2d"):
        weight = (_normal(8, 8, 3, 3, seed=2) if image else _normal(8, 8, seed=2)).requires_grad_()
        bias = _normal(8, seed=3).requires_grad_()
        leaves, others = [input, weight, bias], (weight, bias)
    elif name == "max_pool2d":
        others = (2,)
    elif name in ("softmax", "log_softmax"):
        others = (1,)
    elif name == "cross_entropy":
        others = (torch.tensor([3]),)
    elif name == "mse_loss":
        others = (_normal(1, 8, seed=2),)
    return on_both(lambda module: _forward_and_gradients(lambda: getattr(module, name)(input, *others), leaves))


OPERATORS: dict[str, Callable[[bool], Iterator[Case]]] = {
    operator.__name__: operator
    for operator in (
        conv2d,
        conv2d_block,
        linear,
        max_pool2d,
        relu,
        softmax,
        log_softmax,
        cross_entropy,
        mse_loss,
        sequential,
        adam,
        sgd,
        overhead,
    )
}
