"""A whole training step, or a forward pass, as one recorded program without Python between kernels.

`CompiledStep` walks a Sequential once, allocates every activation and gradient, and records the kernel calls of
forward, loss and backward pass. Activations stay in channels_last order throughout; a Flatten is one transposition. A
model, loss or optimizer that cannot be recorded raises `NotCompilable`, whose message says why;
`fastnn.training.make_step` then runs it through autograd. `CompiledForward` is the forward half alone.

A first step runs these programs between the gathering of the batch and the optimizer's update. Its second run is
captured with both - in a program on the CPU, in a CUDA graph on a GPU - and replayed from then on, several steps at a
time. What changes from step to step - rows, learning rate, step count - lies in memory that kernels read when they run.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastnn import _C, nn, optim
from fastnn.autograd.conv2d import lies_as_kernels_read
from fastnn.autograd.cross_entropy import REDUCTIONS, empty_statistics
from fastnn.runtime import capture_kernels, kernel_dtypes, note_kernels, runs_on_cuda
from fastnn.stages import Backward, Memory, NotCompilable, stages_of, state_of, watched
from fastnn.tracing import runs_in_order

__all__ = ["CompiledForward", "CompiledStep"]


_Result = TypeVar("_Result")

# Threads compute batches of a prediction side by side as long as all their activations take no more than this.
SIDE_BY_SIDE_BYTES = 256 << 20

# Training steps that are replayed together, where so many are left: what Python does around a replay takes some 90 us
# behind kernels that pushed it out of the caches. A CUDA graph is short, since its steps first run one by one, and
# then are captured one by one.
STEPS_PER_REPLAY = {"cpu": (32, 8), "cuda": (8,)}

# torch documents these schedulers to be stepped after every batch, all others after every epoch. They change learning
# rate, betas and momentum alone.
BATCH_SCHEDULERS = (torch.optim.lr_scheduler.OneCycleLR, torch.optim.lr_scheduler.CyclicLR)


@dataclass
class _Launch:
    """Steps that are captured on their second run and replayed from then on."""

    depends: tuple[Any, ...]  # what they were made from; held, so that no other object takes its place
    replay: Callable[[], object] | None = None


def _captured_in_graph(steps: Iterable[Callable[[], object]]) -> Callable[[], object]:
    """On a stream of the current device. What other threads do meanwhile, as a DataLoader's that pins memory, is no
    part of it and does not end it."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with capture_kernels() as kernels, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for step in steps:
            step()

    def replay() -> None:
        graph.replay()
        note_kernels(kernels)

    return replay


def _captured_in_programs(steps: Iterable[Callable[[], object]]) -> Callable[[], object]:
    """A program for each step: an interrupt falls between two."""
    programs = []
    for step in steps:
        programs.append(_C.Program())
        programs[-1].record(step)

    def replay() -> None:
        for program in programs:
            program.run()

    return replay


@dataclass
class _Recording(Memory):
    """One batch size's programs and the tensors they work in."""

    images: Tensor
    precision: str
    grads: Mapping[Tensor, Tensor]
    backward_follows: bool
    programs: dict[str, _C.Program] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)  # kept alive for the programs
    results: dict[str, Tensor] = field(default_factory=dict)
    launches: dict[str, _Launch] = field(default_factory=dict)

    def record(self, name: str, calls: Callable[[], _Result]) -> _Result:
        """What `calls` returns; its kernel calls become the program of that name."""
        self.programs[name] = _C.Program()
        return self.programs[name].record(calls)

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        tensor = torch.empty(shape, dtype=dtype, device=self.images.device, memory_format=memory_format)
        self.tensors.append(tensor)
        return tensor

    @property
    def nbytes(self) -> int:
        """What its tensors take."""
        return sum(tensor.nbytes for tensor in (self.images, *self.tensors))

    def rows(self, index: Tensor) -> Tensor:
        """`index` where a replay reads it."""
        if index.dtype is not torch.int64 or index.dim() != 1:
            raise TypeError(f"index: expected int64 of one dimension, got {index.dtype} of shape {tuple(index.shape)}")
        if "rows" not in self.results:
            self.results["rows"] = index.new_empty(_most_steps(self.images.device) * len(self.images))
        return self.results["rows"][: len(index)].copy_(index)

    def launch(self, name: str, depends: tuple[Any, ...], steps: Sequence[Callable[[], bool]]) -> None:
        """Runs the steps, by a replay once they have run as they are, until `depends` is another.

        Each says whether kernels did all of it, as they must where a program is to hold it.
        """
        device = self.images.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # it need not be the current one
            self._launch(name, depends, steps)

    def _launch(self, name: str, depends: tuple[Any, ...], steps: Sequence[Callable[[], bool]]) -> None:
        before = self.launches.get(name)
        on_gpu = self.images.is_cuda
        if before is None or not _same(before.depends, depends):
            alone = [step() for step in steps]
            if all(alone) or on_gpu:
                self.launches[name] = _Launch(depends)
        elif on_gpu and torch.cuda.is_current_stream_capturing():  # in a graph of the caller's
            for step in steps:
                step()
        else:
            if before.replay is None:
                before.replay = (_captured_in_graph if on_gpu else _captured_in_programs)(steps)
            before.replay()


