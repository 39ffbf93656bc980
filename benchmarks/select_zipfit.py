"""Speed of ZIP-FIT scores beside the authors' package (zip-fit 1.0.9 at gzip level 9), one process each, the same pairs.

The peer's own functions `compress` and `similarity` are called as its `rank_sequences_by_alignment` calls them, without its
pool and with a fresh cache each time; ours is `zipfit.score`, from rows to scores, with the targets' sizes made anew.

    exact        gzip 9, all pairs: equal scores (checked to 1e-12), sizes equal to the byte
    fast_lz4     lz4 over the same pairs: another ranking; `spearman` is its rank correlation to the exact scores
    fast_sample  gzip 9 over a fifth of the targets, chosen by hash; `spearman` likewise
    dictionary   one zstd dictionary of all targets, 1 - C(x | D)/C(x), beside the peer's mean over 100 targets
    cores        the exact scores by two processes beside one, wall seconds; `efficiency` = ratio / 2
"""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
import sys
import types
from typing import Any

import numpy as np
from _corpus import SIZES, build
from _harness import arguments, compare, finish, speed
from scipy.stats import spearmanr

from data_pipelines import zipfit

Row = dict[str, Any]


def config(**fields: Any) -> zipfit.ZipfitConfig:
    """A config of `select.zipfit`."""
    return zipfit.ZipfitConfig.model_validate({"name": "s", "method": "select.zipfit", "budget": {"rows": 1}, **fields})


class Ours:
    """Our scores of rows against targets."""

    def __init__(self, targets: list[Row], **fields: Any) -> None:
        self.cfg = config(**fields)
        self.state = zipfit.merge([], [[zipfit.fit_shard(targets, self.cfg, "target")]], self.cfg)
        self.codec = zipfit.open_codec(self.cfg)

    def __call__(self, rows: list[Row]) -> np.ndarray:
        from data_pipelines.codecs import Texts

        if self.cfg.measure == "ncd":
            sizes = self.codec.sizes(Texts(self.state["data"], self.state["offsets"]))
            assert (sizes == self.state["sizes"]).all()
        return zipfit.score(rows, self.state, self.cfg)["score"][:, 0]


class Peer:
    """The package's scores."""

    def __init__(self, targets: list[Row]) -> None:
        try:
            importlib.import_module("brotli")
        except ImportError:
            sys.modules["brotli"] = types.ModuleType("brotli")
        make = importlib.import_module("zip_fit").ZIPFIT
        self.model = make("source.jsonl", "target.jsonl", 1, compression_algorithm="gzip", compress_level=9)
        self.targets = [row["text"] for row in targets]

    def __call__(self, rows: list[Row]) -> np.ndarray:
        model, texts = self.model, [row["text"] for row in rows]
        model.compress_cache = {}
        source, target = [model.compress(text) for text in texts], [model.compress(text) for text in self.targets]
        pairs = [(x, t, source[i], target[j], i) for i, x in enumerate(texts) for j, t in enumerate(self.targets)]
        near: list[list[float]] = [[] for _ in texts]
        for index, value in map(model.similarity, pairs):
            near[index].append(value)
        return np.array([np.mean(values) for values in near])


_WORK: dict[str, Any] = {}


def _ready(targets: list[Row], fields: dict[str, Any]) -> None:
    _WORK["ours"] = Ours(targets, **fields)


def _part(rows: list[Row]) -> np.ndarray:
    return _WORK["ours"](rows)


def cores(rows: list[Row], targets: list[Row], fields: dict[str, Any], pairs: int) -> dict[str, Any]:
    """Two warm processes against one, each on the same slices of rows."""
    slices = [rows[i::8] for i in range(8)]
    spawn = multiprocessing.get_context("spawn")
    pools = [concurrent.futures.ProcessPoolExecutor(n, mp_context=spawn, initializer=_ready, initargs=(targets, fields)) for n in (1, 2)]
    try:
        found = [np.concatenate(list(pool.map(_part, slices))) for pool in pools]
        assert (found[0] == found[1]).all()
        one, two = (lambda pool=pool: list(pool.map(_part, slices)) for pool in pools)
        part = speed(compare(one, two, pairs=pairs), "wall")
    finally:
        for pool in pools:
            pool.shutdown()
    return {**part, "efficiency": part["ratio"] / 2}


def main() -> None:
    """Runs all parts."""
    args = arguments(__doc__ or "")
    share, count, pairs = (0.03, 25, 5) if args.quick else (0.1, 250, 20)
    corpus = build(0, {**{label: max(1, round(size * share)) for label, size in SIZES.items()}, "target": 100, "heldout": 0})
    rows, targets = corpus.raw[:count], corpus.target[:40]
    bytes_of = [float(np.mean([len(row["text"].encode()) for row in part])) for part in (rows, targets)]
    peer, exact = Peer(targets), Ours(targets, preset="zipfit-paper")
    wrong = float(np.abs(peer(rows) - exact(rows)).max())
    assert wrong < 1e-12, wrong
    reference = exact(corpus.raw)
    parts = {"exact": {**speed(compare(lambda: peer(rows), lambda: exact(rows), pairs=pairs)), "largest_difference": wrong}}
    parts["exact"]["counted"] = exact.codec.counts
    fast = {"fast_lz4": Ours(targets, preset="zipfit-head"), "fast_sample": Ours(targets, preset="zipfit-paper", max_targets=8)}
    for name, ours in fast.items():
        correlation = float(spearmanr(ours(corpus.raw), reference)[0])
        parts[name] = {**speed(compare(lambda: peer(rows), lambda ours=ours: ours(rows), pairs=pairs)), "spearman": correlation}
    few, many = corpus.raw[: max(60, count // 2)], Peer(corpus.target)
    one = Ours(corpus.target, measure="dictionary", codec="zstd", max_targets=None)
    parts["dictionary"] = speed(compare(lambda: many(few), lambda: one(few), pairs=pairs))
    parts["cores"] = cores(corpus.raw[:640], targets, {"preset": "zipfit-paper"}, pairs)
    data = {"rows": len(rows), "targets": len(targets), "row_bytes": bytes_of[0], "target_bytes": bytes_of[1], "ranked": len(corpus.raw)}
    lead = {name: parts["exact"][name] for name in ("ours", "peer", "ratio", "ci95", "control", "verdict", "clock")}
    finish("select_zipfit", {**lead, "parts": parts, "data": data, "codec": exact.codec.build}, args)


if __name__ == "__main__":
    main()
