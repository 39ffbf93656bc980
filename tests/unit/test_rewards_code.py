"""code_tests: what passes, what a program may try, whose fault a failure is."""

from __future__ import annotations

import json

import pytest

from posttrain.errors import ConfigError
from posttrain.rewards import failures, get_reward
from posttrain.rewards.code_tests import code_tests, extract_program, read_tests
from posttrain.rewards.sandbox.code_task import free_names
from posttrain.rewards.sandbox.wire import Closed, decode, encode
from tests.code_kit import CHEATS, PASSES, SQUARE

TESTS = ["assert f(3) == 9", "assert f(-4) == 16"]


def value(program: str, tests: object, **options: object) -> float | None:
    """Reward of one completion."""
    return code_tests([program], [tests], **options)[0]


def test_a_batch_in_order_with_shares_and_faults_of_data():
    failures(reset=True)
    chat = [{"role": "assistant", "content": f"Here:\n```python\n{SQUARE}\n```\nDone."}]
    programs = [chat, "def f(n):\n    return 9", SQUARE, SQUARE, SQUARE, "x" * 300_000]
    tests = [TESTS, TESTS, None, ["assert f(3) =="], [], TESTS]
    assert code_tests(programs, tests, value="share") == [1.0, 0.5, None, None, None, 0.0]
    assert failures() == {"code_tests.bad_tests": 3}
    assert get_reward("code_tests")(programs[:2], tests=tests[:2]) == [1.0, 0.0]


@pytest.mark.parametrize("name", PASSES)
def test_a_right_program_passes(name):
    program, test = PASSES[name]
    assert value(program, [test]) == 1.0


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_fails_and_is_not_a_failure_of_the_reward(name):
    failures(reset=True)
    assert value(CHEATS[name], ["assert f(3) == 9", "assert abs(f(-4) - 16) < 1e-6"], value="share", timeout_s=1.5) == 0.0
    assert failures() == {}


def test_printed_verdicts_do_not_count_where_output_is_compared():
    pairs = [{"stdin": "3\n", "stdout": "9\n"}, {"input": "4", "output": "16"}]
    assert value("print(int(input()) ** 2)", pairs) == 1.0
    assert value("print(9)", pairs, value="share") == 0.5
    assert value("n = int(input())\nprint(n * n, ' ')\nprint()", pairs) == 1.0
    assert value("print(int(input()) ** 2)\nraise SystemExit(1)", pairs) == 0.0
    assert value("print(int(input()) ** 2)\nimport sys\nsys.exit()", pairs) == 1.0
    assert value("if __name__ == '__main__':\n    print(int(input()) ** 2)", json.dumps(pairs)) == 1.0
    assert value("n = int(input())\nassert False", pairs) == 0.0


def test_assertions_and_outputs_may_be_mixed():
    program = SQUARE + "\nif __name__ == '__main__':\n    print(f(int(input())))"
    tests = ["assert f(2) == 4", {"stdin": "3", "stdout": "9"}, "assert f(1) == 2", {"stdin": "3", "stdout": "8"}]
    assert value(program, tests, value="share") == 0.5


def test_the_fault_of_a_program_that_is_killed():
    hang = "def f(n):\n    while True: pass"
    failures(reset=True)
    assert value(hang, TESTS, timeout_s=0.5) == 0.0
    assert failures() == {}
    assert value(hang, TESTS, timeout_s=0.5, killed="none") is None
    assert failures() == {"code_tests.killed": 1}


def test_what_the_time_of_a_batch_does_not_reach_is_not_wrong():
    failures(reset=True)
    code_tests([SQUARE], [TESTS])
    hang = "def f(n):\n    while True: pass"
    values = code_tests([hang] * 16 + [SQUARE], [TESTS] * 17, timeout_s=20.0, batch_timeout_s=1.0)
    assert None in values and 1.0 not in values[:16]
    assert failures()["code_tests.timeout"] == values.count(None)


