"""DSIR: data selection by importance resampling on hashed n-grams (Xie et al. 2023, arXiv 2302.03169).

With x's hashed unigram and bigram counts c(x) over B buckets, bag-of-n-gram models p of the target and q of the raw
data, and epsilon = `smoothing`,

    p_b = (C_target,b + pseudo) / sum,   q_b = (C_raw,b) / sum
    log w(x) = sum_b c_b(x) [log(p_b + epsilon) - log(q_b + epsilon)]

and the pick is a Gumbel top-k of log w(x)/T: a sample without replacement with odds w(x)^(1/T). Features, weights and
the length filter are those of the authors' package; where that fits q on a prefix, here a row takes part in the fit by
the hash of its id. Reported is the paper's data metric, the KL reduction over random selection,

    KL(p || q) - KL(p || p')        in nats, p' the n-gram distribution of the picked rows, all three smoothed by epsilon.

It rewards a bag of target words in any order, so it should not be trusted alone. The weights of long rows differ by
hundreds of nats, so the effective sample size is often near 1 and sampling picks nearly the same rows as `topk`; raise
`temperature` for a real sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from data_pipelines.selector import PORTS, SelectorConfig
from posttrain.config.base import Share
from posttrain.core.registry import stage

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from posttrain.core.context import StageContext


class DsirConfig(SelectorConfig):
    """DSIR on hashed n-grams."""

    sample: Literal["gumbel", "topk"] = "gumbel"
    """`gumbel`: sample without replacement by importance; `topk`: the largest weights."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the log weights before sampling; higher is closer to uniform."""
    ngrams: Annotated[int, Field(ge=1, le=5)] = 2
    """Longest n-gram in words."""
    buckets: Annotated[int, Field(ge=16, lt=2**24)] = 10_000
    """Hash buckets."""
    hash: Literal["sha256", "fast"] = "sha256"
    """`sha256`: the published buckets; `fast`: other collisions, about twice the speed."""
    smoothing: Annotated[float, Field(gt=0, lt=1)] = 1e-8
    """Added to each bucket's probability before the logarithm."""
    target_pseudo: Annotated[float, Field(ge=0)] = 0.0
    """Added to each bucket's target count; 0.1 to 1 helps a small target, where most buckets are empty."""
    length: Literal["sum", "mean"] = "sum"
    """`sum`: the published log weight; `mean`: divided by the row's n-grams, so that long rows do not win or lose by length."""
    fit_share: Share = 1.0
    """Share of the raw rows, by hash of the id, on which q is fitted."""


def _hasher(cfg: DsirConfig) -> Any:
    from data_pipelines.ngrams import shared_hasher

    return shared_hasher(cfg.ngrams, cfg.buckets, cfg.hash)


def fit_shard(rows: Iterable[dict[str, Any]], cfg: DsirConfig, role: str) -> dict[str, np.ndarray]:
    """`counts`, int64[B]: bucket counts of the rows; of a `fit_share` of them where `role` is `raw`."""
    from posttrain.data.rows import row_text, unit_hash

    share = cfg.fit_share if role == "raw" else 1.0
    kept = rows if share == 1.0 else (row for row in rows if unit_hash("dsir-fit", row["id"]) < share)
    return {"counts": _hasher(cfg).count(row_text(row) for row in kept)}


def merge(raw: Iterable[dict[str, np.ndarray]], targets: list[Iterable[dict[str, np.ndarray]]], cfg: DsirConfig) -> dict[str, np.ndarray]:
    """`raw` and `target` int64[B], and `log_diff` float64[B] = log(p + epsilon) - log(q + epsilon).

    Raises:
        DataError: raw or target text without a single word.
    """
    import numpy as np

    from posttrain.errors import DataError

    (target,) = targets
    counts = {"raw": _total(raw, cfg), "target": _total(target, cfg)}
    for role, total in counts.items():
        if not total.any():
            raise DataError(f"the {role} rows hold no words", fix=f"give {role} rows with text")
    p, q = _probabilities(counts["target"], cfg.target_pseudo), _probabilities(counts["raw"])
    return {**counts, "log_diff": np.log(p + cfg.smoothing) - np.log(q + cfg.smoothing)}