def _most_steps(device: torch.device) -> int:
    return max(STEPS_PER_REPLAY[device.type])


def _same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    """Whether two tuples hold the same objects, or equal numbers, words and tuples of them."""
    plain = (int, float, str, tuple)
    return len(first) == len(second) and all(
        a is b or (isinstance(a, plain) and isinstance(b, plain) and a == b) for a, b in zip(first, second, strict=True)
    )


def _data(tensor: Tensor) -> tuple[Any, ...]:
    """What tells whether a tensor is the same data in the same place."""
    return (tensor, tensor.data_ptr(), len(tensor))


def unscheduled() -> None:
    """The schedule of options that stay."""


class _own_threads:  # noqa: N801 - used as a statement
    """Runs the CPU's kernels on fastnn's own threads: OpenMP's would spin beside them after each of their loops."""

    def __enter__(self) -> None:
        self._before = _C.set_own_threads(True)

    def __exit__(self, *_: object) -> None:
        _C.set_own_threads(self._before)


def wants_bf16(precision: str) -> bool:
    """Whether `precision` is "bf16" rather than "fp32"; ValueError for others and where this processor has none."""
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision: expected 'fp32' or 'bf16', got {precision!r}")
    if precision == "bf16" and not _C.has_bf16():
        raise ValueError(
            "precision: expected 'fp32', since 'bf16' needs a processor with AVX512-BF16 and the ISA avx512 "
            f"(in use: {_C.get_isa()}), got 'bf16'"
        )
    return precision == "bf16"


