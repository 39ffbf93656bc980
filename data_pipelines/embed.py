"""`select.embed`: rows near the target rows in the space of an embedding.

Vectors come from `data_pipelines.features`: a sentence-embedding model, the pooled hidden states of a causal model, or a
column of the rows. They are brought to unit length, so that a product is a cosine. Rules:

    round_robin  RDS+ (Ivison et al. 2025, arXiv 2503.01807): round i offers each target row's i-th nearest raw row; those not yet
                 taken are taken, the nearest first. Each target row is served, also the odd one, and no dense mode takes all
    mean         the rows with the largest mean cosine to the target rows

`score` is a row's best cosine under `round_robin` (its order is the rounds', not the score's), the mean one under `mean`.

The round robin keeps as many nearest raw rows of each target row as the budget needs, found by sweeps over the feature
files with longer lists each time; 16 bytes a neighbour and 64 a raw row are held meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from data_pipelines.features import FeaturesConfig
from data_pipelines.selector import FEATURES, PORTS, Ranking, SelectorConfig
from posttrain.config.base import Positive
from posttrain.core.registry import model_port, stage
from posttrain.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from data_pipelines.selector import FeatureMaker, Scored
    from posttrain.core.context import StageContext

Row = dict[str, Any]
Arrays = dict[str, "np.ndarray"]

FIRST_LISTS = 16
"""Fewest neighbours of a target row in the first sweep."""
QUOTA_LISTS = 2000
"""Neighbours of a target row under quotas, where the budget does not say how many are needed."""


class EmbedConfig(SelectorConfig):
    """Fields of `method: select.embed`, beside those of every selector."""

    method: Literal["select.embed"] = "select.embed"
    """Method name."""
    features: FeaturesConfig = FeaturesConfig.model_validate({"from": "embedder"})
    """Vectors of the rows; `from: embedder` where the block does not say."""
    rule: Literal["round_robin", "mean"] = "round_robin"
    """How rows are picked; see the module."""
    limit: Positive | None = None
    """Neighbours of each target row that take part in the round robin, the other rows following by score. None: as many as the
    budget needs; with `quotas`, 2000."""

    @model_validator(mode="before")
    @classmethod
    def _embedder(cls, given: Any) -> Any:
        block = given.get("features") if isinstance(given, dict) else None
        return {**given, "features": {"from": "embedder", **block}} if isinstance(block, dict) and "from_" not in block else given

    @model_validator(mode="after")
    def _fits(self) -> EmbedConfig:
        if self.targets == "separate":
            raise ValueError("targets: separate: the round robin goes round single target rows already; write `targets: merged`")
        if self.budget.auto:
            raise ValueError("budget.auto: this selector has no best size of its own; give rows, tokens, bytes or share")
        return self


def feature_key(cfg: EmbedConfig) -> dict[str, Any]:
    """What the vectors depend on besides the models."""
    from data_pipelines import features

    return features.feature_key(cfg.features)


def feature_maker(cfg: EmbedConfig, inputs: dict[str, list[str]]) -> FeatureMaker:
    """rows -> float32[n, d]; see `features.feature_maker`."""
    from data_pipelines import features

    return features.feature_maker(cfg.features, inputs)


def unit(vectors: np.ndarray) -> np.ndarray:
    """float64[n, d] of length 1; rows of zeros stay so."""
    import numpy as np

    wide = vectors.astype(np.float64)
    scaled: np.ndarray = wide / np.maximum(np.sqrt((wide * wide).sum(1, keepdims=True)), 1e-300)
    return scaled


def fit_shard(rows: Iterable[Row], cfg: EmbedConfig, role: str) -> Arrays:
    """`targets` float32[n, d] of unit length, of the target rows that have a vector; of other rows how many."""
    import numpy as np

    if role != "target":
        return {"rows": np.array([sum(1 for _ in rows)], np.int64)}
    found = [row[FEATURES] for row in rows]
    vectors = np.stack(found) if found else np.zeros((0, 0), np.float32)
    return {"targets": unit(vectors[vectors.any(axis=1)]).astype(np.float32)}


def merge(raw: Iterable[Arrays], targets: list[Iterable[Arrays]], cfg: EmbedConfig) -> Arrays:
    """`targets` float32[T, d] of unit length, `mean` float64[d], `rows` int64[1] of the raw data.

    Raises:
        DataError: no target row has a vector.
    """
    import numpy as np

    parts = [part["targets"] for target in targets for part in target if len(part["targets"])]
    if not parts:
        raise DataError("no target row has a vector", fix="give target rows with text")
    goal = np.concatenate(parts)
    return {"targets": goal, "mean": goal.astype(np.float64).mean(0), "rows": np.array([sum(int(part["rows"][0]) for part in raw)])}


def score(rows: list[Row], state: Arrays, cfg: EmbedConfig) -> Arrays:
    """`score` float64[n]: the best cosine to a target row, or the mean one; a row without a vector has a `reason`."""
    import numpy as np

    if not rows:
        return {"score": np.zeros(0), "reason": np.zeros(0, "<U1")}
    vectors = np.stack([row[FEATURES] for row in rows])
    if vectors.shape[1] != len(state["mean"]):
        message = f"raw rows have {vectors.shape[1]} numbers, target rows {len(state['mean'])}"
        raise DataError(message, fix="write the vectors of both by one model")
    own = unit(vectors)
    cosine = (own * state["mean"]).sum(1) if cfg.rule == "mean" else _best(own, state["targets"])
    return {"score": cosine, "reason": np.where(vectors.any(axis=1), "", "without features")}


def _best(own: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Largest cosine of each row, float64. A product of matrices has other last bits for other shapes, so it only finds the target."""
    import numpy as np

    rough = own @ targets.T.astype(np.float64)
    nearest = np.argmax(rough >= rough.max(axis=1, keepdims=True) - 1e-12, axis=1)
    best: np.ndarray = (own * targets[nearest]).sum(1)
    return best


