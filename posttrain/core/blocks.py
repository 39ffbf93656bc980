"""Long work in blocks: each finished block is a file in the stage's work folder, so a killed stage goes on with the next one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


def write_blocks(
    folder: Path, count: int, lines: Callable[[int], Iterable[bytes]], after: Callable[[int], None] | None = None
) -> list[Path]:
    """Writes the blocks that are not there yet.

    Args:
        folder: made if missing; must belong to one config and one input.
        count: how many blocks there are.
        lines: number of a block -> its lines, with line ends; must not depend on other blocks.
        after: called with the number of each block, finished now or earlier; for progress.

    Returns:
        The files in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(count):
        file = folder / f"{number:06d}.jsonl"
        if not file.exists():
            partial = file.with_suffix(".tmp")
            partial.write_bytes(b"".join(lines(number)))
            partial.replace(file)
        files.append(file)
        if after is not None:
            after(number)
    return files


def join_blocks(files: Sequence[Path], target: Path) -> None:
    """Writes the contents of `files` one after the other into `target`."""
    with open(target, "wb") as out:
        for file in files:
            with open(file, "rb") as block:
                shutil.copyfileobj(block, out)
