"""Damaged files: an error that names the file, never a crash, a hang, or memory that the file does not warrant.

Every reader gets valid files with bytes flipped, cut, repeated and replaced, and documents with values exchanged.
Memory is measured by the system: the address space may grow by a fixed allowance only.
"""

from __future__ import annotations

import gzip
import io
import json
import resource
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st

from fastnn import CNNClassifier, data
from fastnn._tensor_files import open_tensor_file, pack, unpack, write_tensor_file
from fastnn.data import DataError
from fastnn.training import ModelFileError

safetensors = pytest.importorskip("safetensors")
image_module = pytest.importorskip("PIL.Image")

ALLOWANCE = 256 << 20  # of address space: a thread's stack and arena take 72 MiB of it without being used
SECONDS = 10  # for files of a few kilobytes, each read in milliseconds
STATM = Path("/proc/self/statm")

pytestmark = pytest.mark.skipif(not STATM.exists(), reason="needs /proc")


@contextmanager
def bounded() -> Iterator[None]:
    """Fails where the block takes more memory than the allowance (MemoryError) or longer than any file warrants."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(STATM.read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ALLOWANCE, before[1]))
    started = time.monotonic()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - started < SECONDS


def test_the_allowance_is_enforced() -> None:
    with pytest.raises(MemoryError), bounded():
        bytearray(2 * ALLOWANCE)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes with one to four faults."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        if not changed:
            break
        # Headers are short and decide most: half of the faults hit the first bytes or the last.
        end = min(len(changed), draw(st.sampled_from([16, 64, 256, len(changed)]))) - 1
        place = draw(st.integers(0, end)) if draw(st.booleans()) else len(changed) - 1 - draw(st.integers(0, end))
        kind = draw(st.sampled_from(["flip", "byte", "huge", "cut", "insert", "repeat", "drop"]))
        if kind == "flip":
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte":
            changed[place] = draw(st.integers(0, 255))
        elif kind == "huge":
            changed[place : place + 4] = draw(
                st.sampled_from([b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\x80", b"\0" * 4])
            )
        elif kind == "cut":
            del changed[place:]
        elif kind == "insert":
            changed[place:place] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "repeat":
            changed[place:place] = changed[place : place + draw(st.integers(1, 64))]
        else:
            del changed[place : place + draw(st.integers(1, 16))]
    return bytes(changed)


def read_damaged(content: bytes, name: str, read: Callable[[Path], Any], error: type[Exception]) -> None:
    """Reads the bytes as a file; they may still be valid, and any fault is this error, which names the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            with warnings.catch_warnings(), bounded():
                warnings.simplefilter("ignore")  # Pillow warns of odd metadata
                read(path)
        except error as raised:
            assert name.partition(".")[0] in str(raised), raised


# Data