def rank(scored: Scored, state: Arrays, cfg: EmbedConfig, seed: int) -> Ranking:
    """Every eligible row: those of the round robin in its order, then the others by score; ties by uid."""
    import numpy as np

    columns = _columns(scored)
    best_first = np.lexsort((columns["uid"], -columns["score"]))
    facts: dict[str, Any] = {}
    if cfg.rule == "round_robin":
        taken, facts = _rounds(scored, state, columns, cfg)
        rest = np.ones(len(best_first), bool)
        rest[taken] = False
        best_first = np.concatenate([taken, best_first[rest[best_first]]])
    key = np.empty(len(best_first))
    key[best_first] = -np.arange(len(best_first), dtype=float)
    return Ranking(columns["shard"], columns["row"], key, facts=facts)


def _columns(scored: Scored) -> Arrays:
    import numpy as np

    names = ("shard", "row", "uid", "score", "words", "bytes")
    parts = [{name: batch[name] for name in names} for batch in scored.batches()]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def _rounds(scored: Scored, state: Arrays, columns: Arrays, cfg: EmbedConfig) -> tuple[np.ndarray, dict[str, Any]]:
    """Rows (places in `columns`) in the order of the round robin, at least as many as the budget takes; and facts."""
    import numpy as np

    from data_pipelines.neighbours import round_robin, top_neighbours

    rows, targets = len(columns["uid"]), state["targets"]
    by_uid = np.argsort(columns["uid"], kind="stable")
    number = np.empty(rows, np.int64)
    number[by_uid] = np.arange(rows)
    weight = {"tokens": columns["words"], "bytes": columns["bytes"]}.get(cfg.budget.unit, np.ones(rows, np.int64))[by_uid]
    amount, fixed = cfg.budget.amount(int(state["rows"][0])), cfg.limit or (QUOTA_LISTS if cfg.quotas else None)
    needed = min(rows, int(amount / max(weight.mean(), 1e-9)) + 1)
    size = min(rows, fixed or max(FIRST_LISTS, 4 * -(-needed // len(targets))))
    while True:
        ids, _ = round_robin(top_neighbours(_numbered(scored, number), targets, size))
        if fixed or size == rows or weight[ids].sum() > amount:
            return by_uid[ids], {"neighbours": size, "round_robin_rows": len(ids)}
        size = min(rows, 4 * size)


def _numbered(scored: Scored, number: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(numbers by uid int64[n], vectors float32[n, d]) of all eligible rows."""
    at = 0
    for batch in scored.batches():
        yield number[at : at + len(batch["uid"])], batch["features"]
        at += len(batch["uid"])


def _row_type(cfg: EmbedConfig, rows: dict[str, str]) -> str:
    return rows["raw"]


@stage(
    "select.embed",
    config=EmbedConfig,
    inputs={**PORTS, "model": model_port(optional=True), "embedder": model_port(optional=True)},
    output="dataset",
    rows=_row_type,
)
def run(cfg: EmbedConfig, ctx: StageContext) -> None:
    """Embeds, scores, picks and writes; see `data_pipelines.passes`."""
    from data_pipelines.passes import run_selector

    run_selector(__name__, cfg, ctx)


def select(raw: str | Path | list[str | Path], target: str | Path | list[str | Path], out: str | Path, **options: Any) -> dict[str, Any]:
    """Picks rows of local shards by embedding; arguments as in `dsir.select`, and `model` and fields of EmbedConfig.

    embed.select(raw=["shards/*.jsonl.zst"], target="target.jsonl", out="picked", rows=50_000)
    """
    from data_pipelines.door import select_files

    return select_files("select.embed", raw, target, out, **options)
