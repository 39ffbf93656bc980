"""Writing so that a kill at any moment leaves either the old state or the new one, never a mixture."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.core.events import dumps
from posttrain.errors import ArtifactError

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EROFS: "the file system is read-only",
         errno.EFBIG: "the file-size limit is reached", errno.EACCES: "permission denied"}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full, read-only or forbidden disk into an ArtifactError that names path and free bytes."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        place = Path(error.filename or path)
        raise ArtifactError(
            f"cannot write: {_FULL[error.errno]} ({free_bytes(path):,} bytes free)",
            where=str(place),
            fix="free space or move the run folder; what was committed before is intact, run the same command again",
        ) from error


def free_bytes(path: Path) -> int:
    """Free bytes on the file system that holds `path` (or its nearest existing parent)."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def fsync_dir(path: Path) -> None:
    """Flushes a directory entry."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(folder: Path) -> None:
    """Flushes every file and directory below `folder`."""
    for root, _, names in os.walk(folder):
        for name in names:
            fd = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        fsync_dir(Path(root))


def write_text(path: Path, text: str) -> None:
    """Replaces a file atomically: temporary sibling, fsync, rename, fsync of the folder."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_dir(path.parent)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Strict JSON, written atomically."""
    write_text(path, dumps(value, indent=indent) + "\n")
