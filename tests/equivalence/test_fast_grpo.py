"""`fast: on` against `fast: off` on the same rollouts: loss, gradient, metrics, ten steps of weights, a resume, a stage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from fast_kit import ARCHITECTURES, make_model, make_tape, make_trainer, plain_forward, step_of
from trainer_kit import TASKS, Interrupted, at_step, digest, interrupt, lora, run_stage, weights

torch = pytest.importorskip("torch")

TYPES = ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sum"]
CASES: dict[str, dict[str, Any]] = {
    "on-policy": {},
    "clip-higher": {"old": 0.4, "epsilon_high": 0.4},
    "two-sided": {"old": 0.4, "delta": 1.3},
    "sequence": {"old": 0.4, "importance_sampling_level": "sequence"},
    "kl": {"old": 0.4, "beta": 0.1},
    "kl-plain": {"old": 0.4, "beta": 0.1, "use_bias_correction_kl": False},
    "by-token": {"old": 0.4, "by_token": True},
    "accumulated": {"old": 0.4, "parts": 2},
    "entropy-batch": {"entropy": "batch"},
    "entropy-lagged": {"entropy": "lagged", "old": 0.4, "parts": 2},
    "entropy-micro": {"entropy": "micro", "parts": 2},
}


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    """That of the tiny model."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(tiny_model_dir)


def pair(name: str, tokenizer: Any, out: Path, dtype: Any = None, adapter: bool = False, **args: Any) -> tuple[Any, Any]:
    """Trainers with `fast` off and on; off forwards plainly in float64, since TRL's head takes its sums in float32."""
    made = []
    for fast in (False, True):
        torch.manual_seed(1)
        model = make_model(name, tokenizer, dtype)
        made.append(make_trainer(model, tokenizer, out / str(fast), fast=fast, peft=lora() if adapter else None, **args))
    if dtype == torch.float64:
        made[0]._get_per_token_logps_and_entropies = plain_forward(made[0])
    if adapter:
        made[1].model.load_state_dict(made[0].model.state_dict())
    return made[0], made[1]


@pytest.fixture(scope="module")
def pairs(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, tuple[Any, Any]]:
    """Llama in both types."""
    out = tmp_path_factory.mktemp("pairs")
    return {dtype: pair("llama", tokenizer, out, dtype) for dtype in (torch.float32, torch.float64)}


def prepared(trainers: tuple[Any, Any], tape: dict[str, Any], case: dict[str, Any], loss_type: str = "dapo") -> dict[str, Any]:
    """The tape with what a case adds, and both trainers with its settings."""
    from posttrain.trainers._grpo_config import EntropyConfig
    from posttrain.trainers._grpo_terms import Terms
    from posttrain.trainers._trl import policy_logps

    for trainer in trainers:
        level = case.get("entropy")
        trainer.terms = Terms(entropy=EntropyConfig(target=3.0, coeff=0.5, level=level) if level else None, plain_sum=loss_type == "sum")
        trainer.loss_type = "dr_grpo" if loss_type == "sum" else loss_type
        trainer.beta, trainer.epsilon_high = case.get("beta", 0.0), case.get("epsilon_high", 0.2)
        trainer.importance_sampling_level = case.get("importance_sampling_level", "token")
        trainer.args.delta, trainer.args.use_bias_correction_kl = case.get("delta"), case.get("use_bias_correction_kl", True)
        trainer.args.steps_per_generation = case.get("parts", 1)
    batch = dict(tape)
    shape, generator = tape["completion_ids"].shape, torch.Generator().manual_seed(5)
    noise = [torch.randn(shape, generator=generator, dtype=tape["advantages"].dtype) for _ in range(3)]
    if "old" in case:
        batch["old_per_token_logps"] = policy_logps(trainers[0], batch) + case["old"] * noise[0]
    if "beta" in case:
        batch["ref_per_token_logps"] = policy_logps(trainers[0], batch) + 0.3 * noise[1]
    if "by_token" in case:
        batch["advantages"] = batch["advantages"][:, None] * (0.5 * noise[2]).exp()
    return batch


def gap(left: Any, right: Any) -> float:
    """Relative difference of two vectors."""
    return ((left - right).norm() / left.norm()).item()


