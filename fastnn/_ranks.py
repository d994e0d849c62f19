"""Training with several processes: who takes which images, and how their results come together.

Every process (rank) holds the whole model and all the images. A batch is cut into shares, one a rank. Between backward
and update the ranks add up loss, right answers and gradients, each weighted by its share, so that all make the update
that one process would make of the whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


class Ranks:
    """torch.distributed's default group of processes, or this process alone where there is none."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This rank's part of some rows; none where there are more ranks than rows."""
        return rows.tensor_split(self.size)[self.rank]

    def from_first(self, value: Any) -> Any:
        """Rank 0's value of this object."""
        if self.size == 1:
            return value
        values = [value]
        self._meet(lambda: dist.broadcast_object_list(values))
        return values[0]

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """Rank 0 runs the block alone, then the others do: what it fetches once, they find."""
        if not self.first:
            self.from_first(None)
        yield
        if self.first:
            self.from_first(None)

    def check_same(self, **values: Any) -> None:
        """ValueError on every rank, which names the value, where one differs between ranks."""
        if self.size == 1:
            return
        everyones: list[Any] = [None] * self.size
        self._meet(lambda: dist.all_gather_object(everyones, values))
        for name in values:
            got = [each[name] for each in everyones]
            if any(value != got[0] for value in got):
                raise ValueError(f"{name}: expected the same on every rank, got {', '.join(map(str, got))}")

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Every tensor becomes rank 0's."""
        if self.size > 1:
            self._together(list(tensors), lambda flat: dist.broadcast(flat, 0))

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Every tensor becomes the sum of all ranks'. The same bits everywhere."""
        if self.size > 1:
            self._together(tensors, dist.all_reduce)

    def any(self, answer: bool, device: torch.device) -> bool:
        """Whether a rank says yes; asked through memory of a device that the group serves."""
        count = torch.tensor(float(answer), device=device)
        self.add_up([count])
        return bool(count)

    def _together(self, tensors: Sequence[Tensor], collective: Callable[[Tensor], Any]) -> None:
        """One collective for all: its latency is more than the copies of a small network's parameters take."""
        with torch.no_grad():
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            self._meet(lambda: collective(flat))
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def _meet(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except RuntimeError as error:
            raise ConnectionError(
                f"rank {self.rank} of {self.size}: lost contact with the other ranks ({error})"
            ) from error


class Average:
    """Called between backward and update: makes the whole batch's numbers out of those of the ranks' shares.

    `weight` is the share of the batch that this rank has just worked on.
    """

    def __init__(self, ranks: Ranks, parameters: Iterable[torch.nn.Parameter]) -> None:
        self.ranks = ranks
        self.parameters = list(parameters)
        self.weight = 1.0

    def __call__(self, loss: Tensor, correct: Tensor) -> None:
        means = [loss, *(parameter.grad for parameter in self.parameters if parameter.grad is not None)]
        for mean in means:
            mean.mul_(self.weight)
        # As a float: one type for all that is sent. It counts exactly up to 2^24 images a batch.
        count = correct.to(torch.float32).mul_(self.weight > 0)
        self.ranks.add_up([*means, count])
        correct.copy_(count)


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The ranks that torchrun started, joined for the block; this process alone where torchrun did not start it."""
    if not dist.is_torchelastic_launched():
        yield Ranks()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Ranks()
    finally:
        dist.destroy_process_group()
