"""Part files: a shard's finished work, visible only when it is complete.

A part is written beside its name, flushed, and renamed; so a part that exists is whole, a kill costs the shard in hand,
and a rerun goes on with the shards that have no part.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.core.durable import disk_errors, fsync_dir
from posttrain.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np


@contextmanager
def new_part(path: Path) -> Iterator[Path]:
    """Yields a temporary name to write to; renames it to `path` if the block ends without an error."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            yield temporary
            fd = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(temporary, path)
            fsync_dir(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes named arrays as one safetensors part."""
    from safetensors.numpy import save

    with new_part(path) as temporary:
        temporary.write_bytes(save(arrays))


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads a safetensors part.

    Raises:
        ArtifactError: unreadable, which only damage from outside can cause.
    """
    from safetensors.numpy import load

    try:
        return load(path.read_bytes())
    except Exception as error:
        fix = "delete this file and run again; only its shard is redone"
        raise ArtifactError(f"unreadable part ({error})", where=str(path), fix=fix) from None


def link_part(source: Path, to: Path) -> None:
    """The same file under a second name; a copy where the file system cannot."""
    try:
        os.link(source, to)
    except OSError:
        shutil.copyfile(source, to)
