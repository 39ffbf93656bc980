"""Length as a reward: to keep answers from collapsing, or, with a negative weight, from growing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.rewards.registry import completion_text, reward

FULL_WORDS = 100


@reward("length")
def length(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """min(words, 100) / 100, in [0, 1]; words are runs of non-space characters. Give it a negative weight to reward brevity."""
    return [min(len(completion_text(completion).split()), FULL_WORDS) / FULL_WORDS for completion in completions]
