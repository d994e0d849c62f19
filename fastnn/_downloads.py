"""Data sets that are downloaded once: where they are, how they are recognised, how they reach the cache."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastnn._extras import MissingLibraryError, require


class DownloadError(Exception):
    """No mirror gave a file with the right checksum."""


TIMEOUT = 30  # seconds without a byte until the next mirror is tried
DIGIT_CLASSES = tuple("0123456789")
CIFAR10_ARCHIVE = "cifar-10-binary.tar.gz"


@dataclass(frozen=True)
class Download:
    """Files that every mirror offers under the same name, with their SHA-256, and the classes they hold."""

    mirrors: tuple[str, ...]
    files: Mapping[str, str]
    classes: tuple[str, ...]


# The authors publish MD5 sums of the same files; the SHA-256 are those of Keras and torchvision-rb.
DOWNLOADS = {
    "mnist": Download(
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        files={
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
        classes=DIGIT_CLASSES,
    ),
    "fashion-mnist": Download(
        mirrors=(
            "https://fashion-mnist.s3.eu-central-1.amazonaws.com/",
            "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        ),
        files={
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
        classes=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
    ),
    "kmnist": Download(
        mirrors=(
            "https://codh.rois.ac.jp/kmnist/dataset/kmnist/",
            "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        ),
        files={
            "train-images-idx3-ubyte.gz": "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            "train-labels-idx1-ubyte.gz": "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
            "t10k-images-idx3-ubyte.gz": "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
            "t10k-labels-idx1-ubyte.gz": "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
        },
        classes=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    ),
    # The binary archive: the one for Python holds pickles.
    "cifar10": Download(
        mirrors=(
            "https://www.cs.toronto.edu/~kriz/",
            "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/",
        ),
        files={CIFAR10_ARCHIVE: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
}


def fetch(name: str, progress: bool) -> Path:
    """Download the files of a known data set unless the cache has them; return the folder that holds them.

    The cache is the folder ``FASTNN_DATA``, or the user's cache folder. Mirrors are tried in turn. A file
    appears there only when its checksum is right: pooch writes it under a temporary name first.

    Raises:
        DownloadError: no mirror gave the file.
        OSError: the disk is full or the cache cannot be written.
    """
    pooch = require("pooch", "downloading data")
    pooch.get_logger().setLevel("WARNING")
    folder = Path(os.environ.get("FASTNN_DATA") or pooch.os_cache("fastnn")) / name
    download = DOWNLOADS[name]
    for file_name, sha256 in download.files.items():
        _fetch_file(file_name, sha256, download.mirrors, folder, progress)
    return folder


def _fetch_file(file_name: str, sha256: str, mirrors: tuple[str, ...], folder: Path, progress: bool) -> None:
    pooch = require("pooch", "downloading data")
    network_error = require("requests.exceptions", "downloading data").RequestException
    failures = []
    for mirror in mirrors:
        url = mirror + file_name
        try:
            with progress_bar(file_name, None, progress) as advance:
                downloader = pooch.HTTPDownloader(
                    progressbar=_PoochProgress(advance), timeout=TIMEOUT, chunk_size=1 << 16
                )
                pooch.retrieve(url, f"sha256:{sha256}", fname=file_name, path=folder, downloader=downloader)
            return
        except network_error as error:
            failures.append(f"{url}: {_network_reason(error)}")
        except ValueError:  # pooch's word for a wrong checksum
            failures.append(f"{url}: the checksum is wrong")
        except OSError as error:
            if error.errno == errno.ENOSPC:
                full = "the disk is full, nothing was kept of the download"
                raise OSError(errno.ENOSPC, full, str(folder / file_name)) from error
            raise
    tried = "; ".join(failures)
    raise DownloadError(f"{file_name}: expected a download with SHA-256 {sha256}, no mirror gave it ({tried})")


def _network_reason(error: Any) -> str:
    """A few words: the text of a failed connection nests the error of every layer below."""
    if error.response is not None:
        return f"the server answered {error.response.status_code}"
    name = type(error).__name__
    if name in ("ConnectTimeout", "ReadTimeout"):
        return "the server does not answer"
    return "the transfer broke off" if name == "ChunkedEncodingError" else "no connection"


class _PoochProgress:
    """The few methods that pooch calls on a progress bar."""

    def __init__(self, advance: Callable[[int, int | None], None]) -> None:
        self.advance = advance
        self.total = 0

    def update(self, count: int) -> None:
        self.advance(count, self.total)

    def reset(self) -> None:
        # pooch then adds the exact total in one step; the bar is already there.
        self.advance = lambda count, total: None

    def close(self) -> None:
        pass


@contextmanager
def progress_bar(title: str, total: int | None, visible: bool) -> Iterator[Callable[[int, int | None], None]]:
    """Yield ``advance(count, total)``, which draws on a terminal at stderr, or without one does nothing."""
    try:
        rich_progress = require("rich.progress", "a progress bar")
        console = require("rich.console", "a progress bar").Console(stderr=True)
    except MissingLibraryError:
        visible = False
    if not visible or not console.is_terminal:
        yield lambda count, total: None
        return
    with rich_progress.Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count, total: bar.update(task, advance=count, total=total)
