"""Large files as many shards: the same rows with the same numbers, and the same pick."""

from __future__ import annotations

import json
import random

import pytest
import selector_kit as kit

from data_pipelines import split
from data_pipelines.door import source_ref
from data_pipelines.shards import list_shards, shard_rows
from posttrain.data.shards import read_shard

TARGET = [{"text": "alpha beta", "id": "t"}]


def lines(count: int, seed: int) -> list[bytes]:
    draw = random.Random(seed)
    made = []
    for i in range(count):
        text = "".join(draw.choices("ab\u00e9\u65e5\U0001f642 \u2028", k=draw.choice([0, 3, 40, 300])))
        made.append(
            draw.choice([b"", b" ", b"\xef\xbb\xbf"])
            if draw.random() < 0.1
            else json.dumps({"text": text, "n": i}, ensure_ascii=False).encode()
        )
    return made


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("last", [True, False], ids=["newline", "none"])
@pytest.mark.parametrize(("size", "read"), [(50, 7), (200, 64), (200, 8 << 20), (10**6, 64)])
def test_parts_hold_every_line_with_its_number(tmp_path, monkeypatch, end, last, size, read):
    monkeypatch.setattr(split, "SPLIT_BYTES", size)
    monkeypatch.setattr(split, "READ_BYTES", read)
    data = end.join(lines(80, size)) + (end if last else b"")
    path = tmp_path / "r.jsonl"
    path.write_bytes(data)
    whole = list(read_shard(path))
    spans = split.line_spans(path)
    assert [row for span in spans for row in read_shard(path, span=span)] == whole
    assert b"".join(data[span.begin : span.end] for span in spans) == data and all(span.begin < span.end for span in spans)
    assert all(span.before == data[: span.begin].count(b"\n") for span in spans)
    assert len(spans) == 1 if size > len(data) else len(spans) > 3


def test_an_empty_file_is_one_part(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(b"")
    assert [tuple(span) for span in split.line_spans(tmp_path / "r.jsonl")] == [(0, 0, 0)]


def test_parquet_is_cut_between_row_groups(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(split, "SPLIT_BYTES", 600)
    table = pa.table({"text": [f"{i} " * 20 for i in range(100)], "id": [f"r{i}" for i in range(100)]})
    pq.write_table(table, tmp_path / "r.parquet", row_group_size=9)
    spans = [span for span, _ in split.parquet_spans(tmp_path / "r.parquet")]
    whole = list(read_shard(tmp_path / "r.parquet"))
    assert [row for span in spans for row in read_shard(tmp_path / "r.parquet", span=span)] == whole and 3 < len(spans) < 12
    (tmp_path / "r.parquet").write_bytes(b"PAR1" + b"x" * 4000 + b"PAR1")
    assert split.parquet_spans(tmp_path / "r.parquet") == []


def test_shards_of_one_file_are_listed_once_and_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(split, "SPLIT_BYTES", 600)
    path, cache = kit.write_rows(tmp_path / "r.jsonl", kit.corpus(40)), tmp_path / "spans.json"
    refs = [source_ref("raw", path, "text", {}, "stop")]
    shards = list_shards(refs, "raw", cache)
    assert (
        len(shards) > 5 and shards[1].label == f"raw/r.jsonl part 2 of {len(shards)}" and sum(s.size for s in shards) == path.stat().st_size
    )
    assert [(number, row["id"]) for shard in shards for number, row in shard_rows(shard)] == [(i + 1, f"r{i}") for i in range(40)]
    monkeypatch.setattr(split, "line_spans", None)
    assert list_shards(refs, "raw", cache) == shards
    assert len(list_shards(refs, "raw")) == 1 and len({json.dumps(shard.stamp()) for shard in shards}) == len(shards)


@pytest.mark.parametrize("chunks", [None, {"words": 3}])
def test_the_pick_of_a_split_file_is_the_same_to_the_byte(tmp_path, monkeypatch, chunks):
    rows = [{name: value for name, value in row.items() if name != "id"} for row in kit.corpus(90)]
    raw = kit.write_rows(tmp_path / "r.jsonl", rows)
    target = {"target": kit.write_rows(tmp_path / "t.jsonl", TARGET)}
    found = []
    for parts in (1, 3, 7):
        monkeypatch.setattr(split, "SPLIT_BYTES", raw.stat().st_size // parts + 1)
        folder = tmp_path / str(parts)
        kit.run(folder, raw, target, kit.config(chunks=chunks))
        assert len(list((folder / "out").glob("scores-*"))) == parts
        found.append({path.name: path.read_bytes() for path in (folder / "out").glob("*") if path.name.startswith(("rows-", "dataset"))})
    assert found[0] == found[1] == found[2]
