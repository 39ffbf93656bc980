r"""Mathematical equivalence with the gold answer.

The answer is the content of the *last* `\boxed{}` of the completion; without a box, the whole completion if it is one short line
(64 characters). Text alone decides most pairs (`_math_text`, whose docstring states the policies); the rest goes to math-verify
in a jail (`sandbox`) that is killed when its time is up, so that a tower of powers can stop neither the batch nor a thread.

Whose fault it is decides the value: an answer that is missing or cannot be parsed is the model's, 0.0; a gold that is missing
or cannot be parsed is the data's, None; time-outs and crashes of the verifier are None. All but the first are counted.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from posttrain.errors import RewardError
from posttrain.rewards._boxed import unboxed
from posttrain.rewards._math_text import MAX_CHARS, decide
from posttrain.rewards.registry import completion_text, count_failure, reward
from posttrain.rewards.sandbox.jail import Limits
from posttrain.rewards.sandbox.pool import MATH, Outcome, Task, default_workers

BARE_CHARS = 64
MEMORY_MB = 2048
MOST_PAIRS = 16


def extract_answer(text: str) -> str | None:
    r"""Last boxed answer, else the whole text if it is one line of at most 64 characters, else None."""
    boxed = unboxed(text)
    if boxed is not None:
        return boxed
    bare = text.strip()
    return bare if bare and "\n" not in bare and len(bare) <= BARE_CHARS else None


def _from_text(gold: str, answer: str | None) -> float | None:
    """The value where the text alone tells it."""
    if not gold:
        return None
    if answer is None or len(answer) > MAX_CHARS:
        return 0.0
    verdict = decide(gold, answer)
    return None if verdict is None else float(verdict)


def _by_algebra(pairs: Sequence[tuple[str, str]], timeout_s: float, batch_timeout_s: float) -> list[tuple[float | None, str]]:
    """(value, reason why there is none) of each pair."""
    size = min(MOST_PAIRS, max(1, len(pairs) // (2 * default_workers())))
    tasks = [Task(items=pairs[at : at + size], apart=True) for at in range(0, len(pairs), size)]
    found = MATH.run(tasks, Limits(wall_s=timeout_s, memory_mb=MEMORY_MB), batch_timeout_s)
    return [_verdict(outcome) for outcomes in found for outcome in outcomes]


def _verdict(outcome: Outcome) -> tuple[float | None, str]:
    if outcome.status in ("timeout", "late"):
        return None, "timeout"
    if outcome.value == "answer":
        return 0.0, ""
    if isinstance(outcome.value, bool):
        return float(outcome.value), ""
    return None, "bad_gold" if outcome.value == "gold" else "error"


def require_math_verify() -> None:
    """Raises RewardError where math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise RewardError("the reward `math_exact` needs the package math-verify", fix="pip install math-verify, or use the reward `exact`")


@reward("math_exact", columns=("answer",))
def math_exact(
    completions: Sequence[Any], answer: Sequence[Any], *, timeout_s: float = 5.0, batch_timeout_s: float = 60.0, **columns: Any
) -> list[float | None]:
    r"""1.0 where the completion's answer equals `answer` mathematically, 0.0 where not, None where it could not be judged.

    Args:
        completions: texts, or lists of messages.
        answer: gold answers, LaTeX or plain; a gold with a box is unwrapped.
        timeout_s: wall-clock seconds for one pair.
        batch_timeout_s: seconds after which the undecided rest of the batch is None (counted as `timeout`).

    Raises:
        RewardError: math-verify is not installed.
    """
    require_math_verify()
    golds = ["" if gold is None else str(gold).strip() for gold in answer]
    golds = [inner if (inner := unboxed(gold)) is not None else gold for gold in golds]
    answers = [extract_answer(completion_text(completion)) for completion in completions]
    values = [_from_text(gold, text) for gold, text in zip(golds, answers, strict=True)]
    open_rows = [row for row, value in enumerate(values) if value is None and golds[row]]
    judged = _by_algebra([(golds[row], answers[row] or "") for row in open_rows], timeout_s, batch_timeout_s)
    for row, (value, reason) in zip(open_rows, judged, strict=True):
        values[row] = value
        if reason:
            count_failure("math_exact", reason)
    if bad := golds.count(""):
        count_failure("math_exact", "bad_gold", bad)
    return values
