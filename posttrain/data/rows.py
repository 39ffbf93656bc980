"""Row types: what a row must hold, and the key that says which rows are the same task.

A row is a plain dict. `normalise` checks it against its type and gives it an `id`; other columns are kept as they were.
`row_key` hashes what the model is *asked* (the prompt, all turns before the last assistant turn, or the text), never the
answer, so the same question is in the same part of a split in every file, format and row type.

Rules of a conversation: roles are system, developer, user, assistant, tool; `content` is text (a list of text parts is
joined; null counts as missing); only an assistant turn with `tool_calls` or `reasoning_content` may lack it, and then it
becomes ""; `arguments` of a tool call written as JSON text become the object they stand for, all others stay verbatim.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from posttrain.data.strict_json import RowError, parse
from posttrain.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")


class Row(dict[str, Any]):
    """A row that knows where it was read (`file:row`), for messages; the place is no column and is never written."""

    __slots__ = ("where",)

    def __init__(self, *args: Any, where: str = "") -> None:
        super().__init__(*args)
        self.where = where


def place_of(row: dict[str, Any]) -> str:
    """`file:row` where it is known, else the row's id."""
    return getattr(row, "where", "") or f"row {row.get('id', '?')}"


def normalise(row: dict[str, Any], kind: str, where: str, columns: dict[str, str] | None = None) -> dict[str, Any]:
    """The row in its normal form: the keys of its type first, then `id`, then its other columns.

    Args:
        row: as read.
        kind: row type.
        where: `file:row`, for the error.
        columns: our field -> their column.

    Raises:
        DataError: the row is not of this type.
    """
    try:
        return checked(row, kind, columns)
    except RowError as error:
        raise DataError(str(error), where=where, fix=error.fix) from None


def checked(row: dict[str, Any], kind: str, columns: dict[str, str] | None = None) -> dict[str, Any]:
    """As `normalise`, but raises RowError, whose `reason` can be counted."""
    row = _renamed(row, columns) if columns else row
    fields = _CHECKS[kind](row)
    rest = {name: value for name, value in row.items() if name not in fields and name != "id"}
    for name in ("weight", "repeat"):
        _check_number(rest, name)
    return {**fields, "id": _row_id(row.get("id"), fields, rest), **rest}


