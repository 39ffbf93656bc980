"""The generate stage: records, resuming by block, rewards, refusals."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

pytest.importorskip("torch")

from posttrain.core.artifact import InputRef
from posttrain.core.context import StageContext, World
from posttrain.core.events import Events
from posttrain.errors import ConfigError, DataError, RewardError
from posttrain.stages import generate
from posttrain.stages.generate import Config, run


def context(folder, model, kind, rows, seed=5):
    """A context whose port `data` is a source of these rows."""
    file = folder / f"{kind}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("out", "work"):
        (folder / name).mkdir(exist_ok=True)
    inputs = {
        "model": [InputRef("model", "tiny", "model", "model", spec={"id": str(model)})],
        "data": [InputRef("data", "d", "source", "dataset", split="all", rows=kind, spec={"kind": kind, "path": str(file)})],
    }
    return StageContext("g", "generate", seed, inputs, folder / "out", folder / "work", Events(folder / "events.jsonl"), World())


def config(**fields):
    """A Config for short completions."""
    return Config.model_validate({"name": "g", "method": "generate", "max_tokens": 4, "batch": 2, **fields})


def records(ctx):
    """What was written."""
    return [json.loads(line) for line in (ctx.out / "rollouts.jsonl").read_text().splitlines()]


TASKS = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(12)]


def test_records_and_summary(tiny_model_dir, tmp_path):
    ctx = context(tmp_path, tiny_model_dir, "verifiable", TASKS)
    run(config(samples=2, rewards=[{"use": "exact"}, {"use": "length", "weight": 0.5}]), ctx)
    found = records(ctx)
    assert len(found) == 24
    assert [item["sample"] for item in found[:4]] == [0, 1, 0, 1]
    for item in found:
        assert len(item["token_ids"]) == len(item["logprobs"]) <= 4
        assert item["reward"] == pytest.approx(item["rewards"]["exact"] + 0.5 * item["rewards"]["length"])
        assert item["answer"] and item["prompt"] and item["finish_reason"] in ("stop", "length")
    assert found[0]["token_ids"] != found[1]["token_ids"]
    summary = ctx.summary
    assert (summary["rows_in"], summary["rows_out"], summary["skipped"]) == (12, 24, 0)
    assert summary["tokens"] == sum(len(item["token_ids"]) for item in found)
    assert summary["tokens_per_s"] > 0 and len(summary["samples"]) == 8
    assert summary["reward"]["n"] == 24 and summary["reward"]["unjudged"] == 0


def test_a_killed_stage_goes_on_with_the_next_block(tiny_model_dir, tmp_path, monkeypatch):
    straight, cut = tmp_path / "a", tmp_path / "b"
    straight.mkdir(), cut.mkdir()
    whole = context(straight, tiny_model_dir, "verifiable", TASKS)
    run(config(), whole)
    ctx = context(cut, tiny_model_dir, "verifiable", TASKS)
    original, calls = generate._complete, []

    def dying(engine, block, cfg, ctx, constraint):
        calls.append(block[0][0])
        records = list(original(engine, block, cfg, ctx, constraint))
        yield from records[:3]
        if len(calls) == 2:
            raise KeyboardInterrupt
        yield from records[3:]

    monkeypatch.setattr(generate, "_complete", dying)
    with pytest.raises(KeyboardInterrupt):
        run(config(), ctx)
    run(config(), ctx)
    assert calls == [0, 8, 8]
    assert (ctx.out / "rollouts.jsonl").read_bytes() == (whole.out / "rollouts.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("prompt", {"prompt": [{"role": "user", "content": "The quick"}]}),
        ("messages", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        ("text", {"text": "The quick"}),
    ],
)
def test_row_types(tiny_model_dir, tiny_tokenizer, tmp_path, kind, row):
    ctx = context(tmp_path, tiny_model_dir, kind, [row])
    run(config(temperature=0.0), ctx)
    [item] = records(ctx)
    expected = "The quick" if kind == "text" else "<|im_start|>assistant\n"
    assert tiny_tokenizer.decode(item["prompt_ids"]).endswith(expected)
    assert ("<|im_start|>" in tiny_tokenizer.decode(item["prompt_ids"])) == (kind != "text")


def test_long_prompts_are_left_out_and_counted(tiny_model_dir, tmp_path):
    ctx = context(tmp_path, tiny_model_dir, "prompt", [{"prompt": "1 " * 600}, {"prompt": "a"}, {"prompt": "b"}])
    run(config(rows=2), ctx)
    assert [item["prompt"] for item in records(ctx)] == ["a"]
    assert (ctx.summary["rows_in"], ctx.summary["skipped"]) == (2, 1)
    with pytest.raises(DataError, match="the shortest prompt has"):
        run(config(max_tokens=511), context(tmp_path, tiny_model_dir, "prompt", [{"prompt": "a b c"}]))


def test_refusals(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="temperature 0 would be equal"):
        config(temperature=0.0, samples=2)
    with pytest.raises(ValueError, match="did you mean `exact`"):
        config(rewards=[{"use": "exac"}])
    with pytest.raises(ValueError, match="named twice"):
        config(rewards=[{"use": "exact"}, {"use": "exact"}])
    ctx = context(tmp_path, tiny_model_dir, "prompt", [{"prompt": "a", "final": "1"}])
    with pytest.raises(RewardError, match="`exact` needs the column `answer`"):
        run(config(rewards=[{"use": "exact"}]), ctx)
    run(config(rewards=[{"use": "exact", "columns": {"answer": "final"}}]), ctx)
    assert records(ctx)[0]["rewards"]["exact"] in (0.0, 1.0)
    ctx.world = World(0, 2)
    with pytest.raises(ConfigError, match="one process"):
        run(config(), ctx)


def test_constrained_completions(tiny_model_dir, tmp_path):
    ctx = context(tmp_path, tiny_model_dir, "verifiable", TASKS[:5])
    run(config(constraint={"regex": "[0-9]{1,2}"}, sampler={"particles": 3}, samples=2), ctx)
    found = records(ctx)
    assert len(found) == 10
    for item in found:
        if item["constrained"]["complete"]:
            assert item["completion"].isdigit() and len(item["completion"]) <= 2
        assert item["constrained"]["particles"] == 3 and item["constrained"]["calls"] > 1
    facts = ctx.summary["constrained"]
    assert sum(facts["finish_reasons"].values()) == 10 and facts["complete"] > 0.5
    assert "constrained" not in records_free(tmp_path / "free", tiny_model_dir)


def records_free(folder, model):
    """First record of a run without a constraint."""
    folder.mkdir()
    ctx = context(folder, model, "verifiable", TASKS[:1])
    run(config(), ctx)
    return records(ctx)[0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sampler": {"particles": 2}}, "`sampler` goes with `constraint`"),
        ({"constraint": {"boxed": True}, "top_p": 0.9}, "does not go with top_p"),
        ({"constraint": {"boxed": True}, "stop": ["x"]}, "stop strings"),
        ({"constraint": {"boxed": True}, "temperature": 0, "sampler": {"particles": 2}}, "would all be equal"),
    ],
)
def test_what_does_not_go_with_a_constraint(fields, words):
    with pytest.raises(ValidationError, match=words):
        config(**fields)


@pytest.mark.parametrize("fields", [{}, {"constraint": {"boxed": True}, "sampler": {"particles": 3}}])
def test_a_config_is_valid_once_it_is_written_out(fields):
    """A stage's process reads the whole config, defaults included."""
    cfg = config(**fields)
    assert Config.model_validate(cfg.model_dump(mode="json", by_alias=True)) == cfg


