"""Exact string match: for tasks whose answer has one spelling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.rewards.registry import completion_text, count_failure, reward


@reward("exact", columns=("answer",))
def exact(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """1.0 where the completion, stripped of outer white space, equals `answer` stripped likewise; else 0.0.

    A row without an answer (None) is None and counted.
    """
    values: list[float | None] = []
    for completion, gold in zip(completions, answer, strict=True):
        if gold is None:
            count_failure("exact", "no_answer")
            values.append(None)
        else:
            values.append(float(completion_text(completion).strip() == str(gold).strip()))
    return values
