"""A policy of 0.2 million parameters, verifiable tasks from easy to hard, and a short loop of reinforcement around the framework's parts.

Sampling of groups, the buffer, advantages, hardness, the policy loss and the entropy term are those of `method: grpo`
(`DynamicSampler`, `posttrain.losses`); only the model and what calls them are small, so that a run takes seconds and many
seeds can be had. Answers are unique, so accuracy is exact: the probability of the right answer under the policy at
temperature 1, with no sampling noise; pass@8 is the mean of 1 - (1 - p)^8; greedy is whether every token of the answer is the likeliest.

Tasks: sums of 1, 2 and 3 digits, reversal of 3 and 4 digits, counting a letter. Prompts are split by hash. The policy is first
taught by supervision with a fifth of the answers wrong, to about a third of right samples.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from posttrain.losses.advantages import advantages
from posttrain.losses.entropy import side_of, targeted_entropy
from posttrain.losses.hardness import correctness, hardness_weight
from posttrain.losses.policy import policy_loss

CHARACTERS = ".0123456789+=RCab"
END, PAD = 0, len(CHARACTERS)
PROMPT, ANSWER = 8, 5
"""Longest prompt and answer, in tokens, the end token included."""
WIDTH, LAYERS, HEADS = 96, 2, 4
GROUP, GROUPS = 8, 32
RATE, CLIP = 3e-4, 1.0
TASKS = ("add1", "add2", "add3", "reverse3", "reverse4", "count")
ROWS = {"train": 1500, "validation": 60, "test": 100}
"""Of each task, at most; there are fewer sums of one digit."""
TAUGHT, WRONG, TEACH_STEPS = 0.35, 0.2, 3000

Rows = list[dict[str, Any]]


def problem(task: str, rng: random.Random) -> tuple[str, str]:
    """(prompt, answer) of a task."""
    if task == "count":
        text = "".join(rng.choice("ab") for _ in range(rng.randint(2, 6)))
        return f"C{text}=", str(text.count("a"))
    digits = int(task[-1])
    if task.startswith("reverse"):
        text = "".join(rng.choice("0123456789") for _ in range(digits))
        return f"R{text}=", text[::-1]
    a, b = (rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1) for _ in range(2))
    return f"{a}+{b}=", str(a + b)


def part_of(prompt: str) -> str:
    """The part of the data a prompt belongs to, by its hash."""
    place = hashlib.sha256(prompt.encode()).digest()[0]
    return "test" if place < 40 else "validation" if place < 64 else "train"


@functools.lru_cache(1)
def tasks() -> dict[str, Rows]:
    """Part -> its rows {prompt, answer, task}, the same in every run."""
    rng, parts = random.Random(0), {part: [] for part in ROWS}
    for task in TASKS:
        seen: dict[str, dict[str, str]] = {}
        for _ in range(20_000):
            prompt, answer = problem(task, rng)
            seen.setdefault(prompt, {"prompt": prompt, "answer": answer, "task": task})
        for part, most in ROWS.items():
            parts[part] += [row for row in seen.values() if part_of(row["prompt"]) == part][:most]
    return parts


class Block(torch.nn.Module):
    """Attention and a feed-forward layer, each after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """float32[B, T, WIDTH]."""
        rows, size, _ = x.shape
        q, k, v = self.qkv(self.first(x)).view(rows, size, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        x = x + self.out(seen.transpose(1, 2).reshape(rows, size, WIDTH))
        return x + self.narrow(torch.nn.functional.gelu(self.wide(self.second(x))))


class Policy(torch.nn.Module):
    """A causal transformer; positions are counted from the first token that is not padding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(PAD + 1, WIDTH)
        self.places = torch.nn.Embedding(PROMPT + ANSWER, WIDTH)
        self.layers = torch.nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.head = torch.nn.Linear(WIDTH, PAD)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits float32[B, T, 17] of ids int64[B, T], padded on the left."""
        real, size = ids != PAD, ids.size(1)
        places = (real.cumsum(1) - 1).clamp(min=0)
        allowed = torch.ones(size, size, dtype=torch.bool).tril()[None] & real[:, None, :] | torch.eye(size, dtype=torch.bool)
        x = self.tokens(ids) + self.places(places)
        for layer in self.layers:
            x = layer(x, allowed[:, None])
        return self.head(self.norm(x))


def encode(texts: Sequence[str], width: int, left: bool) -> torch.Tensor:
    """int64[B, width] of texts, padded."""
    rows = [[CHARACTERS.index(c) for c in text] for text in texts]
    return torch.tensor([[PAD] * (width - len(row)) * left + row + [PAD] * (width - len(row)) * (not left) for row in rows])


def answered(policy: Policy, prompts: torch.Tensor, answers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities, entropies) float32[B, T] of the tokens of answers, in nats; 0 where padded."""
    ids = torch.cat([prompts, answers], 1)
    logs = policy(ids)[:, PROMPT - 1 : -1].log_softmax(-1)
    mask = answers != PAD
    taken = logs.gather(2, answers.clamp(max=PAD - 1)[..., None])[..., 0]
    return taken * mask, -(logs.exp() * logs).sum(-1) * mask


@torch.no_grad()
def exact(policy: Policy, rows: Rows) -> dict[str, torch.Tensor]:
    """`p` float32[n], the probability of each right answer, and `greedy` bool[n]."""
    prompts, answers = encode([r["prompt"] for r in rows], PROMPT, True), encode([r["answer"] + "." for r in rows], ANSWER, False)
    logs = policy(torch.cat([prompts, answers], 1))[:, PROMPT - 1 : -1].log_softmax(-1)
    mask = answers != PAD
    taken = logs.gather(2, answers.clamp(max=PAD - 1)[..., None])[..., 0]
    return {"p": (taken * mask).sum(1).exp(), "greedy": ((logs.argmax(-1) == answers) | ~mask).all(1)}


def measured(policy: Policy, part: str) -> dict[str, float]:
    """Exact `pass@1`, `pass@8` and `greedy` on a part of the tasks."""
    found = exact(policy, tasks()[part])
    p = found["p"].double()
    return {"pass@1": p.mean().item(), "pass@8": (1 - (1 - p) ** 8).mean().item(), "greedy": found["greedy"].double().mean().item()}


@torch.no_grad()
def drawn(policy: Policy, prompts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """int64[B, 5]: one answer each at temperature 1, through its end token or to the limit; then padding."""
    ids = torch.cat([prompts, torch.full((len(prompts), ANSWER), PAD)], 1)
    open_ = torch.arange(len(prompts))
    for at in range(PROMPT, PROMPT + ANSWER):
        chosen = torch.multinomial(policy(ids[open_, :at])[:, -1].softmax(-1), 1, generator=generator)[:, 0]
        ids[open_, at] = chosen
        open_ = open_[chosen != END]
        if not len(open_):
            break
    return ids[:, PROMPT:]


def taught(seed: int) -> tuple[Policy, int]:
    """(policy after supervision, steps it took): to `TAUGHT` on the validation part, or for `TEACH_STEPS`."""
    torch.manual_seed(seed)
    rng, policy = random.Random(seed), Policy()
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3)
    for step in range(1, TEACH_STEPS + 1):
        rows = rng.choices(tasks()["train"], k=128)
        texts = [(rng.choice(rows) if rng.random() < WRONG else row)["answer"] + "." for row in rows]
        answers = encode(texts, ANSWER, False)
        logs, _ = answered(policy, encode([row["prompt"] for row in rows], PROMPT, True), answers)
        loss = -logs.sum() / (answers != PAD).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 and measured(policy, "validation")["pass@1"] >= TAUGHT:
            break
    return policy, step


@functools.lru_cache(1)
def start(seed: int) -> Policy:
    """The taught policy of a seed, kept in the folder for temporary files; do not change it."""
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    path = Path(tempfile.gettempdir()) / f"posttrain-rl-toy-{version}" / f"{seed}.safetensors"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        mine = path.with_name(f"{seed}.{os.getpid()}")
        save_file(taught(seed)[0].state_dict(), mine)
        mine.replace(path)
    policy = Policy()
    policy.load_state_dict(load_file(path))
    return policy


def started(seed: int) -> dict[str, float]:
    """What the taught policy of a seed can do; a cell of every benchmark, made before the others."""
    return measured(start(seed), "test")


@dataclass(frozen=True)
class Setting:
    """One way to reinforce.

    Args:
        steps: updates.
        dynamic: fields of `method: grpo`'s `dynamic`, or None for all groups as they come.
        alpha: of the hardness weight; None is none.
        normalise: hardness with mean 1 over a step.
        weigh: other weight of a group by its share of right completions, with mean 1; in place of `alpha`.
        entropy: (side of the term, coefficient, target); sides are `both` (ours) and `below` (TRL's controller: the coefficient
            rises by `DELTA` in a step below the target and falls in one above it, where it is not applied).
        push: times the entropy is subtracted from the loss: a disturbance.
        shuffle: another seed of the rows' order and of the sampling.
        every: steps between measurements on the validation part.
    """

    steps: int = 80
    dynamic: dict[str, Any] | None = None
    alpha: float | None = None
    normalise: bool = False
    weigh: Callable[[torch.Tensor], torch.Tensor] | None = None
    entropy: tuple[str, float, float] | None = None
    push: float = 0.0
    shuffle: int = 0
    every: int = 5


DELTA, MOST = 0.05, 1.0
"""Step and cap of the one-sided controller. TRL's own step of 0.005 cannot reach its cap in so few updates."""


@dataclass
class Run:
    """A reinforced policy and what was seen on the way."""

    policy: Policy
    curve: list[dict[str, float]] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


class Reinforcement:
    """The loop; it stands where `DynamicSampler` expects its trainer."""

    def __init__(self, seed: int, setting: Setting) -> None:
        from posttrain.trainers._grpo_config import DynamicConfig
        from posttrain.trainers._grpo_sampling import DynamicSampler, RowStream

        self.setting, self.policy = setting, copy.deepcopy(start(seed))
        self.generator = torch.Generator().manual_seed(1000 * seed + setting.shuffle)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), RATE, weight_decay=0.0)
        self.coefficient = 0.0
        self._stand()
        order = 1000 * seed + setting.shuffle
        self.sampler = (
            DynamicSampler(self, DynamicConfig(**setting.dynamic), tasks()["train"], order) if setting.dynamic is not None else None
        )
        self.stream = self.sampler.stream if self.sampler else RowStream(tasks()["train"], order)

    def _stand(self) -> None:
        """What the sampler reads of a trainer: one process, one update a batch of rollouts, one reward."""
        self.num_generations, self.num_iterations, self.scale_rewards = GROUP, 1, "none"
        self.args = SimpleNamespace(generation_batch_size=GROUP * GROUPS, steps_per_generation=1, gradient_accumulation_steps=1)
        self.accelerator = SimpleNamespace(
            num_processes=1, process_index=0, device=torch.device("cpu"), gather=lambda x: x, pad_across_processes=lambda x, **_: x
        )
        self.terms = SimpleNamespace(gates={}, gate_value=-1.0, correct=0, at_least=1.0)
        self.reward_weights, self.processing_class, self.pad_to_multiple_of = torch.ones(1), SimpleNamespace(pad_token_id=PAD), None
        self.state = SimpleNamespace(global_step=0)
        self._metrics: dict[str, dict[str, Any]] = {"train": {}}
        self.seen: dict[str, float] = {}
        self.reward_matrix = torch.zeros(0, 1)

    def measure(self, name: str, value: float) -> None:
        """Keeps a metric of the step."""
        self.seen[name] = value

    def finish_step(self, batch: dict[str, torch.Tensor]) -> None:
        """Weights with mean 1 over the step that was put together."""
        weight = batch.pop("hardness", None)
        if weight is not None:
            batch["advantages"] = batch["advantages"] / weight.mean()

    def score(self, rows: Rows) -> dict[str, torch.Tensor]:
        """Samples and scores rows that are already repeated for their group."""
        prompts = encode([row["prompt"] for row in rows], PROMPT, True)
        answers = drawn(self.policy, prompts, self.generator)
        wanted = encode([row["answer"] + "." for row in rows], ANSWER, False)
        self.reward_matrix = (2.0 * (answers == wanted).all(1) - 1)[:, None]
        right = correctness(self.reward_matrix[:, 0])
        weight = self._weight(right)
        found, _ = advantages(self.reward_matrix, self.reward_weights, GROUP, "none", hardness=weight)
        batch = {
            "prompt_ids": prompts, "prompt_mask": (prompts != PAD).long(), "completion_ids": answers,
            "completion_mask": (answers != PAD).long(), "advantages": found,
        }  # fmt: skip
        return {**batch, "hardness": weight} if weight is not None and (self.setting.normalise or self.setting.weigh) else batch

    def _weight(self, right: torch.Tensor) -> torch.Tensor | None:
        if self.setting.weigh is not None:
            share = (right.view(-1, GROUP).mean(1) + 1) / 2
            return self.setting.weigh(share).repeat_interleave(GROUP)
        return None if self.setting.alpha is None else hardness_weight(right, GROUP, self.setting.alpha)

    def batch(self) -> dict[str, torch.Tensor]:
        """The next step's rows."""
        if self.sampler is not None:
            return self.sampler.fill(self.score)
        batch = self.score([dict(row) for row in self.stream.take(GROUPS) for _ in range(GROUP)])
        self.finish_step(batch)
        return batch

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The plain double sum over the completions of the step, and the entropy term; notes the entropy."""
        prompts = torch.nn.functional.pad(batch["prompt_ids"], (PROMPT - batch["prompt_ids"].size(1), 0), value=PAD)
        mask = batch["completion_mask"].float()
        logps, entropies = answered(self.policy, prompts, batch["completion_ids"].masked_fill(mask == 0, PAD))
        loss, _ = policy_loss(logps, None, batch["advantages"], mask, loss_type="sum")
        mean = (entropies * mask).sum() / mask.sum()
        self.seen["entropy"] = mean.item()
        loss = loss - self.setting.push * mean
        if self.setting.entropy is None:
            return loss
        side, coefficient, target = self.setting.entropy
        if side == "both":
            at = side_of(mean.item(), target)
            return loss + targeted_entropy(entropies, mask, target, coefficient, side=at, tokens=mask.sum())
        below = mean.item() < target
        applied = self.coefficient if mean.item() <= target else 0.0
        self.coefficient = min(MOST, max(0.0, self.coefficient + (DELTA if below else -DELTA)))
        return loss - applied * mean

    def step(self) -> None:
        """One update."""
        batch = self.batch()
        self.optimizer.zero_grad()
        self.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), CLIP)
        self.optimizer.step()
        self.state.global_step += 1


def reinforced(seed: int, setting: Setting) -> Run:
    """Reinforces the taught policy of a seed."""
    loop = Reinforcement(seed, setting)
    run = Run(loop.policy, [{"step": 0, "prompts": 0, **measured(loop.policy, "validation")}])
    for step in range(1, setting.steps + 1):
        loop.seen = {}
        loop.step()
        run.steps.append({"step": step, "prompts": loop.stream.position, **loop.seen})
        if step % setting.every == 0 or step == setting.steps:
            run.curve.append({"step": step, "prompts": loop.stream.position, **measured(loop.policy, "validation")})
    run.summary = loop.sampler.summary() if loop.sampler else {"prompts": loop.stream.position}
    return run


def column(steps: list[dict[str, float]], name: str) -> Iterator[float]:
    """A metric of the steps that have it."""
    return (step[name] for step in steps if name in step)
