"""What benchmarks/gpu.py measures: each section adds its rows as soon as it knows them.

Sections run on the CPU as well, with tiny sizes and meaningless times, for the tests of this code.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from nets import REFERENCE, random_images
from torch import Tensor

import fastnn
from fastnn import data, functional, optim
from fastnn.bench.operators import ConvShape, _conv_tensors, tensor_sizes
from fastnn.bench.timing import (
    OURS,
    Disagreement,
    Spread,
    _seconds,
    check_sides,
    geometric_mean,
    interleave,
    repeated,
    significant,
)
from fastnn.compiled import CompiledStep

ROUNDS = 9
ROUND_SECONDS = 0.03

Row = dict[str, Any]
StepCall = Callable[[Tensor], Tensor]  # makes one training step on these rows of the images and returns the loss

GRAPH = "PyTorch in one CUDA graph"
EAGER = "PyTorch eager"
COMPILED = "torch.compile(mode='max-autotune')"
LAYERS = "fastnn layers, eager"
BATCHES = (128, 32, 512)
STEP_MICROSECONDS = {32: 30.0, 128: 40.0, 512: 80.0}
STEP_TARGETS = {GRAPH: 4.0, EAGER: 15.0, COMPILED: 4.0}
LAYERS_TARGET = 2.0
FIT_SECONDS = 0.3
BLOCKS_TARGET = 1.0
ADAM_TARGET = 1.0
COPY_TARGET = 0.85  # of the bandwidth of a copy
ADAM_BYTES = 28  # a float32 element: param, grad and two moments are read, all but grad are written
ADAM_ELEMENTS = (10**6, 10**7, 10**8)
MNIST_ACCURACY = 0.99

CHECK_STEPS = 8  # a graph of ours is replayed from the third step on
# Of a loss. Factors that are rounded by 2^-11 move the first steps' losses by about 10^-3; a step that trains on other
# rows, or not at all, moves them by more than 10^-1.
LOSS_TOLERANCE = 1e-2
# Of the outputs' root mean square, forward by the largest element, five times the root mean square: tf32 rounds to
# 2^-11, bfloat16 to 2^-8. Backward by the root mean square, since rounding moves some maxima to a neighbour, and with
# them their gradient; in bfloat16, where neighbours are often equal, a few in a hundred. A wrong index shows as 1.
BLOCK_TOLERANCES = {
    ("tf32", "forward"): 1e-2,
    ("tf32", "backward"): 0.1,
    ("bf16", "forward"): 5e-2,
    ("bf16", "backward"): 0.4,
}
# Calls take turns on so many bytes, more than twice the largest cache (126 MB): none finds its input in there.
ROTATED_BYTES = 300_000_000
ROTATED_MOST = 24


# ------------------------------------------------------------------------------------------------- time on a GPU


class Device:
    """Where a section runs: a GPU, or for tests of this script the CPU, with an ordinary clock and without graphs."""

    def __init__(self, name: str, quick: bool = False, mnist: Path | None = None) -> None:
        self.device = torch.device(name)
        self.mnist = mnist  # the folder of its files
        self.on_gpu = self.device.type == "cuda"
        self.quick = quick
        # The older names of the switches: torch's compiler reads them, and refuses a mixture with the newer ones.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], count: int) -> float:
        """The seconds that so many calls take on the GPU."""
        if not self.on_gpu:
            return _seconds(call, count)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def measure(self, sides: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """The seconds of a call of each side in each round."""
        seconds = 0.0 if self.quick else ROUND_SECONDS
        return interleave({side: repeated(call, seconds, self.seconds) for side, call in sides.items()}, ROUNDS)

    def captured(self, make: Callable[[], Sequence[Callable[[], Any]]]) -> Callable[[], Any]:
        """Calls one after another as a CUDA graph: no time passes between their kernels.

        `make` runs on the stream of the capture, where autograd's backward runs what was recorded in there.
        """
        if not self.on_gpu:
            calls = make()
            return lambda: [call() for call in calls]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            calls = make()
            for _ in range(2):  # libraries load, allocate and choose their kernels now
                for call in calls:
                    call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        kept = []
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                kept.append(call())
        torch.cuda.synchronize()

        def replay(kept: Any = (calls, kept)) -> None:  # the graph works in their memory
            graph.replay()

        return replay

    def copies(self, bytes_of_one: int) -> int:
        """How many sets of buffers a call takes in turn so that none lies in the cache."""
        if not self.on_gpu or self.quick:
            return 2
        return max(1, min(ROTATED_MOST, math.ceil(ROTATED_BYTES / bytes_of_one)))


# ---------------------------------------------------------------------------------------------------------- rows


def spread(samples: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """The median with quartiles, the lowest and the highest."""
    scaled = [scale * sample for sample in samples]
    return {**Spread.of(scaled).to_json(), "low": significant(min(scaled)), "high": significant(max(scaled))}


def compared(
    what: str, samples: Mapping[str, Sequence[float]], ours: str, theirs: str, target: float | None, **facts: Any
) -> Row:
    """One comparison; its ratio is above 1 where our side is faster, taken within each round."""
    ratios = [b / a for a, b in zip(samples[ours], samples[theirs], strict=True)]
    return {
        "what": what,
        "against": theirs,
        **facts,
        "microseconds": spread(samples[ours], 1e6),
        "their_microseconds": spread(samples[theirs], 1e6),
        "ratio": spread(ratios),
        "target": target,
        "reached": None if target is None else statistics.median(ratios) >= target,
    }


def absolute(what: str, seconds: Sequence[float], target: float, **facts: Any) -> Row:
    """A time with a target of its own, in microseconds."""
    times = spread(seconds, 1e6)
    return {"what": what, **facts, "microseconds": times, "most": target, "reached": times["median"] <= target}


def failed(what: str, error: BaseException | str) -> Row:
    """What stands in the place of a row that an error left out."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return {"what": what, "error": text}


