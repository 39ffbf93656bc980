"""`classify`: gives every prompt a label in a column, e.g. `prompt_type` (`open` or `closed`), which the reward `r3` reads.

Two ways to know the label, by the port that is filled:

    examples      rows that have the column: their prompts' embeddings (port `embedder`, else the packaged all-MiniLM-L6-v2)
                  fit a logistic regression, balanced and L2-penalised; its accuracy on examples held out by fold is reported
                  beside the share of the commonest label
    classifier    a sequence-classification model in a local folder, as used by R3's authors (a fine-tuned Llama-2); `values`
                  maps its label names to what is written

All columns are kept. A row that already has a label keeps it (`overwrite: true` judges it too). The label's probability is
written to `COLUMN_probability`; below `min_probability` the label is `unsure`, by default null, which `r3` counts as `no_type`.

The rows are worked through in blocks, so a killed stage goes on where it was. The labels do not depend on the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from posttrain.config.base import Positive
from posttrain.config.common import SplitConfig, StageConfig
from posttrain.core.registry import data_port, model_port, stage
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np

    from posttrain.core.context import StageContext

Judge = Callable[[list[dict[str, Any]]], list[tuple[str, float] | None]]
"""Rows -> label and its probability, None where nothing can be said of a row."""
BLOCK = 256
LEAST = 2
"""Examples that every label needs."""
ROWS = ("prompt", "verifiable", "messages", "preference")


class Config(StageConfig):
    """Fields of the stage."""

    method: Literal["classify"] = "classify"
    """Method name."""
    column: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = "prompt_type"
    """Column that is read from the examples and written to the rows."""
    values: dict[str, str] = {}
    """Label name of the classifier -> what is written; a name that is missing is written as it is."""
    min_probability: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Least probability at which a label counts."""
    unsure: str | None = None
    """What is written below it, and where a row has no text to judge."""
    overwrite: bool = False
    """Judge rows that already have a label as well."""
    strength: Annotated[float, Field(gt=0)] = 10.0
    """C of the regression on the examples, the inverse of its L2 penalty."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Parts of the examples for the held-out accuracy."""
    batch: Positive = 16
    """Prompts in one pass of a classifier."""
    split: SplitConfig = SplitConfig()
    """Held-out shares of the rows written; give those of their source to keep its parts."""

    @field_validator("column")
    @classmethod
    def _own(cls, value: str) -> str:
        if value in ("prompt", "messages", "chosen", "rejected", "answer", "tools", "id", "source", "weight", "repeat"):
            raise ValueError(f"`{value}` has a meaning of its own; name another column")
        return value


def prompt_text(row: dict[str, Any]) -> str:
    """What is asked: the texts of the prompt's turns, joined by blank lines."""
    from posttrain.data.rows import prompt_messages

    return "\n\n".join(str(turn["content"] or "") for turn in prompt_messages(row))


def _label(row: dict[str, Any], column: str) -> str | None:
    value = row.get(column)
    return None if value is None or not str(value).strip() else str(value).strip()


def _by_examples(cfg: Config, ctx: StageContext) -> tuple[Judge, dict[str, Any]]:
    import numpy as np

    from posttrain.data.dataset import training_rows
    from posttrain.models.encoder import PACKAGED
    from posttrain.models.sentences import SentenceEmbedder

    where = f"stages.{ctx.name}.in.examples"
    rows = training_rows(ctx, "examples")
    known = [(row, label) for row in rows if (label := _label(row, cfg.column)) is not None and prompt_text(row).strip()]
    labels, counts = np.unique(np.array([label for _, label in known], dtype=object).astype(str), return_counts=True)
    if len(labels) < 2 or counts.min() < LEAST:
        found = ", ".join(f"{name}: {count}" for name, count in zip(labels, counts, strict=True)) or "none"
        raise DataError(
            f"the examples need at least two labels with {LEAST} rows each in the column `{cfg.column}`, got {found}",
            where=where,
            fix="label more rows, or set `column`",
        )
    refs = ctx.refs("embedder")
    embed = SentenceEmbedder(refs[0] if refs else PACKAGED)
    x = np.concatenate([_embedded(embed, known[at : at + BLOCK], at, len(known), ctx) for at in range(0, len(known), BLOCK)])
    y = np.searchsorted(labels, [label for _, label in known])
    model = _regression(x, y, cfg)

    def judge(block: list[dict[str, Any]]) -> list[tuple[str, float] | None]:
        texts = [prompt_text(row) for row in block]
        chance = _probabilities(model, embed(texts))
        best = chance.argmax(1)
        return [
            (str(labels[k]), float(chance[i, k])) if text.strip() else None for i, (k, text) in enumerate(zip(best, texts, strict=True))
        ]

    return judge, _held_out(x, y, counts, cfg, ctx)


