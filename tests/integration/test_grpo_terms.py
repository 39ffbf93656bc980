"""GRPO's terms in the trainer: against `posttrain.losses`, against other cuts of the same step, after a resume, in a stage."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import TASKS, Interrupted, at_step, digest, grpo_trainer, interrupt, make_folders, run_stage, same, weights

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

STAGE: dict[str, Any] = {
    "steps": 4,
    "group": 4,
    "batch": {"rows": 8, "per_device": 4},
    "checkpoint": {"every": 1},
    "data": {"max_length": 64},
    "rollout": {"max_tokens": 6},
    "rewards": [{"use": "length"}],
}

CONSTANT = {"lr": 1e-2, "schedule": "constant", "warmup": 0}


def entropy(level: str, coeff: float = 1.0, target: float = 3.0) -> Any:
    """Terms with a target that the tiny model (about 5.9 nats) is above, unless another is given."""
    from posttrain.trainers._grpo_config import EntropyConfig
    from posttrain.trainers._grpo_terms import Terms

    return Terms(entropy=EntropyConfig(target=target, coeff=coeff, level=level))


def made(folder: Path, out: Path, *, terms: Any = None, rewards: Any = None, **args: Any) -> Any:
    """A trainer on 4 groups of 4 a step."""
    from posttrain.trainers.grpo import GRPOTrainer

    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 1, "optim": "sgd", "learning_rate": 0.1}
    extra = {"terms": terms} if terms else {}
    options = {"rewards": rewards} if rewards else {}
    return grpo_trainer(GRPOTrainer, folder, out, extra=extra, **options, **{**sizes, "max_grad_norm": 1e9, **args})


def scored(trainer: Any) -> dict[str, Any]:
    """The first batch of rollouts, sampled and scored."""
    trainer.model.train()
    torch.manual_seed(0)
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def logs(trainer: Any) -> list[dict[str, Any]]:
    """The logged steps."""
    return [item for item in trainer.state.log_history if "loss" in item]


def replay(trainer: Any, tape: dict[str, Any]) -> Any:
    """Trains on recorded rollouts, whatever the loader asks for; they are not shuffled."""
    rows = tape["completion_ids"].size(0)

    def recorded(_inputs: Any) -> dict[str, Any]:
        trainer.reward_matrix = torch.zeros(rows, 1)
        return {name: value.clone() for name, value in tape.items()}

    trainer._generate_and_score_completions = recorded
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def tape(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """16 completions of ragged lengths."""
    batch = scored(made(tiny_model_dir, tmp_path_factory.mktemp("tape")))
    lengths = torch.tensor([6, 1, 3, 2, 5, 6, 1, 4, 2, 2, 6, 3, 1, 5, 4, 6])
    batch["completion_mask"] = (torch.arange(batch["completion_ids"].size(1)) < lengths[:, None]).long()
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    return batch


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sum"])
def test_our_losses_are_trls(tiny_model_dir: Path, tmp_path: Path, tape: dict[str, Any], loss_type: Any) -> None:
    """Value and gradient at the same log-probabilities, with clipping, old log-probabilities and a reference."""
    from posttrain.losses.policy import policy_loss
    from posttrain.trainers._grpo_terms import Terms

    given = "dr_grpo" if loss_type == "sum" else loss_type
    options = {"loss_type": given, "epsilon_high": 0.4, "beta": 0.05}
    trainer = made(tiny_model_dir, tmp_path, terms=Terms(plain_sum=loss_type == "sum"), **options)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    noise = [0.5 * torch.randn(tape["completion_ids"].shape, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    from posttrain.trainers._trl import policy_logps

    logps = policy_logps(trainer, tape)
    batch = {**tape, "old_per_token_logps": logps + noise[0], "ref_per_token_logps": logps + noise[1]}
    half = {name: value[:8] if value.dim() else value for name, value in batch.items()}
    loss = trainer._compute_loss(trainer.model, half)
    leaf = logps[:8].clone().requires_grad_()
    tokens = tape["num_items_in_batch"] if given in ("dapo", "cispo") else 2 * half["completion_mask"].sum()
    ours, _ = policy_loss(
        leaf, half["old_per_token_logps"], half["advantages"], half["completion_mask"], loss_type=loss_type, epsilon_high=0.4,
        ref_logps=half["ref_per_token_logps"], beta=0.05, rows=16, tokens=tokens, max_tokens=6,
    )  # fmt: skip
    assert ours.item() == pytest.approx(loss.item(), rel=2e-5)
    loss.backward()
    theirs = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    (slope,) = torch.autograd.grad(ours, leaf)
    ids, mask = (torch.cat([half[f"prompt_{name}"], half[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    again, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 6)
    again.backward(slope)
    for name, parameter in trainer.model.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name], rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("level", ["batch", "lagged", "micro"])
def test_entropy_does_not_depend_on_accumulation(tiny_model_dir: Path, tmp_path: Path, tape: dict[str, Any], level: str) -> None:
    """16 completions as 1 x 16, 2 x 8 and 4 x 4: one update by SGD is the same; micro-batches with their own mean differ."""
    from posttrain.trainers._grpo_terms import side_of

    found, means = [], []
    for rows, passes in ((16, 1), (8, 2), (4, 4)):
        trainer = made(
            tiny_model_dir, tmp_path / str(rows), terms=entropy(level), per_device_train_batch_size=rows, gradient_accumulation_steps=passes
        )
        trainer.entropy_before = 5.0
        replay(trainer, tape)
        found.append(torch.cat([value.flatten() for value in weights(trainer).values()]))
        means.append(logs(trainer)[0]["entropy/mean"])
        assert logs(trainer)[0]["entropy/push"] == side_of(means[-1], 3.0)
        assert logs(trainer)[0]["entropy/gap"] == pytest.approx(means[-1] - 3.0)
    plain = replay(made(tiny_model_dir, tmp_path / "plain"), tape)
    moved = (found[0] - torch.cat([value.flatten() for value in weights(plain).values()])).abs().max().item()
    off = max((other - found[0]).abs().max().item() for other in found[1:])
    assert means == pytest.approx([means[0]] * 3, rel=1e-6)
    assert moved > 1e-4
    assert (off > 1e-2 * moved) if level == "micro" else (off < 1e-4 * moved)


@pytest.mark.parametrize(("target", "sign"), [(1.0, -1), (7.0, 1)])
@pytest.mark.parametrize("level", ["batch", "lagged", "micro"])
def test_entropy_is_pushed_to_its_target_from_both_sides(
    tiny_model_dir: Path, tmp_path: Path, tape: dict[str, Any], level: str, target: float, sign: int
) -> None:
    """Without any reward; the first step of `lagged` knows no side and changes nothing."""
    quiet = {**tape, "advantages": torch.zeros(16)}
    trainer = replay(made(tiny_model_dir, tmp_path, terms=entropy(level, 1.0, target), max_steps=4, learning_rate=1.0), quiet)
    means = [item["entropy/mean"] for item in logs(trainer)]
    steps = [sign * (b - a) for a, b in itertools.pairwise(means)]
    assert steps[0] == pytest.approx(0, abs=1e-6) if level == "lagged" else steps[0] > 1e-4
    assert all(step > 1e-4 for step in steps[1:])
    if level != "lagged":
        assert logs(trainer)[0]["loss"] == pytest.approx(abs(means[0] - target), rel=1e-3)


def test_entropy_gradient_of_a_step(tiny_model_dir: Path, tmp_path: Path, tape: dict[str, Any]) -> None:
    """The update by SGD is lr * coeff * side * d(mean entropy), computed here from plain logits."""
    quiet = {**tape, "advantages": torch.zeros(16)}
    trainer = made(tiny_model_dir, tmp_path, terms=entropy("batch", 0.5), temperature=0.7)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    ids, mask = torch.cat([tape["prompt_ids"], tape["completion_ids"]], 1), torch.cat([tape["prompt_mask"], tape["completion_mask"]], 1)
    width = tape["completion_ids"].size(1)
    logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1] / 0.7
    each = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    mean = (each * tape["completion_mask"]).sum() / tape["completion_mask"].sum()
    slopes = dict(zip(before, torch.autograd.grad(mean, list(trainer.model.parameters())), strict=True))
    replay(trainer, quiet)
    assert logs(trainer)[0]["entropy/mean"] == pytest.approx(mean.item(), rel=1e-5)
    for name, parameter in trainer.model.named_parameters():
        assert torch.allclose(before[name] - parameter, 0.1 * 0.5 * slopes[name], rtol=1e-3, atol=2e-7), name


def test_entropy_and_trls_bonus_act_together_nowhere(tiny_model_dir: Path, tmp_path: Path) -> None:
    from posttrain.errors import ConfigError

    with pytest.raises(ConfigError, match="no multiple of the 2"):
        made(tiny_model_dir, tmp_path, terms=entropy("batch"), generation_batch_size=24)
    made(tiny_model_dir, tmp_path, terms=entropy("micro"), generation_batch_size=24)


def half_right(completions: list[Any], **_: Any) -> list[float | None]:
    """+1 and -1; one group all right, one with one right of four, one that cannot be judged at one place."""
    return ([1.0] * 4 + [1.0, -1.0, -1.0, -1.0] + [None, 1.0, -1.0, -1.0] + [-1.0] * 4)[: len(completions)]


def fits(completions: list[Any], **_: Any) -> list[float | None]:
    """A gate that the first completion of each group fails, and that does not apply to the last."""
    return [0.0, 1.0, 1.0, None] * (len(completions) // 4)


def test_hardness_scales_trls_advantages(tiny_model_dir: Path, tmp_path: Path) -> None:
    """D * (R - mu), in the batch and in the log of completions; the metrics of groups."""
    from posttrain.trainers._grpo_config import HardnessConfig
    from posttrain.trainers._grpo_terms import Terms

    args = {"scale_rewards": "none", "rewards": half_right}
    plain = scored(made(tiny_model_dir, tmp_path / "a", **args))["advantages"]
    found, mus = {}, torch.tensor([1.0, -0.5, -1 / 3, -1.0])
    for normalise in (False, True):
        trainer = made(tiny_model_dir, tmp_path / "b", terms=Terms(hardness=HardnessConfig(normalise=normalise)), **args)
        found[normalise] = scored(trainer)["advantages"]
        assert list(trainer._logs["advantages"]) == found[normalise].tolist()
        seen = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        assert seen["hardness/mean"] == pytest.approx((1.256 - 0.256 * mus).mean().item())
        assert seen["group/pass_rate"] == pytest.approx(6 / 15)
        assert (seen["group/all_correct"], seen["group/all_wrong"]) == (0.25, 0.25)
        assert seen["advantage/max"] == pytest.approx(found[normalise].max().item())
        assert seen["frac_reward_zero_std"] == 0.5
    weight = (1.256 - 0.256 * mus).repeat_interleave(4)
    assert torch.allclose(found[False], plain * weight, rtol=1e-6)
    assert torch.allclose(found[True], plain * weight / weight.mean(), rtol=1e-6)
    assert plain.abs().max() > 1


def test_gates_take_the_place_of_the_sum(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A right answer behind a failed gate is wrong for advantages, pass rate and hardness."""
    from posttrain.trainers._grpo_config import HardnessConfig
    from posttrain.trainers._grpo_terms import Terms

    terms = Terms(hardness=HardnessConfig(alpha=-1.0), correct=1, gates={0: 1.0}, gate_value=-2.0)
    trainer = made(tiny_model_dir, tmp_path, terms=terms, rewards=[fits, half_right], scale_rewards="none", reward_weights=[0.0, 1.0])
    found = scored(trainer)["advantages"]
    totals = torch.tensor([[-2.0, 1, 1, 1], [-2, -1, -1, -1], [-2, 1, -1, -1], [-2, -1, -1, -1]])
    mus = torch.tensor([0.5, -1, -0.5, -1])
    assert torch.allclose(found, ((totals - totals.mean(1, keepdim=True)) * (2 - mus)[:, None]).flatten(), rtol=1e-6)
    seen = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert seen["gate/fits"] == 0.25
    assert seen["group/pass_rate"] == pytest.approx(4 / 16)
    assert seen["reward"] == pytest.approx(totals.mean().item())
    assert seen["reward_std"] == pytest.approx(totals.flatten().std().item())
    assert list(trainer._logs["advantages"]) == found.tolist()


