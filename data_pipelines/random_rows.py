"""`select.random`: rows drawn uniformly without replacement, the control of every comparison.

The key of a row is noise that is a pure function of (seed, id), so the pick is the same whatever the shards, their order
and the workers, a larger budget contains the smaller one, and another seed draws independently. Every row's score is 0:
it is the log importance weight of a target that is the raw data itself.

No target is needed. One may be given, for the word-salad guard: a control that is guarded as the other selectors are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from data_pipelines.selector import ROW_TYPES, SelectorConfig
from posttrain.core.registry import data_port, stage

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from posttrain.core.context import StageContext

LOG_WEIGHTS = True


class RandomConfig(SelectorConfig):
    """Fields of `method: select.random`: those of every selector."""

    method: Literal["select.random"] = "select.random"
    """Method name."""


def fit_shard(rows: Iterable[dict[str, Any]], cfg: RandomConfig, role: str) -> dict[str, np.ndarray]:
    """Nothing; the picked rows are let through."""
    import numpy as np

    count = sum(1 for _ in rows) if role == "picked" else 0
    return {"rows": np.array([count], np.int64)}


def merge(raw: Iterable[dict[str, np.ndarray]], targets: list[Iterable[dict[str, np.ndarray]]], cfg: RandomConfig) -> dict[str, np.ndarray]:
    """`targets`, int64[1]: how many there are, which is all there is to know."""
    import numpy as np

    return {"targets": np.array([max(1, len(targets))], np.int64)}


def score(rows: list[dict[str, Any]], state: dict[str, np.ndarray], cfg: RandomConfig) -> dict[str, np.ndarray]:
    """`score` = 0 float64[n, T]."""
    import numpy as np

    return {"score": np.zeros((len(rows), int(state["targets"][0])))}


def order(columns: dict[str, np.ndarray], cfg: RandomConfig, seed: int) -> np.ndarray:
    """Noise of the row's id."""
    from data_pipelines.pick import gumbel

    return gumbel(columns["uid"], seed)


def _row_type(cfg: RandomConfig, rows: dict[str, str]) -> str:
    return rows["raw"]


@stage(
    "select.random",
    config=RandomConfig,
    inputs={"raw": data_port(*ROW_TYPES), "target": data_port(*ROW_TYPES, optional=True)},
    output="dataset",
    rows=_row_type,
)
def run(cfg: RandomConfig, ctx: StageContext) -> None:
    """Draws and writes; see `data_pipelines.passes`."""
    from data_pipelines.passes import run_selector

    run_selector(__name__, cfg, ctx)


def select(
    raw: str | Path | list[str | Path], out: str | Path, target: str | Path | list[str | Path] | None = None, **options: Any
) -> dict[str, Any]:
    """Draws rows of local shards and writes them to a folder.

        random_rows.select(raw=["shards/*.jsonl.zst"], out="picked", rows=50_000, seed=1)

    Args:
        raw, out, options: as in `dsir.select`.
        target: only for the guard.

    Returns:
        The summary: rows_in, rows_out, tokens, ...
    """
    from data_pipelines.door import select_files

    return select_files("select.random", raw, target, out, **options)
