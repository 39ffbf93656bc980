"""TAROT: targeted selection by optimal transport over whitened features (Feng et al. 2025, arXiv 2412.00420).

Each row has a feature vector, by default the projected gradient of a causal model's loss on it. Vectors are centred and
whitened over the union of raw and target rows and brought to unit length (`data_pipelines.whitening`), so the distance
of two rows is d_w = sqrt(2 - 2 cos). Rules:

    fixed   round robin over the target rows: layer i holds every target's i-th nearest raw row; layers are taken whole until
            the budget cuts one, whose rows go by their dual potential in the transport to the targets: what mass there costs
    otm     the size that transport itself asks for: over K folds of the targets, neighbours of one part are added layer by
            layer while the transport distance to the other parts falls; the union of the folds is picked
    mean    the rows with the largest mean cosine to the targets, as LESS and DsDm rank them; it favours the densest mode

`score` is the mean cosine under every rule. A selection is to be judged by the distance W1 of its distribution to the target's,
which the report gives beside that of random rows: both exact, between samples of at most SAMPLE rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from data_pipelines.features import FeaturesConfig
from data_pipelines.selector import FEATURES, PORTS, SelectorConfig
from posttrain.config.base import Positive
from posttrain.core.registry import MODEL_KINDS, Port, model_port, stage

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from data_pipelines.selector import FeatureMaker, Ranking, Scored
    from posttrain.core.context import StageContext

Row = dict[str, Any]
Arrays = dict[str, "np.ndarray"]

SAMPLE = 1000
"""Rows on each side of a transport distance in the report."""
RESERVOIR = 2048
"""Raw rows kept for the report's random picks, those with the smallest hash."""
DRAWS = 5
"""Random picks that the report averages over."""
TARGET_BYTES = 512 << 20
"""Most bytes of target features that are held."""


class TarotConfig(SelectorConfig):
    """TAROT on gradient features, or on any others."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "tarot-repo": {
            "features": {"projection": "rademacher", "scale": "trak"},
            "whiten_eps": 1e-5,
            "eps_relative": False,
            "limit": 2000,
            "folds": 10,
            "folds_seed": 42,
            "last": "largest",
            "as_published": True,
        },
    }

    features: FeaturesConfig = FeaturesConfig()
    """Vectors of the rows."""
    whiten: bool = True
    """Whiten by the covariance of raw and target rows; otherwise they are only centred."""
    whiten_eps: Annotated[float, Field(ge=0)] = 1.0
    """Ridge added to the covariance. Far below 1, directions that the rows do not fill are blown up to noise, unless there are very
    many rows; far above, nothing is whitened."""
    eps_relative: bool = True
    """The ridge is times the mean variance of a coordinate, so that it means the same for every model; else as it is."""
    rule: Literal["fixed", "otm", "mean"] = "fixed"
    """How rows are picked; see the method."""
    limit: Positive | None = None
    """Most nearest raw rows of each target row that take part in `fixed` and `otm`; the authors' code has 2000. None: as many as
    the budget needs; under quotas 2000."""
    last: Literal["largest", "smallest"] = "smallest"
    """Dual potentials of the layer that is cut under `fixed` which stay. `smallest`: rows whose mass is cheap to move to the targets;
    `largest` as in the authors' code, which gave picks farther from the targets in every case measured; see `tarot_rules.fixed`."""
    folds: Annotated[int, Field(ge=2)] = 10
    """Parts of the targets under `otm`."""
    folds_seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Of the parts."""
    patience: Positive = 1
    """Layers in a row that may fail to lower the distance before a fold of `otm` ends."""
    repeats: Annotated[float, Field(ge=1)] | None = None
    """Write the column `repeat`: how often each picked row is to be seen, at least once, the rest in proportion to its dual
    potential; this is their mean."""
    as_published: bool = False
    """Whitening, transport and stopping as in the authors' code, with its departures from the paper: see `data_pipelines.tarot_rules`;
    and features are multiplied by the transpose of the whitening matrix, so that they are not white."""

    @model_validator(mode="after")
    def _fits(self) -> TarotConfig:
        if self.targets == "separate":
            raise ValueError("targets: separate: TAROT goes round single target rows already; write `targets: merged`")
        if self.budget.auto and self.rule != "otm":
            raise ValueError(f"budget.auto: only `rule: otm` finds a size, this is `{self.rule}`")
        if self.repeats is not None and (self.rule == "mean" or self.quotas is not None):
            raise ValueError("repeats: needs a transport plan; take `rule: fixed` or `otm`, without quotas")
        return self


def feature_key(cfg: TarotConfig) -> dict[str, Any]:
    """What the vectors depend on besides the models."""
    from data_pipelines import features

    return features.feature_key(cfg.features)


def feature_maker(cfg: TarotConfig, inputs: dict[str, list[str]]) -> FeatureMaker:
    """rows -> float32[n, d]; see `features.feature_maker`."""
    from data_pipelines import features

    return features.feature_maker(cfg.features, inputs)


def fit_shard(rows: Iterable[Row], cfg: TarotConfig, role: str) -> Arrays:
    """Moments of the shard's features (see `whitening.moments`), and

    Returns:
        `sample` float32[s, d] and `sample_key` float64[s]: the RESERVOIR (raw) or SAMPLE (picked) rows with the smallest hash of
        their id; for target rows `features` float32[n, d], all of them. No moments for picked rows.
    """
    import numpy as np

    from data_pipelines.whitening import moments

    if role == "target":
        found = [block for block, _ in _blocks(rows)]
        return {**moments(found), "features": np.concatenate(found) if found else np.zeros((0, 0), np.float32)}
    held = _Smallest(RESERVOIR if role == "raw" else SAMPLE)
    blocks = (block for block, keys in _blocks(rows) if held.add(block, keys))
    if role == "raw":
        return {**moments(blocks), **held.arrays()}
    count = sum(len(block) for block in blocks)
    return {"n": np.array([count]), **held.arrays()}


def _blocks(rows: Iterable[Row], size: int = 256) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(features float32[n, d], hashes float64[n]) of the rows, some at a time."""
    import numpy as np

    from posttrain.data.rows import unit_hash

    held: list[Row] = []
    for row in rows:
        held.append(row)
        if len(held) == size:
            yield np.stack([r[FEATURES] for r in held]), np.array([unit_hash("tarot-sample", r["id"]) for r in held])
            held = []
    if held:
        yield np.stack([r[FEATURES] for r in held]), np.array([unit_hash("tarot-sample", r["id"]) for r in held])


