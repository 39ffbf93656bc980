"""The D2O trainer: transformers' Trainer whose micro-batch is some prompts with all their answers; see `d2o.py`."""

from __future__ import annotations

import contextlib
import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from posttrain.core.context import StageContext
from posttrain.errors import ConfigError
from posttrain.losses.d2o import d2o_loss, d2o_margin, jeffrey_divergence, unlikelihood
from posttrain.models.load import load_model
from posttrain.models.rng import preserved_rng
from posttrain.trainers._answers import Answer
from posttrain.trainers._d2o_samples import (
    Group,
    draw,
    load_groups,
    read_drawn,
    read_references,
    take_rollouts,
    write_artifact,
    write_references,
)
from posttrain.trainers._dropout import set_dropout
from posttrain.trainers._train import (
    attached,
    describe,
    epoch_order,
    global_rows,
    is_sharded,
    load_for_training,
    make_schedule,
    peft_config,
    train_and_commit,
    trl_arguments,
    trl_refusals,
    warn_of_epochs,
)
from posttrain.trainers._trl import Reliable
from posttrain.trainers._watch import evaluate_around, save_kept

PATIENCE = 10
"""Steps over which `max_self_drop` is averaged."""


_Trainer: Any = Trainer


class _Step(_Trainer):
    """The training step; `Reliable` stands before it."""

    before_micro_batch: Callable[[], None]
    own_step: Callable[..., torch.Tensor]
    groups: Sequence[Group]

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward passes of one micro-batch; the mean loss of its prompts over the accumulated passes."""
        model.train()
        self.before_micro_batch()
        groups = [self.groups[i] for i in inputs["group"].tolist()]
        return self.own_step(model, groups, 1 / self.args.gradient_accumulation_steps)


class D2OTrainer(Reliable, _Step):
    """Trains on groups, see `_d2o_samples.Group`.

    Args:
        groups: with own answers and references, or none of both where `before_window` gives them.
        cfg: fields of `D2OStage`.
        before_window: called with (step, trainer) before the first micro-batch of every window.

    All other arguments are those of transformers' Trainer; `train_dataset` has the column `group`, numbers of groups.
    """

    def __init__(
        self, *args: Any, groups: Sequence[Group], cfg: Any, before_window: Callable[[int, Any], None] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, data_collator=_numbers, **kwargs)
        self.groups, self.d2o, self._before_window = groups, cfg, before_window
        self._window, self._sums, self.drops = -1, dict[str, list[float]](), deque[float](maxlen=PATIENCE)
        self.stopped: Callable[[int, float], None] | None = None
        self.add_callback(_StopOnDrop(self))

    def before_micro_batch(self) -> None:
        """Enters the window of the present step."""
        every = self.d2o.self_samples.every
        start = self.state.global_step // every * every if every else 0
        if start != self._window:
            self._window = start
            if self._before_window is not None:
                with preserved_rng():
                    self._before_window(start, self)
                self.model_wrapped.train()

    def own_step(self, model: Any, groups: Sequence[Group], scale: float) -> torch.Tensor:
        """Gradient of scale * mean loss of the groups, and that number."""
        with self.compute_loss_context_manager():
            if self.d2o.loss == "unlikelihood":
                return self._unlikelihood(model, groups, scale)
            answers = [answer for group in groups for answer in group.answers]
            rows = self.d2o.rows_per_pass
            if rows is None or rows >= len(answers):
                logps = self.logps(model, answers)
                loss, _ = self._loss(groups, logps, scale)
                self.accelerator.backward(loss)
                self._record(groups, logps.detach())
                return loss.detach()
            with torch.no_grad():
                logps = torch.cat([self.logps(model, part) for part in _parts(answers, rows)])
            logps.requires_grad_(True)
            loss, _ = self._loss(groups, logps, scale)
            (weights,) = torch.autograd.grad(loss, logps)
            self._record(groups, logps.detach())
            self._second_pass(model, answers, weights, rows)
            return loss.detach()

    def _second_pass(self, model: Any, answers: Sequence[Answer], weights: torch.Tensor, rows: int) -> None:
        """Backward through sum_i weight_i log pi(y_i), some answers at a time; processes exchange gradients in the last part only."""
        parts = _parts(answers, rows)
        for number, (part, weight) in enumerate(zip(parts, weights.split(rows), strict=True)):
            last = number + 1 == len(parts)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                self.accelerator.backward((self.logps(model, part) * weight).sum())

    def _unlikelihood(self, model: Any, groups: Sequence[Group], scale: float) -> torch.Tensor:
        values = self.token_logps(model, [group.negative for group in groups])
        loss = torch.stack([unlikelihood(value) for value in values]).mean() * scale
        self.accelerator.backward(loss)
        self._add("d2o/negative_logp", [float(value.detach().sum()) for value in values])
        return loss.detach()

    def token_logps(self, model: Any, answers: Sequence[Answer]) -> list[torch.Tensor]:
        """Log-probabilities of each answer's tokens, float32 or wider."""
        width = max(len(ids) for ids, _ in answers)
        ids = torch.zeros(len(answers), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, (tokens, _) in enumerate(answers):
            ids[i, : len(tokens)], mask[i, : len(tokens)] = torch.tensor(tokens), 1
        device = self.accelerator.device
        ids, mask = ids.to(device), mask.to(device)
        logits = model(input_ids=ids, attention_mask=mask).logits
        out = []
        for i, (tokens, start) in enumerate(answers):
            part = logits[i, max(start, 1) - 1 : len(tokens) - 1]
            part = part if part.dtype == torch.float64 else part.float()
            targets = ids[i, max(start, 1) : len(tokens)]
            out.append(torch.log_softmax(part, dim=-1).gather(1, targets[:, None])[:, 0])
        return out

    def logps(self, model: Any, answers: Sequence[Answer]) -> torch.Tensor:
        """(R,) sums of the answers' log-probabilities, or means with `length_normalise`."""
        found = self.token_logps(model, answers)
        return torch.stack([value.mean() if self.d2o.length_normalise else value.sum() for value in found])

    def _loss(self, groups: Sequence[Group], logps: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        own, own_refs, negative, negative_refs = _sides(groups, logps)
        margin = d2o_margin(own, own_refs, negative, negative_refs, self.d2o.alpha, self.d2o.beta)
        return d2o_loss(margin).mean() * scale, margin

    def _record(self, groups: Sequence[Group], logps: torch.Tensor) -> None:
        own, own_refs, negative, negative_refs = _sides(groups, logps)
        margin = d2o_margin(own, own_refs, negative, negative_refs, self.d2o.alpha, self.d2o.beta)
        gains, tokens = own - own_refs, torch.tensor([sum(len(ids) - at for ids, at in g.own) / len(g.own) for g in groups])
        per_token = gains.nanmean(dim=1).cpu() / (1.0 if self.d2o.length_normalise else tokens)
        self._add("d2o/margin", margin.tolist())
        self._add("d2o/accuracy", (margin > 0).double().tolist())
        self._add("d2o/self_logp", own.nanmean(dim=1).tolist())
        self._add("d2o/negative_logp", negative.tolist())
        self._add("d2o/self_gain", gains.nanmean(dim=1).tolist())
        self._add("d2o/negative_gain", (negative - negative_refs).tolist())
        self._add("d2o/jeffrey", jeffrey_divergence(own, own_refs).tolist())
        self._add("d2o/self_gain_per_token", per_token.tolist())

    def _add(self, name: str, values: Sequence[float]) -> None:
        self._sums.setdefault(name, []).extend(values)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The step's log with both sides' figures, means over the prompts of all processes since the last log."""
        if "loss" in logs and self._sums:
            logs = {**logs, **self._means()}
        super().log(logs, *args, **kwargs)

    def _means(self) -> dict[str, float]:
        names = sorted(self._sums)
        pairs = torch.tensor([[sum(self._sums[name]), len(self._sums[name])] for name in names], dtype=torch.float64)
        self._sums = {}
        pairs = self.accelerator.reduce(pairs.to(self.accelerator.device), reduction="sum")
        return {name: float(total / count) for name, (total, count) in zip(names, pairs.tolist(), strict=True)}

    def step_drop(self) -> float:
        """How far the own answers fell below their reference in this step, per token, over all processes."""
        values = self._sums.get("d2o/self_gain_per_token", [])
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        recent = values[-size:]
        pair = torch.tensor([-sum(recent), len(recent)], dtype=torch.float64, device=self.accelerator.device)
        total, count = self.accelerator.reduce(pair, reduction="sum").tolist()
        return total / max(count, 1)

    def own_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What the stop rule has seen, and figures not logged yet."""
        values, tensors = super().own_state()
        return {**values, "drops": list(self.drops), "sums": self._sums}, tensors

    def restore_own_state(self, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Takes them back."""
        super().restore_own_state(values, tensors)
        self.drops.extend(values.get("drops", []))
        self._sums = {name: list(found) for name, found in values.get("sums", {}).items()}


class _StopOnDrop(TrainerCallback):
    """`max_self_drop`."""

    def __init__(self, trainer: D2OTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the update, before a checkpoint of the same step."""
        trainer = self.trainer
        limit = trainer.d2o.max_self_drop
        if limit is None or trainer.d2o.loss == "unlikelihood":
            return
        trainer.drops.append(trainer.step_drop())
        mean = sum(trainer.drops) / len(trainer.drops)
        if len(trainer.drops) == PATIENCE and mean > limit:
            control.should_training_stop = True
            if trainer.stopped is not None:
                trainer.stopped(state.global_step, mean)
            if trainer.events is not None:
                trainer.events.warn(
                    f"own answers have fallen {mean:.3g} nats a token below their reference (max_self_drop {limit:g}): training stops "
                    f"at step {state.global_step}; lower alpha, the learning rate or the number of steps"
                )


def _numbers(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"group": torch.tensor([example["group"] for example in examples])}


def _parts(answers: Sequence[Answer], size: int) -> list[Sequence[Answer]]:
    return [answers[at : at + size] for at in range(0, len(answers), size)]


def _sides(groups: Sequence[Group], logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Own answers (B, K) and references, unwanted answers (B,) and references, from the answers' (R,) log-probabilities."""
    most = max(len(group.own) for group in groups)
    own, refs, negative, at = [], [], [], 0
    for group in groups:
        count = len(group.own)
        own.append(torch.nn.functional.pad(logps[at : at + count], (0, most - count), value=0.0))
        refs.append(logps.new_tensor([*group.own_refs, *[math.nan] * (most - count)]))
        negative.append(logps[at + count])
        at += count + 1
    return torch.stack(own), torch.stack(refs), torch.stack(negative), logps.new_tensor([group.negative_ref for group in groups])


class _Windows:
    """Own answers and references of each window."""

    def __init__(self, cfg: Any, ctx: StageContext, groups: Sequence[Group], tokenizer: Any, order: Sequence[int], rows: int) -> None:
        self.cfg, self.ctx, self.groups, self.tokenizer, self.order, self.rows = cfg, ctx, groups, tokenizer, order, rows
        self._initial: Any = None

    def __call__(self, start: int, trainer: D2OTrainer) -> None:
        cfg, ctx, world = self.cfg, self.ctx, self.ctx.world
        groups = self._of(start)
        folder = ctx.work / f"window-{start}"
        folder.mkdir(exist_ok=True)
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.eval()
        if ctx.refs("samples"):
            take_rollouts(groups, cfg, ctx)
        elif cfg.loss == "d2o":
            if not (folder / f"self-{world.rank}.jsonl").exists():
                draw(groups, start, cfg, ctx, model, self.tokenizer, folder)
            trainer.accelerator.wait_for_everyone()
            read_drawn(groups, folder, world.size)
        with self._reference(trainer, model, "harmful") as own, self._reference(trainer, model, "helpful") as negative:
            write_references(groups, ctx, folder, own, negative)
        trainer.accelerator.wait_for_everyone()
        read_references(groups, folder, world.size)

    def _of(self, start: int) -> list[Group]:
        """The groups of a window, in the order in which they are seen first."""
        every = self.cfg.self_samples.every
        numbers = self.order[start * self.rows : (start + every) * self.rows] if every else self.order
        return [self.groups[i] for i in dict.fromkeys(numbers)]

    def write_last(self, step: int) -> None:
        """Own answers and references of the window that a run ended in, into the artifact."""
        every = self.cfg.self_samples.every
        start = (step - 1) // every * every if every else 0
        groups, folder = self._of(start), self.ctx.work / f"window-{start}"
        if self.ctx.refs("samples"):
            take_rollouts(groups, self.cfg, self.ctx)
        else:
            read_drawn(groups, folder, self.ctx.world.size)
        read_references(groups, folder, self.ctx.world.size)
        write_artifact(groups, self.ctx.out)

    @contextlib.contextmanager
    def _reference(self, trainer: D2OTrainer, policy: Any, port: str) -> Iterator[Callable[[Sequence[Answer]], list[float]]]:
        """Log-probabilities under the model of a port, or under the input model, or the present policy."""
        rows = self.cfg.rows_per_pass or max(self.cfg.self_samples.batch // 4, 1)
        model, disabled = policy, contextlib.nullcontext
        if self.ctx.refs(port):
            model = load_model(self.ctx.ref(port), trust_remote_code=self.ctx.trust_remote_code).model.to(trainer.accelerator.device).eval()
        elif self.cfg.reference == "input" and self.cfg.self_samples.every:
            if attached(policy):
                disabled = policy.disable_adapter
            else:
                model = self._initial

        def logps(answers: Sequence[Answer]) -> list[float]:
            with torch.no_grad(), disabled():
                return [float(value) for part in _parts(answers, rows) for value in trainer.logps(model, part)]

        yield logps

    def keep_initial(self, model: Any) -> None:
        """A frozen copy of the input model, where later windows compare with it and there is no adapter to switch off."""
        wanted = self.cfg.reference == "input" and self.cfg.self_samples.every and self.cfg.loss == "d2o"
        if wanted and not self.cfg.lora and not (self.ctx.refs("helpful") and self.ctx.refs("harmful")):
            self._initial = copy.deepcopy(model).eval().requires_grad_(False)


def build(cfg: Any, ctx: StageContext, loaded: Any) -> tuple[D2OTrainer, _Windows]:
    """The trainer of a stage and its windows."""
    groups, rows = load_groups(cfg, ctx, loaded.model, loaded.tokenizer)
    size = global_rows(cfg.batch, cfg.data.max_length)
    plan = make_schedule(cfg, len(rows) / size, ctx.world.size, f"stages.{ctx.name}")
    order = [rows[i] for i in epoch_order(len(rows), plan.steps * plan.rows, ctx.seed)]
    windows = _Windows(cfg, ctx, groups, loaded.tokenizer, order, plan.rows)
    windows.keep_initial(loaded.model)
    args = trl_arguments(TrainingArguments, cfg, ctx, plan, loaded.model, remove_unused_columns=False)
    with trl_refusals(cfg, ctx):
        adapter = peft_config(cfg.lora, loaded.model, where=f"stages.{ctx.name}")
        if adapter is not None:
            from peft import get_peft_model

            loaded.model.requires_grad_(False)
        model = loaded.model if adapter is None else get_peft_model(loaded.model, adapter)
        if args.gradient_checkpointing and adapter is not None:
            model.enable_input_require_grads()
        trainer = D2OTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({"group": order}),
            processing_class=loaded.tokenizer,
            events=ctx.events,
            groups=groups,
            cfg=cfg,
            before_window=windows,
        )
    trainer.stopped = lambda step, value: save_kept(trainer, ctx, "stop", step, value)
    set_dropout(trainer.model, 0.0, f"stages.{ctx.name}")
    describe(ctx, plan, "prompts")
    ctx.summary.update(prompts=len(groups), epochs=round(plan.steps * plan.rows / len(rows), 4))
    warn_of_epochs(cfg, ctx, ctx.summary["epochs"])
    return trainer, windows


def run_d2o(cfg: Any, ctx: StageContext) -> None:
    """The stage `d2o`; see `d2o.py`."""
    if ctx.refs("samples") and cfg.self_samples.every:
        raise ConfigError(
            "answers of an earlier stage cannot be drawn anew",
            where=f"stages.{ctx.name}.self_samples.every",
            fix="remove it, or the port `samples`",
        )
    loaded = load_for_training(cfg, ctx)
    evaluate_around(ctx, "before", loaded.model, loaded.tokenizer)
    trainer, windows = build(cfg, ctx, loaded)
    if is_sharded(trainer, f"stages.{ctx.name}"):
        raise ConfigError(
            "d2o does not draw answers from weights split over processes (FSDP, ZeRO-3)",
            where=f"stages.{ctx.name}.launch",
            fix="use ddp.yaml or zero2.yaml; LoRA and rows_per_pass save memory",
        )
    train_and_commit(trainer, cfg, ctx, loaded)
    if ctx.world.main and cfg.loss == "d2o":
        windows.write_last(ctx.summary["steps"])
