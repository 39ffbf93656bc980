"""Counting of rows that are left out, by reason and with examples."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.strict_json import RowError
from posttrain.errors import DataError

ALIKE = 3


@dataclass
class BadRows:
    """Rows left out, counted by reason, with the first `keep` of them (three of a reason); `first` is (where, message, fix)."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    keep: int = 5
    first: tuple[str, str, str] = ("", "", "")

    @property
    def total(self) -> int:
        """All rows left out."""
        return sum(self.counts.values())

    def take(self, error: RowError, where: str, on_bad: str) -> None:
        """Raises a DataError naming `where` under `stop`; counts under `skip`."""
        if on_bad == "stop":
            raise DataError(str(error), where=where, fix=error.fix or "mend the row, or set `on_bad: skip`") from None
        self.counts[error.reason] += 1
        self.first = self.first if self.examples else (where, str(error), error.fix)
        if len(self.examples) < self.keep and self.counts[error.reason] <= ALIKE:
            self.examples.append(f"{where}: {error}")

    def report(self) -> dict[str, Any]:
        """JSON-ready: total, by reason, first examples."""
        return {"total": self.total, "reasons": dict(sorted(self.counts.items())), "examples": self.examples}

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.counts.items()))
