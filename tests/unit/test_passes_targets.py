"""Separate targets and quotas: every pick equals a slow pick of the same rules, whatever the order, shards and workers."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import selector_kit as kit

from data_pipelines import pick
from posttrain.errors import ConfigError

TARGET = [{"text": "alpha beta", "id": "t"}]
NAMES = ("code", "law", "math")


@pytest.fixture
def targets(tmp_path):
    return {name: kit.write_rows(tmp_path / "targets" / f"{name}.jsonl", TARGET * (i + 1)) for i, name in enumerate(NAMES)}


def ids(rows):
    return {row["id"] for row in rows}


@pytest.mark.parametrize("unit", ["rows", "tokens", "bytes"])
@pytest.mark.parametrize("shares", [{}, {"code": 0.5, "law": 0.3, "math": 0.2}], ids=["equal", "shares"])
@pytest.mark.parametrize("seed", range(2))
def test_the_pick_goes_round_the_targets(tmp_path, targets, unit, shares, seed, monkeypatch):
    monkeypatch.setattr(pick, "SORTED_AT_ONCE", 7)
    rows = kit.corpus(150, seed)
    budget = {"rows": 40, "tokens": 230, "bytes": 1300}[unit] + seed
    cfg = kit.config(budget={unit: budget}, targets="separate", target_shares=shares)
    ctx = kit.run(tmp_path, kit.write_shards(tmp_path / "raw", rows, 3), targets, cfg)
    expected = kit.prefix(kit.round_targets(rows, list(shares.values()) or [1 / 3] * 3), budget, unit)
    assert ids(kit.chosen(tmp_path / "out")) == ids(expected)
    assert sum(ctx.summary["targets"].values()) == len(expected) == ctx.summary["rows_out"]
    assert ctx.summary["target_rows"] == [1, 2, 3]


def test_the_pick_stops_at_the_row_that_does_not_fit(tmp_path, targets):
    """`heavy` comes second and does not fit; `light` would, but only `law`, with a small share, asks for it."""
    rows = [
        {"id": "first", "text": "a b c", "s": [9.0, 8.0]},
        {"id": "heavy", "text": "a b c d", "s": [8.0, 1.0]},
        {"id": "light", "text": "a b", "s": [1.0, 9.0]},
    ]
    used = {name: targets[name] for name in ("code", "law")}
    cfg = kit.config(budget={"tokens": 5}, targets="separate", target_shares={"code": 0.98, "law": 0.02})
    kit.run(tmp_path, kit.write_shards(tmp_path / "raw", rows, 1), used, cfg)
    assert ids(kit.prefix(kit.round_targets(rows, [0.98, 0.02]), 5, "tokens")) == ids(kit.chosen(tmp_path / "out")) == {"first"}


def test_neither_order_nor_shards_nor_workers_matter(tmp_path, targets):
    rows = kit.corpus(120, 5)
    found = []
    for order, shards in zip(itertools.permutations(NAMES), (1, 3, 7, 1, 3, 7), strict=True):
        random.Random(shards).shuffle(rows)
        folder = tmp_path / "-".join(order)
        raw = kit.write_shards(folder / "raw", rows, shards)
        cfg = kit.config(targets="separate", target_shares={"law": 0.25, "math": 0.25, "code": 0.5})
        ctx = kit.run(folder, raw, {name: targets[name] for name in order}, cfg)
        found.append((ids(kit.chosen(folder / "out")), ctx.summary["targets"]))
    assert all(one == found[0] for one in found)
    assert found[0][1]["code"] >= max(found[0][1].values())


def test_each_target_has_its_column_and_the_best_is_the_score(tmp_path, targets):
    import pyarrow.parquet as pq

    rows = kit.corpus(30)
    kit.run(tmp_path, kit.write_shards(tmp_path / "raw", rows, 1), targets, kit.config(targets="separate"))
    table = pq.read_table(tmp_path / "out" / "scores-00000.parquet").to_pydict()
    for i, name in enumerate(NAMES):
        assert table[f"score.{name}"] == [row["s"][i] for row in rows]
    assert table["score"] == [max(row["s"]) for row in rows]


def test_targets_need_names_and_shares_of_their_own(tmp_path, targets):
    raw = kit.write_shards(tmp_path / "raw", kit.corpus(10), 1)
    with pytest.raises(ConfigError, match="shares are given for code, math; the targets are code, law, math"):
        kit.run(tmp_path / "a", raw, targets, kit.config(targets="separate", target_shares={"code": 0.5, "math": 0.5}))
    with pytest.raises(ConfigError, match="names of their own"):
        kit.run(tmp_path / "b", raw, {}, kit.config(targets="separate"))


def quota_pick(rows, amounts, budget, unit, others, order):
    first = {g: kit.prefix(order([row for row in rows if row["kind"] == g]), amount, unit) for g, amount in amounts.items()}
    taken = ids(row for some in first.values() for row in some)
    left = budget - sum(kit.weight_of(row, unit) for some in first.values() for row in some)
    rest = [row for row in rows if row["id"] not in taken and (others == "rest" or row["kind"] in amounts)]
    return taken | ids(kit.prefix(order(rest), left, unit))


@pytest.mark.parametrize("unit", ["rows", "tokens"])
@pytest.mark.parametrize("others", ["rest", "none"])
@pytest.mark.parametrize(
    "shares", [{"code": 0.3, "math": 0.2}, {"code": 0.29, "math": 0.7, "absent": 0.01}, {}], ids=["rest", "full", "strata"]
)
@pytest.mark.parametrize("separate", [False, True], ids=["merged", "separate"])
def test_quotas_cut_each_group_and_spend_the_rest(tmp_path, targets, unit, others, shares, separate, monkeypatch):
    monkeypatch.setattr(pick, "SORTED_AT_ONCE", 5)
    monkeypatch.setattr(pick, "GROUPS_AT_ONCE", 2)
    rows = kit.corpus(160, 2)
    budget = {"rows": 100, "tokens": 500}[unit]
    counts = Counter(row["kind"] for row in rows)
    amounts = {g: int(budget * s * 100 + 1e-6) // 100 for g, s in shares.items()} or {g: budget * n // len(rows) for g, n in counts.items()}
    cfg = kit.config(
        budget={unit: budget}, quotas={"by": "kind", "shares": shares, "others": others}, targets="separate" if separate else "merged"
    )
    used = targets if separate else {"target": targets["code"]}
    ctx = kit.run(tmp_path, kit.write_shards(tmp_path / "raw", rows, 3), used, cfg)

    def order(some):
        return kit.round_targets(some, [1 / 3] * 3) if separate else kit.by_score(some)

    found = kit.chosen(tmp_path / "out")
    assert ids(found) == quota_pick(rows, amounts, budget, unit, others, order)
    assert ctx.summary["groups"] == dict(sorted(Counter(row["kind"] for row in found).items()))
    if separate:
        assert sum(ctx.summary["targets"].values()) == len(found)


def test_quotas_by_source(tmp_path, targets):
    rows = kit.corpus(90)
    raw = {name: kit.write_rows(tmp_path / f"{name}.jsonl", rows[i::3]) for i, name in enumerate(("books", "news", "web"))}
    cfg = kit.config(budget={"rows": 30}, quotas={"shares": {"books": 0.5, "web": 0.1}, "others": "none"})
    ctx = kit.run(tmp_path, raw, {"target": targets["code"]}, cfg)
    assert "news" not in ctx.summary["groups"] and ctx.summary["groups"]["books"] >= 15
    assert sum(ctx.summary["groups"].values()) == 30
