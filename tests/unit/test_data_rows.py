"""Row types, keys and splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.rows import normalise, prompt_messages, row_key, row_text, split_of, unit_hash
from posttrain.data.shards import read_shard
from posttrain.data.strict_json import RowError, check_depth, parse
from posttrain.errors import DataError

CASES = Path(__file__).parents[1] / "cases"

USER = {"role": "user", "content": "12+34="}
ANSWER = {"role": "assistant", "content": "46"}


def case(name: str, kind: str = "messages") -> list[dict[str, Any]]:
    """Normalised rows of a case file."""
    return [normalise(row, kind, f"{name}:{number}") for number, row in read_shard(CASES / name)]


def test_each_row_type_keeps_its_fields_first_and_other_columns_verbatim() -> None:
    row = normalise({"extra": [1, None, {"a": 2.5}], "answer": "46", "prompt": "12+34="}, "verifiable", "f:1")
    assert list(row) == ["prompt", "answer", "id", "extra"]
    assert row["extra"] == [1, None, {"a": 2.5}]


def test_columns_rename_and_original_names_go() -> None:
    row = normalise({"question": "1+1=", "solution": "2", "level": 3}, "verifiable", "f:1", {"prompt": "question", "answer": "solution"})
    assert (row["prompt"], row["answer"], row["level"]) == ("1+1=", "2", 3)
    assert "question" not in row
    assert "solution" not in row


def test_id_is_kept_as_text_or_made_from_the_content() -> None:
    assert normalise({"text": "a", "id": 7}, "text", "f:1")["id"] == "7"
    first, second = (normalise({"text": t}, "text", "f:1")["id"] for t in ("a", "b"))
    assert first != second
    assert first == normalise({"text": "a"}, "text", "g:9")["id"]
    assert normalise({"text": "a", "id": first}, "text", "f:1") == normalise({"text": "a"}, "text", "f:1")


def test_normalising_twice_changes_nothing() -> None:
    for row in case("C07-tool-args-mixed.jsonl") + case("C03-reasoning-field.jsonl"):
        assert normalise(row, "messages", "f:1") == row


def test_the_same_question_has_one_key_in_every_row_type() -> None:
    keys = {
        row_key({"prompt": "12+34="}),
        row_key({"prompt": " 12+34=\n"}),
        row_key({"prompt": [USER], "answer": "46"}),
        row_key({"messages": [USER, ANSWER]}),
        row_key({"messages": [USER, {"role": "assistant", "content": "47"}]}),
        row_key({"prompt": "12+34=", "chosen": "46", "rejected": "47"}),
        row_key({"text": "12+34="}),
    }
    assert len(keys) == 1
    assert row_key({"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}) not in keys


def test_key_covers_all_turns_before_the_last_answer_whatever_the_order_of_keys() -> None:
    turns = [USER, ANSWER, {"role": "user", "content": "more"}, ANSWER]
    swapped = [dict(reversed(list(turn.items()))) for turn in turns]
    assert row_key({"messages": turns}) == row_key({"messages": swapped})
    assert row_key({"messages": turns}) != row_key({"messages": turns[:2]})
    assert prompt_messages({"messages": turns}) == turns[:3]


def test_split_shares_hold_and_grow_without_moving_rows() -> None:
    keys = [row_key({"text": str(i)}) for i in range(4000)]
    small = {k: split_of(k, 0.1, 0.05) for k in keys}
    large = {k: split_of(k, 0.2, 0.1) for k in keys}
    assert 330 < sum(v == "validation" for v in small.values()) < 470
    assert 150 < sum(v == "test" for v in small.values()) < 250
    for part in ("validation", "test"):
        assert all(large[k] == part for k, v in small.items() if v == part)
    assert {split_of(k, 0.0, 0.0) for k in keys} == {"train"}


def test_hash_is_pinned_for_all_machines() -> None:
    assert row_key({"text": "héllo"}) == "3c48591d8d098a4538f5e013dfcf406e"
    assert unit_hash("split", "x") == pytest.approx(0.526248, abs=1e-6)


def test_c06_null_then_string() -> None:
    first, second = case("C06-null-then-string-a.jsonl"), case("C06-null-then-string-b.jsonl")
    assert len(first) + len(second) == 303
    assert [row["system"] for row in second] == ["Be kind.", "Be brief.", ""]
    assert all(row["system"] is None for row in first)


def test_c07_tool_arguments_stay_as_written() -> None:
    arguments = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in case("C07-tool-args-mixed.jsonl")]
    assert arguments == [{"city": "Oslo"}, {"days": 3}, {"days": "few", "unit": None}, {"city": "Bergen"}]


def test_c08_mixed_side_column_is_kept_verbatim() -> None:
    assert [row["spans"] for row in case("C08-mixed-nested-list.jsonl")] == [[[2, 7, "who"], [8, 9, None]], [], [[1, 2]]]


def test_c11_null_content_with_tool_calls_is_empty_text() -> None:
    raw = [row for _, row in read_shard(CASES / "C11-null-content-toolcall.jsonl")]
    for row in raw[:2]:
        call = normalise(row, "messages", "f:1")["messages"][1]
        assert call["content"] == ""
        assert call["tool_calls"][0]["function"]["name"] == "clock"
    with pytest.raises(DataError, match="neither|no content"):
        normalise(raw[2], "messages", "f:3")


def test_c84_missing_gold_names_the_column_and_lists_those_there() -> None:
    raw = [row for _, row in read_shard(CASES / "C84-gold-columns.jsonl")]
    with pytest.raises(DataError, match=r"f:3: the column `final` \(for `answer`\) is missing; columns there: prompt, answer"):
        normalise(raw[2], "verifiable", "f:3", {"answer": "final"})
    for row in raw[:2]:
        with pytest.raises(DataError, match="columns there"):
            normalise(row, "verifiable", "f:1")
    assert normalise(raw[3], "verifiable", "f:4", {"answer": "final"})["answer"] == "9"
    assert normalise(raw[4], "verifiable", "f:5", {"prompt": "question", "answer": "solution"})["prompt"] == "5+6="


def test_gold_in_the_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="ends with an assistant turn"):
        normalise({"prompt": [USER, ANSWER], "answer": "46"}, "verifiable", "f:1")


def test_preference_takes_full_conversations_and_finds_the_prompt() -> None:
    row = normalise({"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "9"}]}, "preference", "f:1")
    assert row["prompt"] == [USER]
    assert row["chosen"] == [ANSWER]


def test_text_parts_are_joined_and_images_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = normalise({"messages": [{"role": "user", "content": parts}, ANSWER]}, "messages", "f:1")
    assert row["messages"][0]["content"] == "ab"
    with pytest.raises(DataError, match="only text"):
        normalise({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER]}, "messages", "f:1")


def test_row_text_has_every_turn_reasoning_and_call() -> None:
    rows = case("C03-reasoning-field.jsonl")
    assert row_text(rows[0]) == "Is 21 prime?\n21 is 3 times 7.\nNo."
    assert row_text({"prompt": "12+34=", "answer": "046"}) == "12+34=\n046"
    assert row_text({"prompt": "q", "chosen": [ANSWER], "rejected": "z"}) == "q\n46"
    assert "clock" in row_text(case_row_with_call())


def case_row_with_call() -> dict[str, Any]:
    """The first row of C11."""
    _, row = next(read_shard(CASES / "C11-null-content-toolcall.jsonl"))
    return normalise(row, "messages", "f:1")


@pytest.mark.parametrize("text", ["0", "-1", "18446744073709551615", "-9223372036854775808", "1e308", '"\\ud83d\\ude00"', '"\\u0000"'])
def test_strict_parser_takes_what_the_standard_has(text: str) -> None:
    assert parse(text) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("NaN", "not finite"), ("[Infinity]", "not finite"), ("-1e999", "not finite"), ("18446744073709551616", "huge integer"),
        ("-9223372036854775809", "huge integer"), ("9" * 5000, "huge integer"), ('{"a":1,"b":{"a":1,"a":2}}', "duplicate key"),
        ("[" * 5000 + "]" * 5000, "nested too deep"), ('{"a":' * 300 + "1" + "}" * 300, "nested too deep"), ("{} {}", "not JSON"),
        ("{'a': 1}", "not JSON"), ("", "not JSON"), ('"\\ud83d"', "lone surrogate"), ('{"\\udc00": 1}', "lone surrogate"),
        ('["\\ude00\\ud83d"]', "lone surrogate"), ('"a\nb"', "not JSON"),
    ],
)  # fmt: skip
def test_strict_parser_refuses_with_a_reason(text: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse(text)
    assert caught.value.reason == reason
    str(caught.value).encode("utf-8")


def test_many_brackets_are_fine_where_they_are_not_deep() -> None:
    assert len(parse("[" + ",".join(["[]"] * 5000) + "]")) == 5000
    check_depth([[[]]], limit=3)
    with pytest.raises(RowError):
        check_depth([[[[]]]], limit=3)
