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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from posttrain.data.prompts import bare_ids, one_bos, plain_ids, prompt_ids, resolve_format, tokenizer_name
from posttrain.data.rows import place_of, prompt_messages
from posttrain.data.spans import assistant_spans, lost_reasoning
from posttrain.data.strict_json import RowError
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from posttrain.config.common import DataConfig


@dataclass(frozen=True)
class Encoded:
    """One training sequence.

    Args:
        input_ids: token ids, at most `max_length`.
        loss_mask: 1 where the token carries loss, else 0; same length.
        weight: the row's `weight`, 1.0 without one.
        id: of the row.
        notes: countable facts: `cut at max_length`, `turns after the last answer left out`, `reasoning not rendered`, `tools not rendered`.
        ends: whether a stop token carries loss; None where the row has no answer that should end in one.
    """

    input_ids: list[int]
    loss_mask: list[int]
    weight: float = 1.0
    id: str = ""
    notes: tuple[str, ...] = ()
    ends: bool | None = None

    @property
    def supervised(self) -> int:
        """Tokens that are predicted and carry loss; the first token is never predicted."""
        return sum(self.loss_mask[1:])


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
        return encoded(tokenizer, row, data, resolve_format(tokenizer, data.format), {tokenizer.eos_token_id, *stop_ids} - {None})
    except RowError as error:
        raise DataError(str(error), where=place_of(row), fix=error.fix) from None


def encoded(tokenizer: Any, row: dict[str, Any], data: DataConfig, format: str, stops: set[int]) -> Encoded:
    """One row as tokens; `format` is settled (`chat` or `plain`), `stops` are the tokens that end a turn. Raises RowError."""
    notes: list[str] = []
    if "text" in row:
        ids = [*plain_ids(tokenizer, row["text"]), _eos(tokenizer)]
        mask = [1] * len(ids)
    elif format == "plain":
        ids, mask = _plain_pair(tokenizer, row, data)
    else:
        ids, mask = _chat_row(tokenizer, row, data, stops, notes)
    if data.loss_on == "all":
        mask = [1] * len(ids)
    fitted = _fitted(ids, mask, data.max_length, row, notes)
    if "text" in row or data.loss_on == "all":
        return fitted
    targets = {token for token, bit in zip(fitted.input_ids[1:], fitted.loss_mask[1:], strict=True) if bit}
    return replace(fitted, ends=not stops.isdisjoint(targets))


def _eos(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer {tokenizer_name(tokenizer)} has no eos token, so the model cannot learn to stop",
            where="model",
            fix="set eos_token in its tokenizer_config.json",
        )
    return int(tokenizer.eos_token_id)


def _plain_pair(tokenizer: Any, row: dict[str, Any], data: DataConfig) -> tuple[list[int], list[int]]:
    if "messages" in row and len(row["messages"]) > 2:
        raise RowError("needs a template", "a conversation needs a chat template", "set `data.template`")
    prompt = prompt_ids(tokenizer, row, "plain")
    answer = _answer(row, data)
    if answer is None:
        return prompt, [0] * len(prompt)
    target = [*bare_ids(tokenizer, answer), _eos(tokenizer)]
    return prompt + target, [0] * len(prompt) + [1] * len(target)


def _answer(row: dict[str, Any], data: DataConfig) -> str | None:
    if "messages" in row:
        return str(row["messages"][-1]["content"])
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
    fixed = one_bos(tokenizer, ids)
    shift = len(fixed) - len(ids)
    return fixed, [0] * shift + mask if shift >= 0 else mask[-shift:]


def _turns_to_learn(row: dict[str, Any], data: DataConfig, notes: list[str]) -> list[dict[str, Any]]:
    if "messages" not in row:
        answer = _answer(row, data)
        return [*prompt_messages(row), *([] if answer is None else [{"role": "assistant", "content": answer}])]
    turns: list[dict[str, Any]] = row["messages"]
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    if last < len(turns) - 1:
        notes.append("turns after the last answer left out")
    return turns[: last + 1]


def _untrained_stop(tokenizer: Any, end: str, stops: set[int]) -> ConfigError:
    names = ", ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(sorted(stops))) or "none"
    return ConfigError(
        f"untrained stop token: the chat template of {tokenizer_name(tokenizer)} ends an assistant turn with "
        f"{end[-12:]!r}, the stop tokens are {names}",
        where="data.template",
        fix="make the template's end-of-turn text the tokenizer's eos_token, or write eos_token in the template",
    )


def _masked(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int], list[int]]:
    """(ids, mask, ids of the last span). Text is cut only at starts whose prompt tokens would differ from a rollout's."""
    ids, starts = _ids_and_starts(tokenizer, text)
    cuts = [start for start, _ in spans if bare_ids(tokenizer, text[:start]) != ids[: sum(s < start for s in starts)]]
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
        raise ConfigError(
            f"the tokenizer {tokenizer_name(tokenizer)} gives no character offsets",
            where="model",
            fix="use its fast version (tokenizer.json)",
        )
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
        super().__init__(
            "prompt too long", f"the prompt alone has {tokens} tokens, the limit is {limit}", "raise the limit, or drop the row"
        )
        self.tokens = tokens