@contextmanager
def noting(add: Callable[[Row], None], what: str) -> Iterator[None]:
    """An error in the block becomes a row."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        add(failed(what, error))


# ---------------------------------------------------------------------------------------------- training steps


def random_mnist(device: Device) -> tuple[Tensor, Tensor]:
    """uint8 images (60000, 1, 28, 28) and their classes, on the device."""
    images = random_images(REFERENCE, 256 if device.quick else 60_000, 0)
    return images.raw.to(device.device), images.labels.to(device.device)


def loop_step(
    device: Device, model: Any, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, loss_of: Any = None
) -> StepCall:
    """The step that a user of torch writes; a batch is gathered channels_last without another copy."""
    stored = images.permute(0, 2, 3, 1).contiguous()
    loss_of = loss_of or torch.nn.functional.cross_entropy

    def step(rows: Tensor) -> Tensor:
        batch = stored.index_select(0, rows).permute(0, 3, 1, 2).to(torch.float32).div_(255)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model(batch), labels.index_select(0, rows))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def torch_sides(device: Device) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = REFERENCE.torch_model().to(device.device)
    return model, torch.optim.Adam(model.parameters(), 1e-3, fused=True, capturable=device.on_gpu)


def graph_step(device: Device, images: Tensor, labels: Tensor, batch: int) -> StepCall:
    """PyTorch's whole step, with the gathering of the batch, as one CUDA graph."""
    model, optimizer = torch_sides(device)
    step = loop_step(device, model, optimizer, images, labels)
    if not device.on_gpu:
        return step
    start = [parameter.detach().clone() for parameter in model.parameters()]
    rows = torch.arange(batch, device=device.device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(rows)
    torch.cuda.synchronize()
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = step(rows)
    with torch.no_grad():  # back to before the first step, in the memory that the graph works in
        for parameter, value in zip(model.parameters(), start, strict=True):
            parameter.copy_(value)
            for state in optimizer.state[parameter].values():
                state.zero_()
    torch.cuda.synchronize()

    def replay(index: Tensor, kept: Any = step) -> Tensor:  # the graph works in its memory
        rows.copy_(index)
        graph.replay()
        return loss

    return replay


def our_step(device: Device, images: Tensor, labels: Tensor) -> StepCall:
    model = REFERENCE.classifier().to(device.device)
    optimizer = fastnn.optim.Adam(model.parameters(), 1e-3)
    step = fastnn.training.compile_step(model, fastnn.nn.CrossEntropyLoss(), optimizer)
    return lambda rows: step.on_rows(images, labels, rows)[0]


def layer_step(device: Device, images: Tensor, labels: Tensor) -> StepCall:
    """The eager loop with fastnn's layers, loss and optimizer."""
    model = REFERENCE.layer_model().to(device.device)
    optimizer = fastnn.optim.Adam(model.parameters(), 1e-3)
    return loop_step(device, model, optimizer, images, labels, fastnn.functional.cross_entropy)


def compiled_step(device: Device, images: Tensor, labels: Tensor) -> StepCall:
    model, optimizer = torch_sides(device)
    step = loop_step(device, torch.compile(model, mode="max-autotune", dynamic=False), optimizer, images, labels)

    def marked(rows: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return step(rows).clone()

    return marked


def check_losses(steps: Mapping[str, StepCall], batches: Sequence[Tensor]) -> None:
    """Every side makes the same first steps; ours must run on our kernels.

    Raises:
        Disagreement: the losses differ by more than tf32 explains, or torch served an operator of ours.
    """
    losses: dict[str, list[float]] = {}
    for side, step in steps.items():
        with fastnn.explain_dispatch() as log:
            losses[side] = [float(step(batches[i % len(batches)])) for i in range(CHECK_STEPS)]
        fallen = [f"{record.operator}: {record.reason}" for record in log if record.kernel == "torch"]
        if side in (OURS, LAYERS) and (fallen or not log):
            raise Disagreement(f"{side}: torch served {', '.join(dict.fromkeys(fallen)) or 'everything'}")
    (first, expected), *others = losses.items()
    for side, values in others:
        for number, (a, b) in enumerate(zip(expected, values, strict=True), start=1):
            if not abs(a - b) <= LOSS_TOLERANCE * abs(a):  # so that a NaN is refused
                raise Disagreement(f"step {number}: the loss of {first} is {a:.6g}, that of {side} {b:.6g}")


def measure_steps(device: Device, steps: Mapping[str, StepCall], images: Tensor, batch: int) -> dict[str, list[float]]:
    """Checks and times these ways to make a step."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(device.device)
    batches = [rows for rows in order.split(batch) if len(rows) == batch]
    check_losses(steps, batches)

    def call(step: StepCall) -> Callable[[], Any]:
        turns = itertools.cycle(batches)
        return lambda: step(next(turns))

    return device.measure({side: call(step) for side, step in steps.items()})


def steps(device: Device, add: Callable[[Row], None]) -> None:
    """Training steps of the reference network: ours in a graph, PyTorch's in a graph and eager, layers."""
    images, labels = random_mnist(device)
    for batch in (32,) if device.quick else BATCHES:
        with noting(add, f"training step, batch {batch}"):
            samples = measure_steps(
                device,
                {
                    OURS: our_step(device, images, labels),
                    GRAPH: graph_step(device, images, labels, batch),
                    EAGER: loop_step(device, *torch_sides(device), images, labels),
                    LAYERS: layer_step(device, images, labels),
                },
                images,
                batch,
            )
            facts = {"batch": batch, "precision": "tf32"}
            add(absolute("training step", samples[OURS], STEP_MICROSECONDS[batch], **facts))
            for theirs in (GRAPH, EAGER):
                add(compared("training step", samples, OURS, theirs, STEP_TARGETS[theirs], **facts))
            add(compared("drop-in layers", samples, LAYERS, EAGER, LAYERS_TARGET, **facts))


def compiled(device: Device, add: Callable[[Row], None]) -> None:
    """One of the steps against torch.compile, which may take a minute to compile or lack what it needs."""
    images, labels = random_mnist(device)
    batch = BATCHES[0]
    with noting(add, f"training step against {COMPILED}, batch {batch}"):
        sides = {OURS: our_step(device, images, labels), COMPILED: compiled_step(device, images, labels)}
        samples = measure_steps(device, sides, images, batch)
        facts = {"batch": batch, "precision": "tf32"}
        add(compared("training step", samples, OURS, COMPILED, STEP_TARGETS[COMPILED], **facts))


# ---------------------------------------------------------------------------------------------------------- fit


def fit(device: Device, add: Callable[[Row], None]) -> None:
    """Five epochs of `fit` on 60,000 random images, from after the first launch of steps to its return."""
    images, labels = (tensor.cpu() for tensor in random_mnist(device))
    run_rows = CompiledStep._run_rows
    began: list[float] = []

    def noted(self: Any, *args: Any) -> Any:
        result = run_rows(self, *args)
        if not began:
            device.synchronize()
            began.append(time.perf_counter())
        return result

    def seconds() -> float:
        began.clear()
        model = REFERENCE.classifier().to(device.device)
        with mock.patch.object(CompiledStep, "_run_rows", noted):
            model.fit(images, labels, epochs=5, batch_size=128, seed=0, progress=False)
        device.synchronize()
        if not began:
            raise Disagreement("fit did not use a compiled step")
        return time.perf_counter() - began[0]

    seconds()  # libraries load
    samples = [seconds() for _ in range(2 if device.quick else ROUNDS)]
    add(absolute("5 epochs of fit, 60,000 images", samples, FIT_SECONDS * 1e6, batch=128, precision="tf32"))


def mnist(device: Device, add: Callable[[Row], None]) -> None:
    """Five epochs on MNIST with a learning rate that rises and falls."""
    if device.mnist is None:
        raise ValueError("expected a folder with MNIST's files, got none")
    train, test = data.load(device.mnist, progress=False)
    model = fastnn.CNNClassifier().to(device.device)
    epochs, batch = 5, 128
    schedule = partial(
        torch.optim.lr_scheduler.OneCycleLR,
        max_lr=4e-3,
        total_steps=epochs * math.ceil(len(train.labels) / batch),
    )
    began = time.perf_counter()
    model.fit(train.images, train.labels, epochs=epochs, batch_size=batch, seed=0, scheduler=schedule)
    device.synchronize()
    seconds = time.perf_counter() - began
    accuracy = model.evaluate(test.images, test.labels)["accuracy"]
    row = {"what": "MNIST, 5 epochs of fit", "batch": batch, "seconds": round(seconds, 3), "accuracy": accuracy}
    if not accuracy >= MNIST_ACCURACY:
        row["error"] = f"expected an accuracy of {MNIST_ACCURACY:.2%}, got {accuracy:.2%} after {seconds:.1f} s"
    add(row)


# --------------------------------------------------------------------------------------------- convolution blocks


def block_shapes() -> list[ConvShape]:
    """Every different 3x3 convolution of stride 1 in ResNets for CIFAR, narrow and wide; all keep the image's size."""
    sizes = [(3, 16, 32), (16, 16, 32), (32, 32, 16), (64, 64, 8), (3, 64, 32), (64, 64, 32), (128, 128, 16)]
    return [ConvShape(*size, 3) for size in (*sizes, (256, 256, 8), (512, 512, 4))]


BLOCK_BATCH = 256


def blocks(device: Device, add: Callable[[Row], None]) -> None:
    """conv + bias + ReLU + 2x2 max-pool as one call against cuDNN's convolution and torch's ReLU and pool."""
    batch = 2 if device.quick else BLOCK_BATCH
    names = {"tf32": torch.float32, "bf16": torch.bfloat16}
    ratios: dict[str, list[float]] = {}
    for precision, stage in itertools.product(names if device.on_gpu else ("tf32",), ("forward", "backward")):
        for shape in block_shapes()[:1] if device.quick else block_shapes():
            what = f"conv block {shape.text(batch)}, {stage}"
            with noting(add, f"{what}, {precision}"):
                tolerance = BLOCK_TOLERANCES[precision, stage]
                row = measure_block(device, shape, batch, names[precision], stage, tolerance, what, precision)
                add(row)
                ratios.setdefault(f"{precision}, {stage}", []).append(row["ratio"]["median"])
    add_means(add, ratios)


def measure_block(
    device: Device,
    shape: ConvShape,
    batch: int,
    dtype: torch.dtype,
    stage: str,
    tolerance: float,
    what: str,
    precision: str,
) -> Row:
    theirs = torch.nn.functional
    input, weight, bias = (tensor.to(device.device, dtype) for tensor in _conv_tensors(shape, batch))
    out_size = shape.out_size // 2
    grad = torch.randn(batch, out_size, out_size, shape.out_channels, generator=torch.Generator().manual_seed(5))
    grad = grad.to(device.device, dtype).permute(0, 3, 1, 2)  # channels_last

    def our_block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.conv2d(x, weight, bias, 1, shape.pad, activation="relu", max_pool=2)

    def their_block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        output = theirs.relu(theirs.conv2d(x, weight, bias, 1, shape.pad), inplace=True)
        return theirs.max_pool2d(output, 2)

    sides = {OURS: our_block, "cuDNN + ReLU + pool": their_block}

    def call(block: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], Any]:
        if stage == "forward":
            return torch.no_grad()(lambda: block(x, weight, bias))
        # Of this call's stream alone: autograd would have a capture wait for the stream that has seen them first.
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias)]
        wanted = leaves[1:] if shape.in_channels <= 3 else leaves  # no network wants its pictures' gradient
        leaves[0].requires_grad_(len(wanted) == 3)
        output = block(*leaves)
        return lambda: torch.autograd.grad(output, wanted, grad, retain_graph=True)

    calls = {side: call(block, input.detach().clone(), grad) for side, block in sides.items()}
    kernels = check_sides(calls, tolerance, "max" if stage == "forward" else "rms")
    bytes_of_one = (input.numel() + grad.numel()) * input.element_size()
    count = device.copies(bytes_of_one)
    inputs = [input.detach().clone() for _ in range(count)]
    grads = [grad.clone() for _ in range(count)]

    def turns(side: str, block: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Any]:
        try:
            return device.captured(lambda: [call(block, x, g) for x, g in zip(inputs, grads, strict=True)])
        except RuntimeError as error:
            raise RuntimeError(f"{side}: {error}") from error

    samples = device.measure({side: turns(side, block) for side, block in sides.items()})
    samples = {side: [value / count for value in values] for side, values in samples.items()}
    flops = shape.flops(batch) * (1 if stage == "forward" else 1 + (shape.in_channels > 3))
    facts = {"precision": precision, "stage": stage, "flops": flops, "kernels": kernels, "rotated": count}
    return compared(what, samples, OURS, "cuDNN + ReLU + pool", None, **facts)


