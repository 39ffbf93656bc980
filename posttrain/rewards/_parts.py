"""Parts of a reward that are reported beside its value: what a product, or a filter, was made of.

A reward calls `record("relevance", values)` with one value a completion. Who scores collects them (`collecting`): the trainer
logs each part's mean as `reward/NAME/PART` and shows it beside sample completions; `score` returns them. Where nobody
collects, recording costs nothing. Safe from any thread, since each has its own collection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

Parts = dict[str, list[float | None]]

_OPEN: ContextVar[Parts | None] = ContextVar("parts", default=None)


def record(part: str, values: Sequence[float | None]) -> None:
    """Reports `part` of the completions being scored, in order; None where it does not apply to a completion.

    Args:
        part: name, without a slash.
        values: one a completion.
    """
    parts = _OPEN.get()
    if parts is not None:
        parts[part] = [None if value is None else float(value) for value in values]


@contextmanager
def collecting() -> Iterator[Parts]:
    """Yields the parts that are recorded inside the block, {part: values}."""
    parts: Parts = {}
    token = _OPEN.set(parts)
    try:
        yield parts
    finally:
        _OPEN.reset(token)


def join(rows: Sequence[Mapping[str, Sequence[float | None]]]) -> Parts:
    """Parts of completions that were scored one at a time: `rows[i]` holds those of completion i, or nothing where it failed."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row[name][0] if row.get(name) else None for row in rows] for name in names}
