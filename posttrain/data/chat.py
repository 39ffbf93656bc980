"""Rows to token ids, with a mask that says which tokens carry loss.

| row | format | ids | loss |
|---|---|---|---|
| text | any | text, eos | all |
| prompt + answer | plain | prompt, answer, eos | answer, eos |
| prompt + answer | chat | template(prompt turns, answer turn) | answer, end of turn |
| messages | chat | template(turns up to the last assistant turn) | each assistant turn with its end of turn |

The prompt part has the very ids that `render_prompt` gives a rollout engine. A sequence starts with one bos where the
tokenizer or the template writes one, and with none where neither does. Turns after the last assistant turn have nothing
to learn from and are left out, counted. Sequences over `max_length` are cut at the end; a row whose prompt alone fills
`max_length` is left out by its length. Refused as a whole: a template whose assistant turns do not end in a stop token,
since a model trained on it never learns to stop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from posttrain.data.rows import place_of, prompt_messages
from posttrain.data.spans import assistant_spans, lost_reasoning, render
from posttrain.data.strict_json import RowError
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from posttrain.config.common import DataConfig
    from posttrain.core.events import Events

Format = Literal["auto", "chat", "plain"]
SHOWN = 20


@dataclass(frozen=True)
class Encoded:
    """One training sequence.

    Args:
        input_ids: token ids, at most `max_length`.
        loss_mask: 1 where the token carries loss, else 0; same length.
        weight: the row's `weight`, 1.0 without one.
        id: of the row.
        notes: countable facts: `cut at max_length`, `turns after the last answer left out`, `reasoning not rendered`, `tools not rendered`.
    """

    input_ids: list[int]
    loss_mask: list[int]
    weight: float = 1.0
    id: str = ""
    notes: tuple[str, ...] = ()

    @property
    def supervised(self) -> int:
        """Tokens that are predicted and carry loss; the first token is never predicted."""
        return sum(self.loss_mask[1:])


def resolve_format(tokenizer: Any, format: Format) -> Literal["chat", "plain"]:
    """`auto` is chat where the tokenizer has a template.

    Raises:
        ConfigError: `chat` without a template.
    """
    if format == "auto":
        return "chat" if tokenizer.chat_template else "plain"
    if format == "chat" and not tokenizer.chat_template:
        raise ConfigError(f"the tokenizer {_name(tokenizer)} has no chat template", where="data.format", fix="set `data.template`, or `format: plain`")
    return format


def set_template(tokenizer: Any, path: str | Path, *, replace: bool) -> None:
    """Gives the tokenizer the Jinja template of a file.

    Args:
        tokenizer: changed in place.
        path: the template file.
        replace: whether another template may give way; only the first stage that holds a model may.

    Raises:
        ConfigError: unreadable, not Jinja, or a change where none is allowed.
    """
    import jinja2

    try:
        text = Path(path).read_text(encoding="utf-8")
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except (OSError, UnicodeDecodeError, jinja2.TemplateSyntaxError) as error:
        raise ConfigError(f"not a readable Jinja template: {error}", where=f"data.template ({path})") from None
    if tokenizer.chat_template and tokenizer.chat_template != text and not replace:
        raise ConfigError("the model already has another chat template", where="data.template", fix="set it in the first stage only")
    tokenizer.chat_template = text


def render_prompt(tokenizer: Any, row: dict[str, Any], format: Format = "auto") -> list[int]:
    """Token ids of what is asked, ready for the model to go on.

    Args:
        tokenizer: a transformers tokenizer.
        row: prompt, verifiable, preference or messages row.
        format: see DataConfig.

    Raises:
        DataError: the template refuses the turns, or nothing is left to send; names the row.
    """
    try:
        return _prompt_ids(tokenizer, row, resolve_format(tokenizer, format))
    except RowError as error:
        raise DataError(str(error), where=place_of(row), fix=error.fix) from None


def _prompt_ids(tokenizer: Any, row: dict[str, Any], format: str) -> list[int]:
    turns = prompt_messages(row)
    if format == "chat":
        ids = _chat_ids(tokenizer, render(tokenizer, turns, row.get("tools"), generation=True))
    elif len(turns) == 1 and turns[0]["role"] == "user":
        ids = _plain_ids(tokenizer, turns[0]["content"])
    else:
        raise RowError("needs a template", f"a prompt of {len(turns)} turns needs a chat template", "set `data.template`, or write the prompt as a string")
    if not ids:
        raise RowError("empty prompt", "the prompt is empty, and there is no begin token to start from", "drop the row")
    return ids


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    eos = tokenizer.eos_token_id
    if ids and ids[-1] == eos and not text.endswith(tokenizer.eos_token):
        ids.pop()
    return _one_bos(tokenizer, ids)


def _chat_ids(tokenizer: Any, text: str) -> list[int]:
    return _one_bos(tokenizer, _bare_ids(tokenizer, text))


def _bare_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """Exactly one bos where the tokenizer adds one by itself or the text brought one."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    while ids[:2] == [bos, bos]:
        ids = ids[1:]
    return [bos, *ids] if ids[:1] != [bos] and adds_bos(tokenizer) else ids


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts bos in front of plain text by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]


