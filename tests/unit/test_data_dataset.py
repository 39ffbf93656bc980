"""Sources, parts, mixtures, the held-out guard, digests and written datasets."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from posttrain.core.artifact import InputRef
from posttrain.core.context import StageContext
from posttrain.core.events import Events
from posttrain.data.dataset import (
    heldout_keys,
    load_rows,
    mix_rows,
    open_rows,
    repeat_rows,
    source_digest,
    training_rows,
    write_dataset,
)
from posttrain.data.rows import row_key
from posttrain.data.shards import BadRows, expand_shards, read_shard
from posttrain.errors import ArtifactError, ConfigError, DataError

SPLIT = {"validation": 0.1, "test": 0.05}


def source(
    folder: Path, name: str, count: int, *, part: str = "train", share: float | None = None, repeat: float | None = None, **spec: Any
) -> InputRef:
    """A source of `count` verifiable rows `<name>0=`, `<name>1=`, ..."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{name}{i}=", "answer": str(i)}) + "\n" for i in range(count)))
    return InputRef(
        "data", name, "source", "dataset", split=part, share=share, repeat=repeat, spec={"kind": "verifiable", "path": str(path), **spec}
    )


def committed(folder: Path, rows: list[dict[str, Any]], split: dict[str, float]) -> InputRef:
    """The committed dataset of an earlier stage."""
    facts = write_dataset(rows, folder / "out", "verifiable", rows_per_shard=100)
    files = [{"path": f.name, "size": f.stat().st_size} for f in (folder / "out").iterdir()]
    meta = {"row_type": "verifiable", "rows": facts["rows"], "split": split}
    (folder / "manifest.json").write_text(json.dumps({"kind": "dataset", "digest": "d", "files": files, "meta": meta}))
    return InputRef("data", "made", "stage", "dataset", path=str(folder / "out"))


def context(refs: list[InputRef], heldout: list[InputRef], folder: Path, events: Events | None = None) -> StageContext:
    """A stage with these inputs."""
    return StageContext("sft", "sft", 3, {"data": refs}, folder, folder, events or Events(None), heldout=heldout)


def part_of(ref: InputRef, part: str) -> InputRef:
    """The same rows, another part."""
    return InputRef(**{**ref.__dict__, "split": part})


def test_parts_are_disjoint_whole_and_in_file_order(tmp_path: Path) -> None:
    ref = source(tmp_path, "a", 500, split=SPLIT)
    parts = {name: [row["prompt"] for row in open_rows(part_of(ref, name))] for name in ("train", "validation", "test", "all")}
    assert parts["all"] == [f"a{i}=" for i in range(500)]
    assert sorted(parts["train"] + parts["validation"] + parts["test"]) == sorted(parts["all"])
    assert 30 < len(parts["validation"]) < 75
    assert 10 < len(parts["test"]) < 45
    assert parts["train"] == [p for p in parts["all"] if p in set(parts["train"])]


def test_a_committed_dataset_has_the_same_parts_as_its_source(tmp_path: Path) -> None:
    ref = source(tmp_path, "a", 300, split=SPLIT)
    made = committed(tmp_path / "stage", load_rows(part_of(ref, "all")), SPLIT)
    for part in ("train", "validation", "test", "all"):
        assert load_rows(part_of(made, part)) == load_rows(part_of(ref, part))


def test_bad_rows_stop_with_all_of_them_or_are_skipped_and_counted(tmp_path: Path) -> None:
    ref = source(tmp_path, "a", 10)
    path = Path(ref.spec["path"])
    path.write_text(path.read_text() + '{"prompt": "x="}\n{"prompt": "y=", "answer": "1"}\n{nope\n')
    with pytest.raises(DataError) as caught:
        load_rows(ref)
    assert caught.value.where == f"{path}:11"
    assert f"also {path}:13: not JSON" in str(caught.value)
    skipping, bad, seen = InputRef(**{**ref.__dict__, "spec": {**ref.spec, "on_bad": "skip"}}), BadRows(), []
    events = Events(None)
    events.sinks.append(seen.append)
    assert len(load_rows(skipping, events=events, bad=bad)) == 11
    assert bad.report()["reasons"] == {"missing answer": 1, "not JSON": 1}
    assert any("left out 2 of 13 rows (1 missing answer, 1 not JSON)" in e.get("message", "") for e in seen)


def test_no_usable_row_names_the_path(tmp_path: Path) -> None:
    ref = source(tmp_path, "a", 0)
    with pytest.raises(DataError, match=r"a.jsonl: no rows"):
        load_rows(ref)
    Path(ref.spec["path"]).write_text("{}\n{}\n")
    with pytest.raises(DataError, match=r"all 2 rows were left out \(2 missing prompt\)"):
        load_rows(InputRef(**{**ref.__dict__, "spec": {**ref.spec, "on_bad": "skip"}}))


