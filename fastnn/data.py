"""Image classification data: known data sets, IDX files, Keras archives and folders of pictures.

:func:`load` turns every source into two :class:`Dataset` objects, training and test. Nothing is trusted: a
file that is not what its header claims raises :class:`DataError`, and no memory is reserved for bytes that
are not there.
"""

from __future__ import annotations

import errno
import gzip
import io
import math
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch.nn.functional import interpolate

from fastnn._downloads import CIFAR10_ARCHIVE, DIGIT_CLASSES, DOWNLOADS, DownloadError, fetch, progress_bar
from fastnn._extras import require

DIGITS_TEST_FRACTION = 0.2  # 359 of 1797 images: enough for a test accuracy to half a percent
FOLDER_TEST_FRACTION = 0.1


class DataError(ValueError):
    """Data that cannot be used; the message names what was expected and what came."""


@dataclass(frozen=True)
class Dataset:
    """Labelled images.

    Attributes:
        images: uint8, shape (n, channels, height, width), 0 is black and 255 white.
        labels: int64, shape (n,), indices into ``classes``.
        classes: the names of the classes.
        name: where the images came from, for messages and titles.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise DataError(
                f"{self.name}: expected uint8 images of shape (n, channels, height, width), "
                f"got {self.images.dtype} of shape {self.images.shape}"
            )
        if self.labels.dtype != np.int64 or self.labels.ndim != 1:
            raise DataError(
                f"{self.name}: expected int64 labels of shape (n,), "
                f"got {self.labels.dtype} of shape {self.labels.shape}"
            )
        if len(self.images) != len(self.labels):
            raise DataError(
                f"{self.name}: expected one label per image, "
                f"got {len(self.images)} images and {len(self.labels)} labels"
            )
        if self.images.size == 0:
            raise DataError(f"{self.name}: expected at least one image, got shape {self.images.shape}")
        if len(self.classes) < 2:
            raise DataError(
                f"{self.name}: expected at least 2 classes, got {len(self.classes)} ({', '.join(self.classes)})"
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise DataError(
                f"{self.name}: expected labels from 0 to {len(self.classes) - 1}, got labels from {low} to {high}"
            )

    def __len__(self) -> int:
        return len(self.labels)


def load(
    source: str | os.PathLike[str],
    *,
    validation_split: float | None = None,
    seed: int = 0,
    image_size: int | tuple[int, int] | None = None,
    progress: bool = True,
) -> tuple[Dataset, Dataset]:
    """Load a data set as (training, test).

    Args:
        source: one of

            - ``"digits"``: scikit-learn's 1797 handwritten digits, 8x8 pixels scaled to 28x28, no download;
            - ``"mnist"``, ``"fashion-mnist"``, ``"kmnist"``, ``"cifar10"``: downloaded once and kept in the
              cache folder (``FASTNN_DATA``, else the user's cache);
            - a folder of IDX files with MNIST's names (``train-images-idx3-ubyte``, ...), gzipped or not;
            - a Keras-style ``.npz`` with ``x_train``, ``y_train`` and perhaps ``x_test``, ``y_test``;
            - a folder with one subfolder of pictures per class, or ``train/`` and ``test/`` of such folders.

            A folder that bears the name of a known data set is reached as ``"./digits"`` or as a Path.
        validation_split: fraction of the images, 0 to 1, taken as the test set where the source has none of
            its own (default 0.2 for ``"digits"``, else 0.1). Every class gives the same fraction.
        seed: chooses that fraction; the same seed gives the same split.
        image_size: height and width in pixels that every image is scaled to; one number for squares. Needed
            when pictures differ in size.
        progress: show a bar while downloading and while reading pictures.

    Raises:
        DataError: the source is missing, damaged, or not usable for classification.
        ImportError: the source needs a library of ``fastnn[app]`` that is not installed.
        OSError: the disk is full or a file cannot be read.
    """
    size = _checked_size(image_size)
    fraction = _checked_fraction(validation_split)
    train, test = _load_source(source, size, progress)
    if size is not None:
        train = replace(train, images=_resized(train.images, size))
        test = None if test is None else replace(test, images=_resized(test.images, size))
    if test is None:
        default = DIGITS_TEST_FRACTION if source == "digits" else FOLDER_TEST_FRACTION
        return _split(train, default if fraction is None else fraction, seed)
    if fraction is not None:
        raise DataError(f"{train.name} has its own test images ({len(test)}): leave validation_split out")
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"{test.name}: expected images of shape {train.images.shape[1:]} as in training, "
            f"got {test.images.shape[1:]}; image_size= brings them to one size"
        )
    return train, test


def _load_source(
    source: str | os.PathLike[str], size: tuple[int, int] | None, progress: bool
) -> tuple[Dataset, Dataset | None]:
    if source == "digits":
        return _load_digits(), None
    if isinstance(source, str) and source in DOWNLOADS:
        return _load_download(source, progress)
    path = Path(source)
    if os.path.isdir(source):  # unlike Path(""), which is the current folder, "" is none
        if any(_find_idx(path, stem) for stem in IDX_STEMS.values()):
            return _load_idx_folder(path)
        return _load_picture_folders(path, size, progress)
    if path.suffix.lower() == ".npz" and path.exists():
        return _load_npz(path)
    known = ", ".join(["digits", *DOWNLOADS])
    got = "a file of another kind" if os.path.exists(source) else "which does not exist"
    raise DataError(f"expected {known}, a folder or an .npz file; got {str(source)!r}, {got}")


def _checked_size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or any(not isinstance(n, int) or not 1 <= n <= 4096 for n in size):
        raise DataError(f"image_size: expected one or two numbers from 1 to 4096, got {image_size!r}")
    return size[0], size[1]


def _checked_fraction(validation_split: float | None) -> float | None:
    if validation_split is not None and not 0 < validation_split < 1:
        raise DataError(f"validation_split: expected a fraction between 0 and 1, got {validation_split}")
    return validation_split


# ------------------------------------------------------------------------------------------- images in memory


def _resized(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale (n, channels, height, width) uint8 images with an antialiased bilinear filter."""
    if images.shape[2:] == size:
        return images
    scaled = np.empty((*images.shape[:2], *size), dtype=np.uint8)
    chunk = 1024  # images at a time: float copies of a whole data set would need eight times its memory
    for start in range(0, len(images), chunk):
        block = torch.from_numpy(np.ascontiguousarray(images[start : start + chunk])).float()
        block = interpolate(block, size=size, mode="bilinear", antialias=True, align_corners=False)
        scaled[start : start + chunk] = block.round().clamp(0, 255).byte().numpy()
    return scaled


def with_channels(images: np.ndarray, channels: int, name: str) -> np.ndarray:
    """Bring (n, channels, height, width) images to grey (1) or colour (3)."""
    if images.shape[1] == channels:
        return images
    if images.shape[1] == 1:
        return np.repeat(images, channels, axis=1)
    if images.shape[1] == 3 and channels == 1:
        # ITU-R 601 luma in 16-bit fixed point, the weights of Pillow's own conversion to grey.
        red, green, blue = (images[:, c].astype(np.uint32) for c in range(3))
        grey = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
        return grey.astype(np.uint8)[:, None]
    raise DataError(f"{name}: expected images with {channels} channels, got {images.shape[1]}")


def _as_images(array: np.ndarray, name: str) -> np.ndarray:
    """Accept (n, h, w), (n, h, w, channels) and (n, channels, h, w), integers 0-255 or fractions 0-1."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[3] in (1, 3):
        array = np.moveaxis(array, 3, 1)
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        raise DataError(
            f"{name}: expected images of shape (n, height, width) or (n, height, width, 1 or 3), got {array.shape}"
        )
    if array.size == 0:
        raise DataError(f"{name}: expected at least one image, got shape {array.shape}")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind not in "iuf":
        raise DataError(f"{name}: expected images of numbers, got {array.dtype}")
    low, high = float(array.min()), float(array.max())
    if math.isnan(low) or math.isnan(high):
        raise DataError(f"{name}: expected pixels from 0 to 255, got NaN")
    if low < 0 or high > 255:
        raise DataError(f"{name}: expected pixels from 0 to 255 (or fractions from 0 to 1), got {low:g} to {high:g}")
    if array.dtype.kind == "f" and high <= 1:
        array = array * 255
    return np.ascontiguousarray(np.rint(array).astype(np.uint8))


def _split(data: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Take ``fraction`` of every class, at least one image, as the test set."""
    generator = np.random.default_rng(seed)
    in_test = np.zeros(len(data), dtype=bool)
    for label, name in enumerate(data.classes):
        members = np.flatnonzero(data.labels == label)
        if len(members) < 2:
            raise DataError(
                f"{data.name}: class {name!r} has {len(members)} image(s); "
                "splitting off a test set needs at least 2 of every class"
            )
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        in_test[generator.permutation(members)[:count]] = True
    parts = [
        replace(data, images=data.images[mask], labels=data.labels[mask], name=f"{data.name} ({part})")
        for part, mask in (("training", ~in_test), ("test", in_test))
    ]
    return parts[0], parts[1]


def _from_label_values(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray] | None,
    name: str,
    classes: tuple[str, ...] | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Make data sets from label values; without ``classes`` those that occur in training are the classes."""
    values = np.unique(train[1]) if classes is None else np.arange(len(classes))
    names = tuple(str(value) for value in values) if classes is None else classes

    def part(images: np.ndarray, labels: np.ndarray, which: str) -> Dataset:
        title = f"{name} ({which})"
        if len(images) != len(labels):
            raise DataError(f"{title}: expected one label per image, got {len(images)} images, {len(labels)} labels")
        strange = np.setdiff1d(labels, values)
        if len(strange):
            raise DataError(f"{title}: label {strange[0]} is out of range, expected one of {_listed(names)}")
        if classes is not None and which == "training":
            for index, count in enumerate(np.bincount(labels.astype(np.int64), minlength=len(classes))):
                if count == 0:
                    raise DataError(f"{title}: class {classes[index]!r} is empty")
        return Dataset(images, np.searchsorted(values, labels).astype(np.int64), names, title)

    if test is None:
        return replace(part(*train, "training"), name=name), None
    return part(*train, "training"), part(*test, "test")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:10])}, ... ({len(names)} in all)"


def _load_digits() -> Dataset:
    datasets = require("sklearn.datasets", "the digits data set")
    bunch = datasets.load_digits()
    # 17 grey levels, 0 to 16.
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    return Dataset(_resized(images, (28, 28)), bunch.target.astype(np.int64), DIGIT_CLASSES, "digits")


# -------------------------------------------------------------------------------------------------- IDX files

IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
IDX_STEMS = {
    "train images": "train-images-idx3-ubyte",
    "train labels": "train-labels-idx1-ubyte",
    "test images": "t10k-images-idx3-ubyte",
    "test labels": "t10k-labels-idx1-ubyte",
}
# Deflate cannot compress further, so a file that claims more than this is lying.
MAX_DEFLATE_RATIO = 1032


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an IDX file (the format of MNIST), gzipped or not, with any element type and number of dimensions.

    The header is two zero bytes, the element type, the number of dimensions and each dimension as a
    big-endian 32-bit number. What it claims is compared with the file's size before memory is reserved.

    Raises:
        DataError: not an IDX file, truncated, corrupt, or longer than its header says.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: expected an IDX file, got {'a folder' if path.is_dir() else 'nothing there'}")
    file_size = path.stat().st_size
    with path.open("rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream: BinaryIO = gzip.GzipFile(fileobj=raw) if compressed else raw  # type: ignore[assignment]
        try:
            return _read_idx_stream(stream, path, file_size * MAX_DEFLATE_RATIO if compressed else file_size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: the gzip data is truncated or corrupt ({error})") from error


def _read_idx_stream(stream: BinaryIO, path: Path, max_size: int) -> np.ndarray:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in IDX_TYPES or magic[3] == 0:
        raise DataError(
            f"{path}: expected the magic number of an IDX file (0x00000803 images, 0x00000801 labels), "
            f"got {'0x' + magic.hex() if magic else 'an empty file'}"
        )
    header = stream.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise DataError(f"{path}: truncated, expected {4 * magic[3]} bytes of dimensions, got {len(header)}")
    shape = tuple(int(n) for n in np.frombuffer(header, dtype=">u4"))
    dtype = np.dtype(IDX_TYPES[magic[2]])
    expected = math.prod(shape) * dtype.itemsize
    if expected == 0:
        raise DataError(f"{path}: expected at least one element, got shape {shape}")
    if expected > max_size:
        raise DataError(
            f"{path}: truncated or corrupt, the header's shape {shape} needs {expected} bytes "
            f"and the file can hold at most {max_size}"
        )
    payload = _read_up_to(stream, expected + 1)
    if len(payload) < expected:
        raise DataError(f"{path}: truncated, shape {shape} needs {expected} bytes, got {len(payload)}")
    if len(payload) > expected:
        raise DataError(f"{path}: corrupt, shape {shape} needs {expected} bytes and more follow")
    array = np.frombuffer(payload, dtype=dtype).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


def _read_up_to(stream: BinaryIO, size: int) -> bytearray:
    """Read at most ``size`` bytes; memory grows with what arrives, not with what was claimed."""
    content = bytearray()
    while len(content) < size:
        block = stream.read(min(size - len(content), 1 << 20))
        if not block:
            break
        content += block
    return content


def _find_idx(folder: Path, stem: str) -> Path | None:
    dotted = stem.replace("-idx", ".idx")  # as some archives unpack them
    candidates = (folder / f"{name}{suffix}" for name in (stem, dotted) for suffix in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _load_idx_folder(folder: Path, classes: tuple[str, ...] | None = None) -> tuple[Dataset, Dataset | None]:
    found = {role: _find_idx(folder, stem) for role, stem in IDX_STEMS.items()}
    # A folder without any test file is split; half of a pair is a mistake.
    roles = [role for role in IDX_STEMS if role.startswith("train") or found["test images"] or found["test labels"]]
    arrays = {}
    for role in roles:
        path = found[role]
        if path is None:
            raise DataError(f"{folder}: expected {IDX_STEMS[role]} or {IDX_STEMS[role]}.gz, which is missing")
        arrays[role] = read_idx(path)
        wanted = 3 if role.endswith("images") else 1
        if arrays[role].ndim != wanted or arrays[role].dtype != np.uint8:
            raise DataError(
                f"{path}: expected {role} as uint8 with {wanted} dimension(s) (0x0000080{wanted}), "
                f"got {arrays[role].dtype} with {arrays[role].ndim}"
            )
    train = (_as_images(arrays["train images"], str(found["train images"])), arrays["train labels"])
    test = None
    if "test images" in arrays:
        test = (_as_images(arrays["test images"], str(found["test images"])), arrays["test labels"])
    return _from_label_values(train, test, _title(folder), classes)


# ------------------------------------------------------------------------------------------- Keras-style .npz


def _load_npz(path: Path) -> tuple[Dataset, Dataset | None]:
    with _open_npz(path) as archive:
        keys = _npz_keys(archive)
        wanted = ["x_train", "y_train"] + (["x_test", "y_test"] if {"x_test", "y_test"} & keys else [])
        if not set(wanted) <= keys:
            raise DataError(f"{path}: expected arrays {', '.join(wanted)}, got {', '.join(sorted(keys)) or 'none'}")
        arrays = {key: _read_npy(archive, key, path) for key in wanted}
    parts = [
        (
            _as_images(arrays[f"x_{part}"], f"{path} x_{part}"),
            _as_labels(arrays[f"y_{part}"], f"{path} y_{part}"),
        )
        for part in ("train", "test")
        if f"x_{part}" in arrays
    ]
    return _from_label_values(parts[0], parts[1] if len(parts) == 2 else None, path.name)


def _as_labels(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim == 2 and array.shape[1] == 1:  # as in Keras' cifar10
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "iuU":
        raise DataError(
            f"{name}: expected labels of shape (n,), whole numbers or text, got {array.dtype} of shape {array.shape}"
        )
    if array.dtype.kind == "i" and len(array) and array.min() < 0:
        raise DataError(f"{name}: label {array.min()} is out of range, expected labels from 0")
    return array


@contextmanager
def _open_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        # RuntimeError and NotImplementedError: encrypted, or a compression that zipfile lacks.
        # EINVAL: damaged offsets that point before the start; any other OSError is the disk's.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        reason = f"damaged data ({error})"
        raise DataError(f"{path}: expected an .npz archive, which is a zip file, got {reason}") from error


def _npz_keys(archive: zipfile.ZipFile) -> set[str]:
    return {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}


def _read_npy(archive: zipfile.ZipFile, key: str, path: Path) -> np.ndarray:
    """Read one array of an .npz; unlike np.load it trusts no header with memory, and it never unpickles."""
    info = archive.getinfo(f"{key}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # Others unpack a block at a time, however large it becomes.
        raise DataError(f"{path} {key}: expected an array stored or deflated, got zip compression {info.compress_type}")
    with archive.open(info) as member:
        try:
            version = np.lib.format.read_magic(member)
            read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
            shape, fortran_order, dtype = read_header(member)
        except OSError:
            raise
        except Exception as error:  # numpy reads headers as Python text, which fails in a dozen ways
            raise DataError(f"{path} {key}: expected a numpy array, got damaged data ({error})") from error
        if dtype.hasobject:
            raise DataError(f"{path} {key}: expected numbers or text, got pickled objects, which are refused")
        expected = math.prod(shape) * dtype.itemsize
        if expected <= 0 or min(shape, default=1) < 0:
            raise DataError(f"{path} {key}: expected at least one element, got shape {shape}")
        if expected > info.compress_size * MAX_DEFLATE_RATIO:
            raise DataError(
                f"{path} {key}: truncated or corrupt, shape {shape} needs {expected} bytes, "
                f"got {info.compress_size} compressed"
            )
        payload = _read_up_to(member, expected + 1)  # type: ignore[arg-type]
    if len(payload) != expected:
        raise DataError(f"{path} {key}: truncated or corrupt, shape {shape} needs {expected} bytes")
    return np.frombuffer(payload, dtype=dtype).reshape(shape, order="F" if fortran_order else "C")


# ---------------------------------------------------------------------------------------- folders of pictures

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
TEST_FOLDERS = ("test", "val", "valid", "validation")
# A picture takes its memory before its data is seen. Blank ones of this size are read from any file, of 64 MiB in
# colour; larger ones need as many bytes as deflate makes of one bit a pixel.
MAX_BLANK_PIXELS = 4096 * 4096
MAX_PIXELS_PER_BYTE = 8 * MAX_DEFLATE_RATIO


def _load_picture_folders(folder: Path, size: tuple[int, int] | None, progress: bool) -> tuple[Dataset, Dataset | None]:
    tests = [folder / name for name in TEST_FOLDERS if (folder / name).is_dir()]
    if not (folder / "train").is_dir():
        classes = _class_folders(folder)
        return _load_pictures(folder, classes, tuple(classes), None, size, _title(folder), progress), None
    classes = _class_folders(folder / "train")
    names = tuple(classes)
    # A test set may lack classes.
    test_classes = _class_folders(tests[0], least=1) if tests else {}
    for name in test_classes:
        if name not in classes:
            raise DataError(f"{tests[0]}: class {name!r} is not among the training classes, {_listed(names)}")
    title = f"{_title(folder)} (training)" if tests else _title(folder)
    train = _load_pictures(folder / "train", classes, names, None, size, title, progress)
    if not tests:
        return train, None
    channels = train.images.shape[1]
    title = f"{_title(folder)} (test)"
    return train, _load_pictures(tests[0], test_classes, names, channels, size, title, progress)


def _class_folders(folder: Path, least: int = 2) -> dict[str, list[Path]]:
    """Map each class to its pictures; hidden files and files of other kinds are left alone."""
    classes = {}
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            classes[child.name] = sorted(
                path
                for path in _files_below(child)
                if path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")
            )
            if not classes[child.name]:
                raise DataError(f"{child}: class {child.name!r} is empty, expected PNG or JPEG pictures")
    if len(classes) < least:
        got = f"only {next(iter(classes))!r}" if classes else "none"
        raise DataError(
            f"{folder}: expected IDX files or at least {least} classes, each a folder of pictures; got {got}"
        )
    return classes


def _title(folder: Path) -> str:
    """What a folder's data set is called, be it given as "." or as "..", too."""
    return folder.resolve().name


def _files_below(folder: Path) -> Iterator[Path]:
    """Everything in the folder and those in it; OSError for one that cannot be read."""

    def refuse(error: OSError) -> None:
        raise error

    for parent, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(parent, name) for name in names)


