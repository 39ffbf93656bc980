"""Shards: files of rows, read one row at a time and written with deterministic bytes.

Formats, by suffix: `.jsonl` / `.ndjson`, each plain, `.gz` or `.zst`; `.parquet`; `.txt` (one file is one text row).
A row number counts physical lines from 1 in JSON lines (what an editor shows) and rows from 1 in parquet.
Memory stays within about five times the longest row: lines are cut out of 32 KiB pieces, parquet is read in batches.

Two kinds of fault are kept apart. A bad *row* (not UTF-8, not JSON, longer than MAX_ROW_BYTES) stops or is skipped and
counted, as `on_bad` says. A damaged *file* (a gz or zst that was cut or has bytes behind its end, a parquet without
footer, text under a `.gz` name) always stops, since rows before the damage must not pass for the whole file.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from posttrain.data.bad_rows import BadRows
from posttrain.data.compressed import CHUNK, inflated
from posttrain.data.parquet import parquet_rows, plain
from posttrain.data.strict_json import RowError, parse
from posttrain.data.writer import ShardWriter, json_line
from posttrain.errors import DataError

__all__ = ["BadRows", "ShardWriter", "Span", "expand_shards", "json_line", "plain", "read_shard", "suffix_of"]


LINE_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".jsonl.zst", ".ndjson.zst")
SUFFIXES = (*LINE_SUFFIXES, ".parquet", ".txt")
MAX_ROW_BYTES = 512 * 2**20


class Span(NamedTuple):
    """Part of a file: bytes [begin, end) of plain JSON lines, both at the start of a line, or row groups of a parquet.

    `before` is the number of lines or rows in front of it, so that row numbers stay those of the file.
    """

    begin: int
    end: int
    before: int


def suffix_of(path: Path | str) -> str | None:
    """The known suffix of a shard, or None."""
    name = Path(path).name.lower()
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s)), None)


def expand_shards(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """Files behind names, folders (searched recursively, hidden files left out) and globs, in sorted order each.

    Of a folder that a stage wrote (`dataset.json` beside `rows-00000...`) only the rows are taken, not the scores beside them.
    A name that exists is taken as it is, whatever characters it has; only then is it tried as a glob. A file reached twice is
    read once.

    Raises:
        DataError: a path that matches nothing, a folder without shards, or a file of an unknown format.
    """
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    found: dict[Path, Path] = {}
    for file in (file for path in listed for file in _expand(str(path))):
        found.setdefault(file.resolve(), file)
    return list(found.values())


def _expand(text: str) -> list[Path]:
    path = Path(text)
    if path.is_dir():
        rows = list(path.glob("rows-[0-9]*")) if (path / "dataset.json").is_file() else []
        files = sorted(f for f in rows or path.rglob("*") if f.is_file() and suffix_of(f) and not _hidden(f, path))
        if not files:
            raise DataError("the folder holds no shards", where=text, fix=f"known formats: {', '.join(SUFFIXES)}")
        return files
    if path.is_file():
        if suffix_of(path) is None:
            raise DataError(f"unknown format `{path.suffix}`", where=text, fix=f"known formats: {', '.join(SUFFIXES)}")
        return [path]
    if glob.has_magic(text):
        names = sorted(name for name in glob.glob(text, recursive=True) if Path(name).is_file())
        if known := [Path(name) for name in names if suffix_of(name)]:
            return known
        raise DataError(
            "the glob matches no shard",
            where=text,
            fix=f"known formats: {', '.join(SUFFIXES)}; escape glob characters of a real name as `[[]`",
        )
    raise DataError("no such file or folder", where=text, fix=_nearest(path))


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _nearest(path: Path) -> str:
    import difflib

    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"did you mean `{path.parent / near[0]}`?" if near else "check the path"


class Wanted:
    """Which row numbers a reader gives: those behind `start`, or only these ascending ones."""

    def __init__(self, start: int = 0, only: Iterable[int] | None = None) -> None:
        self._start = start
        self._only = None if only is None else iter(only)
        self._next = None if self._only is None else next(self._only, None)

    @property
    def over(self) -> bool:
        """No further row is wanted."""
        return self._only is not None and self._next is None

    def upto(self, first: int, last: int) -> Sequence[int]:
        """The wanted numbers from `first` to `last`; called with ascending ranges."""
        if self._only is None:
            return range(max(first, self._start + 1), last + 1)
        found = []
        while self._next is not None and self._next <= last:
            found.append(self._next)
            self._next = next(self._only, None)
        return found


def read_shard(
    path: Path | str,
    *,
    on_bad: str = "stop",
    bad: BadRows | None = None,
    start: int = 0,
    span: Span | None = None,
    only: Iterable[int] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of one shard as (row number from 1, dict); rows up to number `start` are passed over.

    Args:
        path: a file with one of SUFFIXES.
        on_bad: `stop` or `skip`, for bad rows.
        bad: takes the counts of skipped rows.
        start: last row number already seen, to go on where a reader stopped.
        only: ascending row numbers; others are not parsed, and what is behind the last one is not read.
        span: read this part of a parquet or of plain JSON lines only.

    Raises:
        DataError: a bad row under `stop`; a damaged or unreadable file always, naming the file and the byte offset.
    """
    path, bad = Path(path), bad if bad is not None else BadRows()
    kind = suffix_of(path)
    if kind is None:
        raise DataError("unknown format", where=str(path), fix=f"known formats: {', '.join(SUFFIXES)}")
    try:
        if kind == ".parquet":
            yield from parquet_rows(path, on_bad, bad, Wanted(start, only), span)
        elif kind == ".txt":
            yield from _text_rows(path, on_bad, bad, Wanted(start, only))
        else:
            yield from _json_rows(path, kind, on_bad, bad, Wanted(start, only), span)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path)) from None


