r"""Mathematical equivalence with the gold answer.

The answer is the content of the *last* `\boxed{}` of the completion; without a box, the whole completion if it is one short line
(64 characters). Text alone decides most pairs (`_math_text`, whose docstring states the policies); the rest goes to math-verify
in a child process that is killed when its time is up, so that a tower of powers can stop neither the batch nor a thread.

Whose fault it is decides the value: an answer that is missing or cannot be parsed is the model's, 0.0; a gold that is missing
or cannot be parsed is the data's, None; time-outs and crashes of the verifier are None. All but the first are counted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from posttrain.rewards._boxed import unboxed
from posttrain.rewards._math_process import SHARED, require_math_verify
from posttrain.rewards._math_text import MAX_CHARS, decide
from posttrain.rewards.registry import completion_text, count_failure, reward

BARE_CHARS = 64


def extract_answer(text: str) -> str | None:
    r"""Last boxed answer, else the whole text if it is one line of at most 64 characters, else None."""
    boxed = unboxed(text)
    if boxed is not None:
        return boxed
    bare = text.strip()
    return bare if bare and "\n" not in bare and len(bare) <= BARE_CHARS else None


def _judge(gold: str, answer: str | None, timeout_s: float) -> tuple[float | None, str]:
    if answer is None or len(answer) > MAX_CHARS:
        return 0.0, ""
    verdict = decide(gold, answer)
    if verdict is not None:
        return float(verdict), ""
    found = SHARED.compare(gold, answer, timeout_s)
    if isinstance(found, bool):
        return float(found), ""
    if found == "answer":
        return 0.0, ""
    return None, {"gold": "bad_gold", "timeout": "timeout"}.get(found, "error")


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
    values: list[float | None] = []
    deadline = time.monotonic() + batch_timeout_s
    for completion, gold in zip(completions, answer, strict=True):
        text = "" if gold is None else str(gold).strip()
        inner = unboxed(text)
        text = text if inner is None else inner
        if not text:
            value, reason = None, "bad_gold"
        else:
            left = min(timeout_s, max(0.0, deadline - time.monotonic()))
            value, reason = _judge(text, extract_answer(completion_text(completion)), left)
        if reason:
            count_failure("math_exact", reason)
        values.append(value)
    return values
