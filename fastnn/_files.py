"""Writing a file so that nobody ever sees half of it."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OTHER_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; what was written there becomes ``path`` when the block ends.

    The data reaches the disk before the rename, so after a crash ``path`` holds either its old content or the
    whole new one. When the block raises, the temporary file is removed and ``path`` stays as it was. The
    temporary name keeps the suffix, because some writers choose the format by it. A file keeps its permissions.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
        OSError: ``path`` is a pipe, a device or a socket; the disk is full, or the folder cannot be written. It names
            ``path`` where it named no file.
    """
    # A link keeps being a link: its target is replaced.
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "cannot write here, no such folder", str(target.parent))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected the name of a file to write, got a folder", str(path))
    if target.exists() and not target.is_file():
        kind = _OTHER_KINDS.get(stat.S_IFMT(target.stat().st_mode), "something else")
        raise OSError(errno.EINVAL, f"expected the name of a file to write, got {kind}", str(path))
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
    try:
        yield temporary
        _flush_to_disk(temporary)
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
        if os.name == "posix":
            _flush_to_disk(target.parent)
    except OSError as error:
        if error.filename is None:  # writers of other libraries do not say which file
            error.filename = os.fspath(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    # Windows flushes through writable descriptors only, POSIX opens folders for reading only.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
