"""Dynamic sampling and recent sample recovery (DAPO, 2503.14476; Confucius3-Math, 2506.18330).

A group whose rewards do not differ has advantages of 0 and teaches nothing. With `dynamic` on, a step of N groups is
filled by rounds of M:

    held = groups kept from earlier steps, oldest first; those older than max_age are discarded
    while |held| < N, at most max_rounds times:
        sample M groups, append those with max r - min r > tolerance
    train on held[:N]; keep held[N:]            (recover: false discards it: plain DAPO)

No round is sampled while a whole step is held. The published loop samples one in every step, so that its buffer grows
without bound once a round brings more than a step; here it holds fewer than M groups.

Rows come from our own stream, a permutation of the rows for each pass over them, which is a function of the seed and the
position alone; TRL's data loader only sets the pace. A group's advantages, hardness and corrections are computed in its
own round, by the policy that sampled it, and stay with it. All processes hold the same groups and decide the same from
gathered rewards, and a step's rows are shared out evenly after the filter. Age counts batches of rollouts; with
`num_iterations` or `steps_per_generation` several updates lie between two of them.

Old log-probabilities of a filled step are none (ratio 1: as published, "no importance correction") or the present policy's
for all its rows, as in verl's DAPO loop. What the sampler gave for recovered rows becomes NaN, which TRL reads as not
known: comparing it with a newer policy would measure age, not mismatch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from posttrain.errors import ConfigError, RolloutError
from posttrain.losses.advantages import failed_gates, totals
from posttrain.losses.hardness import correctness
from posttrain.trainers._grpo_config import DynamicConfig, dynamic_problem
from posttrain.trainers._train import epoch_permutation
from posttrain.trainers._trl import policy_logps

Batch = dict[str, torch.Tensor]
ROW_ID, PASS = "row_id", "row_pass"
PROMPT = {"prompt_ids": None, "prompt_mask": 0}
COMPLETION: dict[str, float | None] = {
    "completion_ids": None,
    "completion_mask": 0,
    "tool_mask": 1,
    "ref_per_token_logps": 0.0,
    "sampling_per_token_logps": 0.0,
    "advantages": 0.0,
}
"""Keys of a scored batch that have one column a token -> what they are padded with, None for the pad token."""
SCALAR = ("advantages", "hardness")
"""Keys with one value a completion."""
DERIVED = ("num_items_in_batch", "old_per_token_logps")
"""Keys that hold for a whole batch or one policy, and are computed anew."""
TAG = "group."


@dataclass(frozen=True)
class Group:
    """The completions of one row.

    Args:
        tensors: (G,), (G, P) or (G, T) by key, on the CPU, without columns that are padding in all of the group.
        born: batch of rollouts in which it was sampled, from 0.
        position: its place in the stream of rows.
    """

    tensors: Batch
    born: int
    position: int


class RowStream:
    """Rows in the order of one seeded permutation after another, each row once a pass.

    Args:
        rows: a sequence of dicts.
        seed: of the permutations.

    Attributes:
        position: rows taken so far.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], seed: int) -> None:
        self.rows, self.seed, self.position = rows, seed, 0
        self._pass, self._order = -1, [0]

    def take(self, count: int) -> list[dict[str, Any]]:
        """The next rows, as new dicts with `row_id` and `row_pass`."""
        taken = [self._row(self.position + i) for i in range(count)]
        self.position += count
        return taken

    def _row(self, position: int) -> dict[str, Any]:
        number, place = divmod(position, len(self.rows))
        if number != self._pass:
            self._pass, self._order = number, epoch_permutation(len(self.rows), number, self.seed)
        index = self._order[place]
        return {ROW_ID: str(index), **self.rows[index], PASS: number}


@dataclass(frozen=True)
class Verdict:
    """What the rewards of a round say of its groups, each (M,) True where it holds; `keep` excludes the others."""

    keep: torch.Tensor
    right: torch.Tensor
    wrong: torch.Tensor
    unscored: torch.Tensor


