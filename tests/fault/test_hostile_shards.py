"""Forty files that a selector should not meet, through its Python door: what is wrong is named with its place, and nothing is lost.

Every case lies between two good shards. `Fine(n)` is picked whole with n more rows. `Bad(row, words)` is a row: by default it stops
the selection with the file, the row and exit code 4, and under `on_bad: skip` it is left out, counted, and all other rows are picked.
`Broken(words)` is a file that cannot be read to its end: it stops in both ways, since no one knows how many rows are lost.
"""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.data.shards import expand_shards, read_shard
from posttrain.errors import PosttrainError


class Fine(NamedTuple):
    """Read whole."""

    rows: int


class Bad(NamedTuple):
    """One row is bad, after so many good ones; `rows` good ones in all."""

    row: int
    words: str
    rows: int


class Broken(NamedTuple):
    """The file is damaged."""

    words: str


def line(i: int, **more: Any) -> bytes:
    return json.dumps({"text": f"word{i} and more words of row {i}", **more}).encode() + b"\n"


def lines(n: int) -> bytes:
    return b"".join(line(i) for i in range(n))


def around(bad: bytes) -> bytes:
    return line(0) + bad + b"\n" + line(1)


def parquet(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(data)


TEXTS = ["one two three", "four five six"]
CASES: dict[str, tuple[str, bytes | Callable[[Path], None], Fine | Bad | Broken]] = {
    "no bytes": ("x.jsonl", b"", Fine(0)),
    "no bytes, gz": ("x.jsonl.gz", b"", Fine(0)),
    "no bytes, parquet": ("x.parquet", b"", Fine(0)),
    "blank lines only": ("x.jsonl", b"\n\n  \n\r\n", Fine(0)),
    "byte-order mark": ("x.jsonl", b"\xef\xbb\xbf" + lines(2), Fine(2)),
    "crlf": ("x.jsonl", lines(3).replace(b"\n", b"\r\n"), Fine(3)),
    "no last newline": ("x.jsonl", lines(3)[:-1], Fine(3)),
    "nul in a text": ("x.jsonl", line(0, note="\0") + json.dumps({"text": "a\0b"}).encode() + b"\n", Fine(2)),
    "two gz members": ("x.jsonl.gz", gzip.compress(lines(2)) + gzip.compress(lines(3)), Fine(5)),
    "gz with zeros behind": ("x.jsonl.gz", gzip.compress(lines(2)) + b"\0" * 100, Fine(2)),
    "two zst frames": ("x.jsonl.zst", zstd(lines(2)) + zstd(lines(1)), Fine(3)),
    "a row of 3 MB": ("x.jsonl", line(0) + json.dumps({"text": "long word " * 300_000}).encode() + b"\n" + line(1), Fine(3)),
    "empty text": ("x.jsonl", around(b'{"text": ""}'), Fine(2)),
    "emoji only": ("x.jsonl", around('{"text": "🙂"}'.encode()), Fine(3)),
    "punctuation only": ("x.jsonl", around(b'{"text": "!!! ... ???"}'), Fine(3)),
    "one word of 100 kB": ("x.jsonl", around(b'{"text": "' + b"a" * 100_000 + b'"}'), Fine(3)),
    "a name with spaces": ("a b %5B[x].jsonl", lines(2), Fine(2)),
    "a name in other letters": ("日本 é.jsonl", lines(2), Fine(2)),
    "dictionary column": ("x.parquet", parquet(pa.table({"text": pa.array(TEXTS).dictionary_encode()})), Fine(2)),
    "large strings": ("x.parquet", parquet(pa.table({"text": pa.array(TEXTS, pa.large_string())})), Fine(2)),
    "nested columns": ("x.parquet", parquet(pa.table({"text": TEXTS, "meta": [{"a": [1, 2]}, {"a": []}]})), Fine(2)),
    "no rows, parquet": ("x.parquet", parquet(pa.table({"text": pa.array([], pa.string())})), Fine(0)),
    "other columns": ("x.jsonl", line(0, spans=[[1, "x"], [2, None]], deep={"a": {"b": 1}}) + line(1, spans="none"), Fine(2)),
    "a column called score": ("x.jsonl", line(0, score=3, source="s"), Fine(1)),
    "null text, parquet": ("x.parquet", parquet(pa.table({"text": ["one two", None, "three"]})), Bad(2, "text", 2)),
    "numbers for text, parquet": ("x.parquet", parquet(pa.table({"text": [1]})), Bad(1, "text", 0)),
    "bytes that are not utf-8": ("x.jsonl", around(b'{"text": "caf\xe9"}'), Bad(2, "UTF-8", 2)),
    "lone surrogate": ("x.jsonl", around(b'{"text": "\\ud83d"}'), Bad(2, "surrogate", 2)),
    "nan": ("x.jsonl", around(b'{"text": "a", "x": NaN}'), Bad(2, "NaN", 2)),
    "infinity": ("x.jsonl", around(b'{"text": "a", "x": -Infinity}'), Bad(2, "Infinity", 2)),
    "a key twice": ("x.jsonl", around(b'{"text": "a", "text": "b"}'), Bad(2, "text", 2)),
    "too deep": ("x.jsonl", around(b'{"text": "a", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}"), Bad(2, "deep|nest", 2)),
    "utf-16": ("x.jsonl", lines(3).decode().encode("utf-16"), Bad(1, "UTF-8", 0)),
    "a list": ("x.jsonl", around(b'["text", "a"]'), Bad(2, "object|mapping", 2)),
    "a bare string": ("x.jsonl", around(b'"text"'), Bad(2, "object|mapping", 2)),
    "half a row": ("x.jsonl", around(b'{"text": "a'), Bad(2, "JSON|string", 2)),
    "single quotes": ("x.jsonl", around(b"{'text': 'a'}"), Bad(2, "JSON|quotes|name", 2)),
    "no text": ("x.jsonl", around(b'{"content": "a"}'), Bad(2, "text", 2)),
    "a number for a text": ("x.jsonl", around(b'{"text": 7}'), Bad(2, "text", 2)),
    "cut gz": ("x.jsonl.gz", gzip.compress(lines(50))[:-10], Broken("cut")),
    "cut zst": ("x.jsonl.zst", zstd(lines(50))[:-5], Broken("zstd")),
    "garbage behind gz": ("x.jsonl.gz", gzip.compress(lines(5)) + b"garbage", Broken("behind the end")),
    "plain text called gz": ("x.jsonl.gz", lines(5), Broken("not a gzip file")),
    "plain text called zst": ("x.jsonl.zst", lines(5), Broken("not a zstd file")),
    "plain text called parquet": ("x.parquet", lines(5), Broken("parquet")),
    "cut parquet": ("x.parquet", parquet(pa.table({"text": TEXTS}))[:-8], Broken("parquet")),
    "a link to itself": ("x.jsonl", lambda path: os.symlink(path, path), Broken("x.jsonl")),
    "a link to nothing": ("x.jsonl", lambda path: os.symlink(path.with_name("gone"), path), Broken("x.jsonl")),
}  # fmt: skip


def selected(folder: Path, name: str, content: bytes | Callable[[Path], None], on_bad: str) -> tuple[list[str], dict[str, Any]]:
    """Texts that are picked from all rows there are, in three files, and the summary."""
    from data_pipelines.door import select_files

    shards = folder / "shards"
    shards.mkdir()
    for good in ("a.jsonl", "z.jsonl"):
        (shards / good).write_bytes(b"".join(line(i, of=good) for i in range(4)))
    path = shards / name
    content(path) if callable(content) else path.write_bytes(content)
    raw = [shards / "a.jsonl", path, shards / "z.jsonl"]
    summary = select_files("select.random", raw, None, folder / "out", rows=10_000, kind="text", on_bad=on_bad)
    picked = [row["text"] for file in expand_shards(sorted((folder / "out").glob("rows-*"))) for _, row in read_shard(file)]
    return picked, summary


def test_there_are_at_least_forty() -> None:
    assert len(CASES) >= 40


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if isinstance(case[2], Fine)])
def test_odd_files_are_read_whole(name: str, tmp_path: Path) -> None:
    file, content, expected = CASES[name]
    assert isinstance(expected, Fine)
    picked, summary = selected(tmp_path, file, content, "stop")
    assert len(picked) == summary["rows_out"] == 8 + expected.rows
    assert summary["eligible"] + sum(summary["not_eligible"].values()) == summary["rows_in"]
    assert sum(summary["not_eligible"].values()) == (name == "empty text")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if isinstance(case[2], Bad)])
