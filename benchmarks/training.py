"""Whole trainings against PyTorch (and Keras): speed, scaling, memory, prediction, time to an accuracy.

    python benchmarks/training.py --mnist FOLDER [--cifar SOURCE] [--keras-python PYTHON] [--only NAME] [--json FILE]

The sides take turns, an epoch each, for at least seven rounds in one process; where a side needs a process of its
own, the processes take turns. Before that, both train a few steps from the same parameters and must agree.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nets import CIFAR, REFERENCE, Epoch, Images, Net, fit_epoch, layer_epoch, load_images, loop_epoch, torch_epoch
from workers import Worker, script

import fastnn
from fastnn.bench import (
    QUICK_ROUND_SECONDS,
    ROUND_SECONDS,
    describe_spread,
    file_to_write,
    machine,
    threads_and_isa,
    write_json,
)
from fastnn.bench.timing import (
    MIN_ROUNDS,
    OURS,
    Disagreement,
    Samples,
    Spread,
    check_outputs,
    compare,
    interleave,
    repeated,
)

Result = dict[str, Any]

TORCH = "PyTorch fp32 loop"
TORCH_BF16 = "PyTorch bf16 autocast loop"
FIT = "fit"
FIT_AVX2 = "fit, AVX2"
FIT_BF16 = "fit, bf16"
LAYERS = "fastnn layers in the PyTorch loop"

# What the project set out to reach on the reference network, on processors with AVX-512: (what, against, batch) to the
# least ratio. A CIFAR-sized net is to reach half: a special case of one network's shapes would not.
TARGETS = {
    (FIT, TORCH, 32): 7.0,
    (FIT, TORCH, 128): 7.0,
    (FIT_AVX2, TORCH, 32): 4.5,
    (LAYERS, TORCH, 32): 5.0,
    (FIT, TORCH_BF16, 32): 4.0,
    (FIT_BF16, TORCH_BF16, 32): 5.0,
}
KERAS_TARGET = 10.0
PREDICT_TARGET = 6.0
MEMORY_TARGET = 2.0
ACCURACY_TARGET = 4.0
THREADS_TARGET = 1.8
PROCESSES_TARGET = 0.8

PREDICTED_IMAGES = 10_000
TORCH_PREDICT_BATCHES = (64, 256, 1000)  # the fastest counts
WANTED_ACCURACY = 99.0  # percent
QUICK_IMAGES = 256


@dataclass
class Plan:
    """The settings of a run, the images, and the results so far."""

    mnist: str | None
    cifar: str | None
    keras_python: str | None
    threads: int
    rounds: int
    images: int | None
    quick: bool
    rows: tuple[str, ...] = ()
    results: list[Result] = field(default_factory=list)
    loaded: dict[str, tuple[Images, Images]] = field(default_factory=dict)

    def data(self, net: Net) -> tuple[Images, Images]:
        if net.name not in self.loaded:
            train, test = load_images(net, self.mnist if net is REFERENCE else self.cifar)
            if net is REFERENCE and self.mnist is None:
                train = train.first(60_000)  # an epoch as long as MNIST's
            self.loaded[net.name] = (train.first(self.images) if self.images else train), test
        return self.loaded[net.name]

    def add(
        self,
        name: str,
        net: Net,
        what: str,
        against: str,
        samples: Samples,
        *,
        ours: str = OURS,
        theirs: str | None = None,
        target: float | None = None,
        images: int | None = None,
        unit: str = "s",
        **facts: Any,
    ) -> None:
        """Notes one row; with `images` in an epoch, seconds are told as images per second."""
        comparison = compare(samples, ours, theirs)
        spreads = [Spread.of(_converted(samples[side], images)) for side in (ours, comparison.opponent)]
        result = {
            "name": name,
            "net": net.name,
            "what": what,
            "against": against,
            "unit": "images/s" if images else unit,
            "ours": spreads[0].to_json(),
            "theirs": spreads[1].to_json(),
            "ratio": comparison.ratio.to_json(),
            "target": target if "avx512" in fastnn.available_isas() else None,
            "isa": fastnn.get_isa(),
            "threads": self.threads,
            **facts,
        }
        self.results.append(result)
        print(describe(result), flush=True)

    def skip(self, name: str, net: Net, what: str, reason: str) -> None:
        """Notes a row that could not be measured, and why."""
        result = {"name": name, "net": net.name, "what": what, "skipped": reason, "threads": self.threads}
        self.results.append(result)
        print(describe(result), flush=True)


def _converted(seconds: Sequence[float], images: int | None) -> list[float]:
    return [images / value for value in seconds] if images else list(seconds)


def describe(result: Result) -> str:
    """One line for people."""
    title = f"{result['net']}: {result['what']}" + (f", batch {result['batch']}" if "batch" in result else "")
    if "skipped" in result:
        return f"{title}: skipped, {result['skipped']}"
    line = (
        f"{title}: {format_value(result['ours']['median'], result['unit'])}, {result['against']}: "
        f"{format_value(result['theirs']['median'], result['unit'])}, ratio {describe_spread(result['ratio'])}"
    )
    if result["target"] is None:
        return line
    verdict = "reached" if result["ratio"]["median"] >= result["target"] else "MISSED"
    return f"{line}, target {result['target']}x {verdict}"


def format_value(value: float, unit: str) -> str:
    """``41,200 images/s``, ``3.21 s`` or ``11.4 MB``."""
    if unit == "images/s":
        return f"{round(value, -2):,.0f} {unit}" if value >= 10_000 else f"{value:,.0f} {unit}"
    if unit == "bytes":
        return f"{value / 1e6:.1f} MB"
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} {unit}"


# ---------------------------------------------------------------------------------------------------- epochs


def epochs(plan: Plan, net: Net) -> None:
    """`fit` in its forms and the drop-in layers against torch's loop, batch 32 and 128."""
    train, _ = plan.data(net)
    pixels = train.scaled
    half = 1.0 if net is REFERENCE else 0.5
    for batch in (32, 128):
        check_same_training(net, train, batch)
        sides: dict[str, Epoch] = {
            FIT: fit_epoch(net, pixels, train.labels, batch),
            LAYERS: layer_epoch(net, train, batch),
            TORCH: torch_epoch(net, train, batch),
        }
        if fastnn.get_isa() != "avx2" and "avx2" in fastnn.available_isas():
            sides[FIT_AVX2] = fit_epoch(net, pixels, train.labels, batch, isa="avx2")
        why_no_bf16 = "" if "avx512_bf16" in machine.cpu_flags() else "this processor has no AVX512-BF16"
        if not why_no_bf16:  # without the instructions PyTorch's bf16 is far slower than its fp32
            sides[FIT_BF16] = fit_epoch(net, pixels, train.labels, batch, precision="bf16")
            sides[TORCH_BF16] = torch_epoch(net, train, batch, autocast=True)
        samples = interleave(sides, plan.rounds)
        for ours, theirs in (
            (FIT, TORCH),
            (FIT, TORCH_BF16),
            (FIT_AVX2, TORCH),
            (FIT_BF16, TORCH_BF16),
            (LAYERS, TORCH),
        ):
            if ours not in samples or theirs not in samples:
                why_no_avx2 = "the kernels in use are AVX2 already, or there are none"
                reason = why_no_bf16 if theirs == TORCH_BF16 else why_no_avx2
                plan.skip("epochs", net, f"{ours} against {theirs}", reason)
                continue
            target = TARGETS.get((ours, theirs, batch))
            plan.add(
                "epochs",
                net,
                ours,
                theirs,
                samples,
                ours=ours,
                theirs=theirs,
                target=target and target * half,
                images=len(train),
                batch=batch,
                data=train.source,
                **({"isa": "avx2"} if ours == FIT_AVX2 else {}),
            )


