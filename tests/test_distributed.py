"""Two ranks on 127.0.0.1 give what one process gives: DistributedDataParallel, FSDP2, fit, and the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed_worker as worker
import numpy as np
import pytest
import safetensors.torch
import torch
from networks import assert_near

from fastnn import cli

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch built with gloo")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As the ranks have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Two ranks that find the same fastnn."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        check=False,
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found in every scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    result = torchrun(worker.__file__, folder)
    assert result.returncode == 0, result.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("scenario", [worker.data_parallel, worker.fully_sharded], ids=["ddp", "fsdp2"])
def test_wrapped_models_train_as_one_process_does(
    found: list[dict[str, Any]], scenario: worker.Scenario, tmp_path: Path
) -> None:
    expected = scenario(0, 1, tmp_path)
    for rank in found:
        result = rank[scenario.__name__]
        assert_near(result["state"], expected["state"])
        layers = {f"{name}_forward" for name in ("conv2d", "linear", "cross_entropy")}
        assert layers | {"linear_backward", "conv2d_grad_weight"} <= result["kernels"]


@pytest.mark.parametrize(
    "scenario", [worker.fit_compiled, worker.fit_through_autograd, worker.fit_and_resume], ids=lambda s: s.__name__
)
def test_fit_gives_the_parameters_and_records_of_one_process(
    found: list[dict[str, Any]], scenario: worker.Scenario, tmp_path: Path
) -> None:
    first, second = (rank[scenario.__name__] for rank in found)
    expected = scenario(0, 1, tmp_path)
    assert_near(first["state"], expected["state"])
    assert_near(first["epochs"], expected["epochs"])
    assert first["seed"] == second["seed"] == expected["seed"]
    assert first["epochs"] == second["epochs"]
    for ours, theirs in zip(first["state"], second["state"], strict=True):
        assert torch.equal(ours, theirs)


def test_fit_on_ranks_runs_the_compiled_step(found: list[dict[str, Any]]) -> None:
    assert [rank["fit_compiled"]["fallbacks"] for rank in found] == [[], []]


def test_every_rank_hears_of_different_data(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["fit_different_data"] == "images: expected the same on every rank, got 22, 21"


def test_a_rank_that_fails_ends_the_others(found: list[dict[str, Any]]) -> None:
    first, second = (rank["fit_until_a_rank_fails"] for rank in found)
    assert second == "OSError: the disk is full"
    assert first.startswith("ConnectionError: rank 0 of 2: lost contact with the other ranks")


def lines_of(printed: str) -> list[str]:
    """Without what gloo says of its connections in torch 2.10."""
    return [line for line in printed.splitlines() if not line.startswith("[Gloo]")]


def test_torchrun_trains_one_model_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.random.default_rng(0).integers(0, 60, (80, 12, 12), dtype=np.uint8)
    labels = np.arange(80) % 2
    images[labels == 1, :6] += 180
    np.savez(tmp_path / "halves.npz", x_train=images, y_train=labels)
    options = ["train", "--data", tmp_path / "halves.npz", "--epochs", 2, "--batch-size", 9, "--optimizer", "sgd"]
    options += ["--conv-channels", "4,8", "--hidden", "8", "--threads", 1, "--out"]
    together, alone = (tmp_path / name / "m.safetensors" for name in ("together", "alone"))
    for path in (together, alone):
        path.parent.mkdir()
    # What the second rank prints goes to a file: where it is gloo's, it may land in the middle of another line.
    result = torchrun("--log-dir", tmp_path / "log", "--redirects", "1:1", "-m", "fastnn", *options, together)
    assert result.returncode == 0, result.stderr
    (second,) = (tmp_path / "log").rglob("1/stdout.log")
    assert lines_of(second.read_text()) == []
    with pytest.raises(SystemExit) as ended:
        cli.app([*map(str, options), str(alone)])
    assert not ended.value.code
    for printed in (result.stdout, capsys.readouterr().out):
        first, *epochs, accuracy, saved = [line.split("  ")[0] for line in lines_of(printed)]
        assert first.startswith("halves.npz") and epochs == ["epoch 1/2", "epoch 2/2"]
        assert accuracy.startswith("test accuracy") and saved.startswith("saved")
    assert sorted(os.listdir(together.parent)) == ["m.checkpoint.safetensors", "m.png", "m.safetensors"]
    ours, expected = (safetensors.torch.load_file(path) for path in (together, alone))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
