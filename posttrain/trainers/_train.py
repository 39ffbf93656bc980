"""What every trainer stage does around its TRL trainer: model in, schedule, TRL arguments, evaluation, weights out.

The batch is global: `rows` sequences an optimizer step over all processes, so

    accumulation = rows / (per_device * processes),

with `per_device` lowered to the largest divisor that fits. The order of the rows is laid out before training, one seeded
permutation an epoch, cut at `steps * rows`; TRL then reads it from front to back. So neither the number of processes nor
a resume in the middle of an epoch can change which rows a step sees, and there is no partial batch at an epoch's end.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.utils import logging as hf_logging

from posttrain.config.common import BatchConfig, LoraConfig, TrainConfig
from posttrain.core.context import StageContext
from posttrain.core.durable import write_json
from posttrain.data.chat import set_template
from posttrain.errors import ArtifactError, ConfigError
from posttrain.models.load import LoadedModel, load_model
from posttrain.models.save import save_model
from posttrain.models.source import resolve_model
from posttrain.rollout.base import request_seed
from posttrain.trainers._checkpoint import clear, mark_complete, read_checkpoint
from posttrain.trainers._trl import check_trl_fields

GROUP_WINDOW = 50
OWNED = {
    "output_dir": "the run folder", "seed": "seed", "data_seed": "seed", "max_steps": "steps", "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch.per_device", "gradient_accumulation_steps": "batch.rows", "train_batch_size": "batch.rows",
    "learning_rate": "optim.lr", "lr_scheduler_type": "optim.schedule", "warmup_steps": "optim.warmup", "warmup_ratio": "optim.warmup",
    "weight_decay": "optim.weight_decay", "adam_beta1": "optim.beta1", "adam_beta2": "optim.beta2", "adam_epsilon": "optim.eps",
    "max_grad_norm": "optim.max_grad_norm", "optim": "optim.name", "save_steps": "checkpoint.every", "save_strategy": "checkpoint",
    "save_total_limit": "checkpoint.keep", "load_best_model_at_end": "commit.best", "metric_for_best_model": "commit.best.metric",
    "greater_is_better": "commit.best.mode", "logging_steps": "log_every", "logging_strategy": "log_every",
    "logging_nan_inf_filter": "nothing: a NaN is always shown", "report_to": "tracking.to", "eval_strategy": "eval", "eval_steps": "eval.every",
    "do_eval": "eval", "resume_from_checkpoint": "nothing: the same command resumes", "gradient_checkpointing": "model.gradient_checkpointing",
    "bf16": "model.dtype", "fp16": "model.dtype", "model_init_kwargs": "model", "trust_remote_code": "--trust-remote-code",
    "max_length": "data.max_length", "packing": "data.packing", "chat_template_path": "data.template", "dataset_kwargs": "data",
    "push_to_hub": "nothing: a run publishes nothing", "use_cpu": "nothing: a GPU is used where there is one", "ddp_backend": "launch",
    "deepspeed": "launch.config", "fsdp": "launch.config", "fsdp_config": "launch.config", "train_sampling_strategy": "nothing: the order is laid out by seed",
    "shuffle_dataset": "nothing: the order is laid out by seed", "tools": "an environment stage; not supported together with our engines",
    "environment_factory": "an environment stage; not supported together with our engines",
}  # fmt: skip
OWNED_BY = {
    "GRPOConfig": {
        "num_generations": "group", "num_iterations": "num_iterations", "beta": "beta", "epsilon": "epsilon", "epsilon_high": "epsilon_high",
        "loss_type": "loss_type", "scale_rewards": "scale_rewards", "mask_truncated_completions": "mask_truncated", "reward_weights": "rewards[].weight",
        "max_completion_length": "rollout.max_tokens", "temperature": "rollout.temperature", "top_p": "rollout.top_p", "top_k": "rollout.top_k",
        "use_vllm": "rollout.engine", "remove_unused_columns": "nothing: rewards see every column",
    }
}  # fmt: skip


def owned_fields(config_class: type) -> dict[str, str]:
    """Fields of a TRL config that posttrain sets itself -> what to set instead."""
    return OWNED | OWNED_BY.get(config_class.__name__, {})


@dataclass(frozen=True)
class Schedule:
    """Sizes of a run: optimizer steps, sequences a step over all processes, and how a step is cut up."""

    steps: int
    rows: int
    per_device: int
    accumulation: int
    warmup: int


def make_schedule(cfg: TrainConfig, steps_an_epoch: float, world: int, where: str) -> Schedule:
    """The schedule of a stage.

    Args:
        cfg: the stage.
        steps_an_epoch: optimizer steps that one pass over the data takes, not rounded.
        world: processes.
        where: dotted path of the stage.

    Raises:
        ConfigError: the batch cannot be cut into equal parts for the processes.
    """
    rows = global_rows(cfg.batch, cfg.data.max_length)
    if rows % world:
        raise ConfigError(f"{rows} rows a step cannot be shared equally by {world} processes", where=f"{where}.batch.rows", fix=f"use a multiple of {world}")
    share = rows // world
    per_device = max(d for d in range(1, min(cfg.batch.per_device, share) + 1) if share % d == 0)
    steps = cfg.steps or max(math.ceil(cfg.epochs * steps_an_epoch - 1e-9), 1)
    warmup = cfg.optim.warmup
    return Schedule(steps, rows, per_device, share // per_device, int(warmup) if warmup >= 1 else math.ceil(warmup * steps))


def global_rows(batch: BatchConfig, max_length: int) -> int:
    """Sequences of one optimizer step: `rows`, or `tokens` in packed sequences, or one pass of one device."""
    return batch.rows or (max(batch.tokens // max_length, 1) if batch.tokens else batch.per_device)


def epoch_order(items: int, count: int, seed: int) -> list[int]:
    """`count` indices below `items`: one seeded permutation after another, each index once an epoch."""
    order: list[int] = []
    for epoch in range(math.ceil(count / items)):
        generator = torch.Generator().manual_seed(request_seed(seed, "order", epoch))
        order += torch.randperm(items, generator=generator).tolist()
    return order[:count]


def grouped_order(order: Sequence[int], lengths: Sequence[int], rows: int, seed: int) -> list[int]:
    """`order` with rows of similar length in one batch of `rows`.

    Windows of `GROUP_WINDOW` batches are sorted by length and cut into batches, which are then shuffled by the seed; so
    every batch comes from the same part of the same epoch as before, and the same rows are seen.
    """
    grouped: list[int] = []
    window = GROUP_WINDOW * rows
    for number, start in enumerate(range(0, len(order), window)):
        part = sorted(order[start : start + window], key=lambda i: (lengths[i], i))
        batches = [part[i : i + rows] for i in range(0, len(part), rows)]
        generator = torch.Generator().manual_seed(request_seed(seed, "group", number))
        grouped += [i for b in torch.randperm(len(batches), generator=generator).tolist() for i in batches[b]]
    return grouped


def load_for_training(cfg: TrainConfig, ctx: StageContext) -> LoadedModel:
    """The stage's input model; an adapter is merged, or left attached and trainable with `lora.on_input: continue`."""
    hf_logging.disable_progress_bar()
    ref = ctx.ref("model")
    keep = cfg.lora is not None and cfg.lora.on_input == "continue" and resolve_model(ref).form == "adapter"
    options = {key: ref.spec[key] for key in ("dtype", "attn") if key in ref.spec}
    loaded = load_model(ref, merge=not keep, trust_remote_code=ctx.trust_remote_code, **options)
    if not attached(loaded.model):
        loaded.model.requires_grad_(True)
    if cfg.data.template:
        set_template(loaded.tokenizer, cfg.data.template, replace=ref.origin == "model")
    return loaded


