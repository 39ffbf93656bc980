"""`select.length`: the longest or shortest rows, or those whose length is nearest to the target's median.

Many selectors prefer rows by length without saying so; this one does nothing else, so it tells how much of another's
gain is length. Lengths are in words; rows of equal length are ordered by a hash of their id.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from data_pipelines.selector import ROW_TYPES, SelectorConfig
from posttrain.core.registry import data_port, stage
from posttrain.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from posttrain.core.context import StageContext


class LengthConfig(SelectorConfig):
    """Fields of `method: select.length`, beside those of every selector."""

    method: Literal["select.length"] = "select.length"
    """Method name."""
    rule: Literal["longest", "shortest", "target"] = "target"
    """`target`: nearest to the median number of words of the target rows."""


def _words(rows: Iterable[dict[str, Any]]) -> np.ndarray:
    from data_pipelines.ngrams import count_words
    from posttrain.data.rows import row_text

    return count_words([row_text(row) for row in rows])


def fit_shard(rows: Iterable[dict[str, Any]], cfg: LengthConfig, role: str) -> dict[str, np.ndarray]:
    """`words` int64[n] of each target row that has any, 8 bytes a row; of picked rows how many, of raw rows nothing."""
    import numpy as np

    if role != "target":
        return {"rows": np.array([sum(1 for _ in rows) if role == "picked" else 0], np.int64)}
    words = np.concatenate([np.array([], np.int64), *(_words([row]) for row in rows)])
    return {"words": words[words > 0]}


def merge(raw: Iterable[dict[str, np.ndarray]], targets: list[Iterable[dict[str, np.ndarray]]], cfg: LengthConfig) -> dict[str, np.ndarray]:
    """`median` float64[T]: median words of each target's rows; NaN where the rule needs none.

    Raises:
        ConfigError: `rule: target` without a target.
        DataError: a target without a word.
    """
    import numpy as np

    from posttrain.errors import DataError

    if cfg.rule != "target":
        return {"median": np.full(max(1, len(targets)), np.nan)}
    if not targets:
        raise _no_target()
    medians = []
    for target in targets:
        words = np.concatenate([part["words"] for part in target])
        if not len(words):
            raise DataError("the target rows hold no words", fix="give target rows with text")
        medians.append(float(np.median(words)))
    return {"median": np.array(medians)}


def _no_target() -> ConfigError:
    return ConfigError("`rule: target` needs target rows", where="in.target", fix="fill the port, or take `rule: longest` or `shortest`")


def score(rows: list[dict[str, Any]], state: dict[str, np.ndarray], cfg: LengthConfig) -> dict[str, np.ndarray]:
    """`score` float64[n, T] in words: length, minus length, or minus the distance from the median; and `words`."""
    import numpy as np

    words = _words(rows)
    length = np.repeat(words[:, None].astype(float), len(state["median"]), axis=1)
    scores = {"longest": length, "shortest": -length, "target": -np.abs(length - state["median"])}
    return {"score": scores[cfg.rule], "words": words}


def report(state: dict[str, np.ndarray], picked: Iterable[dict[str, np.ndarray]], cfg: LengthConfig) -> dict[str, Any]:
    """`target_median_words` under `rule: target`: one number, or one a target."""
    aims = state["median"].tolist()
    return {"target_median_words": aims[0] if len(aims) == 1 else aims} if cfg.rule == "target" else {}


def _row_type(cfg: LengthConfig, rows: dict[str, str]) -> str:
    if cfg.rule == "target" and "target" not in rows:
        raise _no_target()
    return rows["raw"]


@stage(
    "select.length",
    config=LengthConfig,
    inputs={"raw": data_port(*ROW_TYPES), "target": data_port(*ROW_TYPES, optional=True)},
    output="dataset",
    rows=_row_type,
)
def run(cfg: LengthConfig, ctx: StageContext) -> None:
    """Scores, picks and writes; see `data_pipelines.passes`."""
    from data_pipelines.passes import run_selector

    run_selector(__name__, cfg, ctx)


def select(
    raw: str | Path | list[str | Path], out: str | Path, target: str | Path | list[str | Path] | None = None, **options: Any
) -> dict[str, Any]:
    """Picks rows of local shards by length; arguments as in `random_rows.select`, and `rule`.

    length.select(raw="shards", out="picked", rule="longest", rows=1000)
    """
    from data_pipelines.door import select_files

    return select_files("select.length", raw, target, out, **options)
