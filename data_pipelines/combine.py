"""`select.combine`: one pick out of the scores of several selectors over the same raw rows.

Selectors err on different rows, so rows that several of them rank high are safer than those of one. With r_i(x) the rank
of row x by selector i among the n rows that all of them allow, ties sharing their average rank, and

    u_i(x) = (r_i(x) - 1/2) / n        in (0, 1), 1 = best,

    rank_average    s(x) = mean_i u_i(x)
    weighted        s(x) = sum_i w_i u_i(x) / sum_i w_i
    intersection    s(x) = min_i u_i(x), over the rows with u_i(x) > 1 - `top` for every i

Ranks, not scores, since scores are in different units. The port `scores` takes earlier `select.*` stages, or folders that
`posttrain select ... out=` wrote; their score tables are joined to the raw rows by id (its 64-bit hash). A row that a
selector left out (its `reason`) is left out here for the same reason. A row that a table does not hold at all means that
the selector has seen other raw rows: refused by default.

Memory while merging is about 40 bytes a raw row, and 8 more a selector; 18 bytes a row in each worker.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from data_pipelines.selector import ROW_TYPES, SelectorConfig
from posttrain.config.base import REPORT_ONLY, Share
from posttrain.core.registry import Port, data_port, stage
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np

    from posttrain.core.artifact import InputRef
    from posttrain.core.context import StageContext


class CombineConfig(SelectorConfig):
    """Fields of `method: select.combine`, beside those of every selector."""

    method: Literal["select.combine"] = "select.combine"
    """Method name."""
    rule: Literal["rank_average", "weighted", "intersection"] = "rank_average"
    """How ranks become one score; see the module."""
    weights: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Name of an input under `in.scores` -> its weight, for every one of them; `rule: weighted` only."""
    top: Share = 0.5
    """Share of the rows that counts as a selector's top; `rule: intersection` only."""
    missing: Literal["refuse", "exclude"] = "refuse"
    """Raw rows that a score table does not hold: an error, or not picked and counted."""
    column: str = "score"
    """Column of the score tables."""

    @model_validator(mode="after")
    def _weights_used(self) -> CombineConfig:
        if bool(self.weights) != (self.rule == "weighted"):
            raise ValueError("weights: needed by `rule: weighted`, and by no other rule")
        return self


class Bound(CombineConfig):
    """The config with the score tables that the inputs stand for."""

    tables: Annotated[dict[str, list[str]], REPORT_ONLY]
    """Selector -> its files."""
    contents: dict[str, str]
    """Selector -> digest of its files."""


class Scores(NamedTuple):
    """One selector's rows by ascending uid, each once: uid uint64, score float64, eligible bool."""

    uid: np.ndarray
    score: np.ndarray
    eligible: np.ndarray