def add_means(add: Callable[[Row], None], ratios: Mapping[str, Sequence[float]]) -> None:
    """The geometric mean of the ratios of each group and of all, which has the target."""
    everything = [ratio for group in ratios.values() for ratio in group]
    for name, group in {**ratios, "all": everything}.items():
        if group:
            mean = significant(geometric_mean(group))
            add(
                {
                    "what": f"conv blocks, {name}: geometric mean of {len(group)}",
                    "against": "cuDNN + ReLU + pool",
                    "ratio": {"median": mean, "low": min(group), "high": max(group)},
                    "target": BLOCKS_TARGET,
                    "reached": mean >= BLOCKS_TARGET,
                }
            )


# --------------------------------------------------------------------------------------------------------- Adam

ADAM_TENSORS = 50


def adam(device: Device, add: Callable[[Row], None]) -> None:
    """One update of many tensors against torch's fused one, and against a copy that moves as many bytes."""
    for elements in (10**4,) if device.quick else ADAM_ELEMENTS:
        what = f"Adam, 10^{round(math.log10(elements))} elements in {ADAM_TENSORS} tensors"
        with noting(add, what):
            for row in measure_adam(device, elements, what):
                add(row)
        if device.on_gpu:
            torch.cuda.empty_cache()


def measure_adam(device: Device, elements: int, what: str) -> list[Row]:
    fused, copy = "torch fused", "copy of as many bytes"
    count = device.copies(ADAM_BYTES * elements)
    sizes = tensor_sizes(ADAM_TENSORS, elements)

    def params() -> list[Tensor]:
        # From zero, the parameters are the updates themselves: nothing large hides a wrong one.
        random = torch.Generator(device.device).manual_seed(0)
        made = [torch.zeros(size, device=device.device, requires_grad=True) for size in sizes]
        for param in made:
            param.grad = torch.randn(param.shape, generator=random, device=device.device)
        return made

    def make(optimizer: Any, **options: Any) -> list[Callable[[], Any]]:
        return [update(params(), optimizer, options) for _ in range(count)]

    def update(held: list[Tensor], optimizer: Any, options: dict[str, Any]) -> Callable[[], list[Tensor]]:
        made = optimizer(held, lr=1e-3, **options)

        def call() -> list[Tensor]:
            made.step()
            return held

        return call

    options = {"fused": True, "capturable": device.on_gpu}
    kernels = check_sides(
        {OURS: update(params(), optim.Adam, {}), fused: update(params(), torch.optim.Adam, options)}, 1e-3
    )

    def copies() -> list[Callable[[], Any]]:
        numbers = ADAM_BYTES * elements // 8  # each is read and written
        pairs = [[torch.zeros(numbers, device=device.device) for _ in range(2)] for _ in range(count)]
        return [partial(to.copy_, source) for to, source in pairs]

    samples = device.measure(
        {
            OURS: device.captured(lambda: make(optim.Adam)),
            fused: device.captured(lambda: make(torch.optim.Adam, **options)),
            copy: device.captured(copies),
        }
    )
    samples = {side: [value / count for value in values] for side, values in samples.items()}
    gigabytes = ADAM_BYTES * elements / 1e9
    facts = {"precision": "float32", "elements": elements, "kernels": kernels, "rotated": count}
    facts["gigabytes_per_second"] = round(gigabytes / statistics.median(samples[OURS]))
    facts["copy_gigabytes_per_second"] = round(gigabytes / statistics.median(samples[copy]))
    return [
        compared(what, samples, OURS, fused, ADAM_TARGET, **facts),
        compared(what, samples, OURS, copy, COPY_TARGET, **facts),
    ]


# ------------------------------------------------------------------------------------------------------- sections

# Name: what measures it, and the most seconds it may take.
SECTIONS: dict[str, tuple[Callable[[Device, Callable[[Row], None]], None], float]] = {
    "mnist": (mnist, 60),
    "steps": (steps, 60),
    "fit": (fit, 45),
    "adam": (adam, 45),
    "blocks": (blocks, 90),
    "compiled": (compiled, 90),
}
MAY_FAIL = ("compiled",)  # torch.compile needs Triton and a C compiler, and takes as long as it takes


def run_section(name: str, device: Device, add: Callable[[Row], None]) -> None:
    """Measures one section; `add` gets each row as soon as it is known, and errors as rows."""
    with noting(add, name):
        SECTIONS[name][0](device, add)
