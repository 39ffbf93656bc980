"""What a GPU changes: device placement and agreement with the CPU. Skipped where there is no GPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import CHATS, TASKS, Interrupted, at_step, digest, interrupt, run_stage

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

BASE = {"steps": 4, "batch": {"rows": 8, "per_device": 4}, "checkpoint": {"every": 2, "keep": 9}, "data": {"max_length": 64}}


def losses(ctx: Any) -> list[float]:
    """Logged losses, step by step."""
    return [e["values"]["loss"] for e in ctx.seen if e["kind"] == "metrics" and "loss" in e["values"]]


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
def test_sft_agrees_with_the_cpu(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any] | None
) -> None:
    fields = {**BASE, **({"lora": lora} if lora else {})}
    gpu = losses(run_stage(tmp_path / "gpu", "sft", CHATS, "messages", tiny_model_dir, **fields))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = losses(run_stage(tmp_path / "cpu", "sft", CHATS, "messages", tiny_model_dir, **fields))
    assert len(gpu) == 4 and gpu == pytest.approx(cpu, rel=1e-3)


def test_a_stopped_sft_goes_on_bitwise(tiny_model_dir: Path, tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run_stage(straight, "sft", CHATS, "messages", tiny_model_dir, **BASE)
    with pytest.raises(Interrupted):
        run_stage(resumed, "sft", CHATS, "messages", tiny_model_dir, sinks=[at_step(3, interrupt)], **BASE)
    run_stage(resumed, "sft", CHATS, "messages", tiny_model_dir, **BASE)
    assert digest(straight / "out") == digest(resumed / "out")


def test_grpo_runs(tiny_model_dir: Path, tmp_path: Path) -> None:
    fields = {"steps": 3, "batch": {"rows": 16, "per_device": 8}, "group": 4, "rewards": [{"use": "exact"}], "rollout": {"max_tokens": 6}}
    ctx = run_stage(tmp_path / "a", "grpo", TASKS, "verifiable", tiny_model_dir, **fields)
    assert len(losses(ctx)) == 3 and all(map(math.isfinite, losses(ctx)))


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_the_engine_samples_from_the_models_distribution(tiny_model_dir: Path, temperature: float) -> None:
    from posttrain.models.load import load_model
    from posttrain.rollout.base import Request, Sampling, request_seed
    from posttrain.rollout.hf import HFEngine

    loaded = load_model(tiny_model_dir)
    model, prompt = loaded.model.to("cuda"), loaded.tokenizer.encode("What is 12 + 34?")
    wanted = [Request(prompt, request_seed(7, "p", k), Sampling(max_tokens=10, temperature=temperature), str(k)) for k in range(4)]
    for completion in HFEngine(model, loaded.tokenizer).generate(wanted):
        ids = torch.tensor([completion.prompt_ids + completion.token_ids], device="cuda")
        with torch.no_grad():
            logps = torch.log_softmax(model(input_ids=ids).logits[0].float() / temperature, -1)
        expected = logps[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
        assert (torch.tensor(completion.logprobs) - expected).abs().max() < 1e-3


def test_a_quantized_export_reads_back(tiny_model_dir: Path, tmp_path: Path) -> None:
    from posttrain.core.artifact import InputRef
    from posttrain.core.context import StageContext
    from posttrain.core.events import Events
    from posttrain.core.registry import method

    found, out = method("quantize.rtn"), tmp_path / "out"
    out.mkdir()
    ref = InputRef("model", "m", "model", "model", spec={"id": str(tiny_model_dir)})
    ctx = StageContext("q", "quantize.rtn", 0, {"model": [ref]}, out, tmp_path / "work", Events(None))
    found.run(found.config.model_validate({"name": "q", "method": "quantize.rtn", "bits": 4, "group_size": 16}), ctx)
    assert ctx.summary["reload_max_diff"] <= ctx.summary["reload_limit"]
