"""What every rank of tests/test_distributed.py does: ``torchrun distributed_worker.py FOLDER``.

Each scenario takes this process's rank and the number of ranks and returns what it found. The tests run the same
scenarios without other ranks and compare.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from networks import CLASSES, fused_network
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastnn
from fastnn import nn, optim
from fastnn.classifier import CNNClassifier

Scenario = Callable[[int, int, Path], Any]

# The last batch has one image, and rank 1 then has none.
IMAGES, BATCH_SIZE = 22, 7


def make_data(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 8, 8, generator=rng, dtype=torch.float64)
    return images, torch.randint(CLASSES, (count,), generator=rng)


def train_wrapped(wrap: Callable[[torch.nn.Module], torch.nn.Module], rank: int, size: int) -> dict[str, Any]:
    """Five steps of a usual loop, in which this rank has the images rank, rank + size, ..."""
    model = wrap(fused_network())
    optimizer, loss_function = optim.Adam(model.parameters(), lr=0.01), nn.CrossEntropyLoss()
    with fastnn.explain_dispatch() as log:
        for step in range(5):
            images, targets = (tensor[rank::size] for tensor in make_data(12, step))
            optimizer.zero_grad()
            loss_function(model(images), targets).backward()
            optimizer.step()
    state = [
        tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in model.state_dict().values()
    ]
    return {"state": state, "kernels": {record.operator for record in log if record.kernel != "torch"}}


def data_parallel(rank: int, size: int, folder: Path) -> dict[str, Any]:
    return train_wrapped(lambda model: DistributedDataParallel(model) if size > 1 else model, rank, size)


def fully_sharded(rank: int, size: int, folder: Path) -> dict[str, Any]:
    def shard(model: torch.nn.Module) -> torch.nn.Module:
        if size > 1:
            mesh = init_device_mesh("cpu", (size,))
            for layer in model:
                if any(True for _ in layer.parameters()):
                    fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model

    return train_wrapped(shard, rank, size)


def make_classifier(seed: int) -> CNNClassifier:
    torch.manual_seed(seed)
    return CNNClassifier((1, 8, 8), CLASSES, conv_channels=(4,), hidden=(8,), classes=range(CLASSES)).double()


def fit(model: CNNClassifier, **options: Any) -> fastnn.training.History:
    return model.fit(
        *make_data(IMAGES, 0),
        validation_data=make_data(600, 1),  # three batches: an odd one for two ranks
        **{"batch_size": BATCH_SIZE, "lr": 0.01, "progress": False, **options},
    )


def result_of(model: CNNClassifier) -> dict[str, Any]:
    keys = ("loss", "accuracy", "val_loss", "val_accuracy")
    return {
        "state": list(model.state_dict().values()),
        "epochs": [[record[key] for key in keys] for record in model.history_],
        "seed": model.history_.seed,
    }


def fit_compiled(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Ranks that begin with different parameters and draw different seeds agree on rank 0's."""
    model = make_classifier(rank)
    with fastnn.explain_dispatch() as log:
        fit(model, epochs=3)
    return {**result_of(model), "fallbacks": [record.reason for record in log if record.operator == "training_step"]}


def fit_through_autograd(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Stopped after two epochs by the callback of the last rank alone."""
    model = make_classifier(0)
    callbacks = [lambda model, record: record["epoch"] == 2] if rank == size - 1 else []
    fit(model, epochs=5, seed=3, loss=torch.nn.functional.cross_entropy, callbacks=callbacks)
    return result_of(model)


def fit_and_resume(rank: int, size: int, folder: Path) -> dict[str, Any]:
    checkpoint = folder / f"of_{size}.safetensors"
    options: dict[str, Any] = {"seed": 3, "checkpoint": checkpoint}
    fit(make_classifier(0), epochs=1, **options)
    model = make_classifier(1)
    fit(model, epochs=2, resume=True, **options)
    return result_of(model)


def fit_different_data(rank: int, size: int, folder: Path) -> str:
    try:
        make_classifier(0).fit(*make_data(IMAGES - rank, 0), epochs=1, progress=False)
    except ValueError as error:
        return str(error)
    return ""


def fit_until_a_rank_fails(rank: int, size: int, folder: Path) -> str:
    """The last scenario: the group is of no use any more."""

    def fail(model: torch.nn.Module, record: dict[str, float]) -> None:
        raise OSError("the disk is full")

    try:
        fit(make_classifier(0), epochs=1000, callbacks=[fail] if rank == 1 else [])
    except OSError as error:
        dist.destroy_process_group()
        return f"{type(error).__name__}: {error}"
    return ""


SCENARIOS: tuple[Scenario, ...] = (
    data_parallel,
    fully_sharded,
    fit_compiled,
    fit_through_autograd,
    fit_and_resume,
    fit_different_data,
    fit_until_a_rank_fails,
)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.save({scenario.__name__: scenario(rank, size, folder) for scenario in SCENARIOS}, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