def attached(model: Any) -> bool:
    """True for a PeftModel; a merged model may still carry peft's attributes."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def peft_config(lora: LoraConfig | None, model: Any) -> Any:
    """peft's config of a new adapter; None for full fine-tuning or where an adapter is already attached."""
    if lora is None or attached(model):
        return None
    from peft import LoraConfig as PeftLora

    return PeftLora(r=lora.r, lora_alpha=lora.alpha, target_modules=lora.targets, lora_dropout=lora.dropout, task_type="CAUSAL_LM")


def trl_arguments(config_class: type, cfg: TrainConfig, ctx: StageContext, plan: Schedule, model: Any, **own: Any) -> Any:
    """The TRL config of a stage: our fields, then the `trl:` block, which cannot override them.

    Raises:
        ConfigError: a field of `trl:` that TRL lacks or that we own; a combination that TRL refuses.
    """
    where = f"stages.{ctx.name}.trl"
    problems = check_trl_fields(cfg.trl, config_class, where, dict.fromkeys(own, f"the fields of `{cfg.method}`") | owned_fields(config_class))
    if problems:
        raise ConfigError(problems=problems)
    gpu = torch.cuda.is_available()
    optim = cfg.optim
    ours = {
        "output_dir": str(ctx.work), "seed": ctx.seed % 2**32, "max_steps": plan.steps, "per_device_train_batch_size": plan.per_device,
        "gradient_accumulation_steps": plan.accumulation, "learning_rate": optim.lr, "lr_scheduler_type": optim.schedule, "warmup_steps": plan.warmup,
        "weight_decay": optim.weight_decay, "adam_beta1": optim.beta1, "adam_beta2": optim.beta2, "adam_epsilon": optim.eps,
        "max_grad_norm": optim.max_grad_norm, "logging_steps": cfg.log_every, "save_strategy": "steps", "save_steps": cfg.checkpoint.every,
        "save_total_limit": cfg.checkpoint.keep, "report_to": "none", "disable_tqdm": True, "use_cpu": not gpu, "logging_nan_inf_filter": False,
        "bf16": gpu and model.dtype == torch.bfloat16, "fp16": False, "gradient_checkpointing": bool(ctx.ref("model").spec.get("gradient_checkpointing", False)),
        "dataloader_pin_memory": gpu, "train_sampling_strategy": "sequential", "shuffle_dataset": False,
        "ddp_backend": "gloo" if not gpu and ctx.world.size > 1 else None,
    }  # fmt: skip
    try:
        return config_class(**{**cfg.trl, **ours, **own})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{config_class.__name__} refuses these values: {error}", where=where) from error


