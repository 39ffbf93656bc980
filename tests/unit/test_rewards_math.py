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


SPELLINGS = [
    ("1/2", "\\dfrac{1}{2}", 1),
    ("1/2", "\\tfrac12", 1),
    ("\\frac{3}{4}", "0.75", 1),
    ("\\frac{3}{4}", "75\\%", 1),
    ("3/4", "\\frac{6}{8}", 1),
    ("1000000", "1\\,000\\,000", 1),
    ("1000000", "1{,}000{,}000", 1),
    ("1000000", "10^6", 1),
    ("1000000", "10^{6}", 1),
    ("1000", "1 000", 1),
    ("1200", "1.2\\times 10^3", 1),
    ("1200", "1.2 \\cdot 10^{3}", 1),
    ("1200", "1.2e3", 1),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}", 1),
    ("\\sqrt{8}", "2\\sqrt{2}", 1),
    ("2\\sqrt{3}", "\\sqrt{12}", 1),
    ("[0,1]", "\\left[0, 1\\right]", 1),
    ("[0,1]", "x\\in[0,1]", 1),
    ("(0,1)", "0<x<1", 1),
    ("(-\\infty,2)\\cup(3,\\infty)", "(-\\infty, 2) \\cup (3, +\\infty)", 1),
    ("(3,\\infty)", "(3, 4)", 0),
    ("\\{1,2,3\\}", "\\{3,2,1\\}", 1),
    ("\\{1,2,3\\}", "1, 2, 3", 1),
    ("\\{1,2\\}", "\\{1\\}", 0),
    ("\\emptyset", "\\varnothing", 1),
    ("5", "5\\text{ cm}", 1),
    ("5", "5\\,\\mathrm{cm}", 1),
    ("5", "5~\\text{km/h}", 1),
    ("5\\text{ cm}", "5", 1),
    ("5", "5 dollars", 1),
    ("5", "\\$5.00", 1),
    ("5", "5^{\\circ}", 1),
    ("45^\\circ", "45 degrees", 1),
    ("-3", "−3", 1),
    ("-3", "- 3", 1),
    ("+3", "3", 1),
    ("3", "+3", 1),
    ("3", "03", 1),
    ("0.5", ".5", 1),
    ("0.5", "0.50", 1),
    ("2.5", "2\\frac{1}{2}", 1),
    ("2.5", "2 \\frac12", 1),
    ("x^2+2x+1", "(x+1)^2", 1),
    ("x^2+2x+1", "x^2+2x", 0),
    ("2x+3", "3+2x", 1),
    ("y=2x+3", "2x+3", 1),
    ("y=2x+3", "y=3+2x", 1),
    ("\\pi", "3.14", 0),
    ("2\\pi", "6.283185307", 0),
    ("\\frac{\\pi}{2}", "\\pi/2", 1),
    ("\\pi/2", "90^\\circ", 0),
    ("(1,2)", "(1, 2)", 1),
    ("(1,2)", "(2,1)", 0),
    ("(\\frac12,3)", "(0.5,3)", 1),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", 1),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{bmatrix}1\\\\2\\end{bmatrix}", 1),
    ("B", "\\text{B}", 1),
    ("B", "(B)", 1),
    ("B", "\\textbf{(B)}", 1),
    ("B", "\\mathrm{B}", 1),
    ("B", "C", 0),
    ("\\text{yes}", "Yes", 1),
    ("even", "\\text{even}", 1),
    ("2", "two", 0),
    ("10:30", "10:30", 1),
    ("7", "7.", 1),
    ("7", "x=7", 1),
    ("x=7", "7", 1),
    ("1,2", "2 \\text{ and } 1", 1),
    ("\\pm 2", "2,-2", 1),
    ("2,-2", "\\pm2", 1),
    ("6!", "720", 1),
    ("\\binom{5}{2}", "10", 1),
    ("\\log_2 8", "3", 1),
    ("2^{-1}", "0.5", 1),
    ("\\frac{-1}{3}", "-\\frac13", 1),
    ("0.\\overline{3}", "\\frac13", 1),
    ("1+i", "i+1", 1),
    ("3i", "3 i", 1),
    ("e^{2}", "e^2", 1),
    ("12_5", "12_{5}", 1),
    ("100_2", "4", 0),
    ("50\\%", "50 percent", 1),
    ("5\\times 3", "15", 1),
    ("\\frac{a}{b}", "a/b", 1),
    ("\\sin^2 x", "(\\sin x)^2", 1),
    ("16", "4^2", 1),
    ("\\infty", "+\\infty", 1),
    ("x>2", "x > 2", 1),
    ("x>2", "(2,\\infty)", 1),
    ("x\\ge 2", "x\\geq2", 1),
    ("x\\ge 2", "x>2", 0),
    ("7", "7 and 8", 0),
    ("7,8", "7 or 8", 1),
    ("7", "7\\text{ or }8", 0),
    ("7", "7\\text{ or 8}", 0),
    ("Romeo and Juliet", "Romeo or Juliet", 0),
    ("Romeo and Juliet", "Romeo and Juliet", 1),
    ("12_5", "12_{7}", 0),
    ("(0,1]", "0<x\\le 1", 1),
    ("(0,1]", "0<x<1", 0),
    ("0<x<1", "0<y<1", 0),
    ("\\frac16", "0.1\\overline{6}", 1),
    ("7", "7\\text{ not }", 0),
    ("5 apples", "5 pears", 0),
]
"""Gold, answer in the box, and whether they are equal."""


def rows(name: str) -> list[dict]:
    """Rows of a case file."""
    return [json.loads(line) for line in (CASES / name).read_text(encoding="utf-8").splitlines() if line.strip()]


@pytest.mark.parametrize("name", ["C12-math-pairs.jsonl", "C95-hacking.jsonl"])
def test_settled_pairs(name):
    table = rows(name)
    values = math_exact([row["completion"] for row in table], [row["gold"] for row in table])
    wrong = [(row, value) for row, value in zip(table, values, strict=True) if value != row["expect"]]
    assert not wrong


def test_spellings():
    texts = [f"So the answer is \\boxed{{{answer}}}, as was to be shown." for _, answer, _ in SPELLINGS]
    values = math_exact(texts, [gold for gold, _, _ in SPELLINGS])
    wrong = [(row, value) for row, value in zip(SPELLINGS, values, strict=True) if value != row[2]]
    assert not wrong
    assert len({answer for _, answer, equal in SPELLINGS if equal}) >= 60


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
