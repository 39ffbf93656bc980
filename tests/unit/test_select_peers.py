"""The selectors beside DSIR, ZIP-FIT and TAROT: random, length, classifier, embed."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import classifier, embed, length, random_rows
from data_pipelines.pick import gumbel, row_uid
from posttrain.errors import ConfigError, DataError

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
NEAR = ["river", "bridge", "stone", "arch"]


def corpus(count: int, seed: int = 0) -> list[dict]:
    """Every third row has some of the target's words."""
    draw = random.Random(seed)
    words = [draw.choices(WORDS + (NEAR * 2 if i % 3 == 0 else []), k=draw.randint(3, 20)) for i in range(count)]
    return [{"text": " ".join(w), "n": i} for i, w in enumerate(words)]


def target_rows(count: int = 20, seed: int = 9) -> list[dict]:
    draw = random.Random(seed)
    return [{"text": " ".join(draw.choices(NEAR + WORDS[:2], k=draw.randint(5, 11)))} for _ in range(count)]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shards(folder: Path, rows: list[dict], count: int) -> Path:
    for i in range(count):
        write(folder / f"s{i}.jsonl", rows[i::count])
    return folder


def chosen(out: Path) -> list[dict]:
    from posttrain.data.shards import read_shard

    return [row for file in sorted(out.glob("rows-*")) for _, row in read_shard(file)]


def numbers(out: Path) -> set[int]:
    return {row["n"] for row in chosen(out)}


def config(kind, **fields):
    return kind.model_validate({"name": "s", "method": kind.model_fields["method"].default, "budget": {"rows": 2}, **fields})


def with_ids(rows: list[dict]) -> list[dict]:
    return [{"id": f"r{i}", **row} for i, row in enumerate(rows)]


def word_count(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]+", text.lower()))


def test_random_is_uniform_nested_and_blind_to_shards(tmp_path):
    rows = corpus(300)
    raws = [shards(tmp_path / f"raw{k}", rows, k) for k in (1, 5)]
    picks = {
        (k, n, s): random_rows.select(raws[k], tmp_path / f"o{k}{n}{s}", rows=n, seed=s) for k in (0, 1) for n in (20, 90) for s in (0, 1)
    }
    found = {key: numbers(tmp_path / "o{}{}{}".format(*key)) for key in picks}
    assert found[0, 20, 0] == found[1, 20, 0] and found[0, 20, 0] < found[0, 90, 0]
    assert len(found[0, 90, 0]) == 90 and found[0, 90, 0] != found[0, 90, 1]
    ids = [row["id"] for row in chosen(random_every(tmp_path, raws[0]))]
    key = dict(zip(ids, gumbel(np.array([row_uid(i) for i in ids], np.uint64), 0), strict=True))
    best = sorted(key, key=key.get, reverse=True)[:20]
    assert {row["id"] for row in chosen(tmp_path / "o0200")} == set(best)


def random_every(tmp: Path, raw: Path) -> Path:
    random_rows.select(raw, tmp / "every", rows=10_000)
    return tmp / "every"


def test_random_takes_each_row_equally_often():
    uid = np.array([row_uid(f"r{i}") for i in range(50)], np.uint64)
    times = np.zeros(50)
    for seed in range(2000):
        key = random_rows.order({"uid": uid}, config(random_rows.RandomConfig), seed)
        times[np.argsort(-key)[:10]] += 1
    assert abs(times - 400).max() < 5 * math.sqrt(2000 * 0.2 * 0.8)


@pytest.mark.parametrize("rule", ["longest", "shortest", "target"])
def test_length_orders_by_words(tmp_path, rule):
    rows, aim = corpus(80), target_rows()
    raw, target = shards(tmp_path / "raw", rows, 3), write(tmp_path / "t.jsonl", [*aim, {"text": ""}])
    summary = length.select(raw, tmp_path / "o", target if rule == "target" else None, rule=rule, rows=15)
    counts = [word_count(row["text"]) for row in rows]
    median = statistics.median(word_count(row["text"]) for row in aim)
    score = {"longest": lambda c: c, "shortest": lambda c: -c, "target": lambda c: -abs(c - median)}[rule]
    picked = chosen(tmp_path / "o")
    assert sorted(row["score"] for row in picked) == sorted(sorted(map(score, counts))[-15:])
    assert all(row["score"] == score(word_count(row["text"])) for row in picked)
    assert summary["median_words"]["picked"] == pytest.approx(statistics.median(word_count(row["text"]) for row in picked), abs=1)
    assert summary.get("target_median_words") == (median if rule == "target" else None)


