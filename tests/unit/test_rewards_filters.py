"""Filters of repetition and format: shares, loops, and thinking parts, each edge by hand."""

from __future__ import annotations

import random

import pytest

from posttrain.rewards import get_reward, score
from posttrain.rewards._words import loop_length, unique_share, units
from posttrain.rewards.repetition import repeated

FINE = "we add the two numbers and carry one so that the sum of both is even then divide by three"
LOOP = "so the answer is 7. " * 40


def slow_loop(items, repeats):
    """Every end, every period."""
    best = 0
    for length in range(len(items) + 1):
        end = items[len(items) - length :]
        for period in range(1, length // repeats + 1):
            if all(end[i] == end[i + period] for i in range(length - period)):
                best = max(best, length)
    return best


def test_loops_equal_the_slow_search():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("ab", k=rng.randrange(0, 12))) + "".join(rng.choices("abc", k=rng.randrange(1, 4))) * rng.randrange(0, 6)
        for repeats in (2, 3, 4):
            assert loop_length(text, repeats) == slow_loop(text, repeats), (text, repeats)


def test_loop_search_is_linear_on_the_worst_text():
    assert loop_length("a" * 200_000, 4) == 200_000


def test_chinese_and_japanese_characters_are_units():
    assert units("答案是7, don't") == ["答", "案", "是", "7", ",", "don", "'", "t"]
    assert units("ひらカナ ok東京") == ["ひ", "ら", "カ", "ナ", "ok", "東", "京"]
    assert repeated("我们先算一遍" * 10, loop_chars=1000).share < 0.2


def test_the_share_of_different_ngrams():
    assert get_reward("repetition")(["a b c d", "a a a a a", "a b", "", "a b c a b c"]) == [1.0, 1 / 3, 1.0, 1.0, 0.75]
    assert get_reward("repetition", {"n": 1})(["a b a b"]) == [0.5]
    assert unique_share([1, 2, 1, 2], 2) == 2 / 3


@pytest.mark.parametrize(("text", "loop"), [
    (FINE, False),
    (f"{FINE} {LOOP}", True),
    (f"{FINE} {LOOP}so the ans", True),
    (f"{LOOP} {FINE}", False),
    ("0." + "3" * 200, True),
    ("哈" * 150, True),
    ("ha" * 20, False),
    ("so the answer is 7. " * 3, False),
    ("\n" * 500 + "done" + " " * 500, False),
])  # fmt: skip
def test_an_end_that_loops_gets_nothing(text, loop):
    found = score("repetition", [text])
    assert found.recorded["repetition/loop"] == [float(loop)]
    assert (found.total == [0.0]) is loop


THOUGHT = f"<think>\n{FINE}\n</think>\n"


@pytest.mark.parametrize(("text", "value"), [
    (THOUGHT + "It is 7.", 1.0),
    ("  " + THOUGHT + "It is 7.", 1.0),
    (THOUGHT, 0.0),
    (THOUGHT + " \n", 0.0),
    ("<think> </think> It is 7.", 0.0),
    ("<think></think>It is 7.", 0.0),
    ("It is 7.", 0.0),
    ("", 0.0),
    ("Well. " + THOUGHT + "It is 7.", 0.0),
    ("<think>" + FINE, 0.0),
    (FINE + "</think> It is 7.", 0.0),
    (THOUGHT + THOUGHT + "It is 7.", 0.0),
    (THOUGHT + "It is 7.</think>", 0.0),
    (THOUGHT + "<think>It is 7.", 0.0),
    ("<think><think>" + FINE + "</think> It is 7.", 0.0),
    (f"<think>{FINE} {LOOP}</think> It is 7.", 0.0),
    (THOUGHT + LOOP, 0.0),
    (f"<think>{(FINE + '. ') * 3}</think> It is 7.", 0.0),
    (f"<think>{FINE}. {FINE}.</think> It is 7.", 1.0),
])  # fmt: skip
def test_thinking_then_one_answer(text, value):
    assert get_reward("think_format")([text]) == [value]
    assert get_reward("think_format")([[{"role": "assistant", "content": text}]]) == [value]


def test_a_tag_that_the_prompt_has_written():
    judge = get_reward("think_format", {"opened_by": "prompt"})
    assert judge([f"{FINE}</think> It is 7.", THOUGHT + "It is 7.", "It is 7."]) == [1.0, 0.0, 0.0]


def test_other_tags_a_box_and_no_limit():
    tags = {"opening": "[THINK]", "closing": "[/THINK]"}
    assert get_reward("think_format", tags)([f"[THINK]{FINE}[/THINK] 7", THOUGHT + "7"]) == [1.0, 0.0]
    boxed = get_reward("think_format", {"boxed": True})
    assert boxed([THOUGHT + r"\boxed{7}", THOUGHT + "7", THOUGHT + r"\boxed{7} \boxed{8}", THOUGHT + r"\boxed{ }"]) == [1.0, 0.0, 0.0, 0.0]
    assert get_reward("think_format", {"unique": 0.0})([f"<think>{(FINE + '. ') * 3}</think> It is 7."]) == [1.0]


def test_what_failed_is_recorded():
    found = score("think_format", [THOUGHT + "It is 7.", "It is 7.", THOUGHT + LOOP])
    assert found.recorded == {"think_format/format": [1.0, 0.0, 1.0], "think_format/repetition": [1.0, None, 0.0]}