def test_bad_rows_stop_with_their_place_or_are_skipped_and_counted(name: str, tmp_path: Path) -> None:
    file, content, expected = CASES[name]
    assert isinstance(expected, Bad)
    (tmp_path / "stop").mkdir()
    with pytest.raises(PosttrainError, match=expected.words) as caught:
        selected(tmp_path / "stop", file, content, "stop")
    assert caught.value.exit_code == 4
    assert file in str(caught.value)
    assert f"row {expected.row}" in str(caught.value) or f":{expected.row}" in str(caught.value)
    (tmp_path / "skip").mkdir()
    picked, summary = selected(tmp_path / "skip", file, content, "skip")
    assert len(picked) == 8 + expected.rows
    assert summary["skipped"] == (4 if name == "utf-16" else 1)
    assert summary["rows_read"] == summary["rows_in"] + summary["skipped"]


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if isinstance(case[2], Broken)])
def test_damaged_files_stop_and_are_named(name: str, on_bad: str, tmp_path: Path) -> None:
    file, content, expected = CASES[name]
    assert isinstance(expected, Broken)
    with pytest.raises(PosttrainError, match=expected.words) as caught:
        selected(tmp_path, file, content, on_bad)
    assert caught.value.exit_code in (2, 4)
    assert file in str(caught.value)
    assert not (tmp_path / "out").exists()