def _json_rows(path: Path, kind: str, on_bad: str, bad: BadRows, wanted: Wanted, span: Span | None) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, "rb") as file:
        chunks = inflated(file, path, kind) if kind.endswith((".gz", ".zst")) else _plain(file, span)
        for number, (line, size) in enumerate(_lines(chunks), 1 + (span.before if span else 0)):
            if wanted.over:
                return
            if not wanted.upto(number, number) or (line is not None and not line.strip(b" \t\r\n\xef\xbb\xbf")):
                continue
            try:
                row = _json_row(line, size, number)
            except RowError as error:
                bad.take(error, f"{path}:{number}", on_bad)
            else:
                yield number, row


def _plain(file: BinaryIO, span: Span | None) -> Iterator[bytes]:
    """Pieces of a file, or of a part of it."""
    if span is None:
        yield from iter(lambda: file.read(CHUNK), b"")
        return
    left = span.end - file.seek(span.begin)
    while left and (chunk := file.read(min(CHUNK, left))):
        left -= len(chunk)
        yield chunk


def _lines(chunks: Iterable[bytes]) -> Iterator[tuple[bytes | None, int]]:
    """(line without its newline, size); None instead of a line longer than MAX_ROW_BYTES."""
    parts: list[bytes] = []
    size = 0
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        parts.append(first)
        size += len(first)
        for piece in rest:
            yield (b"".join(parts) if size <= MAX_ROW_BYTES else None), size
            parts, size = [piece], len(piece)
        if size > MAX_ROW_BYTES:
            parts = []
    if size:
        yield (b"".join(parts) if size <= MAX_ROW_BYTES else None), size


def _json_row(line: bytes | None, size: int, number: int) -> dict[str, Any]:
    if line is None:
        raise RowError("too long", f"the row has {size} bytes, the limit is {MAX_ROW_BYTES}", "cut the row into several")
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise RowError("not UTF-8", "UTF-16, expected UTF-8", "convert: iconv -f UTF-16 -t UTF-8") from None
        raise RowError(
            "not UTF-8", f"byte {error.start + 1} of the row is 0x{line[error.start]:02x}, not UTF-8", "convert the file to UTF-8"
        ) from None
    row = parse(text)
    if not isinstance(row, dict):
        raise RowError("not an object", f"expected a JSON object, got {_json_type(row)}", "one JSON object a line")
    return row


def _json_type(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _text_rows(path: Path, on_bad: str, bad: BadRows, wanted: Wanted) -> Iterator[tuple[int, dict[str, Any]]]:
    if not wanted.upto(1, 1):
        return
    size = path.stat().st_size
    try:
        if size > MAX_ROW_BYTES:
            raise RowError("too long", f"the file has {size} bytes, the limit of one row is {MAX_ROW_BYTES}", "cut it into several")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad.take(RowError("not UTF-8", f"byte {error.start + 1} is not UTF-8"), f"{path}:1", on_bad)
    except RowError as error:
        bad.take(error, f"{path}:1", on_bad)
    else:
        yield 1, {"id": path.name, "text": text.replace("\r\n", "\n")}
