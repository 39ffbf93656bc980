"""Blocks, metrics and rules of hyperfitting; see `hyperfit.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from posttrain.core.context import StageContext
from posttrain.core.durable import write_json
from posttrain.data.dataset import training_rows
from posttrain.data.prompts import plain_ids
from posttrain.errors import ConfigError, DataError
from posttrain.eval.diversity import Corpus, distinct, repetition, type_token_ratio
from posttrain.models.rng import preserved_rng
from posttrain.rollout.base import Request, Sampling
from posttrain.rollout.hf import HFEngine, evaluation_mode
from posttrain.trainers._checkpoint import read_checkpoint
from posttrain.trainers._dropout import set_dropout
from posttrain.trainers._sft import IGNORED, SFTTrainer, build
from posttrain.trainers._train import describe, epoch_permutation, load_for_training, train_and_commit
from posttrain.trainers._watch import evaluate_around, kept_folder, save_kept

HISTORY = "hyperfit.json"
BATCH = 16
"""Held-out blocks in one pass."""


class HyperfitTrainer(SFTTrainer):
    """SFT that keeps the mean training loss of the running epoch, and the metrics of the epochs before."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.epoch_loss, self.epoch_passes, self.history = 0.0, 0, list[dict[str, Any]]()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The parent's step; its loss is added up."""
        loss = super().training_step(*args, **kwargs)
        self.epoch_loss += float(loss) * self.args.gradient_accumulation_steps
        self.epoch_passes += 1
        return loss

    def take_epoch_loss(self) -> float:
        """Mean training loss since the last call, over all processes."""
        pair = torch.tensor([self.epoch_loss, self.epoch_passes], dtype=torch.float64, device=self.accelerator.device)
        total, count = self.accelerator.reduce(pair, reduction="sum").tolist()
        self.epoch_loss, self.epoch_passes = 0.0, 0
        return float(total / max(count, 1))

    def own_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The running epoch's sums, and the history."""
        values, tensors = super().own_state()
        return {**values, "epoch_loss": self.epoch_loss, "epoch_passes": self.epoch_passes, "history": self.history}, tensors

    def restore_own_state(self, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Takes them back."""
        super().restore_own_state(values, tensors)
        self.epoch_loss, self.epoch_passes = values.get("epoch_loss", 0.0), values.get("epoch_passes", 0)
        self.history = list(values.get("history", self.history))


def blocks(cfg: Any, ctx: StageContext, tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    """(training, held-out) blocks of exactly `sequence_length` tokens, from rows in a seeded order.

    Raises:
        DataError: too few rows reach that length.
    """
    rows = training_rows(ctx, "data")
    wanted = cfg.samples + cfg.validation
    found: list[list[int]] = []
    order = epoch_permutation(len(rows), 0, ctx.seed)
    for done, i in enumerate(order, 1):
        ids = plain_ids(tokenizer, rows[i]["text"])[: cfg.sequence_length]
        if len(ids) == cfg.sequence_length:
            found.append(ids)
        ctx.events.progress("tokenize", done, len(order), "rows")
        if len(found) == wanted:
            break
    least = (cfg.batch.rows or cfg.batch.per_device) + 1
    if len(found) < least:
        raise DataError(
            f"{len(found)} of {len(rows)} rows have {cfg.sequence_length} tokens, needed are at least {least}",
            where=f"stages.{ctx.name}.in.data",
            fix="lower sequence_length, or give longer texts",
        )
    held = min(cfg.validation, max(1, round(len(found) * cfg.validation / wanted)))
    if len(found) < wanted:
        ctx.events.warn(f"only {len(found)} rows have {cfg.sequence_length} tokens: {len(found) - held} are trained on, {held} held out")
    return found[:-held], found[-held:]


def teacher_forced(model: Any, held: Sequence[Sequence[int]]) -> tuple[dict[str, float], torch.Tensor]:
    """Loss, entropy and top-1 accuracy over all positions of the blocks, and the top token of each position (N, T - 1)."""
    sums = torch.zeros(3, dtype=torch.float64)
    tops, count = [], 0
    device = next(model.parameters()).device
    for at in range(0, len(held), BATCH):
        ids = torch.tensor(held[at : at + BATCH], device=device)
        logps = torch.log_softmax(model(input_ids=ids).logits[:, :-1].float(), dim=-1)
        p = logps.exp()
        top, targets = logps.argmax(dim=-1), ids[:, 1:]
        sums += torch.tensor(
            [
                float(-logps.gather(2, targets[..., None]).sum()),
                float(-(p * (p + 1e-9).log()).sum()),
                float((top == targets).sum()),
            ]
        )
        count += targets.numel()
        tops.append(top.cpu())
    loss, entropy, right = (sums / count).tolist()
    return {"loss": loss, "entropy": entropy, "accuracy": right}, torch.cat(tops)


def continuations(model: Any, tokenizer: Any, held: Sequence[Sequence[int]], cfg: Any) -> list[list[int]]:
    """Greedy continuations of the first blocks from their first tokens to their full length, end tokens left out."""
    engine = HFEngine(model, tokenizer, max_batch=64)
    sampling = Sampling(cfg.sequence_length - cfg.context_tokens, temperature=0.0)
    found = engine.generate([Request(list(ids[: cfg.context_tokens]), 0, sampling) for ids in held[: cfg.contexts]])
    return [[token for token in item.token_ids if token not in engine.eos_ids] for item in found]


class Measure:
    """All metrics of a model; see `hyperfit.py`.

    Args:
        cfg: the stage.
        train, held: blocks.
        tokenizer: of the model.
    """

    def __init__(self, cfg: Any, train: Sequence[Sequence[int]], held: Sequence[Sequence[int]], tokenizer: Any) -> None:
        self.cfg, self.held, self.tokenizer, self.corpus = cfg, held, tokenizer, Corpus(train)
        self.before: torch.Tensor | None = None

    def __call__(self, model: Any) -> dict[str, float]:
        """The first call is of the model before training."""
        cfg = self.cfg
        with preserved_rng(), evaluation_mode(model), torch.no_grad():
            found, tops = teacher_forced(model, self.held)
            texts = continuations(model, self.tokenizer, self.held, cfg)
        self.before = tops if self.before is None else self.before
        full = cfg.sequence_length - cfg.context_tokens
        return {
            **found,
            "overlap": float((tops == self.before).double().mean()),
            "ttr": _mean([type_token_ratio(ids[-cfg.window :]) for ids in texts]),
            "ttr_first": _mean([type_token_ratio(ids[: cfg.window]) for ids in texts]),
            "rep4": _mean([repetition(ids) for ids in texts]),
            "distinct2": distinct(texts),
            "match": _mean([self.corpus.longest_match(ids) for ids in texts]),
            "ended": _mean([len(ids) < full for ids in texts]),
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


class Epochs(TrainerCallback):
    """Measures at the end of every epoch, keeps the best weights and stops; see `HyperfitStage`."""

    def __init__(self, cfg: Any, ctx: StageContext, trainer: HyperfitTrainer, measure: Measure, steps: int) -> None:
        self.cfg, self.ctx, self.trainer, self.measure, self.steps = cfg, ctx, trainer, measure, steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the update, before a checkpoint of the same step."""
        step = state.global_step
        if step % self.steps and step != state.max_steps:
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        found = {"train_loss": self.trainer.take_epoch_loss(), **self.measure(model)}
        model.train()
        self.ctx.events.metrics(step, {f"hyperfit/{name}": value for name, value in found.items()})
        self.trainer.history.append({"step": step, **found})
        if self.ctx.world.main:
            write_json(self.ctx.work / HISTORY, self.trainer.history)
        if self.cfg.keep == "ttr":
            self._keep(step, found)
        for name, key, target in (("loss", "train_loss", self.cfg.target_loss), ("entropy", "entropy", self.cfg.target_entropy)):
            if target is not None and found[key] < target:
                self.ctx.events.log(f"the {name} is {found[key]:.4g}, below target_{name} {target:g}, after step {step}: training stops")
                save_kept(self.trainer, self.ctx, "stop", step, found[key])
                control.should_training_stop = True
                return

    def _keep(self, step: int, found: dict[str, float]) -> None:
        kept, cap = kept_folder(self.ctx.work, "best"), self.cfg.max_loss_ratio
        if cap is not None and found["loss"] > cap * self.trainer.history[0]["loss"]:
            return
        if kept is None or found["ttr"] > read_checkpoint(kept).extra["value"]:
            save_kept(self.trainer, self.ctx, "best", step, found["ttr"])


def _rows(found: Sequence[Sequence[int]]) -> Dataset:
    return Dataset.from_list([{"input_ids": list(ids), "labels": [IGNORED, *ids[1:]]} for ids in found])


def run_hyperfit(cfg: Any, ctx: StageContext) -> None:
    """The stage `hyperfit`; see `hyperfit.py`."""
    loaded = load_for_training(cfg, ctx)
    if cfg.lora is None and loaded.model.dtype != torch.float32:
        raise ConfigError(
            f"weights of {str(loaded.model.dtype).removeprefix('torch.')} round steps of {cfg.optim.lr:g} to nothing",
            where=f"stages.{ctx.name}.model",
            fix="set model.dtype: float32, or train an adapter (lora)",
        )
    set_dropout(loaded.model, 0.0, f"stages.{ctx.name}.dropout")
    train, held = blocks(cfg, ctx, loaded.tokenizer)
    evaluate_around(ctx, "before", loaded.model, loaded.tokenizer)
    measure = Measure(cfg, train, held, loaded.tokenizer)
    before = {"step": 0, **measure(loaded.model)}
    trainer, plan = build(cfg, ctx, loaded, _rows(train), HyperfitTrainer)
    trainer.history = [before]
    ctx.events.metrics(0, {f"hyperfit/{name}": value for name, value in before.items() if name != "step"})
    trainer.add_callback(Epochs(cfg, ctx, trainer, measure, max(len(train) // plan.rows, 1)))
    describe(ctx, plan, "blocks")
    ctx.summary.update(blocks=len(train), held_out_blocks=len(held))
    train_and_commit(trainer, cfg, ctx, loaded)
    ctx.summary["hyperfit"] = json.loads((ctx.work / HISTORY).read_text(encoding="utf-8"))
