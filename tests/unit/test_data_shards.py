"""Readers and the writer of shards."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain.data import shards
from posttrain.data.shards import BadRows, ShardWriter, expand_shards, read_shard
from posttrain.errors import DataError

CASES = Path(__file__).parents[1] / "cases"


def conversation(i: int) -> dict[str, Any]:
    """A two-turn row."""
    return {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}


def lines(first: int, last: int) -> bytes:
    """JSON lines of `conversation(first .. last - 1)`."""
    return "".join(json.dumps(conversation(i)) + "\n" for i in range(first, last)).encode()


def rows(path: Path, **kwargs: Any) -> list[dict[str, Any]]:
    """All rows of a shard."""
    return [row for _, row in read_shard(path, **kwargs)]


def test_c10_bom_crlf_blank_line_and_no_last_newline() -> None:
    found = list(read_shard(CASES / "C10-bom-crlf-blank.jsonl"))
    assert [number for number, _ in found] == [1, 2, 4]
    assert all(list(row) == ["messages"] for _, row in found)
    assert "\\r" not in json.dumps([row for _, row in found])


def test_c09_a_byte_that_is_not_utf8_names_file_row_and_byte() -> None:
    path = CASES / "C09-bad-utf8.jsonl"
    with pytest.raises(DataError, match=r"C09-bad-utf8.jsonl:3: byte \d+ of the row is 0xe9") as caught:
        rows(path)
    assert caught.value.exit_code == 4
    bad = BadRows()
    assert len(rows(path, on_bad="skip", bad=bad)) == 4
    assert bad.report()["reasons"] == {"not UTF-8": 1}


def test_c49_surrogates_are_refused_and_a_proper_pair_is_one_character() -> None:
    bad = BadRows()
    found = rows(CASES / "C49-surrogates.jsonl", on_bad="skip", bad=bad)
    assert [row["messages"][0]["content"] for row in found] == ["whole \U0001f600"]
    assert bad.counts == {"lone surrogate": 3}
    with pytest.raises(DataError, match=r":1: half a surrogate pair in messages\[0\].content"):
        rows(CASES / "C49-surrogates.jsonl")


def test_c49_nul_stays(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "nul \\u0000 inside"}\n')
    assert rows(tmp_path / "a.jsonl") == [{"text": "nul \0 inside"}]


def test_c91_odd_json_is_a_typed_error_with_the_row() -> None:
    path = CASES / "C91-odd-json.jsonl"
    expected = {
        0: "NaN is not JSON",
        1: "-Infinity",
        2: "1e999",
        3: "400 characters",
        4: "'messages' is written twice",
        5: "nested more than",
    }
    for start, words in expected.items():
        with pytest.raises(DataError) as caught:
            rows(path, start=start)
        assert caught.value.where.endswith(f":{start + 1}")
        assert words in str(caught.value)


def test_c60_parquet_with_large_plain_and_dictionary_types_reads_like_jsonl(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = [conversation(i) for i in range(30)]
    plain = pa.schema([("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))])
    turn = pa.struct([("content", pa.large_string()), ("role", pa.dictionary(pa.int32(), pa.string()))])
    large = pa.schema([("messages", pa.large_list(turn))])
    pq.write_table(pa.Table.from_pylist(wanted[:10], schema=large), tmp_path / "a.parquet", row_group_size=3)
    pq.write_table(pa.Table.from_pylist(wanted[10:20], schema=plain), tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_bytes(lines(20, 30))
    assert [row for shard in expand_shards(tmp_path) for row in rows(shard)] == wanted
    assert [number for number, _ in read_shard(tmp_path / "a.parquet", start=7)] == [8, 9, 10]


def test_parquet_unset_struct_fields_are_dropped_and_dates_become_text(tmp_path: Path) -> None:
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    source = [{"args": {"city": "Oslo"}, "day": datetime.date(2024, 1, 2)}, {"args": {"days": 3}, "day": None}]
    pq.write_table(pa.Table.from_pylist(source), tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet") == [{"args": {"city": "Oslo"}, "day": "2024-01-02"}, {"args": {"days": 3}, "day": None}]


def test_damaged_parquet_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="a.parquet: damaged or unreadable parquet after row 0"):
        rows(path)


def c78(name: str, data: bytes, folder: Path) -> Path:
    """A shard with these bytes."""
    (folder / name).write_bytes(data)
    return folder / name


@pytest.mark.parametrize(
    ("name", "data", "count"),
    [
        ("good.jsonl.gz", gzip.compress(lines(0, 50)), 50),
        ("two-members.jsonl.gz", gzip.compress(lines(0, 25)) + gzip.compress(lines(25, 50)), 50),
        ("zero-padded.jsonl.gz", gzip.compress(lines(0, 5)) + b"\0" * 40, 5),
        ("empty.jsonl.gz", b"", 0), ("empty.jsonl", b"", 0), ("empty.jsonl.zst", b"", 0), ("empty.parquet", b"", 0),
    ],
)  # fmt: skip
def test_c78_whole_compressed_files(name: str, data: bytes, count: int, tmp_path: Path) -> None:
    assert len(rows(c78(name, data, tmp_path))) == count


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("cut.jsonl.gz", gzip.compress(lines(50, 100), mtime=0)[:-10], "the gzip file is cut: it ends inside its data at byte"),
        ("garbage.jsonl.gz", gzip.compress(lines(50, 100)) + b"garbage", "bytes behind the end of the gzip data at byte"),
        ("plain.jsonl.gz", lines(0, 50), "not a gzip file, whatever its suffix says"),
        ("plain.jsonl.zst", lines(0, 50), "not a zstd file, whatever its suffix says"),
        ("flipped.jsonl.gz", gzip.compress(lines(0, 500))[:200] + b"\xff" * 40 + gzip.compress(lines(0, 500))[240:], "damaged gzip data"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_c78_damaged_files_stop_and_are_named(name: str, data: bytes, words: str, on_bad: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words) as caught:
        rows(c78(name, data, tmp_path), on_bad=on_bad)
    assert caught.value.exit_code == 4
    assert caught.value.where.endswith(name)


def test_c78_zstd_cut_and_two_frames(tmp_path: Path) -> None:
    import zstandard

    frame = zstandard.ZstdCompressor().compress(lines(0, 50))
    assert len(rows(c78("two.jsonl.zst", frame + frame, tmp_path))) == 100
    for cut in (2, 10, len(frame) - 1):
        with pytest.raises(DataError, match="the zstd file is cut"):
            rows(c78("cut.jsonl.zst", frame[:cut], tmp_path))
    with pytest.raises(DataError, match="behind the end of the zstd data"):
        rows(c78("garbage.jsonl.zst", frame + b"garbage", tmp_path))


def test_c78_last_row_cut_is_a_bad_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r":50: not JSON"):
        rows(c78("a.jsonl", lines(0, 50)[:-20], tmp_path))


MEMORY = """
import resource, sys
from posttrain.data.shards import read_shard
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sizes = [len(row["text"]) for _, row in read_shard(sys.argv[1])]
print(sizes, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("place", [0, 1])
def test_c47_a_long_row_is_read_in_bounded_memory(suffix: str, place: int, tmp_path: Path) -> None:
    size = 40_000_000
    texts = ["a", "b"]
    texts.insert(place, "x" * size)
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path = c78(f"long{suffix}", gzip.compress(data, 1) if suffix.endswith("gz") else data, tmp_path)
    done = subprocess.run([sys.executable, "-c", MEMORY, path], capture_output=True, text=True, check=True)
    sizes, memory = done.stdout.rsplit(" ", 1)
    assert json.loads(sizes) == [len(text) for text in texts]
    assert int(memory) < 5 * size


def test_a_row_over_the_limit_is_named_and_later_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_ROW_BYTES", 100_000)
    path = c78("a.jsonl", b'{"text": "a"}\n{"text": "' + b"x" * 300_000 + b'"}\n{"text": "b"}\n', tmp_path)
    with pytest.raises(DataError, match=r":2: the row has 300012 bytes, the limit is 100000"):
        rows(path)
    assert [row["text"] for row in rows(path, on_bad="skip")] == ["a", "b"]


def test_start_goes_on_behind_a_row(tmp_path: Path) -> None:
    path = c78("a.jsonl", lines(0, 10), tmp_path)
    assert [number for number, _ in read_shard(path, start=4)] == [5, 6, 7, 8, 9, 10]


def test_text_file_is_one_row(tmp_path: Path) -> None:
    path = c78("note.txt", b"\xef\xbb\xbfone\r\ntwo\n", tmp_path)
    assert rows(path) == [{"id": "note.txt", "text": "one\ntwo\n"}]


def test_expand_folders_globs_and_odd_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.parquet", "[x].jsonl", ".hidden.jsonl", "notes.md", "dataset.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = lambda paths: [p.name for p in expand_shards(paths)]  # noqa: E731
    assert names(tmp_path) == ["[x].jsonl", "a.jsonl.gz", "b.jsonl", "c.parquet"]
    assert names(str(tmp_path / "*.jsonl")) == ["[x].jsonl", "b.jsonl"]
    assert names(str(tmp_path / "[x].jsonl")) == ["[x].jsonl"]
    assert names(str(tmp_path / "[[]x].jsonl")) == ["[x].jsonl"]
    assert names(str(tmp_path / "**" / "*.parquet")) == ["c.parquet"]
    assert names([tmp_path / "b.jsonl", tmp_path]) == ["b.jsonl", "[x].jsonl", "a.jsonl.gz", "c.parquet"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("b.json", "did you mean"),
        ("*.jsonx", "matches no shard"),
        ("notes.md", "unknown format"),
        ("none/x.jsonl", "does not exist"),
        ("sub", "holds no shards"),
    ],
)  # fmt: skip
def test_expand_says_what_is_missing(name: str, words: str, tmp_path: Path) -> None:
    for real in ("b.jsonl", "notes.md"):
        (tmp_path / real).write_bytes(b"")
    (tmp_path / "sub").mkdir()
    with pytest.raises(DataError, match=words) as caught:
        expand_shards(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".parquet"])
