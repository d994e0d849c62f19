"""Training a classifier on images in memory: batches, one step, the epoch loop, early stopping, checkpoints.

`train` is the loop; `make_step` chooses what runs a step. A step takes a batch and returns the mean loss and
the number of right answers as tensors, so nothing waits for a number between steps.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fastnn import nn
from fastnn._progress import make_progress
from fastnn._ranks import Average, Ranks
from fastnn._tensor_files import (
    ModelFileError,
    open_tensor_file,
    pack,
    require_safetensors,
    unpack,
    write_tensor_file,
)
from fastnn.compiled import BATCH_SCHEDULERS, CompiledForward, CompiledStep, unscheduled, wants_closure
from fastnn.runtime import note_fallback, without_spinning_threads
from fastnn.stages import NotCompilable

__all__ = [
    "CompiledStep",
    "EarlyStopping",
    "History",
    "ModelFileError",
    "NotCompilable",
    "TrainingError",
    "compile_step",
    "make_step",
    "train",
]

# What one epoch left behind: epoch, loss, accuracy, seconds, images_per_second, val_loss, val_accuracy.
Record = dict[str, float]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Scheduler = torch.optim.lr_scheduler.LRScheduler
# Called with a step's loss and number of right answers between backward and update.
BeforeUpdate = Callable[[torch.Tensor, torch.Tensor], None]

# Steps between two looks at the losses. A look reads one number back, which on a GPU waits for all steps so
# far.
STEPS_PER_CHECK = 64

# Batches of an evaluation whose outputs are in memory at a time.
EVALUATED_TOGETHER = 64


class TrainingError(RuntimeError):
    """The loss or the parameters became NaN or infinite. `epoch` and `step` count from 1."""

    def __init__(self, message: str, epoch: int, step: int) -> None:
        super().__init__(message)
        self.epoch = epoch
        self.step = step


@dataclass
class History:
    """The epochs of one training run, oldest first, and the seed that fixed its data order.

    Each epoch is a dict of `epoch` (from 1), `loss` (mean of the steps' losses, weighted by their numbers of images),
    `accuracy` (of the epoch's training images, each as its step saw it), `seconds` and `images_per_second` (of the
    training steps; validation is not counted), and with validation data `val_loss` and `val_accuracy` (see `evaluate`).
    """

    epochs: list[Record] = field(default_factory=list)
    seed: int | None = None

    def __iter__(self) -> Iterator[Record]:
        return iter(self.epochs)

    def __len__(self) -> int:
        return len(self.epochs)

    def __getitem__(self, index: int) -> Record:
        return self.epochs[index]

    def to_json(self) -> str:
        return json.dumps({"seed": self.seed, "epochs": self.epochs}, indent=2)


class SoftmaxMSELoss(torch.nn.Module):
    """Mean squared error between the softmax of logits (n, classes) and the one-hot targets (n,).

    Equivalent to: `mse_loss(softmax(logits, 1), one_hot(targets, classes))`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.Softmax(dim=1)
        self.mse = nn.MSELoss()

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        probabilities = self.softmax(logits)
        one_hot = torch.nn.functional.one_hot(targets, logits.shape[1]).to(probabilities.dtype)
        loss: torch.Tensor = self.mse(probabilities, one_hot)
        return loss


LOSSES: dict[str, Callable[[], torch.nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "mse": SoftmaxMSELoss,
}


def make_loss(loss: str | Loss) -> Loss:
    """The loss of that name, or a callable of (logits, targets) as it is."""
    if isinstance(loss, str) and loss in LOSSES:
        return LOSSES[loss]()
    if isinstance(loss, type):
        raise TypeError(
            f"loss: expected one of {sorted(LOSSES)} or a callable of (logits, targets), got the class "
            f"{loss.__name__}; pass {loss.__name__}()"
        )
    if callable(loss):
        return loss
    raise ValueError(f"loss: expected one of {sorted(LOSSES)} or a callable, got {loss!r}")


class Batches:
    """Images (n, …) with targets (n,) in memory, handed out in batches as `dtype` on `device`.

    The images keep their dtype; a batch is converted when it is gathered, uint8 scaled to 0..1. On a GPU all images
    and targets move there at once, where they fit.
    """

    def __init__(
        self,
        images: torch.Tensor,
        targets: torch.Tensor,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.images = images
        self.targets = targets
        self.batch_size = batch_size
        self.dtype = dtype
        self.device = torch.device(device)
        if self.device.type == "cuda":
            # What does not fit stays, and every batch travels by itself.
            with contextlib.suppress(torch.OutOfMemoryError):
                self.images, self.targets = images.to(self.device), targets.to(self.device)

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def steps(self) -> int:
        return math.ceil(len(self) / self.batch_size)

    def rows(self) -> torch.Tensor:
        """All row numbers, in the order of the data."""
        return torch.arange(len(self), device=self.images.device)

    def order(self, seed: int | None, epoch: int) -> torch.Tensor:
        """The row numbers of an epoch, each once: as (seed, epoch) shuffle them, or in the order of the data."""
        return self.rows() if seed is None else epoch_order(len(self), seed, epoch).to(self.images.device)

    def gather(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and targets of these rows, as a model takes them."""
        images = self.images.index_select(0, rows).to(self.device, self.dtype)
        if self.images.dtype == torch.uint8:
            images.div_(255)
        return images, self.gather_targets(rows)

    def gather_targets(self, rows: torch.Tensor) -> torch.Tensor:
        """Targets of these rows, as a loss takes them."""
        return self.targets.index_select(0, rows.to(self.targets.device)).to(self.device)


def epoch_order(count: int, seed: int, epoch: int) -> torch.Tensor:
    # Mixed rather than added: seed 0 in epoch 1 and seed 1 in epoch 0 must not share an order.
    mixed = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.randperm(count, generator=torch.Generator().manual_seed(int(mixed)))


class Step(Protocol):
    """Training steps, each of forward, loss, backward, update.

    Takes the rows of `batches` that are the steps' batches, one behind the other, all of `batches.batch_size` but the
    last. After each step comes `schedule`, which may change the optimizer's options. Returns the mean loss of each step
    and the number of right answers of all, on the model's device.
    """

    def __call__(
        self, batches: Batches, rows: torch.Tensor, schedule: Callable[[], object] = unscheduled
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


def _one_by_one(
    step: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    batches: Batches,
    rows: torch.Tensor,
    schedule: Callable[[], object],
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a `Step` returns, from a function that makes one step and returns its loss and number of right answers."""
    parts = rows.split(batches.batch_size)
    losses = torch.empty(len(parts), dtype=torch.float64, device=batches.device)
    correct = torch.zeros((), dtype=torch.int64, device=batches.device)
    for i, part in enumerate(parts):
        losses[i], right = step(part)
        correct += right
        schedule()
    return losses, correct


class AutogradStep:
    """Steps for every model and loss, and every optimizer whose step takes no closure, through autograd."""

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        before_update: BeforeUpdate | None = None,
    ) -> None:
        if wants_closure(optimizer):
            raise ValueError(f"optimizer: expected one whose step takes no closure, got {type(optimizer).__name__}")
        self.model = model
        self.loss = loss
        self.optimizer = optimizer
        self.before_update = before_update

    def __call__(
        self, batches: Batches, rows: torch.Tensor, schedule: Callable[[], object] = unscheduled
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _one_by_one(lambda part: self._one(*batches.gather(part)), batches, rows, schedule)

    def _one(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(images)
        loss = self.loss(logits, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        loss, correct = loss.detach(), (logits.detach().argmax(1) == targets).sum()
        if self.before_update is not None:
            self.before_update(loss, correct)
        self.optimizer.step()
        return loss, correct


class ProgramStep:
    """Steps that gather their batch and replay recorded programs; others, once these cannot express the model."""

    def __init__(self, step: CompiledStep, otherwise: Step | None) -> None:
        self.step = step
        self.otherwise = otherwise

    def __call__(
        self, batches: Batches, rows: torch.Tensor, schedule: Callable[[], object] = unscheduled
    ) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            return self.step.on_batches(batches.images, batches.targets, rows, batches.batch_size, schedule)
        except NotCompilable as error:  # before the first step: someone changed the model or the loss, a callback
            if self.otherwise is None:
                raise
            note_fallback("training_step", str(error))
            return self.otherwise(batches, rows, schedule)


class SharedStep:
    """Steps of which each rank makes its share of the batch; losses and right answers are the whole batch's."""

    def __init__(self, step: Step, average: Average) -> None:
        self.step = step
        self.average = average

    def __call__(
        self, batches: Batches, rows: torch.Tensor, schedule: Callable[[], object] = unscheduled
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def one(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            share = self.average.ranks.share(part)
            self.average.weight = len(share) / len(part)
            # A rank without a share has to meet the others all the same: it works on any row, which weighs nothing.
            losses, right = self.step(batches, share if len(share) else part[:1])
            return losses[0], right

        return _one_by_one(one, batches, rows, schedule)


def compile_step(
    model: torch.nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    precision: str = "fp32",
    before_update: BeforeUpdate | None = None,
) -> CompiledStep:
    """A whole training step with preallocated memory and no Python between kernels; see `CompiledStep`.

    Raises:
        NotCompilable: where a program cannot express the model, loss or optimizer; says what stands in the way.
        ValueError: for a precision that is unknown or that this processor does not have.

    Example:
        >>> step = fastnn.training.compile_step(model, fastnn.nn.CrossEntropyLoss(), optimizer)
        >>> for images, targets in loader:
        ...     loss, correct = step(images, targets)
    """
    return CompiledStep(model, loss, optimizer, precision, before_update)


def make_step(
    model: torch.nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    precision: str = "fp32",
    ranks: Ranks | None = None,
) -> Step:
    """The fastest step that serves this model, loss, optimizer and data; of several ranks each makes its share.

    Raises NotCompilable for bf16 without a program.
    """
    average = Average(ranks, model.parameters()) if ranks is not None and ranks.size > 1 else None
    largest_share = math.ceil(min(batches.batch_size, len(batches)) / (ranks.size if ranks else 1))
    step: Step = AutogradStep(model, loss, optimizer, average)
    try:
        compiled = compile_step(model, loss, optimizer, precision=precision, before_update=average)
        compiled.prepare_rows(batches.images, batches.targets, largest_share)
        step = ProgramStep(compiled, step if precision == "fp32" else None)
    except NotCompilable as error:
        if precision != "fp32":
            raise
        note_fallback("training_step", str(error))
    return SharedStep(step, average) if average else step


@torch.inference_mode()
def make_forward(model: torch.nn.Module, batches: Batches) -> Callable[[torch.Tensor], torch.Tensor]:
    """The fastest forward pass without gradients: the model's output for rows of `batches`, however many."""
    try:
        forward = CompiledForward(model)
        forward.prepare_rows(batches.images, max(1, min(batches.batch_size, len(batches))))
    except NotCompilable as error:
        note_fallback("forward_pass", str(error))
        return torch.no_grad()(
            lambda rows: torch.cat([model(batches.gather(part)[0]) for part in rows.split(batches.batch_size)])
        )
    return lambda rows: forward.on_batches(batches.images, rows, batches.batch_size)


@contextlib.contextmanager
def modes_kept(model: torch.nn.Module) -> Iterator[None]:
    """After the block each module is in the mode, of training or not, in which it was before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, batches: Batches, loss: Loss, ranks: Ranks | None = None, classes: int | None = None
) -> tuple[float, float]:
    """Mean loss and accuracy in eval mode; the modules' modes are restored. `ranks` divide the images among them.

    Answers are the largest of the first `classes` logits, of all where it is left out; the loss is of all.

    The mean is over calls of `loss`, one for every 64 batches, each weighted by its number of images. Of a loss that
    weighs images differently (`weight=`, `ignore_index=`) it depends on the batch size.
    """
    with modes_kept(model):
        model.eval()
        loss_sum = torch.zeros((), dtype=torch.float64, device=batches.device)
        correct = torch.zeros((), dtype=torch.int64, device=batches.device)
        forward = make_forward(model, batches)
        share = ranks.share(batches.rows()) if ranks else batches.rows()
        for rows in share.split(EVALUATED_TOGETHER * batches.batch_size) if len(share) else ():
            targets = batches.gather_targets(rows)
            logits = forward(rows)
            with without_spinning_threads():
                loss_sum += loss(logits, targets) * len(targets)
                correct += (logits[:, :classes].argmax(1) == targets).sum()
    if ranks is not None:
        ranks.add_up((loss_sum, correct))
    return loss_sum.item() / len(batches), correct.item() / len(batches)


class EarlyStopping:
    """Stops when `val_loss` (`loss` without validation data) has not fallen for `patience` epochs.

    The parameters of the best epoch are restored at the end of the training. Only a fall of more than
    `min_delta` counts; a NaN counts as no fall.
    """

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        self.patience = whole_number(patience, "early_stopping", 1)
        self.min_delta = min_delta
        self.reset()

    def reset(self) -> None:
        self.best = math.inf
        self.waited = 0
        self.best_parameters: dict[str, Any] | None = None

    @property
    def stopped(self) -> bool:
        return self.waited >= self.patience

    def update(self, record: Record, parameters: dict[str, Any]) -> None:
        """Notes the epoch's result; `parameters` are kept, not copied."""
        value = record.get("val_loss", record["loss"])
        if value < self.best - self.min_delta:
            self.best = value
            self.waited = 0
            self.best_parameters = parameters
        else:
            self.waited += 1
            if self.best_parameters is None:  # those of the first epoch, until the value falls below infinity
                self.best_parameters = parameters

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "best_parameters": self.best_parameters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = float(state["best"]), int(state["waited"])
        self.best_parameters = state["best_parameters"]


@dataclass(frozen=True)
class Snapshot:
    """Everything that the next epoch depends on, as it was at the end of `epoch` (0: before the first)."""

    epoch: int
    model: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    early_stopping: dict[str, Any] | None


@dataclass
class _Run:
    """The objects that training changes, to be copied and put back together."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None
    early_stopping: EarlyStopping | None
    history: History

    def snapshot(self, epoch: int, parameters: dict[str, torch.Tensor] | None = None) -> Snapshot:
        return Snapshot(
            epoch,
            _copy_parameters(self.model) if parameters is None else parameters,
            copy.deepcopy(self.optimizer.state_dict()),
            copy.deepcopy(self.scheduler.state_dict()) if self.scheduler else None,
            self.early_stopping.state_dict() if self.early_stopping else None,
        )

    def restore(self, snapshot: Snapshot) -> None:
        self.model.load_state_dict(snapshot.model)
        # Copied: the optimizer keeps the tensors it is given and goes on to change them.
        self.optimizer.load_state_dict(copy.deepcopy(snapshot.optimizer))
        if self.scheduler is not None and snapshot.scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(snapshot.scheduler))
        if self.early_stopping is not None and snapshot.early_stopping is not None:
            self.early_stopping.load_state_dict(snapshot.early_stopping)
        del self.history.epochs[snapshot.epoch :]


def _copy_parameters(model: torch.nn.Module) -> dict[str, Any]:
    """A copy of the state dict: parameters, buffers, and what get_extra_state gives, maybe no tensor."""
    return {
        name: value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
        for name, value in model.state_dict().items()
    }


def train(
    model: torch.nn.Module,
    batches: Batches,
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    loss: str | Loss = "cross_entropy",
    validation: Batches | None = None,
    callbacks: Sequence[Any] = (),
    early_stopping: int | EarlyStopping | None = None,
    scheduler: Scheduler | Callable[[torch.optim.Optimizer], Scheduler] | None = None,
    shuffle: bool = True,
    seed: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    history: History | None = None,
    precision: str = "fp32",
) -> History:
    """Trains `model` up to `epochs` epochs and returns the history, which also grows in `history`.

    `CNNClassifier.fit` documents the arguments. `settings` are further values that a resumed run must share
    with the run that wrote the checkpoint. Within a process group of torch.distributed all ranks train one model
    together: each has to call this with the same images, starts from rank 0's parameters, and takes its share of
    every batch.

    What a layer, loss, scheduler or callback raises comes out once parameters, optimizer and scheduler are as they were
    after the last complete epoch, or before the training.
    """
    hooks = epoch_hooks(callbacks)
    loss_function = make_loss(loss)
    early_stopping = _make_early_stopping(early_stopping)
    _check_trains(optimizer)
    scheduler = _make_scheduler(scheduler, optimizer)
    _check_schedule(scheduler, epochs, batches.steps, resume)
    ranks = Ranks()
    ranks.check_same(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        images=len(batches),
        batch_size=batches.batch_size,
        validation_images=None if validation is None else len(validation),
        epochs=epochs,
        resume=resume,
    )
    ranks.copy_from_first(value for value in model.state_dict().values() if isinstance(value, torch.Tensor))
    history = History() if history is None else history
    if early_stopping is not None:
        early_stopping.reset()
    run = _Run(model, optimizer, scheduler, early_stopping, history)
    file = None
    if checkpoint is not None:
        settings = {
            "images": len(batches),
            "batch_size": batches.batch_size,
            "shuffle": shuffle,
            "loss": loss if isinstance(loss, str) else _name(loss),
            "optimizer": type(optimizer).__name__,
            "scheduler": type(scheduler).__name__,
            # A schedule laid out for so many epochs or steps cannot be gone on with for more.
            "schedule_length": getattr(scheduler, "T_max", getattr(scheduler, "total_steps", None)),
            "early_stopping": early_stopping.patience if early_stopping else None,
            **(settings or {}),
        }
        file = Checkpoint(checkpoint, settings)
    history.seed = ranks.from_first(_seed(seed))
    complete = run.snapshot(0)
    if resume:
        if file is None:
            raise ValueError("resume: expected a checkpoint to resume from, got checkpoint=None")
        stored = file.read(complete, history, seed)
        try:
            run.restore(stored)
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            run.restore(complete)
            raise ModelFileError(f"{file.path}: the state does not fit the model or optimizer ({error})") from error
        complete = stored

    step = make_step(model, loss_function, optimizer, batches, precision, ranks)
    bar = make_progress(progress and ranks.first)
    stopped = early_stopping is not None and early_stopping.stopped
    with modes_kept(model), contextlib.closing(bar):
        try:
            while complete.epoch < epochs and not stopped:
                epoch = complete.epoch + 1
                bar.start_epoch(epoch, epochs, len(batches))
                model.train()
                order = batches.order(history.seed if shuffle else None, epoch)
                batch_scheduler = scheduler if isinstance(scheduler, BATCH_SCHEDULERS) else None
                record = _train_epoch(step, order, batches, epoch, batch_scheduler, bar.advance)
                with without_spinning_threads():
                    parameters = _copy_parameters(model)
                    _check_parameters(parameters, epoch, batches.steps)
                if validation is not None:
                    record["val_loss"], record["val_accuracy"] = evaluate(model, validation, loss_function, ranks)
                if scheduler is not None and batch_scheduler is None:
                    _step_scheduler(scheduler, record)
                if early_stopping is not None:
                    early_stopping.update(record, parameters)
                    stopped = early_stopping.stopped
                history.epochs.append(record)
                with without_spinning_threads():
                    complete = run.snapshot(epoch, parameters)
                if file is not None and ranks.first:
                    file.write(complete, history)
                bar.end_epoch(record)
                for hook in hooks:
                    answer = hook(model, dict(record))
                    stopped = stopped or (isinstance(answer, (bool, np.bool_)) and bool(answer))
                stopped = ranks.any(stopped, batches.device)
        except TrainingError as error:
            run.restore(complete)
            kept = f"the end of epoch {complete.epoch}" if complete.epoch else "before the training"
            raise TrainingError(f"{error}; the parameters are again those of {kept}", error.epoch, error.step) from None
        except KeyboardInterrupt:
            run.restore(complete)
            if not complete.epoch:
                raise
            warnings.warn(f"training interrupted: keeping the state after epoch {complete.epoch}", stacklevel=3)
            return history
        except Exception:
            run.restore(complete)
            raise
    if early_stopping is not None and early_stopping.best_parameters is not None:
        model.load_state_dict(early_stopping.best_parameters)
    return history


def _train_epoch(
    step: Step,
    order: torch.Tensor,
    batches: Batches,
    epoch: int,
    scheduler: Scheduler | None,
    advance: Callable[[int, float, float], None],
) -> Record:
    losses = torch.empty(batches.steps, dtype=torch.float64, device=batches.device)
    correct = torch.zeros((), dtype=torch.int64, device=batches.device)
    done = seen = 0
    began = time.perf_counter()
    for rows in order.split(STEPS_PER_CHECK * batches.batch_size):
        recent, right = step(batches, rows, unscheduled if scheduler is None else scheduler.step)
        losses[done : done + len(recent)] = recent
        correct += right
        seen += len(rows)
        mean = recent.mean(dtype=torch.float64).item()
        if not math.isfinite(mean):
            raise _loss_error(recent, epoch, done, batches.steps)
        advance(len(rows), mean, correct.item() / seen)
        done += len(recent)
    seconds = time.perf_counter() - began
    sizes = torch.full_like(losses, batches.batch_size)
    sizes[-1] = len(batches) - batches.batch_size * (batches.steps - 1)
    return {
        "epoch": epoch,
        "loss": (losses * sizes).sum().item() / len(batches),
        "accuracy": correct.item() / len(batches),
        "seconds": seconds,
        "images_per_second": len(batches) / seconds,
    }


def _loss_error(recent: torch.Tensor, epoch: int, before: int, steps: int) -> TrainingError:
    """Names the first of the losses after step `before` that is not finite."""
    first = int((~recent.isfinite()).nonzero()[0])
    step = before + first + 1
    return TrainingError(
        f"the loss became {recent[first].item()} at epoch {epoch}, step {step} of {steps} "
        "(a smaller learning rate may help)",
        epoch,
        step,
    )


def _check_parameters(parameters: Mapping[str, Any], epoch: int, steps: int) -> None:
    # An update that goes wrong shows in the next step's loss; only the epoch's last has no next step.
    for name, value in parameters.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise TrainingError(
                f"parameter {name} became NaN or infinite at epoch {epoch}, step {steps} of {steps}",
                epoch,
                steps,
            )


def _step_scheduler(scheduler: Scheduler, record: Record) -> None:
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        scheduler.step(record.get("val_loss", record["loss"]))
    else:
        scheduler.step()


def _make_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer) -> Scheduler | None:
    if callable(scheduler) and not isinstance(scheduler, Scheduler):
        scheduler = scheduler(optimizer)
    if scheduler is None:
        return None
    if not isinstance(scheduler, Scheduler):
        raise TypeError(
            "scheduler: expected a torch LRScheduler or a function that makes one from the optimizer, "
            f"got {type(scheduler).__name__}"
        )
    if scheduler.optimizer is not optimizer:
        raise ValueError("scheduler: expected one made for this optimizer, got one made for another")
    return scheduler


def _check_schedule(scheduler: Scheduler | None, epochs: int, steps: int, resume: bool) -> None:
    """Refuses a OneCycleLR with fewer steps than the training, which it would end in the middle of an epoch."""
    if isinstance(scheduler, torch.optim.lr_scheduler.OneCycleLR):
        done = 0 if resume else scheduler.last_epoch  # a checkpoint has its own, which is part of the epochs
        if scheduler.total_steps < done + epochs * steps:
            after = f" after {done} that are done" if done else ""
            raise ValueError(
                f"scheduler: expected total_steps of at least {done + epochs * steps} ({epochs} epochs of {steps} "
                f"steps{after}), got {scheduler.total_steps}"
            )


def _make_early_stopping(early_stopping: Any) -> EarlyStopping | None:
    if early_stopping is None or isinstance(early_stopping, EarlyStopping):
        return early_stopping
    if not hasattr(early_stopping, "__index__"):
        raise TypeError(
            f"early_stopping: expected a whole number of at least 1 or an EarlyStopping, got {early_stopping!r}"
        )
    return EarlyStopping(early_stopping)


def _check_trains(optimizer: torch.optim.Optimizer) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            "optimizer: expected at least one parameter to train, got none: requires_grad is False for all "
            f"{len(parameters)} of its parameters"
        )


def epoch_hooks(callbacks: Any) -> list[Callable[[torch.nn.Module, Record], Any]]:
    """What is called after each epoch; TypeError for what cannot be."""
    if not hasattr(callbacks, "__iter__"):
        raise TypeError(f"callbacks: expected a sequence such as [callback], got {callbacks!r}")
    hooks = []
    for callback in callbacks:
        hook = getattr(callback, "on_epoch_end", callback)
        if not callable(hook):
            raise TypeError(
                f"callbacks: expected callables or objects with on_epoch_end, got {type(callback).__name__}"
            )
        hooks.append(hook)
    return hooks


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


def whole_number(value: Any, name: str, least: int, most: int | None = None) -> int:
    limits = f"of at least {least}" if most is None else f"from {least} to {most}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected a whole number {limits}, got {value!r}")
    number = value.__index__()
    if number < least or (most is not None and number > most):
        raise ValueError(f"{name}: expected a whole number {limits}, got {number}")
    return int(number)


def _seed(seed: int | None) -> int:
    """The seed, or one drawn from torch's global generator, so that torch.manual_seed governs this too."""
    if seed is None:
        return int(torch.randint(2**62, ()).item())
    return whole_number(seed, "seed", 0, 2**63 - 1)


class Checkpoint:
    """The file that holds the state after the last complete epoch: parameters, optimizer, scheduler, history.

    It is rewritten at the end of every epoch. `settings` are stored with it, and a file of other settings is
    refused.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        require_safetensors()
        self.path = Path(path)
        if not self.path.absolute().parent.is_dir():
            raise FileNotFoundError(f"checkpoint: the folder {self.path.absolute().parent} does not exist")
        try:
            tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))).close()
        except OSError as error:
            raise OSError(error.errno, f"checkpoint: cannot write here, {error.strerror}", str(self.path)) from error
        # Packed now, so that what cannot be stored is refused before the first epoch and not after it.
        self.settings = {key: pack(value, {}, key) for key, value in settings.items()}

    def write(self, snapshot: Snapshot, history: History) -> None:
        tensors: dict[str, torch.Tensor] = {}
        document = {
            "epoch": snapshot.epoch,
            "seed": history.seed,
            "history": history.epochs,
            "settings": self.settings,
            "model": pack(snapshot.model, tensors, "model"),
            "optimizer": pack(snapshot.optimizer, tensors, "optimizer"),
            "scheduler": pack(snapshot.scheduler, tensors, "scheduler"),
            "early_stopping": pack(snapshot.early_stopping, tensors, "early_stopping"),
        }
        write_tensor_file(self.path, "checkpoint", document, tensors)

    def read(self, fresh: Snapshot, history: History, seed: int | None) -> Snapshot:
        """The stored snapshot; fills `history`. `fresh` is this run's own start, which it must resemble."""
        if not self.path.exists():
            raise FileNotFoundError(f"checkpoint: {self.path} does not exist; start the run without resume")
        with open_tensor_file(self.path, "checkpoint") as file:
            document = file.document
            self._check_settings(document, seed)
            epoch, records = document.get("epoch"), document.get("history")
            if not isinstance(records, list) or type(epoch) is not int or epoch != len(records) or not epoch:
                raise ModelFileError(f"{self.path}: expected a history of {epoch!r} epochs, got another")
            for record in records:
                if not isinstance(record, dict) or not {"epoch", "loss", "accuracy"} <= record.keys():
                    raise ModelFileError(f"{self.path}: the history has a damaged epoch")
            parts = ("model", "optimizer", "scheduler", "early_stopping")
            model, optimizer, scheduler, early_stopping = (unpack(document.get(part), file) for part in parts)
        self._check_parameters(model, fresh.model)
        for part, value in (
            ("optimizer", optimizer),
            ("scheduler", scheduler),
            ("early_stopping", early_stopping),
        ):
            expected = getattr(fresh, part)
            if type(value) is not type(expected) or (expected and not expected.keys() <= value.keys()):
                raise ModelFileError(f"{self.path}: the {part} state is damaged or of another kind")
        if early_stopping:
            self._check_parameters(early_stopping["best_parameters"], fresh.model)
        history.seed = document["seed"]
        history.epochs[:] = records
        return Snapshot(epoch, model, optimizer, scheduler, early_stopping)

    def _check_settings(self, document: dict[str, Any], seed: int | None) -> None:
        stored, stored_seed = document.get("settings"), document.get("seed")
        if not isinstance(stored, dict) or type(stored_seed) is not int or not 0 <= stored_seed < 2**63:
            raise ModelFileError(f"{self.path}: the checkpoint's settings or seed are damaged")
        expected = dict(self.settings)
        if seed is not None:
            expected["seed"] = seed
        for key, value in expected.items():
            other = stored_seed if key == "seed" else stored.get(key)
            if other != value:
                other, value = _differing(other, value)
                raise ValueError(
                    f"resume: {self.path} was written with {key}={_readable(other)}, this run has "
                    f"{key}={_readable(value)}"
                )

    def _check_parameters(self, stored: Any, expected: Mapping[str, Any]) -> None:
        if not isinstance(stored, dict) or stored.keys() != expected.keys():
            raise ModelFileError(f"{self.path}: expected the parameters {', '.join(expected)}, got others")
        for name, tensor in expected.items():
            if not isinstance(tensor, torch.Tensor):  # of get_extra_state, and its module's to check
                continue
            other = stored[name]
            if not isinstance(other, torch.Tensor) or (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
                raise ModelFileError(f"{self.path}: {name}: expected {tensor.dtype} {tuple(tensor.shape)}, got other")


def _differing(first: Any, second: Any) -> tuple[Any, Any]:
    """Of two packed dicts the entries that differ, as dicts; else both as they are."""
    if not all(isinstance(packed, dict) and "dict" in packed for packed in (first, second)):
        return first, second
    one, other = ({json.dumps(key): value for key, value in packed["dict"]} for packed in (first, second))
    keys = [key for key in one | other if one.get(key) != other.get(key)]
    return {json.loads(key): one.get(key) for key in keys}, {json.loads(key): other.get(key) for key in keys}


def _readable(packed: Any) -> str:
    text = json.dumps(packed)
    return text if len(text) <= 100 else f"{text[:97]}..."