def read_scores(paths: list[str], column: str, name: str) -> Scores:
    """Score tables as one sorted table.

    Raises:
        ConfigError: no such column.
        DataError: one id with two scores.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    parts = []
    for path in paths:
        known = pq.read_schema(path).names
        if column not in known:
            message, fix = f"the scores of `{name}` have no column `{column}`", f"columns there: {', '.join(known)}"
            raise ConfigError(message, where="column", fix=fix)
        for batch in pq.ParquetFile(path).iter_batches(columns=["uid", column, "reason"]):
            allowed = pc.equal(batch.column("reason").cast(pa.string()), "").to_numpy(zero_copy_only=False)
            parts.append((batch.column("uid").to_numpy(), batch.column(column).to_numpy(zero_copy_only=False), allowed))
    uid, score, eligible = (np.concatenate(column) for column in zip(*parts, strict=True)) if parts else (np.array([], np.uint64),) * 3
    order = np.argsort(uid, kind="stable")
    uid, score, eligible = uid[order], score[order].astype(float), eligible[order].astype(bool)
    again = np.flatnonzero(uid[1:] == uid[:-1])
    differs = (score[again] != score[again + 1]) & eligible[again] | (eligible[again] != eligible[again + 1])
    if differs.any():
        message = f"{int(differs.sum())} ids have several scores by `{name}`, so its rows cannot be told apart"
        raise DataError(message, where=str(paths[0]), fix="give the raw rows ids of their own")
    once = np.r_[True, uid[1:] != uid[:-1]] if len(uid) else np.array([], bool)
    return Scores(uid[once], score[once], eligible[once])


def ranks(score: np.ndarray) -> np.ndarray:
    """u in (0, 1) of each score, highest near 1; ties share their average."""
    from scipy.stats import rankdata

    found: np.ndarray = (rankdata(score) - 0.5) / len(score)
    return found


def fit_shard(rows: Iterable[dict[str, Any]], cfg: Bound, role: str) -> dict[str, np.ndarray]:
    """`uid` uint64[n] of the rows."""
    import numpy as np

    from data_pipelines.pick import row_uid

    return {"uid": np.array([row_uid(row["id"]) for row in rows], np.uint64)}


def merge(raw: Iterable[dict[str, np.ndarray]], targets: list[Iterable[dict[str, np.ndarray]]], cfg: Bound) -> dict[str, np.ndarray]:
    """`uid` uint64[n] ascending, `score` float64[n] (NaN = not picked), `why` int16[n], see `reasons`, `spearman` float64[S, S].

    Raises:
        DataError: raw rows that a table does not hold, under `missing: refuse`; no row that all selectors allow.
    """
    import numpy as np

    uid = np.unique(np.concatenate([part["uid"] for part in raw]))
    why, columns = np.zeros(len(uid), np.int16), []
    for number, (name, paths) in enumerate(cfg.tables.items()):
        table = read_scores(paths, cfg.column, name)
        at = np.minimum(np.searchsorted(table.uid, uid), max(len(table.uid) - 1, 0))
        there = table.uid[at] == uid if len(table.uid) else np.zeros(len(uid), bool)
        _refuse_missing(int((~there).sum()), len(uid), name, cfg)
        code = np.where(there, np.where(table.eligible[at], 0, 2), 1) if len(table.uid) else np.ones(len(uid), int)
        why = np.where((why == 0) & (code > 0), 3 * number + code, why).astype(np.int16)
        columns.append(table.score[at])
    inside = why == 0
    if not inside.any():
        raise DataError(f"no raw row is allowed by all of {', '.join(cfg.tables)}", fix="loosen their filters")
    placed = np.stack([ranks(column[inside]) for column in columns])
    score = np.full(len(uid), np.nan)
    score[inside], why[inside] = _combined(placed, cfg)
    return {"uid": uid, "score": score, "why": why, "spearman": _spearman(placed)}


def _refuse_missing(missing: int, rows: int, name: str, cfg: Bound) -> None:
    if missing and cfg.missing == "refuse":
        message = f"{missing} of {rows} raw rows have no score by `{name}`"
        raise DataError(message, where="in.scores", fix="score the same raw rows, or set `missing: exclude`")


def _combined(placed: np.ndarray, cfg: Bound) -> tuple[np.ndarray, np.ndarray]:
    """Scores float64[n] (NaN = outside) and codes of `reasons`, from ranks float64[S, n]."""
    import numpy as np

    if cfg.rule != "intersection":
        weights = np.array([cfg.weights.get(name, 1.0) for name in cfg.tables])
        return weights @ placed / weights.sum(), np.zeros(placed.shape[1], np.int16)
    out = placed <= 1 - cfg.top
    if out.any(axis=0).all():
        raise DataError(f"no row is in the top {cfg.top:g} of every selector", fix="raise `top`")
    code = np.where(out.any(axis=0), 3 * out.argmax(axis=0) + 3, 0).astype(np.int16)
    return np.where(code > 0, np.nan, placed.min(axis=0)), code


def _spearman(placed: np.ndarray) -> np.ndarray:
    """Rank correlation of the selectors; NaN where one gives all rows the same score."""
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore"):
        return np.corrcoef(placed).reshape(len(placed), len(placed))


def reasons(cfg: Bound) -> list[str]:
    """Texts of the codes: 0, then three a selector."""
    kinds = ("no score by {}", "left out by {}", f"outside the top {cfg.top:g} of {{}}")
    return ["", *(kind.format(name) for name in cfg.tables for kind in kinds)]


def score(rows: list[dict[str, Any]], state: dict[str, np.ndarray], cfg: Bound) -> dict[str, np.ndarray]:
    """`score` float64[n], and `reason` of the rows that a selector left out."""
    import numpy as np

    from data_pipelines.pick import row_uid

    at = np.searchsorted(state["uid"], np.array([row_uid(row["id"]) for row in rows], np.uint64))
    return {"score": state["score"][at], "reason": np.array(reasons(cfg))[state["why"][at]]}


def report(state: dict[str, np.ndarray], picked: Iterable[dict[str, np.ndarray]], cfg: Bound) -> dict[str, Any]:
    """Spearman's rank correlation of each pair of selectors over the rows that all of them allow."""
    pairs = combinations(enumerate(cfg.tables), 2)
    found = {f"spearman_{a}_{b}": float(state["spearman"][i, j]) for (i, a), (j, b) in pairs}
    return {name: value for name, value in found.items() if value == value}