def describe(ctx: StageContext, plan: Schedule, unit: str) -> None:
    """Tells how a step is cut up."""
    ctx.events.log(
        f"{plan.steps} steps of {plan.rows} {unit}: {ctx.world.size} process{'es' if ctx.world.size > 1 else ''} x {plan.per_device} a pass"
        f" x {plan.accumulation} accumulated; {plan.warmup} warm-up steps"
    )


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leaves Python's, numpy's and torch's generators as they were, so that an evaluation cannot change a run."""
    python, arrays, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_rng_state(cpu)
        if gpu:
            torch.cuda.set_rng_state_all(gpu)


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
    """Evaluates every so many steps, and keeps the best weights in `work/best-STEP` for `commit: best`."""

    def __init__(self, cfg: TrainConfig, ctx: StageContext, trainer: Any, tokenizer: Any, measure: Callable[[Any, Any], dict[str, Any]]) -> None:
        self.best, self.every = cfg.commit.best, cfg.eval.every
        self.ctx, self.trainer, self.tokenizer, self.measure = ctx, trainer, tokenizer, measure

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Runs after the update, before a checkpoint of the same step."""
        step = state.global_step
        report = self.every is not None and step % self.every == 0
        if not report and not (self.best and step % self.best.every == 0):
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with preserved_rng():
            found = self.measure(model, self.tokenizer)
        model.train()
        self.ctx.events.metrics(step, {f"eval/{name}/{key}": value["value"] for name, metrics in found.items() for key, value in metrics.items()})
        if self.best and step % self.best.every == 0:
            self._keep(step, found)

    def _keep(self, step: int, found: dict[str, Any]) -> None:
        value = _metric(found, self.best.metric)
        kept = best_folder(self.ctx.work)
        sign = 1 if self.best.mode == "min" or (self.best.mode == "auto" and self.best.metric.rsplit(".", 1)[-1] in ("loss", "perplexity")) else -1
        if not math.isfinite(value) or (kept and sign * value >= sign * read_checkpoint(kept).extra["value"]):
            return
        folder = self.ctx.work / f"best-{step}"
        self.trainer.save_model(str(folder), _internal_call=True)
        self.trainer.accelerator.wait_for_everyone()
        if self.ctx.world.main:
            (folder / "training_args.bin").unlink(missing_ok=True)
            mark_complete(folder, step, self.ctx.world.size, value=value)
            for old in self.ctx.work.glob("best-*"):
                if old != folder:
                    clear(old)
        self.trainer.accelerator.wait_for_everyone()
        self.ctx.events.log(f"best {self.best.metric} so far: {value:.6g} at step {step}")


def _metric(found: dict[str, Any], name: str) -> float:
    wanted, _, metric = name.rpartition(".")
    try:
        return float(found[wanted][metric]["value"])
    except KeyError:
        known = ", ".join(f"{key}.{inner}" for key, metrics in found.items() for inner in metrics)
        raise ConfigError(f"no metric `{name}`", where="commit.best.metric", fix=f"use one of: {known}") from None


def best_folder(work: Path) -> Path | None:
    """The complete `best-STEP` folder of a run, or None."""
    for folder in sorted(work.glob("best-*"), reverse=True):
        try:
            read_checkpoint(folder)
        except ArtifactError:
            continue
        return folder
    return None


def _watch(cfg: TrainConfig, ctx: StageContext, trainer: Any, tokenizer: Any) -> None:
    if not cfg.commit.best and not cfg.eval.every:
        return
    from posttrain.eval import evaluate, load_eval_sets, validation_sets

    sets = validation_sets(load_eval_sets(ctx))
    if cfg.commit.best and cfg.commit.best.metric.rpartition(".")[0] not in {item.name for item in sets}:
        raise ConfigError(f"`{cfg.commit.best.metric}` names no validation set", where=f"stages.{ctx.name}.commit.best.metric", fix="use SET.METRIC of a set `from: SOURCE:validation`")
    trainer.add_callback(Watch(cfg, ctx, trainer, tokenizer, lambda model, tok: evaluate(model, tok, sets, seed=ctx.seed, batch=ctx.eval.get("batch", 64))))


def check_trainable(model: Any, where: str) -> int:
    """Number of trainable parameters; ConfigError where there are none."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not count:
        raise ConfigError("no parameter is trainable", where=where, fix="check lora.targets")
    return count


