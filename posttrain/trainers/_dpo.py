"""The DPO trainer; see `dpo.py`."""

from __future__ import annotations

import shutil
from typing import Any

import trl
from accelerate import PartialState
from datasets import Dataset

from posttrain.core.context import StageContext
from posttrain.data.dataset import training_rows
from posttrain.errors import DataError
from posttrain.trainers._answers import encode_answers
from posttrain.trainers._train import (
    attached,
    describe,
    epoch_order,
    global_rows,
    load_for_training,
    make_schedule,
    peft_config,
    train_and_commit,
    trl_arguments,
    trl_refusals,
    warn_of_epochs,
)
from posttrain.trainers._trl import Reliable
from posttrain.trainers._watch import evaluate_around

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


class DPOTrainer(Reliable, trl.DPOTrainer):
    """TRL's DPOTrainer with complete checkpoints, the numerics guard, preemption and events.

    Its constructor is TRL's, plus `events`. A dataset that has the columns `prompt_ids`, `chosen_ids` and `rejected_ids` is taken as it is.
    """

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if set(IDS) <= set(dataset.column_names or ()):
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)


def pairs(cfg: Any, ctx: StageContext, model: Any, tokenizer: Any) -> Dataset:
    """The stage's rows as token ids.

    Raises:
        DataError: rows that cannot be used, or whose two answers do not share the prompt's ids.
    """
    rows = training_rows(ctx, "data")
    chosen, rejected = (encode_answers(cfg, ctx, rows, side, model, tokenizer) for side in ("chosen", "rejected"))
    kept = [row for row in rows if row["id"] in chosen and row["id"] in rejected]
    found = []
    for row in kept:
        (left, start), (right, other) = chosen[row["id"]], rejected[row["id"]]
        if left[:start] != right[:other]:
            raise DataError("the two answers do not share the prompt's tokens", where=f"row {row['id']}", fix="check the chat template")
        found.append(dict(zip(IDS, (left[:start], left[start:], right[other:]), strict=True)))
    return Dataset.from_list(found)


def _on_disk(dataset: Dataset, ctx: StageContext) -> Dataset:
    """The same dataset from a folder that all processes share: TRL keeps the reference's log-probabilities beside it, once for all."""
    folder = ctx.work / "pairs"
    if ctx.world.main and not folder.exists():
        partial = ctx.work / "pairs.tmp"
        shutil.rmtree(partial, ignore_errors=True)
        dataset.save_to_disk(partial)
        partial.rename(folder)
    PartialState().wait_for_everyone()
    return Dataset.load_from_disk(folder)


def run_dpo(cfg: Any, ctx: StageContext) -> None:
    """The stage `dpo`; see `dpo.py`."""
    loaded = load_for_training(cfg, ctx)
    dataset = _on_disk(pairs(cfg, ctx, loaded.model, loaded.tokenizer), ctx)
    evaluate_around(ctx, "before", loaded.model, loaded.tokenizer)
    rows = global_rows(cfg.batch, cfg.data.max_length)
    plan = make_schedule(cfg, len(dataset) / rows, ctx.world.size, f"stages.{ctx.name}")
    order = epoch_order(len(dataset), plan.steps * plan.rows, ctx.seed)
    own = {"beta": cfg.beta, "loss_type": [cfg.loss_type], "label_smoothing": cfg.label_smoothing, "max_length": cfg.data.max_length}
    if not (cfg.lora and cfg.lora.on_input == "continue" and attached(loaded.model)):
        own["precompute_ref_log_probs"] = True
    args = trl_arguments(trl.DPOConfig, cfg, ctx, plan, loaded.model, **own)
    with trl_refusals(cfg, ctx):
        trainer = DPOTrainer(
            loaded.model,
            args=args,
            train_dataset=dataset,
            processing_class=loaded.tokenizer,
            peft_config=peft_config(cfg.lora, loaded.model, where=f"stages.{ctx.name}"),
            events=ctx.events,
        )
    trainer.train_dataset = trainer.train_dataset.select(order)
    describe(ctx, plan, "pairs")
    lengths = [2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in dataset]
    trainer.facts_after = lambda steps: {
        "tokens": sum(lengths[i] for i in order[: steps * plan.rows]),
        "tokens_unique": sum(lengths),
        "epochs": round(steps * plan.rows / len(dataset), 4),
    }
    ctx.summary.update(trainer.facts_after(plan.steps))
    warn_of_epochs(cfg, ctx, ctx.summary["epochs"])
    train_and_commit(trainer, cfg, ctx, loaded)
