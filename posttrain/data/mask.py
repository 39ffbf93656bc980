"""The loss mask for human eyes: the first training sequences as text, the tokens that carry loss between ⟦ and ⟧.

What is shown is made from the token ids and the mask that the trainer gets, so a mask that is wrong is seen to be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from posttrain.errors import DataError

SHOWN = 2
LONG = 400
OPEN, CLOSE = "⟦", "⟧"


def loss_runs(tokenizer: Any, input_ids: Sequence[int], loss_mask: Sequence[Any]) -> list[tuple[str, bool, int]]:
    """A sequence as runs of tokens with and without loss.

    Args:
        tokenizer: a transformers tokenizer.
        input_ids, loss_mask: of one sequence, equally long. The first token is never predicted, so it never carries loss.

    Returns:
        (text, carries loss, tokens) of each run, in order; special tokens are written out.
    """
    bits = [bool(bit) and place > 0 for place, bit in enumerate(loss_mask)]
    runs: list[tuple[str, bool, int]] = []
    start = 0
    for bit, group in groupby(bits):
        end = start + len(list(group))
        runs.append((_text(tokenizer, input_ids, start, end), bit, end - start))
        start = end
    return runs


def _text(tokenizer: Any, ids: Sequence[int], start: int, end: int) -> str:
    """Text of a part, as it stands after what is before it (some decoders drop a space in front)."""
    before, whole = (tokenizer.decode(list(ids[:stop]), clean_up_tokenization_spaces=False) for stop in (start, end))
    if whole.startswith(before):
        return str(whole[len(before) :])
    return str(tokenizer.decode(list(ids[start:end]), clean_up_tokenization_spaces=False))


def marked(runs: Sequence[tuple[str, bool, int]]) -> str:
    """One line: the runs with loss between ⟦ and ⟧, line breaks written as \\n, long runs shortened in their middle."""
    return "".join(f"{OPEN}{_short(text)}{CLOSE}" if loss else _short(text) for text, loss, _ in runs)


def _short(text: str) -> str:
    half = LONG // 2
    cut = text if len(text) <= LONG else f"{text[:half]} … {len(text) - LONG} characters … {text[-half:]}"
    return cut.replace("\r", "\\r").replace("\n", "\\n")


def shown_rows(tokenizer: Any, encoded: Sequence[Any], count: int = SHOWN) -> list[dict[str, Any]]:
    """The first sequences with their mask.

    Args:
        tokenizer: a transformers tokenizer.
        encoded: training sequences (`Encoded`).
        count: how many.

    Returns:
        {"row": its id, "tokens", "loss": tokens that carry loss, "text": as `marked`} of each.
    """
    found = []
    for item in encoded[:count]:
        runs = loss_runs(tokenizer, item.input_ids, item.loss_mask)
        loss = sum(length for _, carries, length in runs if carries)
        found.append({"row": item.id, "tokens": len(item.input_ids), "loss": loss, "text": marked(runs)})
    return found


def told(shown: Sequence[dict[str, Any]]) -> list[str]:
    """Lines for a log or a terminal."""
    lines = []
    for place, row in enumerate(shown, 1):
        lines.append(f"sequence {place}, {row['loss']} of {row['tokens']} tokens carry loss, {OPEN}these{CLOSE}: {row['text']}")
    return lines


def check_stops(report: dict[str, Any], where: str) -> None:
    """Refuses data in which no answer ends: a model trained on it would never learn to stop.

    Args:
        report: of `encode_rows`.
        where: dotted path of the length limit.

    Raises:
        DataError: there are answers, and in none of them does a stop token carry loss.
    """
    if report["answers"] and not report["stops_trained"]:
        raise DataError(
            f"the stop token carries loss in none of {report['answers']} answers, so the model cannot learn to stop; "
            f"{report['notes'].get('cut at max_length', 0)} are cut at the limit",
            where=where,
            fix="raise data.max_length, or drop the rows that are longer",
        )
