"""Keys, reasons, selections: what a plan says before anything has run, and after something has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import core_kit
import pytest
from core_kit import CHAIN, Home

from posttrain.config.pipeline import load_pipeline
from posttrain.core.plan import PlannedStage, Selection, _differences, make_plan
from posttrain.core.run import run_dir
from posttrain.core.worker import guarded
from posttrain.errors import ConfigError

ALL = Selection()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    core_kit.prepare(monkeypatch, tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    return Home(tmp_path)


def plan(home: Home, *overrides: str, selection: Selection = ALL) -> dict[str, PlannedStage]:
    pipeline = load_pipeline(home.file, overrides)
    return {s.name: s for s in make_plan(pipeline, run_dir(pipeline, str(home.runs)), selection)}


def commit_all(home: Home, *overrides: str, selection: Selection = ALL) -> dict[str, PlannedStage]:
    """Runs what is to be run, in this process."""
    from posttrain.core.launch import prepare

    pipeline = load_pipeline(home.file, overrides)
    run = run_dir(pipeline, str(home.runs))
    for name in [s.name for s in pipeline.stages]:
        stage = plan(home, *overrides, selection=selection)[name]
        if stage.todo:
            prepare(stage, run, False)
            assert guarded(stage.folder) == 0
    return plan(home, *overrides)


def test_first_plan_is_complete_before_anything_ran(home: Home) -> None:
    found = plan(home)
    assert {s.action for s in found.values()} == {"run"}
    assert {s.why for s in found.values()} == {"not made yet"}
    assert len({s.key for s in found.values()}) == 3
    assert found["used"].inputs["data"][0].key == found["made"].key
    assert found["used"].folder.name == f"02-used-{found['used'].key[:10]}"


def test_everything_is_reused_after_a_run(home: Home) -> None:
    found = commit_all(home)
    assert {(s.action, s.why) for s in found.values()} == {("reuse", "committed")}


@pytest.mark.parametrize(
    ("override", "changed", "reason"),
    [
        ("stages.made.rows=6", {"made", "used", "also"}, "rows changed from 5 to 6"),
        ("stages.made.note=x", {"made", "used", "also"}, 'note changed from "" to "x"'),
        ("stages.also.factor=3.0", {"also"}, "factor changed from 2.0 to 3.0"),
        ("seed=4", {"made", "used", "also"}, "seed changed from 3 to 4"),
        ("stages.used.seed=9", {"used"}, "seed changed from 3 to 9"),
        ("sources.texts.split.validation=0.5", {"also"}, "input `data` changed"),
    ],
)
def test_a_semantic_change_gives_a_new_key_and_says_why(home: Home, override: str, changed: set[str], reason: str) -> None:
    commit_all(home)
    found = plan(home, override)
    assert {name for name, s in found.items() if s.action == "run"} == changed
    first = next(s for s in found.values() if s.todo)
    assert first.why == reason
    rest = [s.why for s in found.values() if s.todo and s is not first and not override.startswith("seed")]
    assert set(rest) <= {"input `data` changed", reason}


@pytest.mark.parametrize(
    "override",
    [
        "stages.made.chatty=5",
        "stages.used.launch={with: torchrun, processes: 2}",
        "tracking={to: [jsonl, tensorboard], project: x}",
        "limits={wall_hours: 3}",
        "stages.used.eval={sets: []}",
    ],
)
def test_what_cannot_change_the_bytes_changes_no_key(home: Home, override: str) -> None:
    commit_all(home)
    assert {s.action for s in plan(home, override).values()} == {"reuse"}


def test_input_made_again_with_other_bytes(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    commit_all(home)
    monkeypatch.setenv("CORE_SALT", "other")
    before = plan(home, selection=Selection(force=("made",)))
    assert before["made"].why == "--force"
    assert before["used"].why == "committed; its inputs are checked again when they are made"
    commit_all(home, selection=Selection(only=("made",), force=("made",)))
    found = plan(home)
    assert found["made"].action == "reuse"
    assert {n: (s.action, s.why) for n, s in found.items() if s.todo} == dict.fromkeys(
        ("used", "also"), ("run", "input `made` was made again and differs")
    )
    commit_all(home)
    assert "other" in (plan(home)["used"].folder / "out" / "result.json").read_text()


def test_input_made_again_with_the_same_bytes_changes_nothing(home: Home) -> None:
    commit_all(home)
    commit_all(home, selection=Selection(only=("made",), force=("made",)))
    assert {s.action for s in plan(home).values()} == {"reuse"}


def test_unfinished_work_from_other_input_is_not_gone_on_with(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.core.launch import prepare

    commit_all(home, selection=Selection(only=("made",)))
    home.trouble(used="data")
    pipeline = load_pipeline(home.file)
    stage = plan(home)["used"]
    prepare(stage, run_dir(pipeline, str(home.runs)), False)
    assert guarded(stage.folder) == 4
    (stage.folder / "work" / "checkpoint-5").mkdir()
    assert plan(home)["used"].action == "resume"
    home.trouble()
    monkeypatch.setenv("CORE_SALT", "other")
    commit_all(home, selection=Selection(only=("made",), force=("made",)))
    stage = plan(home)["used"]
    assert (stage.action, stage.why) == ("run", "input `made` was made again and differs")
    commit_all(home)
    assert not (stage.folder / "work" / "checkpoint-5").exists()


def test_prepared_but_never_started_is_no_unfinished_stage(home: Home) -> None:
    from posttrain.core.launch import prepare

    pipeline = load_pipeline(home.file)
    stage = plan(home)["made"]
    assert prepare(stage, run_dir(pipeline, str(home.runs)), False).name == "1"
    assert plan(home)["made"].action == "run"
    assert prepare(stage, run_dir(pipeline, str(home.runs)), False).name == "1"


EVAL = CHAIN.replace("stages:", "eval:\n  sets:\n    val: {from: 'texts:validation', metrics: [loss], rows: 3}\nstages:", 1)


def test_reused_stage_says_when_its_evaluation_is_out_of_date(home: Home) -> None:
    home.write(EVAL)
    assert commit_all(home)["used"].why == "committed"
    changed = plan(home, "eval.sets.val.rows=2")
    assert changed["used"].action == "reuse"
    assert changed["used"].why == "committed; its evaluation sets have changed since (--force used to measure again)"
    assert changed["made"].why == "committed"


def test_held_out_rows_are_part_of_the_key_of_what_trains(home: Home) -> None:
    commit_all(home)
    home.write(EVAL)
    found = plan(home)
    assert found["made"].action == "reuse"
    assert found["used"].why == "the held-out rows changed"


def test_the_eval_sets_of_an_eval_stage_are_part_of_its_key(home: Home, tiny_spec: str) -> None:
    text = EVAL + "  - {name: measured, method: eval, in: {}}\n" + f"model: {tiny_spec}\n"
    home.write(text)
    first = plan(home)["measured"].key
    assert plan(home, "eval.sets.val.rows=2")["measured"].key != first
    assert plan(home, "eval.batch=7")["measured"].key == first
    assert plan(home, "stages.also.factor=5.0")["measured"].key == first


@pytest.fixture
def tiny_spec(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x")
    return "{id: ./model}"


def test_model_enters_by_content_not_by_place(home: Home, tiny_spec: str) -> None:
    home.write(CHAIN + "  - {name: copy, method: core.model}\n" + f"model: {tiny_spec}\n")
    first = plan(home)["copy"].key
    (home.folder / "model").rename(home.folder / "elsewhere")
    assert plan(home, f"model.id={home.folder}/elsewhere")["copy"].key == first
    (home.folder / "elsewhere" / "model.safetensors").write_bytes(b"y")
    assert plan(home, f"model.id={home.folder}/elsewhere")["copy"].key != first


def test_selection(home: Home) -> None:
    assert [s.action for s in plan(home, selection=Selection(until="used")).values()] == ["run", "run", "skip"]
    assert [s.action for s in plan(home, selection=Selection(only=("made",))).values()] == ["run", "skip", "skip"]
    with pytest.raises(ConfigError, match="stages.used: needs `made`, which is left out and not committed"):
        plan(home, selection=Selection(from_="used"))
    commit_all(home, selection=Selection(until="made"))
    assert [s.action for s in plan(home, selection=Selection(from_="used")).values()] == ["reuse", "run", "run"]
    assert [s.action for s in plan(home, selection=Selection(force=("all",))).values()] == ["run", "run", "run"]


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        (Selection(only=("usd",)), "--only: no stage `usd`\n  fix: did you mean `used`"),
        (Selection(only=("all",)), "--only: no stage `all`"),
        (Selection(force=("zzz",)), "--force: no stage `zzz`\n  fix: stages: made, used, also"),
        (Selection(from_="also", until="made"), "`made` comes before `also`"),
    ],
)
def test_bad_selection(home: Home, selection: Selection, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(home, selection=selection)
    assert words in str(caught.value)


def test_differences_are_told_in_the_words_of_the_file() -> None:
    old: dict[str, Any] = {"version": 1, "seed": 1, "config": {"optim": {"lr": 1e-5}, "trl": {}}, "inputs": {"data": [1]}, "heldout": ["a"]}
    new = {"version": 2, "seed": 1, "config": {"optim": {"lr": 1e-4}, "trl": {"a": "b" * 99}}, "inputs": {"data": [2]}, "heldout": []}
    assert _differences(old, new) == [
        "optim.lr changed from 1e-05 to 0.0001",
        'trl.a changed from none to "' + "b" * 56 + "...",
        "the held-out rows changed",
        "input `data` changed",
        "the method's version changed from 1 to 2",
    ]


def test_keys_do_not_depend_on_the_hash_seed_or_the_folder(home: Home) -> None:
    keys = set()
    for seed, cwd in (("0", home.folder), ("1", Path("/")), ("2", home.folder.parent)):
        command = [
            sys.executable,
            "-m",
            "posttrain",
            "plan",
            str(home.file),
            "--json",
            "--plugin",
            "core_methods",
            "--runs",
            str(home.runs),
        ]
        done = subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": core_kit.PATH},
        )
        keys.add(tuple(item["key"] for item in json.loads(done.stdout)))
    assert len(keys) == 1