def encode_row(tokenizer: Any, row: dict[str, Any], data: DataConfig, *, stop_ids: Sequence[int] = ()) -> Encoded:
    """One row as ids and mask; see the module docstring.

    Args:
        tokenizer: a transformers tokenizer.
        row: text, verifiable or messages row; a prompt row only with `loss_on: all`.
        data: format, max_length, loss_on.
        stop_ids: stop tokens besides the tokenizer's eos, as in the generation config.

    Raises:
        DataError: the row cannot be used; names it.
        ConfigError: the template never writes a stop token, or there is none.
    """
    try:
        return _encoded(tokenizer, row, data, resolve_format(tokenizer, data.format), {tokenizer.eos_token_id, *stop_ids} - {None})
    except RowError as error:
        raise DataError(str(error), where=place_of(row), fix=error.fix) from None


def _encoded(tokenizer: Any, row: dict[str, Any], data: DataConfig, format: str, stops: set[int]) -> Encoded:
    notes: list[str] = []
    if "text" in row:
        ids = [*_plain_ids(tokenizer, row["text"]), _eos(tokenizer)]
        mask = [1] * len(ids)
    elif format == "plain":
        ids, mask = _plain_pair(tokenizer, row, data)
    else:
        ids, mask = _chat_row(tokenizer, row, data, stops, notes)
    if data.loss_on == "all":
        mask = [1] * len(ids)
    return _fitted(ids, mask, data.max_length, row, notes)


