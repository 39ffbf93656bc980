"""Relevance of texts to one another, and what it is measured against: for the rewards `relevance` and `r3`."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from posttrain.errors import RewardError

if TYPE_CHECKING:
    from posttrain.models.sentences import SentenceEmbedder

Similarity = Literal["dot", "cosine"]


@functools.cache
def embedder_of(folder: Path | None, batch: int | None, max_length: int | None) -> SentenceEmbedder:
    """The encoder in `folder` (None: the packaged one), loaded once a process."""
    from posttrain.models.encoder import PACKAGED
    from posttrain.models.sentences import SentenceEmbedder

    return SentenceEmbedder(PACKAGED if folder is None else str(folder), batch=batch, max_length=max_length)


def relevance(embedder: SentenceEmbedder, left: Sequence[str], right: Sequence[str], similarity: Similarity = "dot") -> list[float | None]:
    """M(left_i) . M(right_i), or its cosine, in float64 from the float32 vectors; None where the encoder gave no finite number."""
    import numpy as np

    if not left:
        return []
    vectors = embedder([*left, *right]).astype(np.float64)
    a, b = vectors[: len(left)], vectors[len(left) :]
    values = np.einsum("nd,nd->n", a, b)
    if similarity == "cosine":
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        values = np.where(norms == 0, 0.0, values / np.where(norms == 0, 1.0, norms))
    return [float(value) if math.isfinite(value) else None for value in values]


def queries(name: str, query: Sequence[Any] | None, prompts: Sequence[Any] | None, prompt: Sequence[Any] | None) -> list[str]:
    """Text of what was asked: the column `query`, else of each prompt its last user turn (a string is one).

    Raises:
        RewardError: there is neither.
    """
    given = next((column for column in (query, prompts, prompt) if column is not None), None)
    if given is None:
        raise RewardError(f"reward `{name}` needs the prompts, or a column `query`", fix="pass `prompts=`, one for each completion")
    return [_asked(item) for item in given]


def _asked(prompt: Any) -> str:
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        turns = [turn for turn in prompt if isinstance(turn, Mapping)]
        users = [turn for turn in turns if turn.get("role") == "user"] or turns
        return str(users[-1].get("content") or "") if users else ""
    return "" if prompt is None else str(prompt)


def reference_text(value: Any) -> str | None:
    """Text of a gold answer (a string, a number, or messages); None where there is none or it is blank."""
    if value is None:
        return None
    if isinstance(value, Sequence) and not isinstance(value, str) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content") or ""
    return str(value) if str(value).strip() else None
