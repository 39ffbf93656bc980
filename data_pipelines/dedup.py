"""Duplicates out: equal texts, near copies by MinHash, and rows that hold a text of an evaluation set.

Run it before selecting, or the best score is picked in ten copies; and with `against`, so that no row leaks a target or
an evaluation set. Three rules, each of which can be off:

    exact          equal texts: byte for byte (`raw`), or in NFC, lower case and with white space as one space (`normalised`)
    minhash        near copies: candidates share a band of MinHash signatures of word 5-grams (Broder 1997; the parameters
                   are those of FineWeb), and a candidate counts only if its true Jaccard similarity is >= `verify`
    contamination  rows that hold `share` of the distinct word 13-grams of an `against` row (after Brown et al. 2020)

Which row stays is decided by what the rows are: of a cluster, the one of the source listed first; of those the longest;
of those the one with the smallest id (then by its text). So shards, their order, workers and restarts change nothing.
Rows are compared by `row_text`, with the rejected answer of preference rows added: roles, sources and other columns do
not count. A row without a word is no near copy of anything; rows without any text are exact copies of each other.

Rows of `against` are read whole, held-out parts included, compared with and never written. A row that is like one of
them is dropped for it, whatever other copies of it there are; being like a row that was dropped is no reason to go.

Large clusters: see `data_pipelines.clusters`. Every dropped row is listed in duplicates-*.parquet with the row that stands
for it: id, source, shard, row, cluster (the same number for all rows of one cluster), kept, kept_source, similarity (of
the two sets of n-grams; the share for `contamination`; 1 for exact copies; null where nothing was verified) and why.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from data_pipelines.selector import ROW_TYPES, Engine
from posttrain.config.base import REPORT_ONLY, Positive, Strict
from posttrain.config.common import StageConfig
from posttrain.core.registry import data_port, stage

if TYPE_CHECKING:
    from data_pipelines.door import Inputs
    from posttrain.core.context import StageContext
    from posttrain.core.events import Events


class MinHashConfig(Strict):
    """Near copies."""

    ngram: Positive = 5
    """Words (or characters) of an n-gram; a shorter text is one n-gram as a whole."""
    unit: Literal["words", "chars"] = "words"
    """`chars` for text without spaces between words (Chinese, Japanese, Thai); 24 is a usual `ngram` for Latin text then."""
    bands: Positive = 14
    """Bands of the signature; two rows are candidates if they share one."""
    rows: Positive = 8
    """Signatures a band. Rows of similarity s are candidates with probability 1 - (1 - s^rows)^bands."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Of the hash functions."""
    verify: Annotated[float, Field(gt=0, le=1)] | None = 0.7
    """Least true Jaccard similarity of two rows' n-grams; null: sharing a band is enough, and no similarity is worked out."""
    max_cluster: Annotated[int, Field(ge=1, lt=2**31)] = 10_000
    """Candidate clusters with more rows are not joined by way of others: each dropped row is similar enough to a kept one.
    1: that holds for every cluster."""


class ContaminationConfig(Strict):
    """Rows that hold a text of `against`."""

    ngram: Positive = 13
    """Words of an n-gram."""
    unit: Literal["words", "chars"] = "words"
    """`words`: runs of letters and digits, lower-cased, punctuation left out; `chars`: characters."""
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of an `against` row's distinct n-grams from which a row is dropped; 0: a single one is enough, GPT-3's rule."""


class DedupConfig(StageConfig):
    """Exact and near duplicates, and decontamination."""

    exact: Literal["off", "raw", "normalised"] = "normalised"
    """Equal texts: as they are, or in NFC, lower case and with white space as one space."""
    minhash: MinHashConfig | Literal["off"] = MinHashConfig()
    """Near copies."""
    contamination: ContaminationConfig | Literal["off"] = ContaminationConfig()
    """Rows that hold a text of `against`; does nothing where that port is empty."""
    suffix: Literal[".jsonl", ".jsonl.zst", ".parquet"] = ".jsonl.zst"
    """Format of the rows that stay."""
    workers: Annotated[Positive, REPORT_ONLY] = 1
    """Processes; more do not change the result."""
    engine: Annotated[Engine, REPORT_ONLY] = Engine()
    """Who does the shards; does not change the result."""
    memory: Annotated[Positive, REPORT_ONLY] = 1024
    """MiB for sorting one band and for the sets of one group of clusters; does not change the result."""

    @model_validator(mode="after")
    def _does_something(self) -> DedupConfig:
        if self.exact == "off" and self.minhash == "off" and self.contamination == "off":
            raise ValueError("exact, minhash and contamination are all off, so nothing would be dropped")
        return self


def _row_type(cfg: DedupConfig, rows: dict[str, str]) -> str:
    return rows["data"]


@stage(
    "dedup",
    config=DedupConfig,
    inputs={"data": data_port(*ROW_TYPES), "against": data_port(*ROW_TYPES, optional=True, train=False)},
    output="dataset",
    rows=_row_type,
)
def run(cfg: DedupConfig, ctx: StageContext) -> None:
    """Signs every shard, finds clusters, verifies them, and writes the rows that stay; see `data_pipelines.dedup_passes`."""
    from data_pipelines.dedup_passes import run_dedup

    run_dedup(cfg, ctx)


def dedup(
    data: Inputs,
    out: str | Path,
    against: Inputs | None = None,
    *,
    kind: str | None = None,
    against_kind: str | None = None,
    columns: dict[str, str] | None = None,
    on_bad: str = "stop",
    events: Events | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Drops duplicates from local shards and writes the rest to a folder; the same passes as the stage.

        dedup.dedup("shards/*.jsonl.zst", "clean", against=["eval.jsonl"], minhash={"verify": 0.8}, workers=4)

    Args:
        data, against: files, folders or globs, or a dict of name -> these; of copies, that of the name listed first stays.
            Rows of `against` are compared with and never written.
        out: new folder for rows-* and duplicates-*.parquet; the work lies in `OUT.work`, so a killed call goes on.
        kind, against_kind: row types; else seen from the first row.
        columns: our field -> their column, in `data`.
        on_bad: `stop` or `skip`.
        events: takes progress and log lines.
        options: fields of DedupConfig.

    Returns:
        The summary: rows_in, rows_out, removed by reason, clusters, largest_cluster, s_curve, ...

    Raises:
        ConfigError: unknown option, or `out` is in use.
        DataError: rows that cannot be used, or none is left.
    """
    from data_pipelines.door import make_config, source_refs
    from posttrain.core.context import StageContext
    from posttrain.core.durable import disk_errors, fsync_tree
    from posttrain.core.events import Events
    from posttrain.errors import ConfigError

    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("the output folder is not empty", where=str(out), fix="name a new folder, or delete it")
    cfg = make_config("dedup", options)
    work = out.with_name(f"{out.name}.work")
    refs = {
        "data": source_refs("data", data, kind, columns or {}, on_bad),
        "against": source_refs("against", against, against_kind, {}, on_bad),
    }
    shutil.rmtree(work / "out", ignore_errors=True)
    with disk_errors(out):
        (work / "out").mkdir(parents=True)
        ctx = StageContext("dedup", "dedup", 0, refs, work / "out", work, events or Events(None))
        run(cfg, ctx)
        fsync_tree(work / "out")
        if out.exists():
            out.rmdir()
        os.replace(work / "out", out)
    shutil.rmtree(work, ignore_errors=True)
    return ctx.summary