def test_a_step_put_together_is_normalised_as_a_whole(tiny_model_dir: Path, tmp_path: Path) -> None:
    """What dynamic sampling does: D stays with the rows, and the division comes at the end."""
    from posttrain.trainers._grpo_config import HardnessConfig
    from posttrain.trainers._grpo_terms import Terms

    args = {"scale_rewards": "none", "rewards": half_right}
    trainer = made(tiny_model_dir, tmp_path / "b", terms=Terms(hardness=HardnessConfig(normalise=True)), **args)
    trainer.assembles = True
    batch = scored(trainer)
    step = {name: value[4:12] if value.dim() else value for name, value in batch.items()}
    before = step["advantages"]
    mean = step["hardness"].mean()
    trainer.finish_step(step)
    assert "hardness" not in step
    assert torch.allclose(step["advantages"], before / mean)
    assert mean != 1


@pytest.mark.multiproc
def test_two_processes_equal_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Entropy of the whole step, hardness and a gate, by SGD and by AdamW, on the same completions."""
    terms: dict[str, Any] = {
        "entropy": {"target": 1.0, "coeff": 0.5},
        "hardness": {"reward": "length", "normalise": True},
        "rewards": [{"use": "length", "at_least": 0.02}, {"use": "boxed_format", "role": "gate", "at_least": 0.0}],
    }
    fields = {**STAGE, **terms, "batch": {"rows": 16, "per_device": 4}, "optim": CONSTANT | {"lr": 1e-3}}
    cases = {
        "batch": {},
        "lagged": {"entropy": {"target": 1.0, "coeff": 0.5, "level": "lagged"}},
        "one-pass": {"batch": {"rows": 16, "per_device": 8}},
        "fast": {"fast": "on"},
        "fast-plain": {"fast": "on", "entropy": None, "rewards": [{"use": "length"}, {"use": "boxed_format"}]},
    }
    specs = []
    for name, more in cases.items():
        make_folders(tmp_path / name, TASKS)
        given = {"method": "grpo", **fields, **more}
        specs.append({"root": str(tmp_path / name), "fields": given, "kind": "verifiable", "model": str(tiny_model_dir)})
    (tmp_path / "specs.json").write_text(json.dumps(specs))
    here = Path(__file__).resolve().parent
    paths = [str(here.parent), str(here.parent.parent), os.environ.get("PYTHONPATH", "")]
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(here / "gloo_stage.py"),
        str(tmp_path / "specs.json"),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, more in cases.items():
        one = run_stage(tmp_path / f"{name}-1", "grpo", TASKS, "verifiable", tiny_model_dir, **{**fields, **more})
        ends = [json.loads((tmp_path / name / f"end-{rank}.json").read_text()) for rank in (0, 1)]
        assert not any(end["error"] for end in ends), ends
        losses = [e["values"]["loss"] for e in one.seen if "loss" in e.get("values", {})]
        assert ends[0]["losses"] == pytest.approx(losses, abs=2e-5)
        left, right = (load_file(tmp_path / folder / "out" / "model.safetensors") for folder in (name, f"{name}-1"))
        assert max((left[key] - right[key]).abs().max().item() for key in left) < 1e-5, name


@pytest.mark.parametrize("level", ["batch", "lagged"])
def test_trainer_with_all_terms_resumes_bitwise(tiny_model_dir: Path, tmp_path: Path, level: str) -> None:
    """The step after the checkpoint depends on the entropy of the step before it."""
    from posttrain.trainers._grpo_config import EntropyConfig, HardnessConfig
    from posttrain.trainers._grpo_terms import Terms

    terms = Terms(entropy=EntropyConfig(target=1.0, coeff=1.0, level=level), hardness=HardnessConfig())
    whole = made(tiny_model_dir, tmp_path, terms=terms, max_steps=4, save_steps=2)
    whole.train()
    again = made(tiny_model_dir, tmp_path, terms=terms, max_steps=4, save_steps=100)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(again), weights(whole))
    assert logs(again)[2]["entropy/push"] == 1.0
    assert again.entropy_before == whole.entropy_before


def test_stage_with_all_terms(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A stage by its config: logged names, samples with every part, and the same bytes after a stop."""
    fields = {
        **STAGE,
        "loss_type": "sum",
        "epsilon_high": 0.28,
        "scale_rewards": "none",
        "entropy": {"target": 1.0, "coeff": 0.1, "level": "lagged"},
        "hardness": {"alpha": -0.3, "normalise": True},
        "rewards": [{"use": "length", "role": "gate", "at_least": 0.02}, {"use": "exact"}],
    }
    whole = run_stage(tmp_path / "a", "grpo", TASKS[:7], "verifiable", tiny_model_dir, **fields)
    with pytest.raises(Interrupted):
        run_stage(tmp_path / "b", "grpo", TASKS[:7], "verifiable", tiny_model_dir, sinks=[at_step(3, interrupt)], **fields)
    ctx = run_stage(tmp_path / "b", "grpo", TASKS[:7], "verifiable", tiny_model_dir, **fields)
    assert digest(tmp_path / "b" / "out") == digest(tmp_path / "a" / "out")
    assert {"prompt", "completion", "length", "exact", "advantage"} <= set(ctx.summary["samples"][0])
    logged = [event["values"] for event in whole.seen if event["kind"] == "metrics"]
    steps = [values for values in logged if "loss" in values]
    assert len(steps) == 4
    names = set().union(*steps)
    assert names >= {
        "group/pass_rate", "group/all_correct", "group/mostly_correct", "group/mostly_wrong", "group/all_wrong", "gate/length",
        "entropy/sequence_min", "entropy/sequence_max", "hardness/mean", "advantage/max", "entropy/mean",
        "entropy/gap", "entropy/push", "mismatch/mean", "mismatch/max", "mismatch/kl", "completions/p50_length", "completions/p95_length",
        "completions/clipped_ratio", "seconds/generate", "seconds/reward", "seconds/forward_backward", "seconds/optimizer",
        "useful_tokens_per_s", "clip_ratio/high_mean", "reward", "entropy", "grad_norm",
    }  # fmt: skip
    assert not {"ratio/mean", "seconds/logprobs"} & set(steps[1])
    assert all(values["mismatch/max"] < 1e-4 for values in steps)
    assert [values["entropy/push"] for values in steps] == [0.0, 0.1, 0.1, 0.1]
    assert any(values["grad_norm"] > 0 for values in steps)


