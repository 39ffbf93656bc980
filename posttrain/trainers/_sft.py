"""Supervised fine-tuning on TRL's SFTTrainer: rows become token sequences, labels and weights here.

Loss of a step, over the N supervised tokens of the whole global batch (so accumulation and the number of processes do not
change it):

    L = -(1/N) * sum_i w_i * sum_t log p(y_it | y_i,<t),

with w_i = 1, or with `data.weights: loss` the row's `weight` scaled so that its mean over the supervised tokens of the
data is 1. Padding is masked by length, never by token id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import trl
from datasets import Dataset

from posttrain.core.context import StageContext
from posttrain.data.chat import encode_rows
from posttrain.data.dataset import repeat_rows, training_rows
from posttrain.data.mask import check_stops, shown_rows, told
from posttrain.errors import DataError
from posttrain.models.save import stop_ids
from posttrain.trainers._packing import isolate, pack
from posttrain.trainers._train import (
    Schedule,
    describe,
    epoch_order,
    global_rows,
    grouped_order,
    load_for_training,
    make_schedule,
    peft_config,
    train_and_commit,
    trl_arguments,
    trl_refusals,
    warn_of_epochs,
)
from posttrain.trainers._trl import Reliable, pass_bias_on
from posttrain.trainers._watch import evaluate_around

IGNORED = -100
WEIGHT = "loss_weight"


class SFTTrainer(Reliable, trl.SFTTrainer):
    """TRL's SFTTrainer with complete checkpoints, the numerics guard, preemption, events and row weights.

    Its constructor is TRL's, plus `events`. A column `loss_weight` (one float a row) multiplies the row's loss; without
    it every number is TRL's own.
    """

    data_collator: Any
    _signature_columns: Any
    keeps_apart = True
    """Whether packed sequences of a pass may be kept apart, (B, T), where attention has a mask."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if WEIGHT in (getattr(self.train_dataset, "column_names", None) or []):
            self.data_collator = _with_weights(self.data_collator)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, WEIGHT]))

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, each row's log-probabilities multiplied by its weight."""
        weights = inputs.pop(WEIGHT, None)
        loss = super().compute_loss(model if weights is None else _weighted(model, weights), inputs, *args, **kwargs)
        if self.model.training and "attention_mask" not in inputs and len(inputs["input_ids"]) > 1:
            self._count_rows_apart(inputs)
        return loss

    def _count_rows_apart(self, inputs: dict[str, Any]) -> None:
        """Corrects TRL's count of tokens, which takes a packed pass for one row; padding does not count."""
        positions = inputs["position_ids"]
        real = (positions > 0).sum() + (positions.roll(-1, dims=1) == 1).sum()
        self._total_train_tokens += int(self.accelerator.gather_for_metrics(real - positions.size(1)).sum()) // self.get_tp_size()
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def own_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Tokens seen, so that a resumed run goes on counting."""
        values, tensors = super().own_state()
        return {**values, "tokens": self._total_train_tokens}, tensors

    def restore_own_state(self, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Takes back the token count."""
        super().restore_own_state(values, tensors)
        self._total_train_tokens = values.get("tokens", 0)


