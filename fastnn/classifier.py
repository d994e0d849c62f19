"""CNNClassifier: a convolutional network with `fit`, `predict`, `evaluate`, `save` and `load`.

From top to bottom: the model, then the checks that turn a user's images and labels into tensors.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import numpy as np
import torch

from fastnn import nn, optim
from fastnn._tensor_files import ModelFileError, open_tensor_file, write_tensor_file
from fastnn.compiled import wants_bf16
from fastnn.runtime import thread_limit, without_spinning_threads
from fastnn.training import (
    Batches,
    EarlyStopping,
    History,
    Loss,
    Scheduler,
    TrainingError,
    epoch_hooks,
    evaluate,
    make_forward,
    make_loss,
    modes_kept,
    train,
    whole_number,
)

__all__ = ["CNNClassifier", "ModelFileError", "TrainingError"]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "sgd": optim.SGD,
}

# Images per forward pass outside of training: enough to pay for the transformation of the weights, and on a GPU for the
# launches; on the CPU, where each thread has a batch of its own, few enough that the first block's output (2 MiB at
# 32x32 and 32 channels) stays near its core.
EVALUATION_BATCH_ON_CPU, EVALUATION_BATCH_ELSEWHERE = 64, 128

# Images per pass of the search for NaN: a pass over 1024 28x28 images stays in the cache of one core.
FINITE_CHECK_BATCH = 1024

# More threads than any machine has processors: where the system cannot start one, OpenMP ends the process.
MAX_THREADS = 1024

# More images than fit in memory, and few enough that 64 batches of them, which are looked at together, do not overflow.
MAX_BATCH_SIZE = 2**31 - 1


class CNNClassifier(nn.Sequential):
    """Blocks of convolution, ReLU and 2x2 max-pool, then dense layers with ReLU, then one logit per class.

    Args:
        input_shape: (channels, height, width) of an image.
        num_classes: the number of logits, at least 2.
        conv_channels: output channels of each block; empty for a network of dense layers alone.
        hidden: widths of the dense layers before the last.
        kernel_size, padding: of every convolution (stride 1).
        classes: the label of each logit in order. Left out, the first `fit` sets it: 0..num_classes-1 when
            all labels are such integers, else the labels that occur, sorted where they can be sorted.

    Raises ValueError where an image does not survive the blocks, naming the block and the size it gets.

    `fit` sets `classes_` (the labels in the order of the logits) and `history_`.

    Equivalent to (and the state_dict moves both ways):

        torch.nn.Sequential(
            Conv2d(1, 32, 3), ReLU(), MaxPool2d(2), Conv2d(32, 64, 3), ReLU(), MaxPool2d(2), Flatten(),
            Linear(1600, 64), ReLU(), Linear(64, 10),
        )
    """

    classes_: list[Hashable]
    history_: History

    # forward() checks the shape and then calls the layers in order: training steps may be compiled.
    runs_layers_in_order = True

    def __init__(
        self,
        input_shape: Sequence[int] = (1, 28, 28),
        num_classes: int = 10,
        conv_channels: Sequence[int] = (32, 64),
        hidden: Sequence[int] = (64,),
        *,
        kernel_size: int = 3,
        padding: int = 0,
        classes: Sequence[Hashable] | None = None,
    ) -> None:
        super().__init__()
        self.input_shape = _whole_numbers(input_shape, "input_shape")
        if len(self.input_shape) != 3:
            raise ValueError(f"input_shape: expected (channels, height, width), got {self.input_shape}")
        self.num_classes = whole_number(num_classes, "num_classes", 2)
        self.conv_channels = _whole_numbers(conv_channels, "conv_channels")
        self.hidden = _whole_numbers(hidden, "hidden")
        self.kernel_size = whole_number(kernel_size, "kernel_size", 1)
        # More would only add pixels that see nothing of the image.
        self.padding = whole_number(padding, "padding", 0, self.kernel_size - 1)
        self.classes = None if classes is None else _distinct_classes(classes, self.num_classes)

        channels, height, width = self.input_shape
        for block, out_channels in enumerate(self.conv_channels, start=1):
            before = (height, width)
            height, width = (size + 2 * self.padding - self.kernel_size + 1 for size in before)
            if min(height, width) < 2:
                raise ValueError(
                    f"input_shape: {self.input_shape} is too small for {len(self.conv_channels)} blocks: "
                    f"block {block} "
                    f"gets {before[0]}x{before[1]}, its convolution (kernel_size={self.kernel_size}, "
                    f"padding={self.padding}) leaves {max(height, 0)}x{max(width, 0)}, and its 2x2 max-pool "
                    "needs 2x2; use fewer blocks, padding or larger images"
                )
            height, width = height // 2, width // 2
            self.append(
                nn.Conv2d(
                    channels,
                    out_channels,
                    self.kernel_size,
                    padding=self.padding,
                    activation="relu",
                    max_pool=2,
                )
            )
            # The places of ReLU and MaxPool2d, which the layer does itself: parameters keep torch's numbers.
            self.append(torch.nn.Identity()).append(torch.nn.Identity())
            channels = out_channels
        self.append(torch.nn.Flatten())
        features = channels * height * width
        for width in self.hidden:
            self.append(nn.Linear(features, width, activation="relu"))
            self.append(torch.nn.Identity())
            features = width
        self.append(nn.Linear(features, self.num_classes))
        # The kernels' order: nothing is converted between layers.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def __getitem__(self, index: Any) -> Any:
        """A layer, or a Sequential of several."""
        if isinstance(index, slice):
            return nn.Sequential(*list(self)[index])
        return super().__getitem__(index)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits (n, num_classes) of float images (n, channels, height, width)."""
        if input.shape[1:] != self.input_shape:
            raise ValueError(f"input: expected shape (n, {_sizes(self.input_shape)}), got {tuple(input.shape)}")
        return super().forward(input)  # type: ignore[no-untyped-call, no-any-return]

    def fit(
        self,
        x: Any,
        y: Any,
        *,
        epochs: int = 5,
        batch_size: int = 32,
        lr: float = 1e-3,
        optimizer: str | torch.optim.Optimizer = "adam",
        loss: str | Loss = "cross_entropy",
        validation_data: tuple[Any, Any] | None = None,
        callbacks: Sequence[Any] = (),
        early_stopping: int | EarlyStopping | None = None,
        shuffle: bool = True,
        seed: int | None = None,
        num_threads: int | None = None,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
        scheduler: Scheduler | Callable[[torch.optim.Optimizer], Scheduler] | None = None,
        precision: str = "fp32",
    ) -> History:
        """Trains on images `x` with labels `y`, from the parameters as they are, and returns the history.

        A second call goes on from where the first ended, with the same `classes_`; make a new model to start
        afresh. `seed` fixes the order of the images, not the initial parameters: for a run that repeats bit
        for bit, call `torch.manual_seed` before making the model.

        In a process group of torch.distributed (`torchrun`) all ranks train one model together, and all of them call
        this with the same arguments. They start from rank 0's parameters, and each takes its share of every batch:
        the result is that of one process with this `batch_size`, but for rounding, and the same bits on every rank.
        Rank 0 shows progress and writes the checkpoint; callbacks run on every rank. A loss given as a callable has
        to be a mean in which all images weigh alike.

        Args:
            x: images, a numpy array or tensor: uint8 (taken as x / 255) or float (taken as they are), shaped
                (n, channels, height, width), (n, height, width, channels), or (n, height, width) for one
                channel; the first where the shape fits both. uint8 images stay uint8 in memory; of floats in
                another dtype than the model's a copy in that is made.
            y: one label per image: strings, integers or anything hashable, as list, array or tensor.
            lr: learning rate of an optimizer given by name.
            optimizer: "adam", "adamw" or "sgd" (without momentum), or an optimizer of this model's
                parameters.
            loss: "cross_entropy"; "mse", the mean squared error between softmax probabilities and one-hot
                labels; or a callable of (logits, class indices) that returns the mean over the batch. What the
                history records is the batches' mean, weighted by their numbers of images: of a loss that weighs
                images differently, such as one with class weights, it depends on `batch_size`.
            validation_data: (x, y) for val_loss and val_accuracy after each epoch. The history's accuracies are
                over all `num_classes` logits, also those beyond the classes, which `predict` and `evaluate` leave out.
            callbacks: callables `f(model, record)`, or objects with such an `on_epoch_end`, called after each
                epoch with its record (see `History`), once the epoch is in the checkpoint; one that returns
                True stops the training.
            early_stopping: stop when val_loss (loss without validation data) has not fallen for so many
                epochs; the best epoch's parameters are restored. Or an `EarlyStopping`.
            shuffle: a new order in each epoch, a function of (seed, epoch) alone.
            seed: drawn from torch's generator when left out; `history_.seed` tells it.
            num_threads: torch's thread count during this call, at most 1024.
            progress: a bar on a terminal (with the package rich, part of fastnn[app]), elsewhere one printed
                line per epoch. False sends that line to the logger "fastnn" instead.
            checkpoint: a file that is rewritten after every epoch with all that the next one depends on.
            resume: go on from `checkpoint` up to `epochs` epochs in all. The parameters end up bit for bit as
                those of a run that was never interrupted.
            scheduler: a torch LR scheduler of the optimizer, or a function that makes one from it. OneCycleLR
                and CyclicLR are stepped after each batch, others after each epoch.
            precision: "fp32", or "bf16" to let 3x3 convolutions round both factors of their forward products to
                bfloat16, on processors with AVX512-BF16; everything else stays float32. It needs a model, loss
                and optimizer that `fastnn.training.compile_step` takes.

        Raises:
            ValueError, TypeError: for unusable arguments, before anything changes.
            TrainingError: when the loss becomes NaN or infinite; the parameters are put back to the end of
                the last complete epoch.
            ConnectionError: when another rank has ended.
            OSError, ModelFileError: when the checkpoint cannot be written or, to resume, read.
            KeyboardInterrupt: when interrupted in the first epoch, with the parameters as they were. After
                that an interrupt ends the training with a warning: the parameters are those of the last
                    complete epoch, and the history is returned.
        """
        epochs = whole_number(epochs, "epochs", 1)
        batch_size = whole_number(batch_size, "batch_size", 1, MAX_BATCH_SIZE)
        images = self._images(x, "x")
        labels = _label_list(y, "y", len(images))
        classes = self._classes_for(labels)
        targets = _targets(labels, classes, "y")
        if bool((targets == targets[0]).all()):
            raise ValueError(f"y: expected at least two classes, got only {classes[int(targets[0])]!r}")
        validation = None
        if validation_data is not None:
            if not isinstance(validation_data, (tuple, list)) or len(validation_data) != 2:
                raise ValueError(f"validation_data: expected (x, y), got {type(validation_data).__name__}")
            validation = self._batches(*validation_data, classes, self._evaluation_batch(None), "validation_data ")
        settings: dict[str, Any] = {
            "model": self._config(),
            "classes": classes if checkpoint is not None else None,
        }
        if isinstance(optimizer, str):
            settings["lr"] = lr
        if wants_bf16(precision):
            settings["precision"] = precision
        history = History()

        def publish(*_: object) -> None:
            self.classes_, self.history_ = classes, history

        with thread_limit(None if num_threads is None else whole_number(num_threads, "num_threads", 1, MAX_THREADS)):
            try:
                return train(
                    self,
                    Batches(images, targets, batch_size, self._dtype, self._device),
                    epochs=epochs,
                    optimizer=self._optimizer(optimizer, lr),
                    loss=loss,
                    validation=validation,
                    callbacks=[publish, *epoch_hooks(callbacks)],  # which may predict and save
                    early_stopping=early_stopping,
                    scheduler=scheduler,
                    shuffle=shuffle,
                    seed=seed,
                    progress=progress,
                    checkpoint=checkpoint,
                    resume=resume,
                    settings=settings,
                    history=history,
                    precision=precision,
                )
            finally:
                if history.epochs:
                    publish()

    def predict(self, x: Any, *, batch_size: int | None = None) -> np.ndarray:
        """The most probable label of each image, as labels were given to `fit`: array (n,).

        Arguments as of `predict_proba`.
        """
        classes = _class_array(self._class_list())
        labels: np.ndarray = classes[self.predict_proba(x, batch_size=batch_size).argmax(1)]
        return labels

    @torch.inference_mode()
    def predict_proba(self, x: Any, *, batch_size: int | None = None) -> np.ndarray:
        """Probabilities, float32 array (n, classes), columns in the order of `classes_`.

        Images as in `fit`. A model that was never fitted takes the indices of its logits as classes. `batch_size`
        images are computed at a time, on the CPU by each thread: by default 64 there and 128 elsewhere.
        """
        images = self._images(x, "x")
        classes = len(self._class_list())
        nothing = torch.empty(len(images), dtype=torch.int64)
        batches = Batches(images, nothing, self._evaluation_batch(batch_size), self._dtype, self._device)
        with modes_kept(self):
            self.eval()
            logits = make_forward(self, batches)(batches.rows())
        with without_spinning_threads():
            # Logits beyond the classes have never had an image.
            return nn.Softmax(dim=1)(logits[:, :classes].contiguous()).float().cpu().numpy()

    def evaluate(
        self, x: Any, y: Any, *, loss: str | Loss = "cross_entropy", batch_size: int | None = None
    ) -> dict[str, float]:
        """`{"loss": mean loss, "accuracy": share of right answers}` on images and labels as in `fit`.

        `batch_size` as of `predict_proba`. The mean loss is over parts of 64 batches, weighted by their numbers of
        images: of a loss that weighs images differently, such as one with class weights, it depends on `batch_size`.
        An answer is right where `predict` gives the image's label; the loss is of all logits, as in `fit`.
        """
        classes = self._class_list()
        batches = self._batches(x, y, classes, self._evaluation_batch(batch_size), "")
        mean_loss, accuracy = evaluate(self, batches, make_loss(loss), classes=len(classes))
        return {"loss": mean_loss, "accuracy": accuracy}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes parameters, constructor arguments and class list to a safetensors file.

        Labels must be strings, integers, floats or booleans. A file already at `path` is replaced only when
        the new one is complete. Raises ValueError for a network that `load` could not make from the constructor's
        arguments: with layers exchanged, added or changed, pruned, or of several dtypes.
        """
        self._check_reloadable()
        classes = getattr(self, "classes_", self.classes)
        for label in classes or ():
            if type(label) not in (str, int, float, bool):
                raise TypeError(
                    f"classes: a model file stores labels of type str, int, float or bool, got {label!r} "
                    f"of type {type(label).__name__}"
                )
        write_tensor_file(path, "model", {"config": self._config(), "classes": classes}, self.state_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CNNClassifier:
        """The model in a file that `save` wrote; ModelFileError says what is wrong with any other file."""
        with open_tensor_file(path, "model") as file:
            config, classes = file.document.get("config"), file.document.get("classes")
            if not isinstance(config, dict):
                raise ModelFileError(f"{path}: config: expected a JSON object, got {config!r}")
            for name in ("conv_channels", "hidden"):
                layers = config.get(name)
                # Each of them would be an object in memory, even without storage.
                if isinstance(layers, list) and len(layers) > len(file.shapes):
                    raise ModelFileError(
                        f"{path}: {name}: expected at most as many as the {len(file.shapes)} tensors, got {len(layers)}"
                    )
            try:
                # Without storage: the file's tensors must agree in shape before anything of their size
                # exists.
                with torch.device("meta"):
                    model = cls(**config)
                if classes is not None:
                    model.classes_ = _stored_classes(classes, model.num_classes)
            except (TypeError, ValueError, OverflowError, RuntimeError) as error:
                raise ModelFileError(f"{path}: the file describes no possible model ({error})") from error
            expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            for name, shape in expected.items():
                if name not in file.shapes:
                    raise ModelFileError(f"{path}: expected a tensor {name} of shape {shape}, got none")
                if file.shapes[name] != shape:
                    raise ModelFileError(f"{path}: {name}: expected shape {shape}, got {file.shapes[name]}")
            if unknown := sorted(file.shapes.keys() - expected.keys()):
                raise ModelFileError(f"{path}: expected the tensors {', '.join(expected)}, got also {unknown[0]}")
            state = {name: file.take(name) for name in expected}
        dtypes = {tensor.dtype for tensor in state.values()}
        if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
            raise ModelFileError(f"{path}: expected tensors of one float type, got {sorted(map(str, dtypes))}")
        model.load_state_dict(state, assign=True)
        return model

    def _config(self) -> dict[str, Any]:
        """The constructor's arguments but the classes, which `fit` may set."""
        names = ("input_shape", "num_classes", "conv_channels", "hidden", "kernel_size", "padding")
        values = ((name, getattr(self, name)) for name in names)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values}

    def _check_reloadable(self) -> None:
        """Raises ValueError where the constructor, which `load` calls, makes other layers or tensors than these."""
        with torch.device("meta"):
            model = type(self)(**self._config())
        expected, got = _contents(model.to(self._dtype)), _contents(self)
        for name in expected | got:
            made, found = (contents.get(name, "none") for contents in (expected, got))
            if made != found:
                raise ValueError(
                    f"model: {name}: expected {made}, as the constructor makes it, got {found}; a model file holds no "
                    "other network"
                )

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _optimizer(self, optimizer: str | torch.optim.Optimizer, lr: float) -> torch.optim.Optimizer:
        if isinstance(optimizer, torch.optim.Optimizer):
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            if not any(id(parameter) in held for parameter in self.parameters()):
                raise ValueError("optimizer: expected one of this model's parameters, got one of others")
            return optimizer
        if not isinstance(optimizer, str) or optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer: expected one of {sorted(OPTIMIZERS)} or a torch.optim.Optimizer, got {optimizer!r}"
            )
        if isinstance(lr, bool) or not isinstance(lr, (int, float, np.floating)):
            raise TypeError(f"lr: expected a positive number, got {lr!r}")
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"lr: expected a positive number, got {lr}")
        return OPTIMIZERS[optimizer](self.parameters(), lr=float(lr))

    def _class_list(self) -> list[Hashable]:
        classes = getattr(self, "classes_", self.classes)
        return list(range(self.num_classes)) if classes is None else classes

    def _classes_for(self, labels: list[Hashable]) -> list[Hashable]:
        """The class list the model already has, or the one that these labels give it."""
        classes = getattr(self, "classes_", self.classes)
        if classes is not None:
            return classes
        found = list(dict.fromkeys(labels))
        if all(type(label) is int and 0 <= label < self.num_classes for label in found):
            return list(range(self.num_classes))
        if len(found) > self.num_classes:
            raise ValueError(
                f"y: expected at most num_classes={self.num_classes} different labels, got {len(found)}: {_some(found)}"
            )
        try:
            return cast(list[Hashable], sorted(cast(list[Any], found)))
        except TypeError:
            return found

    def _batches(self, x: Any, y: Any, classes: list[Hashable], batch_size: int, prefix: str) -> Batches:
        images = self._images(x, prefix + "x")
        targets = _targets(_label_list(y, prefix + "y", len(images)), classes, prefix + "y")
        return Batches(images, targets, batch_size, self._dtype, self._device)

    def _evaluation_batch(self, batch_size: int | None) -> int:
        if batch_size is None:
            return EVALUATION_BATCH_ON_CPU if self._device.type == "cpu" else EVALUATION_BATCH_ELSEWHERE
        return whole_number(batch_size, "batch_size", 1, MAX_BATCH_SIZE)

    def _images(self, x: Any, name: str) -> torch.Tensor:
        """`x` as a tensor (n, channels, height, width), uint8 or of the model's dtype, checked."""
        images = _as_tensor(x, name)
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"{name}: expected uint8 (0 to 255) or float images, got {images.dtype}")
        channels, height, width = self.input_shape
        got = tuple(images.shape)
        if got[1:] == self.input_shape:
            pass
        elif got[1:] == (height, width, channels):
            images = images.permute(0, 3, 1, 2)
        elif channels == 1 and got[1:] == (height, width):
            images = images.unsqueeze(1)
        else:
            one = "; for one image add an axis: x[None]" if got in (self.input_shape, (height, width)) else ""
            expected = [
                self.input_shape,
                (height, width, channels),
                *([(height, width)] if channels == 1 else []),
            ]
            shapes = " or ".join(f"(n, {_sizes(shape)})" for shape in dict.fromkeys(expected))
            raise ValueError(f"{name}: expected images of shape {shapes}, got {got}{one}")
        if not len(images):
            raise ValueError(f"{name}: expected at least one image, got none (shape {got})")
        if not images.is_floating_point():
            return images.contiguous()
        with without_spinning_threads():
            # Compiled steps gather images of the model's own dtype alone. One copy at most, of any strides.
            images = images.to(self._dtype, memory_format=torch.contiguous_format).contiguous()
            _check_finite(images, name)
        return images