class _Compiled:
    """Layers of a Sequential as stages, and a recording for each shape of images."""

    _backward_follows: bool

    def __init__(self, model: torch.nn.Module, precision: str = "fp32") -> None:
        self._grads: dict[Tensor, Tensor] = {}
        self._model = model
        self._precision = precision
        self._state: list[Any] | None = None
        self.refresh()

    def refresh(self) -> None:
        """Reads the model again where it is not what the programs were made from; NotCompilable as at first."""
        if self._current_state() != self._state:
            self._state = None
            self._read()
            self._state = self._current_state()

    def _current_state(self) -> list[Any]:
        """What the programs are made from. The parameters are held, so that no other takes one's identity."""
        model = self._model
        parameters = (p for layer in model._modules.values() if layer is not None for p in layer._parameters.values())
        places = [
            (id(p), p.data_ptr(), p.dtype, p.shape, p.stride(), p.requires_grad, _is_hooked(p))
            for p in parameters
            if p is not None
        ]
        return [runs_in_order(model) and not watched(model), state_of(model), places]

    def _read(self) -> None:
        model, precision = self._model, self._precision
        if not runs_in_order(model) or watched(model):
            raise NotCompilable(f"model: expected a Sequential without hooks, got {type(model).__name__}")
        layers: list[Any] = [*model._modules.values()]  # one may stand there twice
        self._stages = [
            (stage, any(parameter.requires_grad for parameter in layer.parameters()))
            for layer in layers
            for stage in stages_of(layer)
        ]
        self._parameters = [parameter for layer in layers for parameter in layer.parameters()]
        if not self._parameters or len(set(self._parameters)) != len(self._parameters):
            raise NotCompilable("model: expected parameters, none of them shared between layers")
        self._dtype = self._parameters[0].dtype
        if wants_bf16(precision) and self._dtype is not torch.float32:
            raise NotCompilable(f"precision: expected 'fp32' for {self._dtype} parameters, got 'bf16'")
        self._device = self._parameters[0].device
        dtypes = kernel_dtypes(self._device)
        if dtypes is None:
            raise NotCompilable(f"model: expected parameters on a device with kernels, got {self._device}")
        for parameter in self._parameters:
            if type(parameter) is not torch.nn.Parameter or parameter.device != self._device:
                raise NotCompilable("model: expected plain parameters on one device")
            if parameter.dtype is not self._dtype or self._dtype not in dtypes:
                names = ", ".join(sorted(str(dtype)[6:] for dtype in dtypes))
                raise NotCompilable(f"model: expected parameters all of one dtype of {names}, got {parameter.dtype}")
            if not lies_as_kernels_read(parameter):
                raise NotCompilable("model: expected parameters in contiguous or channels_last memory")
        self._recordings: dict[tuple[int, ...], _Recording] = {}

    def _prepare(self, images: Tensor, batch_size: int) -> None:
        """Records the program for so many rows of `images`; NotCompilable where `on_rows` does not take them."""
        if images.device != self._device:
            raise NotCompilable(f"images: expected images and targets on {self._device}, got {images.device}")
        if not images.is_contiguous() or images.dtype not in (torch.uint8, self._dtype):
            raise NotCompilable(f"images: expected contiguous uint8 or {self._dtype}, got {images.dtype}")
        self._recording((batch_size, *images.shape[1:]))

    @staticmethod
    def _gather(recording: _Recording, images: Tensor, index: Tensor, targets: Tensor | None = None) -> None:
        """The program's images become ``images[index]``, uint8 scaled to 0..1, and its targets ``targets[index]``."""
        divisor = 255.0 if images.dtype is torch.uint8 else 1.0
        batch = recording.images
        if images.dim() == 2:  # rows are images of one pixel
            batch, images = batch[:, :, None, None], images[:, :, None, None]
        _C.gather_images(batch, images, index, divisor, recording.results.get("targets"), targets)

    def _recording(self, shape: tuple[int, ...], copy: int = 0) -> _Recording:
        recording = self._recordings.get((copy, *shape))
        if recording is None:
            recording = self._recordings[(copy, *shape)] = self._record(shape)
        return recording

    @torch.no_grad()
    def _record(self, shape: tuple[int, ...]) -> _Recording:
        if len(shape) not in (2, 4) or shape[0] < 1:
            expected = "(n, channels, height, width) or (n, features) with n of at least 1"
            raise NotCompilable(f"images: expected shape {expected}, got {shape}")
        memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        images = torch.empty(shape, dtype=self._dtype, device=self._device, memory_format=memory_format)
        if getattr(self._model, "input_shape", shape[1:]) != shape[1:]:
            self._model(images)  # a CNNClassifier refuses them, whatever its layers take
        recording = _Recording(images, self._precision, self._grads, self._backward_follows)
        self._record_programs(recording)
        return recording

    def _record_programs(self, recording: _Recording) -> None:
        raise NotImplementedError

    def _forward(self, recording: _Recording) -> tuple[Tensor, list[Backward]]:
        """The model's output, and each stage's backward pass."""
        output = recording.images
        backwards = []
        for stage, _ in self._stages:
            output, backward = stage(recording, output)
            backwards.append(backward)
        return output, backwards


