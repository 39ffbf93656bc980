"""The loss mask as text: in `data/mask.py`, in `validate --deep`, in `show`, in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.common import DataConfig
from posttrain.config.pipeline import parse_pipeline
from posttrain.core.report import write_report
from posttrain.core.rundir import RunDir
from posttrain.data.chat import encode_rows
from posttrain.data.mask import LONG, check_stops, loss_runs, marked, shown_rows, told
from posttrain.errors import DataError
from posttrain.verbs.deep import deep_check

TURNS = [{"role": "user", "content": "What is 12?"}, {"role": "assistant", "content": "Ünïcode — 日本 12."}]


def _encoded(tokenizer: Any, rows: list[dict[str, Any]], **fields: Any) -> list[Any]:
    return encode_rows(tokenizer, rows, DataConfig.model_validate({"max_length": 128, **fields}))[0]


def test_runs_are_the_whole_text_with_its_marks(tiny_tokenizer: Any) -> None:
    (item,) = _encoded(tiny_tokenizer, [{"messages": TURNS}])
    runs = loss_runs(tiny_tokenizer, item.input_ids, item.loss_mask)
    assert "".join(text for text, _, _ in runs) == tiny_tokenizer.decode(item.input_ids)
    assert [(text, bit) for text, bit, _ in runs] == [
        ("<|im_start|>user\nWhat is 12?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Ünïcode — 日本 12.<|im_end|>", True),
        ("\n", False),
    ]
    assert sum(length for _, bit, length in runs if bit) == item.supervised
    assert marked(runs) == ("<|im_start|>user\\nWhat is 12?<|im_end|>\\n<|im_start|>assistant\\n⟦Ünïcode — 日本 12.<|im_end|>⟧\\n")


def test_a_mask_that_is_off_by_one_is_seen(tiny_tokenizer: Any) -> None:
    (item,) = _encoded(tiny_tokenizer, [{"messages": TURNS}])
    shifted = [*item.loss_mask[1:], 0]
    assert marked(loss_runs(tiny_tokenizer, item.input_ids, shifted)) != marked(loss_runs(tiny_tokenizer, item.input_ids, item.loss_mask))


def test_the_first_token_and_long_runs(tiny_tokenizer: Any) -> None:
    (item,) = _encoded(tiny_tokenizer, [{"text": "12 + 34 " * 100}], max_length=1024)
    (shown,) = shown_rows(tiny_tokenizer, [item])
    assert shown["loss"] == shown["tokens"] - 1 == item.supervised and shown["text"].startswith("1⟦2 + 34")
    assert len(shown["text"]) < LONG + 60 and "characters" in shown["text"] and shown["text"].endswith("<|im_end|>⟧")
    assert told([shown])[0].startswith(f"sequence 1, {item.supervised} of {len(item.input_ids)} tokens carry loss")


def test_text_of_one_character_over_many_tokens_is_not_lost(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("日")["input_ids"]
    assert len(ids) == 3
    runs = loss_runs(tiny_tokenizer, ids, [0, 0, 1])
    assert [(bit, length) for _, bit, length in runs] == [(False, 2), (True, 1)] and all(text for text, _, _ in runs)


@pytest.mark.parametrize(("limit", "trained"), [(128, 1), (24, 0)])
def test_stops(tiny_tokenizer: Any, limit: int, trained: int) -> None:
    rows = [{"prompt": "1 + 1 =", "answer": "1 2 3 4 5 6 7 8 9 10"}, {"text": "a text"}]
    _, report = encode_rows(tiny_tokenizer, rows, DataConfig.model_validate({"max_length": limit}))
    assert (report["answers"], report["stops_trained"]) == (1, trained)
    if trained:
        check_stops(report, "stages.s.data.max_length")
    else:
        with pytest.raises(DataError, match=r"none of 1 answers.*1 are cut"):
            check_stops(report, "stages.s.data.max_length")


def _pipeline(tmp_path: Path, model: Path, max_length: int = 128, **fields: Any) -> Any:
    rows = tmp_path / "chat.jsonl"
    rows.write_text("".join(json.dumps({"messages": TURNS}) + "\n" for _ in range(4)), encoding="utf-8")
    sft = {"name": "sft", "method": "sft", "in": {"data": "chat"}, "steps": 1, "data": {"max_length": max_length}, **fields}
    source = {"kind": "messages", "path": str(rows)}
    return parse_pipeline({"version": 1, "name": "m", "model": {"id": str(model)}, "sources": {"chat": source}, "stages": [sft]}, tmp_path)


def test_validate_deep_shows_the_mask_and_finds_lost_stops(tmp_path: Path, tiny_model_dir: Path) -> None:
    lines: list[str] = []
    assert deep_check(_pipeline(tmp_path, tiny_model_dir), str(tmp_path / "runs"), show=lines.append) == []
    assert len(lines) == 2 and lines[0].startswith("stages.sft: sequence 1, ") and "⟦Ünïcode — 日本 12.<|im_end|>⟧" in lines[0]
    with pytest.raises(DataError, match=r"stages\.sft\.data\.max_length.*carries loss in none of 4 answers"):
        deep_check(_pipeline(tmp_path, tiny_model_dir, max_length=26), str(tmp_path / "runs"))


def test_four_bits_without_a_gpu_are_found_by_validate_deep(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.errors import ConfigError

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    pipeline = _pipeline(tmp_path, tiny_model_dir, lora={"load_in_4bit": True})
    with pytest.raises(ConfigError, match=r"stages\.sft\.lora\.load_in_4bit: a base in four bits needs a GPU"):
        deep_check(pipeline, str(tmp_path / "runs"))


def test_show_and_report_hold_the_mask(tmp_path: Path, tiny_tokenizer: Any) -> None:
    from posttrain.verbs.look import _facts

    shown = shown_rows(tiny_tokenizer, _encoded(tiny_tokenizer, [{"messages": TURNS}]))
    manifest = {
        "schema": 1, "kind": "model", "key": "b" * 64, "name": "sft", "method": "sft", "method_version": 1, "inputs": [], "seed": 0,
        "code": {}, "packages": {}, "attempts": 1, "started": 1e9, "ended": 1e9, "seconds": 1.0,
        "summary": {"encoding": {"shown": shown}}, "meta": {}, "files": [], "digest": "d" * 64,
    }  # fmt: skip
    assert any("⟦Ünïcode — 日本 12.<|im_end|>⟧" in line for line in _facts(manifest, tmp_path))
    run = RunDir(tmp_path / "run")
    folder = run.stage_dir(0, "sft", "b" * 64)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    text = write_report(run).read_text(encoding="utf-8")
    assert "Loss mask" in text and "⟦Ünïcode — 日本 12.&lt;|im_end|&gt;⟧" in text