def _load_pictures(
    folder: Path,
    pictures: Mapping[str, list[Path]],
    classes: tuple[str, ...],
    channels: int | None,
    size: tuple[int, int] | None,
    name: str,
    progress: bool,
) -> Dataset:
    paths = [path for members in pictures.values() for path in members]
    labels = [classes.index(label) for label, members in pictures.items() for _ in members]
    images: np.ndarray | None = None
    with progress_bar(f"reading {folder.name}", len(paths), progress) as advance:
        for index, path in enumerate(paths):
            image = _read_picture(path)
            if size is not None:
                image = _resized(image[None], size)[0]
            if images is None:
                images = np.empty((len(paths), channels or image.shape[0], *image.shape[1:]), dtype=np.uint8)
            if image.shape[0] > images.shape[1] and channels is None:
                images = np.repeat(images, image.shape[0], axis=1)  # grey pictures first, then a coloured one
            if image.shape[1:] != images.shape[2:]:
                height, width = images.shape[2:]
                raise DataError(
                    f"{path}: expected a picture of {height}x{width} pixels like {paths[0].name}, "
                    f"got {image.shape[1]}x{image.shape[2]}; "
                    "image_size= (--image-size) scales all to one size"
                )
            images[index] = with_channels(image[None], images.shape[1], str(path))[0]
            advance(1, len(paths))
    assert images is not None
    return Dataset(images, np.asarray(labels, dtype=np.int64), classes, name)