def test_length_to_a_target_needs_one(tmp_path):
    raw = write(tmp_path / "raw.jsonl", corpus(5))
    with pytest.raises(ConfigError, match="needs target rows"):
        length.select(raw, tmp_path / "o", rows=2)
    from posttrain.config.pipeline import parse_pipeline

    tree = {"version": 1, "name": "x", "sources": {"raw": {"kind": "text", "path": str(raw)}}}
    stage = {"name": "p", "method": "select.length", "in": {"raw": "raw"}, "budget": {"rows": 2}}
    with pytest.raises(ConfigError, match=r"stages\.p.*needs target rows"):
        parse_pipeline({**tree, "stages": [stage]}, None)
    assert parse_pipeline({**tree, "stages": [{**stage, "rule": "longest"}]}, None).stages[0].rule == "longest"


def slow_features(text: str, n: int, buckets: int) -> np.ndarray:
    words = re.findall(r"\w+|[^\w\s]+", text.lower())
    counts = np.zeros(buckets)
    for m in range(1, n + 1):
        for i in range(len(words) - m + 1):
            counts[int(hashlib.sha256(" ".join(words[i : i + m]).encode()).hexdigest(), 16) % buckets] += 1
    return np.log1p(counts)


def slow_fit(x: np.ndarray, y: np.ndarray, strength: float) -> tuple[np.ndarray, float]:
    """Newton's method on the balanced loss, in float64."""
    a = np.where(y, len(y) / (2 * y.sum()), len(y) / (2 * (~y).sum()))
    z, sign, beta = np.c_[x, np.ones(len(x))], np.where(y, 1.0, -1.0), np.zeros(x.shape[1] + 1)
    penalty = np.r_[np.ones(x.shape[1]), 0.0]
    for _ in range(50):
        p = 1 / (1 + np.exp(sign * (z @ beta)))
        gradient = penalty * beta - strength * z.T @ (a * sign * p)
        hessian = np.diag(penalty) + strength * (z * (a * p * (1 - p))[:, None]).T @ z
        beta -= np.linalg.solve(hessian, gradient)
    return beta[:-1], beta[-1]


def test_classifier_scores_equal_the_slow_reference():
    buckets, folds, strength = 64, 3, 0.5
    cfg = config(classifier.ClassifierConfig, buckets=buckets, folds=folds, strength=strength, negatives=25)
    raw, aim = with_ids(corpus(60)), with_ids(target_rows(12))
    parts = [classifier.fit_shard(raw[i::4], cfg, "raw") for i in range(4)]
    state = classifier.merge(parts, [[classifier.fit_shard(aim, cfg, "target")]], cfg)
    key = {row["id"]: classifier.row_hash(row, row["text"]) for row in raw}
    sample = sorted(raw, key=lambda row: key[row["id"]])[:25]
    aim = sorted(aim, key=lambda row: classifier.row_hash(row, row["text"]))
    x = np.stack([slow_features(row["text"], 2, buckets) for row in [*aim, *sample]])
    y = np.arange(37) < 12
    fold = np.array([*(i % folds for i in range(12)), *(key[row["id"]] % folds for row in sample)])
    models = [slow_fit(x[fold != k], y[fold != k], strength) for k in range(folds)]
    expected = []
    for row in raw:
        weights, bias = models[key[row["id"]] % folds]
        expected.append(slow_features(row["text"], 2, buckets) @ weights + bias)
    found = classifier.score(raw, state, cfg)["score"]
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-5)
    areas = []
    for k in range(folds):
        s = x[fold == k] @ models[k][0]
        pairs = [(p > n) + (p == n) / 2 for p in s[y[fold == k]] for n in s[~y[fold == k]]]
        areas.append(sum(pairs) / len(pairs))
    assert classifier.report(state, [], cfg)["auc"] == pytest.approx(statistics.fmean(areas), abs=1e-9)


def test_classifier_state_does_not_depend_on_shards():
    cfg = config(classifier.ClassifierConfig, buckets=128, negatives=30, positives=7)
    raw, aim = with_ids(corpus(100)), with_ids(target_rows(20))
    states = []
    for k in (1, 2, 7):
        parts = [classifier.fit_shard(raw[i::k][::-1], cfg, "raw") for i in range(k)]
        targets = [classifier.fit_shard(aim[i::k], cfg, "target") for i in range(k)]
        states.append(classifier.merge(iter(parts), [iter(targets)], cfg))
    assert all((states[0][name] == other[name]).all() for other in states[1:] for name in ("weights", "bias", "auc", "rows"))
    assert states[0]["rows"].tolist() == [30, 7]
    whole = classifier.score(raw, states[0], cfg)["score"]
    assert (np.concatenate([classifier.score([row], states[0], cfg)["score"] for row in raw]) == whole).all()


