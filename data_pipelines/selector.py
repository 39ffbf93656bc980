"""What every selector shares: its config's common fields, and the functions its module defines.

A selector is one file: a Config that inherits `SelectorConfig`, a `run` declared by `@stage`, and the functions of
`Selector`. It sees rows and arrays, never shards, files or processes; `data_pipelines.passes` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field, model_validator

from data_pipelines.budget import Budget, Quota
from posttrain.config.base import REPORT_ONLY, PathStr, Positive, Share, Strict
from posttrain.config.common import StageConfig
from posttrain.core.registry import data_port

if TYPE_CHECKING:
    import numpy as np

Row = dict[str, Any]
Arrays = dict[str, "np.ndarray"]

ROW_TYPES = ("text", "prompt", "messages", "preference", "verifiable")
PORTS = {"raw": data_port(*ROW_TYPES), "target": data_port(*ROW_TYPES)}

FEATURES = "__features__"
"""Key under which a row carries its feature vector (float32[d]) where the module defines `feature_maker`; never written."""


class Filters(Strict):
    """Rows that are never picked, whatever their score. Every default lets a row through."""

    min_words: Annotated[int, Field(ge=0)] = 0
    """Fewer words than this; DSIR's package uses 100."""
    max_words: Positive | None = None
    """More words than this; DSIR's paper uses 500."""
    quality: Literal["off", "dsir-paper"] = "off"
    """`dsir-paper`: 40 < words < 500, 0.02 < most frequent word's share < 0.2, 0.3 < informative share < 0.7, share of words
    that are not one digit > 0.8 (Xie et al. 2023, appendix)."""
    repetition: Literal["off", "gopher"] = "off"
    """`gopher`: the repetition rules of Rae et al. 2021 (arXiv 2112.11446), table A1."""


class Guard(Strict):
    """A second signal that no bag of words can fool."""

    salad: bool = False
    """Leave out rows whose adjacent words go together no better than words in random order: mean PMI below mu + 4 sigma of
    target rows with their words shuffled."""
    quantile: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    """Where this quantile of the target rows is lower, it is the limit, so that no target loses its own rows."""
    min_pairs: Positive = 16
    """Rows with fewer adjacent word pairs are not judged."""


class Chunks(Strict):
    """Cut rows of `text` into chunks that are scored and picked by themselves."""

    words: Positive = 128
    """Words a chunk; the last chunk of a row may be shorter. Ids become `ID#0`, `ID#1`, ..."""


class Engine(Strict):
    """Who does the shards of each pass; the result is the same."""

    with_: Literal["pool", "datatrove-local", "datatrove-slurm", "datatrove-ray"] = Field(default="pool", alias="with")
    """`pool`: `workers` processes of this machine; the others are datatrove's executors (`pip install 'posttrain[datatrove]'`)."""
    tasks: Positive = 1
    """datatrove tasks; task i does the shards i, i + tasks, ..."""
    options: dict[str, Any] = {}
    """Arguments of the datatrove executor, e.g. `{partition: cpu, time: "04:00:00"}` for Slurm."""
    poll_s: Annotated[float, Field(gt=0)] = 5.0
    """Seconds between looks for finished parts of tasks that run elsewhere."""
    stall_s: Annotated[float, Field(gt=0)] = 86_400.0
    """Seconds without a newly finished part of such tasks after which the run is given up."""


