"""The command line: ``fastnn train``, ``evaluate``, ``predict``, ``info`` and ``bench``.

Every error that a user can cause ends in one line on stderr and exit code 2, an interrupt in exit code 130.
"""

from __future__ import annotations

import errno
import functools
import json
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec

import numpy as np
import torch

import fastnn
from fastnn import data
from fastnn._extras import MissingLibraryError, require
from fastnn._files import atomic_path
from fastnn._ranks import joined_ranks
from fastnn.classifier import MAX_THREADS, CNNClassifier
from fastnn.runtime import kernel_dtypes, thread_limit
from fastnn.training import History, TrainingError

try:
    import typer
except ImportError:
    print("error: the command line needs fastnn[app]: pip install 'fastnn[app]'", file=sys.stderr)
    raise SystemExit(2) from None

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Parameters = ParamSpec("Parameters")

USAGE_ERROR = 2  # as for arguments that typer refuses
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

CPU_ALLOCATOR = "DefaultCPUAllocator: "  # in the words of a RuntimeError where torch finds no memory

# What `train` does where its options do not say otherwise. "fast" reaches 99 % on MNIST in two epochs: one cycle of a
# large learning rate (Smith and Topin, "Super-Convergence", 2018).
RECIPES: dict[str, dict[str, Any]] = {
    "standard": {"epochs": 5, "batch_size": 32, "lr": 1e-3, "schedule": "cosine"},
    "fast": {"epochs": 2, "batch_size": 64, "lr": 4e-3, "schedule": "one-cycle"},
}
SCHEDULES = ("constant", "cosine", "one-cycle")

MAX_MATRIX_NUMBERS = 30  # classes up to which the cells of a confusion matrix can hold a readable number

app = typer.Typer(
    name="fastnn",
    help="Train a convolutional network on pictures, evaluate it, and predict with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line of this process."""
    app(prog_name="fastnn")


def reports_errors(command: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Turn the errors that a user can cause into one line and an exit code."""

    @functools.wraps(command)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise  # the reader of our output has left: typer ends quietly
        except OSError as error:
            fail(describe_os_error(error))
        except (MemoryError, torch.OutOfMemoryError) as error:
            fail(f"not enough memory ({error})" if str(error) else "not enough memory")
        except (ValueError, TrainingError, MissingLibraryError) as error:
            fail(str(error))
        except RuntimeError as error:  # torch has no class of its own for the memory of the CPU
            _, allocator, reason = str(error).rpartition(CPU_ALLOCATOR)
            if not allocator:
                raise
            fail(f"not enough memory ({reason})")

    return run


def fail(message: str) -> NoReturn:
    """End with one line on stderr."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(USAGE_ERROR)


def describe_os_error(error: OSError) -> str:
    """The file first, then what happened to it."""
    reason = error.strerror or str(error)
    if error.errno == errno.ENOSPC and "disk" not in reason:
        reason = f"the disk is full ({reason})"
    return f"{error.filename}: {reason}" if error.filename else reason


# ---------------------------------------------------------------------------------------------------- options

DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        help="digits, mnist, fashion-mnist, kmnist, cifar10, a folder of IDX files, an .npz file, "
        "or a folder with one subfolder of pictures per class.",
    ),
]
ValidationSplitOption = Annotated[
    float | None,
    typer.Option(
        help="Fraction of the images kept for testing, where the data has no test set of its own: 0.2 of digits, 0.1 "
        "of others when left out. The same for train and evaluate, or these test on images that were trained on."
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, max=MAX_THREADS, help="Threads of the processor; all when left out.")
]
DeviceOption = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, or auto: a GPU where there is one that fastnn was built for.")
]
ModelArgument = Annotated[Path, typer.Argument(help="A model file that `fastnn train` wrote.", show_default=False)]


def choose_device(name: str, rank: int = 0) -> torch.device:
    """The device of that name; the ranks of one machine share its GPUs."""
    built, found = kernel_dtypes(torch.device("cuda", 0)) is not None, torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if built and found else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected auto, cpu, cuda or cuda:<number>, got {name!r}")
    if device.type == "cpu":
        return device
    if not found:
        raise ValueError(f"--device: expected cpu or auto, since torch finds no GPU, got {name!r}")
    count = torch.cuda.device_count()
    index = device.index if device.index is not None else rank % count
    if index >= count:
        raise ValueError(f"--device: expected at most cuda:{count - 1}, got {name!r}")
    return torch.device("cuda", index)