class CompiledForward(_Compiled):
    """A model's forward pass with preallocated memory and no Python between kernels.

    Args:
        model: a Sequential of fastnn layers, Flatten and Identity, on a device and in a dtype that have kernels.

    Raises:
        NotCompilable: where a program cannot express the model; says what stands in the way.
    """

    _backward_follows = False

    def prepare_rows(self, images: Tensor, batch_size: int) -> None:
        """Records a program that `on_batches` needs, which its first call would do; NotCompilable for unfit data."""
        self.refresh()
        self._prepare(images, batch_size)

    def on_batches(self, images: Tensor, index: Tensor, batch_size: int) -> Tensor:
        """The output for ``images[index]`` (contiguous, uint8 scaled to 0..1), computed `batch_size` images at a time.

        On the CPU each thread computes batches of its own, whose activations stay in its core's caches, as long as
        there is one for every thread; the rest is computed batch by batch.
        """
        self.refresh()
        size = min(batch_size, len(index))
        recording = self._recording((size, *images.shape[1:]))
        like = recording.results["output"]
        output = like.new_empty_strided((len(index), *like.shape[1:]), like.stride())
        threads = 1 if runs_on_cuda(images) else _C.num_threads()
        if threads * recording.nbytes > SIDE_BY_SIDE_BYTES:
            threads = 1
        side_by_side = len(index) // (threads * size) * (threads * size)
        whole = len(index) // size * size
        for begin, end, of_batch, copies in (
            (0, side_by_side, size, threads),
            (side_by_side, whole, size, 1),
            (whole, len(index), len(index) - whole, 1),
        ):
            if begin < end:
                recordings = [self._recording((of_batch, *images.shape[1:]), copy) for copy in range(copies)]
                self._run_batches(recordings, images, index[begin:end], output[begin:end])
        return output

    def _run_batches(self, recordings: list[_Recording], images: Tensor, index: Tensor, output: Tensor) -> None:
        """`output` of whole batches; where there is a recording for each thread, side by side."""
        if images.is_cuda:
            batch_size = len(recordings[0].images)
            for rows, to in zip(index.split(batch_size), output.split(batch_size), strict=True):
                to.copy_(self._on_rows(recordings[0], images, rows))
            return
        rows_of = [recording.rows(index[: len(recording.images)]) for recording in recordings]
        programs = []
        for recording, rows in zip(recordings, rows_of, strict=True):
            programs.append(_C.Program())
            programs[-1].record(partial(self._compute, recording, images, rows))
        with _own_threads():
            _C.run_batches(programs, rows_of, [recording.results["output"] for recording in recordings], index, output)

    def _on_rows(self, recording: _Recording, images: Tensor, index: Tensor) -> Tensor:
        """The output for one batch on a GPU, by a graph; the next call overwrites it."""
        rows = recording.rows(index)
        recording.launch("rows", _data(images), [partial(self._compute, recording, images, rows)])
        return recording.results["output"]

    def _compute(self, recording: _Recording, images: Tensor, rows: Tensor) -> bool:
        """The output for one batch, from the gathering of its images on; kernels do all of it."""
        self._gather(recording, images, rows)
        recording.programs["forward"].run()
        return True

    def _record_programs(self, recording: _Recording) -> None:
        recording.results["output"], _ = recording.record("forward", partial(self._forward, recording))


class _Rates:
    """What schedules change of an optimizer's groups, where a replay reads it: learning rate, betas, momentum.

    For each step of a replay a row of numbers, one group's after the other's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._device = device
        self._make_room()

    def _make_room(self) -> None:
        width = sum(len(self._scheduled(group)) for group in self._optimizer.param_groups)
        steps = _most_steps(self._device)
        self._numbers = torch.empty((steps, width), dtype=torch.float64, device=self._device)
        self._rows: list[list[float] | None] = [None] * steps  # what it holds

    @staticmethod
    def _scheduled(group: dict[str, Any]) -> tuple[Any, ...]:
        if "betas" in group:
            return (group["lr"], *group["betas"])
        return (group["lr"], group["momentum"])

    def hold_tensors(self) -> bool:
        """Whether a group has tensors for numbers, which change in ways that no schedule tells."""
        return any(isinstance(n, Tensor) for group in self._optimizer.param_groups for n in self._scheduled(group))

    def bring(self, steps: int, schedule: Callable[[], object]) -> None:
        """Copies the groups' numbers to the device, for each of the steps. `schedule` comes between two."""
        rows: list[list[float]] = []
        tensors: dict[int, Tensor] = {}
        for step in range(steps):
            if step > 0:
                schedule()
            row: list[Any] = [n for group in self._optimizer.param_groups for n in self._scheduled(group)]
            tensors = {i: n for i, n in enumerate(row) if isinstance(n, Tensor)}
            rows.append([0.0 if i in tensors else float(n) for i, n in enumerate(row)])
        if len(rows[0]) != self._numbers.shape[1]:  # the optimizer has another group
            self._make_room()
        if rows != self._rows[:steps]:
            # Pinned memory of torch's, which it does not use again before the copy is made: nobody waits for it.
            host = torch.tensor(rows, dtype=torch.float64, pin_memory=self._device.type == "cuda")
            self._numbers[:steps].copy_(host, non_blocking=True)
            self._rows[:steps] = rows
        for i, tensor in tensors.items():
            self._numbers[0, i].copy_(tensor)
            self._rows[0] = None  # which has 0.0 for it

    def depends(self) -> tuple[Any, ...]:
        """What the update was made from besides."""
        found: list[Any] = [self._numbers]
        for group in self._optimizer.param_groups:
            found += [value for key, value in group.items() if key not in ("params", "lr", "betas", "momentum")]
            found.append(_plain_sgd(group))
            for param in group["params"]:
                found += (param, param.grad)
        values = [value for state in self._optimizer.state.values() for value in state.values()]
        places = tuple([value.data_ptr() for value in values if isinstance(value, Tensor)])
        return (*found, *values, places)

    @contextmanager
    def in_groups(self, step: int) -> Iterator[None]:
        """The groups have these tensors for numbers in the block."""
        numbers = iter(self._numbers[step].unbind())
        before = [dict(group) for group in self._optimizer.param_groups]
        try:
            for group in self._optimizer.param_groups:
                group["lr"] = next(numbers)
                if "betas" in group:
                    group["betas"] = (next(numbers), next(numbers))
                else:
                    momentum = next(numbers)
                    group["momentum"] = group["momentum"] if _plain_sgd(group) else momentum
            yield
        finally:
            for group, values in zip(self._optimizer.param_groups, before, strict=True):
                group.update(values)


