"""The passes that all selectors share: exact cuts, invariance to shards, order and workers, resuming, guards."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import dsir, passes, pick, scores
from data_pipelines.door import select_files, source_ref
from data_pipelines.pick import Keys, cut_from_json, cut_to_json, find_cut, gumbel, picked, rank_of, row_uid
from data_pipelines.write import with_score
from posttrain.core.context import StageContext, World
from posttrain.core.events import Events
from posttrain.errors import ConfigError, DataError

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def corpus(count: int = 120, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    return [{"text": " ".join(draw.choices(WORDS, k=draw.randint(1, 12))), "n": i, "meta": {"tag": [i, None]}} for i in range(count)]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shards(folder: Path, rows: list[dict], count: int) -> Path:
    for i in range(count):
        write(folder / f"s{i}.jsonl", rows[i::count])
    return folder


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("target") / "t.jsonl", [{"text": "alpha beta gamma alpha beta"}, {"text": "delta alpha"}])


def chosen(out: Path) -> list[dict]:
    from posttrain.data.shards import read_shard

    return [row for file in sorted(out.glob("rows-*")) for _, row in read_shard(file)]


def numbers(out: Path) -> set[int]:
    return {row["n"] for row in chosen(out)}


def context(tmp: Path, raw: Path, target: Path, **more) -> StageContext:
    out = tmp / "out"
    out.mkdir(parents=True, exist_ok=True)
    refs = {"raw": [source_ref("raw", raw, "text", {}, "stop")], "target": [source_ref("target", target, "text", {}, "stop")]}
    return StageContext("pick", "select.dsir", 3, refs, out, tmp / "work", Events(None), **more)


def config(**fields):
    return dsir.DsirConfig.model_validate({"name": "pick", "method": "select.dsir", "budget": {"rows": 20}, **fields})


def random_keys(sizes: list[int], levels: int, seed: int = 0) -> list[Keys]:
    draw = np.random.default_rng(seed)
    return [
        Keys(
            rank_of(draw.integers(-levels, levels, n).astype(float)),
            draw.integers(0, max(2, levels), n).astype(np.uint64),
            shard,
            np.arange(1, n + 1),
            draw.integers(1, 9, n),
        )
        for shard, n in enumerate(sizes)
    ]


@pytest.mark.parametrize("sizes", [[0, 1, 50], [200], [13, 0, 77, 5]])
@pytest.mark.parametrize("levels", [1, 3, 10**6])
@pytest.mark.parametrize("at_once", [1, 8, 10**6])
def test_the_cut_equals_a_full_sort(monkeypatch, sizes, levels, at_once):
    monkeypatch.setattr(pick, "SORTED_AT_ONCE", at_once)
    keys = random_keys(sizes, levels)
    columns = [(k.shard, zip(k.rank, k.uid, k.row, k.weight, strict=True)) for k in keys]
    order = sorted((int(r), int(u), shard, int(n), int(w)) for shard, rows in columns for r, u, n, w in rows)
    spent = np.cumsum([item[4] for item in order])
    total = int(spent[-1])
    for budget in {0, 1, 7, int(spent[len(spent) // 2]), total - 1, total, total + 5}:
        cut = cut_from_json(json.loads(json.dumps(cut_to_json(find_cut(lambda: iter(keys), budget)))))
        expected = {item[2:4] for item, upto in zip(order, spent, strict=True) if upto <= budget}
        found = {(k.shard, int(n)) for k in keys for n in k.row[picked(k, cut)]}
        assert found == expected and cut.rows == len(expected)
        assert cut.weight == max([0, *(int(t) for t in spent if t <= budget)])


def test_ranks_sort_as_keys_do():
    key = np.array([-np.finfo(float).max, -1.5, -0.0, 0.0, 5e-324, 1.0, np.finfo(float).max])
    rank = rank_of(key)
    assert rank[2] == rank[3] and (np.diff(np.delete(rank, 2)[::-1].astype(object)) > 0).all()


def test_gumbel_noise_belongs_to_the_row():
    uid = np.array([row_uid(f"r{i}") for i in range(20_000)], np.uint64)
    noise = gumbel(uid, 5)
    assert noise.mean() == pytest.approx(0.5772, abs=0.03) and noise.var() == pytest.approx(np.pi**2 / 6, abs=0.06)
    order = np.random.default_rng(0).permutation(len(uid))
    assert (gumbel(uid[order], 5) == noise[order]).all() and (gumbel(uid[3:10], 5) == noise[3:10]).all()
    assert not (gumbel(uid, 6) == noise).any() and np.isfinite(gumbel(np.array([0, 2**64 - 1], np.uint64), 0)).all()
    assert abs(np.corrcoef(noise, gumbel(uid, 6))[0, 1]) < 0.03


def test_gumbel_top_k_samples_by_importance():
    score = np.log([8.0, 4.0, 2.0, 1.0, 1.0])
    uid = np.arange(5, dtype=np.uint64)
    first = np.bincount([int(np.argmax(score + gumbel(uid, seed))) for seed in range(4000)], minlength=5) / 4000
    np.testing.assert_allclose(first, np.exp(score) / 16, atol=0.03)


def test_top_k_of_shards_is_the_global_top_k():
    uid = np.array([row_uid(f"r{i}") for i in range(3000)], np.uint64)
    key = np.random.default_rng(1).normal(size=3000) + gumbel(uid, 0)
    best = set(np.argsort(-key)[:100].tolist())
    for count in (1, 2, 7, 64):
        place = np.random.default_rng(count).integers(0, count, 3000)
        parts = [np.flatnonzero(place == s) for s in range(count)]
        keys = [Keys(rank_of(key[p]), uid[p], s, np.arange(len(p)), np.ones(len(p), np.int64)) for s, p in enumerate(parts)]
        cut = find_cut(lambda keys=keys: iter(keys), 100)
        assert {int(parts[k.shard][i]) for k in keys for i in np.flatnonzero(picked(k, cut))} == best


@pytest.mark.parametrize("budget", [{"rows": 20}, {"tokens": 90}, {"bytes": 700}, {"share": 0.25}])
def test_picks_do_not_depend_on_shards_or_order(tmp_path, target, budget):
    rows = corpus()
    found = []
    for count in (1, 3, 8):
        random.Random(count).shuffle(rows)
        summary = dsir.select(shards(tmp_path / str(count), rows, count), target, tmp_path / f"o{count}", seed=3, **budget)
        found.append((numbers(tmp_path / f"o{count}"), summary["kl_reduction"], summary["tokens"]))
    assert found[0] == found[1] == found[2]
    assert len(found[0][0]) == {"rows": 20, "share": 30}.get(next(iter(budget)), len(found[0][0]))
    if "tokens" in budget:
        assert 78 < found[0][2] <= 90
    if "bytes" in budget:
        assert 630 < sum(len(row["text"]) for row in chosen(tmp_path / "o1")) <= 700


def test_budgets_nest_and_seeds_differ(tmp_path, target):
    raw = shards(tmp_path / "raw", corpus(), 2)
    for name, rows, seed in (("a", 10, 0), ("b", 40, 0), ("c", 40, 1)):
        dsir.select(raw, target, tmp_path / name, rows=rows, seed=seed)
    assert numbers(tmp_path / "a") < numbers(tmp_path / "b") != numbers(tmp_path / "c")


def test_rows_keep_their_columns_and_scores_have_no_text(tmp_path, target):
    import pyarrow.parquet as pq

    rows = [{**row, "id": f"doc-{row['n']}", "score": "theirs", "weight": 2.5} for row in corpus(30)]
    dsir.select(shards(tmp_path / "raw", rows, 2), target, tmp_path / "o", rows=5)
    original = {row["n"]: row for row in rows}
    tables = [pq.read_table(path) for path in sorted((tmp_path / "o").glob("scores-*.parquet"))]
    by_id = {name: score for table in tables for name, score in zip(table["id"].to_pylist(), table["score"].to_pylist(), strict=True)}
    assert len(by_id) == 30 and "text" not in tables[0].column_names
    for row in chosen(tmp_path / "o"):
        assert {**row, "score": "theirs"}.items() >= original[row["n"]].items()
        assert row["score_before"] == "theirs" and row["score"] == by_id[row["id"]] and row["source"] == "raw"
    assert tables[0]["shard"].to_pylist()[0] == "raw/s0.jsonl" and tables[0]["row"].to_pylist()[:2] == [1, 2]


def test_output_is_in_input_order_and_the_best_rows(tmp_path, target):
    dsir.select(shards(tmp_path / "raw", corpus(), 1), target, tmp_path / "o", rows=15, sample="topk")
    picks = chosen(tmp_path / "o")
    assert [row["n"] for row in picks] == sorted(row["n"] for row in picks)
    import pyarrow.parquet as pq

    every = sorted(pq.read_table(tmp_path / "o" / "scores-00000.parquet")["score"].to_pylist(), reverse=True)
    assert sorted((row["score"] for row in picks), reverse=True) == every[:15]


def test_equal_rows_are_taken_by_id_and_never_beyond_the_budget(tmp_path, target):
    same = [{"text": "alpha beta", "id": f"k{i}", "n": i} for i in range(40)]
    for name, rows in (("a", same), ("b", same[::-1])):
        dsir.select(write(tmp_path / f"{name}.jsonl", rows), target, tmp_path / name, rows=7, sample="topk")
    assert len(numbers(tmp_path / "a")) == 7 and numbers(tmp_path / "a") == numbers(tmp_path / "b")
    twice = [{"text": "alpha beta", "id": "one"} for _ in range(40)]
    dsir.select(shards(tmp_path / "c", twice, 3), target, tmp_path / "oc", rows=7)
    assert len(chosen(tmp_path / "oc")) == 7


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.multiproc
def test_workers_do_not_change_a_byte(tmp_path, target):
    raw = shards(tmp_path / "raw", corpus(), 4)
    dsir.select(raw, target, tmp_path / "one", rows=20)
    dsir.select(raw, target, tmp_path / "two", rows=20, workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.parametrize("seed", range(4))
def test_lost_parts_are_redone_to_the_same_bytes(tmp_path, target, seed):
    raw = shards(tmp_path / "raw", corpus(), 5)
    passes.run_selector("data_pipelines.dsir", config(), context(tmp_path, raw, target))
    before = tree(tmp_path / "out")
    parts = sorted(path for path in (tmp_path / "work").rglob("*") if path.is_file())
    for path in random.Random(seed).sample(parts, len(parts) // 2):
        path.unlink()
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    passes.run_selector("data_pipelines.dsir", config(), context(tmp_path, raw, target))
    assert tree(tmp_path / "out") == before


def test_a_stop_costs_one_shard(tmp_path, target, monkeypatch):
    raw = shards(tmp_path / "raw", corpus(), 6)
    passes.run_selector("data_pipelines.dsir", config(), context(tmp_path / "whole", raw, target))
    real, calls = dsir.score, []

    def dies(rows, state, cfg):
        calls.append(len(rows))
        if len([size for size in calls if size]) == 4:
            raise KeyboardInterrupt
        return real(rows, state, cfg)

    monkeypatch.setattr(dsir, "score", dies)
    with pytest.raises(KeyboardInterrupt):
        passes.run_selector("data_pipelines.dsir", config(), context(tmp_path / "cut", raw, target))
    assert len(list((tmp_path / "cut" / "work").rglob("scores/*.parquet"))) == 3
    assert not [path for path in (tmp_path / "cut").rglob(".*") if path.is_file()]
    calls.clear()
    monkeypatch.setattr(dsir, "score", lambda *a: (calls.append(len(a[0])), real(*a))[1])
    passes.run_selector("data_pipelines.dsir", config(), context(tmp_path / "cut", raw, target))
    assert len([size for size in calls if size]) == 3
    assert tree(tmp_path / "cut" / "out") == tree(tmp_path / "whole" / "out")


@pytest.mark.multiproc
def test_kill_9_costs_one_shard(tmp_path, target):
    raw = shards(tmp_path / "raw", corpus(), 12)
    dsir.select(raw, target, tmp_path / "whole", rows=50)
    code = """import sys, time; from data_pipelines import dsir