class _Smallest:
    """The rows with the smallest keys; rows that are zero throughout do not count. The same rows in any cut into shards."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._held: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, features: np.ndarray, keys: np.ndarray) -> bool:
        """Always True, so that it can stand in a generator's condition."""
        import numpy as np

        some = features.any(axis=1)
        features, keys = features[some], keys[some]
        if not len(keys):
            return True
        if self._held is not None:
            features, keys = np.concatenate([self._held[0], features]), np.concatenate([self._held[1], keys])
        order = np.lexsort((np.arange(len(keys)), keys))[: self._size]
        self._held = features[order], keys[order]
        return True

    def arrays(self) -> Arrays:
        """`sample` and `sample_key`, by key."""
        import numpy as np

        features, keys = self._held if self._held is not None else (np.zeros((0, 0), np.float32), np.zeros(0))
        return {"sample": features, "sample_key": keys}


def merge(raw: Iterable[Arrays], targets: list[Iterable[Arrays]], cfg: TarotConfig) -> Arrays:
    """The whitening and the whitened targets.

    Returns:
        `mean` float64[d], `whitener` float64[d, d] (absent without whitening),
        `targets` float32[T, d] of unit length, `target_mean` float64[d] their mean, `sample` float32[s, d] whitened raw rows,
        `figures` float64[8]: raw rows, rows fitted, raw and target rows without a feature, effective rank, d, the ridge, and the
        degrees of freedom that it leaves.

    Raises:
        DataError: raw or target rows without any feature; too many targets to hold; a covariance that cannot be factored.
    """
    import numpy as np

    from data_pipelines.whitening import added, covariance, whiten

    sample, held = _Smallest(RESERVOIR), _Held(TARGET_BYTES)
    raw_total = added(part for part in raw if sample.add(*_sample_of(part)))
    target_total = added(part for part in targets[0] if held.add(part["features"]))
    _check_rows(raw_total, target_total)
    mean, s = covariance(added([raw_total, target_total]))
    w = _whitener(s, cfg) if cfg.whiten else None
    goal = whiten(held.rows(), mean, w)
    n, zero = ([int(total[name][0]) for total in (raw_total, target_total)] for name in ("n", "zero"))
    return {
        "mean": mean,
        **({"whitener": w} if w is not None else {}),
        "targets": goal,
        "target_mean": goal.astype(np.float64).mean(0),
        "sample": whiten(sample.arrays()["sample"], mean, w),
        "figures": np.array([n[0] + zero[0], sum(n), *zero, *_spectrum(s, w, cfg)], np.float64),
    }