def test_several_updates_a_batch_log_the_ratio(tiny_model_dir: Path, tmp_path: Path) -> None:
    ctx = run_stage(tmp_path, "grpo", TASKS[:7], "verifiable", tiny_model_dir, **{**STAGE, "num_iterations": 2, "optim": CONSTANT})
    steps = [event["values"] for event in ctx.seen if event["kind"] == "metrics" and "loss" in event["values"]]
    assert [values["ratio/mean"] for values in steps[::2]] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert all(abs(values["ratio/max"] - 1) > 1e-3 and values["ratio/kl"] > 1e-9 for values in steps[1::2])
    assert all(values["seconds/logprobs"] > 0 for values in steps[::2])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"entropy": {"target": 0.5, "coeff": 1.0}, "trl": {"entropy_coef": 0.1}}, "trl.entropy_coef both steer"),
        ({"entropy": {"target": 0.5, "coeff": 1.0}, "trl": {"use_adaptive_entropy": True}}, "trl.use_adaptive_entropy both steer"),
        ({"hardness": {}, "trl": {"multi_objective_aggregation": "normalize_then_sum"}}, "hardness needs the sum"),
        ({"hardness": {"reward": "exact"}}, "hardness.reward: `exact` is no reward with role: add"),
        ({"rewards": [{"use": "exact", "role": "gate"}]}, "every reward is a gate"),
        ({"hardness": {"alpha": 0.6}}, "hardness.alpha"),
        ({"entropy": {"coeff": 0.5}}, "entropy.target"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_run(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    from posttrain.config.pipeline import load_pipeline
    from posttrain.errors import ConfigError

    (tmp_path / "rows.jsonl").write_text('{"prompt": "1", "answer": "2"}\n')
    import yaml

    stage = {"name": "rl", "method": "grpo", "in": {"data": "rows"}, **STAGE, **fields}
    pipeline = {"version": 1, "name": "p", "seed": 0, "model": {"id": "./m"}, "stages": [stage]}
    pipeline["sources"] = {"rows": {"kind": "verifiable", "path": "./rows.jsonl"}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(pipeline))
    with pytest.raises(ConfigError) as error:
        load_pipeline(tmp_path / "p.yaml")
    assert words in str(error.value)


def test_hardness_reads_the_named_reward() -> None:
    from posttrain.trainers._grpo_terms import terms_of
    from posttrain.trainers.grpo import GRPOStage

    rewards = [{"use": "length", "role": "gate", "at_least": 0.5}, {"use": "boxed_format"}, {"use": "exact", "at_least": 0.9}]
    stage = {"name": "rl", "method": "grpo", "steps": 1, "rewards": rewards, "gate_value": -2.0}
    first = terms_of(GRPOStage.model_validate({**stage, "hardness": {}}))
    assert (first.correct, first.at_least, dict(first.gates), first.gate_value) == (1, 1.0, {0: 0.5}, -2.0)
    named = terms_of(GRPOStage.model_validate({**stage, "hardness": {"reward": "exact"}}))
    assert (named.correct, named.at_least) == (2, 0.9)


def test_best_weights_are_committed(tiny_model_dir: Path, tmp_path: Path) -> None:
    """`commit.best`, at a learning rate that ruins the model: not the last step's weights, and each step's is measured."""
    from posttrain.core.artifact import InputRef

    (tmp_path / "val.jsonl").write_text('{"text": "The quick brown fox jumps over the lazy dog."}\n' * 4)
    spec = {"kind": "text", "path": str(tmp_path / "val.jsonl")}
    ref = InputRef("eval", "val", "source", "dataset", split="all", spec=spec, rows="text")
    evaluation = {"sets": {"val": {"from": "val:validation", "metrics": ["loss"], "ref": ref}}, "when": ["after"], "batch": 4}
    fields = {**STAGE, "optim": {**CONSTANT, "lr": 0.1}, "checkpoint": {"every": 1, "keep": 9}}
    best = {"metric": "val.loss", "every": 1}
    ctx = run_stage(tmp_path, "grpo", TASKS[:7], "verifiable", tiny_model_dir, evaluation=evaluation, commit={"best": best}, **fields)
    losses = {e["step"]: e["values"]["eval/val/loss"] for e in ctx.seen if "eval/val/loss" in e.get("values", {})}
    assert sorted(losses) == [1, 2, 3, 4]
    step = min(losses, key=lambda n: losses[n])
    assert losses[step] < losses[4]
    assert ctx.summary["best"] == {"step": step, "value": pytest.approx(losses[step])}
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert same(kept, load_file(tmp_path / "work" / f"checkpoint-{step}" / "model.safetensors"))
