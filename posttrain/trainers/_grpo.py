"""Group-relative policy optimization on TRL's GRPOTrainer, with our rollout engines.

For a group of G completions o_i of one row with rewards r_i, the advantage is A_i = (r_i - mean r) / (std r + 1e-4)
(`scale_rewards`), and TRL's clipped surrogate uses it for every token. A group is a row, never a prompt text.

Completions drawn by an engine come from the behaviour policy q, recomputed ones from the policy p. Where they differ,
the loss is corrected by weights on the advantages, (B,) -> (B, T):

    token_truncate   w_it = min(p(o_it) / q(o_it), cap)
    sequence_mask    w_i  = prod_t p(o_it) / q(o_it) if that is <= cap, else 0

which equals TRL's own correction, since w >= 0 commutes with the minimum of the clipped surrogate.

A request's noise is seeded by (seed, policy step, row id, pass over the data, index in the group): the same whatever
the number of processes, and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import trl
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler

from posttrain.errors import RewardError, RolloutError
from posttrain.rollout.base import Request, RolloutEngine, Sampling, request_seed
from posttrain.trainers._grpo_config import DynamicConfig
from posttrain.trainers._grpo_constrained import WithConstraint
from posttrain.trainers._grpo_fast import WithFast
from posttrain.trainers._grpo_metrics import Measured, weight_metrics
from posttrain.trainers._grpo_sampling import PASS, ROW_ID, TAG, DynamicSampler
from posttrain.trainers._grpo_terms import WithTerms
from posttrain.trainers._trl import Reliable, policy_logps

PROMPT_IDS = "prompt_token_ids"
CHECK_EVERY = 50
LIMITS = {torch.float32: 1e-3, torch.float64: 1e-6}
COARSE = 0.25


class ResumableRepeatSampler(RepeatSampler):
    """TRL's sampler, in the same order, that a resumed run can move to a later epoch.

    TRL's draws one permutation an epoch from a generator that starts anew in each process, so after a resume in epoch e
    it would replay epoch 0. Accelerate calls `set_epoch` before each pass; the permutations passed over are drawn here.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._epoch = self._drawn = 0

    def set_epoch(self, epoch: int) -> None:
        """Epoch of the next pass."""
        self._epoch = epoch

    def __iter__(self) -> Any:
        while self.shuffle and self._drawn < self._epoch:
            torch.randperm(self.num_samples, generator=self.generator)
            self._drawn += 1
        self._drawn += 1
        yield from super().__iter__()


