"""Evaluation around and during training, and the best weights so far. An evaluation leaves every random generator as it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from posttrain.config.common import Guard, Steering, StopAt, TrainConfig, steering
from posttrain.core.context import StageContext
from posttrain.core.durable import write_json
from posttrain.errors import ArtifactError, ConfigError
from posttrain.models.rng import preserved_rng
from posttrain.trainers._checkpoint import clear, mark_complete, read_checkpoint


def evaluate_around(ctx: StageContext, when: str, model: Any, tokenizer: Any) -> None:
    """Evaluation before or after training; the one before is kept in the work folder, so a resumed run does not repeat it."""
    if not ctx.eval.get("sets"):
        return
    from posttrain.eval import around

    kept = ctx.work / "eval-before.json"
    if when == "before" and kept.is_file():
        ctx.summary.setdefault("eval", {})["before"] = json.loads(kept.read_text(encoding="utf-8"))
        return
    with preserved_rng():
        around(ctx, when, model, tokenizer)
    found = ctx.summary.get("eval", {}).get(when)
    if when == "before" and found is not None and ctx.world.main:
        write_json(kept, found)


class Watch(TrainerCallback):
    """Evaluates every so many steps.

    The best weights are kept in `work/best-STEP` for `commit: best`, those at which a run stopped early in
    `work/stop-STEP`, so that a run that is killed after its stop does not train on.
    """

    def __init__(
        self, cfg: TrainConfig, ctx: StageContext, trainer: Any, tokenizer: Any, measure: Callable[[Any, Any], dict[str, Any]]
    ) -> None:
        self.best, self.stop, self.guard, self.every = cfg.commit.best, cfg.stop, cfg.guard, cfg.eval.every
        self.ctx, self.trainer, self.tokenizer, self.measure = ctx, trainer, tokenizer, measure

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Runs after the update, before a checkpoint of the same step."""
        step = state.global_step
        steered = [item.every for item in (self.best, self.stop, self.guard) if item]
        if not any(every and step % every == 0 for every in (self.every, *steered)):
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with preserved_rng():
            found = self.measure(model, self.tokenizer)
        model.train()
        self.ctx.events.metrics(
            step, {f"eval/{name}/{key}": value["value"] for name, metrics in found.items() for key, value in metrics.items()}
        )
        if self.best and step % self.best.every == 0:
            self._keep(self.best, step, found)
        if self.stop and step % self.stop.every == 0 and self._reached(self.stop, step, found):
            control.should_training_stop = True
        if self.guard and step % self.guard.every == 0 and self._worse(self.guard, step, found):
            control.should_training_stop = True

    def _worse(self, guard: Guard, step: int, found: dict[str, Any]) -> bool:
        """Keeps the best; True where the metric has become too much worse than it."""
        self._keep(guard, step, found, "guard")
        kept, value = kept_folder(self.ctx.work, "best"), _metric(found, guard.metric, "guard")
        best = read_checkpoint(kept).extra["value"] if kept else math.inf
        allowed = best + guard.rise * abs(best) * (1 if better(guard, best - 1, best) else -1)
        if kept is None or value == allowed or better(guard, value, allowed):
            return False
        self._save("stop", step, value)
        self.ctx.events.warn(
            f"{guard.metric} is {value:.6g} at step {step}, its best was {best:.6g} at step {read_checkpoint(kept).step}: training stops, "
            "the best weights are committed; fewer epochs, or `dropout`, may help"
        )
        return True

    def _keep(self, best: Steering, step: int, found: dict[str, Any], field: str = "commit.best") -> None:
        value, kept = _metric(found, best.metric, field), kept_folder(self.ctx.work, "best")
        if not math.isfinite(value) or (kept and not better(best, value, read_checkpoint(kept).extra["value"])):
            return
        self._save("best", step, value)
        self.ctx.events.log(f"best {best.metric} so far: {value:.6g} at step {step}")

    def _reached(self, stop: StopAt, step: int, found: dict[str, Any]) -> bool:
        value = _metric(found, stop.metric, "stop")
        if better(stop, stop.at, value) or not math.isfinite(value):
            return False
        self._save("stop", step, value)
        self.ctx.events.log(f"{stop.metric} has reached {value:.6g} at step {step}: training stops")
        return True

    def _save(self, kind: str, step: int, value: float) -> None:
        save_kept(self.trainer, self.ctx, kind, step, value)


def save_kept(trainer: Any, ctx: StageContext, kind: str, step: int, value: float) -> None:
    """Weights of a step as `work/KIND-STEP`, complete with the value that made them worth it; older ones of the kind go."""
    folder = ctx.work / f"{kind}-{step}"
    trainer.save_model(str(folder), _internal_call=True)
    trainer.accelerator.wait_for_everyone()
    if ctx.world.main:
        (folder / "training_args.bin").unlink(missing_ok=True)
        mark_complete(folder, step, ctx.world.size, value=value, seconds=trainer.seconds_trained())
        for old in ctx.work.glob(f"{kind}-*"):
            if old != folder:
                clear(old)
    trainer.accelerator.wait_for_everyone()


def better(best: Steering, value: float, than: float) -> bool:
    """Whether a value of the metric improves on another."""
    smaller = best.mode == "min" or (best.mode == "auto" and best.metric.rpartition(".")[2] in ("loss", "perplexity"))
    return value < than if smaller else value > than


def _metric(found: dict[str, Any], name: str, field: str) -> float:
    wanted, _, metric = name.rpartition(".")
    try:
        return float(found[wanted][metric]["value"])
    except KeyError:
        known = ", ".join(f"{key}.{inner}" for key, metrics in found.items() for inner in metrics)
        raise ConfigError(f"no metric `{name}`", where=f"{field}.metric", fix=f"use one of: {known}") from None


def kept_folder(work: Path, kind: str) -> Path | None:
    """The complete `best-STEP` or `stop-STEP` folder of a run, or None."""
    for folder in sorted(work.glob(f"{kind}-*"), reverse=True):
        try:
            read_checkpoint(folder)
        except ArtifactError:
            continue
        return folder
    return None


def watch(cfg: TrainConfig, ctx: StageContext, trainer: Any, tokenizer: Any) -> None:
    """Adds the evaluations that `commit.best`, `stop` and `eval.every` ask for to a trainer."""
    if not steering(cfg) and not cfg.eval.every:
        return
    from posttrain.eval import evaluate, load_eval_sets, validation_sets

    sets = validation_sets(load_eval_sets(ctx))
    for field, item in steering(cfg).items():
        if item.metric.rpartition(".")[0] not in {known.name for known in sets}:
            raise ConfigError(
                f"`{item.metric}` names no validation set",
                where=f"stages.{ctx.name}.{field}.metric",
                fix="use SET.METRIC of a set `from: SOURCE:validation`",
            )
    trainer.add_callback(
        Watch(cfg, ctx, trainer, tokenizer, lambda model, tok: evaluate(model, tok, sets, seed=ctx.seed, batch=ctx.eval.get("batch", 64)))
    )