def _with_weights(collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    def collated(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(examples)
        batch[WEIGHT] = torch.tensor([example[WEIGHT] for example in examples], dtype=torch.float32)
        return batch

    return collated


def _weighted(model: Any, weights: torch.Tensor) -> Callable[..., Any]:
    """The model, its per-token log-probabilities (B, T-1) multiplied by `weights` (B,)."""

    def forward(**inputs: Any) -> Any:
        outputs = model(**inputs)
        outputs.log_probs = outputs.log_probs * weights.to(outputs.log_probs)[:, None]
        return outputs

    return forward


def labels_of(input_ids: Sequence[int], loss_mask: Sequence[Any]) -> list[int]:
    """Labels: the token id where it carries loss, else -100; the first token of a row is never predicted."""
    return [token if keep and i else IGNORED for i, (token, keep) in enumerate(zip(input_ids, loss_mask, strict=True))]


def supervised(labels: Sequence[int]) -> int:
    """Tokens that carry loss."""
    return sum(label != IGNORED for label in labels)


def encode_dataset(encoded: Sequence[Any], weights: Sequence[float] | None = None) -> Dataset:
    """Columns `input_ids` and `labels`, and `loss_weight` with mean 1 over supervised tokens where weights are given.

    Raises:
        DataError: no token carries loss, a weight is negative or not a number, or all weights are 0.
    """
    rows: list[dict[str, Any]] = [
        {"input_ids": list(item.input_ids), "labels": labels_of(item.input_ids, item.loss_mask)} for item in encoded
    ]
    counts = [supervised(row["labels"]) for row in rows]
    if not sum(counts):
        raise DataError(
            f"none of the {len(rows)} rows has a token that carries loss", fix="check data.loss_on, data.max_length and the chat template"
        )
    if weights is not None:
        scaled = _scaled(weights, counts)
        rows = [{**row, WEIGHT: weight} for row, weight in zip(rows, scaled, strict=True)]
    return Dataset.from_list(rows)


def _scaled(weights: Sequence[float], counts: Sequence[int]) -> list[float]:
    total = sum(weight * count for weight, count in zip(weights, counts, strict=True))
    if any(weight < 0 for weight in weights) or not 0 < total < float("inf"):
        raise DataError(
            "row weights must be non-negative numbers, not all 0", fix="correct the `weight` column, or set data.weights: ignore"
        )
    return [weight * sum(counts) / total for weight in weights]


def rows_to_dataset(cfg: Any, ctx: StageContext, model: Any, tokenizer: Any) -> Dataset:
    """The stage's mixture as token sequences; what was left out and why goes to the summary."""
    rows = training_rows(ctx, "data")
    if cfg.data.weights == "repeat":
        rows = repeat_rows(rows, ctx.seed)
    stops = stop_ids(model, tokenizer) or []
    encoded, ctx.summary["encoding"] = encode_rows(
        tokenizer, rows, cfg.data, stop_ids=stops if isinstance(stops, list) else [stops], events=ctx.events
    )
    check_stops(ctx.summary["encoding"], f"stages.{ctx.name}.data.max_length")
    ctx.summary["encoding"]["shown"] = shown_rows(tokenizer, encoded)
    for line in told(ctx.summary["encoding"]["shown"]):
        ctx.events.log(line)
    weights = [item.weight for item in encoded] if cfg.data.weights == "loss" else None
    return encode_dataset(encoded, weights)


def token_facts(dataset: Dataset, order: Sequence[int]) -> dict[str, float]:
    """Unique tokens, tokens seen by the whole run, supervised tokens seen, and epochs = seen / unique."""
    lengths = [len(ids) for ids in dataset["input_ids"]]
    counts = [supervised(labels) for labels in dataset["labels"]]
    unique, seen = sum(lengths), sum(lengths[i] for i in order)
    return {"tokens_unique": unique, "tokens": seen, "tokens_supervised": sum(counts[i] for i in order), "epochs": round(seen / unique, 4)}


def padding_share(rows: Sequence[Sequence[int]], order: Sequence[int], per_device: int) -> float:
    """Share of the positions of a run that are padding, where each pass of `per_device` rows is as wide as its longest."""
    lengths = [len(rows[i]) for i in order]
    passes = [lengths[start : start + per_device] for start in range(0, len(lengths), per_device)]
    return round(1 - sum(lengths) / sum(len(one) * max(one) for one in passes), 4)


def build(
    cfg: Any, ctx: StageContext, loaded: Any, dataset: Dataset, trainer_class: type[SFTTrainer] = SFTTrainer, **options: Any
) -> tuple[SFTTrainer, Schedule]:
    """The trainer of a stage, its rows laid out in the order in which they will be read; `options` go to its constructor."""
    documents: Sequence[Sequence[int]] = []
    if cfg.data.packing:
        documents, dataset = dataset[:3]["input_ids"], pack(dataset, cfg.data.max_length)
    rows = global_rows(cfg.batch, cfg.data.max_length)
    plan = make_schedule(cfg, len(dataset) / rows, ctx.world.size, f"stages.{ctx.name}")
    order = epoch_order(len(dataset), plan.steps * plan.rows, ctx.seed)
    if cfg.data.group_by_length:
        order = grouped_order(order, [len(ids) for ids in dataset["input_ids"]], plan.rows)
    ctx.summary.update(token_facts(dataset, order), padding_share=padding_share(dataset["input_ids"], order, plan.per_device))
    args = trl_arguments(
        trl.SFTConfig, cfg, ctx, plan, loaded.model,
        max_length=cfg.data.max_length, packing=cfg.data.packing, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    with trl_refusals(cfg, ctx):
        trainer = trainer_class(
            loaded.model,
            args=args,
            train_dataset=dataset.select(order),
            processing_class=loaded.tokenizer,
            peft_config=peft_config(
                cfg.lora, loaded.model, loaded.tokenizer.convert_tokens_to_ids(cfg.data.add_tokens), f"stages.{ctx.name}"
            ),
            events=ctx.events,
            **options,
        )
    if cfg.data.add_tokens and cfg.lora:
        pass_bias_on(trainer.model)
    if cfg.data.packing:
        layout = isolate(trainer, documents, f"stages.{ctx.name}", trainer.keeps_apart)
        ctx.summary["padding_share"] *= layout == "apart"
        ctx.events.log(f"packing: documents do not see one another; the sequences of a pass lie {layout}")
    trainer.facts_after = lambda steps: token_facts(dataset, order[: steps * plan.rows])
    return trainer, plan


def run_sft(cfg: Any, ctx: StageContext, trainer_class: type[SFTTrainer] = SFTTrainer, **options: Any) -> None:
    """The stage `sft`; see `sft.py`. A variant of it passes its own subclass and what that one's constructor takes more."""
    loaded = load_for_training(cfg, ctx)
    dataset = rows_to_dataset(cfg, ctx, loaded.model, loaded.tokenizer)
    evaluate_around(ctx, "before", loaded.model, loaded.tokenizer)
    trainer, plan = build(cfg, ctx, loaded, dataset, trainer_class, **options)
    facts = ctx.summary
    describe(ctx, plan, "sequences")
    ctx.events.log(
        f"{facts['tokens_unique']:,} unique tokens, {facts['tokens']:,} seen in {facts['epochs']:g} epochs, "
        f"{facts['tokens_supervised']:,} of them with loss"
    )
    warn_of_epochs(cfg, ctx, facts["epochs"])
    train_and_commit(trainer, cfg, ctx, loaded)
