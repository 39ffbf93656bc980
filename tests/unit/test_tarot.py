"""select.tarot: its state and scores against plain numpy, its rules, and whole runs over files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from data_pipelines import tarot
from data_pipelines.selector import FEATURES
from posttrain.errors import ConfigError, DataError


def config(**fields: Any) -> tarot.TarotConfig:
    column = {"from": "column", "column": "v"}
    return tarot.TarotConfig.model_validate(
        {"name": "s", "method": "select.tarot", "budget": {"rows": 4}, "features": column, "whiten_eps": 1e-3, **fields}
    )


def vectors(n: int, seed: int = 0, d: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, d)) * 10.0 ** np.linspace(-2, 1, d) + 1).astype(np.float32)


def rows(values: np.ndarray, name: str = "r") -> list[dict[str, Any]]:
    return [{"id": f"{name}{i}", "text": f"text {i}", FEATURES: v} for i, v in enumerate(values)]


def fitted(raw: np.ndarray, target: np.ndarray, cfg: tarot.TarotConfig, cuts: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    data = rows(raw)
    ends = [0, *cuts, len(data)]
    parts = [tarot.fit_shard(data[a:b], cfg, "raw") for a, b in itertools.pairwise(ends)]
    return tarot.merge(parts, [[tarot.fit_shard(rows(target, "t"), cfg, "target")]], cfg)


def slow(raw: np.ndarray, target: np.ndarray, eps: float = 1e-3) -> tuple[np.ndarray, np.ndarray]:
    """Whitened unit vectors of raw and target by the eigendecomposition of their covariance."""
    every = np.concatenate([raw, target]).astype(np.float64)
    centred = every - every.mean(0)
    s = centred.T @ centred / len(every)
    values, basis = np.linalg.eigh(s + eps * np.trace(s) / len(s) * np.eye(len(s)))
    y = centred @ basis / np.sqrt(values)
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    return y[: len(raw)], y[len(raw) :]


def test_score_is_the_mean_whitened_cosine():
    raw, target = vectors(40), vectors(5, 1)
    state = fitted(raw, target, config())
    white_raw, white_target = slow(raw, target)
    found = tarot.score(rows(raw), state, config())
    np.testing.assert_allclose(found["score"], (white_raw @ white_target.T).mean(1), atol=1e-6)
    np.testing.assert_allclose(state["targets"] @ state["targets"].T, white_target @ white_target.T, atol=1e-6)
    assert not found["reason"].any()


def test_without_whitening_it_is_the_centred_cosine():
    raw, target = vectors(40), vectors(5, 1)
    cfg = config(whiten=False)
    mean = np.concatenate([raw, target]).astype(np.float64).mean(0)
    unit = [(x - mean) / np.linalg.norm(x - mean, axis=1, keepdims=True) for x in (raw, target)]
    found = tarot.score(rows(raw), fitted(raw, target, cfg), cfg)["score"]
    np.testing.assert_allclose(found, (unit[0] @ unit[1].T).mean(1), atol=1e-6)


@pytest.mark.parametrize("cuts", [(13,), (1, 2, 39)])
def test_shards_change_nothing_but_rounding(cuts):
    raw, target = vectors(40), vectors(5, 1)
    one, many = fitted(raw, target, config()), fitted(raw, target, config(), cuts)
    assert one.keys() == many.keys() and all(np.allclose(one[name], many[name], rtol=1e-9, atol=1e-6) for name in one)
    assert (one["figures"][:3] == many["figures"][:3]).all()
    scores = [tarot.score(rows(raw), state, config())["score"] for state in (one, many)]
    np.testing.assert_allclose(*scores, atol=1e-7)


def test_a_row_scores_the_same_bits_in_any_batch():
    raw, target = vectors(200), vectors(5, 1)
    state = fitted(raw, target, config())
    together = tarot.score(rows(raw), state, config())["score"]
    assert [tarot.score(rows(raw)[i : i + 1], state, config())["score"][0] for i in range(200)] == together.tolist()


def test_the_samples_do_not_depend_on_shards(monkeypatch):
    monkeypatch.setattr(tarot, "RESERVOIR", 7)
    raw, target = vectors(40), vectors(5, 1)
    one, many = (fitted(raw, target, config(), cuts)["sample"] for cuts in ((), (3, 20)))
    assert one.shape == (7, 6)
    np.testing.assert_allclose(one, many, atol=1e-6)


def test_rows_without_features_are_counted_and_never_eligible():
    raw, target = vectors(40), vectors(5, 1)
    raw[[4, 9]], target[2] = 0, 0
    state = fitted(raw, target, config())
    found = tarot.score(rows(raw), state, config())
    assert np.flatnonzero(found["reason"]).tolist() == [4, 9] and found["reason"][4] == "without features"
    assert state["targets"].shape == (4, 6) and state["figures"][:4].tolist() == [40, 42, 2, 1]


def test_what_cannot_be_fitted_is_said(monkeypatch):
    raw, target = vectors(40), vectors(5, 1)
    with pytest.raises(DataError, match="no target row has a feature; 5 have none"):
        fitted(raw, target * 0, config())
    with pytest.raises(DataError, match="raw rows have 6 numbers, target rows 4"):
        fitted(raw, vectors(5, 1, 4), config())
    with pytest.raises(DataError, match="cannot be factored with whiten_eps 0"):
        fitted(raw[:2], target[:2], config(whiten_eps=0.0))
    monkeypatch.setattr(tarot, "TARGET_BYTES", 4 * 6 * 3)
    with pytest.raises(DataError, match="more than 3 target rows"):
        fitted(raw, target, config())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": "separate"}, "goes round single target rows"),
        ({"budget": {"auto": True}}, "only `rule: otm` finds a size"),
        ({"rule": "fixed", "folds": 1}, "greater than or equal to 2"),
        ({"preset": "tarot-repo", "features": {"from": "embedder"}}, "means nothing with `from: embedder`"),
        ({"preset": "tarot"}, "known: default, tarot-repo"),
    ],
)
def test_configs_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        config(**fields)


def test_the_preset_is_the_published_setting():
    cfg = tarot.TarotConfig.model_validate({"name": "s", "method": "select.tarot", "budget": {"rows": 4}, "preset": "tarot-repo"})
    assert (cfg.whiten_eps, cfg.eps_relative, cfg.limit, cfg.folds, cfg.folds_seed) == (1e-5, False, 2000, 10, 42)
    assert (cfg.features.projection, cfg.features.scale, cfg.features.dim) == ("rademacher", "trak", 2048)
    assert cfg.as_published and cfg.last == "largest" and config().last == "smallest"


class Memory:
    """Scored rows held in memory, in batches of a size."""

    def __init__(self, features: np.ndarray, words: np.ndarray | None = None, size: int = 7) -> None:
        n = len(features)
        self.columns = {"shard": np.arange(n) // 11, "row": np.arange(n) % 11, "features": features}
        self.columns["words"] = np.ones(n, np.int64) if words is None else words
        self.size = size

    def batches(self):
        for at in range(0, len(self.columns["row"]), self.size):
            yield {name: values[at : at + self.size] for name, values in self.columns.items()}

    def target_features(self):
        raise AssertionError("the state holds them")


def ranked(raw: np.ndarray, target: np.ndarray, cfg: tarot.TarotConfig, **memory: Any) -> tuple[list[int], Any]:
    found = tarot.rank(Memory(raw, **memory), fitted(raw, target, cfg), cfg, 0)
    order = np.argsort(-found.key, kind="stable")
    return (found.shard * 11 + found.row)[order].tolist(), found


def slow_layers(raw: np.ndarray, target: np.ndarray, weight: np.ndarray, budget: int) -> tuple[set[int], set[int]]:
    """Layers of the round robin: (rows of those that fit whole, rows of the next)."""
    x, y = slow(raw, target)
    whole: set[int] = set()
    for layer in np.argsort(-(x @ y.T), axis=0, kind="stable"):
        new = set(layer.tolist()) - whole
        if weight[list(whole | new)].sum() > budget:
            return whole, new
        whole |= new
    return whole, set()


@pytest.mark.parametrize("budget", [1, 5, 12, 30, 60])
@pytest.mark.parametrize("unit", ["rows", "tokens"])
def test_fixed_takes_whole_layers_and_cuts_the_next(budget, unit):
    raw, target = vectors(60), vectors(5, 1)
    words = np.random.default_rng(2).integers(1, 5, 60) if unit == "tokens" else np.ones(60, np.int64)
    order, found = ranked(raw, target, config(budget={unit: budget}), words=words)
    whole, cut = slow_layers(raw, target, words, budget)
    assert set(order[: len(whole)]) == whole
    assert set(order[len(whole) : len(whole) + len(cut)]) == cut and found.facts["in_last_layer"] == len(cut)
    room = budget - words[list(whole)].sum()
    assert found.facts["last_layer_by"] == ("potential" if cut and room else "cosine")


def test_the_layer_that_is_cut_goes_by_potential():
    raw, target = vectors(60), vectors(5, 1)
    state, cfg = fitted(raw, target, config()), config(budget={"rows": 12})
    order, _ = ranked(raw, target, cfg)
    whole, cut = slow_layers(raw, target, np.ones(60, np.int64), 12)
    last = order[len(whole) :]
    x, y = (v.astype(np.float64) for v in (tarot._white(raw[last], state), state["targets"]))
    from data_pipelines.ot import transport

    reg = transport(np.sqrt(np.maximum(0, 2 - 2 * x @ y.T)), reg=0.01).f
    assert len(cut) > 2 and set(last) == cut and np.corrcoef(np.arange(len(last)), reg)[0, 1] > 0.7


def test_fixed_equals_the_rule_for_a_number_of_rows():
    from data_pipelines.neighbours import top_neighbours
    from data_pipelines.tarot_rules import Gathered, Space, fixed

    raw, target = vectors(60), vectors(5, 1)
    state = fitted(raw, target, config())
    z = tarot._white(raw, state)
    lists = top_neighbours([(np.arange(60), z)], state["targets"], 2000)
    for k in (7, 19):
        rule = fixed(lists, Space(state["targets"], Gathered(lambda: [(np.arange(60), z)], lists)), k)
        order, _ = ranked(raw, target, config(budget={"rows": k}))
        assert order[:k] == rule.ids.tolist()


@pytest.mark.parametrize("rule", ["fixed", "otm"])
def test_batches_do_not_change_the_order(rule):
    raw, target = vectors(60), vectors(5, 1)
    cfg = config(rule=rule, folds=3, repeats=2.0)
    (one, a), (many, b) = (ranked(raw, target, cfg, size=size) for size in (1, 60))
    assert one == many and a.repeat.tolist() == b.repeat.tolist()


def test_only_the_nearest_of_each_target_are_ranked():
    raw, target = vectors(60), vectors(5, 1)
    x, y = slow(raw, target)
    order, found = ranked(raw, target, config(limit=2, budget={"rows": 50}))
    assert set(order) == set(np.argsort(-(x @ y.T), axis=0)[:2].ravel().tolist()) and found.facts["ranked_rows"] == len(order)


@pytest.mark.parametrize("fields", [{"budget": {"rows": 50}}, {"budget": {"tokens": 90}}, {"rule": "otm", "folds": 3}])
def test_lists_that_grow_give_what_whole_lists_give(monkeypatch, fields):
    from data_pipelines import tarot_order

    raw, target = vectors(60), vectors(5, 1)
    words = np.random.default_rng(2).integers(1, 5, 60)
    whole, facts = ranked(raw, target, config(limit=60, **fields), words=words)
    monkeypatch.setattr(tarot_order, "FIRST_LISTS", 1)
    monkeypatch.setattr(tarot_order.Rules, "_first_limit", lambda _: 1)
    grown, more = ranked(raw, target, config(**fields), words=words)
    assert grown == whole and more.facts == facts.facts


def test_the_smallest_potentials_turn_the_cut_layer_round():
    raw, target = vectors(60), vectors(5, 1)
    (largest, found), (smallest, _) = (ranked(raw, target, config(budget={"rows": 12}, last=last)) for last in ("largest", "smallest"))
    cut = found.facts["in_last_layer"]
    assert cut > 1 and largest[:-cut] == smallest[:-cut] and largest[-cut:] == smallest[-cut:][::-1]


def test_quotas_rank_whole_layers():
    raw, target = vectors(60), vectors(5, 1)
    order, found = ranked(raw, target, config(budget={"rows": 12}, quotas={"by": "source"}))
    assert len(order) == 60 and found.facts["last_layer_by"] == "cosine"
    assert order[:12] != [] and set(order[:12]) >= slow_layers(raw, target, np.ones(60, np.int64), 12)[0]


def test_otm_finds_the_rows_of_the_targets_clusters():
    rng = np.random.default_rng(0)
    centres = np.eye(4, 6) * 10
    target = np.concatenate([centres[i] + rng.normal(0, 0.3, (6, 6)) for i in (0, 1)]).astype(np.float32)
    raw = np.concatenate([centres[i] + rng.normal(0, 0.3, (25, 6)) for i in range(4)]).astype(np.float32)
    order, found = ranked(raw, target, config(rule="otm", budget={"auto": True}, folds=4, whiten=False))
    assert set(order) <= set(range(50)) and {i // 25 for i in order} == {0, 1} and 8 <= len(order) < 50
    assert found.facts["ranked_rows"] == len(order) and len(found.facts["fold_rows"]) == len(found.facts["fold_layers"]) == 4


@pytest.mark.parametrize("rule", ["fixed", "otm"])
def test_repeats_have_the_mean_that_was_asked_for(rule):
    raw, target = vectors(60), vectors(5, 1)
    _, found = ranked(raw, target, config(rule=rule, repeats=3.0, budget={"rows": 20}, folds=3))
    counts = found.repeat[:20] if rule == "fixed" else found.repeat
    assert counts.min() >= 1 and counts.sum() == 3 * len(counts) and len(set(counts.tolist())) > 1


def test_problems_that_are_too_large_fall_back_or_are_refused(monkeypatch):
    from data_pipelines import tarot_order

    monkeypatch.setattr(tarot_order, "MOST_PAIRS", 10)
    raw, target = vectors(60), vectors(5, 1)
    assert ranked(raw, target, config(budget={"rows": 7}))[1].facts["last_layer_by"] == "cosine"
    with pytest.raises(DataError, match="35 pairs; at most 10"):
        ranked(raw, target, config(budget={"rows": 7}, repeats=2.0))


def test_the_published_rule_takes_rows_only():
    raw, target = vectors(60), vectors(5, 1)
    order, _ = ranked(raw, target, config(as_published=True, budget={"rows": 10}))
    assert len(order) == 10
    with pytest.raises(ConfigError, match="a number of rows only"):
        ranked(raw, target, config(as_published=True, budget={"tokens": 9}))


def write(path: Path, values: np.ndarray, name: str) -> Path:
    texts = (f"text {i} of {name} about rivers" for i in range(len(values)))
    lines = (json.dumps({"id": f"{name}{i}", "text": text, "v": v.tolist()}) for i, (text, v) in enumerate(zip(texts, values, strict=True)))
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def shards(folder: Path, values: np.ndarray, cuts: list[int]) -> list[Path]:
    """The rows with their ids, cut into files."""
    whole = write(folder / "whole.jsonl", values, "r").read_text().splitlines(keepends=True)
    (folder / "whole.jsonl").unlink()
    found = []
    for i, (a, b) in enumerate(itertools.pairwise([0, *cuts, len(values)])):
        found.append(folder / f"{i:03d}.jsonl")
        found[-1].write_text("".join(whole[a:b]))
    return found


def ids_of(out: Path) -> list[str]:
    from posttrain.data.shards import read_shard

    return [row["id"] for file in sorted(out.glob("rows-*")) for _, row in read_shard(file)]


OPTIONS: dict[str, Any] = {"features": {"from": "column", "column": "v"}, "whiten_eps": 1e-3}


@pytest.mark.parametrize("rule", ["fixed", "otm", "mean"])
def test_a_whole_run_is_the_same_for_any_shards(tmp_path, rule):
    raw, target = vectors(60), vectors(8, 1)
    goal = write(tmp_path / "t.jsonl", target, "t")
    found = []
    for i, cuts in enumerate([[], [1, 30, 59]]):
        out = tmp_path / f"out{i}"
        summary = tarot.select(shards(tmp_path / str(i), raw, cuts), goal, out, rows=11, rule=rule, folds=3, memory=1, **OPTIONS)
        found.append(ids_of(out))
        assert summary["rows_out"] == 11 and summary["w1_picked"] < summary["w1_random"]
    assert found[0] == found[1]
    x, y = slow(raw, target)
    if rule == "mean":
        assert set(found[0]) == {f"r{i}" for i in np.argsort(-(x @ y.T).mean(1))[:11]}
    if rule == "fixed":
        whole, cut = slow_layers(raw, target, np.ones(60, np.int64), 11)
        assert {f"r{i}" for i in whole} <= set(found[0]) <= {f"r{i}" for i in whole | cut}


def test_workers_and_a_token_budget(tmp_path):
    raw, target = vectors(60), vectors(8, 1)
    goal, files = write(tmp_path / "t.jsonl", target, "t"), shards(tmp_path / "r", raw, [20, 40])
    found = []
    for workers in (1, 2):
        summary = tarot.select(files, goal, tmp_path / str(workers), tokens=50, workers=workers, **OPTIONS)
        found.append(ids_of(tmp_path / str(workers)))
        assert summary["tokens"] <= 50
    assert found[0] == found[1]


def test_auto_and_repeats_reach_the_rows(tmp_path):
    from posttrain.data.shards import read_shard

    raw, target = vectors(60), vectors(8, 1)
    goal, files = write(tmp_path / "t.jsonl", target, "t"), shards(tmp_path / "r", raw, [25])
    summary = tarot.select(files, goal, tmp_path / "o", auto=True, rule="otm", folds=3, repeats=2.0, **OPTIONS)
    rows = [row for file in sorted((tmp_path / "o").glob("rows-*")) for _, row in read_shard(file)]
    assert summary["rows_out"] == len(rows) == summary["ranked_rows"]
    assert sum(row["repeat"] for row in rows) == 2 * len(rows)


def test_the_report_measures_the_pick(tmp_path):
    raw, target = vectors(60), vectors(8, 1)
    raw[3] = 0
    goal, files = write(tmp_path / "t.jsonl", target, "t"), shards(tmp_path / "r", raw, [25])
    summary = tarot.select(files, goal, tmp_path / "o", rows=12, **OPTIONS)
    import ot

    x, y = slow(np.delete(raw, 3, 0), target)
    names = [f"r{i}" for i in range(60) if i != 3]
    chosen = [names.index(name) for name in ids_of(tmp_path / "o")]
    exact = ot.emd2([], [], np.sqrt(np.maximum(0, 2 - 2 * x[chosen] @ y.T)))
    assert summary["w1_picked"] == pytest.approx(exact, abs=1e-5)
    assert summary["zero_features"] == 1 and summary["not_eligible"] == {"without features": 1} and summary["fitted_rows"] == 67
    values = np.linalg.eigvalsh(np.cov(np.concatenate([np.delete(raw, 3, 0), target]).T.astype(np.float64), bias=True))
    assert summary["effective_rank"] == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-6)


def test_features_are_made_once(tmp_path, monkeypatch):
    from data_pipelines import features

    raw, target = vectors(40), vectors(5, 1)
    goal, files = write(tmp_path / "t.jsonl", target, "t"), shards(tmp_path / "r", raw, [10, 20])
    seen: list[str] = []
    plain = features.ColumnFeatures.__call__

    def counted(self: Any, rows: Any) -> np.ndarray:
        seen.extend(row["id"] for row in rows)
        if len(seen) == 25:
            raise RuntimeError("killed")
        return plain(self, rows)

    monkeypatch.setattr(features.ColumnFeatures, "__call__", counted)
    with pytest.raises(RuntimeError, match="killed"):
        tarot.select(files, goal, tmp_path / "o", rows=6, **OPTIONS)
    assert len(seen) == 25
    tarot.select(files, goal, tmp_path / "o", rows=6, **OPTIONS)
    assert len(seen) == 25 + 10 + 20 and len(set(seen)) == 45


def tiny_model(folder: Path, texts: list[str], seed: int = 0) -> Path:
    from posttrain.models.create import new_model, train_tokenizer
    from posttrain.models.save import save_model

    tokenizer = train_tokenizer(texts, 300, 128)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    save_model(new_model("qwen2", tokenizer, seed, **sizes), tokenizer, folder)
    return folder


def topical(folder: Path) -> tuple[list[str], list[Path], Path]:
    """Texts, 16 of them on the target's topic; their shards; and the target."""
    topics = [[f"the river {w} under bridge {i}" for i in range(8)] for w in ("runs", "turns")]
    other = [f"def f{i}(x): return x[{i}] + {{}}" for i in range(24)]
    texts = [text for pair in topics for text in pair] + other
    lines = [json.dumps({"id": f"{i}", "text": text}) for i, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("\n".join(lines[:17]))
    (folder / "b.jsonl").write_text("\n".join(lines[17:]))
    (folder / "t.jsonl").write_text("\n".join(json.dumps({"text": f"a river runs under the bridge {i}"}) for i in range(20, 26)))
    return texts, [folder / "a.jsonl", folder / "b.jsonl"], folder / "t.jsonl"


def test_gradients_of_a_model_end_to_end(tmp_path):
    texts, raw, _ = topical(tmp_path)
    tiny_model(tmp_path / "m", texts)
    features = {"params": "last_layer", "dim": 32}
    summary = tarot.select(raw, tmp_path / "t.jsonl", tmp_path / "o", rows=8, features=features, whiten_eps=1.0, model=tmp_path / "m")
    picked = [int(i) for i in ids_of(tmp_path / "o")]
    assert summary["dimensions"] == 32 and sum(i < 16 for i in picked) >= 5
    again = tarot.select(
        raw[::-1], tmp_path / "t.jsonl", tmp_path / "p", rows=8, features=features, whiten_eps=1.0, model=str(tmp_path / "m")
    )
    assert sorted(ids_of(tmp_path / "p")) == sorted(ids_of(tmp_path / "o")) and again["w1_picked"] == pytest.approx(summary["w1_picked"])


LAST = {"params": "last_layer", "dim": 24}


def kept_vectors(folder: Path) -> np.ndarray:
    return np.concatenate([np.load(file) for file in sorted(folder.glob("features-*/raw/*.npy"))])


def test_checkpoints_given_as_a_list_are_averaged(tmp_path):
    """From Python, and on the command line."""
    from posttrain.cli import main

    texts, raw, target = topical(tmp_path)
    models = [tiny_model(tmp_path / f"m{seed}", texts, seed) for seed in (0, 1)]
    kept = {}
    for name, model in (("first", models[0]), ("second", models[1:]), ("both", models)):
        cache = tmp_path / f"cache-{name}"
        tarot.select(raw, target, tmp_path / name, rows=6, features=LAST, model=model, feature_cache=str(cache))
        kept[name] = kept_vectors(cache)
    np.testing.assert_allclose(kept["both"], (kept["first"].astype(float) + kept["second"]) / 2, atol=1e-6 * np.abs(kept["both"]).max())
    assert np.abs(kept["first"] - kept["second"]).max() > 0.1 * np.abs(kept["first"]).max()
    listed = f"model=[{models[0]},{models[1]}]"
    fields = ["rows=6", "features.params=last_layer", "features.dim=24", f"out={tmp_path / 'line'}", "--runs", str(tmp_path / "runs")]
    assert main(["select", "tarot", f"raw={tmp_path}/[ab].jsonl", f"target={target}", listed, *fields, "--quiet"]) == 0
    assert ids_of(tmp_path / "line") == ids_of(tmp_path / "both")


def test_an_embedder_may_be_a_folder_and_notes_reach_the_summary(tmp_path):
    """From Python, and on the command line."""
    from posttrain.cli import main
    from posttrain.models.encoder import load_encoder

    _, raw, target = topical(tmp_path)
    loaded = load_encoder()
    loaded.model.save_pretrained(tmp_path / "encoder")
    loaded.tokenizer.save_pretrained(tmp_path / "encoder")
    raw[1].write_text(raw[1].read_text() + "\n" + json.dumps({"id": "empty", "text": " "}))
    features = {"from": "embedder", "max_length": 8}
    summary = tarot.select(raw, target, tmp_path / "o", rows=8, features=features, embedder=tmp_path / "encoder")
    packaged = tarot.select(raw, target, tmp_path / "p", rows=8, features=features)
    assert ids_of(tmp_path / "o") == ids_of(tmp_path / "p")
    notes = summary["feature_notes"]
    assert notes == packaged["feature_notes"] and notes["without text"] == 1 and notes["cut at max_length"] >= 20
    selection = json.loads((tmp_path / "o" / "selection.json").read_text())
    assert selection["features"]["notes"] == notes and summary["dimensions"] == loaded.dim
    fields = ["rows=8", "features.from=embedder", "features.max_length=8", f"embedder={tmp_path / 'encoder'}", f"out={tmp_path / 'line'}"]
    assert (
        main(["select", "tarot", f"raw={tmp_path}/[ab].jsonl", f"target={target}", *fields, "--runs", str(tmp_path / "r"), "--quiet"]) == 0
    )
    assert ids_of(tmp_path / "line") == ids_of(tmp_path / "o")


def test_models_where_there_is_no_port_for_them_are_refused(tmp_path):
    from data_pipelines.door import select_files

    raw, target = write(tmp_path / "r.jsonl", vectors(5), "r"), write(tmp_path / "t.jsonl", vectors(2), "t")
    with pytest.raises(ConfigError, match="no port `model`"):
        select_files("select.dsir", raw, target, tmp_path / "o", rows=2, model=tmp_path)
    for folder in ("m1", "m2"):
        tiny_model(tmp_path / folder, ["a river", "a bridge"])
    with pytest.raises(ConfigError, match="takes one model, got 2"):
        select_files("select.embed", raw, target, tmp_path / "o", rows=2, model=[tmp_path / "m1", tmp_path / "m2"])


def test_the_summary_says_what_the_whitening_did(tmp_path):
    raw, target = vectors(60), vectors(8, 1)
    goal, files = write(tmp_path / "t.jsonl", target, "t"), shards(tmp_path / "r", raw, [25])
    summary = tarot.select(files, goal, tmp_path / "o", rows=12, **OPTIONS)
    values = np.linalg.eigvalsh(np.cov(np.concatenate([raw, target]).T.astype(np.float64), bias=True))
    ridge = 1e-3 * values.mean()
    assert summary["dimensions"] == 6 and summary["ridge"] == pytest.approx(ridge, rel=1e-6)
    assert summary["degrees_of_freedom"] == pytest.approx((values / (values + ridge)).sum(), rel=1e-5)
    plain = tarot.select(files, goal, tmp_path / "p", rows=12, whiten=False, features=OPTIONS["features"])
    assert "ridge" not in plain and "degrees_of_freedom" not in plain


def test_the_published_features_are_the_transposed_product():
    """x L^-1, as the authors' code has it; ours x L^-T is white."""
    raw, target = vectors(60), vectors(5, 1)
    ours, theirs = (fitted(raw, target, config(as_published=value))["whitener"] for value in (False, True))
    np.testing.assert_array_equal(theirs, ours.T)
    assert np.abs(ours - theirs).max() > 0.1
