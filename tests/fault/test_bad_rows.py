"""Bad rows: each is an error of exit code 4 that names file and row, or is skipped and counted; never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.core.artifact import InputRef
from posttrain.data.dataset import load_rows
from posttrain.data.shards import BadRows
from posttrain.errors import DataError, format_error

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
GOOD: dict[str, dict[str, Any]] = {
    "text": {"text": "good"},
    "prompt": {"prompt": "good"},
    "messages": {"messages": [USER, ANSWER]},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "verifiable": {"prompt": "q", "answer": "a"},
}


def turns(*items: Any) -> dict[str, Any]:
    """A messages row."""
    return {"messages": list(items)}


BAD: list[tuple[str, str, Any, str]] = [
    ("not JSON", "text", b"{nope", "not JSON"),
    ("single quotes", "text", b"{'text': 'a'}", "not JSON"),
    ("comma behind the last", "text", b'{"text": "a",}', "not JSON"),
    ("two values", "text", b'{"text": "a"} {"text": "b"}', "more text after the value"),
    ("cut", "text", b'{"text": "abc', "not JSON"),
    ("control character", "text", b'{"text": "a\x01b"}', "not JSON"),
    ("latin-1", "text", b'{"text": "caf\xe9"}', "0xe9, not UTF-8"),
    ("raw surrogate bytes", "text", b'{"text": "\xed\xa0\xbd"}', "not UTF-8"),
    ("UTF-16", "text", '{"text": "a"}'.encode("utf-16"), "UTF-16, expected UTF-8"),
    ("a list", "text", b'["a"]', "expected a JSON object, got a list"),
    ("a string", "text", b'"a"', "got a string"),
    ("a number", "text", b"7", "got a number"),
    ("null", "text", b"null", "got null"),
    ("true", "text", b"true", "got a boolean"),
    ("NaN", "text", b'{"text": "a", "s": NaN}', "NaN is not JSON"),
    ("Infinity", "text", b'{"text": "a", "s": [-Infinity]}', "-Infinity is not JSON"),
    ("1e999", "text", b'{"text": "a", "s": 1e999}', "overflows"),
    ("400 digits", "text", b'{"text": "a", "s": ' + b"7" * 400 + b"}", "does not fit 64 bits"),
    ("6000 digits", "text", b'{"text": "a", "s": ' + b"7" * 6000 + b"}", "does not fit 64 bits"),
    ("duplicate key", "text", b'{"text": "a", "text": "b"}', "'text' is written twice"),
    ("nested 2000 deep", "text", b'{"text": "a", "s": ' + b"[" * 2000 + b"]" * 2000 + b"}", "levels deep"),
    ("nested 300 deep", "text", b'{"text": "a", "s": ' + b'{"a":' * 300 + b"1" + b"}" * 300 + b"}", "levels deep"),
    ("half a surrogate pair", "text", b'{"text": "half \\ud83d"}', "half a surrogate pair in text"),
    ("surrogate in a key", "text", b'{"text": "a", "k\\udc00": 1}', "half a surrogate pair"),
    ("text missing", "text", {"body": "a"}, "column `text` is missing; columns there: body"),
    ("text null", "text", {"text": None}, "`text` must be a string, got null"),
    ("text a list", "text", {"text": ["a"]}, "`text` must be a string, got list"),
    ("prompt missing", "prompt", {}, "columns there: none"),
    ("prompt a number", "prompt", {"prompt": 12}, "must be a list of turns, got int"),
    ("prompt empty list", "prompt", {"prompt": []}, "`prompt` is an empty list"),
    ("prompt ends with assistant", "prompt", {"prompt": [USER, ANSWER]}, "ends with an assistant turn"),
    ("messages missing", "messages", {"conversations": []}, "column `messages` is missing"),
    ("messages a string", "messages", {"messages": "hi"}, "must be a list of turns, got str"),
    ("messages empty", "messages", turns(), "`messages` is an empty list"),
    ("turn a string", "messages", turns("hi"), "`messages[0]` must be an object"),
    ("unknown role", "messages", turns({"role": "Bot", "content": "x"}), "role` is 'Bot'; expected one of"),
    ("ShareGPT names", "messages", turns({"from": "human", "value": "a"}), "rename `from`/`value`"),
    ("no assistant", "messages", turns(USER), "no assistant turn"),
    ("null answer", "messages", turns(USER, {"role": "assistant", "content": None}), "no content and no tool call"),
    ("null question", "messages", turns({"role": "user", "content": None}, ANSWER), "`messages[0]` (user) has no content"),
    ("content a number", "messages", turns(USER, {"role": "assistant", "content": 5}), "must be text, got int"),
    ("image", "messages", turns({"role": "user", "content": [{"type": "image"}]}, ANSWER), "only text is supported"),
    ("tool call without name", "messages", turns(USER, {"role": "assistant", "tool_calls": [{"function": {}}]}), "tool_calls[0]` needs"),
    ("tools a dict", "messages", {**GOOD["messages"], "tools": {"name": "f"}}, "`tools` must be a list of objects"),
    ("answer missing", "verifiable", {"prompt": "q", "final": "a"}, "column `answer` is missing; columns there: prompt, final"),
    ("answer null", "verifiable", {"prompt": "q", "answer": None}, "`answer` is null"),
    ("chosen missing", "preference", {"prompt": "q", "rejected": "b"}, "column `chosen` is missing"),
    ("chosen equals rejected", "preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
    ("rejected a number", "preference", {"prompt": "q", "chosen": "a", "rejected": 3}, "must be a list of turns, got int"),
    ("negative weight", "text", {"text": "a", "weight": -1}, "`weight` must be a finite number of at least 0, got -1"),
    ("weight a string", "text", {"text": "a", "weight": "1"}, "`weight` must be a finite number"),
    ("repeat true", "text", {"text": "a", "repeat": True}, "`repeat` must be a finite number"),
]


def source(path: Path, kind: str, bad: Any, on_bad: str) -> InputRef:
    """A source of a good row, the bad one, and a good one."""
    good = json.dumps(GOOD[kind]).encode()
    path.write_bytes(b"\n".join([good, bad if isinstance(bad, bytes) else json.dumps(bad).encode(), good]) + b"\n")
    return InputRef("data", "rows", "source", "dataset", spec={"kind": kind, "path": str(path), "on_bad": on_bad})


def test_there_are_at_least_forty() -> None:
    assert len(BAD) >= 40
    assert len({name for name, *_ in BAD}) == len(BAD)


@pytest.mark.parametrize(("name", "kind", "bad", "words"), BAD, ids=[name for name, *_ in BAD])
def test_a_bad_row_stops_with_its_place(name: str, kind: str, bad: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    with pytest.raises(DataError) as caught:
        load_rows(source(path, kind, bad, "stop"))
    assert caught.value.exit_code == 4
    assert caught.value.where == f"{path}:2"
    text = format_error(caught.value)
    assert words in text
    assert "fix: " in text
    text.encode("utf-8")
    assert len(text) < 1500


@pytest.mark.parametrize(("name", "kind", "bad", "words"), BAD, ids=[name for name, *_ in BAD])
def test_a_bad_row_is_skipped_and_counted(name: str, kind: str, bad: Any, words: str, tmp_path: Path) -> None:
    counts = BadRows()
    lost = 1 if b"\n" not in (bad if isinstance(bad, bytes) else b"") else 2
    rows = load_rows(source(tmp_path / "d.jsonl", kind, bad, "skip"), bad=counts)
    assert len(rows) == 2
    assert counts.total == lost
    assert f"{tmp_path / 'd.jsonl'}:2: " in counts.examples[0]


def test_a_thousand_bad_rows_make_a_short_error(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": 1}\n' * 1000)
    spec = {"kind": "text", "path": str(path), "on_bad": "stop"}
    with pytest.raises(DataError) as caught:
        load_rows(InputRef("data", "rows", "source", "dataset", spec=spec))
    text = str(caught.value)
    assert text.count("also ") == 2
    assert "and 997 more like these, and perhaps more" in text