def _contents(model: CNNClassifier) -> dict[str, str]:
    """What a model file has to give back: the layers as they print themselves, and the tensors' shapes and dtypes."""
    layers = {f"layer {name}": repr(layer) for name, layer in model.named_children()}
    state = model.state_dict().items()
    return layers | {f"tensor {name}": f"{tuple(tensor.shape)} of {tensor.dtype}" for name, tensor in state}


def _sizes(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))


def _whole_numbers(values: Any, name: str) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name}: expected a sequence of whole numbers, got {values!r}")
    return tuple(whole_number(value, name, 1) for value in values)


def _as_tensor(x: Any, name: str) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        if x.layout != torch.strided or x.is_quantized:
            raise TypeError(f"{name}: expected a dense tensor, got {x.layout} {x.dtype}")
        return x.detach().resolve_neg()
    try:
        array = np.asarray(x)
    except ValueError:
        _check_same_shapes(x, name)
        raise
    if array.dtype.kind not in "uif" or array.dtype.itemsize > 8:
        raise TypeError(f"{name}: expected uint8 (0 to 255) or float images, got an array of {array.dtype}")
    # torch takes neither foreign byte orders nor negative strides.
    array = np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")
    with warnings.catch_warnings():
        # Images are only read, so an array that is not writable (a mapped file) will do.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _check_same_shapes(pictures: Sequence[Any], name: str) -> None:
    first = np.shape(pictures[0])
    for index, picture in enumerate(pictures):
        if np.shape(picture) != first:
            raise ValueError(
                f"{name}: expected images of one shape, got {tuple(first)} at index 0 and {tuple(np.shape(picture))} "
                f"at index {index}"
            )


