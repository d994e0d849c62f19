"""Long runs and sudden ends: memory stays flat, and kill -9 costs at most the epoch that was running.

The killed processes are forks, which start at once; fastnn computes the same bits in them, on one thread.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from fuzzing import FACTOR

from fastnn import CNNClassifier, cli

safetensors = pytest.importorskip("safetensors")
pytest.importorskip("matplotlib.figure")  # here, so that no fork has to import it

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc and fork")

# Memory that an allocator may still take after the first steps, against steps that would leak 100 bytes each.
GROWTH = 1 << 20

STEPS = """
    import torch, fastnn
    from fastnn import nn, optim
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        nn.Conv2d(1, 4, 3, activation="relu", max_pool=2), torch.nn.Flatten(), nn.Linear(36, 8, activation="relu"),
        nn.Linear(8, 3),
    )
    optimizer, loss_function = optim.Adam(model.parameters()), nn.CrossEntropyLoss()
    compiled = fastnn.training.compile_step(model, loss_function, optimizer)
    images, labels = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])

    def through_autograd():
        optimizer.zero_grad()
        loss_function(model(images), labels).backward()
        optimizer.step()

    def step(number):
        if KIND == "compiled":
            compiled(images[: 1 + number % 6], labels[: 1 + number % 6])
        elif number % 10 == 0:  # what is done now and then must not leak either
            with fastnn.explain_dispatch() as log:
                through_autograd()
            assert log
        else:
            through_autograd()

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    for number in range(2000):
        step(number)
    before = resident()
    for number in range(10_000):
        step(number)
    print(resident() - before)
"""


@pytest.mark.parametrize("kind", ["autograd", "compiled"])
def test_memory_stays_flat_over_10_000_steps(kind: str) -> None:
    code = f"KIND = {kind!r}\n" + textwrap.dedent(STEPS)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < GROWTH


def forked(work: Callable[[], object]) -> int:
    """Runs `work` in a child process and returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)  # torch's own pool does not live on in a child
        work()
        code = 0
    finally:
        os._exit(code)
    raise AssertionError


def stamp(path: Path | None) -> int:
    return path.stat().st_mtime_ns if path is not None and path.exists() else 0


def killed_after(seconds: float, work: Callable[[], object], since: Path | None = None) -> bool:
    """Whether kill -9 came before the work was done; work that ends by itself must end well.

    The time counts from the moment that the file `since` is written anew, else from the start.
    """
    written = stamp(since)
    child = forked(work)
    while since is not None and stamp(since) == written:
        time.sleep(1e-4)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return os.WIFSIGNALED(status)


def parameters_of(path: Path) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in CNNClassifier.load(path).parameters()]


def epochs_in(checkpoint: Path) -> int:
    with safetensors.safe_open(checkpoint, framework="pt") as file:
        return int(json.loads(file.metadata()["fastnn"])["epoch"])


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.fuzz
def test_kill_while_saving_leaves_a_whole_model(tmp_path: Path) -> None:
    models = [CNNClassifier((1, 8, 8), 3, conv_channels=(16,), hidden=(2000,)) for _ in range(2)]
    path = tmp_path / "model.safetensors"
    models[0].save(path)
    wanted = [[parameter.detach() for parameter in model.parameters()] for model in models]

    def save_forever() -> NoReturn:
        while True:
            for model in models:
                model.save(path)

    moments, longest = random.Random(0), 0.08
    seen: list[tuple[bool, ...]] = []
    while len(seen) < 12 * FACTOR or (len(set(seen)) < 2 and longest < 20):
        assert killed_after(moments.uniform(0, longest), save_forever)
        found = parameters_of(path)
        seen.append(tuple(same(found, parameters) for parameters in wanted))
        assert any(seen[-1])
        if len(set(seen)) < 2:  # the machine is busy: later
            longest *= 1.2
    assert len(set(seen)) == 2, "every kill came before the first save"


@pytest.mark.fuzz
def test_kill_while_training_and_resume_end_as_the_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (300, 12, 12), dtype=np.uint8), rng.integers(0, 3, 300)
    np.savez(tmp_path / "data.npz", x_train=images, y_train=labels, x_test=images[:30], y_test=labels[:30])

    def train(folder: Path, *more: str) -> None:
        options = f"--epochs 40 --batch-size 8 --conv-channels 8 --hidden 8 --data {tmp_path}/data.npz"
        cli.app(["train", *options.split(), "--out", str(folder / "model.safetensors"), *more], standalone_mode=False)

    straight, killed = (tmp_path / name for name in ("straight", "killed"))
    for folder in (straight, killed):
        folder.mkdir()
    train(straight)  # here, which imports all that a fork would otherwise import anew

    moments = random.Random(1)
    model, checkpoint = killed / "model.safetensors", killed / "model.checkpoint.safetensors"
    epochs = []
    for _ in range(5 * FACTOR):
        resume = ["--resume"] if checkpoint.exists() else []
        killed_after(moments.uniform(0, 0.03), lambda: train(killed, *resume), since=checkpoint)  # noqa: B023
        epochs.append(epochs_in(checkpoint))
        if epochs[-1] == 40:
            break
    assert epochs == sorted(epochs)
    assert epochs[0] < 40, "no kill came in time"
    _, status = os.waitpid(forked(lambda: train(killed, "--resume")), 0)
    assert status == 0
    assert same(parameters_of(model), parameters_of(straight / "model.safetensors"))
