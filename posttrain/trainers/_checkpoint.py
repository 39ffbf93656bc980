"""Checkpoints that count only when they are complete; no torch here.

transformers writes straight into `checkpoint-N`, so a kill in the middle of a save leaves a folder that looks like a
checkpoint, and its rotation runs before anything could mark the new one as good. Here a checkpoint is a folder that
holds `COMPLETE.json`, written last and atomically, after every other file was flushed to the disk. The marker lists
each file with its size and CRC-32; a folder that does not match its marker is damaged and never used. Older checkpoints
are deleted only once a newer one is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.core.durable import disk_errors, fsync_tree, write_json
from posttrain.errors import ArtifactError

MARKER = "COMPLETE.json"
PREFIX = "checkpoint-"
CHUNK = 1 << 22
Say = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Args:
        path: its folder.
        step: optimizer steps done.
        world_size: processes that wrote it.
        extra: what else the writer recorded.
    """

    path: Path
    step: int
    world_size: int
    extra: dict[str, Any]


@contextmanager
def save_errors(folder: Path) -> Iterator[None]:
    """`disk_errors` also for what safetensors ("... (os error 28)") and torch ("failed writing file") raise instead of OSError."""
    with disk_errors(folder):
        try:
            yield
        except Exception as error:
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number:
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
            if isinstance(error, RuntimeError) and "failed writing file" in str(error):
                raise ArtifactError(
                    "cannot write a checkpoint file: disk full, quota or size limit",
                    where=str(folder),
                    fix="free space, then run the same command again; older checkpoints are intact",
                ) from error
            raise


def crc32(file: Path) -> int:
    """CRC-32 of a file's bytes."""
    value = 0
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def mark_complete(folder: Path, step: int, world_size: int, **extra: Any) -> None:
    """Flushes every file of `folder`, then writes its marker; call it on rank 0, after a barrier."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER and not p.name.startswith(".COMPLETE"))
    listed = [{"name": p.relative_to(folder).as_posix(), "size": p.stat().st_size, "crc32": crc32(p)} for p in files]
    with disk_errors(folder):
        fsync_tree(folder)
    write_json(folder / MARKER, {"step": step, "world_size": world_size, "files": listed, **extra})


def read_checkpoint(folder: Path) -> Checkpoint:
    """Opens one checkpoint and checks every file against the marker.

    Raises:
        ArtifactError: no marker, an unreadable one, or a file that is missing, of another size, or altered.
    """
    marker = folder / MARKER
    if not marker.is_file():
        raise ArtifactError(f"not complete: it has no {MARKER} (stopped in the middle of a save)", where=str(folder))
    try:
        record = json.loads(marker.read_text(encoding="utf-8"))
        step, world_size, files = record.pop("step"), record.pop("world_size"), record.pop("files")
        for item in files:
            _check_file(folder / item["name"], item["size"], item["crc32"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"unreadable marker ({type(error).__name__}: {error})", where=str(marker)) from None
    return Checkpoint(folder, step, world_size, record)


def _check_file(file: Path, size: int, checksum: int) -> None:
    found = file.stat().st_size if file.is_file() else None
    if found != size:
        state = "missing" if found is None else f"{found} bytes"
        raise ArtifactError(f"damaged: expected {size} bytes, found {state}", where=str(file))
    if crc32(file) != checksum:
        raise ArtifactError("damaged: same size, other bytes (CRC-32 differs)", where=str(file))


def step_of(folder: Path) -> int:
    """The step in a folder name `checkpoint-N`; -1 for any other name."""
    digits = folder.name.removeprefix(PREFIX)
    return int(digits) if folder.name.startswith(PREFIX) and digits.isdigit() else -1


def checkpoint_folders(work: Path) -> list[Path]:
    """Folders named `checkpoint-N` in `work`, newest first; links are not followed."""
    if not work.is_dir():
        return []
    found = [p for p in work.iterdir() if p.is_dir() and not p.is_symlink() and step_of(p) >= 0]
    return sorted(found, key=step_of, reverse=True)


def latest_complete(work: Path, say: Say | None = None) -> Checkpoint | None:
    """The newest complete checkpoint in `work`, or None; `say` hears of each newer folder that was passed over."""
    for folder in checkpoint_folders(Path(work)):
        try:
            found = read_checkpoint(folder)
        except ArtifactError as error:
            if say:
                say(f"checkpoint ignored: {error}")
            continue
        if say:
            say(f"resuming from {folder.name}")
        return found
    return None


def clear(folder: Path) -> None:
    """Deletes a checkpoint; the marker goes first, so a kill here cannot leave a folder that looks complete."""
    if folder.is_dir():
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder)


def rotate(work: Path, keep: int, newest: int) -> list[int]:
    """Deletes complete and incomplete checkpoints older than the newest `keep`, only if step `newest` is complete.

    Returns:
        The steps deleted. Folders with a higher step than `newest` are left alone.
    """
    folders = [p for p in checkpoint_folders(work) if step_of(p) <= newest]
    if not folders or not (folders[0] / MARKER).is_file() or step_of(folders[0]) != newest:
        return []
    complete = [p for p in folders if (p / MARKER).is_file()]
    kept = set(complete[: max(keep, 1)])
    dropped = [p for p in folders if p not in kept]
    for folder in dropped:
        clear(folder)
    return [step_of(p) for p in dropped]