class SelectorConfig(StageConfig):
    """Fields every selector has."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    """Preset name -> values of fields; what is written in the file wins over the preset."""

    preset: str | None = None
    """Named set of values, e.g. those of a published version; `default` or none: ours."""
    budget: Budget
    """How much to pick: one of rows, tokens, bytes, share."""
    quotas: Quota | None = None
    """Shares of the budget by source or by a column of the rows."""
    targets: Literal["merged", "separate"] = "merged"
    """`merged`: all inputs of the port `target` are one target; `separate`: each is scored by itself, and the pick goes round
    the targets by `target_shares`, whichever order they are written in."""
    target_shares: dict[str, Share] = {}
    """Target name -> share of the pick under `targets: separate`; equal by default, must sum to 1."""
    filters: Filters = Filters()
    """Rows that are never picked."""
    guard: Guard = Guard()
    """Word-salad guard."""
    chunks: Chunks | None = None
    """Select chunks of rows instead of rows."""
    score_as: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")] = "score"
    """Column of the picked rows that takes the score; a column of this name that is there before is kept as `NAME_before`."""
    suffix: Literal[".jsonl", ".jsonl.zst", ".parquet"] = ".jsonl.zst"
    """Format of the picked rows."""
    workers: Annotated[Positive, REPORT_ONLY] = 1
    """Processes; more do not change the result."""
    feature_cache: Annotated[PathStr | None, REPORT_ONLY] = None
    """Folder in which feature files are kept for other runs of the same rows, for selectors that have features; none: the
    stage's own work, which another budget, rule or seed does not share."""
    engine: Annotated[Engine, REPORT_ONLY] = Engine()
    """Who does the shards; does not change the result."""
    memory: Annotated[Positive, REPORT_ONLY] = 256
    """MiB of rows and scores held at a time in each process, beside the selector's own state; does not change the result."""

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("preset") in (None, "default"):
            return given
        known = cls.PRESETS
        if given["preset"] not in known:
            raise ValueError(f"preset: unknown `{given['preset']}`; known: {', '.join(['default', *known])}")
        return _under(known[given["preset"]], given)

    @model_validator(mode="after")
    def _shares_sum(self) -> SelectorConfig:
        if self.target_shares and self.targets != "separate":
            raise ValueError("target_shares: only with `targets: separate`")
        if self.target_shares and abs(sum(self.target_shares.values()) - 1) > 1e-9:
            raise ValueError(f"target_shares: sum to {sum(self.target_shares.values()):g}, must be 1")
        return self


def _under(preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` over `preset`, block by block."""
    merged = dict(preset)
    for name, value in given.items():
        below = merged.get(name)
        merged[name] = _under(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


@dataclass(frozen=True)
class Ranking:
    """A total order over some of the rows, made with all of them in view.

    Args:
        shard, row: int64[k]; which rows, as `Scored.batches` names them.
        key: float64[k]; higher is picked first; ties go by the row's uid.
        repeat: int64[k] or None; how often a picked row should be seen, written as the column `repeat`.
        facts: JSON-ready, for the summary.
    """

    shard: np.ndarray
    row: np.ndarray
    key: np.ndarray
    repeat: np.ndarray | None = None
    facts: dict[str, Any] | None = None


class Scored(Protocol):
    """All eligible rows, in shard order, batch by batch; may be swept several times."""

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Columns `shard`, `row` (the row's place among the shard's scored rows or chunks), `uid`, `words`, `bytes`, the
        selector's own, and `features` float32[n, d] where it has them."""

    def target_features(self) -> list[np.ndarray]:
        """float32[n_t, d] of each target's rows (one array under `merged`), memory-mapped, in input order."""


class Selector(Protocol):
    """What a selector's module defines. Rows are normalised dicts; arrays are numpy; nothing else is shared.

    `fit_shard`, `merge` and `score` are required. A module may also define

        order(columns, cfg, seed) -> float64[n]           key of scored rows, higher first; default: the score. `columns`
                                                          adds `uid` uint64 to what `score` gave; under `separate` it is called
                                                          for each target with that target's score in `columns["score"]`
        rank(scored, state, cfg, seed) -> Ranking         an order that needs all rows at once; replaces `order`
        report(state, picked, cfg) -> dict                facts for the summary, from the statistics of the picked rows by shard;
                                                          texts under `warnings` are shown as such
        feature_maker(cfg, inputs) -> (rows -> float32[n, d])   called once a process; its vectors are kept in memory-mapped
                                                          files, one a shard, and come with the rows as `row[FEATURES]`
        feature_key(cfg) -> JSON-ready                    the part of the config that its features depend on
        LOG_WEIGHTS = True                                the score is a log importance weight: the effective sample size is reported
    """

    def fit_shard(self, rows: Iterable[Row], cfg: Any, role: str) -> Arrays:
        """One shard's sufficient statistics, in one pass over its rows; `role` is raw, target or picked."""

    def merge(
        self, raw: Iterable[dict[str, np.ndarray]], targets: list[Iterable[dict[str, np.ndarray]]], cfg: Any
    ) -> dict[str, np.ndarray]:
        """The state, from the shards' statistics in shard order (loaded one at a time); one iterable a target."""

    def score(self, rows: list[Row], state: Arrays, cfg: Any) -> Arrays:
        """Columns of a batch: `score` float64[n], or [n, T] for T separate targets; optionally `words` int64 (else counted),
        `reason` ("" = eligible), and any others. A row's figures must not depend on the rest of its batch."""


FeatureMaker = Callable[[list[Row]], "np.ndarray"]
