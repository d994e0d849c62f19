"""Named tensors and one JSON document in a safetensors file: models and checkpoints, without pickle.

The document sits in the safetensors metadata under the key "fastnn" together with the kind of file and the
format's version. Files are read as if a stranger had written them: nothing is allocated before the header was
checked, and every fault is a ModelFileError that names the file.
"""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastnn._extras import require
from fastnn._files import atomic_path

FORMAT_VERSION = 1


class ModelFileError(ValueError):
    """A file that is not a fastnn model or checkpoint, or is damaged, or was written by a newer version."""


def require_safetensors() -> Any:
    """The package safetensors, or an ImportError that says what to install."""
    require("safetensors.torch", "saving and loading models")
    return require("safetensors", "saving and loading models")


def write_tensor_file(
    path: str | os.PathLike[str], kind: str, document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Writes `tensors` and the JSON-able `document`; an earlier file stays until the new one is whole."""
    safetensors = require_safetensors()
    header = json.dumps({"kind": kind, "format_version": FORMAT_VERSION, **document})
    # Cloned: the format refuses tensors that share memory, as the best epoch's and the last one's may.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    content = safetensors.torch.save(copies, metadata={"fastnn": header})  # of several keys the order is random
    with atomic_path(Path(path)) as temp:
        # Python's own write: a full disk is an OSError, where the package would raise its own.
        temp.write_bytes(content)


class TensorFile:
    """An open file: its document, the shapes its header promises, and its tensors on demand."""

    def __init__(self, path: Path, document: dict[str, Any], handle: Any) -> None:
        self.path = path
        self.document = document
        self.shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118 (not iterable itself)
        self._handle = handle

    def take(self, name: str) -> torch.Tensor:
        """The tensor, once: a document that names one tensor often must not multiply the memory it takes."""
        del self.shapes[name]
        # A copy: the handle's tensor is a map of the file and would change or fault when the file does.
        tensor: torch.Tensor = self._handle.get_tensor(name).clone()
        return tensor


@contextmanager
def open_tensor_file(path: str | os.PathLike[str], kind: str) -> Iterator[TensorFile]:
    """Opens a file of this kind; raises ModelFileError for any other, OSError where it cannot be read."""
    safetensors = require_safetensors()
    path = Path(path)
    # safe_open words a missing file and a folder differently on every system, and cannot map an empty file.
    with open(path, "rb") as probe:
        if not probe.read(1):
            raise ModelFileError(f"{path}: expected a fastnn {kind} file, got an empty file")
    try:
        with safetensors.safe_open(path, framework="pt") as handle:
            document = _checked_document(path, kind, handle.metadata())
            yield TensorFile(path, document, handle)
    except safetensors.SafetensorError as error:
        raise ModelFileError(f"{path}: not a fastnn {kind} file, or truncated or damaged ({error})") from error


def _checked_document(path: Path, kind: str, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    if not metadata or "fastnn" not in metadata:
        raise ModelFileError(f'{path}: a safetensors file, but not a fastnn {kind}: its metadata has no "fastnn" entry')
    try:
        document = json.loads(metadata["fastnn"])
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: the fastnn metadata is not valid JSON ({error})") from error
    if not isinstance(document, dict):
        raise ModelFileError(f"{path}: the fastnn metadata: expected a JSON object, got {type(document).__name__}")
    version = document.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ModelFileError(f"{path}: format_version: expected a positive integer, got {version!r}")
    if version > FORMAT_VERSION:
        raise ModelFileError(
            f"{path}: written in format version {version}, this fastnn reads up to {FORMAT_VERSION}; update fastnn"
        )
    if document.get("kind") != kind:
        raise ModelFileError(f"{path}: expected a fastnn {kind}, got a fastnn {document.get('kind')!r} file")
    return document


def pack(value: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    """`value` as JSON that keeps tuples, Counters and keys of any type; its tensors go to `tensors`.

    Numbers of numpy's, which schedules compute, become Python's.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        while name in tensors:  # the keys 0 and "0" of one dictionary
            name += "'"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        tag = "counter" if isinstance(value, collections.Counter) else "dict"
        return {
            tag: [
                [pack(key, tensors, f"{name}.key"), pack(item, tensors, f"{name}.{key}")] for key, item in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        items = [pack(item, tensors, f"{name}.{index}") for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(
        f"{name}: a checkpoint stores numbers, strings, tensors and containers of them, got {type(value).__name__}"
    )


def unpack(value: Any, file: TensorFile) -> Any:
    """The inverse of `pack`, with the tensors read from `file`."""
    if isinstance(value, list):
        return [unpack(item, file) for item in value]
    if not isinstance(value, dict):
        return value
    try:
        ((tag, content),) = value.items()
        if tag == "tensor" and content in file.shapes:
            return file.take(content)
        if tag == "tuple":
            return tuple(unpack(item, file) for item in content)
        if tag in ("dict", "counter"):
            pairs = {unpack(key, file): unpack(item, file) for key, item in content}
            return collections.Counter(pairs) if tag == "counter" else pairs
    except (TypeError, ValueError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{file.path}: damaged state ({error})") from error
    raise ModelFileError(f"{file.path}: damaged state: nothing known under {str(value)[:60]}")