def _check_finite(images: torch.Tensor, name: str) -> None:
    for start in range(0, len(images), FINITE_CHECK_BATCH):
        part = images[start : start + FINITE_CHECK_BATCH]
        # The sum costs a fraction of an elementwise test; where it overflows the test decides.
        if math.isfinite(part.sum().item()):
            continue
        bad = (~part.isfinite()).nonzero()
        if len(bad):
            image, channel, row, column = bad[0].tolist()
            raise ValueError(
                f"{name}: expected finite values, got {part[image, channel, row, column].item()} in image "
                f"{start + image} (channel {channel}, row {row}, column {column})"
            )


def _label_list(y: Any, name: str, count: int) -> list[Hashable]:
    """One label per image. numpy's scalars become Python's, which a model file gives back."""
    if isinstance(y, torch.Tensor):
        y = y.detach().cpu().numpy()
    elif hasattr(y, "to_numpy"):
        y = y.to_numpy()
    labels: list[Hashable]
    if isinstance(y, np.ndarray):
        if y.ndim == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.ndim != 1:
            hint = "; for one-hot labels pass y.argmax(1)" if y.ndim == 2 else ""
            raise ValueError(f"{name}: expected one label per image, shape ({count},), got shape {y.shape}{hint}")
        if np.ma.is_masked(y):
            raise ValueError(f"{name}: expected a label for each image, got masked ones")
        labels = list(y) if y.dtype.kind in "mM" else y.tolist()
    elif isinstance(y, (str, bytes)) or not hasattr(y, "__iter__"):
        raise TypeError(f"{name}: expected a list or array of labels, got {type(y).__name__}")
    else:
        labels = [_label(label) for label in y]
    if len(labels) != count:
        raise ValueError(f"{name}: expected one label per image, {count}, got {len(labels)}")
    for index, label in enumerate(labels):
        if not isinstance(label, Hashable):
            raise TypeError(f"{name}: expected hashable labels, got {type(label).__name__} at index {index}")
        if label != label:
            raise ValueError(f"{name}: expected labels, got NaN at index {index}")
    return labels