score = dsir.score
dsir.score = lambda *a: (time.sleep(0.1), score(*a))[1]
dsir.select(sys.argv[1], sys.argv[2], sys.argv[3], rows=50)"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    child = subprocess.Popen([sys.executable, "-c", code, raw, target, tmp_path / "cut"], env=env)
    while child.poll() is None and len(list(tmp_path.glob("cut.work/*/scores/*.parquet"))) < 3:
        time.sleep(0.01)
    child.kill()
    child.wait()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cut.work/*/scores/*.parquet")}
    assert 3 <= len(done) < 12 and not (tmp_path / "cut").exists()
    kept = []
    log = Events(None)
    log.sinks.append(lambda event: kept.append(event.get("message", "")))
    dsir.select(raw, target, tmp_path / "cut", rows=50, events=log)
    assert f"scores: {len(done)} of 12 shards were done before" in kept
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole") and not (tmp_path / "cut.work").exists()


def test_scores_of_earlier_selections_are_kept():
    row = with_score(with_score({"id": "a", "score": "theirs"}, 1.0, "s", "score"), 2.0, "s", "score")
    assert (row["score"], row["score_before_before"], row["score_before"]) == (2.0, 1.0, "theirs")


def test_changed_input_or_config_is_never_mixed_with_old_parts(tmp_path, target):
    raw = shards(tmp_path / "raw", corpus(), 2)
    first = context(tmp_path, raw, target)
    passes.run_selector("data_pipelines.dsir", config(), first)
    write(raw / "s0.jsonl", corpus(10, seed=9))
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    second = context(tmp_path, raw, target)
    passes.run_selector("data_pipelines.dsir", config(), second)
    assert second.summary["rows_in"] == 70 != first.summary["rows_in"]


def test_batches_do_not_change_the_scores(tmp_path, target, monkeypatch):
    raw = shards(tmp_path / "raw", corpus(), 2)
    dsir.select(raw, target, tmp_path / "a", rows=20)
    monkeypatch.setattr(scores, "BATCH_ROWS", 3)
    monkeypatch.setattr(scores, "SCORE_ROWS", 10)
    dsir.select(raw, target, tmp_path / "b", rows=20)
    assert chosen(tmp_path / "a") == chosen(tmp_path / "b")


def test_held_out_rows_are_never_fitted_or_picked(tmp_path, target):
    rows = corpus(80)
    raw = shards(tmp_path / "raw", rows, 2)
    held = write(tmp_path / "held.jsonl", rows[:30])
    ref = source_ref("eval", held, "text", {}, "stop")
    ref = type(ref)(**{**ref.to_json(), "split": "all"})
    ctx = context(tmp_path, raw, target, heldout=[ref])
    passes.run_selector("data_pipelines.dsir", config(budget={"rows": 1000}), ctx)
    texts = {row["text"] for row in rows[:30]}
    assert ctx.summary["excluded_heldout"] == sum(row["text"] in texts for row in rows)
    assert not texts & {row["text"] for row in chosen(tmp_path / "out")}
    with pytest.raises(DataError, match="30 held out"):
        passes.run_selector("data_pipelines.dsir", config(), context(tmp_path / "b", held, target, heldout=[ref]))


def test_only_the_train_part_is_read(tmp_path, target):
    raw = shards(tmp_path / "raw", corpus(200), 2)
    ctx = context(tmp_path, raw, target)
    ctx.inputs["raw"][0].spec["split"] = {"validation": 0.3, "test": 0.2}
    passes.run_selector("data_pipelines.dsir", config(), ctx)
    assert 60 < ctx.summary["rows_in"] < 140


def test_a_committed_dataset_is_read_by_its_shards(tmp_path, target):
    from posttrain.core.artifact import InputRef
    from posttrain.core.hashing import list_files
    from posttrain.data.dataset import write_dataset

    out = tmp_path / "stage" / "out"
    write_dataset(corpus(50), out, "text", rows_per_shard=20)
    (out / "scores-00000.parquet").write_bytes(b"not rows")
    manifest = {"files": list_files(out), "kind": "dataset", "digest": "d", "meta": {"row_type": "text", "split": {}}}
    (tmp_path / "stage" / "manifest.json").write_text(json.dumps(manifest))
    ctx = context(tmp_path, target, target)
    ctx.inputs["raw"] = [InputRef("raw", "made", "stage", "dataset", path=str(out), key="k")]
    passes.run_selector("data_pipelines.dsir", config(), ctx)
    assert ctx.summary["rows_in"] == 50 and ctx.summary["rows_out"] == 20 and ctx.meta["row_type"] == "text"


def test_bad_rows_stop_with_their_place_or_are_counted(tmp_path, target):
    raw = write(tmp_path / "raw.jsonl", corpus(5))
    raw.write_text(raw.read_text() + '{"text": 5}\nnot json\n{"other": 1}\n')
    with pytest.raises(DataError, match=r"raw\.jsonl:6"):
        dsir.select(raw, target, tmp_path / "a", rows=2)
    assert dsir.select(raw, target, tmp_path / "b", rows=2, on_bad="skip")["skipped"] == 3


def test_shares_of_a_mixture_are_refused(tmp_path, target):
    ctx = context(tmp_path, target, target)
    ctx.inputs["raw"] = [type(ref)(**{**ref.to_json(), "share": 0.5}) for ref in ctx.inputs["raw"]]
    with pytest.raises(ConfigError, match="reads every row once"):
        passes.run_selector("data_pipelines.dsir", config(), ctx)


def test_one_row_type_and_one_process(tmp_path, target):
    ctx = context(tmp_path, target, target)
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    ctx.inputs["raw"].append(source_ref("raw", write(tmp_path / "c.jsonl", chat), "messages", {}, "stop"))
    with pytest.raises(ConfigError, match="several row types: messages, text"):
        passes.run_selector("data_pipelines.dsir", config(), ctx)
    with pytest.raises(ConfigError, match="workers"):
        passes.run_selector("data_pipelines.dsir", config(), context(tmp_path, target, target, world=World(0, 2)))


def test_row_types_are_seen_from_the_first_row(tmp_path, target):
    chat = [{"messages": [{"role": "user", "content": f"alpha {i}"}, {"role": "assistant", "content": "beta"}]} for i in range(6)]
    summary = select_files("select.dsir", write(tmp_path / "c.jsonl", chat), target, tmp_path / "o", rows=3, suffix=".parquet")
    assert summary["rows_out"] == 3 and (tmp_path / "o" / "rows-00000.parquet").exists()
    with pytest.raises(DataError, match="no row type fits"):
        select_files("select.dsir", write(tmp_path / "x.jsonl", [{"body": "a"}]), target, tmp_path / "p", rows=3)


def test_length_limits_name_their_reason(tmp_path, target):
    raw = write(tmp_path / "r.jsonl", [{"text": text} for text in ("", "a b", "a b c", "a b c d")])
    summary = dsir.select(raw, target, tmp_path / "o", rows=9, min_words=3, max_words=3)
    assert summary["not_eligible"] == {"without words": 1, "below 3 words": 1, "above 3 words": 1} and summary["rows_out"] == 1
    assert config(filters={"min_words": 3}).filters.min_words == 3


def test_many_held_out_keys_go_to_the_workers_once(tmp_path, monkeypatch):
    import pickle

    from data_pipelines import engine

    monkeypatch.setattr(engine, "KEYS_SENT", 3)
    few, many = (engine.Job("m", None, 0, tmp_path, frozenset(map(str, range(n)))) for n in (3, 2000))
    assert pickle.loads(pickle.dumps(few)) == few and not (tmp_path / "heldout.json").exists()
    assert len(pickle.dumps(many)) < 1000 and pickle.loads(pickle.dumps(many)) == many


def test_one_field_of_a_block_may_stand_alone():
    from posttrain.config.fields import short_form
    from posttrain.core.registry import method
    from posttrain.verbs.single import to_overrides

    forms = {key: short_form(dsir.DsirConfig, key) for key in ("rows", "min_words", "quality", "workers", "temperature", "nothing")}
    assert forms == {
        "rows": "budget.rows", "min_words": "filters.min_words", "quality": "filters.quality",
        "workers": "workers", "temperature": "temperature", "nothing": "nothing",
    }  # fmt: skip
    tree = {"stages": [{"name": "s", "method": "select.dsir"}]}
    pairs = {"rows": "5", "min_words": "20", "budget.on_short": "stop"}
    assert to_overrides(tree, pairs, method("select.dsir")) == [
        "stages.s.budget.rows=5", "stages.s.filters.min_words=20", "stages.s.budget.on_short=stop"
    ]  # fmt: skip


def test_inputs_may_have_names_and_targets_be_separate(tmp_path, target):
    raw = {name: write(tmp_path / f"{name}.jsonl", corpus(40, seed)) for seed, name in enumerate(("a", "b"))}
    targets = {"one": target, "two": write(tmp_path / "two.jsonl", [{"text": "kappa iota theta"}])}
    found = []
    for name, order in (("x", ["one", "two"]), ("y", ["two", "one"])):
        summary = dsir.select(
            raw, {n: targets[n] for n in order}, tmp_path / name, rows=30, targets="separate", quotas={"shares": {"a": 0.5}}
        )
        found.append((summary["groups"], summary["targets"], {row["id"] for row in chosen(tmp_path / name)}))
    assert found[0] == found[1] and found[0][0]["a"] >= 15 and set(found[0][1]) == {"one", "two"}
    with pytest.raises(ConfigError, match="names of their own"):
        dsir.select(raw, None, tmp_path / "z", rows=3, targets="separate")


def test_published_filters_name_their_reasons(tmp_path, target):
    raw = write(tmp_path / "r.jsonl", [{"text": "alpha beta " * 100}, {"text": "alpha"}, *corpus(5)])
    summary = dsir.select(raw, target, tmp_path / "o", rows=2, repetition="gopher")
    assert summary["not_eligible"] and summary["eligible"] + sum(summary["not_eligible"].values()) == 7
