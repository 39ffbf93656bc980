"""`validate --deep`: every finding at once, with file and row, and nothing found where all is well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.pipeline import parse_pipeline
from posttrain.core.rundir import RunDir
from posttrain.errors import ConfigError, DataError, RewardError
from posttrain.verbs import deep_model
from posttrain.verbs.deep import check_reward, deep_check

TASKS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(60)]


def _write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def _pipeline(tmp_path: Path, sources: dict[str, Any], stages: list[dict[str, Any]], **head: Any) -> Any:
    return parse_pipeline({"version": 1, "name": "deep", "sources": sources, "stages": stages, **head}, tmp_path)


def _init(**fields: Any) -> dict[str, Any]:
    return {"name": "base", "method": "init", "in": {"data": "tasks"}, "max_length": 64, **fields}


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Any]:
    return {"kind": "verifiable", "path": _write(tmp_path / "tasks.jsonl", TASKS), "split": {"test": 0.2}}


def test_a_sound_pipeline_passes(tmp_path: Path, tasks: dict[str, Any], tiny_model_dir: Path) -> None:
    sft = {
        "name": "sft",
        "method": "sft",
        "in": {"data": "tasks"},
        "steps": 2,
        "data": {"max_length": 64},
        "trl": {"pad_to_multiple_of": 8},
    }
    answers = {"name": "answers", "method": "generate", "in": {"data": "tasks:test"}, "max_tokens": 8}
    sets = {"sets": {"tasks": {"from": "tasks:test", "metrics": ["accuracy"]}}}
    pipeline = _pipeline(tmp_path, {"tasks": tasks}, [sft, answers], model={"id": str(tiny_model_dir)}, eval=sets)
    assert deep_check(pipeline, str(tmp_path / "runs")) == []


def test_all_bad_rows_are_named_and_all_problems_come_at_once(tmp_path: Path, tasks: dict[str, Any]) -> None:
    rows = [{"text": "good"}, '{"text": ', {"txt": "x"}, {"text": 7}, {"text": "good"}]
    bad = {"kind": "text", "path": _write(tmp_path / "bad.jsonl", rows)}
    gone = {"kind": "text", "path": str(tmp_path / "gone.jsonl")}
    few = {"kind": "text", "path": _write(tmp_path / "few.jsonl", [{"text": "only"}]), "split": {"test": 0.1, "validation": 0.1}}
    sources = {"tasks": tasks, "bad": bad, "gone": gone, "few": few}
    with pytest.raises(DataError) as caught:
        deep_check(_pipeline(tmp_path, sources, [_init()]), str(tmp_path / "runs"))
    text = str(caught.value)
    assert all(f"bad.jsonl:{n}" in text for n in (2, 3, 4)) and "gone.jsonl" in text and "sources.few.split" in text
    assert "bad.jsonl:1" not in text and "sources.tasks" not in text
    sft = {"name": "sft", "method": "sft", "in": {"data": "tasks"}, "steps": 1, "trl": {"nothing": 1}}
    with pytest.raises(ConfigError) as caught_too:
        deep_check(_pipeline(tmp_path, sources, [_init(), sft]), str(tmp_path / "runs"))
    assert "bad.jsonl:3" in str(caught_too.value) and "SFTConfig has no field `nothing`" in str(caught_too.value)


def test_skipped_rows_are_no_problem(tmp_path: Path) -> None:
    source = {"kind": "verifiable", "path": _write(tmp_path / "t.jsonl", [*TASKS, "broken"]), "on_bad": "skip"}
    assert deep_check(_pipeline(tmp_path, {"tasks": source}, [_init()]), str(tmp_path / "runs")) == []


def test_lengths_rewards_and_trl_fields(tmp_path: Path, tasks: dict[str, Any]) -> None:
    rl = {"name": "rl", "method": "grpo", "in": {"data": "tasks"}, "steps": 1, "group": 4, "batch": {"rows": 8, "per_device": 8}}
    rl |= {"rollout": {"max_tokens": 64}, "rewards": [{"use": "exact", "columns": {"answer": "gold"}}]}
    rl |= {"trl": {"loging_steps": 5, "learning_rate": 1.0e-3}}
    pipeline = _pipeline(tmp_path, {"tasks": tasks}, [_init(), rl])
    with pytest.raises(ConfigError) as caught:
        deep_check(pipeline, str(tmp_path / "runs"))
    text = str(caught.value)
    assert "stages.rl.rollout.max_tokens: 64 leaves no room" in text and "64 positions" in text
    assert "needs the column `gold`; columns there: answer" in text
    assert "stages.rl.trl.loging_steps" in text and "logging_steps" in text and "optim.lr" in text


def test_template_that_drops_turns_is_found_on_the_first_rows(tmp_path: Path, tiny_model_dir: Path) -> None:
    template = tmp_path / "last.jinja"
    template.write_text(
        "<|im_start|>user\n{{ messages[-1]['content'] }}<|im_end|>\n{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "reply"}]
    chat = {"kind": "messages", "path": _write(tmp_path / "chat.jsonl", [{"messages": turns}])}
    sft = {"name": "sft", "method": "sft", "in": {"data": "chat"}, "steps": 1, "data": {"template": str(template)}}
    with pytest.raises((DataError, ConfigError)) as caught:
        deep_check(_pipeline(tmp_path, {"chat": chat}, [sft], model={"id": str(tiny_model_dir)}), str(tmp_path / "runs"))
    assert "stages.sft" in str(caught.value)


def test_damaged_model_is_named(tmp_path: Path, tasks: dict[str, Any], tiny_model_dir: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    sft = {"name": "sft", "method": "sft", "in": {"data": "tasks"}, "steps": 1}
    with pytest.raises(ConfigError, match="damaged weights"):
        deep_check(_pipeline(tmp_path, {"tasks": tasks}, [sft], model={"id": str(copy)}), str(tmp_path / "runs"))


def test_memory_and_disk_that_cannot_suffice(
    tmp_path: Path, tasks: dict[str, Any], tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deep_model, "memory_bytes", lambda: 1000)
    monkeypatch.setattr(deep_model, "gpu_memory_bytes", lambda: None)
    monkeypatch.setattr(deep_model, "free_bytes", lambda path: 1000)
    sft = {"name": "sft", "method": "sft", "in": {"data": "tasks"}, "steps": 1}
    pipeline = _pipeline(tmp_path, {"tasks": tasks}, [sft], model={"id": str(tiny_model_dir)}, limits={"disk_gb": 1e-6})
    with pytest.raises(ConfigError) as caught:
        deep_check(pipeline, str(tmp_path / "runs"))
    text = str(caught.value)
    assert (
        "weights 0.0, gradients and moments" in text
        and "`lora`" in text
        and "limits.disk_gb" in text
        and "disk: the stages to run need" in text
    )


def test_nothing_is_written(tmp_path: Path, tasks: dict[str, Any]) -> None:
    pipeline = _pipeline(tmp_path, {"tasks": tasks}, [_init()])
    assert deep_check(pipeline, str(tmp_path / "runs")) == []
    assert not RunDir(tmp_path / "runs" / "deep").path.exists()


def test_reward_check() -> None:
    rows = [{"id": "1", "prompt": "p", "answer": "46"}, {"id": "2", "prompt": "p", "final": "46"}]
    check_reward("exact", {}, rows[:1], "x")
    check_reward("exact", {"answer": "final"}, rows[1:], "x")
    check_reward("length", {}, rows, "x")
    with pytest.raises(DataError, match="needs the column `answer`; columns there: final"):
        check_reward("exact", {}, rows, "x")
    with pytest.raises(ConfigError, match="did you mean `exact`"):
        check_reward("exakt", {}, [], "x")


def test_a_reward_that_raises_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.rewards import registry

    monkeypatch.setitem(registry._REWARDS, "broken", registry.Reward("broken", lambda completions, **c: [1.0, 2.0, 3.0], (), "", "test"))
    with pytest.raises(RewardError, match="wrong number of values"):
        check_reward("broken", {}, [{"prompt": "p"}], "x")
