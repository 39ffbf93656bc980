"""Writing so that a kill at any moment leaves either the old state or the new one, never a mixture."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.core.events import dumps
from posttrain.errors import ArtifactError, PosttrainError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file-size limit is reached",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
}
_NATIVE = re.compile(r"(?:os error|errno|os \{ code:) (\d+)", re.IGNORECASE)
_TORCH = ("PytorchStreamWriter failed writing", "inline_container.cc")


def _reason(error: BaseException) -> str | None:
    """Why the disk refused, out of an OSError or the text of a native library's error; None if it did not."""
    if isinstance(error, OSError) and error.errno is not None:
        return _REASONS.get(error.errno)
    text = str(error)
    if any(mark in text for mark in _TORCH):
        return "a file could not be written to its end; the disk is full or a size limit is reached"
    return next((_REASONS[int(n)] for n in _NATIVE.findall(text) if int(n) in _REASONS), None)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full, read-only or forbidden disk into an ArtifactError that names path and free bytes.

    Errors of native writers (safetensors, pyarrow, torch), which are no OSError, are known by their text.
    """
    try:
        yield
    except PosttrainError:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        place = getattr(error, "filename", None) or path
        raise ArtifactError(
            f"{reason} ({free_bytes(path):,} bytes free there)",
            where=str(place),
            fix="free space, or move the run folder with --runs; what was committed before is intact, and the same command goes on",
        ) from error


def free_bytes(path: Path) -> int:
    """Free bytes on the file system that holds `path` (or its nearest existing parent)."""
    path = Path(path).absolute()
    while not os.path.exists(path):
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
    """Replaces a file atomically: temporary sibling, fsync, rename, fsync of the folder.

    Raises:
        ArtifactError: the disk is full, read-only or forbidden; the old file is intact.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_dir(path.parent)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Strict JSON, written atomically."""
    write_text(path, dumps(value, indent=indent) + "\n")
