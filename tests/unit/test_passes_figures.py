"""Figures of a selection against slow ones, its examples, its books, and its loading elsewhere."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest
import selector_kit as kit

from data_pipelines import figures, scores
from data_pipelines.ngrams import count_words
from data_pipelines.texts import count_bytes
from posttrain.errors import DataError

TARGET = [{"text": "alpha beta", "id": "t"}]


@pytest.fixture
def target(tmp_path):
    return {"target": kit.write_rows(tmp_path / "t.jsonl", TARGET)}


@pytest.fixture
def done(tmp_path, target, monkeypatch):
    monkeypatch.setattr(scores, "SCORE_ROWS", 17)
    rows = kit.corpus(230, 1)
    ctx = kit.run(tmp_path, kit.write_shards(tmp_path / "raw", rows, 3), target, kit.config(budget={"rows": 60}))
    return rows, ctx


def test_effective_sample_size_and_the_weight_at_the_top(done):
    rows, ctx = done
    weight = [math.exp(row["s"][0]) for row in rows]
    assert ctx.summary["ess"] == pytest.approx(math.fsum(weight) ** 2 / math.fsum(w * w for w in weight), rel=1e-12)
    assert ctx.summary["top_1_percent"] == pytest.approx(math.fsum(sorted(weight)[-3:]) / math.fsum(weight), rel=1e-12)


def test_histograms_share_bins_and_count_every_row(done):
    rows, ctx = done
    picked = kit.by_score(rows)[:60]
    for name, value in (("score_histogram", lambda row: row["s"][0]), ("words_histogram", lambda row: len(row["text"].split()))):
        found = ctx.summary[name]
        assert (sum(found["raw"]), sum(found["picked"])) == (230, 60) and len(found["edges"]) == figures.BINS + 1
        edges = np.array(found["edges"])
        for part, some in (("raw", rows), ("picked", picked)):
            clipped = np.clip([value(row) for row in some], edges[0], np.nextafter(edges[-1], 0))
            assert np.histogram(clipped, edges)[0].tolist() == found[part]
    assert ctx.summary["median_words"] == {
        "raw": statistics.median_low(len(row["text"].split()) for row in rows),
        "picked": statistics.median_low(len(row["text"].split()) for row in picked),
    }


def test_examples_are_the_best_the_last_and_the_first_left_out(done, tmp_path):
    rows, _ = done
    shown = json.loads((tmp_path / "out" / "selection.json").read_text())["examples"]
    order = kit.by_score(rows)
    expected = {"best": order[:5], "last_in": order[55:60][::-1], "first_out": order[60:65]}
    for name, some in expected.items():
        assert [item["id"] for item in shown[name]] == [row["id"] for row in some]
        assert [(item["text"], item["score"]) for item in shown[name]] == [(row["text"], row["s"][0]) for row in some]
    assert [item["score"] for item in shown["worst"]] == [row["s"][0] for row in order[55:60][::-1]]


def test_all_scores_equal_or_huge(tmp_path, target):
    for i, values in enumerate(([1.0] * 40, [1e300, -1e300, 0.0, 5e-324] * 10)):
        rows = [{**row, "s": [value]} for row, value in zip(kit.corpus(40), values, strict=True)]
        ctx = kit.run(tmp_path / str(i), kit.write_shards(tmp_path / str(i) / "raw", rows, 1), target, kit.config(budget={"rows": 7}))
        found = ctx.summary["score_histogram"]
        assert sum(found["raw"]) == 40 and sum(found["picked"]) == 7 and np.isfinite(found["edges"]).all()
        assert 1 <= ctx.summary["ess"] <= 40.0001


def test_short_picks_are_warned_of(tmp_path, target):
    rows = [{"id": f"r{i}", "text": "word " * (3 if i < 10 else 30), "s": [float(-i)]} for i in range(100)]
    log: list[str] = []
    raw = kit.write_shards(tmp_path / "raw", rows, 1)
    kit.run(tmp_path / "a", raw, target, kit.config(budget={"rows": 10}), log=log)
    assert any("the picked rows are short: 3 words at the median, 30 in all" in line for line in log)
    log.clear()
    kit.run(tmp_path / "b", raw, target, kit.config(budget={"rows": 50}), log=log)
    assert not any("short" in line for line in log)


def test_the_books_add_up_or_the_run_fails(tmp_path, target, monkeypatch):
    raw = kit.write_shards(tmp_path / "raw", kit.corpus(30), 2)
    real = scores.shard_items

    def loses_one(*args, **kwargs):
        for item in real(*args, **kwargs):
            if item.row["id"] != "r4":
                yield item

    monkeypatch.setattr(scores, "shard_items", loses_one)
    with pytest.raises(DataError, match="30 rows read, 29 accounted for"):
        kit.run(tmp_path, raw, target, kit.config())


def test_rows_that_change_between_the_passes_are_noticed(tmp_path, target, monkeypatch):
    from data_pipelines import passes

    raw = kit.write_shards(tmp_path / "raw", kit.corpus(30), 1)
    real = passes.measure

    def and_cuts(*args):
        lines = (raw / "s0.jsonl").read_text().splitlines(keepends=True)
        (raw / "s0.jsonl").write_text("".join(lines[:9]))
        return real(*args)

    monkeypatch.setattr(passes, "measure", and_cuts)
    with pytest.raises(DataError, match=r"20 rows picked, \d accounted for"):
        kit.run(tmp_path, raw, target, kit.config())


def test_words_and_bytes_are_counted_as_the_features_count_them():
    texts = ["", "Hello, world", "İx", "日本語 x", "\ud800", "a\u0301b"]
    assert count_bytes(texts).tolist() == [len(text.encode("utf-8", "surrogatepass")) for text in texts]
    from data_pipelines.ngrams import Hasher

    assert count_words(texts).tolist() == Hasher().weigh(texts, np.zeros(10_000))[1].tolist()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".parquet"])
def test_the_folder_loads_with_datasets(tmp_path, target, suffix, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = kit.corpus(40)
    kit.run(tmp_path, kit.write_shards(tmp_path / "raw", rows, 2), target, kit.config(suffix=suffix))
    found = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert found["id"] == [row["id"] for row in kit.chosen(tmp_path / "out")] and len(found) == 20
    assert set(found.column_names) >= {"text", "score", "source", "weight", "kind"}


def test_filters_and_guard_name_their_reasons(tmp_path, target, monkeypatch):
    """The hooks as the passes call them; what they decide is tested with them."""
    from data_pipelines import guard

    raw = kit.write_shards(tmp_path / "raw", kit.corpus(40), 2)
    monkeypatch.setattr(guard, "threshold", lambda figures, cfg: 0.25)
    monkeypatch.setattr(
        guard, "scores", lambda texts, state, cfg: np.array([float(text.split()[0] > "c") if len(text) > 9 else np.nan for text in texts])
    )
    ctx = kit.run(tmp_path, raw, target, kit.config(guard={"salad": True}, budget={"rows": 40}))
    salad = [row for row in kit.corpus(40) if len(row["text"]) > 9 and row["text"].split()[0] < "c"]
    assert ctx.summary["not_eligible"] == {"word salad": len(salad)} and salad
    assert not {row["id"] for row in salad} & {row["id"] for row in kit.chosen(tmp_path / "out")}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_progress_is_told_inside_a_shard_in_megabytes(tmp_path, target, suffix, monkeypatch):
    from data_pipelines import meter
    from posttrain.data.shards import ShardWriter

    monkeypatch.setattr(meter, "EVERY_S", 0.0)
    writer = ShardWriter(tmp_path / "raw", 400, suffix)
    for row in kit.corpus(700):
        writer.write(row)
    size = sum(file["bytes"] for file in writer.close()) / 1e6
    seen: list[dict] = []
    kit.run(tmp_path, tmp_path / "raw", target, kit.config(), watch=seen.append)
    told = [event for event in seen if event["kind"] == "progress" and event["what"] == "scores"]
    done = [event["done"] for event in told]
    assert len(told) > 8 and done == sorted(done) and done[-1] == pytest.approx(size, abs=1e-6) and 0 < done[0] < size / 4
    assert {(event["total"], event["unit"]) for event in told} == {(round(size, 6), "MB")} and told[-1]["rows"] == 700
