"""The kit's selector with features and a ranking of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from selector_kit import KitConfig, merge

from data_pipelines.selector import FEATURES, Ranking, Row, Scored

__all__ = ["merge"]


class RankConfig(KitConfig):
    """Rows kept in the ranking."""

    keep: int = 30
    """Best rows."""
    stretch: float = 1.0
    """Factor of the features; the only field that they depend on."""


def feature_key(cfg: RankConfig) -> Any:
    """What the features depend on."""
    return cfg.stretch


def feature_maker(cfg: RankConfig, inputs: dict[str, list[str]]) -> Any:
    """`v` of the row, stretched; counts its calls in the file that the environment names."""
    import os

    def make(rows: list[Row]) -> np.ndarray:
        if "KIT_CALLS" in os.environ:
            with Path(os.environ["KIT_CALLS"]).open("a") as file:
                file.write(f"{len(rows)}\n")
        return np.array([row["v"] for row in rows], np.float32) * np.float32(cfg.stretch)

    return make


def fit_shard(rows: Any, cfg: RankConfig, role: str) -> dict[str, np.ndarray]:
    """`rows`, and the sum of the features."""
    held = list(rows)
    return {"rows": np.array([len(held)]), "sum": np.sum([row[FEATURES] for row in held], axis=0) if held else np.zeros(4)}


def score(rows: list[Row], state: dict[str, np.ndarray], cfg: RankConfig) -> dict[str, np.ndarray]:
    """The first number of the feature vector."""
    return {"score": np.array([row[FEATURES][0] for row in rows], np.float64)}


def rank(scored: Scored, state: dict[str, np.ndarray], cfg: RankConfig, seed: int) -> Ranking:
    """The `keep` rows whose features lie farthest along the target's mean; picked 1, 2 or 3 times."""
    mean = np.concatenate(scored.target_features()).mean(axis=0).astype(float)
    parts = [(b["shard"], b["row"], b["features"].astype(float) @ mean, b["uid"]) for b in scored.batches()]
    shard, row, key, uid = (np.concatenate(column) for column in zip(*parts, strict=True))
    best = np.lexsort((uid, -key))[: cfg.keep]
    return Ranking(shard[best], row[best], key[best], 1 + (uid[best] % np.uint64(3)).astype(np.int64), {"ranked": len(best)})
