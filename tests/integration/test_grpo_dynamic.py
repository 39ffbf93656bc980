"""Dynamic sampling in the trainer: neutral where nothing is left out, after a resume, on two processes, in a stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dynamic_kit import ROWS, dynamic_trainer, logs, watch_gradients
from trainer_kit import TASKS, Interrupted, at_step, curve, digest, grpo_trainer, interrupt, lora, run_stage, same, weights

torch = pytest.importorskip("torch")

HERE = Path(__file__).resolve().parent
SGD = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 1e9, "lr_scheduler_type": "constant"}


def test_where_nothing_is_left_out_it_changes_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Rounds of one step, all groups informative: the plain trainer on the same rows, bit by bit."""
    from functools import partial

    from posttrain.rollout.hf import HFEngine
    from posttrain.trainers._grpo_config import DynamicConfig
    from posttrain.trainers._grpo_sampling import RowStream
    from posttrain.trainers.grpo import GRPOTrainer

    def varied(completions: list[Any], **_: Any) -> list[float]:
        return [len(set(c[0]["content"])) / 10 + 0.01 * (i % 4) for i, c in enumerate(completions)]

    seen = []
    for dynamic in (None, DynamicConfig()):
        extra = {"engine": partial(HFEngine, max_batch=32), "dynamic": dynamic, "prompts": (ROWS, 3) if dynamic else None}
        rows = RowStream(ROWS, 3).take(10)
        args = {"shuffle_dataset": False, "max_steps": 5, "beta": 0.1}
        made = grpo_trainer(GRPOTrainer, tiny_model_dir, tmp_path / str(dynamic), rows=rows, rewards=varied, extra=extra, **args)
        made.train()
        seen.append((weights(made), curve(made)))
    assert seen[0][1] == seen[1][1]
    assert same(seen[0][0], seen[1][0])