def check_same_training(net: Net, train: Images, batch: int) -> None:
    """Raises Disagreement unless fit, the layers and torch come to the same logits after five steps.

    Adam divides by the gradient's size, so rounding decides the direction of vanishing gradients: logits agree to a
    hundredth of their size, not to the last digits. A wrong gradient would put them far apart.
    """
    part = train.first(5 * batch)
    probe = part.scaled[:batch]
    classifier, layers, reference = net.classifier(), net.layer_model(), net.torch_model()
    classifier.fit(part.scaled, part.labels, epochs=1, batch_size=batch, shuffle=False, progress=False)
    pixels = part.scaled.permute(0, 2, 3, 1).contiguous()
    optimizer = torch.optim.Adam(reference.parameters(), 1e-3, fused=True)
    loop_epoch(reference, optimizer, pixels, part.labels, batch, shuffle=False)
    with fastnn.explain_dispatch() as log:
        ours = fastnn.optim.Adam(layers.parameters(), 1e-3)
        loss = fastnn.functional.cross_entropy
        loop_epoch(layers, ours, pixels, part.labels, batch, loss_function=loss, shuffle=False)
    for record in log:
        if record.kernel == "torch":
            raise Disagreement(f"{net.name}: {record.operator} fell back to torch: {record.reason}")
    with torch.inference_mode():
        outputs = {TORCH: reference(probe), FIT: classifier(probe), LAYERS: layers(probe)}
    try:
        check_outputs(outputs, 0.01, "rms")
    except Disagreement as error:
        raise Disagreement(f"{net.name}, batch {batch}, logits after five steps: {error}") from error