def idx(array: np.ndarray) -> bytes:
    codes = {np.dtype("u1"): 0x08, np.dtype(">i4"): 0x0C, np.dtype(">f8"): 0x0E}
    return bytes([0, 0, codes[array.dtype], array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def archive(compress: bool) -> bytes:
    images = np.arange(12 * 8 * 8, dtype=np.uint8).reshape(12, 8, 8)
    buffer = io.BytesIO()
    save = np.savez_compressed if compress else np.savez
    save(buffer, x_train=images, y_train=np.arange(12) % 3, x_test=images[:3], y_test=np.arange(3))
    return buffer.getvalue()


def picture(kind: str) -> bytes:
    pixels = np.arange(16 * 12 * 3, dtype=np.uint8).reshape(16, 12, 3)
    buffer = io.BytesIO()
    image_module.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def cifar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
            content = b"".join(bytes([label]) + bytes(3072) for label in range(10))
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


BYTES = idx(np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3))
DATA_FILES: dict[str, tuple[str, bytes, Callable[[Path], Any]]] = {
    "idx": ("images-idx3-ubyte", BYTES, data.read_idx),
    "idx_int32": ("damaged.idx", idx(np.arange(6, dtype=">i4").reshape(2, 3)), data.read_idx),
    "idx_float64": ("damaged.idx", idx(np.linspace(0, 1, 6).astype(">f8")), data.read_idx),
    "idx_gzip": ("damaged-idx.gz", gzip.compress(BYTES), data.read_idx),
    "npz": ("damaged.npz", archive(False), data.load),
    "npz_compressed": ("damaged.npz", archive(True), data.load),
    "cifar": ("cifar10.tar.gz", cifar(), lambda path: data._load_cifar10(path, data.DOWNLOADS["cifar10"].classes)),
} | {
    kind: (f"damaged.{kind}", picture(kind), lambda path: data.load_images([path], channels=3, size=(8, 8)))
    for kind in ("png", "jpeg", "gif", "bmp", "webp", "tiff", "ppm")
}


def test_a_picture_that_claims_four_gigabytes_takes_as_much_as_it_has(tmp_path: Path) -> None:
    intact, claiming = tmp_path / "intact.png", tmp_path / "claiming.png"
    content = bytearray(picture("png"))
    intact.write_bytes(content)
    at = content.index(b"IDAT")
    content[at - 4 : at] = b"\xff\xff\xff\xff"
    claiming.write_bytes(content)
    with bounded():
        images, _ = data.load_images([intact, claiming], channels=3, size=(8, 8))
    assert np.array_equal(images[0], images[1])


@pytest.mark.parametrize("kind", DATA_FILES)
@fuzz(12)
@given(st.data())
def test_damaged_data(kind: str, data: st.DataObject) -> None:
    name, content, read = DATA_FILES[kind]
    read_damaged(data.draw(damaged(content)), name, read, DataError)


def claiming_idx(shape: tuple[int, ...]) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes() + bytes(100)


def claiming_npy(header: str) -> bytes:
    text = header.encode("latin1") + b"\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as members:
        members.writestr("x_train.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64))
        members.writestr("y_train.npy", b"")
    return buffer.getvalue()


def claiming_png() -> bytes:
    """A header of 13,000 x 13,000 pixels, below Pillow's own limit, and the data of 16 x 12."""
    content = bytearray(picture("png"))
    content[16:24] = (13_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


def claiming_gif() -> bytes:
    content = bytearray(picture("gif"))
    content[6:10] = (13_000).to_bytes(2, "little") * 2
    return bytes(content)


CLAIMS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "idx_4_billion": ("a-idx3", lambda: claiming_idx((2**32 - 1, 28, 28))),
    "idx_overflow": ("a-idx", lambda: claiming_idx((2**31, 2**31, 2**31, 2**31))),
    "idx_255_dimensions": ("a-idx", lambda: claiming_idx((1,) * 255)),
    "idx_gzip": ("a-idx.gz", lambda: gzip.compress(claiming_idx((60_000, 28, 28)))),
    "npy_huge": ("a.npz", lambda: claiming_npy("{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999,)}")),
    "npy_negative": ("a.npz", lambda: claiming_npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-8, -8)}")),
    "npy_nested": ("a.npz", lambda: claiming_npy("(" * 9000)),
    "npy_object": ("a.npz", lambda: claiming_npy("{'descr': '|O', 'fortran_order': False, 'shape': (8,)}")),
    "png_claims": ("a.png", claiming_png),
    "gif_claims": ("a.gif", claiming_gif),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_file_that_claims_too_much_is_refused(claim: str, tmp_path: Path) -> None:
    name, make = CLAIMS[claim]
    path = tmp_path / name
    path.write_bytes(make())
    read = data.read_idx if "idx" in name else lambda p: data.load_images([p], channels=1, size=(8, 8))
    if claim.startswith("npy"):
        read = data.load
    with warnings.catch_warnings(), bounded(), pytest.raises(DataError, match=name):
        warnings.simplefilter("ignore")
        read(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], ids=["bzip2", "lzma"])
def test_compressions_without_a_limit_are_refused(compression: int, tmp_path: Path) -> None:
    """Python unpacks a block of these at once: four kilobytes may become a hundred megabytes."""
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(io.BytesIO(archive(False))) as stored, zipfile.ZipFile(path, "w") as other:
        for name in stored.namelist():
            other.writestr(name, stored.read(name), compression)
    with pytest.raises(DataError, match=r"a\.npz .*expected an array stored or deflated"):
        data.load(path)


def test_a_large_picture_of_little_is_read(tmp_path: Path) -> None:
    """Blank pictures compress to almost nothing and are still pictures."""
    image_module.new("RGB", (4000, 4000)).save(tmp_path / "a.png")
    images, _ = data.load_images([tmp_path / "a.png"], channels=1, size=(8, 8))
    assert images.shape == (1, 1, 8, 8)
    assert not images.any()


# Models and checkpoints

IMAGES, LABELS = np.arange(6 * 64, dtype=np.uint8).reshape(6, 8, 8), [0, 1, 2] * 2


def tiny() -> CNNClassifier:
    return CNNClassifier((1, 8, 8), 3, conv_channels=(2,), hidden=(4,))


def train_tiny(path: Path, resume: bool) -> None:
    tiny().fit(IMAGES, LABELS, epochs=2, batch_size=3, seed=0, progress=False, checkpoint=path, resume=resume)


def written(write: Callable[[Path], Any]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.safetensors"
        write(path)
        return path.read_bytes()


MODEL_FILES: dict[str, tuple[bytes, Callable[[Path], Any]]] = {
    "model": (written(tiny().save), CNNClassifier.load),
    "checkpoint": (written(lambda path: train_tiny(path, False)), lambda path: train_tiny(path, True)),
}


@pytest.mark.parametrize("kind", MODEL_FILES)
@fuzz(25)
@given(st.data())
def test_damaged_models(kind: str, data: st.DataObject) -> None:
    content, read = MODEL_FILES[kind]
    # ValueError: settings that read as those of another run; ModelFileError is one too.
    read_damaged(data.draw(damaged(content)), "file.safetensors", read, ValueError)


def test_checkpoints_hold_numbers_of_numpys(tmp_path: Path) -> None:
    state = {"lr": np.float64(0.5), np.int64(2): (np.float32(1.5), np.bool_(True))}
    path = tmp_path / "file.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    write_tensor_file(path, "checkpoint", {"state": pack(state, tensors, "state")}, tensors)
    with open_tensor_file(path, "checkpoint") as file:
        read = unpack(file.document["state"], file)
    assert read == {"lr": 0.5, 2: (1.5, True)}
    assert [type(value) for value in (read["lr"], *read[2])] == [float, float, bool]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.sampled_from([2**31, 2**63, 10**30, 0.5, float("nan"), "tensor"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["tensor", "dict", "a"]), inner, max_size=2)
    ),
    max_leaves=6,
)


