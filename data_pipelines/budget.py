"""How much a selector may pick, and how it may spend it.

A budget cuts a total order of the rows: the best rows are taken until the next one would not fit, so a larger budget
always contains the smaller one. Words are those of the selector's own features (runs of letters and digits, and runs
of punctuation), which is about 0.75 of a language model's tokens in English text; no tokenizer is needed.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.base import Positive, Share, Strict

UNITS = ("rows", "tokens", "bytes", "share", "auto")


class Quota(Strict):
    """Shares of a budget by group; each group is cut by itself, and what one leaves unspent goes to the best rows of all groups."""

    by: str = "source"
    """`source`: the input's name; otherwise a column of the rows, whose value as text is the group (strata)."""
    shares: dict[str, Share] = Field(default={})
    """Group -> share of the budget; they sum to at most 1. Empty: each group's share of the raw rows (proportional strata)."""
    others: Literal["rest", "none"] = "rest"
    """Rows of groups that are not named: compete for what is left, or are not picked."""

    @model_validator(mode="after")
    def _at_most_all(self) -> Quota:
        if sum(self.shares.values()) > 1 + 1e-9:
            raise ValueError(f"quotas.shares: sum to {sum(self.shares.values()):g}, must be at most 1")
        return self


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
    auto: Literal[True] | None = None
    """As many rows as the selector itself finds best; only where it can (`select.tarot` with `rule: otm`)."""
    on_short: Literal["warn", "stop"] = "warn"
    """Fewer eligible rows than asked for: take them all and say so, or stop. Rows are never repeated to fill a budget."""

    @model_validator(mode="after")
    def _one_unit(self) -> Budget:
        given = [unit for unit in UNITS if getattr(self, unit) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of rows, tokens, bytes, share, auto; got {', '.join(given) or 'none'}")
        return self

    @property
    def unit(self) -> str:
        """The amount that is given: rows, tokens, bytes, share or auto."""
        return next(unit for unit in UNITS if getattr(self, unit) is not None)

    def amount(self, rows_in: int) -> int:
        """The limit as an integer: rows (also for a share of `rows_in`), tokens, or bytes."""
        if self.share is not None:
            return max(1, int(Decimal(str(self.share)) * rows_in))
        return int(getattr(self, self.unit))
