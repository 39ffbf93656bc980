"""Format rewards: is the answer where a reader, or a verifier, looks for it?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.rewards._boxed import boxed_answers
from posttrain.rewards.registry import completion_text, reward


@reward("boxed_format")
def boxed_format(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    r"""1.0 where the completion holds exactly one non-empty `\boxed{...}`; else 0.0.

    Several boxes get 0.0, so that listing every candidate does not pay.
    """
    found = (boxed_answers(completion_text(completion)) for completion in completions)
    return [float(len(boxes) == 1 and bool(boxes[0].strip())) for boxes in found]
