"""Constrained rollouts in GRPO: who is constrained, what carries loss, weights, learning the format, and resuming."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import TASKS, Interrupted, at_step, curve, digest, grpo_trainer, interrupt, run_stage, same, weights

torch = pytest.importorskip("torch")

DIGITS = r"[0-9]{1,3}"


def constrained(pattern: dict[str, Any] | None = None, **fields: Any) -> Any:
    from posttrain.config.constraint import ConstraintConfig
    from posttrain.rollout._build import build_constraint
    from posttrain.trainers._grpo_constrained import Constrained

    return Constrained(build_constraint(ConstraintConfig(**(pattern or {"regex": DIGITS}))), **fields)


def trainer(folder: Path, out: Path, **options: Any) -> Any:
    from posttrain.rollout.hf import HFEngine
    from posttrain.trainers.grpo import GRPOTrainer

    extra = {"engine": partial(HFEngine, max_batch=32), **options.pop("extra", {})}
    return grpo_trainer(GRPOTrainer, folder, out, extra=extra, **options)


def logged(made: Any) -> dict[str, list[float]]:
    """Every metric's values, step by step."""
    found: dict[str, list[float]] = {}
    for item in made.state.log_history:
        for name, value in item.items():
            found.setdefault(name, []).append(value)
    return found


def watch(made: Any) -> list[dict[str, Any]]:
    """What `_generate_once` gives, with the texts and how they ended."""
    seen, given = [], made._generate_once

    def kept(inputs: Any) -> Any:
        output = given(inputs)
        requests, done = made._drawn
        seen.append({"output": dict(output.items()), "requests": list(requests), "done": list(done)})
        return output

    made._generate_once = kept
    return seen


@pytest.mark.parametrize("weighting", ["none", "sequence"])
def test_a_share_is_free_and_the_others_satisfy_the_constraint(tiny_model_dir: Path, tmp_path: Path, weighting: str) -> None:
    asked: list[Any] = []

    def reward(completions: list[Any], finish_reason: list[str], **_: Any) -> list[float]:
        asked.extend(finish_reason)
        return [float(len(c[0]["content"])) + 0.1 * i for i, c in enumerate(completions)]

    own = constrained(weighting=weighting, free_share=0.5)
    made = trainer(tiny_model_dir, tmp_path, rewards=reward, extra={"constrained": own}, max_steps=3)
    seen = watch(made)
    made.train()
    assert set(asked) <= {"stop", "length"} and asked
    for batch in seen:
        for i, (request, completion) in enumerate(zip(batch["requests"], batch["done"], strict=True)):
            assert (request.constraint is None) == (i % 4 >= 2)
            if request.constraint is not None and completion.finish_reason == "stop":
                assert re.fullmatch(DIGITS, completion.text)
        advantages = batch["output"]["advantages"].view(-1, 4)
        if weighting == "sequence":
            for part in (advantages[:, :2], advantages[:, 2:]):
                assert torch.allclose(part.sum(dim=1), torch.zeros(len(part)), atol=1e-5)
        else:
            assert torch.allclose(advantages.sum(dim=1), torch.zeros(len(advantages)), atol=1e-5)
    values = logged(made)
    assert all(math.isfinite(x) for name in ("constrained/calls", "constrained/log_weight", "free/valid") for x in values[name])
    assert min(values["constrained/log_weight"]) < -0.5 and values["constrained/dead"] == [0.0] * len(values["constrained/dead"])
    assert ("constrained/ess" in values) == (weighting == "sequence")
    assert max(values["rollout/logp_gap_max"]) < 1e-4


