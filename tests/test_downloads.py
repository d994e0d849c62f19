"""Downloading from a server on this machine: checksums, broken transfers, dead mirrors, a full disk."""

from __future__ import annotations

import hashlib
import io
import shutil
import socket
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from fastnn import _downloads, data
from fastnn._downloads import DOWNLOADS, Download
from fastnn.data import DataError

CLASSES = ("zero", "one")
FILES = {
    "train-images-idx3-ubyte.gz": b"\0\0\x08\x03\0\0\0\x04\0\0\0\x02\0\0\0\x02" + bytes(range(16)),
    "train-labels-idx1-ubyte.gz": b"\0\0\x08\x01\0\0\0\x04" + bytes([0, 1, 0, 1]),
    "t10k-images-idx3-ubyte.gz": b"\0\0\x08\x03\0\0\0\x02\0\0\0\x02\0\0\0\x02" + bytes(range(8)),
    "t10k-labels-idx1-ubyte.gz": b"\0\0\x08\x01\0\0\0\x02" + bytes([1, 0]),
}
CHECKSUMS = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


class Server(ThreadingHTTPServer):
    """Serves the same files under /good/, one byte changed under /wrong/, half of each under /half/."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(FILES)
        self.requests: list[str] = []

    def mirror(self, kind: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{kind}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        _, kind, name = self.path.split("/")
        if kind == "missing":
            self.send_error(404)
            return
        content = self.server.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if kind == "wrong":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.wfile.write(content[: len(content) // 2] if kind == "half" else content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTNN_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "cache"


def use_mirrors(monkeypatch: pytest.MonkeyPatch, *mirrors: str) -> None:
    monkeypatch.setitem(DOWNLOADS, "mnist", Download(mirrors, CHECKSUMS, CLASSES))


def dead_mirror() -> str:
    """An address where nobody listens: a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


def kept_files(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())


WHOLE = sorted(f"mnist/{name}" for name in FILES)


def test_a_download_is_checked_cached_and_not_repeated(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_mirrors(monkeypatch, server.mirror("good"))
    train, test = data.load("mnist", progress=False)
    assert train.images.tolist() == np.arange(16).reshape(4, 1, 2, 2).tolist()
    assert (train.labels.tolist(), test.labels.tolist(), train.classes) == ([0, 1, 0, 1], [1, 0], CLASSES)
    assert kept_files(cache) == WHOLE
    assert len(server.requests) == 4
    data.load("mnist", progress=False)
    assert len(server.requests) == 4


def test_a_damaged_file_in_the_cache_is_downloaded_again(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_mirrors(monkeypatch, server.mirror("good"))
    data.load("mnist", progress=False)
    (cache / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(b"damaged")
    train, _ = data.load("mnist", progress=False)
    assert len(train) == 4
    assert len(server.requests) == 5


@pytest.mark.parametrize("first", ["dead", "missing", "wrong", "half"])
def test_the_next_mirror_is_tried(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    mirror = dead_mirror() if first == "dead" else server.mirror(first)
    use_mirrors(monkeypatch, mirror, server.mirror("good"))
    train, _ = data.load("mnist", progress=False)
    assert train.images.max() == 15
    assert kept_files(cache) == WHOLE
    assert sum("/good/" in path for path in server.requests) == 4


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("dead", "no connection"),
        ("missing", "the server answered 404"),
        ("wrong", "the checksum is wrong"),
        ("half", "the transfer broke off"),
    ],
)
def test_without_a_good_mirror_nothing_is_kept(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str, reason: str
) -> None:
    mirror = dead_mirror() if kind == "dead" else server.mirror(kind)
    use_mirrors(monkeypatch, mirror)
    with pytest.raises(DataError) as caught:
        data.load("mnist", progress=False)
    message = str(caught.value)
    assert reason in message
    assert f"{mirror}train-images-idx3-ubyte.gz" in message
    assert CHECKSUMS["train-images-idx3-ubyte.gz"] in message
    assert kept_files(cache) == []


def test_a_full_disk_is_not_blamed_on_the_mirror(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    use_mirrors(monkeypatch, server.mirror("good"), server.mirror("good"))
    monkeypatch.setattr(shutil, "move", full)
    with pytest.raises(OSError, match="the disk is full") as caught:
        data.load("mnist", progress=False)
    assert str(caught.value.filename).endswith("train-images-idx3-ubyte.gz")
    assert len(server.requests) == 1
    assert kept_files(cache) == []


def test_the_progress_bar_follows_the_download(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = []

    class Recorder(_downloads._PoochProgress):
        def update(self, count: int) -> None:
            if self.total:
                steps.append((count, self.total))
            super().update(count)

    use_mirrors(monkeypatch, server.mirror("good"))
    monkeypatch.setattr(_downloads, "_PoochProgress", Recorder)
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take the captured stderr for a terminal
    data.load("mnist", progress=True)
    assert {total for _, total in steps} == {len(content) for content in FILES.values()}
    assert "train-images-idx3-ubyte.gz" in capsys.readouterr().err


def cifar10_archive(*, records: int = 4, cut: int = 0) -> bytes:
    """CIFAR-10's binary archive with few records: every pixel of a record is its label times ten."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w:gz") as archive:
        for name in [*(f"data_batch_{index}.bin" for index in range(1, 6)), "test_batch.bin"]:
            content = b"".join(bytes([label % 10]) + bytes([label % 10 * 10]) * 3072 for label in range(records))
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content) - cut
            archive.addfile(member, io.BytesIO(content))
    return output.getvalue()


def serve_cifar10(server: Server, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    server.files[_downloads.CIFAR10_ARCHIVE] = content
    files = {_downloads.CIFAR10_ARCHIVE: hashlib.sha256(content).hexdigest()}
    classes = DOWNLOADS["cifar10"].classes
    monkeypatch.setitem(DOWNLOADS, "cifar10", Download((server.mirror("good"),), files, classes))


def test_cifar10_is_read_from_its_archive(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_cifar10(server, monkeypatch, cifar10_archive(records=10))
    train, test = data.load("cifar10", progress=False)
    assert train.images.shape == (50, 3, 32, 32)
    assert test.labels.tolist() == list(range(10))
    assert (train.images[7] == 70).all()
    assert train.classes[7] == "horse"
    assert kept_files(cache) == ["cifar10/cifar-10-binary.tar.gz"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (cifar10_archive(records=10, cut=1), "expected data_batch_1.bin"),
        (cifar10_archive(records=4), "class 'deer' is empty"),
        (cifar10_archive(records=10)[:300], "damaged data"),
        (b"not an archive", "damaged data"),
    ],
    ids=["odd size", "missing class", "truncated", "other data"],
)
def test_an_unusable_cifar10_archive(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, words: str
) -> None:
    serve_cifar10(server, monkeypatch, content)
    with pytest.raises(DataError, match=words):
        data.load("cifar10", progress=False)


def test_the_known_data_sets_have_mirrors_and_sha256_sums() -> None:
    for name, download in DOWNLOADS.items():
        assert len(download.mirrors) >= 2, name
        assert all(mirror.endswith("/") for mirror in download.mirrors), name
        assert len(download.classes) == 10, name
        for sha256 in download.files.values():
            assert len(bytes.fromhex(sha256)) == 32, name
