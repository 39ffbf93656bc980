"""Preference rows as token ids: a prompt and an answer, split where the answer begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from posttrain.core.context import StageContext
from posttrain.data.chat import encode_rows
from posttrain.data.rows import prompt_messages
from posttrain.models.save import stop_ids

Answer = tuple[list[int], int]
"""Token ids of prompt and answer, and how many are the prompt's."""


def with_answer(row: dict[str, Any], side: Literal["chosen", "rejected"]) -> dict[str, Any]:
    """The row as a conversation that ends in one of its answers; `messages` rows are theirs already."""
    if "messages" in row:
        return row
    kept: dict[str, Any] = {name: row[name] for name in ("id", "tools") if name in row}
    if isinstance(row["prompt"], str) and isinstance(row[side], str):
        return {"prompt": row["prompt"], "answer": row[side], **kept}
    turns = row[side] if isinstance(row[side], list) else [{"role": "assistant", "content": row[side]}]
    return {"messages": [*prompt_messages(row), *turns], **kept}


def encode_answers(
    cfg: Any, ctx: StageContext, rows: Sequence[dict[str, Any]], side: Literal["chosen", "rejected"], model: Any, tokenizer: Any
) -> dict[str, Answer]:
    """Row id -> prompt and answer; rows that cannot be used are left out or stop the stage, as `data.on_bad` says.

    Raises:
        DataError: rows that cannot be used.
    """
    stops = stop_ids(model, tokenizer) or []
    stops = stops if isinstance(stops, list) else [stops]
    encoded, report = encode_rows(tokenizer, (with_answer(row, side) for row in rows), cfg.data, stop_ids=stops, events=ctx.events)
    ctx.summary.setdefault("encoding", {})[side] = report
    return {item.id: (item.input_ids, _answer_start(item.loss_mask)) for item in encoded}


def _answer_start(mask: Sequence[int]) -> int:
    """Where the last stretch of tokens with loss begins: the last assistant turn."""
    end = max(i for i, bit in enumerate(mask) if bit)
    return next((i + 1 for i in range(end, -1, -1) if not mask[i]), 0)
