"""`select.combine` against a slow reference, and what it refuses."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import combine
from data_pipelines.door import source_ref
from data_pipelines.pick import row_uid
from posttrain.errors import ConfigError, DataError


def table(folder: Path, rows: list[tuple[str, float, str]], shards: int = 2) -> Path:
    """A folder as a selector leaves it: score tables beside a row (which nobody reads here)."""
    folder.mkdir(parents=True)
    (folder / "rows-00000.jsonl").write_text('{"text": "a"}\n')
    (folder / "dataset.json").write_text('{"row_type": "text"}')
    for i in range(shards):
        part = rows[i::shards]
        columns = {
            "id": pa.array([row[0] for row in part], pa.string()),
            "uid": pa.array([row_uid(row[0]) for row in part], pa.uint64()),
            "score": pa.array([row[1] for row in part], pa.float64()),
            "reason": pa.array([row[2] for row in part], pa.string()).dictionary_encode(),
        }
        pq.write_table(pa.table(columns), folder / f"scores-{i:05d}.parquet")
    return folder


def tables(tmp: Path, count: int = 60) -> tuple[list[str], dict[str, list[tuple[str, float, str]]]]:
    draw = random.Random(1)
    ids = [f"r{i}" for i in range(count)]
    made = {
        "dsir": [(i, float(draw.randint(0, 20)), "above 9 words" if draw.random() < 0.1 else "") for i in ids],
        "zipfit": [(i, draw.random(), "") for i in ids],
        "third": [(i, -(draw.random() ** 9), "salad" if draw.random() < 0.1 else "") for i in ids],
    }
    for name, rows in made.items():
        draw.shuffle(rows)
        table(tmp / name, rows)
    return ids, made


def bound(tmp: Path, names: list[str], **fields) -> combine.Bound:
    cfg = combine.CombineConfig.model_validate({"name": "c", "method": "select.combine", "budget": {"rows": 5}, **fields})
    refs = [source_ref(name, tmp / name, None, {}, "stop") for name in names]
    return combine.bind(cfg, refs, "in.scores")


def run(cfg: combine.Bound, ids: list[str], shards: int = 3) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rows = [{"id": i} for i in ids]
    state = combine.merge(iter([combine.fit_shard(rows[k::shards], cfg, "raw") for k in range(shards)]), [], cfg)
    return state, combine.score(rows, state, cfg)


def slow_rank(values: list[float], value: float) -> float:
    below, same = sum(v < value for v in values), sum(v == value for v in values)
    return (below + same / 2) / len(values)


@pytest.mark.parametrize("rule", ["rank_average", "weighted", "intersection"])
def test_scores_equal_the_slow_reference(tmp_path, rule):
    ids, made = tables(tmp_path)
    weights = {"dsir": 1.0, "zipfit": 0.25, "third": 3.0}
    fields = {"weighted": {"weights": weights}, "intersection": {"top": 0.7}}.get(rule, {})
    _, found = run(bound(tmp_path, list(made), rule=rule, **fields), ids)
    by_id = {name: {row[0]: row for row in rows} for name, rows in made.items()}
    common = [i for i in ids if all(not by_id[name][i][2] for name in made)]
    assert 30 < len(common) < 60
    columns = {name: [by_id[name][i][1] for i in common] for name in made}
    seen = 0
    for i, score, reason in zip(ids, found["score"], found["reason"], strict=True):
        left = [name for name in made if by_id[name][i][2]]
        if left:
            assert np.isnan(score) and reason == f"left out by {left[0]}"
            continue
        u = {name: slow_rank(columns[name], by_id[name][i][1]) for name in made}
        outside = [name for name in made if u[name] <= 0.3] if rule == "intersection" else []
        if outside:
            assert np.isnan(score) and reason == f"outside the top 0.7 of {outside[0]}"
            continue
        total = sum(weights.values())
        rules = {
            "rank_average": sum(u.values()) / 3,
            "weighted": sum(weights[n] * u[n] for n in u) / total,
            "intersection": min(u.values()),
        }
        assert score == pytest.approx(rules[rule], abs=1e-12) and reason == ""
        seen += 1
    assert seen > 10


def test_the_result_does_not_depend_on_shards_or_order(tmp_path):
    ids, made = tables(tmp_path)
    cfg = bound(tmp_path, list(made))
    one, many = run(cfg, ids, 1)[0], run(cfg, ids[::-1], 7)[0]
    assert all(np.array_equal(one[name], many[name], equal_nan=True) for name in ("uid", "score", "why"))


def test_spearman_of_selectors_that_agree_and_oppose(tmp_path):
    ids = [f"r{i}" for i in range(30)]
    for name, sign in (("a", 1), ("b", 1), ("c", -1), ("flat", 0)):
        table(tmp_path / name, [(i, float(sign * n), "") for n, i in enumerate(ids)])
    state, _ = run(cfg := bound(tmp_path, ["a", "b", "c", "flat"]), ids)
    assert combine.report(state, [], cfg) == pytest.approx({"spearman_a_b": 1, "spearman_a_c": -1, "spearman_b_c": -1})


def test_missing_rows_are_refused_or_counted(tmp_path):
    ids, made = tables(tmp_path, 20)
    table(tmp_path / "short", made["zipfit"][:15])
    gone = {row[0] for row in made["zipfit"][15:]}
    with pytest.raises(DataError, match="5 of 20 raw rows have no score by `short`"):
        run(bound(tmp_path, ["zipfit", "short"]), ids)
    _, found = run(bound(tmp_path, ["zipfit", "short"], missing="exclude"), ids)
    assert {i for i, reason in zip(ids, found["reason"], strict=True) if reason == "no score by short"} == gone
    assert np.isfinite(found["score"]).sum() == 15
    _, found = run(bound(tmp_path, ["zipfit"]), ids[:8])
    assert sorted(found["score"]) == pytest.approx([(k + 0.5) / 8 for k in range(8)])


def test_one_id_twice(tmp_path):
    same = table(tmp_path / "same", [("a", 1.0, ""), ("a", 1.0, ""), ("b", 2.0, "")])
    other = table(tmp_path / "other", [("a", 1.0, ""), ("a", 3.0, ""), ("b", 2.0, "")])
    files = sorted(map(str, same.glob("scores-*")))
    assert combine.read_scores(files, "score", "same").score.tolist() in ([1.0, 2.0], [2.0, 1.0])
    with pytest.raises(DataError, match="1 ids have several scores by `other`"):
        combine.read_scores(sorted(map(str, other.glob("scores-*"))), "score", "other")


def test_end_to_end_over_two_selectors(tmp_path):
    from data_pipelines import dsir, length
    from posttrain.data.shards import read_shard

    draw = random.Random(3)
    words = ["alpha", "beta", "gamma", "delta", "river", "stone"]
    for i in range(3):
        lines = [json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(2, 14)))}) for _ in range(30)]
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / f"s{i}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "t.jsonl").write_text('{"text": "river stone river stone alpha river"}\n')
    raw, target = tmp_path / "raw", tmp_path / "t.jsonl"
    dsir.select(raw, target, tmp_path / "a", rows=5, buckets=256, filters={"min_words": 4})
    length.select(raw, tmp_path / "b", rule="longest", rows=5)
    folders = {"dsir": tmp_path / "a", "length": tmp_path / "b"}
    summary = combine.select(raw, folders, tmp_path / "o", rows=12)
    every = combine.select(raw, folders, tmp_path / "all", rows=1000)
    picked = {row["id"]: row["score"] for file in sorted((tmp_path / "o").glob("rows-*")) for _, row in read_shard(file)}
    scores = {name: combine.read_scores(sorted(map(str, folder.glob("scores-*"))), "score", name) for name, folder in folders.items()}
    both = {uid for uid, ok in zip(scores["dsir"].uid.tolist(), scores["dsir"].eligible, strict=True) if ok}
    columns = {
        name: {u: v for u, v in zip(table.uid.tolist(), table.score.tolist(), strict=True) if u in both} for name, table in scores.items()
    }
    mean = {u: statistics.fmean(slow_rank(list(column.values()), column[u]) for column in columns.values()) for u in both}
    best = sorted(both, key=lambda u: (-mean[u], u))[:12]
    assert {row_uid(i) for i in picked} == set(best) and summary["rows_out"] == 12
    assert all(score == pytest.approx(mean[row_uid(i)], abs=1e-12) for i, score in picked.items())
    assert -1 <= summary["spearman_dsir_length"] <= 1
    assert every["rows_out"] == len(both) < 90 and every["not_eligible"] == {"left out by dsir": 90 - len(both)}


def test_what_is_refused(tmp_path):
    ids, _ = tables(tmp_path, 10)
    with pytest.raises(ValueError, match="needed by `rule: weighted`"):
        bound(tmp_path, ["dsir"], rule="weighted")
    with pytest.raises(ConfigError, match="weights are given for dsir; the inputs are dsir, zipfit"):
        bound(tmp_path, ["dsir", "zipfit"], rule="weighted", weights={"dsir": 1.0})
    with pytest.raises(ConfigError, match="no column `logit`"):
        run(bound(tmp_path, ["dsir"], column="logit"), ids)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ConfigError, match="`bare` has no score tables"):
        bound(tmp_path, ["bare"])
    with pytest.raises(DataError, match="no row is in the top 0.05 of every selector"):
        run(bound(tmp_path, ["dsir", "zipfit", "third"], rule="intersection", top=0.05), ids)
    table(tmp_path / "none", [(i, 1.0, "salad") for i in ids])
    with pytest.raises(DataError, match="no raw row is allowed by all of dsir, none"):
        run(bound(tmp_path, ["dsir", "none"]), ids)