def _eos(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer {_name(tokenizer)} has no eos token, so the model cannot learn to stop", where="model", fix="set eos_token in its tokenizer_config.json")
    return tokenizer.eos_token_id


def _plain_pair(tokenizer: Any, row: dict[str, Any], data: DataConfig) -> tuple[list[int], list[int]]:
    if "messages" in row and len(row["messages"]) > 2:
        raise RowError("needs a template", "a conversation needs a chat template", "set `data.template`")
    prompt = _prompt_ids(tokenizer, row, "plain")
    answer = _answer(row, data)
    if answer is None:
        return prompt, [0] * len(prompt)
    target = [*_bare_ids(tokenizer, answer), _eos(tokenizer)]
    return prompt + target, [0] * len(prompt) + [1] * len(target)


def _answer(row: dict[str, Any], data: DataConfig) -> str | None:
    if "messages" in row:
        return row["messages"][-1]["content"]
    answer = row.get("answer")
    if isinstance(answer, str | int | float) and not isinstance(answer, bool):
        return str(answer)
    if answer is None and data.loss_on == "all":
        return None
    what = "a prompt without an answer" if answer is None else f"an answer of type {type(answer).__name__}"
    raise RowError("no answer text", f"{what} has nothing to learn from", "use rows with a text answer, or `loss_on: all`")


def _chat_row(tokenizer: Any, row: dict[str, Any], data: DataConfig, stops: set[int], notes: list[str]) -> tuple[list[int], list[int]]:
    turns = _turns_to_learn(row, data, notes)
    text, spans = assistant_spans(tokenizer, turns, row.get("tools"))
    if lost_reasoning(turns, text):
        notes.append("reasoning not rendered")
    if any(str(tool.get("function", tool).get("name", "")) not in text for tool in row.get("tools") or []):
        notes.append("tools not rendered")
    ids, mask, last = _masked(tokenizer, text, spans)
    if spans and not stops & set(last):
        raise _untrained_stop(tokenizer, text[spans[-1][0] : spans[-1][1]], stops)
    fixed = _one_bos(tokenizer, ids)
    shift = len(fixed) - len(ids)
    return fixed, [0] * shift + mask if shift >= 0 else mask[-shift:]


def _turns_to_learn(row: dict[str, Any], data: DataConfig, notes: list[str]) -> list[dict[str, Any]]:
    if "messages" not in row:
        answer = _answer(row, data)
        return [*prompt_messages(row), *([] if answer is None else [{"role": "assistant", "content": answer}])]
    turns = row["messages"]
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    if last < len(turns) - 1:
        notes.append("turns after the last answer left out")
    return turns[: last + 1]


def _untrained_stop(tokenizer: Any, end: str, stops: set[int]) -> ConfigError:
    names = ", ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(sorted(stops))) or "none"
    return ConfigError(
        f"untrained stop token: the chat template of {_name(tokenizer)} ends an assistant turn with {end[-12:]!r}, the stop tokens are {names}",
        where="data.template",
        fix="make the template's end-of-turn text the tokenizer's eos_token, or write eos_token in the template",
    )


def _masked(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int], list[int]]:
    """(ids, mask, ids of the last span). Text is cut only at starts whose prompt tokens would differ from a rollout's."""
    ids, starts = _ids_and_starts(tokenizer, text)
    cuts = [start for start, _ in spans if _bare_ids(tokenizer, text[:start]) != ids[: sum(s < start for s in starts)]]
    if cuts:
        pieces = [_ids_and_starts(tokenizer, text[a:b], a) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        joined = [token for piece, _ in pieces for token in piece]
        if tokenizer.decode(joined) == tokenizer.decode(ids):
            ids, starts = joined, [start for _, piece in pieces for start in piece]
    owner = [next((i for i, (a, b) in enumerate(spans) if a <= start < b), -1) for start in starts]
    last = [token for token, i in zip(ids, owner, strict=True) if i == len(spans) - 1]
    return ids, [int(i >= 0) for i in owner], last


def _ids_and_starts(tokenizer: Any, text: str, base: int = 0) -> tuple[list[int], list[int]]:
    if not tokenizer.is_fast:
        raise ConfigError(f"the tokenizer {_name(tokenizer)} gives no character offsets", where="model", fix="use its fast version (tokenizer.json)")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(found["input_ids"]), [base + start for start, _ in found["offset_mapping"]]


def _fitted(ids: list[int], mask: list[int], limit: int, row: dict[str, Any], notes: list[str]) -> Encoded:
    if len(ids) > limit:
        first = next((i for i, bit in enumerate(mask) if bit and i), len(ids))
        if first >= limit:
            raise TooLong(first, limit)
        ids, mask = ids[:limit], mask[:limit]
        notes.append("cut at max_length")
    encoded = Encoded(ids, mask, float(row.get("weight", 1.0)), str(row.get("id", "")), tuple(notes))
    if not encoded.supervised:
        raise RowError("nothing to learn", "not one token of the row carries loss", "drop the row; it has no text to learn")
    return encoded


class TooLong(RowError):
    """A prompt that alone reaches the limit."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__("prompt too long", f"the prompt alone has {tokens} tokens, the limit is {limit}", "raise the limit, or drop the row")
        self.tokens = tokens


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
        if len(self.lines) < SHOWN:
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
        (sequences, {"rows", "tokens", "supervised_tokens", "longest", "format", "left_out": {reason: n}, "examples", "notes": {note: n}}).

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
            found.append(_encoded(tokenizer, row, data, format, stops))
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
            ids = _prompt_ids(tokenizer, row, kind)
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
    report = {"rows": len(kept), "longest": max(map(len, prompts), default=0), "format": kind, "left_out": dict(tally.reasons), "examples": tally.lines[:5]}
    if events is not None and tally.reasons:
        events.warn(f"left out {tally.reasons.total()} prompts: {dict(tally.reasons)}", examples=report["examples"])
    return kept, prompts, report


def _name(tokenizer: Any) -> str:
    return Path(str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)).name