def _row_type(cfg: CombineConfig, rows: dict[str, str]) -> str:
    return rows["raw"]


def bind(cfg: CombineConfig, refs: list[InputRef], where: str) -> Bound:
    """The config with the score tables behind the references.

    Raises:
        ConfigError: an input without score tables, two of one name, or weights that do not name the inputs.
    """
    from posttrain.core.digests import file_digests
    from posttrain.core.hashing import digest_of

    tables: dict[str, list[str]] = {}
    for ref in refs:
        if ref.name in tables:
            raise ConfigError(f"two inputs are called `{ref.name}`", where=where, fix="rename one of them")
        tables[ref.name] = [str(path) for folder in _folders(ref) for path in sorted(folder.glob("scores-*.parquet"))]
        if not tables[ref.name]:
            fix = "name a `select.*` stage, or a folder that `posttrain select ... out=` wrote"
            raise ConfigError(f"`{ref.name}` has no score tables", where=where, fix=fix)
    if cfg.weights and cfg.weights.keys() != tables.keys():
        message = f"weights are given for {', '.join(cfg.weights)}; the inputs are {', '.join(tables)}"
        raise ConfigError(message, where="weights", fix="give each input a weight")
    contents = {name: digest_of(file_digests([Path(path) for path in paths])) for name, paths in tables.items()}
    return Bound.model_validate({**cfg.model_dump(by_alias=True), "tables": tables, "contents": contents})


def _folders(ref: InputRef) -> list[Path]:
    if ref.origin == "stage":
        return [ref.artifact().path]
    listed = ref.spec.get("path") or []
    return [Path(path) for path in ([listed] if isinstance(listed, str) else listed)]


@stage(
    "select.combine",
    config=CombineConfig,
    inputs={"raw": data_port(*ROW_TYPES), "scores": Port(("dataset",), rows=ROW_TYPES, many=True)},
    output="dataset",
    rows=_row_type,
)
def run(cfg: CombineConfig, ctx: StageContext) -> None:
    """Joins, ranks, picks and writes; see `data_pipelines.passes`."""
    from data_pipelines.passes import run_selector

    run_selector(__name__, bind(cfg, ctx.refs("scores"), f"stages.{ctx.name}.in.scores"), ctx)


def select(raw: str | Path | list[str | Path], scores: dict[str, str | Path], out: str | Path, **options: Any) -> dict[str, Any]:
    """Picks rows of local shards by the score tables of other selections of the same rows.

        combine.select(raw="shards", scores={"dsir": "picked-dsir", "zipfit": "picked-zipfit"}, out="picked", rows=50_000)

    Args:
        raw, out, options: as in `dsir.select`, and fields of CombineConfig.
        scores: name -> folder that a selector's `select`, or `posttrain select ... out=`, wrote.

    Returns:
        The summary: rows_in, rows_out, spearman_A_B, ...
    """
    from data_pipelines.door import select_files

    return select_files("select.combine", raw, None, out, scores=scores, **options)