class _SkipMasked(TrainerCallback):
    """Leaves the weights alone in a step whose completions are all masked: its gradient is 0, not information."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        items, self._trainer.window_items = self._trainer.window_items, 0
        if items == 0:
            for parameter in model.parameters():
                parameter.grad = None
        self._trainer._metrics["train"]["steps_skipped"].append(float(items == 0))


class GRPOTrainer(Measured, WithTerms, WithConstraint, WithFast, Reliable, trl.GRPOTrainer):
    """TRL's GRPOTrainer with complete checkpoints, the numerics guard, preemption, events, our rollout engines and terms.

    Its constructor is TRL's, plus:

    Args:
        events: see Reliable.
        terms: see WithTerms; None adds nothing to TRL.
        constrained: see WithConstraint; None draws freely.
        fast: see WithFast; False forwards with TRL.
        engine: None samples with TRL's own generation (neutral: every number is TRL's). Else a function
            (live model, tokenizer) -> RolloutEngine, e.g. `posttrain.rollout.hf.HFEngine`.
        correction: `none`, `token_truncate` or `sequence_mask`; see the module.
        correction_cap: cap of the ratio.
        dynamic: fills steps by dynamic sampling, see `_grpo_sampling.py`; the data loader then only sets the pace.
        prompts: rows that it samples from, and the seed of their order; the training set and the arguments' by default.

    A column `prompt_token_ids` gives the rendered prompt to the engine, `row_id` names the row; both are optional.
    Rewards of a completion that are all None leave it out of its group's mean; its advantage is 0, and it is counted.
    """

    _make_engine: Any

    def __init__(
        self,
        *args: Any,
        engine: Callable[[Any, Any], RolloutEngine] | None = None,
        correction: str = "none",
        correction_cap: float = 2.0,
        dynamic: DynamicConfig | None = None,
        prompts: tuple[Any, int] | None = None,
        **kwargs: Any,
    ) -> None:
        self._make_engine, self.correction, self.correction_cap = engine, correction, correction_cap
        self.engine: RolloutEngine | None = None
        self._rollout_inputs: list[dict[str, Any]] = []
        self.window_items, self._rollouts = 0, 0
        if engine is not None:
            kwargs["rollout_func"] = self._rollout
        self.assembles = dynamic is not None
        super().__init__(*args, **kwargs)
        rows, seed = prompts or (self.train_dataset, self.args.seed)
        self.dynamic = DynamicSampler(self, dynamic, rows, seed) if dynamic is not None else None
        self.add_callback(_SkipMasked(self))

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        given = super()._get_train_sampler(dataset)
        if type(given) is not RepeatSampler:
            return given
        return ResumableRepeatSampler(
            given.data_source, given.mini_repeat_count, given.batch_size, given.repeat_count, given.shuffle, given.seed
        )  # fmt: skip

    def _rollout(self, prompts: list[Any], _trainer: Any) -> dict[str, list[Any]]:
        """TRL's `rollout_func`: one completion for each prompt, which TRL has already repeated for the group."""
        model = self.accelerator.unwrap_model(self.model)
        if self.engine is None:
            self.engine = self._make_engine(model, self._tokenizer)
        self.engine.load_weights(model, self.state.global_step)
        requests = self.constrain(self._requests(prompts))
        done = self.engine.generate(requests)
        self._metrics["train" if model.training else "eval"]["rollout/version"].append(float(done[0].version))
        # TRL needs a token in every completion; one that ended before its first carries no loss (`weigh`).
        return {
            "prompt_ids": [list(c.prompt_ids) for c in done],
            "completion_ids": [list(c.token_ids) or [self._tokenizer.eos_token_id] for c in done],
            "logprobs": [list(c.logprobs) or [0.0] for c in done],
            **self.keep(requests, done),
        }

    def _requests(self, prompts: list[Any]) -> list[Request]:
        rows = self._rollout_inputs
        ids = [row[PROMPT_IDS] for row in rows] if rows and PROMPT_IDS in rows[0] else self._tokenize_prompts(prompts)[0]
        first = self.accelerator.process_index * len(prompts)
        sampling = Sampling(self.max_completion_length, self.temperature, self.top_p, self.top_k or 0)
        requests = []
        for i, prompt_ids in enumerate(ids):
            row = rows[i] if rows else {}
            name = str(row.get(ROW_ID, (first + i) // self.num_generations))
            seed = request_seed(self.args.seed, self.state.global_step, name, row.get(PASS, 0), (first + i) % self.num_generations)
            requests.append(Request(prompt_ids, seed, sampling, name))
        return requests

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.dynamic is not None and self.model.training:
            return self.dynamic.fill(self._generate_once)
        return self._generate_once(inputs)

    def _generate_once(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rollout_inputs = inputs
        output = super()._generate_and_score_completions(inputs)
        self.weigh(output)
        if self._make_engine is not None and self.model.training:
            self._compare(output)
        return output

    def _compare(self, output: dict[str, torch.Tensor]) -> None:
        """Compares sampled with recomputed log-probabilities; corrects the advantages, or stops where the gap is too large."""
        comparable = self.top_p >= 1 and not self.top_k
        check = comparable and self._rollouts % CHECK_EVERY == 0
        self._rollouts += 1
        if self.correction == "none" and not check:
            return
        mask = output["completion_mask"]
        policy = output.get("old_per_token_logps")
        policy = policy_logps(self, output) if policy is None else policy
        gap = (policy - output["sampling_per_token_logps"]) * mask
        if check:
            self._check_gap(gap, mask)
        if self.correction != "none":
            weights = correction_weights(gap, mask, self.correction, self.correction_cap)
            self._measure_weights(weights, gap, mask)
            output["advantages"] = output["advantages"].unsqueeze(1) * weights

    def _measure_weights(self, weights: torch.Tensor, gap: torch.Tensor, mask: torch.Tensor) -> None:
        ratio = gap if self.correction == "token_truncate" else gap.sum(dim=1, keepdim=True).expand_as(gap)
        kept, capped = (weights * mask).double(), (ratio.exp() > self.correction_cap) * mask
        sums = torch.stack([mask.sum().double(), kept.sum(), kept.square().sum(), capped.sum().double()])
        for name, value in weight_metrics(self.accelerator.reduce(sums, reduction="sum")).items():
            self.measure(name, value)

    def _check_gap(self, gap: torch.Tensor, mask: torch.Tensor) -> None:
        worst, mean = gap.abs().max(), gap.abs().sum() / mask.sum().clamp(min=1)
        worst, mean = self.accelerator.gather(torch.stack([worst, mean])).view(-1, 2).max(dim=0).values.tolist()
        self._metrics["train"]["rollout/logp_gap_max"].append(worst)
        self._metrics["train"]["rollout/logp_gap_mean"].append(mean)
        fine = self.model.dtype in LIMITS
        limit, found = (LIMITS[self.model.dtype], worst) if fine else (COARSE, mean)
        if found > limit:
            raise RolloutError(
                f"sampled and recomputed log-probabilities differ by {found:.3g} ({'largest' if fine else 'mean'}), limit {limit:g}",
                where=f"step {self.state.global_step + 1}",
                fix="the engine does not hold the policy's weights, or samples another distribution",
            )

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        infinite = rewards.isinf().any(dim=0).nonzero().flatten().tolist()
        if infinite:
            names = ", ".join(self.reward_func_names[i] for i in infinite)
            raise RewardError(
                f"reward `{names}` is infinite", where=f"step {self.state.global_step + 1}", fix="return None for what cannot be scored"
            )
        unscored = rewards.isnan().all(dim=1).sum().item()
        if unscored:
            self._metrics["train" if self.model.training else "eval"]["rewards/unscored"].append(float(unscored))
        return rewards

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if self.model.training:
            self.window_items += int(inputs["num_items_in_batch"])
        return super()._compute_loss(model, inputs)

    def own_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Forward passes done, and in the middle of a generation window its buffered rollouts."""
        values, tensors = super().own_state()
        values |= {"forward_passes": self._step, "rollouts": self._rollouts}
        if self._buffered_inputs and self._step % (self.args.steps_per_generation * self.num_iterations):
            tensors |= {
                f"{i}.{name}": value
                for i, part in enumerate(self._buffered_inputs)
                for name, value in part.items()
                if torch.is_tensor(value)
            }
        if self.dynamic is not None:
            values["dynamic"], held = self.dynamic.state()
            tensors |= held
        return values, tensors

    def restore_own_state(self, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Takes back the position in the generation window and its rollouts."""
        super().restore_own_state(values, tensors)
        self._step, self._rollouts = values["forward_passes"], values["rollouts"]
        if self.dynamic is not None:
            self.dynamic.restore(values["dynamic"], {name: tensors.pop(name) for name in list(tensors) if name.startswith(TAG)})
        parts: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            number, _, key = name.partition(".")
            parts.setdefault(int(number), {})[key] = tensor
        self._buffered_inputs = [parts[i] for i in sorted(parts)] or None


def correction_weights(gap: torch.Tensor, mask: torch.Tensor, mode: str, cap: float) -> torch.Tensor:
    """Weights (B, T) that carry samples of q over to p.

    Args:
        gap: (B, T) log p - log q, 0 where masked.
        mask: (B, T), 1 on completion tokens.
        mode: `token_truncate` or `sequence_mask`.
        cap: cap of the ratio.

    Returns:
        (B, T), TRL's `importance_sampling_ratio` broadcast to tokens.
    """
    if mode == "token_truncate":
        return gap.exp().clamp(max=cap)
    ratio = (gap * mask).sum(dim=1, keepdim=True).exp()
    return torch.where(ratio > cap, torch.zeros_like(ratio), ratio).expand_as(gap)
