"""What `plan` says of a training stage's data: rows, tokens, epochs, and what it cannot know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.pipeline import load_pipeline
from posttrain.core.plan import make_plan
from posttrain.core.run import run_dir
from posttrain.verbs import amounts as module
from posttrain.verbs.amounts import amounts, describe_amounts

ROWS = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(60)]
SFT: dict[str, Any] = {"name": "s", "method": "sft", "in": {"data": "d"}, "batch": {"rows": 10}, "data": {"max_length": 64}}


def planned(folder: Path, model: Path, *stages: dict[str, Any], **extra: Any) -> dict[str, dict[str, Any]]:
    """Amounts of every stage of a pipeline, by name."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    source = {"kind": "verifiable", "path": "./rows.jsonl", **extra.pop("source", {})}
    body = {"version": 1, "name": "p", "seed": 0, "model": {"id": str(model)}, "sources": {"d": source}, "stages": list(stages), **extra}
    (folder / "p.yaml").write_text(json.dumps(body))
    pipeline = load_pipeline(folder / "p.yaml", [])
    stages_of = make_plan(pipeline, run_dir(pipeline, str(folder / "runs")))
    return {stage.name: amounts(stage, {s.name: s for s in stages_of}) for stage in stages_of}


def tokens(model: Path, rows: list[dict[str, Any]], limit: int = 64) -> int:
    from tokenizers import Tokenizer

    from posttrain.data.rows import row_text

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return sum(min(len(tokenizer.encode(row_text(row)).ids), limit) for row in rows)


def test_steps_rows_and_tokens(tiny_model_dir: Path, tmp_path: Path) -> None:
    found = planned(tmp_path, tiny_model_dir, {**SFT, "steps": 30})["s"]
    assert (found["rows"], found["epochs"]) == (60, 5.0)
    assert found["unique_tokens"] == tokens(tiny_model_dir, ROWS) and found["tokens_seen"] == 5 * found["unique_tokens"]
    lines = describe_amounts(found)
    assert "60 rows, about" in lines[0] and "5 epochs" in lines[0]
    assert lines[1].strip().startswith("warning 5 epochs over the same data, more than 4")


def test_epochs_are_as_given_and_four_are_no_warning(tiny_model_dir: Path, tmp_path: Path) -> None:
    found = planned(tmp_path, tiny_model_dir, {**SFT, "epochs": 4})["s"]
    assert found["epochs"] == 4.0 and len(describe_amounts(found)) == 1


def test_packed_epochs_come_from_tokens(tiny_model_dir: Path, tmp_path: Path) -> None:
    stage = {**SFT, "steps": 3, "batch": {"tokens": 640, "per_device": 8}, "data": {"max_length": 64, "packing": True}}
    found = planned(tmp_path, tiny_model_dir, stage)["s"]
    assert found["epochs"] == pytest.approx(3 * 640 / found["unique_tokens"], abs=1e-3)
    assert found["tokens_seen"] == pytest.approx(3 * 640, rel=0.01)


def test_held_out_rows_and_repeats_are_counted_as_the_run_does(tiny_model_dir: Path, tmp_path: Path) -> None:
    held = {"source": {"split": {"test": 0.2}}, "eval": {"sets": {"t": {"from": "d:test", "metrics": ["loss"]}}}}
    found = planned(tmp_path, tiny_model_dir, {**SFT, "steps": 10}, **held)["s"]
    assert found["rows"] < 60 and found["epochs"] == pytest.approx(100 / found["rows"], abs=1e-3)
    (tmp_path / "b").mkdir()
    twice = {**SFT, "epochs": 1, "in": {"data": [{"from": "d", "repeat": 2}]}}
    found = planned(tmp_path / "b", tiny_model_dir, twice)["s"]
    assert (found["rows"], found["epochs"]) == (60, 2.0) and found["tokens_seen"] == 2 * found["unique_tokens"]


def test_groups_of_completions_are_passes_over_prompts(tiny_model_dir: Path, tmp_path: Path) -> None:
    stage = {**SFT, "method": "grpo", "steps": 6, "group": 4, "batch": {"rows": 40}, "rollout": {"max_tokens": 8}}
    found = planned(tmp_path, tiny_model_dir, stage)["s"]
    assert (found["rows"], found["epochs"]) == (60, 1.0) and "tokens_seen" not in found


def test_hyperfitting_takes_blocks_and_means_its_epochs(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"Line {i} of a text."}) + "\n" for i in range(50)))
    blocks = {"samples": 8, "sequence_length": 32, "context_tokens": 8, "window": 16, "validation": 4, "contexts": 2}
    stage = {"name": "h", "method": "hyperfit", "in": {"data": "t"}, **blocks}
    texts = {"t": {"kind": "text", "path": "./texts.jsonl"}}
    for extra, epochs in (({}, 20.0), ({"steps": 10, "batch": {"rows": 4}}, 5.0)):
        folder = tmp_path / str(epochs)
        folder.mkdir()
        (folder / "texts.jsonl").write_bytes((tmp_path / "texts.jsonl").read_bytes())
        found = planned(folder, tiny_model_dir, {**stage, **extra}, sources=texts)["h"]
        assert (found["rows"], found["unique_tokens"], found["epochs"]) == (50, 256, epochs) and found["tokens_seen"] == 256 * epochs
        assert len(describe_amounts(found)) == 1, "no warning"


def test_what_is_not_there_yet_is_said(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pick = {"name": "pick", "method": "select.random", "in": {"raw": "d"}, "budget": {"rows": 20}}
    chain = [
        {**SFT, "epochs": 1},
        pick,
        {**SFT, "name": "later", "in": {"data": "pick"}, "epochs": 1},
        {**SFT, "name": "next", "epochs": 1},
    ]
    found = planned(tmp_path, tiny_model_dir, *chain)
    assert found["pick"] == {} and found["later"] == {"later": "known once `pick` has run"}
    assert found["next"]["unique_tokens"] == found["s"]["unique_tokens"], "a stage passes its input's tokenizer on"
    monkeypatch.setattr(module, "READ_MIB", 0)
    assert "counted when it runs" in planned(tmp_path, tiny_model_dir, {**SFT, "epochs": 1})["s"]["later"]
