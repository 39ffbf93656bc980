"""Whole lists of rows to token ids, before the first step: every unusable row is found, counted and named at once.

`encode` holds the rules for one row, `prompts` those for a prompt; their public names are also reached from here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from posttrain.data.encode import Encoded, TooLong, encode_row, encoded
from posttrain.data.prompts import Format, adds_bos, prompt_ids, render_prompt, resolve_format, set_template
from posttrain.data.rows import place_of
from posttrain.data.strict_json import RowError
from posttrain.errors import DataError

if TYPE_CHECKING:
    from posttrain.config.common import DataConfig
    from posttrain.core.events import Events

__all__ = [
    "Encoded",
    "Format",
    "adds_bos",
    "encode_row",
    "encode_rows",
    "render_prompt",
    "resolve_format",
    "scan_prompts",
    "set_template",
]


SHOWN, ALIKE = 20, 5


@dataclass
class _Tally:
    """Rows left out while a list is worked through; under `stop` one error names them all."""

    what: str
    on_bad: str
    reasons: Counter[str]
    lines: list[str]
    longest: int = 0

    def take(self, row: dict[str, Any], error: RowError) -> None:
        self.reasons[error.reason] += 1
        self.longest = max(self.longest, getattr(error, "tokens", 0))
        if len(self.lines) < SHOWN and self.reasons[error.reason] <= ALIKE:
            self.lines.append(f"{place_of(row)}: {error}")

    def finish(self, kept: int) -> None:
        bad = self.reasons.total()
        if not bad or (kept and self.on_bad == "skip"):
            return
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(self.reasons.items()))
        long = f"; the longest prompt has {self.longest} tokens" if self.longest else ""
        more = [f"... and {bad - len(self.lines)} more"] if bad > len(self.lines) else []
        message = "\n  ".join([f"{bad} of {bad + kept} rows cannot be used ({counts}{long})", *self.lines, *more])
        fix = "mend these rows, or set `on_bad: skip`" if kept else "not one row is left: check limit, format and template"
        raise DataError(message, where=self.what, fix=fix)


def encode_rows(
    tokenizer: Any,
    rows: Iterable[dict[str, Any]],
    data: DataConfig,
    on_bad: Literal["stop", "skip"] | None = None,
    *,
    stop_ids: Sequence[int] = (),
    events: Events | None = None,
) -> tuple[list[Encoded], dict[str, Any]]:
    """All rows as ids and masks, and a report.

    Args:
        tokenizer, rows, data, stop_ids: as `encode_row`.
        on_bad: default `data.on_bad`. Under `stop` one error names all unusable rows, except prompts that are too long
            where other rows fit: those are always left out and counted.
        events: progress, and the counts as a log line.

    Returns:
        (sequences, {"rows", "tokens", "supervised_tokens", "longest", "format", "left_out": {reason: n}, "examples", "notes": {note: n},
        "answers": rows with an answer, "stops_trained": those of them in which a stop token carries loss}).

    Raises:
        DataError: unusable rows under `stop`, or not one usable row; with the longest prompt and the limit.
        ConfigError: as `encode_row`.
    """
    format = resolve_format(tokenizer, data.format)
    stops = {tokenizer.eos_token_id, *stop_ids} - {None}
    rows = list(rows)
    tally = _Tally(f"data (max_length {data.max_length})", on_bad or data.on_bad, Counter(), [])
    found: list[Encoded] = []
    for done, row in enumerate(rows, 1):
        try:
            found.append(encoded(tokenizer, row, data, format, stops))
        except RowError as error:
            tally.take(row, error)
        if events is not None:
            events.progress("tokenize", done, len(rows), "rows")
    if found and set(tally.reasons) <= {"prompt too long"}:
        tally.on_bad = "skip"
    tally.finish(len(found))
    report = _report(found, format, tally)
    if events is not None:
        _log(events, report)
    return found, report


def _report(found: list[Encoded], format: str, tally: _Tally) -> dict[str, Any]:
    return {
        "rows": len(found),
        "tokens": sum(len(e.input_ids) for e in found),
        "supervised_tokens": sum(e.supervised for e in found),
        "longest": max((len(e.input_ids) for e in found), default=0),
        "format": format,
        "left_out": dict(sorted(tally.reasons.items())),
        "examples": tally.lines[:5],
        "notes": dict(sorted(Counter(note for e in found for note in e.notes).items())),
        "answers": sum(e.ends is not None for e in found),
        "stops_trained": sum(bool(e.ends) for e in found),
    }


def _log(events: Events, report: dict[str, Any]) -> None:
    events.log(f"{report['rows']} sequences, {report['tokens']} tokens, {report['supervised_tokens']} of them carry loss")
    for reason, count in report["left_out"].items():
        events.warn(f"left out {count} rows: {reason}", examples=report["examples"])
    for note, count in report["notes"].items():
        events.warn(f"{count} rows: {note}")


def scan_prompts(
    tokenizer: Any,
    rows: Iterable[dict[str, Any]],
    *,
    format: Format = "auto",
    max_prompt: int | None = None,
    on_bad: Literal["stop", "skip"] = "stop",
    events: Events | None = None,
) -> tuple[list[dict[str, Any]], list[list[int]], dict[str, Any]]:
    """Renders every prompt before the first step, so that no row fails hours later; nothing is ever cut from the left.

    Args:
        tokenizer, format: as `render_prompt`.
        rows: prompt, verifiable or messages rows.
        max_prompt: longest prompt in tokens; none = no limit.
        on_bad: `stop` raises one error that names all unusable rows with tokens and limit; `skip` leaves them out.
        events: progress and counts.

    Returns:
        (usable rows, their prompt ids, {"rows", "longest", "format", "left_out": {reason: n}, "examples"}).

    Raises:
        DataError: unusable rows under `stop`, or not one usable row.
    """
    kind, rows = resolve_format(tokenizer, format), list(rows)
    tally = _Tally(f"prompts (max_prompt {max_prompt})", on_bad, Counter(), [])
    kept: list[dict[str, Any]] = []
    prompts: list[list[int]] = []
    for done, row in enumerate(rows, 1):
        try:
            ids = prompt_ids(tokenizer, row, kind)
            if max_prompt is not None and len(ids) > max_prompt:
                raise TooLong(len(ids), max_prompt)
        except RowError as error:
            tally.take(row, error)
        else:
            kept.append(row)
            prompts.append(ids)
        if events is not None:
            events.progress("scan prompts", done, len(rows), "rows")
    tally.finish(len(kept))
    report = {
        "rows": len(kept),
        "longest": max(map(len, prompts), default=0),
        "format": kind,
        "left_out": dict(tally.reasons),
        "examples": tally.lines[:5],
    }
    if events is not None and tally.reasons:
        events.warn(f"left out {tally.reasons.total()} prompts: {dict(tally.reasons)}", examples=report["examples"])
    return kept, prompts, report