RESUMED = {
    "buffer": (5, {"round": 10}, {}),
    "lora-kl": (5, {"round": 7}, {"peft": True, "beta": 0.1}),
    "mid-window-iterations": (5, {"round": 10, "old_logps": "recompute"}, {"num_iterations": 2}),
    "mid-window-steps": (5, {"round": 9, "old_logps": "recompute"}, {"steps_per_generation": 4}),
    "normalised": (3, {"round": 7}, {"hardness": True}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumes_bitwise(tiny_model_dir: Path, tmp_path: Path, name: str) -> None:
    """With groups waiting in the buffer, in the middle of a window too: weights, every metric, and what is held at the end."""
    from posttrain.trainers._grpo_config import HardnessConfig
    from posttrain.trainers._grpo_terms import Terms

    step, dynamic, args = RESUMED[name]
    args = dict(args)
    extra = {"terms": Terms(hardness=HardnessConfig(normalise=True))} if args.pop("hardness", False) else {}
    peft = args.pop("peft", False)

    def made(save: int) -> Any:
        return dynamic_trainer(
            tiny_model_dir, tmp_path, dynamic=dynamic, extra=extra, peft=lora() if peft else None, max_steps=8, save_steps=save, **args
        )

    whole = made(step)
    whole.train()
    held = torch_values(tmp_path / f"checkpoint-{step}" / "own_state_0.safetensors")["dynamic"]
    assert held["held"]
    assert held["position"] < whole.dynamic.stream.position
    again = made(100)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert logs(again)[step:] == logs(whole)[step:]
    assert same(weights(again), weights(whole))
    (v0, t0), (v1, t1) = whole.dynamic.state(), again.dynamic.state()
    assert v0 == v1
    assert all(torch.equal(t0[key].nan_to_num(), t1[key].nan_to_num()) for key in t0 | t1)
    assert sum(item.get("dynamic/recovered_share", 0) for item in logs(whole)) > 0


def torch_values(file: Path) -> dict[str, Any]:
    """JSON values of a rank's state."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["values"])


def first_steps(trainer: Any, count: int) -> list[dict[str, Any]]:
    """Filled steps, without an update between them."""
    trainer.model.train()
    steps = []
    for _ in range(count):
        steps.append(trainer._generate_and_score_completions([]))
        trainer.state.global_step += 1
    return steps


def test_a_filled_step(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Advantages stay those of the group's own round; old log-probabilities are the present policy's for all rows."""
    from posttrain.trainers._trl import policy_logps

    dynamic = {"round": 9, "old_logps": "recompute"}
    trainer = dynamic_trainer(tiny_model_dir, tmp_path, dynamic=dynamic, num_iterations=2, scale_rewards="none")
    (first,) = first_steps(trainer, 1)
    waiting = trainer.dynamic.held[0].tensors
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)
    (second,) = first_steps(trainer, 1)
    assert "num_items_in_batch" in second
    size = waiting["completion_ids"].size(1)
    assert torch.equal(second["completion_ids"][:4, :size], waiting["completion_ids"])
    assert torch.equal(second["advantages"][:4], waiting["advantages"])
    old = 4 * round(4 * trainer._metrics["train"]["dynamic/recovered_share"][-1])
    assert 0 < old < 16
    assert second["sampling_per_token_logps"][:old].isnan().all()
    assert not second["sampling_per_token_logps"][old:].isnan().any()
    assert torch.equal(second["old_per_token_logps"], policy_logps(trainer, second))
    assert not torch.equal(first["old_per_token_logps"], policy_logps(trainer, first))
    for batch in (first, second):
        groups = batch["advantages"].view(4, 4)
        assert groups.sum(dim=1).abs().max() < 1e-6
        assert (groups.amax(dim=1) - groups.amin(dim=1)).tolist() == pytest.approx([1.0] * 4)
        assert batch["num_items_in_batch"] == batch["completion_mask"].sum()


def test_hardness_is_normalised_over_the_groups_of_the_step(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Mean 1 over what is trained on, and not over what was sampled."""
    from posttrain.trainers._grpo_config import HardnessConfig
    from posttrain.trainers._grpo_terms import Terms

    found = {}
    for normalise in (False, True):
        extra = {"terms": Terms(hardness=HardnessConfig(alpha=-2.0, normalise=normalise))}
        trainer = dynamic_trainer(tiny_model_dir, tmp_path, dynamic={"round": 10}, extra=extra, scale_rewards="none")
        found[normalise] = torch.stack([batch["advantages"].view(4, 4) for batch in first_steps(trainer, 3)])
    plain = found[False]
    weight = plain.amax(dim=2) - plain.amin(dim=2)
    assert weight.std() > 0
    expected = plain / weight.mean(dim=1)[:, None, None]
    assert torch.allclose(found[True], expected, atol=1e-6)


@pytest.mark.parametrize("args", [{}, {"steps_per_generation": 4}], ids=["aligned", "two-updates"])
def test_trl_generation(tiny_model_dir: Path, tmp_path: Path, args: dict[str, Any]) -> None:
    """TRL's own sampler in place of an engine."""

    def parity(completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        return [float(sum(ids) % 2) if int(a) % 2 else 0.0 for ids, a in zip(completion_ids, answer, strict=True)]

    from posttrain.trainers._grpo_config import DynamicConfig
    from posttrain.trainers.grpo import GRPOTrainer

    dynamic = DynamicConfig(round=5, old_logps="recompute")
    made = grpo_trainer(GRPOTrainer, tiny_model_dir, tmp_path, rows=ROWS, rewards=parity, extra={"dynamic": dynamic}, max_steps=4, **args)
    made.train()
    assert all(norm > 0 for _, norm in curve(made))
    assert made.dynamic.counts["wrong"] > 0
    assert made.dynamic.counts["accepted"] >= 2 * 4


STAGE: dict[str, Any] = {
    "steps": 6,
    "group": 4,
    "batch": {"rows": 8, "per_device": 4},
    "checkpoint": {"every": 1},
    "data": {"max_length": 64},
    "rollout": {"max_tokens": 6, "temperature": 1.5},
    "rewards": [{"use": "length"}],
    "dynamic": {"round": 3},
}


def test_stage(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The hf engine; stopped and run again it gives the same bytes, and the summary tells what was sampled."""
    whole = run_stage(tmp_path / "a", "grpo", TASKS[:7], "verifiable", tiny_model_dir, **STAGE)
    with pytest.raises(Interrupted):
        run_stage(tmp_path / "b", "grpo", TASKS[:7], "verifiable", tiny_model_dir, sinks=[at_step(4, interrupt)], **STAGE)
    ctx = run_stage(tmp_path / "b", "grpo", TASKS[:7], "verifiable", tiny_model_dir, **STAGE)
    assert digest(tmp_path / "b" / "out") == digest(tmp_path / "a" / "out")
    assert ctx.summary["dynamic"] == whole.summary["dynamic"]
    found = whole.summary["dynamic"]
    assert found["batches"] == 6
    assert found["prompts"] == 3 * found["rounds"]
    steps = [event["values"] for event in whole.seen if event["kind"] == "metrics" and "dynamic/rounds" in event["values"]]
    assert sum(values["dynamic/rounds"] for values in steps) == found["rounds"]
    assert steps[-1]["dynamic/prompts"] == found["prompts"]


RUNS: dict[str, dict[str, Any]] = {
    "sgd": {"dynamic": {"round": 10}, "args": {"max_steps": 10, **SGD}},
    "adamw": {"dynamic": {"round": 6}, "args": {"max_steps": 10, "learning_rate": 3e-4, "max_grad_norm": 1e9}},
    "iterations": {
        "dynamic": {"round": 8, "old_logps": "recompute"},
        "args": {"max_steps": 4, "num_iterations": 2, "loss_type": "grpo", "beta": 0.1, **SGD},
    },
    "smaller": {"dynamic": {"round": 4, "max_rounds": 2, "on_short": "smaller"}, "args": {"max_steps": 6, "loss_type": "grpo", **SGD}},
}


@pytest.fixture(scope="module")
def cut(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Run -> what one process, rank 0 of two and rank 1 of two ended with."""
    root = tmp_path_factory.mktemp("cut")
    (root / "runs.json").write_text(json.dumps(RUNS))
    paths = [str(HERE), str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    found: dict[str, list[Any]] = {name: [] for name in RUNS}
    for size in (1, 2):
        out = root / str(size)
        out.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size)]
        command += [str(HERE / "gloo_dynamic.py"), str(tiny_model_dir), str(out), str(root / "runs.json")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-4000:]
        for name, ends in found.items():
            ends += [torch.load(out / f"{name}-{rank}.pt", weights_only=True) for rank in range(size)]
    return found


def apart(left: dict[str, Any], right: dict[str, Any]) -> float:
    """Largest difference of two dicts of tensors, relative to the largest entry."""
    assert left.keys() == right.keys()
    scale = max(value.abs().max().item() for value in left.values())
    return max((left[key] - right[key]).abs().max().item() for key in left) / scale


@pytest.mark.multiproc
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(cut: dict[str, list[Any]], name: str) -> None:
    """On the same tape: the same groups in the same steps, averaged gradients, and weights after the run."""
    one, first, second = cut[name]
    assert one["values"] == first["values"] == second["values"]
    assert one["held"].keys() == first["held"].keys() == second["held"].keys()
    for key, value in one["held"].items():
        assert torch.equal(first["held"][key].nan_to_num(), second["held"][key].nan_to_num())
        assert torch.allclose(value.nan_to_num(), first["held"][key].nan_to_num(), rtol=1e-6, atol=1e-6), key
    assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in first["weights"])
    assert apart(one["gradients"][0], first["gradients"][0]) < 1e-6
    assert len(one["gradients"]) == RUNS[name]["args"]["max_steps"]
    assert all(max(value.abs().max() for value in step.values()) > 0 for step in one["gradients"])
    assert apart(one["weights"], first["weights"]) < (1e-5 if name == "adamw" else 1e-6)
    for mine, theirs in zip(one["logs"], first["logs"], strict=True):
        chosen = {key for key in mine if key.startswith("dynamic/")}
        assert {key: mine[key] for key in chosen} == {key: theirs[key] for key in chosen}
    shares = [item["dynamic/recovered_share"] for item in one["logs"] if "dynamic/recovered_share" in item]
    short = [item["dynamic/short"] for item in one["logs"] if "dynamic/short" in item]
    assert max(shares) > 0 or name == "smaller"
    assert (max(short) > 0) == (name == "smaller")


def test_the_tape_is_watched(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Control: another tape of rollouts gives other gradients, by far more than the limits above."""
    seen = []
    for seed in (0, 1):
        trainer = dynamic_trainer(tiny_model_dir, tmp_path / str(seed), max_steps=1, seed=seed, **SGD)
        gradients = watch_gradients(trainer)
        trainer.train()
        seen.append(gradients[0])
    assert apart(*seen) > 1e-2