def test_a_test_that_hands_over_its_own_object_is_the_datas_fault():
    failures(reset=True)
    test = "class Node:\n    v = 1\nassert f(Node()) == 1"
    assert value("def f(node):\n    return node.v", [test]) is None
    assert failures() == {"code_tests.bad_tests": 1}


def test_objects_of_the_program_and_plain_values_do_not_mix():
    program = (
        "class E:\n    def __eq__(s, o): return True\n    def __contains__(s, o): return True\ndef f(n): return E()\ndef g(n): return E()"
    )
    assert value(program, ["assert f(1) == g(1)"]) == 1.0
    for test in (
        "assert f(1) == 1",
        "assert 1 == f(1)",
        "assert f(1) == [f(1), 1]",
        "assert f(1) in [1, 2]",
        "assert isinstance(f(1), int)",
    ):
        assert value(program, [test]) == 0.0, test


@pytest.mark.parametrize(("text", "program"), [
    ("x = 1", "x = 1"),
    ("```python\na\n```\nthen\n```py\nb\n```", "b"),
    ("```python\na\n```\nprints\n```\n3\n```", "a"),
    ("```\na\n```", "a"),
    ("```Python\na\nb", "a\nb"),
    ("````python\na\n```\nb\n````", "a\n```\nb"),
    ("~~~python\na\n~~~", "a"),
    ("  ```python\n  a\n  ```", "  a"),
    ("```python\n```", ""),
    ("", ""),
])  # fmt: skip
def test_extraction(text, program):
    assert extract_program(text) == program


def test_extraction_is_linear():
    assert extract_program("```python\n" * 50_000) == "```python\n" * 49_998 + "```python"


@pytest.mark.parametrize("tests", [
    None, "", [], 7, [7], ["x ="], [{"stdin": "1"}], [{"stdout": 5}], ["pass", None], "[1", "[]", {"a": 1}, ["# nothing"], ["(" * 500],
])  # fmt: skip
def test_what_are_no_tests(tests):
    assert read_tests(tests) is None


def test_what_are_tests():
    assert read_tests("assert f(1)") == ["assert f(1)"]
    assert read_tests('["assert 1", {"output": "x"}]') == ["assert 1", ("", "x")]
    assert read_tests(("assert 1",)) == ["assert 1"]


def test_free_names():
    import ast

    tree = ast.parse(
        "import os.path as p, re\ndef check(c, *a):\n    for i in c(1): x = i\n"
        "    return [y for y in g(x)]\ntry: check(f)\nexcept E as e: e"
    )
    assert free_names(tree) == {"f", "g", "E"}


def test_values_cross_and_hostile_messages_do_not():
    import collections
    import decimal

    def refuse(_):
        raise AssertionError

    values = [
        None,
        True,
        -1.5,
        "ü\ud800",
        [1, (2, {3})],
        {"a": {(1, 2): frozenset({3})}},
        b"\xff",
        bytearray(b"x"),
        2j,
        decimal.Decimal("1.10"),
    ]
    values += [10**4000, collections.deque([1]), len, ValueError, float("-inf")]
    for item in values:
        found = decode(json.loads(json.dumps(encode(item, refuse))), refuse)
        assert found == item and type(found) is type(item)
    for message in (
        {},
        [],
        ["d", [[1]]],
        ["d", [[["l", []], 1]]],
        ["bytes", "zz"],
        ["n", "no_such"],
        ["s", [["l", []]]],
        ["l"],
        ["l", 5],
        ["decimal", "x"],
    ):
        with pytest.raises(Closed):
            decode(message, lambda _: (_ for _ in ()).throw(KeyError()))


def test_options_are_checked():
    with pytest.raises(ConfigError, match="'all' or 'share'"):
        get_reward("code_tests", {"value": "most"})
    with pytest.raises(ConfigError, match="did you mean `timeout_s`"):
        get_reward("code_tests", {"timeout": 3})
