"""Timing several ways to do the same thing so that their ratio can be trusted.

The sides take turns in one process, round by round, and a ratio is taken within a round: whatever slows the
machine for a second slows both. Results are medians with quartiles. Before any timing the sides' outputs are
compared, and that our side ran on our kernels.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import fastnn

MIN_ROUNDS = 7  # the fewest whose quartiles are no extremes: two samples lie beyond either
OURS = "fastnn"

Call = Callable[[], Any]
Samples = dict[str, list[float]]


class Disagreement(ValueError):  # noqa: N818 - names the finding
    """The sides did not compute the same, or our side was not ours: there is nothing to compare."""


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q1, q3)

    def to_json(self) -> dict[str, float]:
        return {name: significant(getattr(self, name)) for name in ("median", "q1", "q3")}


@dataclass(frozen=True)
class Comparison:
    """Our seconds against the other side's.

    Attributes:
        ours, theirs: seconds of one call.
        opponent: the other side's name.
        ratio: theirs / ours, above 1 where we are faster; the spread of the ratios of the single rounds.
    """

    ours: Spread
    theirs: Spread
    opponent: str
    ratio: Spread


def significant(value: float, digits: int = 4) -> float:
    """`value` with so many significant digits: more would only be noise in the result files."""
    return float(f"{value:.{digits}g}")


@contextmanager
def keep_pages() -> Iterator[bool]:
    """In the block the process keeps all memory that it has had, for results of any size; whether its allocator can.

    glibc gives a block beyond 32 MiB new pages with each allocation, unless a free piece as large happens to lie
    about, and clearing them takes longer than many an operator. Whether a side pays for it would be chance.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (AttributeError, TypeError, OSError):  # another C library
        yield False
        return
    most_maps, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    kept = bool(mallopt(most_maps, 0) and mallopt(trim_threshold, 2**31 - 1))
    try:
        yield kept
    finally:
        mallopt(most_maps, 1 << 16)
        mallopt(trim_threshold, 1 << 17)
        trim(0)


def check_outputs(outputs: Mapping[str, Any], tolerance: float, norm: str = "max") -> None:
    """Raises :class:`Disagreement` unless all sides returned the same.

    Args:
        outputs: of each side, a tensor or a list of tensors.
        tolerance: the largest difference accepted, as a fraction of the first side's root mean square.
        norm: ``"max"``, each element's difference; ``"rms"`` their root mean square, for gradients through
            maxima, which rounding may send to another, equally large element.
    """
    named = {side: [value] if isinstance(value, torch.Tensor) else list(value) for side, value in outputs.items()}
    (first, expected), *others = named.items()
    for side, values in others:
        if len(values) != len(expected):
            raise Disagreement(f"{first} returned {len(expected)} tensors, {side} {len(values)}")
        for index, (a, b) in enumerate(zip(expected, values, strict=True)):
            if a.shape != b.shape:
                raise Disagreement(f"output {index}: {first} returned {tuple(a.shape)}, {side} {tuple(b.shape)}")
            a, b = a.detach().double(), b.detach().double()
            scale = a.square().mean().sqrt().item()
            difference = (a - b).abs()
            size = difference.max().item() if norm == "max" else difference.square().mean().sqrt().item()
            # Written so that a NaN is refused.
            if not size <= tolerance * scale:
                raise Disagreement(
                    f"output {index}: {first} and {side} differ by {size:.3g} ({norm}), at values of "
                    f"root mean square {scale:.3g}; the tolerance is {tolerance:.1g} of that"
                )


def check_sides(calls: Mapping[str, Call], tolerance: float, norm: str = "max") -> list[str]:
    """Calls every side once, compares what they return, and tells which of our kernels ran.

    Raises:
        Disagreement: the outputs differ, or our side ran on torch.
    """
    outputs = {side: call() for side, call in calls.items() if side != OURS}
    with fastnn.explain_dispatch() as log:
        ours = calls[OURS]()
    if not log:
        raise Disagreement("none of our kernels ran")
    for record in log:
        if record.kernel == "torch":
            raise Disagreement(f"{record.operator} fell back to torch: {record.reason}")
    check_outputs({OURS: ours, **outputs}, tolerance, norm)
    return list(dict.fromkeys(f"{record.operator}: {record.kernel}" for record in log))


def repeated(
    call: Call, round_seconds: float, seconds_of: Callable[[Call, int], float] | None = None
) -> Callable[[], float]:
    """A round: as many calls as fill `round_seconds`, at least one; returns the seconds of one call.

    `seconds_of` tells the seconds of so many calls by another clock than the processor's, such as a GPU's.
    """
    seconds_of = seconds_of or _seconds
    call()
    count = 1
    while True:
        # The best of three: a call that the system interrupted would ask for too few.
        seconds = min(seconds_of(call, count) for _ in range(3))
        if seconds >= round_seconds / 2:
            return lambda: seconds_of(call, count) / count
        count = max(count + 1, min(10 * count, math.ceil(count * round_seconds / max(seconds, 1e-9))))


def _seconds(call: Call, count: int) -> float:
    """The seconds of `count` calls, without garbage collections, which fall on a side by chance."""
    repetitions = itertools.repeat(None, count)
    collecting = gc.isenabled()
    gc.disable()
    try:
        began = time.perf_counter()
        for _ in repetitions:
            call()
        return time.perf_counter() - began
    finally:
        if collecting:
            gc.enable()


def interleave(sides: Mapping[str, Callable[[], float]], rounds: int) -> Samples:
    """The seconds that each side returned in each round.

    Every round runs all sides, beginning with another one each time, so that none always follows the same.
    Callers warm the sides up first.

    Raises:
        ValueError: fewer than 7 rounds were asked for.
    """
    if rounds < MIN_ROUNDS:
        raise ValueError(f"rounds: expected at least {MIN_ROUNDS}, got {rounds}")
    samples: Samples = {side: [] for side in sides}
    order = list(sides)
    for _ in range(rounds):
        for side in order:
            samples[side].append(sides[side]())
        order.append(order.pop(0))
    return samples


def compare(samples: Samples, ours: str = OURS, theirs: str | None = None) -> Comparison:
    """Our side against `theirs`, or against the fastest of all others."""
    if theirs is None:
        theirs = min((side for side in samples if side != ours), key=lambda side: statistics.median(samples[side]))
    ratios = [b / a for a, b in zip(samples[ours], samples[theirs], strict=True)]
    return Comparison(Spread.of(samples[ours]), Spread.of(samples[theirs]), theirs, Spread.of(ratios))


def geometric_mean(values: Sequence[float]) -> float:
    """The mean that ratios have: of 2 and 1/2 it is 1."""
    return math.exp(statistics.fmean(map(math.log, values)))
