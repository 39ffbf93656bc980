"""Repetition: the share of different n-grams, and 0.0 for a text that ends in a loop. For a sum, or as a gate with `at_least`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.rewards._parts import record
from posttrain.rewards._words import loop_length, unique_share, units
from posttrain.rewards.registry import completion_text, reward


@dataclass(frozen=True)
class Repeated:
    """What is repeated in a text.

    Args:
        share: different n-grams over n-grams of words, in (0, 1]; 1.0 for fewer than n words.
        loop: characters of the end that repeat one unit; 0 if that is no loop.
    """

    share: float
    loop: int


def repeated(text: str, n: int = 3, loop_repeats: int = 4, loop_chars: int = 100) -> Repeated:
    """Measures `text` without outer white space.

    Words are runs of letters and digits, runs of other signs, and single Chinese and Japanese characters. A loop is an end of
    at least `loop_chars` characters that says one unit at least `loop_repeats` times; the unit may be cut at its beginning.
    Linear in the text's length.
    """
    text = text.strip()
    loop = loop_length(text, loop_repeats)
    return Repeated(unique_share(units(text), n), loop if loop >= loop_chars else 0)


@reward("repetition")
def repetition(
    completions: Sequence[Any], *, n: int = 3, loop_repeats: int = 4, loop_chars: int = 100, **columns: Any
) -> list[float | None]:
    """Different n-grams over n-grams of words, in (0, 1]; 0.0 where the text ends in a loop.

    With `n: 3` it is the repetition penalty of R3 but for loops and languages without spaces. The share falls with length, since
    a long text says common phrases again: for long texts raise `n`. Recorded: `loop`, 1.0 where there is one.

    Args:
        completions: texts, or lists of messages.
        n: words of an n-gram.
        loop_repeats: times that a loop says its unit, at least.
        loop_chars: its characters, at least.
    """
    found = [repeated(completion_text(completion), n, loop_repeats, loop_chars) for completion in completions]
    record("loop", [float(item.loop > 0) for item in found])
    return [0.0 if item.loop else item.share for item in found]