def _renamed(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    for ours, theirs in columns.items():
        if theirs not in row:
            raise _missing(row, theirs, f" (for `{ours}`)", ours)
    used = {*columns, *columns.values()}
    return {**{name: value for name, value in row.items() if name not in used}, **{ours: row[theirs] for ours, theirs in columns.items()}}


def _missing(row: dict[str, Any], name: str, note: str = "", ours: str = "") -> RowError:
    there = ", ".join(list(row)[:20]) or "none"
    return RowError(
        f"missing {name}",
        f"the column `{name}`{note} is missing; columns there: {there}",
        f"say which column it is: `columns: {{{ours or name}: THEIR_NAME}}` in the source",
    )


def _check_number(row: dict[str, Any], name: str) -> None:
    value = row.get(name)
    if value is None:
        row.pop(name, None)
    elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise RowError(f"bad {name}", f"`{name}` must be a finite number of at least 0, got {value!r}")


def _row_id(given: Any, fields: dict[str, Any], rest: dict[str, Any]) -> str:
    return str(given) if given is not None and given != "" else _digest(_canonical({**rest, **fields}))[:16]


def _text(row: dict[str, Any]) -> dict[str, Any]:
    if "text" not in row:
        raise _missing(row, "text")
    if not isinstance(row["text"], str):
        raise RowError("text not a string", f"`text` must be a string, got {_type(row['text'])}")
    return {"text": row["text"]}


def _prompt(row: dict[str, Any]) -> dict[str, Any]:
    if "prompt" not in row:
        raise _missing(row, "prompt")
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return {"prompt": prompt}
    turns = _turns(prompt, "prompt")
    if turns[-1]["role"] == "assistant":
        raise RowError(
            "prompt ends with assistant", "the prompt ends with an assistant turn", "move that turn to `answer` or use `kind: messages`"
        )
    return {"prompt": turns}


def _messages(row: dict[str, Any]) -> dict[str, Any]:
    if "messages" not in row:
        raise _missing(row, "messages")
    turns = _turns(row["messages"], "messages")
    if all(turn["role"] != "assistant" for turn in turns):
        raise RowError("no assistant turn", "no assistant turn, so nothing to learn from", "drop the row, or use `kind: prompt`")
    return {"messages": turns, **_tools(row)}


def _preference(row: dict[str, Any]) -> dict[str, Any]:
    for name in ("chosen", "rejected"):
        if name not in row:
            raise _missing(row, name)
    if "prompt" not in row and isinstance(row["chosen"], list) and isinstance(row["rejected"], list):
        row = _implicit_prompt(row)
    pair = {name: _response(row[name], name) for name in ("chosen", "rejected")}
    if pair["chosen"] == pair["rejected"]:
        raise RowError("chosen equals rejected", "`chosen` and `rejected` are the same", "drop the row")
    return {**_prompt(row), **pair, **_tools(row)}


def _implicit_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """Full conversations in `chosen` and `rejected`: their common beginning is the prompt."""
    chosen, rejected = row["chosen"], row["rejected"]
    same = 0
    while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
        same += 1
    return {**row, "prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}


def _response(value: Any, name: str) -> str | list[dict[str, Any]]:
    return value if isinstance(value, str) else _turns(value, name)


def _verifiable(row: dict[str, Any]) -> dict[str, Any]:
    fields = _prompt(row)
    if "answer" not in row:
        raise _missing(row, "answer")
    if row["answer"] is None:
        raise RowError("answer is null", "`answer` is null, so no completion can be verified", "give the answer, or drop the row")
    return {**fields, "answer": row["answer"], **_tools(row)}


def _tools(row: dict[str, Any]) -> dict[str, Any]:
    tools = row.get("tools")
    if tools is None:
        return {}
    if isinstance(tools, str):
        tools = parse(tools)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("bad tools", f"`tools` must be a list of objects, got {_type(tools)}")
    return {"tools": tools}


_CHECKS = {"text": _text, "prompt": _prompt, "messages": _messages, "preference": _preference, "verifiable": _verifiable}


def _turns(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise RowError(f"{name} not a list", f"`{name}` must be a list of turns, got {_type(value)}")
    if not value:
        raise RowError(f"{name} empty", f"`{name}` is an empty list")
    return [_turn(turn, f"{name}[{i}]") for i, turn in enumerate(value)]


def _turn(turn: Any, place: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RowError("turn not an object", f"`{place}` must be an object with `role` and `content`, got {_type(turn)}")
    if "role" not in turn:
        hint = "rename `from`/`value` to `role`/`content`, human to user, gpt to assistant" if "from" in turn else ""
        raise RowError("turn without role", f"`{place}` has no `role`; keys there: {', '.join(turn)}", hint)
    if turn["role"] not in ROLES:
        raise RowError("unknown role", f"`{place}.role` is {turn['role']!r}; expected one of {', '.join(ROLES)}")
    rest = {key: value for key, value in turn.items() if key not in ("role", "content", "tool_calls") and value is not None}
    calls = _tool_calls(turn, place)
    return {"role": turn["role"], "content": _content(turn, place, bool(calls)), **calls, **rest}


def _content(turn: dict[str, Any], place: str, calls: bool) -> str:
    content = turn.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    if content is None and turn["role"] == "assistant" and (calls or turn.get("reasoning_content")):
        return ""
    if content is None:
        raise RowError(
            "turn without content", f"`{place}` ({turn['role']}) has no content and no tool call", "drop the row, or write the text"
        )
    raise RowError("content not text", f"`{place}.content` must be text, got {_type(content)}", "only text is supported")


def _tool_calls(turn: dict[str, Any], place: str) -> dict[str, Any]:
    calls = turn.get("tool_calls")
    if not calls:
        return {}
    if not isinstance(calls, list):
        raise RowError("bad tool call", f"`{place}.tool_calls` must be a list, got {_type(calls)}")
    return {"tool_calls": [_tool_call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(calls)]}


def _tool_call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("bad tool call", f"`{place}` needs `function: {{name, arguments}}`")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        function = {**function, "arguments": _parsed_arguments(arguments)}
        return {**call, "function": function} if "function" in call else function
    return call


def _parsed_arguments(text: str) -> Any:
    try:
        value = parse(text)
    except RowError:
        return text
    return value if isinstance(value, dict) else text


def _type(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def prompt_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """What is asked, as turns: the prompt (a string is one user turn), or all turns before the last assistant turn."""
    if "messages" in row:
        turns = row["messages"]
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
        return list(turns[:last])
    prompt = row["prompt"]
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def row_key(row: dict[str, Any]) -> str:
    """32 hex digits over what is asked; white space at both ends does not count.

    A prompt string, the same prompt as a single user turn, and a conversation of that turn and an answer share a key.
    """
    if "text" in row:
        return _digest(row["text"].strip())
    turns = prompt_messages(row)
    if len(turns) == 1 and turns[0]["role"] == "user" and set(turns[0]) <= {"role", "content"}:
        return _digest(turns[0]["content"].strip())
    return _digest(_canonical(turns))


def unit_hash(*parts: int | str) -> float:
    """A number in [0, 1) from a hash of the parts; equal on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).digest(), "big") / 2**48


def split_of(key: str, validation: float, test: float) -> str:
    """`test`, `validation` or `train`, from the key alone; a larger `test` share keeps the smaller one's rows."""
    place = unit_hash("split", key)
    if place < test:
        return "test"
    return "validation" if place >= 1 - validation else "train"


def row_text(row: dict[str, Any]) -> str:
    """All text of a row, turn by turn and in order, for selectors and counts; the gold answer of verifiable rows included."""
    if "text" in row:
        return str(row["text"])
    if "messages" in row:
        return "\n".join(_turn_text(turn) for turn in row["messages"])
    ends = [row[name] for name in ("chosen", "answer") if name in row]
    parts = [_turn_text(turn) for turn in prompt_messages(row)]
    for end in ends:
        parts += [_turn_text(turn) for turn in end] if isinstance(end, list) and end and isinstance(end[0], dict) else [str(end)]
    return "\n".join(parts)


def _turn_text(turn: dict[str, Any]) -> str:
    parts = [turn.get("reasoning_content"), turn.get("content")]
    calls = [_canonical(call) for call in turn.get("tool_calls", [])]
    return "\n".join(part for part in [*parts, *calls] if part)
