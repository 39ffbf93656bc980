"""How much a selector may pick, and how it may spend it.

A budget cuts a total order of the rows: the best rows are taken until the next one would not fit, so a larger budget
always contains the smaller one. Words are those of the selector's own features (runs of letters and digits, and runs
of punctuation), which is about 0.75 of a language model's tokens in English text; no tokenizer is needed.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from posttrain.config.base import Positive, Share, Strict

UNITS = ("rows", "tokens", "bytes", "share")


class Budget(Strict):
    """Exactly one of the amounts."""

    rows: Positive | None = None
    """Rows to pick."""
    tokens: Positive | None = None
    """Word tokens to pick, as counted by the selector; never exceeded."""
    bytes: Positive | None = None
    """UTF-8 bytes of text to pick; never exceeded."""
    share: Share | None = None
    """Share of the raw rows, rounded down, at least one row."""
    on_short: Literal["warn", "stop"] = "warn"
    """Fewer eligible rows than asked for: take them all and say so, or stop. Rows are never repeated to fill a budget."""

    @model_validator(mode="after")
    def _one_unit(self) -> Budget:
        given = [unit for unit in UNITS if getattr(self, unit) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of rows, tokens, bytes, share; got {', '.join(given) or 'none'}")
        return self

    @property
    def unit(self) -> str:
        """The amount that is given: rows, tokens, bytes or share."""
        return next(unit for unit in UNITS if getattr(self, unit) is not None)

    def amount(self, rows_in: int) -> int:
        """The limit as an integer: rows (also for a share of `rows_in`), tokens, or bytes."""
        if self.share is not None:
            return max(1, int(self.share * rows_in))
        return int(getattr(self, self.unit))
