"""Calls every operator once, forward and backward, on small odd shapes in all dtypes: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python tests/every_operator.py [--device cuda]

A result that is not finite, a call that torch served and an operator that did not run end it with code 1. With
FASTNN_CUDA_EMULATOR=1 and ``--device cpu`` CUDA's kernels run on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import fastnn
from fastnn import _C, functional, nn, optim
from fastnn.runtime import kernel_dtypes
from fastnn.training import compile_step

# As the record of kernels names them: two make up conv2d's backward.
OPERATORS = {name for name in dir(_C) if name.endswith(("_forward", "_backward", "_step"))} - {"conv2d_backward"}
OPERATORS |= {"conv2d_grad_input", "conv2d_grad_weight", "transpose", "gather_images", "count_correct"}


class Checks:
    """Makes tensors of one dtype on one device and calls operators on them."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.random = torch.Generator().manual_seed(0)

    def tensor(self, *shape: int) -> Tensor:
        # Made on the CPU: torch's kernels would only slow the watcher down.
        values = torch.randn(shape, generator=self.random).to(self.device, self.dtype)
        return values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values

    def targets(self, count: int, classes: int) -> Tensor:
        return (torch.arange(count) % classes).to(self.device)

    def call(self, function: Callable[..., Tensor], *inputs: Tensor) -> None:
        """Forward without gradients, then with them and backward to all of `inputs`."""
        with torch.no_grad():
            self.check(function(*inputs))
        leaves = [x.requires_grad_() for x in inputs]
        output = function(*leaves)
        self.check(output, *torch.autograd.grad(output, leaves, self.tensor(*output.shape)))

    def check(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            if not torch.isfinite(tensor.detach().cpu()).all():
                raise ValueError(f"expected finite numbers, got {tensor}")


def operators(c: Checks) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every operator under the name that an error is told with."""

    def conv2d(*geometry: int, **fused: object) -> Callable[..., Tensor]:
        return lambda x, w, b: functional.conv2d(x, w, b, *geometry, **fused)

    yield "linear", lambda: c.call(functional.linear, c.tensor(5, 7), c.tensor(3, 7), c.tensor(3))
    yield (
        "linear, ReLU",
        lambda: c.call(
            lambda x, w, b: functional.linear(x, w, b, activation="relu"),
            c.tensor(67, 129),
            c.tensor(65, 129),
            c.tensor(65),
        ),
    )
    yield "linear without bias", lambda: c.call(functional.linear, c.tensor(1, 33), c.tensor(10, 33))
    yield "conv2d", lambda: c.call(conv2d(), c.tensor(3, 5, 9, 7), c.tensor(7, 5, 3, 3), c.tensor(7))
    yield (
        "conv2d, ReLU, pool",
        lambda: c.call(
            conv2d(1, 1, activation="relu", max_pool=2), c.tensor(3, 5, 9, 7), c.tensor(35, 5, 3, 3), c.tensor(35)
        ),
    )
    yield (
        "conv2d of one channel, ReLU, pool",
        lambda: c.call(
            conv2d(activation="relu", max_pool=2), c.tensor(3, 1, 13, 11), c.tensor(33, 1, 3, 3), c.tensor(33)
        ),
    )
    yield (
        "conv2d, strided and dilated",
        lambda: c.call(conv2d(2, 3, 2), c.tensor(2, 9, 15, 11), c.tensor(17, 9, 3, 3), c.tensor(17)),
    )
    yield (
        "conv2d in groups",
        lambda: c.call(conv2d(1, 1, 1, 3), c.tensor(2, 9, 7, 7), c.tensor(15, 3, 3, 3), c.tensor(15)),
    )
    yield (
        "conv2d, depthwise",
        lambda: c.call(conv2d(1, 1, 1, 37), c.tensor(2, 37, 9, 7), c.tensor(37, 1, 3, 3), c.tensor(37)),
    )
    yield "max_pool2d", lambda: c.call(lambda x: functional.max_pool2d(x, 2), c.tensor(2, 5, 9, 7))
    yield (
        "max_pool2d, overlapping",
        lambda: c.call(lambda x: functional.max_pool2d(x, 3, 2, 1), c.tensor(2, 37, 9, 7)),
    )
    yield "relu", lambda: c.call(functional.relu, c.tensor(3, 333))
    yield "relu in place", lambda: c.call(lambda x: functional.relu(x + 0, inplace=True), c.tensor(3, 333))
    for classes in (10, 1003):
        for name in ("softmax", "log_softmax"):
            function = getattr(functional, name)
            yield (
                f"{name} of {classes}",
                lambda function=function, classes=classes: c.call(lambda x: function(x, 1), c.tensor(5, classes)),
            )
        yield (
            f"cross_entropy of {classes}",
            lambda classes=classes: c.call(
                lambda x: functional.cross_entropy(x, c.targets(5, classes), label_smoothing=0.1), c.tensor(5, classes)
            ),
        )
    yield "nll_loss", lambda: c.call(lambda x: functional.nll_loss(x, c.targets(5, 7)), c.tensor(5, 7))
    yield "mse_loss", lambda: c.call(functional.mse_loss, c.tensor(3, 77), c.tensor(3, 77))
    for name, options in (("SGD", {"momentum": 0.9}), ("Adam", {}), ("AdamW", {"amsgrad": True})):
        yield name, lambda name=name, options=options: update(c, getattr(optim, name), options)
    yield "training step", lambda: step(c)


def update(c: Checks, optimizer: Callable[..., torch.optim.Optimizer], options: dict[str, object]) -> None:
    params = [c.tensor(*shape) for shape in ((3, 5), (7,), (1031,))]
    for param in params:
        param.grad = c.tensor(*param.shape)
    optimizer(params, lr=1e-2, **options).step()
    c.check(*params)


def step(c: Checks) -> None:
    """One compiled step: what gathers the batch, transposes for Flatten and counts right answers runs here alone.

    One step launches its kernels by themselves; only later ones are captured.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        nn.Conv2d(1, 5, 3, activation="relu", max_pool=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        torch.nn.Flatten(),
        nn.Linear(45, 7),
    ).to(c.device, c.dtype)
    images = (torch.arange(9 * 14 * 14).view(9, 1, 14, 14) % 251).to(torch.uint8).to(c.device)
    rows = torch.tensor([8, 0, 3, 5, 1]).to(c.device)
    compiled = compile_step(model, nn.CrossEntropyLoss(), optim.Adam(model.parameters()))
    loss, correct = compiled.on_rows(images, c.targets(9, 7), rows)
    c.check(loss, *(parameter.detach() for parameter in model.parameters()))
    if not 0 <= int(correct) <= 5:
        raise ValueError(f"expected 0 to 5 right answers, got {int(correct)}")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args(arguments).device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("tests/every_operator.py: expected a GPU that torch sees, got none", file=sys.stderr)
        return 2
    dtypes = sorted(kernel_dtypes(device) or (), key=str)
    if not dtypes:
        print(f"tests/every_operator.py: expected a build with kernels for {device}, got none", file=sys.stderr)
        return 2
    failures, ran = [], set()
    for tf32 in (False, True) if device.type == "cuda" else (False,):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        for dtype in dtypes if not tf32 else (torch.float32,):
            for name, call in operators(Checks(device, dtype)):
                where = f"{name}, {str(dtype)[6:]}" + (", tf32" if tf32 else "")
                try:
                    with fastnn.explain_dispatch() as log:
                        call()
                except Exception as error:  # the others are to run, too
                    failures.append(f"{where}: {type(error).__name__}: {error}")
                    continue
                failures += [f"{where}: torch served {r.operator}: {r.reason}" for r in log if r.kernel == "torch"]
                ran |= {record.operator for record in log}
    if device.type == "cuda":
        torch.cuda.synchronize()
    failures += [f"{name} did not run" for name in sorted(OPERATORS - ran)]
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{len(ran)} operators in {', '.join(str(dtype)[6:] for dtype in dtypes)}: {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