@st.composite
def exchanged(draw: st.DrawFn, document: Any) -> Any:
    """The document with the value at one place exchanged, dropped or repeated."""
    if isinstance(document, dict) and document and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(document)))
        return {**document, key: draw(exchanged(document[key]))}
    if isinstance(document, list) and document and draw(st.integers(0, 3)):
        place = draw(st.integers(0, len(document) - 1))
        kind = draw(st.sampled_from(["exchange", "drop", "repeat"]))
        if kind == "exchange":
            return [*document[:place], draw(exchanged(document[place])), *document[place + 1 :]]
        return document[:place] + document[place:] * (2 if kind == "repeat" else 0)
    return draw(JSON)


@pytest.mark.parametrize("kind", MODEL_FILES)
@fuzz(25)
@given(st.data())
def test_damaged_documents(kind: str, data: st.DataObject) -> None:
    content, read = MODEL_FILES[kind]
    tensors = safetensors.torch.load(content)
    length = int.from_bytes(content[:8], "little")
    document = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["fastnn"])
    metadata = {"fastnn": json.dumps(data.draw(exchanged(document)))}
    read_damaged(safetensors.torch.save(tensors, metadata), "file.safetensors", read, ValueError)


def model_file(config: dict[str, Any]) -> bytes:
    document = {"kind": "model", "format_version": 1, "config": config, "classes": None}
    return safetensors.torch.save({"a": torch.zeros(1)}, {"fastnn": json.dumps(document)})


def claiming_header(length: int) -> bytes:
    return length.to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + bytes(4)


BASE = {"input_shape": [1, 8, 8], "num_classes": 3}
MODEL_CLAIMS: dict[str, Callable[[], bytes]] = {
    "header_of_2_to_63": lambda: claiming_header(2**63),
    "header_of_90_MB": lambda: claiming_header(90_000_000),
    "many_layers": lambda: model_file({**BASE, "conv_channels": [], "hidden": [1] * 200_000}),
    "many_blocks": lambda: model_file({**BASE, "conv_channels": [1] * 200_000, "kernel_size": 3, "padding": 2}),
    "wide_layers": lambda: model_file({**BASE, "hidden": [2**31, 2**31]}),
    "many_classes": lambda: model_file({**BASE, "num_classes": 2**40}),
    "large_images": lambda: model_file({**BASE, "input_shape": [2**40, 2**40, 2**40]}),
    "large_kernel": lambda: model_file({**BASE, "input_shape": [1, 2**20, 2**20], "kernel_size": 2**19}),
    "deep_document": lambda: safetensors.torch.save({"a": torch.zeros(1)}, {"fastnn": "[" * 100_000}),
}


@pytest.mark.parametrize("claim", MODEL_CLAIMS)
def test_a_model_that_claims_too_much_is_refused(claim: str, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(MODEL_CLAIMS[claim]())
    with bounded(), pytest.raises(ModelFileError, match=r"file\.safetensors"):
        CNNClassifier.load(path)