def judge(total: torch.Tensor, correct: torch.Tensor, group: int, tolerance: float) -> Verdict:
    """Which groups carry information.

    Args:
        total: (M * G,) rewards of a round on all processes, NaN where there is none.
        correct: (M * G,) +1, -1, NaN where not known.
        group: G.
        tolerance: a group is left out where its largest and smallest reward differ by no more.

    Returns:
        The groups to keep, and of those left out the ones with no wrong completion, the others, and those with no reward.
    """
    grouped, known = total.view(-1, group), ~total.isnan().view(-1, group)
    high = torch.where(known, grouped, -torch.inf).amax(dim=1)
    low = torch.where(known, grouped, torch.inf).amin(dim=1)
    scored = known.any(dim=1)
    keep = scored & (high - low > tolerance)
    signs = correct.view(-1, group)
    right = (signs > 0).any(dim=1) & ~(signs < 0).any(dim=1)
    return Verdict(keep, scored & ~keep & right, scored & ~keep & ~right, ~scored)


def pad_width(tensor: torch.Tensor, width: int, value: float, left: bool) -> torch.Tensor:
    """(B, W) -> (B, width) with `value` on one side."""
    missing = width - tensor.size(1)
    sides = (missing, 0) if left else (0, missing)
    return torch.nn.functional.pad(tensor, sides, value=value) if missing else tensor


def cut_group(batch: Batch, rows: slice, born: int, position: int) -> Group:
    """The rows of a batch that belong to one group, without their common padding."""
    width = batch["prompt_mask"][rows].any(dim=0).sum().item()
    used = batch["completion_mask"][rows].any(dim=0).nonzero()
    length = int(used[-1].item()) + 1 if len(used) else 1
    tensors = {}
    for key, value in batch.items():
        part = value[rows]
        if part.dim() > 1:
            part = part[:, part.size(1) - int(width) :] if key in PROMPT else part[:, :length]
        tensors[key] = part.detach().cpu().clone()
    return Group(tensors, born, position)


