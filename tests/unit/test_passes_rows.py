"""What a selector sees of a row: chunks, feature vectors; and its own ranking with repeats and a size of its own."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import selector_kit as kit
from selector_kit_rank import RankConfig

from data_pipelines import feature_files, ranking
from data_pipelines.chunks import chunks_of, spans
from data_pipelines.feature_files import npy_header, open_vectors
from data_pipelines.ngrams import WORD
from data_pipelines.pick import row_uid
from posttrain.errors import ConfigError, DataError

TARGET = [{"text": "alpha beta", "id": f"t{i}", "v": [float(i), 1.0, -0.5, 0.25]} for i in range(5)]
TEXTS = ["", " \n", "one", "a b c d e", "héllo, wörld! ça va?\n\ttab", "!!! ... ???", "日本語 テスト。", "x" * 50]


@pytest.mark.parametrize("words", [1, 2, 3, 100])
def test_chunks_are_slices_that_hold_every_word_once(words):
    for text in TEXTS:
        pieces = [text[a:b] for a, b in spans(text, words)]
        every = WORD.findall(text)
        assert [word for piece in pieces for word in WORD.findall(piece)] == every
        assert all(len(WORD.findall(piece)) == words for piece in pieces[:-1]) and pieces
        assert len(pieces) == max(1, -(-len(every) // words))
        assert re.sub(r"\s", "", "".join(pieces)) == re.sub(r"\s", "", text)


def test_chunks_keep_the_columns_and_number_the_ids():
    found = list(chunks_of({"text": "a b c", "id": "r", "meta": [1]}, 2))
    assert found == [(0, {"text": "a b", "id": "r#0", "meta": [1]}), (1, {"text": "c", "id": "r#1", "meta": [1]})]


@pytest.mark.parametrize("shards", [1, 4])
def test_chunks_are_picked_by_themselves(tmp_path, shards):
    import pyarrow.parquet as pq

    from data_pipelines import dsir

    rows = [{**row, "text": row["text"] + " | " + " ".join(kit.WORDS[: i % 10])} for i, row in enumerate(kit.corpus(60))]
    target = kit.write_rows(tmp_path / "t.jsonl", TARGET)
    raw = kit.write_shards(tmp_path / "raw", rows, shards)
    summary = dsir.select(raw, target, tmp_path / "o", rows=25, chunks={"words": 5}, sample="topk")
    pieces = {item["id"]: item for row in rows for _, item in chunks_of(row, 5)}
    assert summary["rows_in"] == len(pieces) and summary["rows_read"] == 60 and summary["rows_out"] == 25
    for row in kit.chosen(tmp_path / "o"):
        assert row["text"] == pieces[row["id"]]["text"] and row["kind"] == pieces[row["id"]]["kind"]
    tables = [pq.read_table(path).to_pydict() for path in sorted((tmp_path / "o").glob("scores-*"))]
    place = {row["id"]: i // shards + 1 for i, row in enumerate(rows)}
    for table in tables:
        for name, number, chunk in zip(table["id"], table["row"], table["chunk"], strict=True):
            assert name.endswith(f"#{chunk}") and number == place[name.split("#")[0]]


def test_only_text_is_cut(tmp_path):
    rows = [{"prompt": "alpha beta", "id": "a"}]
    with pytest.raises(ConfigError, match="only text rows can be cut into chunks, these are `prompt`"):
        kit.run(tmp_path, kit.write_rows(tmp_path / "r.jsonl", rows), {}, kit.config(chunks={"words": 2}))


@pytest.fixture
def target(tmp_path):
    return {"target": kit.write_rows(tmp_path / "t.jsonl", TARGET)}


def ranked(rows, keep, stretch=1.0):
    mean = np.array([row["v"] for row in TARGET], np.float32).mean(axis=0).astype(float)
    key = {row["id"]: float((np.array(row["v"], np.float32) * np.float32(stretch)).astype(float) @ mean) for row in rows}
    return sorted(rows, key=lambda row: (-key[row["id"]], row_uid(row["id"])))[:keep]


@pytest.mark.parametrize("budget", [{"auto": True}, {"rows": 12}, {"tokens": 60}])
def test_a_ranking_is_cut_in_its_order_and_repeats(tmp_path, target, budget, monkeypatch):
    monkeypatch.setattr(ranking, "MIB", 1)
    rows = kit.corpus(80)
    raw = kit.write_shards(tmp_path / "raw", [{**row, "repeat": 9} for row in rows], 3)
    ctx = kit.run(tmp_path, raw, target, kit.config(RankConfig, budget=budget, memory=256), selector="selector_kit_rank")
    unit, amount = next(iter(budget.items()))
    expected = kit.prefix(ranked(rows, 30), 10**9 if unit == "auto" else amount, unit)
    found = {row["id"]: row for row in kit.chosen(tmp_path / "out")}
    assert found.keys() == {row["id"] for row in expected} and ctx.summary["ranked"] == 30
    assert all(row["repeat"] == 1 + row_uid(name) % 3 and row["repeat_before"] == 9 for name, row in found.items())
    assert all(row["score"] == pytest.approx(row["v"][0], rel=1e-6) for row in found.values())


def test_a_ranking_shorter_than_the_budget_is_said(tmp_path, target):
    raw = kit.write_shards(tmp_path / "raw", kit.corpus(50), 1)
    ctx = kit.run(tmp_path / "a", raw, target, kit.config(RankConfig, budget={"rows": 40}), selector="selector_kit_rank")
    assert ctx.summary["rows_out"] == 30 and "asked for 40 rows, only 30 are ranked" in ctx.summary["short"]
    cfg = kit.config(RankConfig, budget={"rows": 40, "on_short": "stop"})
    with pytest.raises(DataError, match="only 30 are ranked"):
        kit.run(tmp_path / "b", raw, target, cfg, selector="selector_kit_rank")


def test_only_a_ranking_has_a_size_of_its_own(tmp_path, target):
    raw = kit.write_shards(tmp_path / "raw", kit.corpus(5), 1)
    with pytest.raises(ConfigError, match="no best size of its own"):
        kit.run(tmp_path, raw, target, kit.config(budget={"auto": True}))


def test_features_are_made_once_for_all_rules_budgets_and_seeds(tmp_path, target, monkeypatch):
    monkeypatch.setenv("KIT_CALLS", str(tmp_path / "calls"))
    raw = kit.write_shards(tmp_path / "raw", kit.corpus(70), 3)

    def made(seed=0, **fields):
        (tmp_path / "calls").write_text("")
        ctx = kit.run(tmp_path, raw, target, kit.config(RankConfig, **fields), selector="selector_kit_rank", seed=seed)
        assert json.loads((tmp_path / "out" / "selection.json").read_text())["features"] == {
            "folder": next(path.name for path in (tmp_path / "work").glob("features-*") if stretched(path, fields)),
            "rows": 70,
            "width": 4,
        }
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        assert ctx.summary["rows_in"] == 70
        return sum(map(int, (tmp_path / "calls").read_text().split()))

    def stretched(folder, fields):
        first = open_vectors(folder / "target" / "000000.npy")
        return first[0, 1] == np.float32(fields.get("stretch", 1.0))

    assert made() == 75
    assert made(budget={"rows": 3}) == made(keep=5) == made(seed=9) == made(workers=1, memory=64) == 0
    assert made(stretch=2.0) == 75
    lost = next(path for path in (tmp_path / "work").glob("features-*/raw/000001.npy") if stretched(path.parent.parent, {}))
    lost.unlink()
    assert made(budget={"rows": 4}) == 23


def test_vectors_are_plain_npy_files_even_of_no_rows(tmp_path, target):
    path = tmp_path / "a.npy"
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    path.write_bytes(npy_header(3, 4) + values.tobytes())
    assert (np.load(path) == values).all() and isinstance(open_vectors(path), np.memmap)
    path.write_bytes(npy_header(0, 0))
    assert np.load(path).shape == open_vectors(path).shape == (0, 0)
    joined = [tmp_path / f"{i}.npy" for i in range(3)]
    for i, file in enumerate(joined):
        file.write_bytes(npy_header(0, 0) if i == 1 else npy_header(3, 4) + values.tobytes())
    assert (feature_files.joined(joined, tmp_path / "all.npy") == np.concatenate([values, values])).all()
    rows = kit.corpus(20)
    kit.write_rows(tmp_path / "raw" / "empty.jsonl", [])
    kit.write_rows(tmp_path / "raw" / "full.jsonl", rows)
    ctx = kit.run(tmp_path, tmp_path / "raw", target, kit.config(RankConfig, budget={"rows": 5}), selector="selector_kit_rank")
    assert ctx.summary["rows_out"] == 5


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "1 of 20 feature vectors are not finite"), (None, "shape")])
def test_bad_features_are_refused(tmp_path, target, value, message, monkeypatch):
    import selector_kit_rank

    def maker(cfg, inputs):
        def make(rows):
            found = np.ones((len(rows), 4), np.float32)
            found[len(rows) // 2, 1] = 1.0 if value is None else value
            return found[:-1] if value is None else found

        return make

    monkeypatch.setattr(selector_kit_rank, "feature_maker", maker)
    raw = kit.write_rows(tmp_path / "r.jsonl", kit.corpus(20))
    with pytest.raises(DataError, match=message):
        kit.run(tmp_path, raw, {"target": raw}, kit.config(RankConfig), selector="selector_kit_rank")


@pytest.mark.multiproc
def test_workers_do_not_change_the_ranked_pick(tmp_path, target):
    raw = kit.write_shards(tmp_path / "raw", kit.corpus(60), 4)
    for workers in (1, 2):
        cfg = kit.config(RankConfig, workers=workers, memory=64 * workers)
        kit.run(tmp_path / str(workers), raw, target, cfg, selector="selector_kit_rank")
    assert kit.tree(tmp_path / "1" / "out") == kit.tree(tmp_path / "2" / "out")


def test_feature_files_may_be_kept_for_other_runs(tmp_path, target, monkeypatch):
    monkeypatch.setenv("KIT_CALLS", str(tmp_path / "calls"))
    raw = kit.write_shards(tmp_path / "raw", kit.corpus(20), 2)
    for name in ("a", "b"):
        cfg = kit.config(RankConfig, budget={"rows": 3 if name == "a" else 5}, feature_cache=str(tmp_path / "kept"))
        kit.run(tmp_path / name, raw, target, cfg, selector="selector_kit_rank")
    assert sum(map(int, (tmp_path / "calls").read_text().split())) == 25
    assert not [path for name in ("a", "b") for path in (tmp_path / name / "work").glob("features-*")]


def test_the_maker_is_given_the_paths_of_the_other_inputs(tmp_path, target, monkeypatch):
    import selector_kit_rank

    from data_pipelines.door import model_ref, source_ref
    from data_pipelines.passes import run_selector
    from posttrain.core.context import StageContext
    from posttrain.core.events import Events

    real, seen = selector_kit_rank.feature_maker, []
    monkeypatch.setattr(selector_kit_rank, "feature_maker", lambda cfg, inputs: (seen.append(inputs), real(cfg, inputs))[1])
    model = tmp_path / "model"
    model.mkdir()
    raw, extra = kit.write_shards(tmp_path / "raw", kit.corpus(20), 2), kit.write_shards(tmp_path / "extra", kit.corpus(4), 2)
    keys = set()
    for content in ("{}", '{"hidden_size": 1}'):
        (model / "config.json").write_text(content)
        refs = {
            "raw": [source_ref("raw", raw, "text", {}, "stop")],
            "target": [source_ref("target", target["target"], "text", {}, "stop")],
            "model": [model_ref(model)],
            "extra": [source_ref("extra", extra, "text", {}, "stop")],
        }
        (tmp_path / "out").mkdir(exist_ok=True)
        ctx = StageContext("pick", "select.dsir", 0, refs, tmp_path / "out", tmp_path / "work", Events(None))
        run_selector("selector_kit_rank", kit.config(RankConfig), ctx)
        keys.add(json.loads((tmp_path / "out" / "selection.json").read_text())["features"]["folder"])
        for path in (tmp_path / "out").iterdir():
            path.unlink()
    assert seen == [{"model": [str(model)], "extra": [str(extra / "s0.jsonl"), str(extra / "s1.jsonl")]}] * 2
    assert len(keys) == 2