def parse_image_size(text: str | None) -> tuple[int, int] | None:
    """``"32"`` or ``"32x48"``, height first."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise ValueError(f"--image-size: expected a number such as 32, or height and width as 32x48, got {text!r}")
    return int(sides[0]), int(sides[-1])


def parse_widths(text: str, option: str) -> tuple[int, ...]:
    """``"32,64"``; an empty text is no layer at all."""
    widths = text.replace(" ", "").split(",") if text.strip() else []
    if not all(width.isdecimal() and len(width) <= 18 for width in widths):  # more digits overflow 64 bits
        raise ValueError(f"{option}: expected numbers such as 32,64, got {text!r}")
    return tuple(int(width) for width in widths)


# ------------------------------------------------------------------------------------------------------ train


@app.command()
@reports_errors
def train(
    data_source: DataOption = "digits",
    recipe: Annotated[
        str, typer.Option(help="standard or fast: what --epochs, --batch-size, --lr and --schedule are by default.")
    ] = "standard",
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; its peak with a schedule.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Learning rate over time: constant, cosine (to 0) or one-cycle.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adam, adamw or sgd.")] = "adam",
    precision: Annotated[
        str, typer.Option(help="fp32, or bf16 for products in bfloat16 on processors with AVX512-BF16.")
    ] = "fp32",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Fixes first parameters and order of images.")] = 0,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    out: Annotated[Path, typer.Option(help="The model file to write.")] = Path("model.safetensors"),
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the checkpoint beside --out, up to --epochs in all."),
    ] = False,
    validation_split: ValidationSplitOption = None,
    image_size: Annotated[
        str | None, typer.Option(help="Scale images to this size in pixels: 32, or height x width as 32x48.")
    ] = None,
    conv_channels: Annotated[str, typer.Option(help="Output channels of each convolution.")] = "32,64",
    hidden: Annotated[str, typer.Option(help="Widths of the hidden dense layers.")] = "64",
    kernel_size: Annotated[int, typer.Option(min=1, help="Height and width of the convolutions.")] = 3,
    padding: Annotated[int, typer.Option(min=0, help="Zeros around the input of each convolution.")] = 0,
) -> None:
    """Train a classifier; write the model, a checkpoint for --resume, and a picture of the training curve.

    Under torchrun all processes train one model together: each takes its share of every batch.
    """
    checkpoint = checkpoint_path(out)
    check_place(curve_path(out), "--out: the picture of the training curve")
    chosen = choose_recipe(recipe, epochs=epochs, batch_size=batch_size, lr=lr, schedule=schedule)
    channels = parse_widths(conv_channels, "--conv-channels")
    widths = parse_widths(hidden, "--hidden")
    size = parse_image_size(image_size)
    with joined_ranks() as ranks, thread_limit(threads):
        place = choose_device(device, ranks.rank)
        with ranks.first_goes_ahead():
            train_set, test_set = data.load(
                data_source, validation_split=validation_split, image_size=size, progress=ranks.first
            )
        torch.manual_seed(seed)
        model = make_model(train_set, channels, widths, kernel_size, padding).to(place)
        if ranks.first:
            describe_training(train_set, test_set, model)
        history = fit(
            model,
            train_set,
            test_set,
            epochs=chosen["epochs"],
            batch_size=chosen["batch_size"],
            lr=chosen["lr"],
            scheduler=make_scheduler(chosen, len(train_set)),
            optimizer=optimizer,
            precision=precision,
            seed=seed,
            checkpoint=checkpoint,
            resume=resume,
        )
        if ranks.first:
            write_results(model, history, train_set, test_set, out)
    if len(history) < chosen["epochs"]:
        if ranks.first:
            typer.echo(
                f"interrupted: this is the model after epoch {len(history)} of {chosen['epochs']}; --resume goes on",
                err=True,
            )
        raise typer.Exit(INTERRUPTED)


def describe_training(train_set: data.Dataset, test_set: data.Dataset, model: CNNClassifier) -> None:
    """Print what is trained on what."""
    count = sum(parameter.numel() for parameter in model.parameters())
    typer.echo(
        f"{train_set.name}: {len(train_set)} images, {test_set.name}: {len(test_set)} images, "
        f"{'x'.join(map(str, model.input_shape))}, {len(train_set.classes)} classes; {count:,} parameters "
        f"on {next(model.parameters()).device}"
    )


def write_results(
    model: CNNClassifier, history: History, train_set: data.Dataset, test_set: data.Dataset, out: Path
) -> None:
    """Print the accuracy; write the model and the picture of its training."""
    accuracy = model.evaluate(test_set.images, class_names(test_set))["accuracy"]
    typer.echo(f"test accuracy {accuracy:.2%} ({round(accuracy * len(test_set))} of {len(test_set)} images)")
    curve = curve_path(out)
    model.save(out)
    save_picture(plot_history(history, train_set.name), curve)
    typer.echo(f"saved {out} and {curve}")


def choose_recipe(name: str, **options: Any) -> dict[str, Any]:
    """The recipe's values, overridden by the options that were given."""
    if name not in RECIPES:
        raise ValueError(f"--recipe: expected one of {', '.join(RECIPES)}, got {name!r}")
    chosen = RECIPES[name] | {key: value for key, value in options.items() if value is not None}
    if chosen["schedule"] not in SCHEDULES:
        raise ValueError(f"--schedule: expected one of {', '.join(SCHEDULES)}, got {chosen['schedule']!r}")
    return chosen