def join_groups(groups: Sequence[Group], rows: slice, pad_id: int, multiple: int | None = None) -> Batch:
    """Some rows of groups laid end to end: prompts padded on the left, completions on the right, to the longest group of these.

    Args:
        groups: with equal keys.
        rows: which of their rows, counted over all of them.
        pad_id: id of the pad token.
        multiple: widths are rounded up to a multiple of it.
    """
    size = len(next(iter(groups[0].tensors.values())))
    first = rows.start // size
    chosen = groups[first : -(-rows.stop // size)]
    inner = slice(rows.start - first * size, rows.stop - first * size)
    joined = {}
    for key in groups[0].tensors:
        parts = [group.tensors[key] for group in chosen]
        if parts[0].dim() > 1:
            width = max(part.size(1) for part in parts)
            width = -(-width // multiple) * multiple if multiple else width
            value = {**COMPLETION, **PROMPT}[key]
            parts = [pad_width(part, width, pad_id if value is None else value, key in PROMPT) for part in parts]
        joined[key] = torch.cat(parts)[inner]
    return joined


class DynamicSampler:
    """Fills the steps of a GRPOTrainer; see the module.

    Args:
        trainer: its arguments, reward weights and `terms` are read, and `score` must keep its `reward_matrix`.
        config: the fields of `dynamic`.
        rows: rows to sample from, as TRL takes them.
        seed: of their order.

    Attributes:
        held: groups that wait for a step, oldest first; the same on all processes.
        filled: batches of rollouts so far.
        counts: totals of the run.

    Raises:
        ConfigError: a round or a step that cannot be shared out to the processes, or settings that exclude one another.
    """

    def __init__(self, trainer: Any, config: DynamicConfig, rows: Sequence[dict[str, Any]], seed: int) -> None:
        self.trainer, self.config = trainer, config
        self.group, args = trainer.num_generations, trainer.args
        self.wanted = args.generation_batch_size // self.group
        self.round = config.round or self.wanted
        self.stream = RowStream(rows, seed)
        self.held: list[Group] = []
        self.filled, self.counts = 0, Counter[str]()
        self._check()

    def _check(self) -> None:
        args, world = self.trainer.args, self.trainer.accelerator.num_processes
        problem = dynamic_problem(self.config, self.trainer.num_iterations, self.trainer.scale_rewards, vars(args))
        window = args.steps_per_generation * self.trainer.num_iterations
        if self.config.old_logps == "none" and args.gradient_accumulation_steps % window:
            problem = problem or "old_logps: none needs one update for each batch of rollouts; use old_logps: recompute"
        if args.generation_batch_size % self.group:
            problem = problem or f"{args.generation_batch_size} completions a batch are no whole number of groups of {self.group}"
        if self.round % world:
            problem = problem or f"{self.round} groups a round cannot be shared equally by {world} processes; set round to a multiple"
        if not hasattr(self.stream.rows, "__len__"):
            problem = problem or "rows are drawn by number; give a dataset that can be indexed, not an iterable one"
        if problem:
            raise ConfigError(problem, where="dynamic")

    def fill(self, score: Callable[[list[dict[str, Any]]], Batch]) -> Batch:
        """This process's rows of the next step.

        Args:
            score: samples and scores rows that are already repeated for their group; called on all processes.

        Raises:
            RolloutError: `max_rounds` did not fill the step.
        """
        seen: Counter[str] = Counter()
        fresh = [group for group in self.held if self.filled - group.born <= self.config.max_age]
        seen["expired"], self.held = len(self.held) - len(fresh), fresh
        while len(self.held) < self.wanted and seen["rounds"] < self.config.max_rounds:
            self._round(score, seen)
        taken = self._take(seen)
        if not self.config.recover:
            seen["overflow"], self.held = len(self.held), []
        batch = self._assemble(taken)
        self._measure(seen, [self.filled - group.born for group in taken])
        self.filled += 1
        self.counts += seen
        return batch

    def _round(self, score: Callable[[list[dict[str, Any]]], Batch], seen: Counter[str]) -> None:
        """Samples one round and appends what carries information to `held`."""
        accelerator, first = self.trainer.accelerator, self.stream.position
        share = self.round // accelerator.num_processes
        rows = self.stream.take(self.round)[accelerator.process_index * share :][:share]
        batch = self._gathered(score([dict(row) for row in rows for _ in range(self.group)]))
        verdict = self._judge()
        seen["rounds"] += 1
        seen["sampled"] += self.round
        for name in ("right", "wrong", "unscored"):
            seen[name] += int(getattr(verdict, name).sum().item())
        for i in verdict.keep.nonzero().flatten().tolist():
            rows_of_it = slice(i * self.group, (i + 1) * self.group)
            if not batch["completion_mask"][rows_of_it].any():
                seen["masked"] += 1
                continue
            seen["accepted"] += 1
            self.held.append(cut_group(batch, rows_of_it, self.filled, first + i))

    def _judge(self) -> Verdict:
        trainer, terms, rewards = self.trainer, self.trainer.terms, self.trainer.reward_matrix
        total = totals(rewards, trainer.reward_weights.to(rewards.device), terms.gates, terms.gate_value)
        correct = correctness(rewards[:, terms.correct], terms.at_least, failed_gates(rewards, terms.gates))
        return judge(total, correct, self.group, self.config.tolerance)

    def _gathered(self, output: Batch) -> Batch:
        """A round's rows of all processes, in the order of the stream."""
        accelerator = self.trainer.accelerator
        foreign = output.keys() - {*PROMPT, *COMPLETION, *SCALAR, *DERIVED}
        if foreign:
            raise ConfigError(f"dynamic sampling does not support batches with {', '.join(sorted(foreign))}", where="dynamic")
        whole = {}
        for key in sorted(output.keys() - {*DERIVED}):
            value = output[key]
            if value.dim() > 1:
                fill = {**COMPLETION, **PROMPT}[key]
                fill = self.trainer.processing_class.pad_token_id if fill is None else fill
                value = accelerator.pad_across_processes(value, dim=1, pad_index=fill, pad_first=key in PROMPT)
            whole[key] = accelerator.gather(value)
        return whole

    def _take(self, seen: Counter[str]) -> list[Group]:
        """The groups of the step: N, or with `on_short: smaller` as many as can be shared out."""
        count = self.wanted
        if len(self.held) < count:
            parts = self.trainer.accelerator.num_processes * self.trainer.args.steps_per_generation
            unit = parts // math.gcd(parts, self.group)
            count = len(self.held) - len(self.held) % unit if self.config.on_short == "smaller" else 0
            if not count:
                raise self._short(seen)
            seen["short"] = 1
        taken, self.held = self.held[:count], self.held[count:]
        return taken

    def _short(self, seen: Counter[str]) -> RolloutError:
        left_out = f"{seen['right']} all right, {seen['wrong']} not right but all the same, {seen['unscored']} without a reward"
        advice = "easier rows" if seen["wrong"] >= seen["right"] else "harder rows"
        return RolloutError(
            f"{seen['rounds']} rounds of {self.round} groups left {len(self.held)} of the {self.wanted} groups of a step; left out: "
            f"{left_out}, {seen['masked']} cut at the limit",
            where=f"step {self.trainer.state.global_step + 1}",
            fix=f"give {advice}, a larger group, or more rounds (dynamic.max_rounds, dynamic.round)"
            + ("" if self.config.on_short == "smaller" else "; dynamic.on_short: smaller trains on what there is"),
        )

    def _assemble(self, taken: Sequence[Group]) -> Batch:
        """This process's rows of the step, with what holds for the whole step computed anew."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        share = len(taken) * self.group // accelerator.num_processes
        rows = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        batch = join_groups(taken, rows, trainer.processing_class.pad_token_id, trainer.pad_to_multiple_of)
        batch = {key: batch[key].to(accelerator.device) for key in (*PROMPT, *(batch.keys() - PROMPT.keys()))}
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        batch["num_items_in_batch"] = accelerator.gather(mask.sum()).sum()
        if "sampling_per_token_logps" in batch:
            old = torch.tensor([group.born < self.filled for group in taken]).repeat_interleave(self.group)[rows]
            batch["sampling_per_token_logps"][old.to(accelerator.device)] = torch.nan
        if self.config.old_logps == "recompute":
            batch["old_per_token_logps"] = policy_logps(trainer, batch)
        trainer.finish_step(batch)
        return batch

    def _measure(self, seen: Counter[str], ages: Sequence[int]) -> None:
        """Metrics of a filled step, by `dynamic/NAME`; see docs of the trainer's metrics."""
        values = {
            "rounds": seen["rounds"],
            "oversampling": seen["sampled"] / self.wanted,
            "recovered_share": sum(age > 0 for age in ages) / len(ages),
            "age_mean": sum(ages) / len(ages),
            "age_max": max(ages),
            "buffer": len(self.held),
            "groups": len(ages),
            **{name: seen[name] for name in ("right", "wrong", "unscored", "masked", "expired", "overflow", "short")},
        }
        if seen["sampled"]:
            values["accept_rate"] = seen["accepted"] / seen["sampled"]
        for name, value in values.items():
            self.trainer.measure(f"dynamic/{name}", float(value))
        self.trainer._metrics["train"]["dynamic/prompts"] = [float(self.stream.position)]

    def summary(self) -> dict[str, Any]:
        """Totals of the run."""
        sampled = self.counts["sampled"]
        return {
            "prompts": self.stream.position,
            "batches": self.filled,
            "oversampling": round(sampled / max(self.wanted * self.filled, 1), 4),
            "accept_rate": round(self.counts["accepted"] / sampled, 4) if sampled else None,
            **{name: self.counts[name] for name in ("rounds", "right", "wrong", "unscored", "masked", "expired", "overflow", "short")},
            "left": len(self.held),
        }

    def state(self) -> tuple[dict[str, Any], Batch]:
        """Cursor, counters and held groups: JSON values, and tensors named `group.NUMBER.KEY`."""
        values = {
            "position": self.stream.position,
            "filled": self.filled,
            "counts": dict(self.counts),
            "held": [[group.born, group.position] for group in self.held],
        }
        return values, {f"{TAG}{i}.{key}": value for i, group in enumerate(self.held) for key, value in group.tensors.items()}

    def restore(self, values: dict[str, Any], tensors: Batch) -> None:
        """Takes back what `state` gave."""
        self.stream.position, self.filled, self.counts = values["position"], values["filled"], Counter(values["counts"])
        parts: list[Batch] = [{} for _ in values["held"]]
        for name, tensor in tensors.items():
            number, key = name.removeprefix(TAG).split(".", 1)
            parts[int(number)][key] = tensor.cpu()
        self.held = [Group(part, born, position) for part, (born, position) in zip(parts, values["held"], strict=True)]