# --------------------------------------------------------------------------------------------------- predict


def predict(plan: Plan, net: Net) -> None:
    """`predict_proba` against the torch model in eval mode under inference_mode, at its best batch size."""
    test = plan.data(net)[1].first(QUICK_IMAGES if plan.quick else PREDICTED_IMAGES)
    pixels = test.scaled
    model, reference = net.classifier(), net.torch_model().eval()
    nhwc = pixels.permute(0, 2, 3, 1).contiguous()

    def torch_side(batch: int) -> Callable[[], torch.Tensor]:
        @torch.inference_mode()
        def call() -> torch.Tensor:
            parts = nhwc.permute(0, 3, 1, 2).split(batch)
            return torch.cat([torch.softmax(reference(part), 1) for part in parts])

        return call

    calls: dict[str, Callable[[], Any]] = {OURS: lambda: model.predict_proba(pixels)}
    calls |= {f"PyTorch eval, batch {batch}": torch_side(batch) for batch in TORCH_PREDICT_BATCHES}
    check_outputs({side: torch.as_tensor(call()) for side, call in calls.items()}, 1e-3)
    round_seconds = QUICK_ROUND_SECONDS if plan.quick else ROUND_SECONDS
    samples = interleave({side: repeated(call, round_seconds) for side, call in calls.items()}, plan.rounds)
    opponent = compare(samples).opponent
    target = PREDICT_TARGET if net is REFERENCE else PREDICT_TARGET / 2
    plan.add(
        "predict",
        net,
        f"predict_proba, {len(test):,} images",
        opponent,
        samples,
        target=target,
        images=len(test),
        data=test.source,
    )


# ------------------------------------------------------------------------------------- threads, processes, memory


def threads(plan: Plan, net: Net) -> None:
    """`fit` on one thread against `fit` on all."""
    what = f"fit on {plan.threads} threads"
    if plan.threads < 2:
        plan.skip("threads", net, "fit on several threads", "the run has one thread")
        return
    train, _ = plan.data(net)
    sides = {
        f"{count} threads": fit_epoch(net, train.scaled, train.labels, 32, num_threads=count)
        for count in (1, plan.threads)
    }
    one, all_threads = sides
    samples = interleave(sides, plan.rounds)
    plan.add(
        "threads",
        net,
        what,
        "fit on 1 thread",
        samples,
        ours=all_threads,
        theirs=one,
        target=THREADS_TARGET if plan.threads == 2 else None,
        images=len(train),
        batch=32,
        data=train.source,
    )


def processes(plan: Plan, net: Net) -> None:
    """The throughput of two trainings at once, on all threads each, as a share of one alone."""
    seconds = 0.2 if plan.quick else 3.0
    command = script("workers.py", "throughput", net.name, 32, plan.threads, seconds)
    with closing(Worker(command)) as first, closing(Worker(command)) as second:

        def both() -> float:
            first.start()
            second.start()
            return first.result() + second.result()

        # In seconds an image, as every other row, so that the ratio says how much is left.
        rates = {"alone": first.ask, "two at once": both}
        samples = interleave({side: partial(_inverse, rate) for side, rate in rates.items()}, plan.rounds)
    plan.add(
        "processes",
        net,
        "two fits at once, together",
        "one fit alone",
        samples,
        ours="two at once",
        theirs="alone",
        target=PROCESSES_TARGET,
        images=1,
        batch=32,
    )