def _embedded(embed: Any, block: Sequence[tuple[dict[str, Any], str]], at: int, total: int, ctx: StageContext) -> np.ndarray:
    found: np.ndarray = embed([prompt_text(row) for row, _ in block]).astype("float64")
    ctx.events.progress("embed examples", at + len(block), total, "rows")
    return found


def _regression(x: np.ndarray, y: np.ndarray, cfg: Config) -> Any:
    """One thread, so that the bits do not depend on the machine's cores."""
    try:
        from sklearn.linear_model import LogisticRegression
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise ConfigError("`classify` by examples needs scikit-learn", where="in.examples", fix="pip install 'posttrain[select]'") from None
    with threadpool_limits(1):
        return LogisticRegression(C=cfg.strength, class_weight="balanced", tol=1e-8, max_iter=10_000).fit(x, y)


def _probabilities(model: Any, x: np.ndarray) -> np.ndarray:
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        found: np.ndarray = model.predict_proba(x.astype("float64"))
    return found


def _held_out(x: np.ndarray, y: np.ndarray, counts: np.ndarray, cfg: Config, ctx: StageContext) -> dict[str, Any]:
    """Accuracy on examples that the regression did not see, stratified folds by the stage's seed."""
    from sklearn.model_selection import StratifiedKFold

    from posttrain.eval.intervals import wilson

    folds = min(cfg.folds, int(counts.min()))
    right = 0
    for seen, held in StratifiedKFold(folds, shuffle=True, random_state=ctx.seed % 2**32).split(x, y):
        model = _regression(x[seen], y[seen], cfg)
        right += int((model.classes_[_probabilities(model, x[held]).argmax(1)] == y[held]).sum())
    low, high = wilson(right / len(y), len(y))
    commonest = float(counts.max() / counts.sum())
    if low <= commonest:
        ctx.events.warn(
            f"on held-out examples the labels are right in {right / len(y):.1%} (95 % interval {low:.1%} to {high:.1%}), no surer than "
            f"always saying the commonest ({commonest:.1%}); label more examples"
        )
    accuracy = {"value": right / len(y), "low": low, "high": high, "n": len(y)}
    return {"examples": len(y), "held_out_accuracy": accuracy, "commonest_share": commonest, "folds": folds}


def _by_classifier(cfg: Config, ctx: StageContext) -> tuple[Judge, dict[str, Any]]:
    from posttrain.data.rows import prompt_messages
    from posttrain.models.classifier import load_classifier

    loaded = load_classifier(ctx.ref("classifier"), label=0)
    if len(loaded.names) < 2:
        raise ConfigError("the classifier has one label; a reward model?", where=f"stages.{ctx.name}.in.classifier", fix="name another")
    unknown = set(cfg.values) - set(loaded.names)
    if unknown:
        message = f"the classifier has no label `{min(unknown)}`; its labels: {', '.join(loaded.names)}"
        raise ConfigError(message, where=f"stages.{ctx.name}.values", fix="use these names")

    def judge(block: list[dict[str, Any]]) -> list[tuple[str, float] | None]:
        found = loaded.logits([prompt_messages(row) for row in block], cfg.batch)
        return [_likeliest(logits, loaded.names, cfg.values) if prompt_text(row).strip() else None for row, logits in _pairs(block, found)]

    return judge, {"classifier_labels": loaded.names}


