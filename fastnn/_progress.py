"""How `fit` shows its progress: a bar on a terminal, a line per epoch elsewhere, the log when quiet."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any, Protocol

logger = logging.getLogger("fastnn")

# Redraws a second. Each costs about a millisecond, so the bar takes about one percent of the time.
REFRESH_RATE = 10


class Progress(Protocol):
    def start_epoch(self, epoch: int, epochs: int, images: int) -> None: ...

    def advance(self, images: int, loss: float, accuracy: float) -> None: ...

    def end_epoch(self, record: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def make_progress(shown: bool) -> Progress:
    """A bar on a terminal where rich is installed, else a line per epoch, printed or (not shown) logged."""
    if not shown:
        return LineProgress(logger.info)
    try:
        from rich.console import Console
    except ImportError:
        return LineProgress(_print_line)
    console = Console()
    return BarProgress(console) if console.is_terminal else LineProgress(_print_line)


def _print_line(line: str) -> None:
    print(line, flush=True)


def describe(record: Mapping[str, float]) -> str:
    """`loss 0.1234  accuracy 0.9678  …  41,234 images/s`"""
    parts = [f"{key} {record[key]:.4f}" for key in ("loss", "accuracy", "val_loss", "val_accuracy") if key in record]
    return "  ".join([*parts, f"{record['images_per_second']:,.0f} images/s"])


class LineProgress:
    def __init__(self, write: Any) -> None:
        self._write = write
        self._title = ""

    def start_epoch(self, epoch: int, epochs: int, images: int) -> None:
        self._title = f"epoch {epoch}/{epochs}"

    def advance(self, images: int, loss: float, accuracy: float) -> None:
        pass

    def end_epoch(self, record: Mapping[str, float]) -> None:
        self._write(f"{self._title}  {describe(record)}")

    def close(self) -> None:
        pass


class BarProgress:
    """A bar for the epoch under way; a finished epoch's results stay above it as a line."""

    def __init__(self, console: Any) -> None:
        from rich import progress

        # 12 characters of bar, so that the line fits 80 columns. No refresh thread: it would take the
        # interpreter from the training loop.
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=12),
            progress.TextColumn("{task.fields[results]}"),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task("", results="")
        self._bar.start()
        self._title = ""
        self._done = 0
        self._began = self._drawn = 0.0

    def start_epoch(self, epoch: int, epochs: int, images: int) -> None:
        self._title = f"epoch {epoch}/{epochs}"
        self._bar.reset(self._task, total=images, description=self._title, results="")
        self._done = 0
        self._began = self._drawn = time.perf_counter()

    def advance(self, images: int, loss: float, accuracy: float) -> None:
        self._done += images
        now = time.perf_counter()
        if now - self._drawn < 1 / REFRESH_RATE:
            return
        self._drawn = now
        results = {"loss": loss, "accuracy": accuracy, "images_per_second": self._done / (now - self._began)}
        self._bar.update(self._task, completed=self._done, results=describe(results), refresh=True)

    def end_epoch(self, record: Mapping[str, float]) -> None:
        self._bar.console.print(f"{self._title}  {describe(record)}", highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()
