"""Every source of images that `fastnn.data` reads, and every way in which one can be unusable."""

from __future__ import annotations

import errno
import gzip
import os
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastnn
from fastnn import data
from fastnn._files import atomic_path
from fastnn.data import DataError, Dataset

SHARED = Path(__file__).parents[2] / "shared" / "data"


def make_arrays(count: int = 24, side: int = 6, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, side, side) and labels in which every class has equally many."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, side, side), dtype=np.uint8)
    return images, (np.arange(count) % classes).astype(np.uint8)


def idx_bytes(array: np.ndarray, type_code: int = 0x08) -> bytes:
    header = bytes([0, 0, type_code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(data.IDX_TYPES[type_code]).tobytes()


def write_idx_folder(folder: Path, *, compressed: bool = False, test: bool = True) -> tuple[np.ndarray, np.ndarray]:
    images, labels = make_arrays()
    parts = {"train images": images, "train labels": labels}
    if test:
        parts |= {"test images": images[:6], "test labels": labels[:6]}
    folder.mkdir(exist_ok=True)
    for role, array in parts.items():
        content = idx_bytes(array)
        name = data.IDX_STEMS[role] + (".gz" if compressed else "")
        (folder / name).write_bytes(gzip.compress(content, mtime=0) if compressed else content)
    return images, labels


def write_pictures(folder: Path, counts: dict[str, int], *, size: tuple[int, int] = (6, 6), mode: str = "L") -> None:
    generator = np.random.default_rng(1)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            shape = size if mode == "L" else (*size, 3)
            pixels = generator.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:02}.png")


# ----------------------------------------------------------------------------------------------------- usable


def test_digits_are_28x28_and_split_the_same_way_every_time() -> None:
    train, test = data.load("digits")
    again, _ = data.load("digits")
    assert train.images.shape == (1438, 1, 28, 28)
    assert test.images.shape == (359, 1, 28, 28)
    assert train.classes == tuple("0123456789")
    assert train.images.max() == 255  # the brightest of the 17 levels stays the brightest
    np.testing.assert_array_equal(train.images, again.images)
    counts = np.bincount(test.labels)
    assert counts.min() >= 35
    assert counts.max() <= 37


def test_a_split_is_stratified_disjoint_and_chosen_by_the_seed(tmp_path: Path) -> None:
    images, labels = make_arrays(60)
    np.savez(tmp_path / "all.npz", x_train=images, y_train=labels)
    train, test = data.load(tmp_path / "all.npz", validation_split=0.25, seed=1)
    other = data.load(tmp_path / "all.npz", validation_split=0.25, seed=2)[1]
    assert np.bincount(test.labels).tolist() == [5, 5, 5]
    together = np.concatenate([train.images, test.images])[:, 0]
    assert sorted(image.tobytes() for image in together) == sorted(image.tobytes() for image in images)
    assert not np.array_equal(test.images, other.images)


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
def test_idx_folder(tmp_path: Path, compressed: bool) -> None:
    images, labels = write_idx_folder(tmp_path, compressed=compressed)
    train, test = data.load(tmp_path)
    np.testing.assert_array_equal(train.images[:, 0], images)
    np.testing.assert_array_equal(train.labels, labels)
    np.testing.assert_array_equal(test.images[:, 0], images[:6])
    assert train.images.dtype == np.uint8
    assert train.labels.dtype == np.int64
    assert train.classes == ("0", "1", "2")


def test_idx_folder_without_test_files_is_split(tmp_path: Path) -> None:
    write_idx_folder(tmp_path, test=False)
    train, test = data.load(tmp_path, validation_split=0.25)
    assert (len(train), len(test)) == (18, 6)


@pytest.mark.parametrize("type_code", sorted(data.IDX_TYPES))
def test_read_idx_knows_every_element_type(tmp_path: Path, type_code: int) -> None:
    values = np.arange(2 * 3 * 2).reshape(2, 3, 2)
    (tmp_path / "a.idx").write_bytes(idx_bytes(values, type_code))
    array = data.read_idx(tmp_path / "a.idx")
    np.testing.assert_array_equal(array, values)
    assert array.dtype.isnative


def test_a_folder_may_bear_the_name_of_a_known_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx_folder(tmp_path / "mnist")
    monkeypatch.chdir(tmp_path)
    assert len(data.load("./mnist")[0]) == len(data.load(Path("mnist"))[0]) == 24


def test_labels_need_not_start_at_zero(tmp_path: Path) -> None:
    images, labels = make_arrays()
    np.savez(tmp_path / "letters.npz", x_train=images, y_train=labels.astype(np.int32) * 3 + 1)
    train, _ = data.load(tmp_path / "letters.npz")
    assert train.classes == ("1", "4", "7")
    assert np.unique(train.labels).tolist() == [0, 1, 2]


KERAS_FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "uint8": lambda x: x,
    "int64": lambda x: x.astype(np.int64),
    "float 0-255": lambda x: x.astype(np.float32),
    "float 0-1": lambda x: x / 255,
    "one channel last": lambda x: x[..., None],
    "one channel first": lambda x: x[:, None],
    "fortran order": np.asfortranarray,
}


