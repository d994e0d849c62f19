"""Other people's networks before and after ``fastnn.convert``: training steps and predictions.

    python benchmarks/convert.py [--only NAME] [--batch N] [--rounds N] [--threads N] [--quick] [--json FILE]

Needs the extra ``test``, since the networks are those of ``tests/models.py``. The sides take turns, round by round, in
one process: PyTorch, the converted model, and the model through ``torch.compile(backend="fastnn")``. Before that they
must agree. Training is a whole step with torch's Adam, fused, against fastnn's; predictions are of models in eval mode,
batch norm folded in the converted one. Memory is channels_last where the network takes it.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from fastnn.bench.timing import MIN_ROUNDS, OURS, Spread, check_outputs, compare, interleave, repeated

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from models import NETWORKS, Network, first_result

TORCH = "PyTorch"
COMPILED = 'torch.compile(backend="fastnn")'
# How many calls are compared, and the largest difference, in root mean squares: tens of layers add in another order.
# The second loss of a training shows the update.
CHECKS = {"training": (2, 2e-4), "prediction": (1, 1e-3)}

Call = Callable[[], Tensor]


def sides_of(network: Network) -> dict[str, torch.nn.Module]:
    """The network three times, with the same parameters, each its own."""
    torch.manual_seed(0)
    model = network.make()
    if takes_channels_last(network, model):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    copies = [model, copy.deepcopy(model), copy.deepcopy(model)]
    compiled: Any = torch.compile(copies[2], backend=fastnn.compile_backend)
    return {TORCH: copies[0], OURS: fastnn.convert(copies[1], inplace=True), COMPILED: compiled}


def takes_channels_last(network: Network, model: torch.nn.Module) -> bool:
    """False where ``forward`` uses ``view`` on an image."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        model(torch.zeros(2, *network.images).to(memory_format=torch.channels_last))
    except RuntimeError:
        return False
    return True


def images_for(network: Network, model: torch.nn.Module, batch: int) -> Tensor:
    x = torch.rand((batch, *network.images), generator=torch.Generator().manual_seed(0))
    weight = next(p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1)
    return x.to(memory_format=torch.channels_last) if not weight.is_contiguous() else x


def training(network: Network, batch: int) -> dict[str, Call]:
    """A step of each side: forward, loss, backward, update; returns the loss."""
    calls = {}
    for side, model in sides_of(network).items():
        optimizer: Any = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
        if side != TORCH:
            optimizer = fastnn.optim.convert(optimizer)
        calls[side] = training_step(model.train(), optimizer, images_for(network, model, batch))
    return calls


def training_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Call:
    def step() -> Tensor:
        optimizer.zero_grad()
        loss = first_result(model(x)).square().mean()  # cheap on every side: the networks differ, not the losses
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def prediction(network: Network, batch: int) -> dict[str, Call]:
    calls = {}
    for side, model in sides_of(network).items():
        model.eval()
        if side == OURS:
            model = fastnn.convert(model, fold_batch_norm=True)
        calls[side] = forward(model, images_for(network, model, batch))
    return calls


def forward(model: torch.nn.Module, x: Tensor) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return first_result(model(x))

    return call


def measure(network: Network, what: str, batch: int, rounds: int, round_seconds: float) -> list[dict[str, Any]]:
    """One row for each of our two sides."""
    calls = {"training": training, "prediction": prediction}[what](network, batch)
    count, tolerance = CHECKS[what]
    outputs = {}
    for side, call in calls.items():
        torch.manual_seed(1)  # of dropout
        outputs[side] = [call() for _ in range(count)]
    check_outputs(outputs, tolerance)
    samples = interleave({side: repeated(call, round_seconds) for side, call in calls.items()}, rounds)
    rows = []
    for ours in (OURS, COMPILED):
        comparison = compare(samples, ours, TORCH)
        spreads = [Spread.of([batch / seconds for seconds in samples[side]]) for side in (ours, TORCH)]
        row = {
            "network": network.id,
            "what": what,
            "batch": batch,
            "side": ours,
            "ours": spreads[0].to_json(),
            "theirs": spreads[1].to_json(),
            "ratio": comparison.ratio.to_json(),
        }
        rows.append(row)
        print(
            f"{network.id}, {what}, batch {batch}: {spreads[1].median:,.1f} images/s before, "
            f"{spreads[0].median:,.1f} with {ours}: {describe_spread(row['ratio'])}",
            flush=True,
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=[network.id for network in NETWORKS], help="one network")
    parser.add_argument("--batch", type=int, default=8, help="images at once (8)")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS, help=f"at least {MIN_ROUNDS}, the default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="short rounds, to see that it works")
    parser.add_argument("--json", type=file_to_write, help="file to write the results to")
    options = parser.parse_args(arguments)
    print(f"{machine.summary(machine.describe())}; medians of {options.rounds} interleaved rounds")
    seconds = QUICK_ROUND_SECONDS if options.quick else ROUND_SECONDS
    rows = []
    with threads_and_isa(threads=options.threads):
        for network in NETWORKS:
            if options.only in (None, network.id):
                for what in ("training", "prediction"):
                    rows += measure(network, what, options.batch, options.rounds, seconds)
    if options.json:
        write_json(options.json, {"machine": machine.describe(), "rounds": options.rounds, "results": rows})


if __name__ == "__main__":
    main()
