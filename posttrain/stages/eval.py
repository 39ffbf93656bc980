"""Evaluation of a model artifact, folder, or hub model: held-out loss, perplexity, verified accuracy, pass@k.

Measures the pipeline's `eval.sets` (all, or those named under `eval.sets` of the stage), and the rows of the port `data` if it is
filled. Adapters are merged and quantized checkpoints dequantized on loading. The artifact holds one file, `eval.json`.
"""

from __future__ import annotations

from typing import Any

from posttrain.config.base import Positive
from posttrain.config.common import EvalSet, Measurement, Metric, StageConfig, StageEval
from posttrain.core.registry import data_port, model_port, stage


class Config(Measurement, StageConfig):
    """Fields of the stage; `metrics` and how to measure concern the port `data` only."""

    eval: StageEval = StageEval()
    """Which of the pipeline's sets to measure; `sets: []` for none."""
    batch: Positive = 64
    """Sequences in one forward pass."""
    metrics: list[Metric] | None = None
    """What to measure on `data`; default `accuracy` (and `pass@k` with samples) on verifiable rows, else `loss` and `perplexity`."""


def _default_metrics(rows: str | None, samples: int) -> list[str]:
    if rows == "verifiable":
        return ["accuracy", "pass@k"] if samples > 1 else ["accuracy"]
    return ["loss", "perplexity"]


def _sets(cfg: Config, ctx: Any) -> list[Any]:
    from posttrain.data.dataset import load_rows
    from posttrain.errors import ConfigError
    from posttrain.eval.run import EvalSetData, load_eval_sets, take_rows

    sets = load_eval_sets(ctx)
    for ref in ctx.refs("data"):
        fields = cfg.model_dump(include=set(Measurement.model_fields))
        spec = EvalSet.model_validate({"from": ref.label, "metrics": cfg.metrics or _default_metrics(ref.rows, cfg.samples), **fields})
        sets.append(EvalSetData("data", spec, ref, take_rows(load_rows(ref), cfg.rows)))
    if not sets:
        raise ConfigError("nothing to measure", where=f"stages.{ctx.name}", fix="fill `in.data`, or define `eval.sets`")
    return sets


@stage(
    "eval",
    config=Config,
    inputs={"model": model_port(), "data": data_port("text", "messages", "verifiable", optional=True, many=False, train=False)},
    output="eval",
    evals=True,
)
def run(cfg: Config, ctx: Any) -> None:
    """Measures the model of `in.model` and writes `eval.json`."""
    from posttrain.core.durable import write_json
    from posttrain.eval.run import evaluate
    from posttrain.models.load import load_model

    ref = ctx.ref("model")
    sets = _sets(cfg, ctx)
    loaded = load_model(
        ref, dtype=ref.spec.get("dtype", "auto"), attn=ref.spec.get("attn", "auto"), trust_remote_code=ctx.trust_remote_code
    )
    results = evaluate(loaded.model, loaded.tokenizer, sets, seed=ctx.seed, events=ctx.events, batch=cfg.batch)
    write_json(ctx.out / "eval.json", {"sets": results, "seed": ctx.seed, "specs": {item.name: item.spec.dump() for item in sets}})
    ctx.summary.update(eval={"after": results}, rows_in=sum(len(item.rows) for item in sets))
    ctx.events.emit("eval", when="after", values=results)
