"""The extension module's set-up: which instruction set runs, what was built, which kernel served a call."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastnn import _C

_EMULATED: bool = _C.is_emulator()


_C.initialise(
    torch.Tensor,
    torch.nn.Parameter,
    torch.get_num_threads,
    torch.OutOfMemoryError,
    torch.is_grad_enabled,
    (
        torch._C._is_any_autocast_enabled,
        torch._C._are_functorch_transforms_active,
        torch._C._get_tracing_state,
        torch._C._len_torch_dispatch_stack,
    ),
)
if os.environ.get("FASTNN_ISA"):
    try:
        _C.set_isa(os.environ["FASTNN_ISA"])
    except ValueError as error:
        raise ImportError(f"FASTNN_ISA: {error}") from None


_WIDE_DTYPES = frozenset((torch.float32, torch.float64))
_CUDA_DTYPES = _WIDE_DTYPES | {torch.bfloat16, torch.float16}
_CPU_DTYPES = _CUDA_DTYPES if _EMULATED else _WIDE_DTYPES
_KERNEL_DTYPES = {"cpu": _CPU_DTYPES, "meta": _WIDE_DTYPES}
if not _EMULATED and _C.build_facts()["cuda"]:
    _KERNEL_DTYPES["cuda"] = _KERNEL_DTYPES["meta"] = _CUDA_DTYPES


def kernel_dtypes(device: torch.device) -> frozenset[torch.dtype] | None:
    """The dtypes that kernels serve on a device; None where there are none, as on a GPU that the build has no code
    for."""
    if device.type == "cuda" and not (_EMULATED or _C.device_has_code(device.index or 0)):
        return None
    return _KERNEL_DTYPES.get(device.type)


def kernel_dtypes_at(tensor: torch.Tensor) -> frozenset[torch.dtype] | None:
    """``kernel_dtypes(tensor.device)``, without asking for the device on the CPU, which takes four times as long."""
    return _CPU_DTYPES if tensor.is_cpu else kernel_dtypes(tensor.device)


def runs_on_cuda(tensor: torch.Tensor) -> bool:
    """Whether CUDA's kernels serve this tensor: on a GPU, or on the CPU under the emulator."""
    return tensor.is_cuda or _EMULATED


def available_isas() -> list[str]:
    """Instruction sets that were compiled in and that this CPU runs, plainest first: ``["baseline", "avx2"]``."""
    return _C.available_isas()


def get_isa() -> str:
    """The instruction set in use: the last of :func:`available_isas`, unless forced."""
    return _C.get_isa()


def set_isa(name: str) -> None:
    """Forces an instruction set for the whole process; the environment variable ``FASTNN_ISA`` does it at import.

    Raises:
        ValueError: where ``name`` was not compiled in or this CPU cannot run it; the message lists those it can.
    """
    _C.set_isa(name)


@contextmanager
def thread_limit(threads: int | None) -> Iterator[None]:
    """Runs the block on so many of torch's threads; on as many as before where it is None."""
    if threads is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def without_spinning_threads() -> Iterator[None]:
    """For what torch would share among OpenMP's threads between compiled steps: they spin for milliseconds afterwards,
    on cores that the steps need. Only the calling thread is limited: torch.set_num_threads(1) would stay in force in
    threads that first use torch meanwhile."""
    before = _C.set_openmp_threads(1)
    try:
        yield
    finally:
        _C.set_openmp_threads(before)


def build_info() -> dict[str, Any]:
    """Facts of this build and machine.

    Returns:
        A dict with ``version``, ``compiler``, ``isa`` (in use), ``isas_available``, ``isas_compiled``, ``openmp``
        (path of the runtime), ``threads``, ``cuda`` (compiled in), ``cuda_architectures``, ``cuda_devices``.
    """
    facts: dict[str, Any] = _C.build_facts()
    facts["isa"] = _C.get_isa()
    facts["isas_available"] = _C.available_isas()
    facts["threads"] = _C.num_threads()
    return facts


@dataclass(frozen=True)
class DispatchRecord:
    """One operator call: what served it."""

    operator: str
    kernel: str  # the kernel's variant, or "torch" where torch's operator served the call
    isa: str
    dtype: str
    device: str
    reason: str  # why torch served it; empty for kernels


_log: list[DispatchRecord] | None = None
_ran: list[DispatchRecord] = []  # kernels' records of the block that were taken out of the module before its end


@contextmanager
def explain_dispatch() -> Iterator[list[DispatchRecord]]:
    """Records which kernel, or torch's operator, served each call made in the block.

    The list is filled when the block ends: torch's records first, then the kernels' in the order they ran.

    Example:
        >>> with fastnn.explain_dispatch() as log:
        ...     model(images)
        >>> for record in log: print(record)
    """
    global _log
    if _log is not None:
        raise RuntimeError("explain_dispatch: expected no enclosing explain_dispatch block, got one")
    records: list[DispatchRecord] = []
    _log = records
    _C.trace_start()
    try:
        yield records
    finally:
        _log = None
        records += _ran + _take_kernels()
        _ran.clear()


@contextmanager
def capture_kernels() -> Iterator[list[DispatchRecord]]:
    """Keeps apart the records of kernels that a CUDA graph captures in the block instead of running them."""
    _ran.extend(_take_kernels())
    captured: list[DispatchRecord] = []
    _C.trace_start()
    try:
        yield captured
    finally:
        captured += _take_kernels()
        if _log is not None:
            _C.trace_start()


def note_kernels(records: list[DispatchRecord]) -> None:
    """Records that kernels ran without a call, as those of a CUDA graph do."""
    if _log is not None:
        _ran.extend(_take_kernels() + records)
        _C.trace_start()


def _take_kernels() -> list[DispatchRecord]:
    """The kernels' records since tracing began, which ends it."""
    return [DispatchRecord(*record, reason="") for record in map(_named_device, _C.trace_stop())]


def _named_device(record: tuple[str, str, str, str, int]) -> tuple[str, str, str, str, str]:
    *names, device = record
    return (*names, "cpu" if device < 0 else f"cuda:{device}")  # type: ignore[return-value]


def note_fallback(operator: str, reason: str) -> None:
    """Records that torch's operator serves this call."""
    if _log is not None:
        _log.append(DispatchRecord(operator, "torch", "", "", "", reason))