def _read_picture(path: Path) -> np.ndarray:
    """Read one picture as (1 or 3, height, width), turned upright; transparency is dropped."""
    image_module = require("PIL.Image", "reading pictures")
    image_ops = require("PIL.ImageOps", "reading pictures")
    try:
        content = path.read_bytes()  # of a file, a decoder would ask for as many bytes as a damaged length says
        with image_module.open(io.BytesIO(content)) as opened:
            pixels, limit = math.prod(opened.size), MAX_PIXELS_PER_BYTE * len(content)
            if pixels > max(MAX_BLANK_PIXELS, limit):
                raise DataError(
                    f"{path}: expected a picture, got a header of {pixels} pixels in a file of too few bytes"
                )
            picture = image_ops.exif_transpose(opened)
            if picture.mode.startswith("I;16"):
                return (np.asarray(picture).astype(np.uint32) // 257).astype(np.uint8)[None]
            if picture.mode in ("I", "F"):
                raise DataError(f"{path}: expected a picture of 8 or 16 bits, got mode {picture.mode!r}")
            grey = picture.mode in ("1", "L", "LA", "La")
            values = np.array(picture.convert("L" if grey else "RGB"))
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected a picture, got nothing there") from error
    except (image_module.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError) as error:
        # EINVAL: damaged offsets that point before the start; any other OSError is the disk's or the permissions'.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = "no known format" if isinstance(error, image_module.UnidentifiedImageError) else error
        raise DataError(f"{path}: expected a PNG or JPEG picture, got damaged or other data ({reason})") from error
    return values[None] if grey else np.moveaxis(values, 2, 0)


def load_images(
    paths: Iterable[str | os.PathLike[str]], *, channels: int, size: tuple[int, int]
) -> tuple[np.ndarray, list[str]]:
    """Load images to predict from, brought to the form that a model expects.

    Args:
        paths: PNG or JPEG pictures, IDX files of images, or ``.npz`` archives (their ``x_test``, ``x`` or
            only array).
        channels: 1 for grey, 3 for colour; pictures are converted.
        size: height and width in pixels; pictures are scaled.

    Returns:
        Images, uint8 (n, channels, height, width), and for each its file name, with ``[index]`` after the
        name of a file that holds several.

    Raises:
        DataError: a file is missing, damaged or holds no images.
    """
    blocks: list[np.ndarray] = []
    names: list[str] = []
    for path in map(Path, paths):
        images = _read_image_file(path)
        images = _resized(with_channels(images, channels, str(path)), size)
        blocks.append(images)
        names += [str(path)] if len(images) == 1 else [f"{path}[{index}]" for index in range(len(images))]
    if not blocks:
        raise DataError("expected at least one file of images, got none")
    return np.concatenate(blocks), names


def _read_image_file(path: Path) -> np.ndarray:
    if path.suffix.lower() in PICTURE_SUFFIXES or not path.is_file():
        return _read_picture(path)[None]
    if path.suffix.lower() == ".npz":
        with _open_npz(path) as archive:
            keys = _npz_keys(archive)
            key = next((key for key in ("x_test", "x") if key in keys), next(iter(keys)) if len(keys) == 1 else None)
            if key is None:
                raise DataError(f"{path}: expected an array x_test or x, got {', '.join(sorted(keys)) or 'none'}")
            return _as_images(_read_npy(archive, key, path), f"{path} {key}")
    if path.suffix.lower() == ".gz" or "idx" in path.name:
        return _as_images(read_idx(path), str(path))
    raise DataError(f"{path}: expected a picture (PNG, JPEG), an IDX file or an .npz archive")


# -------------------------------------------------------------------------------------------------- downloads


def _load_download(name: str, progress: bool) -> tuple[Dataset, Dataset | None]:
    try:
        folder = fetch(name, progress)
    except DownloadError as error:
        raise DataError(str(error)) from error
    classes = DOWNLOADS[name].classes
    if name == "cifar10":
        return _load_cifar10(folder / CIFAR10_ARCHIVE, classes)
    return _load_idx_folder(folder, classes)


def _load_cifar10(path: Path, classes: tuple[str, ...]) -> tuple[Dataset, Dataset | None]:
    """Read the archive's records, one label byte and 3x32x32 pixels each, without unpacking it."""
    record = 1 + 3 * 32 * 32
    parts: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = Path(member.name).name
                if member.isfile() and name.endswith(".bin"):
                    stream = archive.extractfile(member)
                    assert stream is not None
                    parts[name] = stream.read(min(member.size, 10_000 * record + 1))
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: expected the CIFAR-10 binary archive, got damaged data ({error})") from error
    train_files = [f"data_batch_{index}.bin" for index in range(1, 6)]
    for name in [*train_files, "test_batch.bin"]:
        size = len(parts.get(name, b""))
        if size == 0 or size % record or size > 10_000 * record:
            raise DataError(f"{path}: expected {name} with up to 10000 records of {record} bytes, got {size} bytes")

    def arrays(content: bytes) -> tuple[np.ndarray, np.ndarray]:
        records = np.frombuffer(content, dtype=np.uint8).reshape(-1, record)
        return records[:, 1:].reshape(-1, 3, 32, 32).copy(), records[:, 0]

    train = arrays(b"".join(parts[name] for name in train_files))
    return _from_label_values(train, arrays(parts["test_batch.bin"]), "cifar10", classes)