@pytest.mark.parametrize("form", KERAS_FORMS)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_keras_npz(tmp_path: Path, form: str, save: Callable[..., None]) -> None:
    images, labels = make_arrays()
    arrays = KERAS_FORMS[form](images)
    save(tmp_path / "a.npz", x_train=arrays, y_train=labels[:, None], x_test=arrays[:9], y_test=labels[:9])
    train, test = data.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(train.images[:, 0], images)
    np.testing.assert_array_equal(train.labels, labels)
    assert len(test) == 9


def test_keras_npz_of_colour_images_and_named_labels(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 5, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=["dog", "cat"] * 4)
    train, test = data.load(tmp_path / "a.npz", validation_split=0.5)
    assert train.classes == ("cat", "dog")
    assert train.images.shape == (4, 3, 5, 4)
    assert sorted(test.labels) == [0, 0, 1, 1]


def test_a_folder_of_pictures_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, {"cat": 3, "dog": 4})
    closed = tmp_path / "dog" / "closed"
    closed.mkdir()
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path) == closed:  # mode 000 says nothing to root
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="closed"):
        data.load(tmp_path)


def test_folders_of_pictures_with_their_own_split(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", {"cat": 3, "dog": 4}, mode="RGB")
    write_pictures(tmp_path / "test", {"dog": 2}, mode="RGB")
    (tmp_path / "train" / "cat" / ".DS_Store").write_bytes(b"")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not a picture")
    train, test = data.load(tmp_path)
    assert train.classes == test.classes == ("cat", "dog")
    assert train.images.shape == (7, 3, 6, 6)
    assert test.labels.tolist() == [1, 1]
    expected = np.asarray(Image.open(tmp_path / "train" / "dog" / "01.png"))
    np.testing.assert_array_equal(train.images[4], np.moveaxis(expected, 2, 0))


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_the_test_pictures_have_a_folder_of_several_names(tmp_path: Path, name: str) -> None:
    write_pictures(tmp_path / "train", {"cat": 3, "dog": 4})
    write_pictures(tmp_path / name, {"dog": 2})
    train, test = data.load(tmp_path)
    assert (len(train), test.labels.tolist()) == (7, [1, 1])


def test_the_folder_that_is_the_current_one_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx_folder(tmp_path / "numbers")
    write_pictures(tmp_path / "animals", {"cat": 3, "dog": 4})
    for name in ("numbers", "animals"):
        monkeypatch.chdir(tmp_path / name)
        assert [part.name for part in data.load(".")] == [f"{name} (training)", f"{name} (test)"]


def test_one_tree_of_pictures_is_split(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"a": 10, "b": 20})
    train, test = data.load(tmp_path)
    assert np.bincount(train.labels).tolist() == [9, 18]
    assert np.bincount(test.labels).tolist() == [1, 2]
    assert train.images.shape[1] == 1


def test_a_coloured_picture_among_grey_ones_makes_all_three_channels(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"a": 2})
    write_pictures(tmp_path, {"b": 2}, mode="RGB")
    train, test = data.load(tmp_path, validation_split=0.5)
    grey = np.concatenate([train.images, test.images])[np.concatenate([train.labels, test.labels]) == 0]
    assert grey.shape == (2, 3, 6, 6)
    np.testing.assert_array_equal(grey[:, 0], grey[:, 2])
    names = (tmp_path / "a").glob("*.png")
    assert {image[0].tobytes() for image in grey} == {np.asarray(Image.open(name)).tobytes() for name in names}


def test_image_size_scales_mixed_pictures(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"a": 3}, size=(6, 6))
    write_pictures(tmp_path, {"b": 3}, size=(12, 9))
    train, test = data.load(tmp_path, image_size=(8, 10))
    assert train.images.shape[2:] == test.images.shape[2:] == (8, 10)