def test_classifier_samples_in_batches_as_at_once(monkeypatch):
    cfg = config(classifier.ClassifierConfig, buckets=128, negatives=9)
    raw = with_ids(corpus(200))
    at_once = classifier.fit_shard(raw, cfg, "raw")
    monkeypatch.setattr(classifier, "BATCH", 4)
    batched = classifier.fit_shard(raw, cfg, "raw")
    assert all((at_once[name] == batched[name]).all() for name in at_once)
    keys = sorted(classifier.row_hash(row, row["text"]) for row in raw)[:9]
    assert at_once["key"].tolist() == keys


def test_classifier_prefers_rows_like_the_target(tmp_path):
    raw, target = shards(tmp_path / "raw", corpus(300), 3), write(tmp_path / "t.jsonl", target_rows(30))
    summary = classifier.select(raw, target, tmp_path / "o", rows=60, buckets=512, guard={"salad": False})
    assert summary["rows_out"] == 60 and summary["auc"] > 0.8
    assert sum(row["n"] % 3 == 0 for row in chosen(tmp_path / "o")) > 45


def test_classifier_with_hardly_any_rows():
    cfg = config(classifier.ClassifierConfig, buckets=64)
    raw, aim = with_ids(corpus(3)), with_ids(target_rows(1))
    state = classifier.merge([classifier.fit_shard(raw, cfg, "raw")], [[classifier.fit_shard(aim, cfg, "target")]], cfg)
    assert len(state["bias"]) == 1 and "auc" not in classifier.report(state, [], cfg)
    assert np.isfinite(classifier.score(raw, state, cfg)["score"]).all() and classifier.score([], state, cfg)["score"].shape == (0, 1)
    with pytest.raises(DataError, match="target rows hold no words"):
        classifier.merge([classifier.fit_shard(raw, cfg, "raw")], [[classifier.fit_shard([{"id": "a", "text": " "}], cfg, "target")]], cfg)


def test_classifier_keeps_targets_apart():
    cfg = config(classifier.ClassifierConfig, buckets=128, targets="separate")
    raw = with_ids(corpus(60))
    parts = [[classifier.fit_shard(with_ids(target_rows(12, seed)), cfg, "target")] for seed in (1, 2)]
    both = classifier.merge([classifier.fit_shard(raw, cfg, "raw")], parts, cfg)
    second = classifier.merge([classifier.fit_shard(raw, cfg, "raw")], parts[1:], cfg)
    scores = classifier.score(raw, both, cfg)["score"]
    assert scores.shape == (60, 2) and (scores[:, 1:] == classifier.score(raw, second, cfg)["score"]).all()
    assert len(classifier.report(both, [], cfg)["auc"]) == 2


def with_vectors(rows: list[dict], seed: int, shift: float = 0.0) -> list[dict]:
    """Vectors of few values, so that there are equal ones; every eleventh is zero."""
    draw = np.random.default_rng(seed)
    vectors = draw.integers(-2, 3, (len(rows), 4)) + shift
    vectors[::11] = 0
    return [{**row, "v": v.tolist()} for row, v in zip(rows, vectors, strict=True)]


