"""ZIP-FIT within length bins: `data_pipelines.zipfit` with an order that needs all rows in view."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data_pipelines.selector import Ranking, Scored
from data_pipelines.zipfit import ZipfitConfig, fit_shard, merge, report, score

if TYPE_CHECKING:
    import numpy as np

__all__ = ["fit_shard", "merge", "rank", "report", "score"]


def rank(scored: Scored, state: dict[str, np.ndarray], cfg: ZipfitConfig, seed: int) -> Ranking:
    """The share of its bin's rows that a row leaves behind.

    Bins are quantiles of the eligible rows' bytes; rows of one length are in one bin, so there may be fewer than asked for.
    Within a bin the order is by score, then by uid, and the i-th of n rows has the key 1 - (i + 1/2)/n: a cut at any height
    takes the same share of every bin.
    """
    import numpy as np

    names = ("shard", "row", "uid", "bytes", "score")
    parts = [[batch[name] for name in names] for batch in scored.batches()]
    shard, row, uid, size, value = (np.concatenate(column) for column in zip(*parts, strict=True))
    edges = np.quantile(size, np.linspace(0, 1, cfg.length_bins + 1)[1:-1], method="lower")
    group = np.searchsorted(np.unique(edges), size, side="right")
    order = np.lexsort((row, shard, uid, -value, group))
    count = np.bincount(group)
    first = np.cumsum(count) - count
    key = np.zeros(len(order))
    sorted_group = group[order]
    key[order] = 1 - (np.arange(len(order)) - first[sorted_group] + 0.5) / count[sorted_group]
    facts: dict[str, Any] = {"length_bins": int(np.count_nonzero(count))}
    return Ranking(shard, row, key, facts=facts)
