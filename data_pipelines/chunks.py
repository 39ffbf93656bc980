"""Cutting long rows into chunks that are selected by themselves.

A chunk is a slice of the row's text, from its first word to its last; words are those of `ngrams.WORD`. A row without a
word is one chunk, its text as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_pipelines.ngrams import WORD

Row = dict[str, Any]


def spans(text: str, words: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of the chunks of `words` words; the last may have fewer."""
    begin = end = count = 0
    for found in WORD.finditer(text):
        if count % words == 0:
            if count:
                yield begin, end
            begin = found.start()
        end, count = found.end(), count + 1
    yield (begin, end) if count else (0, len(text))


def chunks_of(row: Row, words: int) -> Iterator[tuple[int, Row]]:
    """(number from 0, row) of a text row's chunks; their ids are `ID#0`, `ID#1`, ..., their other columns the row's."""
    text = row["text"]
    for number, (begin, end) in enumerate(spans(text, words)):
        yield number, {**row, "text": text[begin:end], "id": f"{row['id']}#{number}"}