def _pairs(block: list[dict[str, Any]], found: list[list[float]]) -> Iterator[tuple[dict[str, Any], list[float]]]:
    return zip(block, found, strict=True)


def _likeliest(logits: list[float], names: list[str], values: dict[str, str]) -> tuple[str, float] | None:
    """The label with the largest softmax probability; of labels that are written alike, the sum. None where a logit is not finite."""
    if not all(map(math.isfinite, logits)):
        return None
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    sums: dict[str, float] = {}
    for name, weight in zip(names, weights, strict=True):
        written = values.get(name, name)
        sums[written] = sums.get(written, 0.0) + weight / sum(weights)
    return max(sums.items(), key=lambda item: item[1])


def _labelled(block: list[dict[str, Any]], judge: Judge, cfg: Config) -> list[dict[str, Any]]:
    given = [None if cfg.overwrite else _label(row, cfg.column) for row in block]
    asked = [row for row, label in zip(block, given, strict=True) if label is None]
    answers = iter(judge(asked) if asked else [])
    out = []
    for row, label in zip(block, given, strict=True):
        if label is not None:
            out.append(row)
            continue
        found = next(answers)
        sure = found is not None and found[1] >= cfg.min_probability
        value = found[0] if found is not None and sure else cfg.unsure
        out.append({**row, cfg.column: value, f"{cfg.column}_probability": None if found is None else found[1]})
    return out


def _row_type(cfg: Config, rows: dict[str, str]) -> str:
    return rows["data"]


@stage(
    "classify",
    config=Config,
    inputs={
        "data": data_port(*ROWS, many=False, train=False),
        "examples": data_port(*ROWS, optional=True),
        "embedder": model_port(optional=True, kinds=("model",)),
        "classifier": model_port(optional=True, kinds=("model",)),
    },
    output="dataset",
    rows=_row_type,
)
def run(cfg: Config, ctx: StageContext) -> None:
    """Judges the rows of `in.data` block by block and writes them with their labels."""
    from collections import Counter

    from posttrain.core.blocks import write_blocks
    from posttrain.data.dataset import load_rows, write_dataset
    from posttrain.data.shards import json_line, read_shard

    if bool(ctx.refs("examples")) == bool(ctx.refs("classifier")):
        message = "expected either `in.examples` (rows with the column) or `in.classifier` (a model folder)"
        raise ConfigError(message, where=f"stages.{ctx.name}.in", fix="fill one of them")
    judge, facts = (_by_examples if ctx.refs("examples") else _by_classifier)(cfg, ctx)
    ref = ctx.ref("data")
    rows = load_rows(ref, events=ctx.events)
    starts = range(0, len(rows), BLOCK)

    def lines(number: int) -> Iterator[bytes]:
        at = starts[number]
        return map(json_line, _labelled([dict(row) for row in rows[at : at + BLOCK]], judge, cfg))

    def finished(number: int) -> None:
        ctx.events.progress("classify", min(len(rows), starts[number] + BLOCK), len(rows), "rows")

    files = write_blocks(ctx.work / "blocks", len(starts), lines, finished)
    kind = str(ref.rows)
    written: Counter[str] = Counter()

    def labelled() -> Iterator[dict[str, Any]]:
        for file in files:
            for _, row in read_shard(file):
                written[str(row[cfg.column])] += 1
                yield row

    found = write_dataset(labelled(), ctx.out, kind)
    ctx.meta.update(row_type=kind, rows=found["rows"], split=cfg.split.dump())
    ctx.summary.update(rows_in=len(rows), rows_out=found["rows"], labels=dict(sorted(written.items())), **facts)
    ctx.events.log(f"{cfg.column}: " + ", ".join(f"{name} {count}" for name, count in sorted(written.items())))