def _inverse(rate: Callable[[], float]) -> float:
    return 1 / rate()


def memory(plan: Plan, net: Net) -> None:
    """The peak memory of a training step, in fresh processes."""
    for batch in (32, 128):

        def peak(side: str, batch: int = batch) -> float:
            command = script("workers.py", "memory", side, net.name, batch, plan.threads)
            return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)

        samples = interleave({side: partial(peak, side) for side in (OURS, "torch")}, plan.rounds)
        plan.add(
            "memory",
            net,
            "peak memory of a training step",
            TORCH,
            samples,
            target=MEMORY_TARGET,
            unit="bytes",
            batch=batch,
        )
        if plan.quick:
            break


# ----------------------------------------------------------------------------------------- Keras, time to accuracy


def keras(plan: Plan, net: Net) -> None:
    """One epoch as `fastnn train` makes it, on uint8 images, against the same network in Keras on TensorFlow."""
    what = "one epoch of fastnn train"
    if plan.keras_python is None:
        plan.skip("keras", net, what, "no --keras-python was given")
        return
    if subprocess.run([plan.keras_python, "-c", "import keras, tensorflow"], capture_output=True).returncode:
        plan.skip("keras", net, what, "the interpreter given by --keras-python has no Keras or TensorFlow")
        return
    train, _ = plan.data(net)
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, "images.npz")
        np.savez(archive, images=train.raw.numpy(), labels=train.labels.numpy())
        command = [plan.keras_python, *script("keras_epochs.py", archive, 32, plan.threads)[1:]]
        environment = {"OMP_NUM_THREADS": str(plan.threads), "TF_NUM_INTRAOP_THREADS": str(plan.threads)}
        with closing(Worker(command, environment)) as worker:
            sides = {OURS: fit_epoch(net, train.raw, train.labels, 32), "keras": worker.ask}
            samples = interleave(sides, plan.rounds)
            versions = worker.facts
    plan.add(
        "keras",
        net,
        what,
        f"Keras {versions['keras']} on TensorFlow {versions['tensorflow']}",
        samples,
        target=KERAS_TARGET,
        batch=32,
        data=train.source,
        versions=versions,
    )


def accuracy(plan: Plan, net: Net) -> None:
    """Seconds from process start to 99 % test accuracy on MNIST, against PyTorch with the same schedule."""
    what = f"process start to {WANTED_ACCURACY} % test accuracy on MNIST, fastnn train --recipe fast"
    recipe = _fast_recipe()
    if plan.mnist is None or plan.quick:
        plan.skip("accuracy", net, what, "it needs MNIST (--mnist) and a full run")
        return
    if recipe is None:
        plan.skip("accuracy", net, what, "fastnn train has no --recipe fast in this version")
        return
    reached: dict[str, list[float]] = {OURS: [], "torch": []}

    def run(side: str) -> float:
        seed = len(reached[side])  # another one each round, the same on both sides
        with tempfile.TemporaryDirectory() as folder:
            if side == OURS:
                command = [sys.executable, "-m", "fastnn", "train", "--recipe", "fast", "--data", str(plan.mnist)]
                command += ["--seed", str(seed), "--threads", str(plan.threads)]
                command += ["--out", str(Path(folder, "model.safetensors"))]
            else:
                names = ("epochs", "batch_size", "lr", "schedule")
                values = [recipe[name] for name in names]
                command = script("torch_accuracy.py", plan.mnist, *values, plan.threads, seed)
            seconds, percent = seconds_to_accuracy(command)
        reached[side].append(percent)
        return seconds

    samples = interleave({side: partial(run, side) for side in reached}, plan.rounds)
    medians = {side: statistics.median(values) for side, values in reached.items()}
    if medians[OURS] < WANTED_ACCURACY:
        plan.skip("accuracy", net, what, f"the median test accuracy was {medians[OURS]:.2f} %")
        return
    plan.add(
        "accuracy",
        net,
        what,
        "PyTorch with the same schedule",
        samples,
        target=ACCURACY_TARGET,
        accuracies=reached,
        recipe=recipe,
    )