def _label(label: Any) -> Any:
    if isinstance(label, (np.datetime64, np.timedelta64)):  # Python's have no nanoseconds
        return label
    return label.item() if isinstance(label, (np.generic, torch.Tensor)) else label


def _targets(labels: list[Hashable], classes: list[Hashable], name: str) -> torch.Tensor:
    """The place of each label in `classes`, int64 (n,)."""
    places = {label: place for place, label in enumerate(classes)}
    try:
        return torch.tensor([places[label] for label in labels], dtype=torch.int64)
    except KeyError as error:
        label = error.args[0]
        raise ValueError(
            f"{name}: expected one of the classes {_some(classes)}, got {label!r} at index {labels.index(label)}"
        ) from None


def _distinct_classes(classes: Sequence[Hashable], num_classes: int) -> list[Hashable]:
    if not hasattr(classes, "__len__") or isinstance(classes, (str, bytes)):
        raise TypeError(f"classes: expected a list of labels, got {type(classes).__name__}")
    if len(classes) != num_classes:
        raise ValueError(f"classes: expected num_classes={num_classes} labels, got {len(classes)}")
    labels = _label_list(classes, "classes", num_classes)
    if len(set(labels)) != len(labels):
        raise ValueError(f"classes: expected different labels, got {_some(labels)}")
    return labels


def _stored_classes(classes: Any, num_classes: int) -> list[Hashable]:
    if not isinstance(classes, list) or not 2 <= len(classes) <= num_classes:
        raise ValueError(f"classes: expected a list of 2 to {num_classes} labels")
    if any(type(label) not in (str, int, float, bool) for label in classes):
        raise ValueError("classes: expected labels of type str, int, float or bool")
    return _distinct_classes(classes, len(classes))


def _class_array(classes: list[Hashable]) -> np.ndarray:
    """The labels as an array: of their common type where it gives them back as they are, else of objects."""
    if len({type(label) for label in classes}) == 1 and type(classes[0]) in (str, int, float, bool):
        array = np.array(classes)
        # numpy makes floats of negative integers beside those from 2**63, and cuts off a text's NULs at the end.
        if repr(array.tolist()) == repr(classes):
            return array
    array = np.empty(len(classes), dtype=object)
    array[:] = classes
    return array


def _some(labels: Sequence[Hashable]) -> str:
    shown = ", ".join(map(repr, labels[:10]))
    return f"{shown}, … ({len(labels)})" if len(labels) > 10 else shown