def test_a_constraint_that_cannot_be_names_its_place(tiny_model_dir, tmp_path):
    ctx = context(tmp_path, tiny_model_dir, "verifiable", TASKS[:1])
    with pytest.raises(ConfigError, match=r"uniqueItems") as error:
        run(config(constraint={"json_schema": {"type": "array", "uniqueItems": True}}), ctx)
    assert "stages.g.constraint.json_schema" in str(error.value)


@pytest.mark.vllm
def test_the_vllm_engine_writes_the_same_constrained_completions(tiny_model_dir, tmp_path):
    """Also of an adapter, which is merged for it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from posttrain.models.load import load_tokenizer
    from posttrain.models.save import save_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    save_model(adapted, load_tokenizer(tiny_model_dir), tmp_path / "adapter", base=tiny_model_dir)
    fields = {"constraint": {"regex": "[0-9]{1,3}"}, "samples": 2}
    found = []
    for engine in ("hf", "vllm"):
        (tmp_path / engine).mkdir()
        ctx = context(tmp_path / engine, tmp_path / "adapter", "verifiable", TASKS)
        run(config(engine=engine, **fields), ctx)
        found.append(records(ctx))
        assert ctx.summary["constrained"]["complete"] > 0.5 and ctx.summary["tokens_per_s"] > 0
    for a, b in zip(*found, strict=True):
        assert (a["id"], a["token_ids"], a["finish_reason"]) == (b["id"], b["token_ids"], b["finish_reason"])
    with pytest.raises(ValidationError, match="`vllm` goes with `engine: vllm`"):
        config(vllm={"segment": 8})
