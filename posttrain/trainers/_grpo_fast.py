"""`fast: on`: GRPO on our own forward pass and losses, with TRL's numbers.

What TRL's step computes and does not need, and what stands in its place:

    every row padded to the longest prompt and completion of the rollouts    rows sorted in a step, blocks trimmed to their rows
    a prompt forwarded with each of its completions                          once a group, its keys and values shared, with gradient
    the output head at prompts and padding (without Triton)                  only where a completion token is predicted
    gradients of completions whose advantage is 0                            a forward pass alone, for the metrics

Rows move between the micro-batches of one step, never between steps. They stay where they are if the loss depends on what
a micro-batch holds: loss_type bnpo, entropy.level micro. The sums are TRL's in another order: the same loss, gradient and
metrics up to rounding; only the noise of dropout, where there is some, is drawn for other positions. What a model cannot do is
found out on the model itself when the trainer is built, see `_grpo_fast_check.py`.

Rewards are not computed beside the next rollout: without dynamic sampling that rollout's policy depends on them, with it
whether there is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from posttrain.losses.policy import policy_loss
from posttrain.trainers._grpo_fast_check import Form, find_form
from posttrain.trainers._grpo_forward import Work, add_fast_forward
from posttrain.trainers._grpo_layout import OVERHEAD, OVERHEAD_ELSEWHERE, Cluster, Span, cost, lay_out, order_rows, spans_of
from posttrain.trainers._grpo_metrics import loss_mask

Batch = dict[str, Any]
_Trainer: Any = object


class WithFast(_Trainer):
    """Puts our forward pass and losses in the place of TRL's, where asked; before it stand `Measured` and `WithTerms`.

    Args:
        fast: whether to.

    Attributes:
        form: how this model's rows are forwarded; None with `fast` off.

    Raises:
        ConfigError: fields or a model that it does not support.
    """

    form: Form | None = None

    def __init__(self, *args: Any, fast: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not fast:
            return
        whole = self.accelerator.unwrap_model(self.model)
        for model in (whole.get_base_model() if hasattr(whole, "get_base_model") else whole, self.ref_model):
            if model is not None:
                add_fast_forward(self.accelerator.unwrap_model(model))
        self._overhead = OVERHEAD.get(self.accelerator.device.type, OVERHEAD_ELSEWHERE)
        self.form = find_form(self, super()._get_per_token_logps_and_entropies)

    def _shares(self, columns: int) -> bool:
        """Whether prompts may be shared in a batch of so many columns."""
        return self.form is not None and columns <= self.form.share_within

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self.form is None or not self.model.training or self._buffered_inputs is before:
            return inputs
        self._regroup()
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _regroup(self) -> None:
        """Puts rows that are cheap together into the same micro-batch, inside each step of a batch of rollouts."""
        entropy = self.terms.entropy
        if self.loss_type == "bnpo" or (entropy and entropy.level == "micro"):
            return
        each, held = self.args.steps_per_generation, self._buffered_inputs
        passes = math.gcd(each, self.args.gradient_accumulation_steps)
        for first in range(0, each, passes):
            held[first : first + passes] = self._sorted(held[first : first + passes])

    def _sorted(self, parts: Sequence[Batch]) -> list[Batch]:
        by_row = [name for name, value in parts[0].items() if torch.is_tensor(value) and value.dim()]
        joined = {name: torch.cat([part[name] for part in parts]) for name in by_row}
        spans = spans_of(joined["prompt_ids"], joined["prompt_mask"], joined["completion_mask"])
        size, columns = len(spans) // len(parts), joined["prompt_ids"].size(1)
        share = self._shares(columns + joined["completion_ids"].size(1))
        orders = [order_rows(spans, together) for together in ({False, share} if len(parts) > 1 else ())]
        if not orders:
            return list(parts)

        def price(order: list[int]) -> float:
            chunks = (order[first : first + size] for first in range(0, len(order), size))
            return sum(cost(lay_out(spans, chunk, columns, share, self._overhead), self._overhead) for chunk in chunks)

        best = torch.tensor(min(orders, key=price), device=joined["prompt_ids"].device)
        chunks = [best[i * size : (i + 1) * size] for i in range(len(parts))]
        return [{**part, **{name: joined[name][rows] for name in by_row}} for part, rows in zip(parts, chunks, strict=True)]

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, *args: Any, **options: Any
    ) -> Any:
        """TRL's method: (B, T) log-probabilities and entropies, 0 where masked.

        `moving` among the options: (B,) True for the rows whose gradient is wanted; all by default.
        """
        moving = options.pop("moving", None)
        if self.form is None:
            return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, logits_to_keep, *args, **options)
        columns = input_ids.size(1) - logits_to_keep
        mask = attention_mask[:, columns:].bool()
        spans = spans_of(input_ids[:, :columns], attention_mask[:, :columns], mask)
        rows = order_rows(spans, self._shares(input_ids.size(1)))
        size = options.get("batch_size") or (args[0] if args else None) or len(rows)
        chunks = [rows] if torch.is_grad_enabled() else [rows[first : first + size] for first in range(0, len(rows), size)]
        found = [self._run(model, input_ids, mask, spans, chunk, moving) for chunk in chunks]
        logps, entropies = (torch.stack(values).sum(dim=0) if len(values) > 1 else values[0] for values in zip(*found, strict=True))
        return logps, entropies, None

    def _run(
        self, model: Any, ids: torch.Tensor, mask: torch.Tensor, spans: Sequence[Span | None], rows: Sequence[int], moving: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One call of the model: some rows of a batch; the others stay 0."""
        moves = set(rows if moving is None else moving.nonzero().flatten().tolist()) if torch.is_grad_enabled() else set()
        columns = ids.size(1) - mask.size(1)

        def clusters(chosen: list[int]) -> list[Cluster]:
            return lay_out(spans, chosen, columns, self._shares(ids.size(1)), self._overhead)

        chosen = [clusters([row for row in rows if (row in moves) is wanted]) for wanted in (True, False)]
        if torch.is_grad_enabled():
            forwarded = sum(cluster.positions for part in chosen for cluster in part)
            self.measure("fast/positions", forwarded / ids.numel())
        lengths = [span.prompt if span else 0 for span in spans]
        with self.accelerator.autocast():
            logps, entropies = model(fast=Work(ids, mask, lengths, self.temperature, *chosen))
        return logps, entropies

    def _compute_loss(self, model: Any, inputs: Batch) -> torch.Tensor:
        if self.form is None:
            return super()._compute_loss(model, inputs)
        advantages, mask = inputs["advantages"], loss_mask(inputs)
        ids, attention = (torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1) for name in ("ids", "mask"))
        moving = None
        if not self.beta and not self.terms.entropy:
            moving = (advantages if advantages.dim() > 1 else advantages[:, None]).ne(0).any(dim=1)
        logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model, ids, attention, mask.size(1), compute_entropy=True, moving=moving
        )
        loss, sums = policy_loss(
            logps, inputs.get("old_per_token_logps"), advantages, mask, ref_logps=inputs.get("ref_per_token_logps"),
            **self._loss_options(inputs, mask),
        )  # fmt: skip
        with torch.no_grad():
            self._log_loss(sums, (entropies * mask).sum())
        return loss

    def _loss_options(self, inputs: Batch, mask: torch.Tensor) -> dict[str, Any]:
        """What `policy_loss` divides by, in a step of several micro-batches and processes, and the other settings."""
        args = self.args
        parts = self.current_gradient_accumulation_steps if self.model.training else 1
        tokens = mask.sum().clamp(min=1) * parts
        if self.loss_type in ("dapo", "cispo"):
            tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            tokens = tokens * parts / args.steps_per_generation if self.model.training else tokens
        return {
            "loss_type": "sum" if self.terms.plain_sum else self.loss_type, "epsilon": self.epsilon_low, "epsilon_high": self.epsilon_high,
            "beta": self.beta, "unbiased_kl": args.use_bias_correction_kl, "level": self.importance_sampling_level, "delta": args.delta,
            "rows": mask.size(0) * parts, "tokens": tokens, "max_tokens": self.max_completion_length,
        }  # fmt: skip

    def _log_loss(self, sums: dict[str, torch.Tensor], entropy: torch.Tensor) -> None:
        """TRL's metrics of the loss, under its names."""
        names = ("tokens", "count", "clip_low", "clip_high", "kl")
        own = torch.stack([sums.get(name, entropy.new_zeros(())).to(entropy.dtype) for name in names] + [entropy])
        tokens, count, low, high, kl, total = self.accelerator.reduce(own, reduction="sum").tolist()
        rows = self.accelerator.gather(torch.stack([sums["low_by_row"], sums["high_by_row"]], dim=1))
        rows = rows[~rows.isnan().any(dim=1)]
        tokens, count = max(tokens, 1.0), max(count, 1.0)
        found = {"entropy": total / tokens} | ({"kl": kl / tokens} if self.beta else {})
        if self.loss_type == "cispo":
            found["cispo_clip_ratio"] = high / count
        else:
            found |= {f"clip_ratio/{name}_mean": value / count for name, value in (("low", low), ("high", high), ("region", low + high))}
            found["clip_ratio/low_min"] = rows[:, 0].min().item() if len(rows) else math.nan
            found["clip_ratio/high_max"] = rows[:, 1].max().item() if len(rows) else math.nan
        for name, value in found.items():
            self.measure(name, value)