def make_scheduler(chosen: dict[str, Any], images: int) -> Callable[[torch.optim.Optimizer], Any] | None:
    """A function that makes torch's scheduler from the optimizer, or None for a constant rate."""
    schedulers = torch.optim.lr_scheduler
    if chosen["schedule"] == "cosine":
        return functools.partial(schedulers.CosineAnnealingLR, T_max=chosen["epochs"])
    if chosen["schedule"] == "one-cycle":
        steps = chosen["epochs"] * -(-images // chosen["batch_size"])
        return functools.partial(schedulers.OneCycleLR, max_lr=chosen["lr"], total_steps=steps)
    return None


def fit(
    model: CNNClassifier, train_set: data.Dataset, test_set: data.Dataset, *, checkpoint: Path, **options: Any
) -> History:
    """Train; an interrupt keeps the last complete epoch, and the history is then shorter than asked for."""
    try:
        with warnings.catch_warnings():
            # `train` says it in its own words.
            warnings.filterwarnings("ignore", message="training interrupted")
            return model.fit(
                train_set.images,
                class_names(train_set),
                validation_data=(test_set.images, class_names(test_set)),
                checkpoint=checkpoint,
                **options,
            )
    except KeyboardInterrupt:
        typer.echo("interrupted before the first epoch was complete: nothing was saved", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except TrainingError as error:
        if error.epoch > 1:
            raise ValueError(f"{error}, which {checkpoint} holds") from error
        raise


def checkpoint_path(out: Path) -> Path:
    """Where `train` keeps the state after each epoch; an impossible place is refused at once."""
    if out.suffix != ".safetensors":
        raise ValueError(f"--out: expected a file name that ends in .safetensors, got {str(out)!r}")
    check_place(out, "--out")
    return out.with_name(f"{out.stem}.checkpoint.safetensors")


def curve_path(out: Path) -> Path:
    """Where `train` draws its progress."""
    return out.with_suffix(".png")


def check_place(path: Path, name: str) -> None:
    """Refuse a place where no file can be, before the work whose results it is for."""
    if not path.parent.is_dir():
        raise ValueError(f"{name}: the folder {str(path.parent)!r} does not exist")
    if path.is_dir():
        raise ValueError(f"{name}: expected a file name, {str(path)!r} is a folder")


def make_model(
    train_set: data.Dataset,
    conv_channels: tuple[int, ...],
    hidden: tuple[int, ...],
    kernel_size: int,
    padding: int,
) -> CNNClassifier:
    """The classifier that fits these images and classes."""
    channels, height, width = train_set.images.shape[1:]
    try:
        return CNNClassifier(
            (channels, height, width),
            len(train_set.classes),
            conv_channels,
            hidden,
            kernel_size=kernel_size,
            padding=padding,
            classes=train_set.classes,
        )
    except RuntimeError as error:  # torch cannot allocate the parameters, or their sizes overflow
        reason = str(error).rpartition(CPU_ALLOCATOR)[2]
        raise ValueError(f"cannot make a model with {conv_channels=} and {hidden=}: {reason}") from error


def class_names(dataset: data.Dataset) -> np.ndarray:
    """The label of each image as its class's name."""
    names: np.ndarray = np.asarray(dataset.classes)[dataset.labels]
    return names


def plot_history(history: History, title: str) -> Figure:
    """Loss and accuracy by epoch, of the training and the test images."""
    figure: Figure = require("matplotlib.figure", "the picture of the training curve").Figure(
        figsize=(9, 4), layout="constrained"
    )
    figure.suptitle(title, parse_math=False)
    epochs = [record["epoch"] for record in history.epochs]
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for key, label in ((quantity, "training"), (f"val_{quantity}", "test")):
            axes.plot(epochs, [record[key] for record in history.epochs], marker="o", label=label)
        axes.set_xlabel("epoch")
        axes.set_ylabel(quantity)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def save_picture(figure: Figure, path: Path) -> None:
    """Write a picture whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


# --------------------------------------------------------------------------------------------------- evaluate


@app.command()
@reports_errors
def evaluate(
    model_file: ModelArgument,
    data_source: DataOption = "digits",
    validation_split: ValidationSplitOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    picture: Annotated[
        Path | None, typer.Option(help="The confusion matrix; <model>.confusion.png when left out.")
    ] = None,
) -> None:
    """Print the accuracy on the test images and a table by class; write a picture of the confusion matrix."""
    metrics = require("sklearn.metrics", "evaluate")
    model = CNNClassifier.load(model_file).to(choose_device(device))
    picture = picture or model_file.with_suffix(".confusion.png")
    check_picture(picture)
    names = model_classes(model)
    channels, height, width = model.input_shape
    _, test_set = data.load(data_source, validation_split=validation_split, image_size=(height, width))
    unknown = [name for name in test_set.classes if name not in names]
    if unknown:
        raise data.DataError(
            f"{test_set.name}: expected the model's classes ({', '.join(names)}), got also {', '.join(unknown)}"
        )
    truth = np.array([names.index(name) for name in test_set.classes])[test_set.labels]
    images = data.with_channels(test_set.images, channels, test_set.name)
    with thread_limit(threads):
        predicted = model.predict_proba(images).argmax(1)

    labels = np.arange(len(names))
    precision, recall, _, support = metrics.precision_recall_fscore_support(
        truth, predicted, labels=labels, zero_division=0
    )
    accuracy = float((truth == predicted).mean())
    typer.echo(f"{test_set.name}: accuracy {accuracy:.2%} ({int((truth == predicted).sum())} of {len(truth)} images)")
    print_class_table(names, precision, recall, support)
    matrix = metrics.confusion_matrix(truth, predicted, labels=labels)
    save_picture(plot_confusion_matrix(matrix, names, f"{test_set.name}, accuracy {accuracy:.2%}"), picture)
    typer.echo(f"saved {picture}")


def check_picture(path: Path) -> None:
    """Refuse a place where no file can be, and a name that tells no format, before the work that it is to show."""
    check_place(path, "--picture")
    figure = require("matplotlib.figure", "the picture of the confusion matrix").Figure()
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"--picture: expected a file name that ends in .{', .'.join(formats)}, got {str(path)!r}")


def model_classes(model: CNNClassifier) -> list[str]:
    """The names of the classes in the order of the probabilities."""
    classes = getattr(model, "classes_", None) or model.classes or range(model.num_classes)
    return [str(label) for label in classes]


def print_class_table(names: Sequence[str], precision: np.ndarray, recall: np.ndarray, support: np.ndarray) -> None:
    """Precision: of a class's predictions, the share that is right; recall: of its images."""
    table = require("rich.table", "the table by class").Table("class")
    for heading in ("precision", "recall", "support"):
        table.add_column(heading, justify="right")
    for row in zip(names, precision, recall, support, strict=True):
        table.add_row(row[0], f"{row[1]:.4f}", f"{row[2]:.4f}", str(row[3]))
    require("rich.console", "the table by class").Console(markup=False).print(table)


def plot_confusion_matrix(matrix: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """Rows are true classes and columns predicted ones; the colour is the share of the row."""
    side = max(4.0, min(20.0, 0.55 * len(names) + 2))  # inches
    figure: Figure = require("matplotlib.figure", "the picture of the confusion matrix").Figure(
        figsize=(side, side), layout="constrained"
    )
    axes = figure.subplots()
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title, parse_math=False)
    if len(names) <= MAX_MATRIX_NUMBERS:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                shade = "white" if share[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=shade, fontsize=8)
    return figure


# ---------------------------------------------------------------------------------------------------- predict


@app.command()
@reports_errors
def predict(
    model_file: ModelArgument,
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Pictures, IDX files or .npz archives; digits white on black, as those of the data sets.",
            show_default=False,
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="Show so many of the most probable classes.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array.")] = False,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Print class and probability of each image, separated by tabs, or as JSON."""
    model = CNNClassifier.load(model_file).to(choose_device(device))
    names = model_classes(model)
    channels, height, width = model.input_shape
    images, sources = data.load_images(files, channels=channels, size=(height, width))
    with thread_limit(threads):
        probabilities = model.predict_proba(images)
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    results = [
        {
            "file": source,
            "class": names[best[0]],
            "probability": float(row[best[0]]),
            "top": [{"class": names[label], "probability": float(row[label])} for label in best],
        }
        for source, row, best in zip(sources, probabilities, order, strict=True)
    ]
    if as_json:
        typer.echo(json.dumps(results, indent=2, ensure_ascii=False))
        return
    for source, row, best in zip(sources, probabilities, order, strict=True):
        typer.echo("\t".join([source, *(f"{names[label]}\t{row[label]:.4f}" for label in best)]))


# --------------------------------------------------------------------------------------------- info and bench


@app.command()
@reports_errors
def info(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False) -> None:
    """Print versions, the instruction set in use, threads and CUDA."""
    facts: dict[str, Any] = {
        **fastnn.build_info(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2, default=str))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        typer.echo(f"{name:<{width}}  {shown}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
@reports_errors
def bench(context: typer.Context) -> None:
    """Time the kernels against torch; `fastnn bench --help` lists its own options."""
    from fastnn.bench import main as bench_main

    raise typer.Exit(bench_main(context.args) or 0)
