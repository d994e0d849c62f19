"""The command line end to end on small real data, and every error it must report in one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from dispatch_log import kernels_of, ran_kernels
from matplotlib.text import Text
from PIL import Image

import fastnn
import fastnn.bench
from fastnn import _C, cli, data
from fastnn.classifier import CNNClassifier
from fastnn.training import History, TrainingError

INSTALLED = Path(fastnn.__file__).parents[1]  # interpreters that start there find the fastnn that is tested
PICTURES_ARCHIVE = Path(__file__).parents[2] / "shared" / "data" / "cifar10-images.tar.xz"
# Enough for digits, and a fraction of the time; one thread, because other processes may keep the cores busy.
SMALL = ["--conv-channels", "8,16", "--hidden", "32", "--threads", "1"]


@dataclass
class Result:
    code: int
    out: str
    err: str


def run(*arguments: object) -> Result:
    """Run `fastnn` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        cli.app([str(argument) for argument in arguments], prog_name="fastnn")
    return Result(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def run_well(*arguments: object) -> str:
    result = run(*arguments)
    assert (result.code, result.err) == (0, "")
    return result.out


def error_of(*arguments: object) -> str:
    """The one line that the command must end with, with exit code 2."""
    result = run(*arguments)
    assert result.code == 2
    assert "Traceback" not in result.err
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    return line


def files_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A model trained on the digits, and what the command printed."""
    out = tmp_path_factory.mktemp("trained") / "digits.safetensors"
    return out, run_well("train", "--epochs", 5, "--lr", "0.003", "--out", out, *SMALL)


@pytest.fixture
def small_npz(tmp_path: Path) -> Path:
    """Two classes that differ in which half is bright, 12x12."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 60, (80, 12, 12), dtype=np.uint8)
    labels = np.arange(80) % 2
    images[labels == 1, :6] += 180
    path = tmp_path / "halves.npz"
    np.savez(path, x_train=images, y_train=labels)
    return path


# ------------------------------------------------------------------------------------------------------ train


def test_train_reports_the_accuracy_and_writes_model_checkpoint_and_curve(trained: tuple[Path, str]) -> None:
    out, printed = trained
    assert "digits (training): 1438 images, digits (test): 359 images, 1x28x28, 10 classes" in printed
    line = next(line for line in printed.splitlines() if line.startswith("test accuracy"))
    accuracy = float(line.split()[2].rstrip("%"))
    assert accuracy > 90
    assert files_in(out.parent) == ["digits.checkpoint.safetensors", "digits.png", "digits.safetensors"]
    with Image.open(out.with_suffix(".png")) as curve:
        assert curve.format == "PNG"
        assert len(np.unique(np.asarray(curve.convert("L")))) > 10  # not blank
    _, test_set = data.load("digits")
    model = CNNClassifier.load(out)
    right = model.predict(test_set.images) == cli.class_names(test_set)
    assert f"({right.sum()} of 359 images)" in line


def test_train_repeats_with_its_seed(small_npz: Path, tmp_path: Path) -> None:
    def parameters(name: str, seed: int) -> dict[str, torch.Tensor]:
        out = tmp_path / f"{name}.safetensors"
        run_well("train", "--data", small_npz, "--epochs", 1, "--seed", seed, "--out", out, *SMALL)
        return safetensors.torch.load_file(out)

    first, second, other = parameters("a", 3), parameters("b", 3), parameters("c", 4)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_resume_ends_where_an_uninterrupted_run_ends(small_npz: Path, tmp_path: Path) -> None:
    common = ["train", "--data", small_npz, "--optimizer", "sgd", "--schedule", "constant", *SMALL, "--out"]
    run_well(*common, tmp_path / "whole.safetensors", "--epochs", 3)
    run_well(*common, tmp_path / "parts.safetensors", "--epochs", 2)
    printed = run_well(*common, tmp_path / "parts.safetensors", "--epochs", 3, "--resume")
    assert "epoch 3/3" in printed
    assert "epoch 2/3" not in printed
    whole, parts = (safetensors.torch.load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_schedule_laid_out_for_fewer_epochs_is_not_gone_on_with(small_npz: Path, tmp_path: Path) -> None:
    common = ["train", "--data", small_npz, *SMALL, "--out", tmp_path / "m.safetensors"]
    run_well(*common, "--epochs", 1)
    assert "schedule_length=1, this run has schedule_length=2" in error_of(*common, "--epochs", 2, "--resume")


def test_a_recipe_gives_the_defaults_that_options_override(small_npz: Path, tmp_path: Path) -> None:
    common = ["train", "--data", small_npz, *SMALL, "--out", tmp_path / "m.safetensors"]
    assert "epoch 2/2" in run_well(*common, "--recipe", "fast")
    assert "epoch 1/1" in run_well(*common, "--recipe", "fast", "--epochs", 1)
    assert cli.choose_recipe("fast", epochs=None, batch_size=7) == {**cli.RECIPES["fast"], "batch_size": 7}


def test_train_shapes_the_network_as_told(small_npz: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    shape = [
        "--conv-channels",
        "4",
        "--hidden",
        "",
        "--kernel-size",
        5,
        "--padding",
        2,
        "--image-size",
        "16x20",
    ]
    printed = run_well("train", "--data", small_npz, "--epochs", 1, "--validation-split", 0.25, "--out", out, *shape)
    model = CNNClassifier.load(out)
    assert model.input_shape == (1, 16, 20)
    assert (tuple(model.conv_channels), tuple(model.hidden)) == ((4,), ())
    assert (model.kernel_size, model.padding) == (5, 2)
    assert "60 images, halves.npz (test): 20 images" in printed


def test_an_interrupt_keeps_the_last_complete_epoch(tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    # A shell that starts this test in the background makes its children ignore SIGINT.
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = [
        sys.executable,
        "-c",
        f"{start}from fastnn.cli import main; main()",
        "train",
        "--epochs",
        "100000",
        "--schedule",
        "constant",
        "--out",
        str(out),
        *SMALL,
    ]
    with subprocess.Popen(command, cwd=INSTALLED, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                break
        process.send_signal(signal.SIGINT)
        rest, err = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "test accuracy" in rest
    kept = int(err.split("after epoch ")[1].split()[0])
    assert kept >= 2
    assert files_in(tmp_path) == ["m.checkpoint.safetensors", "m.png", "m.safetensors"]
    printed = run_well("train", "--epochs", kept + 1, "--schedule", "constant", "--resume", "--out", out, *SMALL)
    assert f"epoch {kept + 1}/{kept + 1}" in printed
    assert f"epoch {kept}/" not in printed


def test_an_interrupt_in_the_first_epoch_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: CNNClassifier, *args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CNNClassifier, "fit", interrupted)
    result = run("train", "--out", tmp_path / "m.safetensors")
    assert result.code == 130
    assert "nothing was saved" in result.err
    assert files_in(tmp_path) == []


def test_a_loss_that_turns_nan_stops_the_training(tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    error = error_of("train", "--epochs", 2, "--lr", "1e30", "--out", out, *SMALL)
    assert "loss became" in error
    assert "epoch 1, step" in error
    assert files_in(tmp_path) == []


# --------------------------------------------------------------------------------------- evaluate and predict


def test_evaluate_prints_a_row_per_class_and_draws_the_confusion_matrix(trained: tuple[Path, str]) -> None:
    out, printed_by_train = trained
    printed = run_well("evaluate", out)
    accuracy = next(line for line in printed_by_train.splitlines() if line.startswith("test accuracy")).split()[2]
    assert f"digits (test): accuracy {accuracy}" in printed
    rows = [line.replace("│", " ").split() for line in printed.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == list("0123456789")
    assert sum(int(row[3]) for row in rows) == 359

    _, test_set = data.load("digits")
    predicted = CNNClassifier.load(out).predict(test_set.images).astype(int)
    hits = (predicted == 3) & (test_set.labels == 3)
    assert float(rows[3][1]) == pytest.approx(hits.sum() / (predicted == 3).sum(), abs=1e-4)
    assert float(rows[3][2]) == pytest.approx(hits.sum() / (test_set.labels == 3).sum(), abs=1e-4)
    with Image.open(out.with_suffix(".confusion.png")) as picture:
        assert picture.width > 400


def test_evaluate_scales_to_the_model_and_takes_a_subset_of_its_classes(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    _, test_set = data.load("digits")
    for label in (3, 7):
        for part in ("train", "test"):
            folder = tmp_path / part / str(label)
            folder.mkdir(parents=True)
            for index, image in enumerate(test_set.images[test_set.labels == label][:10, 0]):
                Image.fromarray(image).convert("RGB").resize((56, 56)).save(folder / f"{index}.png")
    printed = run_well("evaluate", trained[0], "--data", tmp_path, "--picture", tmp_path / "m.png")
    assert int(printed.split("(test): accuracy")[1].split("(")[1].split()[0]) >= 16
    assert (tmp_path / "m.png").exists()


def test_evaluate_tests_on_the_part_of_the_images_that_is_asked_for(
    trained: tuple[Path, str], small_npz: Path, tmp_path: Path
) -> None:
    common = ["evaluate", trained[0], "--data", small_npz, "--picture", tmp_path / "m.png"]
    assert "of 8 images)" in run_well(*common)
    assert "of 40 images)" in run_well(*common, "--validation-split", 0.5)


def test_predict_prints_classes_and_probabilities(trained: tuple[Path, str], tmp_path: Path) -> None:
    _, test_set = data.load("digits")
    image = test_set.images[0, 0]
    Image.fromarray(image).save(tmp_path / "one.png")
    np.savez(tmp_path / "some.npz", x_test=test_set.images[:3, 0])
    expected = CNNClassifier.load(trained[0]).predict_proba(test_set.images[:3])

    printed = run_well("predict", trained[0], tmp_path / "one.png", tmp_path / "some.npz", "--top", 2)
    rows = [line.split("\t") for line in printed.splitlines()]
    names = [name.rpartition("/")[2] for name, *_ in rows]
    assert names == ["one.png", "some.npz[0]", "some.npz[1]", "some.npz[2]"]
    for row, probabilities in zip(rows, expected[[0, 0, 1, 2]], strict=True):
        best = np.argsort(-probabilities)[:2]
        assert row[1::2] == [str(label) for label in best]
        assert [float(value) for value in row[2::2]] == pytest.approx(probabilities[best], abs=1e-4)

    (answer,) = json.loads(run_well("predict", trained[0], tmp_path / "one.png", "--json", "--top", 10))
    assert answer["file"] == str(tmp_path / "one.png")
    assert answer["class"] == str(expected[0].argmax())
    assert answer["probability"] == pytest.approx(expected[0].max(), abs=1e-6)
    assert sum(entry["probability"] for entry in answer["top"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.skipif(not PICTURES_ARCHIVE.exists(), reason=f"{PICTURES_ARCHIVE.name} is not in ../shared/data")
def test_train_evaluate_and_predict_on_real_photographs(tmp_path: Path) -> None:
    taken: Counter[str] = Counter()
    with tarfile.open(PICTURES_ARCHIVE, "r|xz") as archive:
        for member in archive:
            label = Path(member.name).parent.name
            if member.isfile() and taken[label] < 30:
                taken[label] += 1
                (tmp_path / "photographs" / label).mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None
                (tmp_path / "photographs" / label / Path(member.name).name).write_bytes(content.read())
            if len(taken) == 10 and min(taken.values()) == 30:
                break
    folder, out = tmp_path / "photographs", tmp_path / "m.safetensors"
    printed = run_well("train", "--data", folder, "--epochs", 4, "--out", out, *SMALL)
    assert "270 images, photographs (test): 30 images, 3x32x32, 10 classes" in printed
    losses = [float(line.split("loss ")[1].split()[0]) for line in printed.splitlines() if "epoch" in line]
    assert losses[-1] < losses[0]
    assert "accuracy" in run_well("evaluate", out, "--data", folder)
    picture = next((folder / "frog").iterdir())
    (answer,) = json.loads(run_well("predict", out, picture, "--json"))
    assert answer["class"] in taken


def test_pictures_show_names_with_dollars_as_they_are(tmp_path: Path) -> None:
    name = "a $x^$ b"  # as mathtext: an error
    record = {"epoch": 1, "loss": 0.5, "accuracy": 0.5, "val_loss": 0.5, "val_accuracy": 0.5}
    figures = [
        cli.plot_history(History([record]), name),
        cli.plot_confusion_matrix(np.eye(2, dtype=int), [name, "b"], name),
    ]
    for figure in figures:
        cli.save_picture(figure, tmp_path / "m.png")
        texts = [text.get_text() for text in figure.findobj(Text)]
        assert name in texts


# --------------------------------------------------------------------------------------------- info and bench


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_threads_limits_the_command_and_not_the_caller(
    trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    limits: list[int] = []
    set_num_threads = torch.set_num_threads

    def record(count: int) -> None:
        limits.append(count)
        set_num_threads(count)

    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", record)
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    arguments: dict[str, list[object]] = {
        "train": ["--epochs", 1, *SMALL, "--out", tmp_path / "m.safetensors"],
        "evaluate": [trained[0], "--picture", tmp_path / "m.png"],
        "predict": [trained[0], tmp_path / "a.png"],
    }
    run_well(command, *arguments[command], "--threads", before + 1)
    assert limits[0] == before + 1
    assert set(limits[1:-1]) <= {1, before + 1}  # what would leave OpenMP's threads spinning runs on one
    assert limits[-1] == torch.get_num_threads() == before


def test_precision_reaches_the_kernels_or_says_what_is_missing(tmp_path: Path) -> None:
    command = ["train", "--epochs", 1, *SMALL, "--conv-channels", "16,32", "--out", tmp_path / "m.safetensors"]
    assert "precision: expected 'fp32' or 'bf16', got 'float8'" in error_of(*command, "--precision", "float8")
    if not _C.has_bf16():
        assert "AVX512-BF16" in error_of(*command, "--precision", "bf16")
        return
    with ran_kernels("conv2d_forward") as log:
        run_well(*command, "--precision", "bf16")
    assert "winograd_bf16" in kernels_of(log, "conv2d_forward")


def test_a_nan_in_a_later_epoch_points_at_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: CNNClassifier, *args: object, **kwargs: object) -> None:
        raise TrainingError("the loss became nan at epoch 3", 3, 7)

    monkeypatch.setattr(CNNClassifier, "fit", fails)
    error = error_of("train", "--out", tmp_path / "m.safetensors")
    assert error.startswith("error: the loss became nan at epoch 3, which ")
    assert error.endswith("m.checkpoint.safetensors holds")


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_memory_that_does_not_suffice_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    def fails(self: CNNClassifier, *args: object, **kwargs: object) -> None:
        if device == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has less.")
        torch.empty(2**50, dtype=torch.uint8)

    monkeypatch.setattr(CNNClassifier, "fit", fails)
    error = error_of("train", "--out", tmp_path / "m.safetensors")
    words = {"cpu": f"can't allocate memory: you tried to allocate {2**50} bytes", "gpu": "CUDA out of memory"}
    assert error.startswith(f"error: not enough memory ({words[device]}")


def test_other_runtime_errors_are_not_taken_for_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: CNNClassifier, *args: object, **kwargs: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(CNNClassifier, "fit", fails)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        cli.app(["train", "--out", str(tmp_path / "m.safetensors")])


def test_info_tells_what_runs() -> None:
    facts = json.loads(run_well("info", "--json"))
    assert facts["isa"] == fastnn.build_info()["isa"]
    assert facts["torch"] == torch.__version__
    lines = {line.split()[0]: line.split(maxsplit=1)[1:] for line in run_well("info").splitlines()}
    assert lines.keys() == facts.keys()
    assert lines["version"] == [fastnn.build_info()["version"]]


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (1, 1)])
def test_bench_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch, returned: int | None, code: int) -> None:
    seen = []

    def bench_main(arguments: list[str]) -> int | None:
        seen.append(arguments)
        return returned

    monkeypatch.setattr(fastnn.bench, "main", bench_main, raising=False)
    assert run("bench", "--help", "conv2d", "--threads", 1).code == code
    assert seen == [["--help", "conv2d", "--threads", "1"]]


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "fastnn", "--help"], cwd=INSTALLED, capture_output=True, text=True)
    assert done.returncode == 0
    for command in ("train", "evaluate", "predict", "info", "bench"):
        assert f"  {command} " in done.stdout


def test_without_typer_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; import fastnn.cli"
    done = subprocess.run([sys.executable, "-c", code], cwd=INSTALLED, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the command line needs fastnn[app]: pip install 'fastnn[app]'\n"


# -------------------------------------------------------------------------------------------------- bad input

BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "data": (["--data", "nope"], "expected digits, mnist"),
    "recipe": (["--recipe", "slow"], "--recipe: expected one of standard, fast, got 'slow'"),
    "schedule": (["--schedule", "linear"], "--schedule: expected one of constant, cosine, one-cycle"),
    "split": (["--validation-split", "2"], "validation_split: expected a fraction between 0 and 1"),
    "image size": (["--image-size", "8by8"], "--image-size: expected a number such as 32"),
    "image size 0": (["--image-size", "0"], "expected one or two numbers from 1 to 4096"),
    "channels": (["--conv-channels", "32,x"], "--conv-channels: expected numbers such as 32,64"),
    "hidden": (["--hidden", "-5"], "--hidden: expected numbers such as 32,64"),
    "no data": (["--data", ""], "a folder or an .npz file; got '', which does not exist"),
    "batch size": (["--batch-size", str(2**63)], "batch_size: expected a whole number from 1 to 2147483647"),
    "no memory": (["--conv-channels", "2000000000,2000000000"], "cannot make a model with conv_channels="),
    "overflow": (["--hidden", "4000000000000,4000000000000"], "cannot make a model with conv_channels="),
    "beyond 64 bits": (["--hidden", str(10**22)], f"--hidden: expected numbers such as 32,64, got '{10**22}'"),
    "too small": (["--image-size", "8", "--conv-channels", "8,8,8"], "too small"),
    "learning rate": (["--lr", "-1"], "lr: expected a positive number, got -1.0"),
    "optimizer": (["--optimizer", "magic"], "optimizer: expected one of"),
    "resume": (["--resume"], "does not exist"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_train_refuses(tmp_path: Path, case: str) -> None:
    options, words = BAD_OPTIONS[case]
    assert words in error_of("train", "--epochs", 1, "--out", tmp_path / "m.safetensors", *options)
    assert files_in(tmp_path) == []


def test_train_refuses_a_place_it_cannot_write(tmp_path: Path) -> None:
    assert "folder" in error_of("train", "--out", tmp_path / "gone" / "m.safetensors")
    assert "ends in .safetensors" in error_of("train", "--out", tmp_path / "m.png")
    (tmp_path / "m.safetensors").mkdir()
    assert "is a folder" in error_of("train", "--out", tmp_path / "m.safetensors")


@pytest.mark.parametrize(("option", "value"), [("--epochs", 0), ("--threads", 100_000), ("--seed", 2**63)])
def test_typer_refuses_numbers_with_the_same_exit_code(option: str, value: int) -> None:
    result = run("train", option, value)
    assert result.code == 2
    assert f"Invalid value for '{option}'" in result.err
    assert "Traceback" not in result.err


def test_resume_refuses_other_settings(small_npz: Path, tmp_path: Path) -> None:
    common = ["train", "--data", small_npz, "--out", tmp_path / "m.safetensors", *SMALL]
    run_well(*common, "--epochs", 1)
    before = (tmp_path / "m.safetensors").read_bytes()
    error = error_of(*common, "--epochs", 1, "--resume", "--lr", "0.5")
    assert "lr=0.001" in error
    assert "lr=0.5" in error
    assert (tmp_path / "m.safetensors").read_bytes() == before


def test_a_full_disk_leaves_the_old_model(small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "m.safetensors").write_text("the old model")
    monkeypatch.setattr(os, "fsync", full)
    error = error_of("train", "--data", small_npz, "--epochs", 1, "--out", folder / "m.safetensors", *SMALL)
    assert "m.checkpoint.safetensors: the disk is full" in error
    assert files_in(folder) == ["m.safetensors"]
    assert (folder / "m.safetensors").read_text() == "the old model"


def test_a_picture_that_cannot_be_written_is_named(trained: tuple[Path, str], tmp_path: Path) -> None:
    error = error_of("evaluate", trained[0], "--picture", tmp_path / "gone" / "m.png")
    assert error == f"error: --picture: the folder {str(tmp_path / 'gone')!r} does not exist"


def test_a_folder_in_the_place_of_a_picture_is_refused_before_the_work(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    (tmp_path / "m.png").mkdir()
    error = error_of("evaluate", trained[0], "--data", "nope", "--picture", tmp_path / "m.png")
    assert error == f"error: --picture: expected a file name, {str(tmp_path / 'm.png')!r} is a folder"
    error = error_of("train", "--data", "nope", "--out", tmp_path / "m.safetensors")
    assert error.startswith("error: --out: the picture of the training curve: expected a file name")
    assert files_in(tmp_path) == ["m.png"]


@pytest.mark.parametrize("name", ["confusion", "confusion.foo"])
def test_a_picture_whose_name_tells_no_format_is_refused_before_the_work(
    trained: tuple[Path, str], tmp_path: Path, name: str
) -> None:
    error = error_of("evaluate", trained[0], "--data", "nope", "--picture", tmp_path / name)
    assert "--picture: expected a file name that ends in ." in error
    assert error.endswith(f"got {str(tmp_path / name)!r}")


BAD_MODELS = {
    "missing": (None, "No such file"),
    "empty": (lambda content: b"", "empty"),
    "truncated": (lambda content: content[:-100], "truncated"),
    "not ours": (lambda content: b"hello" * 100, "not a fastnn model"),
    "other version": (
        lambda content: content.replace(b'\\"format_version\\": 1', b'\\"format_version\\": 9'),
        "version 9",
    ),
    "checkpoint": ("digits.checkpoint.safetensors", "expected a fastnn model"),
}


@pytest.mark.parametrize("command", ["evaluate", "predict"])
@pytest.mark.parametrize("case", BAD_MODELS)
def test_unusable_models(trained: tuple[Path, str], tmp_path: Path, case: str, command: str) -> None:
    change, words = BAD_MODELS[case]
    path = tmp_path / "m.safetensors"
    if isinstance(change, str):
        path = trained[0].with_name(change)
    elif change is not None:
        content = trained[0].read_bytes()
        changed = change(content)
        assert changed != content
        path.write_bytes(changed)
    before = files_in(tmp_path)
    error = error_of(command, path, *(["x.png"] if command == "predict" else []))
    assert words in error
    assert path.name in error
    assert files_in(tmp_path) == before


def test_evaluate_refuses_classes_that_the_model_does_not_know(trained: tuple[Path, str], tmp_path: Path) -> None:
    images = np.zeros((20, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=["cat", "dog"] * 10)
    error = error_of("evaluate", trained[0], "--data", tmp_path / "a.npz")
    assert "expected the model's classes (0, 1, 2" in error
    assert "got also cat, dog" in error


def test_predict_refuses_what_is_not_an_image(trained: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    assert "expected a PNG or JPEG picture" in error_of("predict", trained[0], tmp_path / "a.png")
    assert "got nothing there" in error_of("predict", trained[0], tmp_path / "gone.png")
    assert "expected a picture (PNG, JPEG)" in error_of("predict", trained[0], Path(__file__))