def test_weights_are_those_of_the_sampler(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Advantages of a batch by the formula, from what the engine said of each completion."""
    own = constrained(weighting="sequence", free_share=0.0, clip=1e9)
    made = trainer(tiny_model_dir, tmp_path, extra={"constrained": own}, max_steps=1, scale_rewards="none")
    seen = watch(made)
    made.train()
    batch, rewards = seen[0], made.reward_matrix[:, 0].double()
    logs = torch.tensor([c.extra["log_weight"] for c in batch["done"]], dtype=torch.float64).view(-1, 4)
    whole = torch.tensor([c.extra["complete"] for c in batch["done"]]).view(-1, 4)
    w = torch.where(whole, logs.exp(), 0.0)
    w = w / (w.sum(1, keepdim=True) / whole.sum(1, keepdim=True))
    r = rewards.nan_to_num().view(-1, 4)
    wanted = w * (r - (w * r).sum(1, keepdim=True) / w.sum(1, keepdim=True))
    assert torch.allclose(batch["output"]["advantages"].double().view(-1, 4), wanted, atol=1e-4)
    assert torch.equal(batch["output"]["completion_mask"].any(dim=1), whole.view(-1))


def test_dead_ends_carry_no_loss_and_are_in_no_mean(tiny_model_dir: Path, tmp_path: Path) -> None:
    from posttrain.rollout.constraints import predicate

    @predicate("stuck_grpo")
    def stuck(text: bytes, ends: bool) -> bool:
        return not text[:1].isalpha() or (len(text) < 3 and not ends)

    def reward(completions: list[Any], finish_reason: list[str], **_: Any) -> list[float]:
        return [100.0 if why == "dead_end" else float(i % 3) for i, why in enumerate(finish_reason)]

    own = constrained({"plugin": "stuck_grpo"}, free_share=0.0)
    made = trainer(tiny_model_dir, tmp_path, rewards=reward, extra={"constrained": own}, max_steps=3)
    seen = watch(made)
    made.train()
    dead = [(batch, i) for batch in seen for i, c in enumerate(batch["done"]) if c.finish_reason == "dead_end"]
    assert dead and len(dead) < sum(len(batch["done"]) for batch in seen)
    for batch, i in dead:
        assert not batch["output"]["completion_mask"][i].any() and float(batch["output"]["advantages"][i]) == 0.0
    for batch in seen:
        assert int(batch["output"]["num_items_in_batch"]) == int(batch["output"]["completion_mask"].sum())
        assert float(batch["output"]["advantages"].abs().max()) < 5
    assert all(torch.isfinite(value).all() for value in weights(made).values())
    assert max(logged(made)["constrained/dead"]) > 0


def test_a_batch_of_dead_ends_changes_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    from posttrain.rollout.constraints import predicate

    @predicate("nothing_grpo")
    def nothing(text: bytes, ends: bool) -> bool:
        return not text and not ends

    own = constrained({"plugin": "nothing_grpo"}, free_share=0.0, weighting="sequence")
    made = trainer(tiny_model_dir, tmp_path, extra={"constrained": own}, max_steps=2)
    before = weights(made)
    made.train()
    assert same(before, weights(made)) and logged(made)["steps_skipped"] == [1.0, 1.0]


@pytest.mark.parametrize("bound", [True, False])
def test_the_policy_learns_a_format_that_it_never_writes_by_itself(tiny_model_dir: Path, tmp_path: Path, bound: bool) -> None:
    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(re.fullmatch(DIGITS, c[0]["content"]) is not None) for c in completions]

    options = {"learning_rate": 0.03, "max_steps": 30, "lr_scheduler_type": "constant", "optim": "adamw_torch"}
    extra = {"constrained": constrained(free_share=0.5)} if bound else {}
    made = trainer(tiny_model_dir, tmp_path, rewards=reward, extra=extra, **options)
    made.train()
    valid = logged(made)["free/valid" if bound else "reward"]
    assert sum(valid[:5]) / 5 < 0.2
    assert (sum(valid[-5:]) / 5 > 0.8) == bound


@pytest.mark.parametrize("weighting", ["none", "sequence"])
def test_fast_forwards_give_the_same_steps(tiny_model_dir: Path, tmp_path: Path, weighting: str) -> None:
    found = []
    for fast in (False, True):
        extra = {"constrained": constrained(weighting=weighting, free_share=0.5), "fast": fast}
        made = trainer(tiny_model_dir, tmp_path / str(fast), extra=extra, max_steps=3)
        made.train()
        found.append(curve(made))
    for a, b in zip(*found, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


FIELDS: dict[str, Any] = {
    "steps": 5,
    "group": 4,
    "batch": {"rows": 8, "per_device": 4},
    "data": {"max_length": 64},
    "rewards": [{"use": "length"}],
    "checkpoint": {"every": 1, "keep": 9},
    "optim": {"lr": 0.03, "schedule": "constant", "warmup": 0},
    "rollout": {"max_tokens": 6, "constraint": {"regex": DIGITS}, "weighting": "sequence", "free_share": 0.5},
}


@pytest.mark.parametrize("dynamic", [None, {"round": 3}], ids=["plain", "dynamic"])
def test_a_stage_resumes_bitwise(tiny_model_dir: Path, tmp_path: Path, dynamic: Any) -> None:
    fields = FIELDS if dynamic is None else {**FIELDS, "dynamic": dynamic}
    run_stage(tmp_path / "a", "grpo", TASKS[:7], "verifiable", tiny_model_dir, **fields)
    with pytest.raises(Interrupted):
        run_stage(tmp_path / "b", "grpo", TASKS[:7], "verifiable", tiny_model_dir, sinks=[at_step(3, interrupt)], **fields)
    run_stage(tmp_path / "b", "grpo", TASKS[:7], "verifiable", tiny_model_dir, **fields)
    assert digest(tmp_path / "a" / "out") == digest(tmp_path / "b" / "out")


@pytest.mark.vllm
@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}], ids=["full", "lora"])
def test_vllm_beside_the_trainer_samples_from_the_policy(tiny_model_dir: Path, tmp_path: Path, lora: Any) -> None:
    """Free and constrained rollouts by vLLM, given new weights after every update: their log-probabilities stay the policy's."""
    fields = {**FIELDS, "rollout": {**FIELDS["rollout"], "engine": "vllm", "batch": 16, "temperature": 0.8}}
    if lora is not None:
        fields["lora"] = lora
    ctx = run_stage(tmp_path, "grpo", TASKS[:7], "verifiable", tiny_model_dir, **fields)
    seen = [event["values"] for event in ctx.seen if event["kind"] == "metrics"]
    assert [values["rollout/version"] for values in seen if "rollout/version" in values] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert max(values["mismatch/max"] for values in seen if "mismatch/max" in values) < 1e-4
    assert any("constrained/ess" in values for values in seen)
