"""Cutting large files into parts of about SPLIT_BYTES, so that one file is many shards.

Plain JSON lines are cut at the first line that begins at or behind each multiple of SPLIT_BYTES. Finding these places means
reading the file once, which also counts the lines in front of each part, so that messages and score tables name true line
numbers; what was found is remembered by size and modification time. Parquet is cut between row groups, by its footer.
Compressed lines and `.txt` (one row a file) stay whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.core.durable import write_json
from posttrain.core.rundir import read_json
from posttrain.data.shards import Span, suffix_of

SPLIT_BYTES = 256 << 20
READ_BYTES = 8 << 20


def spans_of(path: Path, cache: Path) -> list[tuple[Span, int]]:
    """(part, its bytes) of a file that is larger than SPLIT_BYTES and can be cut; else none.

    Args:
        path: the file.
        cache: JSON file that remembers what was found; written anew where it does not know the file.
    """
    facts, kind = path.stat(), suffix_of(path)
    if facts.st_size <= SPLIT_BYTES or kind not in (".jsonl", ".ndjson", ".parquet"):
        return []
    if kind == ".parquet":
        return parquet_spans(path)
    known = read_json(cache)
    known = known if isinstance(known, dict) else {}
    stamp = json.dumps([SPLIT_BYTES, facts.st_size, facts.st_mtime_ns])
    entry: Any = known.get(str(path))
    if not entry or entry[0] != stamp:
        entry = [stamp, [list(span) for span in line_spans(path)]]
        write_json(cache, {**known, str(path): entry}, indent=None)
    return [(Span(*span), span[1] - span[0]) for span in entry[1]]


def line_spans(path: Path) -> list[Span]:
    """Parts of a file of lines; each begins at the start of a line."""
    size = path.stat().st_size
    starts = [(0, 0), *((begin, lines) for begin, lines in _starts(path) if begin < size)]
    ends = [*(begin for begin, _ in starts[1:]), size]
    return [Span(begin, end, lines) for (begin, lines), end in zip(starts, ends, strict=True)]


def _starts(path: Path) -> Iterator[tuple[int, int]]:
    """(offset, lines in front of it) of the first line at or behind each multiple of SPLIT_BYTES."""
    offset = lines = 0
    mark = SPLIT_BYTES
    with open(path, "rb") as file:
        while chunk := file.read(READ_BYTES):
            while (at := chunk.find(b"\n", max(0, mark - 1 - offset))) >= 0:
                begin = offset + at + 1
                yield begin, lines + chunk.count(b"\n", 0, at + 1)
                mark = (begin // SPLIT_BYTES + 1) * SPLIT_BYTES
            lines += chunk.count(b"\n")
            offset += len(chunk)


def parquet_spans(path: Path) -> list[tuple[Span, int]]:
    """(part, its compressed bytes): row groups together until they reach SPLIT_BYTES; none for a damaged file."""
    import pyarrow
    import pyarrow.parquet as pq

    try:
        footer = pq.read_metadata(path)
    except (pyarrow.ArrowException, OSError):
        return []
    found: list[tuple[Span, int]] = []
    begin = before = size = rows = 0
    for i in range(footer.num_row_groups):
        group = footer.row_group(i)
        size += sum(group.column(c).total_compressed_size for c in range(group.num_columns))
        rows += group.num_rows
        if size >= SPLIT_BYTES or i + 1 == footer.num_row_groups:
            found.append((Span(begin, i + 1, before), size))
            begin, before, size = i + 1, rows, 0
    return found
