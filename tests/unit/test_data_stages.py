"""make.stdlib and make.arithmetic: real text and checkable problems, the same bytes every time."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from posttrain.core.context import StageContext
from posttrain.core.events import Events
from posttrain.data.shards import expand_shards, read_shard
from posttrain.errors import DataError
from posttrain.stages import make_corpus, make_tasks
from posttrain.stages.make_corpus import MakeStdlibConfig, stdlib_files, texts_of
from posttrain.stages.make_tasks import MakeArithmeticConfig, problem, problem_count


def made(module: Any, config: Any, folder: Path, seed: int = 0) -> tuple[StageContext, list[dict[str, Any]]]:
    """Runs a stage; its context and rows."""
    ctx = StageContext("x", config.method, seed, {}, folder / "out", folder / "work", Events(None))
    module.run(config, ctx)
    return ctx, [row for shard in expand_shards(folder / "out") for _, row in read_shard(shard)]


def digest(folder: Path) -> str:
    """One hash over all files of a stage's output."""
    return hashlib.sha256(b"".join(f.read_bytes() for f in sorted((folder / "out").iterdir()))).hexdigest()


def test_two_digit_addition_is_ten_thousand_problems_of_fixed_width(tmp_path: Path) -> None:
    ctx, rows = made(make_tasks, MakeArithmeticConfig(name="tasks", split={"validation": 0.05, "test": 0.05}), tmp_path)
    assert len(rows) == len({row["prompt"] for row in rows}) == ctx.summary["rows_out"] == 10_000
    assert {(len(row["prompt"]), len(row["answer"])) for row in rows} == {(6, 3)}
    for row in rows[:500]:
        left, right = row["prompt"].rstrip("=").split("+")
        assert int(left) + int(right) == int(row["answer"])
    assert ctx.meta == {"row_type": "verifiable", "rows": 10_000, "split": {"validation": 0.05, "test": 0.05}}


@pytest.mark.parametrize("ops", [["-"], ["*"], ["+", "-", "*"]])
def test_other_operations_are_right_and_padded_to_one_width(ops: list[str]) -> None:
    config = MakeArithmeticConfig(name="t", ops=ops, digits=1)
    rows = [problem(i, config) for i in range(problem_count(ops, 1))]
    assert len({row["id"] for row in rows}) == len(rows) == 100 * len(ops)
    assert len({len(row["answer"]) for row in rows}) == 1
    assert all(eval(row["id"]) == int(row["answer"]) for row in rows)


def test_plain_numbers_and_own_prompt(tmp_path: Path) -> None:
    config = MakeArithmeticConfig(name="t", rows=25, pad=False, digits=3, prompt="What is {a} {op} {b}?", shards=4)
    _, rows = made(make_tasks, config, tmp_path)
    assert len(rows) == 25
    assert len(list((tmp_path / "out").glob("rows-*"))) == 4
    assert all(str(eval(row["id"])) == row["answer"] and row["prompt"].startswith("What is ") for row in rows)


def test_own_answer(tmp_path: Path) -> None:
    """The same problems, with their answers inside a text that a verifier can read."""
    plain = made(make_tasks, MakeArithmeticConfig(name="t", rows=25), tmp_path / "plain")[1]
    boxed = made(
        make_tasks, MakeArithmeticConfig(name="t", rows=25, answer=r"<think>{a}{op}{b}</think>\boxed{{{answer}}}"), tmp_path / "own"
    )[1]
    for one, other in zip(plain, boxed, strict=True):
        assert other["answer"] == f"<think>{one['prompt'].removesuffix('=')}</think>\\boxed{{{one['answer']}}}"
        assert (one["prompt"], one["id"]) == (other["prompt"], other["id"])


def test_the_seed_decides_the_bytes(tmp_path: Path) -> None:
    config = MakeArithmeticConfig(name="t", rows=50)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        made(make_tasks, config, tmp_path / name, seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rows": 10_001}, "exceeds the 10000 different problems"),
        ({"digits": 4}, "set `rows`"),
        ({"ops": ["+", "+"]}, "listed twice"),
        ({"prompt": "{a}+{b}="}, "must hold {a}, {op} and {b}"),
        ({"prompt": "{a"}, "no format text"),
        ({"answer": "{a}"}, "must hold {answer}"),
        ({"answer": "{answer} {c}"}, "must hold {answer}"),
        ({"answer": "{answer"}, "no format text"),
    ],
)
def test_problem_configs_are_checked(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        MakeArithmeticConfig(name="t", **fields)


def test_stdlib_rows_are_real_text_within_bounds(tmp_path: Path) -> None:
    config = MakeStdlibConfig(name="raw", modules=["statistics", "json", "heapq"], min_chars=60, max_chars=900, shards=3)
    ctx, rows = made(make_corpus, config, tmp_path)
    assert len(rows) == ctx.summary["rows_out"] > 60
    assert {row["part"] for row in rows} == {"code", "docstrings"}
    assert {row["module"].split(".")[0] for row in rows} == {"statistics", "json", "heapq"}
    assert all(60 <= len(row["text"]) <= 900 for row in rows)
    assert len({row["text"] for row in rows}) == len(rows)
    assert len(list((tmp_path / "out").glob("rows-*"))) == 3
    assert ctx.meta["row_type"] == "text"
    made(make_corpus, config, tmp_path / "again")
    assert digest(tmp_path) == digest(tmp_path / "again")


def test_raw_and_target_come_from_one_stage(tmp_path: Path) -> None:
    target = MakeStdlibConfig(name="target", parts=["docstrings"], modules=["statistics", "fractions"], min_chars=20)
    raw = MakeStdlibConfig(name="raw", modules=["statistics", "heapq"], exclude_modules=["statistics"], max_rows=10)
    _, wanted = made(make_corpus, target, tmp_path / "t")
    _, others = made(make_corpus, raw, tmp_path / "r")
    assert {row["part"] for row in wanted} == {"docstrings"}
    assert len(others) == 10
    assert {row["module"] for row in others} == {"heapq"}


def test_no_text_comes_twice_from_a_long_class(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    file.write_text(
        'class Long:\n    """Doc."""\n    @property\n    def a(self):\n        return 1\n\n'
        '    def b(self):\n        """B."""\n        def inner(): pass\n\ndef f(): pass\n'
    )
    names = [row["id"] for row in texts_of("m", file, ["code", "docstrings"], 40)]
    assert names == ["m:Long.a:4:code", "m:Long.b:7:code", "m:f:11:code", "m:Long:1:docstrings", "m:Long.b:7:docstrings"]
    texts = [row["text"] for row in texts_of("m", file, ["code"], 40)]
    assert texts[0] == "@property\ndef a(self):\n    return 1"
    assert [row["id"] for row in texts_of("m", file, ["code"], 4000)] == ["m:Long:1:code", "m:f:11:code"]


def test_tests_and_installed_packages_are_left_out() -> None:
    modules = [module for module, _ in stdlib_files([], [])]
    assert len(modules) > 300
    assert not any("test" in module.split(".") or "site-packages" in module for module in modules)


def test_stdlib_configs_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="did you mean `statistics`"):
        MakeStdlibConfig(name="t", modules=["statistic"])
    with pytest.raises(ValidationError, match="exceeds max_chars"):
        MakeStdlibConfig(name="t", min_chars=10, max_chars=5)
    with pytest.raises(DataError, match="no text of 80 to 2000 characters"):
        made(make_corpus, MakeStdlibConfig(name="t", modules=["math"]), tmp_path)