def test_writer_gives_equal_bytes_and_the_same_rows_back(suffix: str, tmp_path: Path) -> None:
    wanted = [conversation(i) for i in range(25)]
    digests = []
    for name in ("one", "two"):
        writer = ShardWriter(tmp_path / name, 10, suffix)
        for row in wanted:
            writer.write(row)
        files = writer.close()
        assert [f["rows"] for f in files] == [10, 10, 5]
        digests.append([hashlib.sha256((tmp_path / name / f["file"]).read_bytes()).hexdigest() for f in files])
        assert [row for f in files for row in rows(tmp_path / name / f["file"])] == wanted
    assert digests[0] == digests[1]


def test_writer_without_rows_leaves_one_empty_shard(tmp_path: Path) -> None:
    files = ShardWriter(tmp_path / "none").close()
    assert [f["rows"] for f in files] == [0]
    assert rows(tmp_path / "none" / files[0]["file"]) == []


def test_written_lines_parse_with_a_strict_reader(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "odd", suffix=".jsonl")
    writer.write({"score": float("nan"), "text": "half \ud83d"})
    writer.close()
    assert rows(tmp_path / "odd" / "rows-00000.jsonl") == [{"score": "NaN", "text": "half ?"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".parquet"])
def test_only_the_wanted_rows_are_parsed(tmp_path, suffix):
    writer = ShardWriter(tmp_path, suffix=suffix)
    for i in range(200):
        writer.write({"id": f"r{i}", "n": i})
    (file,) = writer.close()
    path = tmp_path / file["file"]
    whole = dict(read_shard(path))
    for wanted in ([], [1], [200], [3, 64, 65, 66, 130], list(range(1, 201))):
        assert list(read_shard(path, only=iter(wanted))) == [(number, whole[number]) for number in wanted]


def test_rows_that_are_not_wanted_may_be_bad(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"n": 1}\nnot json\n{"n": 3}\nnot json\n')
    assert list(read_shard(path, only=[1, 3])) == [(1, {"n": 1}), (3, {"n": 3})]
    with pytest.raises(DataError, match="jsonl:2"):
        list(read_shard(path, only=[2]))