def _spectrum(s: np.ndarray, w: np.ndarray | None, cfg: TarotConfig) -> list[float]:
    """(sum of eigenvalues)^2 / sum of squares, d, ridge e, sum of eigenvalue/(eigenvalue + e) = d - e tr (S + e I)^-1."""
    import numpy as np

    trace, square, d = float(np.trace(s)), float((s * s).sum()), len(s)
    rank, ridge = trace * trace / square if square else 0.0, cfg.whiten_eps * (trace / d if cfg.eps_relative else 1.0)
    if w is None:
        return [rank, d, 0.0, d]
    return [rank, d, ridge, d - ridge * float((w * w).sum())]


def _sample_of(part: Arrays) -> tuple[np.ndarray, np.ndarray]:
    return part["sample"], part["sample_key"]


class _Held:
    """Target features of all shards, without those that are zero."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._parts: list[np.ndarray] = []

    def add(self, features: np.ndarray) -> bool:
        """Always True; raises DataError beyond the limit."""
        from posttrain.errors import DataError

        some = features[features.any(axis=1)]
        self._bytes += some.nbytes
        if self._bytes > self._limit:
            most = self._limit // (4 * some.shape[1])
            raise DataError(
                f"more than {most} target rows of {some.shape[1]} numbers", fix="take a sample of the target, or a smaller `dim`"
            )
        if len(some):
            self._parts.append(some)
        return True

    def rows(self) -> np.ndarray:
        """float32[T, d]."""
        import numpy as np

        return np.concatenate(self._parts)


def _check_rows(raw: Arrays, target: Arrays) -> None:
    from posttrain.errors import DataError

    for role, total in (("raw", raw), ("target", target)):
        if not total["n"][0]:
            lost = f"; {total['zero'][0]} have none" if total["zero"][0] else ""
            fix = "give rows with text to learn from; prompts without answers carry loss only under `features.loss_on: all`"
            raise DataError(f"no {role} row has a feature{lost}", fix=fix)
    if raw["sum"].shape != target["sum"].shape:
        message = f"raw rows have {len(raw['sum'])} numbers, target rows {len(target['sum'])}"
        raise DataError(message, fix="write the vectors of both by one model")


def _whitener(s: np.ndarray, cfg: TarotConfig) -> np.ndarray:
    import numpy as np

    from data_pipelines.whitening import whitener
    from posttrain.errors import DataError

    try:
        w = whitener(s, cfg.whiten_eps, cfg.eps_relative)
    except np.linalg.LinAlgError:
        message = f"the covariance of the features cannot be factored with whiten_eps {cfg.whiten_eps:g}"
        raise DataError(message, fix="raise `whiten_eps`, lower `features.dim`, or give more rows") from None
    return np.ascontiguousarray(w.T) if cfg.as_published else w


def _white(features: np.ndarray, state: Arrays) -> np.ndarray:
    from data_pipelines.whitening import whiten

    return whiten(features, state["mean"], state.get("whitener"))


def score(rows: list[Row], state: Arrays, cfg: TarotConfig) -> Arrays:
    """`score` float64: mean cosine to the targets after whitening; a row without a feature has a `reason`."""
    import numpy as np

    if not rows:
        return {"score": np.zeros(0), "reason": np.zeros(0, "<U1")}
    features = np.stack([row[FEATURES] for row in rows])
    cosine = (_white(features, state).astype(np.float64) * state["target_mean"]).sum(1)
    return {"score": cosine, "reason": np.where(features.any(axis=1), "", "without features")}


def rank(scored: Scored, state: Arrays, cfg: TarotConfig, seed: int) -> Ranking:
    """The order of `rule: fixed` or `otm`; nothing is drawn, so `seed` does not enter."""
    from data_pipelines.tarot_order import ranking

    return ranking(scored, state, cfg)


def report(state: Arrays, picked: Iterable[Arrays], cfg: TarotConfig, seed: int = 0) -> dict[str, Any]:
    """How far the pick is from the targets, and what the features are like.

    Returns:
        `w1_picked`: transport distance W1 of the picked rows to the targets under d_w, between samples of at most SAMPLE of each;
        `w1_random`: the mean of that over DRAWS samples of raw rows of the same size; `w1_ratio`, their ratio; `effective_rank` =
        (sum of eigenvalues)^2 / sum of their squares of the covariance; with whitening `ridge`, what was added to its diagonal, and
        `degrees_of_freedom`, the sum of eigenvalue/(eigenvalue + ridge): how many directions are whitened rather than damped;
        `zero_features` of raw and `zero_target_features` of target rows; `fitted_rows` and `dimensions`.
    """
    import numpy as np

    held = _Smallest(SAMPLE)
    for part in picked:
        held.add(*_sample_of(part))
    rng = np.random.default_rng(seed)
    chosen = _white(held.arrays()["sample"], state) if held.arrays()["sample_key"].size else np.zeros((0, len(state["mean"])), np.float32)
    goal = _some(state["targets"], SAMPLE, rng)
    _, n, zero, zero_target, breadth, d, ridge, freedom = state["figures"].tolist()
    facts = {"fitted_rows": int(n), "dimensions": int(d), "effective_rank": breadth}
    facts |= {"ridge": ridge, "degrees_of_freedom": freedom} if "whitener" in state else {}
    facts |= {"zero_features": int(zero), "zero_target_features": int(zero_target)}
    if not len(chosen):
        return facts
    near = _w1(chosen, goal)
    random = float(np.mean([_w1(_some(state["sample"], len(chosen), rng), goal) for _ in range(DRAWS)]))
    return {"w1_picked": near, "w1_random": random, "w1_ratio": near / random if random else 1.0, **facts}


def _w1(a: np.ndarray, b: np.ndarray) -> float:
    """Exact transport distance between unit vectors under d_w, every row weighing the same."""
    import numpy as np

    from data_pipelines.ot import transport

    cosine = a.astype(np.float64) @ b.astype(np.float64).T
    return transport(np.sqrt(np.maximum(0, 2 - 2 * cosine)), solver="exact", form="none").value


def _some(rows: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """`size` rows without replacement, or all."""
    return rows if len(rows) <= size else rows[rng.choice(len(rows), size, replace=False)]


def _row_type(cfg: TarotConfig, rows: dict[str, str]) -> str:
    return rows["raw"]


MODELS = Port(MODEL_KINDS, optional=True, many=True)


@stage(
    "select.tarot",
    config=TarotConfig,
    inputs={**PORTS, "model": MODELS, "embedder": model_port(optional=True)},
    output="dataset",
    rows=_row_type,
)
def run(cfg: TarotConfig, ctx: StageContext) -> None:
    """Makes features, fits, scores, ranks, picks and writes; see `data_pipelines.passes`."""
    import importlib.util

    from data_pipelines.passes import run_selector
    from posttrain.errors import ConfigError

    if importlib.util.find_spec("ot") is None:
        fix = "pip install 'posttrain[select]'"
        raise ConfigError("select.tarot needs POT for optimal transport", where=f"stages.{ctx.name}.method", fix=fix)
    run_selector(f"{__name__}_mean" if cfg.rule == "mean" else __name__, cfg, ctx)
    _warn(ctx)


def _warn(ctx: StageContext) -> None:
    found = ctx.summary
    if "short" in found and "ranked_rows" in found:
        ctx.events.warn(f"only {found['ranked_rows']} rows are among the nearest of a target; raise `limit`, or drop it")
    if found["fitted_rows"] < found["dimensions"]:
        ctx.events.warn(
            f"whitening: {found['fitted_rows']} rows for {found['dimensions']} coordinates; directions without variance are all ridge. "
            "Lower features.dim, or give more rows"
        )
    for role, name in (("raw", "zero_features"), ("target", "zero_target_features")):
        if found[name]:
            ctx.events.warn(f"{found[name]} {role} rows have no feature (nothing to learn from, or no text) and take no part")


def select(raw: Any, target: Any, out: str | Path, **options: Any) -> dict[str, Any]:
    """Picks rows of local shards and writes them to a folder; the same passes as the stage.

        tarot.select(raw="shards/*.jsonl.zst", target="target.jsonl", out="picked", rows=50_000, model="runs/warm/out")
        tarot.select(raw=..., target=..., out="picked", auto=True, rule="otm", features={"from": "embedder"})

    Args:
        raw, target: files, folders or globs.
        out: new folder for rows-*, scores-*.parquet, state; the work lies in `OUT.work`, so a killed call goes on.
        options: `rows`, `tokens`, `bytes`, `share` or `auto`; `model`, a folder or a list of checkpoints whose gradients are
            averaged; `embedder`, a folder; `seed`; `kind` (row type, else seen from the first row); fields of TarotConfig.

    Returns:
        The summary: rows_in, rows_out, w1_picked, w1_random, ...

    Raises:
        ConfigError: unknown option, or `out` is in use.
        DataError: rows that cannot be used.
    """
    from data_pipelines.door import select_files

    return select_files("select.tarot", raw, target, out, **options)
