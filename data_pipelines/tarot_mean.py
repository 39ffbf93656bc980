"""TAROT's features, state and score under `rule: mean`: rows go by their score, so none of them need be held to rank them."""

from __future__ import annotations

from data_pipelines.tarot import feature_key, feature_maker, fit_shard, merge, report, score

__all__ = ["feature_key", "feature_maker", "fit_shard", "merge", "report", "score"]
