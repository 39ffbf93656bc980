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
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from posttrain.core.events import dumps
from posttrain.data.strict_json import RowError, check_surrogates, parse
from posttrain.errors import DataError

LINE_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".jsonl.zst", ".ndjson.zst")
SUFFIXES = (*LINE_SUFFIXES, ".parquet", ".txt")
MAX_ROW_BYTES = 512 * 2**20
CHUNK = 32 * 2**10
PARQUET_BATCH = 64
ZSTD_LEVEL = 6


@dataclass
class BadRows:
    """Rows left out, counted by reason, with the first few places."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """All rows left out."""
        return sum(self.counts.values())

    def take(self, error: RowError, where: str, on_bad: str) -> None:
        """Raises a DataError naming `where` under `stop`; counts under `skip`."""
        if on_bad == "stop":
            raise DataError(str(error), where=where, fix=error.fix or "mend the row, or set `on_bad: skip`") from None
        self.counts[error.reason] += 1
        if len(self.examples) < 5:
            self.examples.append(f"{where}: {error}")

    def report(self) -> dict[str, Any]:
        """JSON-ready: total, by reason, first examples."""
        return {"total": self.total, "reasons": dict(sorted(self.counts.items())), "examples": self.examples}

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.counts.items()))


def suffix_of(path: Path | str) -> str | None:
    """The known suffix of a shard, or None."""
    name = Path(path).name.lower()
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s)), None)


def expand_shards(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """Files behind names, folders (searched recursively, hidden files left out) and globs, in sorted order each.

    A name that exists is taken as it is, whatever characters it has; only then is it tried as a glob. A file reached
    twice is read once.

    Raises:
        DataError: a path that matches nothing, a folder without shards, or a file of an unknown format.
    """
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    found = [file for path in listed for file in _expand(str(path))]
    return list({file.resolve(): file for file in reversed(found)}.values())[::-1]


def _expand(text: str) -> list[Path]:
    path = Path(text)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and suffix_of(f) and not _hidden(f, path))
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
        raise DataError("the glob matches no shard", where=text, fix=f"known formats: {', '.join(SUFFIXES)}; escape glob characters of a real name as `[[]`")
    raise DataError("no such file or folder", where=text, fix=_nearest(path))


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _nearest(path: Path) -> str:
    import difflib

    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"did you mean `{path.parent / near[0]}`?" if near else "check the path"


def read_shard(
    path: Path | str, *, on_bad: str = "stop", bad: BadRows | None = None, start: int = 0
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of one shard as (row number from 1, dict); rows up to number `start` are passed over.

    Args:
        path: a file with one of SUFFIXES.
        on_bad: `stop` or `skip`, for bad rows.
        bad: takes the counts of skipped rows.
        start: last row number already seen, to go on where a reader stopped.

    Raises:
        DataError: a bad row under `stop`; a damaged or unreadable file always, naming the file and the byte offset.
    """
    path, bad = Path(path), bad if bad is not None else BadRows()
    kind = suffix_of(path)
    if kind is None:
        raise DataError("unknown format", where=str(path), fix=f"known formats: {', '.join(SUFFIXES)}")
    try:
        if kind == ".parquet":
            yield from _parquet_rows(path, on_bad, bad, start)
        elif kind == ".txt":
            yield from _text_rows(path, on_bad, bad, start)
        else:
            yield from _json_rows(path, kind, on_bad, bad, start)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path)) from None


def _json_rows(path: Path, kind: str, on_bad: str, bad: BadRows, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, "rb") as file:
        chunks = _inflated(file, path, kind) if kind.endswith((".gz", ".zst")) else iter(lambda: file.read(CHUNK), b"")
        for number, (line, size) in enumerate(_lines(chunks), 1):
            if number <= start or (line is not None and not line.strip(b" \t\r\n\xef\xbb\xbf")):
                continue
            try:
                row = _json_row(line, size, number)
            except RowError as error:
                bad.take(error, f"{path}:{number}", on_bad)
            else:
                yield number, row


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
        raise RowError("not UTF-8", f"byte {error.start + 1} of the row is 0x{line[error.start]:02x}, not UTF-8", "convert the file to UTF-8") from None
    row = parse(text)
    if not isinstance(row, dict):
        raise RowError("not an object", f"expected a JSON object, got {_json_type(row)}", "one JSON object a line")
    return row