def test_a_hub_dataset_that_cannot_be_reached_is_a_data_error() -> None:
    ref = InputRef("data", "h", "source", "dataset", spec={"kind": "text", "hub": "owner/none", "revision": "0" * 40, "hub_split": "train"})
    with pytest.raises(DataError, match="cannot load the hub dataset"):
        load_rows(ref)


def test_shares_are_honoured_by_count_without_repetition(tmp_path: Path) -> None:
    refs = [source(tmp_path, "a", 1000, share=0.8), source(tmp_path, "b", 100, share=0.2)]
    rows, report = mix_rows(refs, 1)
    counts = Counter(row["source"] for row in rows)
    assert (counts["a"], counts["b"]) == (400, 100)
    assert len({row["id"] for row in rows}) == 500
    assert report["parts"]["a"] == {"available": 1000, "excluded": 0, "skipped": BadRows().report(), "rows": 400, "epochs": 0.4}
    assert {row["source"] for row in rows[:30]} == {"a", "b"}


def test_repeats_are_whole_copies_and_an_exact_hash_chosen_rest(tmp_path: Path) -> None:
    rows, report = mix_rows([source(tmp_path, "a", 100, repeat=0.5), source(tmp_path, "b", 40, repeat=2.25)], 1)
    counts = Counter(row["prompt"] for row in rows)
    assert sum(n for p, n in counts.items() if p[0] == "a") == 50
    assert sorted(n for p, n in counts.items() if p[0] == "b") == [2] * 30 + [3] * 10
    assert report["parts"]["b"]["epochs"] == 2.25


def test_a_mixture_depends_on_the_seed_alone(tmp_path: Path) -> None:
    refs = [source(tmp_path, "a", 60, repeat=0.5), source(tmp_path, "b", 60)]
    first, again, other = (mix_rows(refs, seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_one_part_keeps_its_order(tmp_path: Path) -> None:
    rows, _ = mix_rows([source(tmp_path, "a", 20)], 1)
    assert [row["prompt"] for row in rows] == [f"a{i}=" for i in range(20)]


@pytest.mark.parametrize(("shares", "words"), [((0.5, 0.4), "sum to 0.9"), ((0.5, None), "some parts have a `share`")])
def test_shares_that_make_no_sense(shares: tuple[float, float | None], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        mix_rows([source(tmp_path, name, 5, share=s) for name, s in zip("ab", shares, strict=True)], 1)


def test_held_out_rows_never_reach_training_whatever_file_they_come_from(tmp_path: Path) -> None:
    tasks = source(tmp_path, "a", 300, split=SPLIT)
    other = tmp_path / "copy.jsonl"
    other.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": f"a{i}="}, {"role": "assistant", "content": "?"}]}) + "\n"
            for i in range(300)
        )
    )
    copy = InputRef("data", "copy", "source", "dataset", spec={"kind": "messages", "path": str(other)})
    held = [part_of(tasks, "validation"), part_of(tasks, "test")]
    ctx = context([tasks, copy], held, tmp_path)
    rows = training_rows(ctx)
    kept = {row_key(row) for row in rows}
    wanted = {row_key(row) for ref in held for row in load_rows(ref)}
    assert heldout_keys(ctx) == wanted
    assert not kept & wanted
    assert ctx.summary["excluded_heldout"] == len(wanted)
    assert ctx.summary["rows_in"] == len(rows) == 2 * (300 - len(wanted))


def test_only_held_out_rows_is_a_data_error(tmp_path: Path) -> None:
    tasks = source(tmp_path, "a", 50)
    with pytest.raises(DataError, match="all 50 rows are held out"):
        training_rows(context([tasks], [part_of(tasks, "all")], tmp_path))


def test_repeat_column_is_used_with_its_fraction() -> None:
    rows = [{"id": str(i), "repeat": 1.5} for i in range(1000)] + [{"id": "none"}, {"id": "zero", "repeat": 0}]
    counts = Counter(row["id"] for row in repeat_rows(rows, 1))
    assert 1400 < sum(n for i, n in counts.items() if i.isdigit()) < 1600
    assert (counts["none"], counts["zero"]) == (1, 0)
    assert repeat_rows(rows, 1) == repeat_rows(rows, 1)


def test_written_dataset_has_equal_bytes_and_its_facts(tmp_path: Path) -> None:
    rows = [{"answer": str(i), "prompt": f"{i}=", "note": {"b": 1, "a": None}} for i in range(7)]
    digests = []
    for name in ("one", "two"):
        facts = write_dataset(iter(rows), tmp_path / name, "verifiable", rows_per_shard=3)
        digests.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted((tmp_path / name).iterdir())})
    assert digests[0] == digests[1]
    assert list(digests[0]) == ["dataset.json", "rows-00000.jsonl.zst", "rows-00001.jsonl.zst", "rows-00002.jsonl.zst"]
    assert (facts["rows"], facts["row_type"]) == (7, "verifiable")
    read = [row for shard in expand_shards(tmp_path / "one") for _, row in read_shard(shard)]
    assert [row["note"] for row in read] == [{"b": 1, "a": None}] * 7
    with pytest.raises(DataError, match="row 2: the column `answer`"):
        write_dataset([rows[0], {"prompt": "x"}], tmp_path / "bad", "verifiable")