def test_scaling_keeps_flat_areas_and_averages_when_it_shrinks(tmp_path: Path) -> None:
    images = np.full((4, 1, 8, 8), 200, dtype=np.uint8)
    images[0, 0, ::2] = 0
    small = data._resized(images, (4, 4))
    assert (small[1:] == 200).all()
    assert abs(small[0].astype(float).mean() - 100) < 8  # stripes thinner than a pixel become grey


def test_picture_modes(tmp_path: Path) -> None:
    deep = Image.fromarray(np.array([[0, 257 * 40], [65535, 256 * 255]], dtype=np.uint16))
    deep.save(tmp_path / "deep.png")
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    turned = Image.fromarray(np.array([[1, 2]], dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    turned.save(tmp_path / "turned.png", exif=exif)
    assert data._read_picture(tmp_path / "deep.png").tolist() == [[[0, 40], [255, 254]]]
    assert data._read_picture(tmp_path / "clear.png")[:, 0, 0].tolist() == [10, 20, 30]
    assert data._read_picture(tmp_path / "turned.png").tolist() == [[[1], [2]]]


def test_load_images_brings_every_kind_to_the_models_form(tmp_path: Path) -> None:
    grey, _ = make_arrays(3)
    Image.fromarray(grey[0]).save(tmp_path / "grey.png")
    Image.new("RGB", (6, 6), (255, 0, 0)).save(tmp_path / "red.jpg", quality=100, subsampling=0)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(grey))
    (tmp_path / "some.gz").write_bytes(gzip.compress(idx_bytes(grey[:1])))
    np.savez(tmp_path / "a.npz", x=grey[:2])
    names = ["grey.png", "red.jpg", "t10k-images-idx3-ubyte", "some.gz", "a.npz"]
    images, sources = data.load_images([tmp_path / name for name in names], channels=1, size=(6, 6))
    assert images.shape == (8, 1, 6, 6)
    np.testing.assert_array_equal(images[[0, 2, 5, 6], 0], grey[[0, 0, 0, 0]])
    assert abs(int(images[1, 0, 0, 0]) - 76) <= 1  # red's share of the luma, 0.299
    assert [source.rpartition("/")[2] for source in sources] == [
        *["grey.png", "red.jpg"],
        *[f"t10k-images-idx3-ubyte[{index}]" for index in range(3)],
        *["some.gz", "a.npz[0]", "a.npz[1]"],
    ]
    colour, _ = data.load_images([tmp_path / "grey.png"], channels=3, size=(12, 12))
    assert colour.shape == (1, 3, 12, 12)


@pytest.mark.skipif(not (SHARED / "mnist").is_dir(), reason="the real MNIST is not in ../shared/data/mnist")
def test_the_real_mnist() -> None:
    train, test = data.load(SHARED / "mnist")
    assert train.images.shape == (60000, 1, 28, 28)
    assert np.bincount(train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert len(test) == 10000


# --------------------------------------------------------------------------------------------------- unusable


def idx_with(**changes: bytes) -> Callable[[Path], None]:
    """A folder of IDX files in which the named ones have other content."""

    def write(folder: Path) -> None:
        write_idx_folder(folder)
        for role, content in changes.items():
            (folder / data.IDX_STEMS[role.replace("_", " ")]).write_bytes(content)

    return write


def npz_with(**arrays: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        images, labels = make_arrays()
        np.savez(folder / "a.npz", **({"x_train": images, "y_train": labels} | arrays))  # type: ignore[arg-type]

    return write


def pictures_with(extra: Callable[[Path], object], **counts: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_pictures(folder, counts)
        extra(folder)

    return write


def without(role: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_idx_folder(folder)
        (folder / data.IDX_STEMS[role]).unlink()

    return write


def broken_gzip(cut: int, flip: int | None = None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_idx_folder(folder, compressed=True)
        path = folder / (data.IDX_STEMS["train images"] + ".gz")
        content = bytearray(path.read_bytes()[:cut])
        if flip is not None:
            content[flip] ^= 0xFF
        path.write_bytes(content)

    return write


def write_test_of_other_classes(folder: Path) -> None:
    write_pictures(folder / "train", {"a": 2, "b": 2})
    write_pictures(folder / "test", {"a": 2, "z": 2})


def write_shifted_npz(folder: Path) -> None:
    npz_with()(folder)
    path = folder / "a.npz"
    path.write_bytes(path.read_bytes()[1:])


def write_half_a_jpeg(folder: Path) -> None:
    path = folder / "a" / "zz.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-20])


IMAGES, LABELS = make_arrays()

# source within the folder, how to write it, words that the error must have
BAD_SOURCES: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "nothing there": ("nope", lambda folder: None, ["expected digits, mnist", "nope", "does not exist"]),
    "other kind of file": (
        "a.txt",
        lambda folder: (folder / "a.txt").write_text("x"),
        ["a file of another kind"],
    ),
    "empty folder": (".", lambda folder: None, ["expected IDX files or at least 2 classes", "got none"]),
    "one class": (".", pictures_with(lambda folder: None, cat=3), ["at least 2 classes", "only 'cat'"]),
    "empty class": (".", pictures_with(lambda f: (f / "dog").mkdir(), cat=3), ["class 'dog' is empty"]),
    "one picture in a class": (
        ".",
        pictures_with(lambda f: None, a=1, b=4),
        ["class 'a' has 1 image", "at least 2"],
    ),
    "not a picture": (
        ".",
        pictures_with(lambda f: (f / "a" / "zz.jpg").write_text("hello"), a=2, b=2),
        ["zz.jpg", "expected a PNG or JPEG picture"],
    ),
    "truncated picture": (
        ".",
        pictures_with(write_half_a_jpeg, a=2, b=2),
        ["zz.jpg", "expected a PNG or JPEG picture", "truncated"],
    ),
    "float picture": (
        ".",
        pictures_with(lambda f: Image.new("F", (6, 6)).save(f / "a" / "zz.tiff"), a=2, b=2),
        ["zz.tiff", "8 or 16 bits", "'F'"],
    ),
    "mixed sizes": (
        ".",
        pictures_with(lambda f: write_pictures(f, {"c": 2}, size=(7, 9)), a=2, b=2),
        ["expected a picture of 6x6", "got 7x9", "--image-size"],
    ),
    "unknown class in test": (
        ".",
        write_test_of_other_classes,
        ["class 'z' is not among the training classes, a, b"],
    ),
    "IDX labels missing": (".", without("train labels"), ["train-labels-idx1-ubyte", "missing"]),
    "IDX test labels missing": (".", without("test labels"), ["t10k-labels-idx1-ubyte", "missing"]),
    "IDX empty file": (".", idx_with(train_images=b""), ["magic number", "got an empty file"]),
    "IDX wrong magic": (
        ".",
        idx_with(train_images=b"\x50\x4b\x03\x04" + bytes(99)),
        ["magic", "got 0x504b0304"],
    ),
    "IDX labels as images": (
        ".",
        idx_with(train_images=idx_bytes(LABELS)),
        ["3 dimension(s)", "got uint8 with 1"],
    ),
    "IDX header cut": (".", idx_with(train_images=idx_bytes(IMAGES)[:9]), ["truncated", "12 bytes", "got 5"]),
    "IDX pixels cut": (
        ".",
        idx_with(train_images=idx_bytes(IMAGES)[:-1]),
        ["truncated", "(24, 6, 6) needs 864"],
    ),
    "IDX pixels follow": (
        ".",
        idx_with(train_images=idx_bytes(IMAGES) + b"x"),
        ["corrupt", "864", "more follow"],
    ),
    "IDX no images": (".", idx_with(train_images=idx_bytes(IMAGES[:0])), ["at least one", "(0, 6, 6)"]),
    "IDX sizes overflow": (
        ".",
        idx_with(train_images=b"\0\0\x08\x03" + b"\xff" * 12 + bytes(50)),
        ["truncated or corrupt", "4294967295"],
    ),
    "IDX fewer labels": (".", idx_with(train_labels=idx_bytes(LABELS[:-2])), ["24 images", "22 labels"]),
    "IDX strange test label": (
        ".",
        idx_with(test_labels=idx_bytes(np.full(6, 77))),
        ["label 77 is out of range", "expected one of 0, 1, 2"],
    ),
    "IDX one class": (".", idx_with(train_labels=idx_bytes(LABELS * 0)), ["at least 2 classes, got 1"]),
    "IDX test of another size": (
        ".",
        idx_with(test_images=idx_bytes(make_arrays(6, side=5)[0])),
        ["(1, 6, 6) as in training", "got (1, 5, 5)", "image_size"],
    ),
    "gzip cut": (".", broken_gzip(500), ["train-images", "gzip data is truncated or corrupt"]),
    "gzip flipped": (
        ".",
        broken_gzip(10**6, flip=200),
        ["train-images", "gzip data is truncated or corrupt"],
    ),
    "gzip header only": (".", broken_gzip(2), ["train-images", "gzip data is truncated or corrupt"]),
    "npz not a zip": ("a.npz", lambda f: (f / "a.npz").write_text("hello"), ["expected an .npz archive"]),
    "npz shifted": ("a.npz", write_shifted_npz, ["expected an .npz archive", "damaged data"]),
    "npz without labels": (
        "a.npz",
        lambda folder: np.savez(folder / "a.npz", x_train=IMAGES, other=LABELS),
        ["expected arrays x_train, y_train", "got other, x_train"],
    ),
    "npz half a test set": ("a.npz", npz_with(x_test=IMAGES), ["y_test", "got x_test, x_train, y_train"]),
    "npz pickled": (
        "a.npz",
        npz_with(y_train=np.array([{}] * 24, dtype=object)),
        ["pickled objects", "refused"],
    ),
    "npz one-hot": (
        "a.npz",
        npz_with(y_train=np.eye(24)),
        ["labels of shape (n,)", "got float64 of shape (24, 24)"],
    ),
    "npz negative label": ("a.npz", npz_with(y_train=LABELS.astype(int) - 1), ["label -1 is out of range"]),
    "npz NaN": (
        "a.npz",
        npz_with(x_train=np.full((24, 6, 6), np.nan)),
        ["expected pixels from 0 to 255, got NaN"],
    ),
    "npz large pixels": (
        "a.npz",
        npz_with(x_train=IMAGES * 2.5),
        ["expected pixels from 0 to 255", "0 to 6"],
    ),
    "npz text as images": ("a.npz", npz_with(x_train=np.full((24, 6, 6), "x")), ["images of numbers", "<U1"]),
    "npz flat images": (
        "a.npz",
        npz_with(x_train=IMAGES.reshape(24, 36)),
        ["(n, height, width)", "got (24, 36)"],
    ),
    "npz five channels": (
        "a.npz",
        npz_with(x_train=np.zeros((24, 6, 6, 5))),
        ["1 or 3", "got (24, 6, 6, 5)"],
    ),
    "npz counts differ": ("a.npz", npz_with(y_train=LABELS[:-1]), ["24 images, 23 labels"]),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_an_unusable_source_says_what_came_and_what_was_expected(tmp_path: Path, case: str) -> None:
    source, write, words = BAD_SOURCES[case]
    write(tmp_path)
    with pytest.raises(DataError) as caught:
        data.load(tmp_path / source, progress=False)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"validation_split": 0.0}, "between 0 and 1, got 0.0"),
        ({"validation_split": 1.5}, "between 0 and 1, got 1.5"),
        ({"image_size": 0}, "from 1 to 4096, got 0"),
        ({"image_size": (8, 100000)}, "from 1 to 4096, got (8, 100000)"),
    ],
    ids=str,
)
def test_unusable_arguments(arguments: dict[str, float], words: str) -> None:
    with pytest.raises(DataError, match=words.replace("(", r"\(").replace(")", r"\)")):
        data.load("digits", **arguments)  # type: ignore[arg-type]


def test_a_source_with_its_own_test_set_takes_no_split(tmp_path: Path) -> None:
    write_idx_folder(tmp_path)
    with pytest.raises(DataError, match="has its own test images"):
        data.load(tmp_path, validation_split=0.1)


@pytest.mark.parametrize(
    ("images", "labels", "classes", "words"),
    [
        (
            IMAGES[:, None],
            LABELS.astype(np.int64),
            "ab",
            "expected labels from 0 to 1, got labels from 0 to 2",
        ),
        (
            IMAGES[:, None],
            LABELS.astype(np.int64) - 1,
            "abc",
            "expected labels from 0 to 2, got labels from -1",
        ),
        (IMAGES[:, None], LABELS.astype(np.int64), "a", r"at least 2 classes, got 1 \(a\)"),
        (IMAGES[:, None], LABELS[:9].astype(np.int64), "abc", "got 24 images and 9 labels"),
        (IMAGES[:, None], LABELS, "abc", "expected int64 labels"),
        (IMAGES, LABELS.astype(np.int64), "abc", "expected uint8 images of shape"),
    ],
    ids=["label too large", "label negative", "one class", "counts", "label type", "image shape"],
)
def test_dataset_checks_itself(images: np.ndarray, labels: np.ndarray, classes: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Dataset(images, labels, tuple(classes), "x")


@pytest.mark.parametrize("form", ["idx", "npz"])
def test_a_header_that_claims_too_much_reserves_no_memory(tmp_path: Path, form: str) -> None:
    claimed = 500_000_000  # within what deflate could hold in this file
    noise = np.random.default_rng(0).bytes(600_000)
    if form == "idx":
        content = b"\0\0\x08\x03" + struct.pack(">3I", claimed, 1, 1) + noise
        (tmp_path / "lie.gz").write_bytes(gzip.compress(content))
    else:
        header = {"descr": "|u1", "fortran_order": False, "shape": (claimed, 1, 1)}
        with zipfile.ZipFile(tmp_path / "lie.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            text = f"{header}\n".encode()
            archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + noise)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="truncated"):
            data.load_images(tmp_path.iterdir(), channels=1, size=(1, 1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.png", None, "got nothing there"),
        ("a.png", b"hello", "expected a PNG or JPEG picture"),
        ("a.txt", b"hello", "expected a picture"),
        ("images-idx3-ubyte", b"hello", "magic number"),
        ("two.npz", "two", "expected an array x_test or x, got a, b"),
    ],
)
def test_unusable_files_to_predict_from(tmp_path: Path, name: str, content: object, words: str) -> None:
    if content == "two":
        np.savez(tmp_path / name, a=IMAGES, b=IMAGES)
    elif isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        data.load_images([tmp_path / name], channels=1, size=(6, 6))


def test_no_files_to_predict_from() -> None:
    with pytest.raises(DataError, match="at least one file"):
        data.load_images([], channels=1, size=(6, 6))


# ------------------------------------------------------------------------------------- the core package alone

WITHOUT_EXTRAS = """
import sys
for module in ("PIL", "pooch", "requests", "rich", "sklearn", "matplotlib", "typer", "tqdm"):
    sys.modules[module] = None
import fastnn
from fastnn import data
train, test = data.load(sys.argv[1], validation_split=0.25)
print(len(train), len(test))
for source in ("digits", "mnist", sys.argv[2]):
    try:
        data.load(source)
    except ImportError as error:
        print(error)
"""


def test_the_core_package_reads_arrays_and_says_what_the_rest_needs(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=IMAGES, y_train=LABELS)
    write_pictures(tmp_path / "pictures", {"a": 2, "b": 2})
    command = [sys.executable, "-c", WITHOUT_EXTRAS, str(tmp_path / "a.npz"), str(tmp_path / "pictures")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(fastnn.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    counts, *errors = done.stdout.splitlines()
    assert counts == "18 6"
    assert [line.split(":")[0] for line in errors] == [
        "the digits data set needs fastnn[app]",
        "downloading data needs fastnn[app]",
        "reading pictures needs fastnn[app]",
    ]
    assert all("pip install 'fastnn[app]'" in line for line in errors)


# --------------------------------------------------------------------------------------------- writing a file


def test_atomic_path_replaces_a_file_and_keeps_its_suffix(tmp_path: Path) -> None:
    target = tmp_path / "a.png"
    target.write_text("old")
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".png"
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_path_leaves_the_old_file_when_writing_fails(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_atomic_path_names_the_file_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(OSError, match="No space left") as caught,
        atomic_path(tmp_path / "a.txt") as temporary,
    ):
        temporary.write_text("half")
    assert caught.value.filename == str(tmp_path / "a.txt")
    assert os.listdir(tmp_path) == []


def test_atomic_path_keeps_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    with atomic_path(tmp_path / "link.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_atomic_path_refuses_impossible_places(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"), atomic_path(tmp_path / "gone" / "a.txt"):
        pass
    with pytest.raises(IsADirectoryError, match="got a folder"), atomic_path(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.parametrize("name", ["pipe", "link"])
def test_atomic_path_refuses_what_is_no_file(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with (
        pytest.raises(OSError, match=f"expected the name of a file to write, got a pipe: .*{name}"),
        atomic_path(tmp_path / name),
    ):
        pytest.fail("the block runs")
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_atomic_path_keeps_the_permissions_of_a_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    target.chmod(0o600)
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o600
