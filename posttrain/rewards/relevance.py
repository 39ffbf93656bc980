"""Relevance alone: how near a completion's embedding is to the question's or the reference's.

A policy learns to please it by copying the question or by listing its words: use it to compare, as a small part of a sum,
or inside `r3`, which pays for new text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from posttrain.rewards._relevance import Similarity, embedder_of, queries, reference_text
from posttrain.rewards._relevance import relevance as relevance_of
from posttrain.rewards.registry import completion_text, count_failure, reward


@reward("relevance")
def relevance(
    completions: Sequence[Any],
    prompts: Sequence[Any] | None = None,
    answer: Sequence[Any] | None = None,
    query: Sequence[Any] | None = None,
    prompt: Sequence[Any] | None = None,
    *,
    to: Literal["query", "reference"] = "query",
    similarity: Similarity = "dot",
    embedder: Path | None = None,
    batch: int | None = None,
    max_length: int | None = None,
    **columns: Any,
) -> list[float | None]:
    """M(asked) . M(completion) for an encoder M; 0.0 for an empty completion.

    Args:
        completions: texts, or lists of messages.
        prompts, prompt, query: what was asked: `query` if given, else the last user turn.
        answer: references, for `to: reference`.
        to: what a completion is compared with.
        similarity: `dot` of the vectors as the encoder gives them, or `cosine`.
        embedder: folder of a local encoder (contriever, or a sentence-transformers folder); by default all-MiniLM-L6-v2 from the
            extra `embed`, whose vectors have unit length.
        batch, max_length: texts in one pass, tokens that are read of one; see `posttrain.models.sentences`.

    Returns:
        Values; None, and counted, without a reference (`no_reference`) and where the encoder gave no finite number (`not_finite`).
    """
    texts = [completion_text(completion) for completion in completions]
    wanted: list[str | None]
    if to == "query":
        wanted = list(queries("relevance", query, prompts, prompt))
    else:
        wanted = [reference_text(value) for value in (answer if answer is not None else [None] * len(texts))]
    rows = [i for i, other in enumerate(wanted) if other is not None]
    count_failure("relevance", "no_reference", len(texts) - len(rows))
    found = relevance_of(embedder_of(embedder, batch, max_length), [str(wanted[i]) for i in rows], [texts[i] for i in rows], similarity)
    count_failure("relevance", "not_finite", sum(value is None for value in found))
    values: list[float | None] = [None] * len(texts)
    for i, value in zip(rows, found, strict=True):
        values[i] = value
    return values
