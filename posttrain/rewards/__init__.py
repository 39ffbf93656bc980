"""Rewards: plain functions `f(completions, **columns) -> list[float | None]`, one file each.

To add one, write a file here (or in a plugin package) with a function under `@reward("name")`; it can then be named in YAML.
"""

from posttrain.rewards._parts import collecting, record
from posttrain.rewards.registry import (
    Reward,
    Scores,
    checked_options,
    completion_text,
    count_failure,
    failed_rows,
    failures,
    find_reward,
    get_reward,
    known_rewards,
    reward,
    score,
)

__all__ = [
    "Reward",
    "Scores",
    "checked_options",
    "collecting",
    "completion_text",
    "count_failure",
    "failed_rows",
    "failures",
    "find_reward",
    "get_reward",
    "known_rewards",
    "record",
    "reward",
    "score",
]