def _total(parts: Iterable[dict[str, np.ndarray]], cfg: DsirConfig) -> np.ndarray:
    import numpy as np

    total = np.zeros(cfg.buckets, np.int64)
    for part in parts:
        total += part["counts"]
    return total


def _probabilities(counts: np.ndarray, pseudo: float = 0.0) -> np.ndarray:
    return (counts + pseudo) / (counts.sum() + pseudo * len(counts)) if counts.any() else counts.astype(float)


def score(rows: list[dict[str, Any]], state: dict[str, np.ndarray], cfg: DsirConfig) -> dict[str, np.ndarray]:
    """`score` = log w float64, `words` int64, `reason` why a row cannot be picked ("" = it can)."""
    import numpy as np

    from posttrain.data.rows import row_text

    texts = [row_text(row) for row in rows]
    weight, words, grams = _hasher(cfg).weigh(texts, state["log_diff"])
    if cfg.length == "mean":
        weight = weight / np.maximum(grams, 1)
    return {"score": weight, "words": words, "reason": np.where(words == 0, "without words", "")}


def order(columns: dict[str, np.ndarray], cfg: DsirConfig, seed: int) -> np.ndarray:
    """log w / T plus Gumbel noise of the row's id, or log w itself under `topk`."""
    from data_pipelines.pick import gumbel

    key: np.ndarray = columns["score"]
    return key if cfg.sample == "topk" else key / cfg.temperature + gumbel(columns["uid"], seed)


def report(state: dict[str, np.ndarray], picked: Iterable[dict[str, np.ndarray]], cfg: DsirConfig, seed: int = 0) -> dict[str, Any]:
    """KL divergences in nats from the target's n-grams p, and the share of buckets the target never hits.

    `kl_raw` = KL(p || q), `kl_picked` = KL(p || p'), and `kl_reduction`, their difference, as in the paper. A small pick
    leaves many buckets empty, which alone raises its divergence; so `kl_random` is that of as many n-grams drawn at
    random from q, and `kl_reduction_at_size` = kl_random - kl_picked is what the selection itself has gained.
    """
    import numpy as np

    p, q, counts = _probabilities(state["target"], cfg.target_pseudo), _probabilities(state["raw"]), _total(picked, cfg)
    drawn = np.random.default_rng(seed).multinomial(int(counts.sum()), q)

    def divergence(other: np.ndarray) -> float:
        return float(p @ (np.log(p + cfg.smoothing) - np.log(other + cfg.smoothing)))

    raw, chosen, random = divergence(q), divergence(_probabilities(counts)), divergence(_probabilities(drawn))
    return {
        "kl_reduction": raw - chosen, "kl_reduction_at_size": random - chosen, "kl_raw": raw, "kl_picked": chosen, "kl_random": random,
        "target_empty_buckets": float(np.mean(state["target"] == 0)),
    }  # fmt: skip


def _row_type(cfg: DsirConfig, rows: dict[str, str]) -> str:
    return rows["raw"]


@stage(
    "select.dsir",
    config=DsirConfig,
    inputs=PORTS,
    output="dataset",
    rows=_row_type,
)
def run(cfg: DsirConfig, ctx: StageContext) -> None:
    """Fits, scores, picks and writes; see `data_pipelines.passes`."""
    from data_pipelines.passes import run_selector

    run_selector(__name__, cfg, ctx)


def select(raw: str | Path | list[str | Path], target: str | Path | list[str | Path], out: str | Path, **options: Any) -> dict[str, Any]:
    """Picks rows of local shards and writes them to a folder; the same passes as the stage.

        dsir.select(raw=["shards/*.jsonl.zst"], target="target.jsonl", out="picked", rows=50_000)

    Args:
        raw, target: files, folders or globs.
        out: new folder for rows-*, scores-*.parquet, state; the work lies in `OUT.work`, so a killed call goes on.
        options: `rows`, `tokens`, `bytes` or `share`; `seed`; `kind` (row type, else seen from the first row); fields of DsirConfig.

    Returns:
        The summary: rows_in, rows_out, tokens, kl_reduction, ...

    Raises:
        ConfigError: unknown option, or `out` is in use.
        DataError: rows that cannot be used.
    """
    from data_pipelines.door import select_files

    return select_files("select.dsir", raw, target, out, **options)
