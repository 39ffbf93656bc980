"""Shards written with deterministic bytes: one thread, a fixed level, no time stamp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.core.events import dumps
from posttrain.errors import DataError

ZSTD_LEVEL = 6


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
        self._file = self.path.open("wb")
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
