"""Programs judged by tests: assertions that call them, or what they print for an input.

The program is the last fenced Python block of the completion (else the last fenced block, else the whole text). It runs in
a jail, apart from the tests, which never enter its process; see `sandbox.code_task` for what a test may do and why exiting,
patching, printing verdicts or returning objects that equal everything does not pass. Tests of one row share the program's
process, in order, as they would in one file.

Whose fault it is decides the value: a program that does not compile, crashes, hangs, or takes too much memory, output or
processes fails its tests, 0.0 (`killed: none` makes it None where a limit was reached). Tests that are missing, do not parse or
pass objects of their own are the data's fault, None and counted; so is what the batch's time did not reach.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from typing import Any, Literal

from posttrain.rewards.registry import completion_text, count_failure, reward
from posttrain.rewards.sandbox.jail import Limits
from posttrain.rewards.sandbox.pool import CODE, Outcome, Task

MOST_CHARS = 200_000
INPUT, OUTPUT = ("stdin", "input"), ("stdout", "output")
Test = str | tuple[str, str]


def extract_program(text: str) -> str:
    """The last fenced Python block, else the last fenced block, else the text; a block that is not closed ends with the text."""
    blocks: list[tuple[bool, list[str]]] = []
    fence = ""
    for line in text.splitlines():
        mark = line.strip()
        if not fence and mark.startswith(("```", "~~~")):
            fence = mark[: len(mark) - len(mark.lstrip(mark[0]))]
            blocks.append((mark[len(fence) :].strip().lower() in ("python", "py", "python3"), []))
        elif fence and mark == fence:
            fence = ""
        elif fence:
            blocks[-1][1].append(line)
    chosen = [lines for python, lines in blocks if python] or [lines for _, lines in blocks]
    return "\n".join(chosen[-1]) if chosen else text


def read_tests(value: Any) -> list[Test] | None:
    """The tests of one row; None where they are none.

    Args:
        value: texts with assertions, pairs `{stdin, stdout}` (also `{input, output}`), a list of either, or such a list as JSON.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    items = value if isinstance(value, list | tuple) else [value]
    tests = [_read_test(item) for item in items]
    return [test for test in tests if test is not None] if tests and None not in tests else None


def _read_test(item: Any) -> Test | None:
    if isinstance(item, str):
        try:
            body = ast.parse(item).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
        return item if body else None
    if isinstance(item, dict):
        given = next((item[key] for key in INPUT if key in item), "")
        wanted = next((item[key] for key in OUTPUT if key in item), None)
        return (given, wanted) if isinstance(given, str) and isinstance(wanted, str) else None
    return None


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _tasks(program: str, tests: Sequence[Test]) -> list[Task]:
    """One task for all assertions, one for each input."""
    asserts = [test for test in tests if isinstance(test, str)]
    inputs = [Task({"alone": True, "program": program}, stdin=test[0]) for test in tests if not isinstance(test, str)]
    return ([Task({"program": program}, items=asserts)] if asserts else []) + inputs


def _in_order(tests: Sequence[Test], outcomes: Sequence[Sequence[Outcome]]) -> list[Outcome]:
    """Outcomes in the order of the tests."""
    asserts = iter(outcomes[0] if any(isinstance(test, str) for test in tests) else [])
    inputs = iter([item[0] for item in outcomes[len(outcomes) - sum(not isinstance(test, str) for test in tests) :]])
    return [next(asserts) if isinstance(test, str) else next(inputs) for test in tests]


def _passed(test: Test, outcome: Outcome) -> bool:
    if outcome.status != "done":
        return False
    if isinstance(test, str):
        return bool(outcome.value == "passed")
    return outcome.code == 0 and _lines(outcome.output) == _lines(test[1])


def _value(tests: Sequence[Test], outcomes: Sequence[Outcome], share: bool, killed: str) -> tuple[float | None, str]:
    """(value, reason why there is none)."""
    if any(outcome.status == "late" for outcome in outcomes):
        return None, "timeout"
    if any(outcome.value == "unsupported" for outcome in outcomes):
        return None, "bad_tests"
    if killed == "none" and any(outcome.status != "done" for outcome in outcomes):
        return None, "killed"
    passed = [_passed(test, outcome) for test, outcome in zip(tests, outcomes, strict=True)]
    return sum(passed) / len(passed) if share else float(all(passed)), ""


@reward("code_tests", columns=("tests",))
def code_tests(
    completions: Sequence[Any],
    tests: Sequence[Any],
    *,
    value: Literal["all", "share"] = "all",
    timeout_s: float = 5.0,
    batch_timeout_s: float = 120.0,
    memory_mb: int = 1024,
    output_kb: int = 256,
    processes: int = 16,
    killed: Literal["wrong", "none"] = "wrong",
    **columns: Any,
) -> list[float | None]:
    """1.0 where the completion's program passes its row's tests, 0.0 where not, or the share that it passes; None: not judged.

    Args:
        completions: texts, or lists of messages.
        tests: for each row a list of texts with assertions (`assert f(2) == 4`, `def test_x(): ...`, `def check(g): ...` with
            its call) or of pairs `{stdin, stdout}`; see `read_tests`.
        value: `all`: 1.0 only if every test passes; `share`: passed over all.
        timeout_s: wall-clock seconds for one test, the program's start included.
        batch_timeout_s: seconds after which the rest of the batch is None (counted as `timeout`).
        memory_mb: MiB of address space that the program may add to its interpreter.
        output_kb: KiB that it may print in one test.
        processes: processes and threads that it may have at once.
        killed: what a program is that reached a limit: `wrong`, 0.0, or `none`, None and counted as `killed`.
    """
    limits = Limits(wall_s=timeout_s, cpu_s=timeout_s, memory_mb=memory_mb, output_bytes=output_kb << 10, processes=processes)
    known = [read_tests(item) for item in tests]
    programs = [extract_program(completion_text(completion)) for completion in completions]
    chunks = [_tasks(program, own) if own and len(program) <= MOST_CHARS else [] for program, own in zip(programs, known, strict=True)]
    found = iter(CODE.run([task for chunk in chunks for task in chunk], limits, batch_timeout_s))
    values: list[float | None] = []
    for own, chunk in zip(known, chunks, strict=True):
        outcomes = [next(found) for _ in chunk]
        if not own:
            result: tuple[float | None, str] = (None, "bad_tests")
        elif not chunk:
            result = (0.0, "")
        else:
            result = _value(own, _in_order(own, outcomes), value == "share", killed)
        if result[1]:
            count_failure("code_tests", result[1])
        values.append(result[0])
    return values