@pytest.mark.parametrize("loss_type", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_every_loss_and_term(pairs: dict[Any, tuple[Any, Any]], tokenizer: Any, loss_type: str, case: str) -> None:
    """1e-6 relative in float32 against TRL, 1e-10 in float64 against TRL's loss on a plain forward pass; TRL's metrics too."""
    for dtype, limit in ((torch.float32, 1e-6), (torch.float64, 1e-10)):
        trainers = pairs[dtype]
        batch = prepared(trainers, make_tape(len(tokenizer), dtype=dtype), CASES[case], loss_type)
        (loss, gradient, metrics), (ours, our_gradient, our_metrics) = (step_of(t, batch, CASES[case].get("parts", 1)) for t in trainers)
        assert gradient.norm() > 1e-4
        assert ours == pytest.approx(loss, rel=limit, abs=limit * 0.1)
        assert gap(gradient, our_gradient) < limit
        assert 0 < our_metrics.pop("fast/positions")[0] < 0.75
        assert our_metrics.keys() == metrics.keys()
        for name, values in metrics.items():
            assert our_metrics[name] == pytest.approx(values, rel=1e-5, abs=1e-6, nan_ok=True), name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(tokenizer: Any, tmp_path: Path, name: str, checkpointing: bool) -> None:
    """Loss and gradient with every row in the form that was found for the model, and which form that is."""
    dtype = torch.float64 if checkpointing else torch.float32
    kwargs = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    trainers = pair(name, tokenizer, tmp_path, dtype, **kwargs)
    limit = 1e-10 if checkpointing else 1e-6
    batch = prepared(trainers, make_tape(len(tokenizer), dtype=dtype), CASES["kl"])
    (loss, gradient, _), (ours, our_gradient, _) = (step_of(trainer, batch) for trainer in trainers)
    assert ours == pytest.approx(loss, rel=limit)
    assert gap(gradient, our_gradient) < limit
    expected = {"mistral-window": 6, "gemma2": 512}.get(name, math.inf)
    assert trainers[1].form.share_within == (0 if name == "gpt2" and checkpointing else expected)
    assert bool(trainers[1].form.reason) is (trainers[1].form.share_within != math.inf)


@pytest.mark.parametrize("share", [0, math.inf], ids=["whole", "shared"])
@pytest.mark.parametrize("overhead", [0.0, 5.0, 1e6])
def test_every_layout_gives_the_same(pairs: dict[Any, tuple[Any, Any]], tokenizer: Any, overhead: float, share: float) -> None:
    """From one block a length to one for all rows; rows in the order of the tape, and in another."""
    from posttrain.trainers._grpo_fast_check import Form

    trainers = pairs[torch.float64]
    before = trainers[1].form, trainers[1]._overhead
    trainers[1].form, trainers[1]._overhead = Form(share, ""), overhead
    try:
        for seed in range(3):
            batch = prepared(trainers, make_tape(len(tokenizer), seed=seed, dtype=torch.float64), CASES["clip-higher"])
            order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
            mixed = {name: value[order] if value.dim() else value for name, value in batch.items()}
            expected = step_of(trainers[0], batch)[1]
            for given in (batch, mixed):
                assert gap(expected, step_of(trainers[1], given)[1]) < 1e-10
    finally:
        trainers[1].form, trainers[1]._overhead = before


def test_adapters(tokenizer: Any, tmp_path: Path) -> None:
    """LoRA with a reference: the reference is the model without the adapter, also through our forward pass."""
    from posttrain.trainers._trl import policy_logps

    trainers = pair("qwen2", tokenizer, tmp_path, adapter=True, gradient_checkpointing=True)
    with torch.no_grad():
        for name, value in trainers[0].model.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    trainers[1].model.load_state_dict(trainers[0].model.state_dict())
    batch = prepared(trainers, make_tape(len(tokenizer)), CASES["kl"])
    (loss, gradient, _), (ours, our_gradient, _) = (step_of(trainer, batch) for trainer in trainers)
    assert ours == pytest.approx(loss, rel=1e-6)
    assert gap(gradient, our_gradient) < 1e-6
    with trainers[1].model.disable_adapter():
        bare = policy_logps(trainers[1], batch)
    assert (bare - policy_logps(trainers[1], batch)).abs().max() > 1e-2


def test_nothing_to_learn_has_a_gradient_of_zero(pairs: dict[Any, tuple[Any, Any]], tokenizer: Any) -> None:
    """All advantages 0, and all completions masked: every parameter has a gradient, which is what DDP waits for."""
    trainers = pairs[torch.float32]
    for key in ("advantages", "completion_mask"):
        batch = prepared(trainers, make_tape(len(tokenizer)), {})
        batch[key] = torch.zeros_like(batch[key])
        loss, gradient, _ = step_of(trainers[1], batch)
        assert loss == 0
        assert gradient.numel() == sum(p.numel() for p in trainers[1].model.parameters())
        assert not gradient.any()


@pytest.mark.parametrize(
    ("args", "limit"),
    [
        ({"optim": "sgd", "learning_rate": 0.05}, 1e-6),
        ({"optim": "adamw_torch", "learning_rate": 1e-3}, 1e-5),
        ({"optim": "sgd", "learning_rate": 0.05, "loss_type": "bnpo", "num_iterations": 2}, 1e-6),
        ({"optim": "sgd", "learning_rate": 0.05, "steps_per_generation": 4, "gradient_accumulation_steps": 2}, 1e-6),
    ],
    ids=["sgd", "adamw", "bnpo-iterations", "two-steps-a-batch"],
)
def test_ten_steps_of_weights(tokenizer: Any, tmp_path: Path, args: dict[str, Any], limit: float) -> None:
    """The same tapes, in micro-batches that TRL shuffles: rows move inside a step only, and the weights are the same."""
    from posttrain.trainers._trl import policy_logps

    seen = []
    for trainer in pair("qwen3", tokenizer, tmp_path, lr_scheduler_type="constant", **args):
        drawn = iter(range(99))

        def recorded(_inputs: Any, trainer: Any = trainer, drawn: Any = drawn) -> dict[str, Any]:
            batch = make_tape(len(tokenizer), seed=next(drawn), prompts=trainer.args.steps_per_generation)
            trainer.reward_matrix = torch.zeros(len(batch["advantages"]), 1)
            more = trainer.num_iterations > 1 or trainer.args.steps_per_generation > trainer.args.gradient_accumulation_steps
            return {**batch, "old_per_token_logps": policy_logps(trainer, batch)} if more else batch

        trainer._generate_and_score_completions = recorded
        before = weights(trainer)
        torch.manual_seed(3)
        trainer.train()
        seen.append(weights(trainer))
    moved = max((seen[0][key] - before[key]).abs().max().item() for key in before)
    assert moved > 100 * limit
    assert max((seen[0][key] - seen[1][key]).abs().max().item() for key in before) < limit


STAGE: dict[str, Any] = {
    "steps": 4, "group": 4, "batch": {"rows": 16, "per_device": 8}, "checkpoint": {"every": 1}, "data": {"max_length": 64},
    "rollout": {"max_tokens": 6}, "rewards": [{"use": "length"}], "fast": "on",
}  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {"num_iterations": 2, "entropy": {"target": 1.0, "coeff": 0.1}, "hardness": {}},
        {"lora": {"r": 4}, "beta": 0.05, "dynamic": {"round": 2, "old_logps": "recompute"}},
    ],
    ids=["terms", "lora-dynamic"],
)
def test_a_stopped_stage_goes_on_bitwise(tiny_model_dir: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    fields = {**STAGE, **fields}
    whole = run_stage(tmp_path / "a", "grpo", TASKS[:7], "verifiable", tiny_model_dir, **fields)
    with pytest.raises(Interrupted):
        run_stage(tmp_path / "b", "grpo", TASKS[:7], "verifiable", tiny_model_dir, sinks=[at_step(3, interrupt)], **fields)
    run_stage(tmp_path / "b", "grpo", TASKS[:7], "verifiable", tiny_model_dir, **fields)
    assert digest(tmp_path / "b" / "out") == digest(tmp_path / "a" / "out")
    said = [event["message"] for event in whole.seen if event["kind"] == "log" and "prompts of a group are" in event["message"]]
    assert said == ["fast: on: prompts of a group are shared in every batch"]
    logged = [event["values"] for event in whole.seen if event["kind"] == "metrics"]
    assert all(values["grad_norm"] > 0 and values["seconds/forward_backward"] > 0 for values in logged if "loss" in values)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("top_entropy_quantile", 0.2, "trl.top_entropy_quantile is not supported"),
        ("entropy_coef", 0.1, "use our `entropy`"),
        ("off_policy_mask_threshold", 0.5, "off_policy_mask_threshold"),
        ("gradient_checkpointing_kwargs", {"use_reentrant": True}, "use_reentrant"),
    ],
)
def test_fields_that_it_lacks_are_refused(field: str, value: Any, words: str, tokenizer: Any, tmp_path: Path) -> None:
    """By `validate`, and by the trainer alone."""
    from pydantic import ValidationError

    from posttrain.errors import ConfigError
    from posttrain.trainers.grpo import GRPOStage

    stage = {"name": "rl", "method": "grpo", "steps": 1, "trl": {field: value}}
    with pytest.raises(ValidationError, match=words):
        GRPOStage.model_validate({**stage, "fast": "on"})
    assert GRPOStage.model_validate(stage).fast == "off"
    with pytest.raises(ConfigError, match=words):
        make_trainer(make_model("llama", tokenizer), tokenizer, tmp_path, fast=True, **{field: value})


def test_models_that_it_cannot_run_are_refused_or_said(tokenizer: Any, tmp_path: Path) -> None:
    """A forward pass that is not TRL's is an error; a cache that is not handed on leaves prompts with their rows, and is said."""
    from posttrain.errors import ConfigError

    model = make_model("llama", tokenizer)
    backbone = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **kwargs: backbone(*args, **kwargs, position_ids=position_ids and None)
    with pytest.raises(ConfigError, match="LlamaForCausalLM does not run with our forward pass"):
        make_trainer(model, tokenizer, tmp_path, fast=True)
    model = make_model("llama", tokenizer)
    whole = model.model.forward
    model.model.forward = lambda *args, past_key_values=None, **kwargs: whole(*args, **kwargs)
    assert make_trainer(model, tokenizer, tmp_path, fast=True).form.reason == "LlamaModel does not hand its cache to every layer"
