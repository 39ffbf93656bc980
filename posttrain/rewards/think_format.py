"""A filter for completions that think before they answer, as Confucius3-Math describes it (arXiv 2506.18330, section on rewards).

There a completion is rewarded for its answer only if it passes checks of format and repetition on both the thinking part and
the answer part; how the checks are made is not given, so what follows is ours. Use it with `role: gate`: then a completion
that fails gets `gate_value` in place of the sum of rewards.

    format       `<think>` once, at the start; `</think>` once; words in the thinking; an answer after it
    repetition   in each part the share of different n-grams is at least `unique`, and the part does not end in a loop

Why n = 10 and half of them: any long derivation says short phrases again, so its share of different trigrams falls with its
length; ten words in a row seldom come back, while a passage written k times has a share of 1/k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from posttrain.rewards._boxed import boxed_answers
from posttrain.rewards._parts import record
from posttrain.rewards.registry import completion_text, reward
from posttrain.rewards.repetition import repeated


def split_thinking(text: str, opening: str, closing: str, opened_by: str = "completion") -> tuple[str, str] | None:
    """(thinking, answer) without outer white space, or None where the tags are not as they should be.

    Args:
        text: the completion.
        opening, closing: the tags.
        opened_by: `completion`: it starts with the opening tag, and has it once; `prompt`: it must not have it.
    """
    thinking, found, answer = text.partition(closing)
    if not found or closing in answer or opening in answer:
        return None
    thinking = thinking.strip()
    if opened_by == "completion":
        if not thinking.startswith(opening):
            return None
        thinking = thinking[len(opening) :]
    return None if opening in thinking else (thinking.strip(), answer.strip())


@reward("think_format")
def think_format(
    completions: Sequence[Any],
    *,
    opening: str = "<think>",
    closing: str = "</think>",
    opened_by: Literal["completion", "prompt"] = "completion",
    boxed: bool = False,
    n: int = 10,
    unique: float = 0.5,
    loop_repeats: int = 4,
    loop_chars: int = 100,
    **columns: Any,
) -> list[float | None]:
    r"""1.0 for a completion with one thinking part and an answer, neither of them repetitive; else 0.0.

    A completion that was cut while thinking has no closing tag and gets 0.0. Recorded: `format`, and where that is right
    `repetition` (1.0 = both parts pass).

    Args:
        completions: texts, or lists of messages.
        opening, closing: tags of the thinking part.
        opened_by: `prompt` where the chat template already writes the opening tag, so that the completion must not.
        boxed: the answer part must hold exactly one non-empty `\boxed{...}`.
        n, unique: words of an n-gram, and the smallest share of different ones; 0 turns this check off.
        loop_repeats, loop_chars: what a loop is; see `repetition`.
    """
    formed: list[float | None] = []
    varied: list[float | None] = []
    for completion in completions:
        parts = split_thinking(completion_text(completion), opening, closing, opened_by)
        fine = parts is not None and all(parts) and (not boxed or _one_box(parts[1]))
        formed.append(float(fine))
        found = [repeated(part, n, loop_repeats, loop_chars) for part in parts] if parts is not None and fine else []
        varied.append(float(all(not item.loop and item.share >= unique for item in found)) if found else None)
    record("format", formed)
    record("repetition", varied)
    return [float(value == 1.0) for value in varied]


def _one_box(answer: str) -> bool:
    boxes = boxed_answers(answer)
    return len(boxes) == 1 and bool(boxes[0].strip())
