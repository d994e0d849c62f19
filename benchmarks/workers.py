"""Measurements that need a process of their own: peak memory, and two trainings at once.

python workers.py memory {fastnn,torch} NET BATCH THREADS      prints bytes
python workers.py throughput NET BATCH THREADS SECONDS         answers each line on stdin with images/s
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from nets import NETS, Net, load_images, loop_epoch

import fastnn

WARM_UP_BATCH = 2  # loads libraries and makes gradients and optimizer state, but no activations of note
MEMORY_STEPS = 3
THROUGHPUT_IMAGES = 3200


class Worker:
    """A process that first prints a JSON object, then answers every line it is sent with a number."""

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.facts: dict[str, Any] = json.loads(self._line())

    def ask(self) -> float:
        self.start()
        return self.result()

    def start(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def result(self) -> float:
        return float(self._line())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise RuntimeError(f"{' '.join(map(str, self.process.args))}: ended with code {code}")  # type: ignore[arg-type]
        return line


def script(name: str, *arguments: object) -> list[str]:
    """The command that runs a script of this folder in this interpreter."""
    return [sys.executable, str(Path(__file__).with_name(name)), *map(str, arguments)]


# ------------------------------------------------------------------------------------------------ in the process


def peak_memory(side: str, net: Net, batch: int) -> int:
    """Bytes by which training steps raise the process's peak over what it held before."""
    train = load_images(net, None)[0].first(MEMORY_STEPS * batch)
    pixels, labels = train.scaled, train.labels
    step = _fastnn_step(net) if side == "fastnn" else _torch_step(net)
    step(pixels[:WARM_UP_BATCH], labels[:WARM_UP_BATCH])
    gc.collect()
    _give_back_free_memory()
    before = _reset_peak()
    for start in range(0, len(train), batch):
        step(pixels[start : start + batch], labels[start : start + batch])
    return _peak() - before


def _fastnn_step(net: Net) -> Callable[[torch.Tensor, torch.Tensor], object]:
    model = net.classifier()
    optimizer = fastnn.optim.Adam(model.parameters())
    return fastnn.training.compile_step(model, fastnn.nn.CrossEntropyLoss(), optimizer)


def _torch_step(net: Net) -> Callable[[torch.Tensor, torch.Tensor], object]:
    model = net.torch_model()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        pixels = images.permute(0, 2, 3, 1).contiguous()
        loop_epoch(model, optimizer, pixels, labels, len(labels), shuffle=False)

    return step


def _give_back_free_memory() -> None:
    """Or steps would use what the heap still holds, and raise no peak. glibc alone keeps so much."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_peak() -> int:
    """Bytes held now; Linux then counts the peak afresh, elsewhere it stays at the highest so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()
    return _status("VmRSS")


def _peak() -> int:
    """The most bytes held since the last reset.

    On Linux from /proc, because ru_maxrss also remembers the process that started this one.
    """
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def serve_throughput(net: Net, batch: int, seconds: float) -> None:
    """After each line on stdin, trains for so long and prints images per second."""
    model = net.classifier()
    train = load_images(net, None)[0].first(THROUGHPUT_IMAGES)
    pixels = train.scaled

    def images_per_second(limit: float) -> float:
        began = time.perf_counter()
        epochs: list[object] = []

        def stop(_model: object, record: object) -> bool:
            epochs.append(record)
            return time.perf_counter() - began >= limit

        model.fit(pixels, train.labels, epochs=10**6, batch_size=batch, progress=False, callbacks=[stop])
        return len(epochs) * len(train) / (time.perf_counter() - began)

    images_per_second(0)
    print(json.dumps({"images": len(train)}), flush=True)
    for _ in sys.stdin:
        print(images_per_second(seconds), flush=True)


def main(arguments: Sequence[str]) -> None:
    task, *rest = arguments
    if task == "memory":
        side, net, batch, threads = rest
        torch.set_num_threads(int(threads))
        print(peak_memory(side, NETS[net], int(batch)))
    else:
        net, batch, threads, seconds = rest
        torch.set_num_threads(int(threads))
        serve_throughput(NETS[net], int(batch), float(seconds))


if __name__ == "__main__":
    main(sys.argv[1:])
