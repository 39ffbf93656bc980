"""Hidden states of the calibration windows between two blocks, in a memory-mapped file.

The file is as large as windows x length x width, far more than memory where it must be; only the rows in use are mapped
in, the next ones are asked for ahead of time, and rows that were used are let go.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


class States:
    """Hidden states [rows, length, width] on disk.

    Args:
        file: made with its full size where it is not there yet.
        shape: (rows, length, width).
        dtype: of the file; reads give float32.
        device: where reads go.
    """

    def __init__(
        self, file: Path, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.file, self.shape, self.dtype, self.device = file, shape, dtype, device
        self._row = shape[1] * shape[2] * dtype.itemsize
        if not file.is_file() or file.stat().st_size != shape[0] * self._row:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "wb") as stream:
                stream.truncate(shape[0] * self._row)
        with open(file, "r+b") as stream:
            self._map = mmap.mmap(stream.fileno(), 0)
        self._all = torch.frombuffer(self._map, dtype=dtype).view(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, end: int) -> Tensor:
        """float32 [end - start, length, width]; asks for as many rows again."""
        self._advise(end, 2 * end - start, mmap.MADV_WILLNEED)
        found = self._all[start:end].to(torch.float32, copy=True)
        self._advise(start, end, mmap.MADV_DONTNEED)
        return found.to(self.device)

    def write(self, start: int, values: Tensor) -> None:
        """Stores rows from `start` on."""
        end = start + len(values)
        self._all[start:end] = values.to(self._all.device)
        self._advise(start, end, mmap.MADV_DONTNEED)

    def flush(self) -> None:
        """All rows on disk."""
        self._map.flush()

    def remove(self) -> None:
        """Deletes the file; the object is of no use afterwards."""
        self.file.unlink(missing_ok=True)

    def _advise(self, start: int, end: int, advice: int) -> None:
        """Whole pages only, so that rows beside the range are not touched."""
        page = mmap.PAGESIZE
        first, last = start * self._row, min(end, self.shape[0]) * self._row
        first = (first // page if advice == mmap.MADV_WILLNEED else -(-first // page)) * page
        last = last // page * page
        if last > first:
            self._map.madvise(advice, first, last - first)


def batches(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each batch of rows."""
    for first in range(start, end, size):
        yield first, min(first + size, end)