def _is_hooked(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def wants_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's step evaluates the model by itself, as that of LBFGS."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _plain_sgd(group: dict[str, Any]) -> bool:
    """Whether a group has no momentum, and no memory for it."""
    momentum = group.get("momentum", 1)
    return not isinstance(momentum, Tensor) and momentum == 0


class CompiledStep(_Compiled):
    """One training step - forward, loss, backward, update - with preallocated memory and no Python between kernels.

    Args:
        model: a Sequential of fastnn layers, Flatten and Identity, on a device and in a dtype that have kernels.
        loss: a CrossEntropyLoss that takes the mean.
        optimizer: of the model's parameters.
        precision: ``"fp32"``, or ``"bf16"`` to let 3x3 convolutions round both factors of their forward products to
            bfloat16; sums, gradients, parameters and everything else stay float32. It needs AVX512-BF16.
        before_update: called with the loss and the number of right answers when the parameters have their ``grad``,
            and may change all of them in place.

    Calling it with images ``(n, channels, height, width)``, or rows ``(n, features)`` for Linear layers, and class
    numbers ``(n,)`` makes one step and returns the mean loss and the number of right answers, 0-dimensional tensors
    that the next step overwrites. Each batch size is recorded once. Parameters keep their storage; their ``grad`` is
    the step's own memory. Images get no gradient.

    What is changed of the model or the loss between two steps - layers, arguments, ``requires_grad``, hooks - holds
    from the next one on: programs are recorded anew.

    Raises:
        NotCompilable: where a program cannot express the model, loss or optimizer; says what stands in the way. A call
            raises it, too, once they were changed into such.
        ValueError: for a precision that is unknown or that this processor does not have; in a call, for shapes that
            do not fit, and for images that require a gradient.
        TypeError: in a call, for images that are not of the parameters' dtype, and for targets that are not int64.

    Equivalent to (in ``"fp32"``)::

        optimizer.zero_grad()
        logits = model(images)
        loss = loss_function(logits, targets)
        loss.backward()
        optimizer.step()
    """

    _backward_follows = True

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Any,
        optimizer: torch.optim.Optimizer,
        precision: str = "fp32",
        before_update: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        if type(loss) not in (nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss):
            raise NotCompilable(f"loss: expected a CrossEntropyLoss of the mean, got {loss}")
        if wants_closure(optimizer):
            raise NotCompilable(f"optimizer: expected one whose step takes no closure, got {type(optimizer).__name__}")
        self._loss = loss
        self._optimizer = optimizer
        self._before_update = before_update
        self._has_own_update = type(optimizer) in (optim.Adam, optim.AdamW, optim.SGD)
        super().__init__(model, precision)

    def _read(self) -> None:
        for parameter, grad in self._grads.items():
            if parameter.grad is grad:  # one that is trained no more keeps none
                parameter.grad = None
        super()._read()
        loss = self._loss
        if loss.reduction != "mean":
            raise NotCompilable(f"loss: expected a CrossEntropyLoss of the mean, got reduction={loss.reduction!r}")
        if watched(loss) or "forward" in vars(loss):
            raise NotCompilable("loss: expected one without hooks and with the forward of its class")
        if loss.weight is not None and not loss.weight.is_contiguous():
            raise NotCompilable("loss: expected a weight in contiguous memory")
        if any(map(_is_hooked, self._parameters)):
            raise NotCompilable("model: expected parameters without hooks")
        self._grads = {p: torch.empty_like(p) for p in self._parameters if p.requires_grad}
        self._rates = _Rates(self._optimizer, self._device) if self._has_own_update else None

    def _current_state(self) -> list[Any]:
        loss = self._loss
        weight = None if loss.weight is None else (id(loss.weight), loss.weight.data_ptr(), loss.weight.stride())
        options = loss.reduction, loss.ignore_index, loss.label_smoothing, watched(loss), "forward" in vars(loss)
        grads = [grad.data_ptr() for grad in self._grads.values()]
        return [*super()._current_state(), weight, options, grads]

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self.refresh()
        if images.dtype is not self._dtype:
            raise TypeError(f"images: expected {self._dtype}, as the parameters are, got {images.dtype}")
        if images.requires_grad:
            raise ValueError(
                "images: expected ones that require no gradient, since they get none; pass images.detach()"
            )
        if targets.dtype is not torch.int64:
            raise TypeError(f"targets: expected class numbers of torch.int64, got {targets.dtype}")
        if targets.shape != images.shape[:1]:
            expected, got = tuple(images.shape[:1]), tuple(targets.shape)
            raise ValueError(f"targets: expected shape {expected}, a class number for each image, got {got}")
        recording = self._recording(tuple(images.shape))
        recording.images.copy_(images)
        recording.results["targets"].copy_(targets)
        self._run(recording, "call", (), lambda step: None)
        return recording.results["losses"][0], recording.results["correct"][0]

    def on_rows(self, images: Tensor, targets: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """As a call with ``images[index]`` (uint8 scaled to 0..1) and ``targets[index]``, gathered in one pass."""
        self.refresh()
        results = self._run_rows(images, targets, index).results
        return results["losses"][0], results["correct"][0]

    def on_batches(
        self,
        images: Tensor,
        targets: Tensor,
        index: Tensor,
        batch_size: int,
        schedule: Callable[[], object] = unscheduled,
    ) -> tuple[Tensor, Tensor]:
        """Steps on ``index.split(batch_size)``, as :meth:`on_rows` makes them, several in a replay.

        `schedule` follows each step and may change the optimizer's options; with others than torch's `BATCH_SCHEDULERS`
        a replay is of one step. Returns the loss of each step and the number of right answers of all.
        """
        self.refresh()
        steps = math.ceil(len(index) / batch_size)
        losses = torch.empty(steps, dtype=self._dtype, device=self._device)
        correct = torch.zeros((), dtype=torch.int64, device=self._device)
        done = 0
        while done < steps:
            rest = index[done * batch_size :]
            several = STEPS_PER_REPLAY[self._device.type] if self._replays_several(schedule) else ()
            count = next((n for n in several if len(rest) >= n * batch_size), 1)
            results = self._run_rows(images, targets, rest[: count * batch_size], count, schedule).results
            losses[done : done + count] = results["losses"][:count]
            correct += results["correct"][:count].sum()
            done += count
        return losses, correct

    def prepare_rows(self, images: Tensor, targets: Tensor, batch_size: int) -> None:
        """Records the program that `on_rows` needs, which its first call would do; NotCompilable for unfit data."""
        self.refresh()
        if targets.device != self._device:
            raise NotCompilable(f"images: expected images and targets on {self._device}, got {targets.device}")
        if targets.dtype is not torch.int64 or not targets.is_contiguous():
            raise NotCompilable(f"targets: expected contiguous int64, got {targets.dtype}")
        self._prepare(images, batch_size)

    def _run_rows(
        self,
        images: Tensor,
        targets: Tensor,
        index: Tensor,
        count: int = 1,
        schedule: Callable[[], object] = unscheduled,
    ) -> _Recording:
        """Steps on `count` batches of equally many rows."""
        batch_size = len(index) // count
        recording = self._recording((batch_size, *images.shape[1:]))
        rows = recording.rows(index).split(batch_size)

        def gather(step: int) -> None:
            self._gather(recording, images, rows[step], targets)

        self._run(recording, f"{count} of rows", (*_data(images), *_data(targets)), gather, count, schedule)
        return recording

    def _run(
        self,
        recording: _Recording,
        name: str,
        depends: tuple[Any, ...],
        gather: Callable[[int], None],
        count: int = 1,
        schedule: Callable[[], object] = unscheduled,
    ) -> None:
        """Of each step gathers the batch, runs the programs and updates; all is replayed where it can be."""
        for group in self._optimizer.param_groups:  # as zero_grad: gradients of before move nothing
            for parameter in group["params"]:
                if parameter not in self._grads:
                    parameter.grad = None
        for parameter, grad in self._grads.items():
            parameter.grad = grad
        rates = self._rates if self._replays_update() else None
        if rates is not None:
            self._optimizer._opt_called = True  # type: ignore[attr-defined]  # what schedulers look for
            rates.bring(count, schedule)
            depends = (*depends, *rates.depends())

        def launch(step: int) -> bool:
            gather(step)
            for part in ("forward", f"loss of {step}", "backward"):
                recording.programs[part].run()
            if rates is None:
                return True
            with rates.in_groups(step):
                return self._update()

        with _own_threads():
            recording.launch(name, depends, [partial(launch, step) for step in range(count)])
            if rates is None:
                if self._before_update is not None:
                    self._before_update(recording.results["losses"][0], recording.results["correct"][0])
                self._update()
            else:
                torch.autograd.graph.increment_version(self._grads)  # a replay modifies them behind torch's back
        schedule()

    def _replays_update(self) -> bool:
        """Whether the update is part of what is replayed."""
        return self._updates_itself() and self._before_update is None

    def _replays_several(self, schedule: Callable[[], object]) -> bool:
        """Whether nothing but what `_Rates` brings changes between steps."""
        is_known = schedule is unscheduled or type(getattr(schedule, "__self__", None)) in BATCH_SCHEDULERS
        return is_known and self._rates is not None and self._replays_update() and not self._rates.hold_tensors()

    def _updates_itself(self) -> bool:
        """Whether the update is fastnn's own and nobody watches or replaced it."""
        optimizer = self._optimizer
        return self._has_own_update and optim.has_step_of_class(optimizer) and not optim.is_hooked(optimizer)

    def _update(self) -> bool:
        """Whether kernels alone did it."""
        optimizer: Any = self._optimizer
        if self._updates_itself():
            optimizer._opt_called = True  # what learning-rate schedulers look for
            return bool(optimizer.update())
        optimizer.step()
        return False

    def _record_programs(self, recording: _Recording) -> None:
        """The parts of a step. Each step of a replay has a loss of its own and so a program that writes it."""
        output, backwards = recording.record("forward", partial(self._forward, recording))
        if output.dim() != 2:
            raise NotCompilable(f"model: expected an output (n, classes), got {tuple(output.shape)}")
        most = _most_steps(self._device)
        losses = recording.new((most,), self._dtype)
        correct = recording.new((most,), torch.int64)
        targets = recording.new((len(output),), torch.int64)
        recording.results.update(losses=losses, correct=correct, targets=targets)
        options = (self._loss.weight, self._loss.ignore_index, REDUCTIONS.index("mean"), self._loss.label_smoothing)
        statistics = empty_statistics(output, targets)
        recording.tensors.append(statistics)

        def loss(step: int) -> None:
            _C.cross_entropy_forward(losses[step], statistics, output, targets, *options)
            _C.count_correct(correct[step], output, targets)

        for step in range(most):
            recording.record(f"loss of {step}", partial(loss, step))
        one = recording.new((), self._dtype).fill_(1)
        # A stage's input needs a gradient where a stage before it has parameters that are trained.
        trained = [trains for _, trains in self._stages]

        def backward() -> None:
            grad: Tensor | None = recording.new_like(output)
            _C.cross_entropy_backward(grad, None, one, statistics, output, targets, *options)
            for i in reversed(range(len(backwards))):
                if grad is not None:
                    grad = backwards[i](grad, any(trained[:i]))

        recording.record("backward", backward)