def test_digest_follows_content_and_reading_rules_not_place_or_time(tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "digests.json"
    ref = source(tmp_path, "a", 10)
    digest = source_digest(ref.spec, cache=cache)
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(Path(ref.spec["path"]).read_bytes())
    assert source_digest({**ref.spec, "path": str(moved)}, cache=cache) == digest
    assert source_digest({**ref.spec, "columns": {"answer": "prompt"}}, cache=cache) != digest
    assert source_digest({**ref.spec, "on_bad": "skip"}, cache=cache) != digest
    moved.write_text("{}\n")
    assert source_digest({**ref.spec, "path": str(moved)}, cache=cache) != digest


def test_digest_cache_is_used_for_old_files_and_survives_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.core import digests

    cache, ref = tmp_path / "digests.json", source(tmp_path, "a", 10)
    old = time.time() - 100
    os.utime(ref.spec["path"], (old, old))
    digest = source_digest(ref.spec, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(digests, "_hash", lambda file: pytest.fail("hashed again"))
        assert source_digest(ref.spec, cache=cache) == digest
    cache.write_text("{broken")
    assert source_digest(ref.spec, cache=cache) == digest
    os.utime(ref.spec["path"], (old + 1, old + 1))
    assert source_digest(ref.spec, cache=cache) == digest


def test_a_hub_digest_is_its_commit(tmp_path: Path) -> None:
    spec = {"kind": "text", "hub": "a/b", "revision": "1" * 40}
    assert source_digest(spec, cache=tmp_path / "c") != source_digest({**spec, "revision": "2" * 40}, cache=tmp_path / "c")


def test_a_damaged_committed_dataset_is_refused(tmp_path: Path) -> None:
    made = committed(tmp_path / "stage", [{"prompt": "1=", "answer": "1"}], {})
    next(Path(made.path).glob("rows-*")).write_bytes(b"short")
    with pytest.raises(ArtifactError, match="damaged artifact"):
        load_rows(made)


def test_progress_counts_shards(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    events = Events(None)
    events.sinks.append(seen.append)
    load_rows(source(tmp_path, "a", 10), events=events)
    assert [e["done"] for e in seen if e["kind"] == "progress"] == [0, 1]


def test_c88_texts_without_words_are_rows_like_any_other(tmp_path: Path) -> None:
    texts = ["", " ", "\n\n", "!!!", "\U0001f642", "a", "x" * 100_000]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ref = InputRef("raw", "odd", "source", "dataset", spec={"kind": "text", "path": str(path)})
    rows = load_rows(ref)
    assert [row["text"] for row in rows] == texts
    assert len({row["id"] for row in rows}) == len(texts)
    assert len({row_key(row) for row in rows}) == len(texts) - 2


def test_rows_bad_in_the_same_way_are_shown_three_times(tmp_path: Path) -> None:
    """C84: the column is named, with the place of the first rows and the number of the others."""
    lines = [json.dumps({"prompt": f"{i}+1=", "final": str(i + 1)}) for i in range(9)] + [json.dumps({"prompt": "1+1=", "answer": None})]
    (tmp_path / "d.jsonl").write_text("\n".join(lines) + "\n")
    spec = {"kind": "verifiable", "path": str(tmp_path / "d.jsonl")}
    with pytest.raises(DataError) as caught:
        load_rows(InputRef("data", "d", "source", "dataset", spec=spec, rows="verifiable"))
    said = str(caught.value)
    assert said.count("the column `answer` is missing") == 3 and "`answer` is null" in said and "and 6 more like these" in said
    assert "d.jsonl:1:" in said and "columns there: prompt, final" in said and "columns: {answer: THEIR_NAME}" in said