def train_and_commit(trainer: Any, cfg: TrainConfig, ctx: StageContext, loaded: LoadedModel) -> None:
    """Trains (resuming where a complete checkpoint exists), evaluates, and writes the model or adapter into `ctx.out`."""
    count = check_trainable(trainer.model, f"stages.{ctx.name}.lora")
    base = loaded.base if attached(loaded.model) else loaded.source
    ctx.events.log(f"{count:,} trainable parameters")
    _watch(cfg, ctx, trainer, loaded.tokenizer)
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=True)
    seconds = trainer.seconds_before + time.monotonic() - start
    best = best_folder(ctx.work) if cfg.commit.best else None
    if best:
        trainer._load_from_checkpoint(str(best))
        ctx.summary["best"] = {"step": read_checkpoint(best).step, "value": read_checkpoint(best).extra["value"]}
    model = trainer.accelerator.unwrap_model(trainer.model)
    if attached(model) and "ref" in model.peft_config:
        model.delete_adapter("ref")
    model.gradient_checkpointing_disable()
    model.eval()
    ctx.summary.update(steps=trainer.state.global_step, parameters_trained=count, seconds_train=round(seconds, 3))
    if ctx.summary.setdefault("tokens", trainer.state.num_input_tokens_seen):
        ctx.summary["tokens_per_s"] = round(ctx.summary["tokens"] / max(seconds, 1e-9), 1)
    evaluate_around(ctx, "after", model, loaded.tokenizer)
    if ctx.world.main:
        save_model(model, loaded.tokenizer, ctx.out, base=base, meta=ctx.meta)
        ctx.summary["size_bytes"] = ctx.meta.get("size_bytes")
    ctx.meta["kind"] = "adapter" if cfg.lora else "model"
    trainer.accelerator.wait_for_everyone()
