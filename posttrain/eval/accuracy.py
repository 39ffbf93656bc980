"""Verified accuracy: greedy, sampled, and pass@k, each with an interval over rows.

A completion is right where its reward is at least 1. A completion that could not be judged (None) counts in neither numerator
nor denominator; how many there were is reported. Noise is keyed by (seed, set, row, sample), so that the same set before and
after a stage is sampled with the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.eval.intervals import Value, pass_at_k, pass_ks, rate
from posttrain.rewards import get_reward
from posttrain.rollout.base import Completion, Request, RolloutEngine, Sampling, request_seed

RIGHT = 1.0


def verdicts(
    reward: str, completions: Sequence[Completion], rows: Sequence[dict[str, Any]], options: dict[str, Any] | None = None
) -> list[bool | None]:
    """Whether each completion is right; `rows[i]` is the row behind completion i."""
    columns = {name: [row.get(name) for row in rows] for name in {key for row in rows for key in row}}
    values = get_reward(reward, options)([completion.text for completion in completions], **columns)
    return [None if value is None else value >= RIGHT for value in values]


def accuracy_values(
    engine: RolloutEngine,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[dict[str, Any]],
    *,
    metrics: Sequence[str],
    reward: str = "exact",
    reward_options: dict[str, Any] | None = None,
    samples: int = 1,
    max_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    name: str = "",
) -> dict[str, Value]:
    """Metrics of verifiable rows.

    Args:
        engine: draws the completions.
        prompts: rendered prompts, one a row.
        rows: the rows; their columns go to the reward.
        metrics: out of `accuracy` (gives `accuracy`, greedy, and `accuracy_sampled`) and `pass@k`.
        reward, reward_options: its name, and its options.
        samples: sampled completions a row.
        max_tokens, temperature: of the samples.
        seed, name: key the noise.

    Returns:
        `{"accuracy", "accuracy_sampled", "pass@1", ...: value}`, with `unjudged` where completions could not be judged.
    """
    greedy = Sampling(max_tokens, 0.0) if "accuracy" in metrics else None
    sampled = Sampling(max_tokens, temperature)
    wanted = [(i, Request(p, 0, greedy, str(rows[i]["id"]))) for i, p in enumerate(prompts) if greedy]
    first = len(wanted)
    for i, prompt in enumerate(prompts):
        ids = [request_seed(seed, name, rows[i]["id"], k) for k in range(samples)]
        wanted += [(i, Request(prompt, own, sampled, str(rows[i]["id"]))) for own in ids]
    found = verdicts(reward, engine.generate([request for _, request in wanted]), [rows[i] for i, _ in wanted], reward_options)
    values: dict[str, Value] = {}
    if greedy:
        values["accuracy"] = rate([float(right) for right in found[:first] if right is not None])
    judged = [[right for right in found[at : at + samples] if right is not None] for at in range(first, len(found), samples)]
    judged = [row for row in judged if row]
    if greedy:
        values["accuracy_sampled"] = rate([sum(row) / len(row) for row in judged])
    if "pass@k" in metrics:
        values.update(_pass_values(judged, samples))
    unjudged = sum(right is None for right in found)
    if unjudged:
        values["unjudged"] = {"value": unjudged, "low": None, "high": None, "n": len(found)}
    return values


def _pass_values(judged: Sequence[Sequence[bool]], samples: int) -> dict[str, Value]:
    return {f"pass@{k}": rate([pass_at_k(len(row), sum(row), k) for row in judged if len(row) >= k]) for k in pass_ks(samples)}
