"""math_exact: notation, hacking, hangs, threads."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from pathlib import Path

import pytest

from posttrain.core.process import descendants
from posttrain.rewards import failures, get_reward
from posttrain.rewards._boxed import boxed_answers, unboxed
from posttrain.rewards._math_text import decide, normalise, number
from posttrain.rewards.math_exact import math_exact
from posttrain.rewards.sandbox.pool import MATH

CASES = Path(__file__).parents[1] / "cases"


def rows(name: str) -> list[dict]:
    """Rows of a case file."""
    return [json.loads(line) for line in (CASES / name).read_text(encoding="utf-8").splitlines() if line.strip()]


@pytest.mark.parametrize("name", ["C12-math-pairs.jsonl", "C95-hacking.jsonl"])
def test_settled_pairs(name):
    table = rows(name)
    values = math_exact([row["completion"] for row in table], [row["gold"] for row in table])
    wrong = [(row, value) for row, value in zip(table, values, strict=True) if value != row["expect"]]
    assert not wrong


@pytest.mark.parametrize(
    ("completion", "expected"),
    [("B or C or D", 0), ("B", 1), ("(B)", 1), ("b.", 1), ("not B", 0), ("Answer: B because A is wrong", 0), ("", 0), ("B\nC", 0)],
)
def test_unboxed_choices(completion, expected):
    assert math_exact([completion], ["B"]) == [expected]


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("50\\%", "50", True),
        ("50\\%", "5", False),
        ("0.5", "50\\%", True),
        ("1{,}000", "1000", True),
        ("x=5", "y=5", False),
        ("x = 5", "x=5.0", True),
        ("-\\frac{1}{2}", "-0.5", True),
        ("-\\frac12", "\\frac{-1}{2}", True),
        ("2 1/2", "2.5", True),
        ("1/0", "1", None),
        ("[0,1)", "[0,1]", False),
        ("(1,2)", "\\left( 1, 2 \\right)", True),
        ("1, 2", "2, 1", True),
        ("\\{1,2\\}", "1,2", True),
        ("\\{1,2\\}", "1,2,3", False),
        ("90^\\circ", "90", True),
        ("\\$5", "5", True),
        ("3\\text{ cm}^2", "3", True),
        ("Monday", "monday", True),
        ("Monday", "Tuesday", False),
        ("12", "12 or 13", False),
        ("C", "c", True),
        ("C", "7", False),
        ("2\\pi", "2\\pi", True),
        ("2^{10}", "1024", True),
        ("9" * 400, "9" * 400 + ".0", True),
        ("7", "7" * 5000, False),
        ("0", "", False),
    ],
)
def test_text_decides(gold, answer, expected):
    assert decide(gold, answer) is expected


def test_numbers_are_exact_and_bounded():
    assert number("1e400") is not None
    assert number("1e99999") is None
    assert number("7^{7^{7}}") is None
    assert number("1{,}5") is None
    assert normalise("\\dfrac{1}{2}.") == "\\frac{1}{2}"


def test_boxes_balance():
    assert boxed_answers(r"\boxed{a{b}c} x \boxed{\{1\}} \boxed 7. \boxed{open") == ["a{b}c", r"\{1\}", "7"]


def test_boxes_within_boxes():
    assert boxed_answers(r"\boxed{\boxed{7}} \boxed{8 \boxed{9}") == [r"\boxed{7}", "9"]
    assert unboxed(r"so \boxed{x = \boxed{7}}") == "7"
    assert unboxed("7") is None
    assert math_exact([r"\boxed{\boxed{7}}"], [r"\boxed{7}"]) == [1.0]


def test_hostile_text_is_decided_quickly():
    start = time.monotonic()
    pieces = ("\\boxed{", "{", "(", "\\frac", "\\text{", "\\frac{1}{", ",", "1,", "^{", "\\sqrt ", "} ", "_", "=", " ", "1" * 50, "\\")
    for piece in pieces:
        text = (piece * 20_000)[:20_000]
        assert math_exact([text, f"\\boxed{{{text[:1900]}"], ["7", "7"]) == [0.0, 0.0]
        assert decide("7", text[:1900]) is not True
    assert time.monotonic() - start < 5


def test_any_text_equals_itself():
    rng = random.Random(0)
    alphabet = "0123456789.,+-/%^_{}()[]=<> xyABπ\\$"
    for _ in range(3000):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 12)))
        other = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 12)))
        assert decide(text, text) is True or not normalise(text) or len(normalise(text)) == 1
        assert decide(text, other) in (True, False, None)


def test_algebra_goes_to_the_child():
    golds = ["7", "x^2+2x+1", "2\\sqrt{3}", "x>3", "x+1"]
    texts = [f"\\boxed{{{item}}}" for item in ("\\sqrt{49}", "(x+1)^2", "\\sqrt{12}", "(3,\\infty)", "x+2")]
    assert math_exact(texts, golds) == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_faults_of_the_data_are_none_and_counted():
    failures(reset=True)
    assert math_exact(["\\boxed{7}"] * 4, [None, "", "\\frac{", 7]) == [None, None, None, 1.0]
    assert failures() == {"math_exact.bad_gold": 3}


def test_a_tower_of_powers_costs_one_timeout():
    table = rows("C15-hang.jsonl")
    math_exact(["\\boxed{\\sqrt{49}}"] * 4, ["7"] * 4)
    failures(reset=True)
    start = time.monotonic()
    values = math_exact([row["completion"] for row in table], [row["gold"] for row in table], timeout_s=1.0)
    seconds = time.monotonic() - start
    assert values == [row["expect"] for row in table]
    assert failures() == {"math_exact.timeout": 1}
    assert seconds < 2.0
    assert not [child for worker in MATH.pids() for child in descendants(worker)]


def test_the_same_from_any_thread():
    found: list = []

    def work() -> None:
        found.append(get_reward("math_exact")(["\\boxed{\\sqrt{49}}", "\\boxed{8}"], answer=["7", "7"]))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[1.0, 0.0]] * 3


def test_a_worker_that_dies_is_replaced():
    assert math_exact(["\\boxed{\\sqrt{49}}"], ["7"]) == [1.0]
    for worker in MATH.pids():
        os.kill(worker, 9)
    time.sleep(0.2)
    assert math_exact(["\\boxed{\\sqrt{49}}"], ["7"]) == [1.0]