def cosine(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


def slow_rounds(rows: list[dict], aims: list[dict]) -> list[dict]:
    """All rows in the order of the round robin, rows by [cosine, uid]."""
    lists = [sorted(rows, key=lambda row: (-round(cosine(row["v"], aim["v"]), 9), row_uid(row["id"]))) for aim in aims]
    taken: dict[str, dict] = {}
    for i in range(len(rows)):
        offered = [
            (-round(cosine(found[i]["v"], aim["v"]), 9), row_uid(found[i]["id"]), found[i]) for found, aim in zip(lists, aims, strict=True)
        ]
        for *_, row in sorted(offered, key=lambda item: item[:2]):
            taken.setdefault(row["id"], row)
    return list(taken.values())


@pytest.mark.parametrize("unit", ["rows", "tokens", "share"])
@pytest.mark.parametrize("first", [1, 16])
def test_embed_goes_round_the_target_rows(tmp_path, monkeypatch, unit, first):
    monkeypatch.setattr(embed, "FIRST_LISTS", first)
    rows, aims = with_vectors(with_ids(corpus(90)), 1), with_vectors(target_rows(7), 2, 0.25)
    raw, target = shards(tmp_path / "raw", rows, 3), write(tmp_path / "t.jsonl", aims)
    budget = {"rows": {"rows": 25}, "tokens": {"tokens": 300}, "share": {"share": 0.4}}[unit]
    summary = embed.select(raw, target, tmp_path / "o", features={"from": "column", "column": "v"}, **budget)
    known, goals = ([row for row in data if any(row["v"])] for data in (rows, aims))
    order = slow_rounds(known, goals)
    expected = order[: {"rows": 25, "share": 36}.get(unit, 0)]
    for row in order if unit == "tokens" else ():
        if sum(word_count(r["text"]) for r in [*expected, row]) > 300:
            break
        expected.append(row)
    picked = chosen(tmp_path / "o")
    assert {row["id"] for row in picked} == {row["id"] for row in expected} and summary["not_eligible"] == {"without features": 9}
    for row in picked:
        assert row["score"] == pytest.approx(max(cosine(row["v"], aim["v"]) for aim in goals), abs=1e-6)
    assert summary["rows_out"] <= summary["round_robin_rows"] <= 81


def test_embed_by_mean_cosine_and_the_rows_behind_a_limit(tmp_path):
    rows, aims = with_vectors(with_ids(corpus(60)), 3), with_vectors(target_rows(5), 4, 0.25)
    raw, target = shards(tmp_path / "raw", rows, 2), write(tmp_path / "t.jsonl", aims)
    fields = {"features": {"from": "column", "column": "v"}}
    known, goals = ([row for row in data if any(row["v"])] for data in (rows, aims))
    embed.select(raw, target, tmp_path / "mean", rule="mean", rows=10, **fields)
    mean = {row["id"]: statistics.fmean(cosine(row["v"], aim["v"]) for aim in goals) for row in known}
    best = sorted(known, key=lambda row: (-round(mean[row["id"]], 7), row_uid(row["id"])))[:10]
    assert {row["id"] for row in chosen(tmp_path / "mean")} == {row["id"] for row in best}
    embed.select(raw, target, tmp_path / "limit", limit=1, rows=20, **fields)
    first = {row["id"] for row in slow_rounds(known, goals)[: len(goals)]}
    near = {row["id"]: max(cosine(row["v"], aim["v"]) for aim in goals) for row in known}
    one = {max(known, key=lambda row: (round(cosine(row["v"], aim["v"]), 9), -row_uid(row["id"])))["id"] for aim in goals}
    rest = sorted((row for row in known if row["id"] not in one), key=lambda row: (-round(near[row["id"]], 7), row_uid(row["id"])))
    assert {row["id"] for row in chosen(tmp_path / "limit")} == one | {row["id"] for row in rest[: 20 - len(one)]} and one <= first


def test_embed_does_not_depend_on_shards(tmp_path):
    rows = with_vectors(with_ids(corpus(80)), 5)
    target = write(tmp_path / "t.jsonl", with_vectors(target_rows(6), 6, 0.25))
    for k in (1, 4):
        shards(tmp_path / f"raw{k}", rows[::-1] if k == 4 else rows, k)
        embed.select(tmp_path / f"raw{k}", target, tmp_path / f"o{k}", rows=30, features={"from": "column", "column": "v"})
    one, four = ({row["id"]: row["score"] for row in chosen(tmp_path / f"o{k}")} for k in (1, 4))
    assert one == four


@pytest.mark.parametrize("name", ["select.random", "select.length", "select.classifier", "select.embed", "select.combine"])
def test_configs_read_back_what_a_stage_is_given(name):
    from posttrain.core.registry import method

    cfg = config(method(name).config)
    assert type(cfg).model_validate(cfg.dump()) == cfg


def test_embed_reads_by_an_embedder_unless_told_otherwise():
    given = [{}, {"features": {"batch": 8}}, {"features": {"from": "column", "column": "v"}}, {"features": {"from": "hidden", "layer": -2}}]
    assert [config(embed.EmbedConfig, **fields).features.from_ for fields in given] == ["embedder", "embedder", "column", "hidden"]


def test_embed_refuses_what_means_nothing():
    with pytest.raises(ValueError, match="goes round single target rows"):
        config(embed.EmbedConfig, targets="separate")
    with pytest.raises(ValueError, match="no best size"):
        config(embed.EmbedConfig, budget={"auto": True})
    cfg = config(embed.EmbedConfig)
    nothing = {"id": "a", "text": "", embed.FEATURES: np.zeros(3, np.float32)}
    with pytest.raises(DataError, match="no target row has a vector"):
        embed.merge([], [[embed.fit_shard([nothing], cfg, "target")]], cfg)
    state = {"targets": np.eye(2, 4, dtype=np.float32), "mean": np.zeros(4)}
    with pytest.raises(DataError, match="raw rows have 3 numbers, target rows 4"):
        embed.score([nothing], state, cfg)