def _json_type(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _inflated(file: BinaryIO, path: Path, kind: str) -> Iterator[bytes]:
    """Decompressed pieces of a .gz (all members) or .zst (all frames); an empty file is empty."""
    new = _gz_decoder if kind.endswith(".gz") else _zst_decoder()
    name = "gzip" if kind.endswith(".gz") else "zstd"
    decoder, offset, fresh = new(), 0, True
    while chunk := file.read(CHUNK):
        while chunk:
            if fresh and offset and name == "gzip" and not chunk.strip(b"\0"):
                offset += len(chunk)
                break
            try:
                data = decoder.decompress(chunk)
            except Exception as error:
                raise _damaged(path, name, offset, fresh, error) from None
            yield data
            rest = decoder.unused_data if decoder.eof else b""
            offset, fresh = offset + len(chunk) - len(rest), False
            if decoder.eof:
                decoder, fresh = new(), True
            chunk = rest
    if not fresh:
        raise DataError(f"the {name} file is cut: it ends inside its data at byte {offset}", where=str(path), fix="fetch or write it again")


def _gz_decoder() -> Any:
    return zlib.decompressobj(wbits=31)


def _zst_decoder() -> Callable[[], Any]:
    import zstandard

    return lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


def _damaged(path: Path, name: str, offset: int, fresh: bool, error: Exception) -> DataError:
    if fresh and offset == 0:
        return DataError(f"not a {name} file, whatever its suffix says ({error})", where=str(path), fix=f"rename it if it is plain text, or compress it with {name}")
    what = f"bytes behind the end of the {name} data" if fresh else f"damaged {name} data"
    return DataError(f"{what} at byte {offset} ({error})", where=str(path), fix="fetch or write it again")


def _text_rows(path: Path, on_bad: str, bad: BadRows, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
    if start >= 1:
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


def _parquet_rows(path: Path, on_bad: str, bad: BadRows, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    if path.stat().st_size == 0:
        return
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=False) as table:
            for group in range(table.num_row_groups):
                for batch in table.iter_batches(batch_size=PARQUET_BATCH, row_groups=[group]):
                    if number + batch.num_rows > start:
                        yield from _batch_rows(batch, number, path, on_bad, bad, start)
                    number += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"damaged or unreadable parquet after row {number}: {error}", where=str(path), fix="fetch or write it again") from None


def _batch_rows(batch: Any, before: int, path: Path, on_bad: str, bad: BadRows, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, row in enumerate(_to_rows(batch), before + 1):
        if number <= start:
            continue
        try:
            row = {name: plain(value) for name, value in row.items()}
            check_surrogates(row)
        except RowError as error:
            bad.take(error, f"{path}:{number}", on_bad)
        else:
            yield number, row


def _to_rows(batch: Any) -> list[dict[str, Any]]:
    import pyarrow

    try:
        return batch.to_pylist()
    except (UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise DataError(f"a column cannot be read as rows: {error}") from None


def plain(value: Any) -> Any:
    """A column value as JSON has it: dates as ISO text, bytes as UTF-8 text, decimals as text.

    Unset fields of a struct are dropped: a struct column holds every field for every row, with null where a row never
    had it, and only by dropping them do rows read the same from parquet as from JSON lines.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise RowError("not UTF-8", "a binary column is not UTF-8 text", "drop the column or decode it") from None
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        raise RowError("not finite", f"a column holds {value}", "write null or a finite number")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def json_line(row: dict[str, Any]) -> bytes:
    """One row as a strict JSON line with its newline."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    except (ValueError, TypeError):
        return dumps(row).encode("utf-8") + b"\n"


class ShardWriter:
    """Writes rows into numbered shards `rows-00000<suffix>`; the same rows give the same bytes.

    Args:
        folder: made if missing.
        rows_per_shard: rows a file.
        suffix: `.jsonl`, `.jsonl.zst` (one thread, fixed level, no time stamp) or `.parquet`.
    """

    def __init__(self, folder: Path, rows_per_shard: int = 50_000, suffix: str = ".jsonl.zst") -> None:
        if suffix not in (".jsonl", ".jsonl.zst", ".parquet"):
            raise DataError(f"cannot write `{suffix}`", where=str(folder), fix="use .jsonl, .jsonl.zst or .parquet")
        self.folder, self.rows_per_shard, self.suffix = Path(folder), rows_per_shard, suffix
        self.folder.mkdir(parents=True, exist_ok=True)
        self.files: list[dict[str, Any]] = []
        self._rows: list[Any] = []
        self._bytes = 0
        self._sink: Any = None

    def write(self, row: dict[str, Any]) -> None:
        """Adds one row."""
        if self._sink is None:
            self._open()
        if self.suffix == ".parquet":
            self._rows.append(row)
        else:
            self._sink.write(json_line(row))
        self._count += 1
        if self._count >= self.rows_per_shard:
            self._finish()

    def close(self) -> list[dict[str, Any]]:
        """Finishes the last shard; returns [{"file", "rows", "bytes"}]. No row at all gives one empty shard."""
        if self._sink is None and not self.files:
            self._open()
        if self._sink is not None:
            self._finish()
        return self.files

    def _open(self) -> None:
        self.path = self.folder / f"rows-{len(self.files):05d}{self.suffix}"
        self._file = open(self.path, "wb")
        self._sink, self._count = self._file, 0
        if self.suffix.endswith(".zst"):
            import zstandard

            self._sink = zstandard.ZstdCompressor(level=ZSTD_LEVEL, threads=0, write_checksum=True).stream_writer(self._file, closefd=False)

    def _finish(self) -> None:
        if self.suffix == ".parquet":
            self._write_parquet()
        elif self._sink is not self._file:
            self._sink.close()
        self._file.close()
        self.files.append({"file": self.path.name, "rows": self._count, "bytes": self.path.stat().st_size})
        self._sink = None

    def _write_parquet(self) -> None:
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.Table.from_pylist(self._rows)
            pyarrow.parquet.write_table(table, self._file, compression="zstd", compression_level=ZSTD_LEVEL)
        except pyarrow.ArrowException as error:
            raise DataError(f"these rows do not fit one column schema: {error}", where=str(self.path), fix="write .jsonl.zst") from None
        self._rows = []