def _fast_recipe() -> dict[str, Any] | None:
    from fastnn import cli

    return getattr(cli, "RECIPES", {}).get("fast")


def seconds_to_accuracy(command: Sequence[str]) -> tuple[float, float]:
    """Starts the command; seconds until it prints ``test accuracy 99.02% ...``, and the percentage there."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    found = None
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("test accuracy ") and found is None:
            found = time.perf_counter() - began, float(line.split()[2].rstrip("%"))
    if process.wait() or found is None:
        raise RuntimeError(f"{' '.join(command)}: ended with code {process.returncode}, test accuracy {found}")
    return found


# ------------------------------------------------------------------------------------------------------- command

# Each with the networks it is measured on.
ROWS: dict[str, tuple[Callable[[Plan, Net], None], tuple[Net, ...]]] = {
    "epochs": (epochs, (REFERENCE, CIFAR)),
    "predict": (predict, (REFERENCE, CIFAR)),
    "threads": (threads, (REFERENCE, CIFAR)),
    "processes": (processes, (REFERENCE,)),
    "memory": (memory, (REFERENCE, CIFAR)),
    "keras": (keras, (REFERENCE,)),
    "accuracy": (accuracy, (REFERENCE,)),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads, also for run.py."""
    parser.add_argument("--mnist", metavar="FOLDER", help="MNIST's IDX files; scikit-learn's digits when left out")
    parser.add_argument(
        "--cifar",
        metavar="SOURCE",
        help="10 classes of pictures, as `fastnn train --data` takes them; random images when left out",
    )
    parser.add_argument("--keras-python", metavar="PYTHON", help="an interpreter that has Keras 3 and TensorFlow")
    parser.add_argument("--threads", type=int, metavar="N", help="of both sides; all when left out")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS, metavar="N", help=f"at least {MIN_ROUNDS}")
    parser.add_argument("--images", type=int, metavar="N", help="images of an epoch; all when left out")
    parser.add_argument("--quick", action="store_true", help="tiny epochs, to try the script; the numbers say nothing")
    parser.add_argument(
        "--rows", action="append", choices=list(ROWS), help="only these training measurements; may be repeated"
    )


def plan_of(options: argparse.Namespace) -> Plan:
    """The plan that options ask for, its images loaded: what cannot be read is an error before anything is measured."""
    if options.rounds < MIN_ROUNDS:
        raise ValueError(f"--rounds: expected at least {MIN_ROUNDS}, got {options.rounds}")
    for name in ("threads", "images"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected at least 1, got {value}")
    if options.keras_python is not None and shutil.which(options.keras_python) is None:
        raise ValueError(f"--keras-python: expected an interpreter, got {options.keras_python!r}")
    plan = Plan(
        options.mnist,
        options.cifar,
        options.keras_python,
        options.threads or torch.get_num_threads(),
        options.rounds,
        QUICK_IMAGES if options.quick else options.images,
        options.quick,
        tuple(options.rows or ROWS),
    )
    for row in plan.rows:
        for net in ROWS[row][1]:
            plan.data(net)
    return plan


def run(plan: Plan) -> dict[str, Any]:
    """Measures the rows and returns them with the machine and the settings, ready for JSON."""
    with threads_and_isa(plan.threads):
        facts = machine.describe()
        print(machine.summary(facts), flush=True)
        for row in plan.rows:
            measure, nets = ROWS[row]
            for net in nets:
                measure(plan, net)
    loop = "hand-written, channels_last, fused Adam"
    settings = {"rounds": plan.rounds, "quick": plan.quick, "images": plan.images, "loop": loop}
    return {"machine": facts, "settings": settings, "results": plan.results}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_options(parser)
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the results to this file")
    options = parser.parse_args(arguments)
    try:
        document = run(plan_of(options))
    except (ValueError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        write_json(options.json, document)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
