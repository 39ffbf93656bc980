"""Evaluation of a live model on the named sets of a pipeline: used by the eval stage, by trainers, and by every table.

`around` is what a stage calls before and after its work. The `before` of a stage is the `after` of the stage that made its
input, if the same rows were measured in the same way: then the recorded numbers are taken over instead of computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.config.common import DataConfig, EvalSet
from posttrain.core.artifact import InputRef
from posttrain.errors import DataError
from posttrain.eval.intervals import Value

if TYPE_CHECKING:
    from posttrain.core.context import StageContext
    from posttrain.core.events import Events

Results = dict[str, dict[str, Value]]
"""`{set: {metric: {"value", "low", "high", "n"}}}`."""

PROTOCOL = 1
GENERATED = ("accuracy", "pass@k")


@dataclass(frozen=True)
class EvalSetData:
    """A named set with its rows.

    Args:
        name: as in the YAML.
        spec: what to measure.
        ref: where the rows come from; `ref.split` says whether they may steer (`validation`) or not (`test`).
        rows: the rows.
    """

    name: str
    spec: EvalSet
    ref: InputRef
    rows: list[dict[str, Any]]


def _spec(item: dict[str, Any]) -> EvalSet:
    return EvalSet.model_validate({key: value for key, value in item.items() if key != "ref"})


def _ref(item: dict[str, Any]) -> InputRef:
    return item["ref"] if isinstance(item["ref"], InputRef) else InputRef(**item["ref"])


def take_rows(rows: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """At most `limit` rows, chosen by the hash of their key and id, in their own order."""
    from posttrain.data.rows import row_key

    if limit is None or len(rows) <= limit:
        return rows
    ranks = {i: hashlib.blake2b(f"{row_key(row)}\x1f{row['id']}".encode("utf-8", "replace")).digest() for i, row in enumerate(rows)}
    return [rows[i] for i in sorted(sorted(ranks, key=lambda i: (ranks[i], i))[:limit])]


def load_eval_sets(ctx: StageContext, names: Sequence[str] | None = None) -> list[EvalSetData]:
    """The stage's evaluation sets with their rows.

    Args:
        ctx: of the stage; `ctx.eval` names the sets.
        names: only these.

    Raises:
        DataError: a set has no rows.
    """
    from posttrain.data.dataset import load_rows

    sets = []
    for name, item in ctx.eval.get("sets", {}).items():
        if names is not None and name not in names:
            continue
        spec, ref = _spec(item), _ref(item)
        rows = take_rows(load_rows(ref), spec.rows)
        if not rows:
            raise DataError(f"no rows in {ref.label}", where=f"eval.sets.{name}", fix="raise the split's share, or use another part")
        sets.append(EvalSetData(name, spec, ref, rows))
    return sets


def validation_sets(sets: Sequence[EvalSetData]) -> list[EvalSetData]:
    """Those that may steer a run: every set but those of test rows."""
    return [item for item in sets if item.ref.split != "test"]


def evaluate(
    model: Any, tokenizer: Any, sets: Sequence[EvalSetData], *, seed: int, events: Events | None = None, batch: int = 64
) -> Results:
    """Measures a live model.

    Args:
        model: transformers or peft model; modes and gradients are left as they were.
        tokenizer: its tokenizer.
        sets: see `load_eval_sets`.
        seed: keys the noise of sampled metrics.
        events: receives progress.
        batch: sequences in one forward pass.

    Returns:
        Results. Metrics: `loss`, `perplexity`, `accuracy` (greedy), `accuracy_sampled`, `pass@k`; `unjudged` and `skipped` rows
        where there are any.
    """
    return {item.name: _evaluate_set(model, tokenizer, item, seed, events, batch) for item in sets}


def _evaluate_set(model: Any, tokenizer: Any, item: EvalSetData, seed: int, events: Events | None, batch: int) -> dict[str, Value]:
    values: dict[str, Value] = {}
    wanted = item.spec.metrics
    if {"loss", "perplexity"} & set(wanted):
        found = _losses(model, tokenizer, item, events, batch)
        values.update({name: value for name, value in found.items() if name in wanted or name == "skipped"})
    if set(GENERATED) & set(wanted):
        values.update(_accuracies(model, tokenizer, item, seed, events, batch))
    return values


def _losses(model: Any, tokenizer: Any, item: EvalSetData, events: Events | None, batch: int) -> dict[str, Value]:
    from posttrain.data.chat import encode_rows
    from posttrain.eval.loss import loss_values, row_losses
    from posttrain.rollout.stopping import end_ids

    data = DataConfig(max_length=item.spec.max_length)
    encoded, _ = encode_rows(tokenizer, item.rows, data, "skip", stop_ids=sorted(end_ids(model, tokenizer)))

    def report(done: int, total: int) -> None:
        if events is not None:
            events.progress(f"eval {item.name} loss", done, total, "rows")

    values = loss_values(row_losses(model, encoded, batch=batch, progress=report))
    return {**values, **_skipped(len(item.rows) - len(encoded), len(item.rows))}


def _accuracies(model: Any, tokenizer: Any, item: EvalSetData, seed: int, events: Events | None, batch: int) -> dict[str, Value]:
    from posttrain.data.chat import render_prompt
    from posttrain.eval.accuracy import accuracy_values
    from posttrain.rollout.hf import HFEngine

    def report(done: int, total: int, tokens: int) -> None:
        if events is not None:
            events.progress(f"eval {item.name} completions", done, total, "completions", tokens=tokens)

    spec = item.spec
    limit = getattr(model.config, "max_position_embeddings", None) or float("inf")
    prompts = [render_prompt(tokenizer, row, "auto") for row in item.rows]
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) + spec.max_tokens <= limit]
    if not fits:
        raise DataError(
            f"no prompt fits: the shortest has {min(map(len, prompts))} tokens + max_tokens {spec.max_tokens}, the model {limit} positions",
            where=f"eval.sets.{item.name}",
        )
    values = accuracy_values(
        HFEngine(model, tokenizer, max_batch=batch, progress=report),
        [prompts[i] for i in fits],
        [item.rows[i] for i in fits],
        metrics=spec.metrics,
        reward=spec.reward,
        reward_options=spec.reward_options,
        samples=spec.samples,
        max_tokens=spec.max_tokens,
        temperature=spec.temperature,
        seed=seed,
        name=item.name,
    )
    return {**values, **_skipped(len(prompts) - len(fits), len(prompts))}


def _skipped(count: int, n: int) -> dict[str, Value]:
    return {"skipped": {"value": count, "low": None, "high": None, "n": n}} if count else {}


def fingerprint(ctx: StageContext, model: Any) -> str:
    """Digest of what is measured and how: sets, rows behind them, seed, and the type of the weights."""
    sets = {
        name: [_spec(item).dump(), _ref(item).key, _ref(item).digest, _ref(item).split] for name, item in ctx.eval.get("sets", {}).items()
    }
    dtype = str(next(model.parameters()).dtype) if model is not None else ""
    text = json.dumps([PROTOCOL, ctx.seed, dtype, sets], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _recorded(ctx: StageContext, mark: str) -> Results | None:
    refs = ctx.refs("model")
    if len(refs) != 1 or refs[0].origin != "stage":
        return None
    summary = refs[0].artifact().summary
    return summary.get("eval", {}).get("after") if summary.get("eval_fingerprint") == mark else None


def around(ctx: StageContext, when: str, model: Any, tokenizer: Any) -> Results | None:
    """Evaluates before or after a stage, if the pipeline asks for it, and keeps the result in `ctx.summary["eval"][when]`.

    Args:
        ctx: of the stage.
        when: `before` or `after`.
        model, tokenizer: the live model, unwrapped.

    Returns:
        Results, or None where nothing was asked for, or on other ranks than 0.
    """
    if not ctx.world.main or when not in ctx.eval.get("when", ()) or not ctx.eval.get("sets"):
        return None
    mark = fingerprint(ctx, model)
    results = _recorded(ctx, mark) if when == "before" else None
    if results is None:
        ctx.events.log(f"evaluating {when}", sets=list(ctx.eval["sets"]))
        results = evaluate(model, tokenizer, load_eval_sets(ctx), seed=ctx.seed, events=ctx.events, batch=ctx.eval.get("batch", 64))
    else:
        ctx.events.log("evaluation before: taken over from the input", sets=list(results))
    ctx.summary.setdefault("eval", {})[when] = results
    ctx.summary["eval_fingerprint"] = mark
    ctx.events.emit("eval", when=when, values=results)
    return results
