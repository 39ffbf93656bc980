"""C62: a NaN or infinity is stopped before it reaches the weights, shown in the log, and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trainer_kit import TASKS, grpo_trainer, run_stage, same, sft_trainer, weights

torch = pytest.importorskip("torch")


def poisoned(cls: type, step: int, value: float = float("nan")) -> type:
    """`cls` whose loss is multiplied by `value` in every pass of optimizer step `step`."""

    class Poisoned(cls):  # type: ignore[misc, valid-type]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.bad = self.state.global_step + 1 == step
            return super().training_step(*args, **kwargs)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * value if self.bad else loss

    return Poisoned


def finite(state: dict[str, Any]) -> bool:
    """No NaN or infinity in any weight."""
    return all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("step", [1, 3, 6])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_sft_loss(tiny_model_dir: Path, tmp_path: Path, step: int, value: float) -> None:
    from safetensors.torch import load_file

    from posttrain.core.events import Events
    from posttrain.errors import NumericsError
    from posttrain.trainers.sft import SFTTrainer

    events, seen = Events(None), []
    events.sinks.append(seen.append)
    trainer = sft_trainer(poisoned(SFTTrainer, step, value), tiny_model_dir, tmp_path, extra={"events": events}, max_steps=6, save_steps=2)
    with pytest.raises(NumericsError) as error:
        trainer.train()
    text = str(error.value)
    assert error.value.exit_code == 3
    assert f"the loss is {value}" in text
    assert f"step {step}" in text
    good = (step - 1) // 2 * 2
    assert (f"checkpoint-{good}" if good else "no checkpoint") in text
    last = [event for event in seen if event["kind"] == "metrics"][-1]
    assert last["step"] == step
    assert str(last["values"]["loss"]) in ("nan", "inf")
    assert finite(weights(trainer))
    for file in tmp_path.glob("checkpoint-*/model.safetensors"):
        assert finite(load_file(file))
    if good == step - 1 and good:
        assert same(
            {k: v for k, v in weights(trainer).items() if k != "lm_head.weight"},
            load_file(tmp_path / f"checkpoint-{good}" / "model.safetensors"),
        )


def test_gradient_without_a_bad_loss(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The loss is finite, one gradient is not: the tensor is named."""
    from posttrain.errors import NumericsError
    from posttrain.trainers.sft import SFTTrainer

    trainer = sft_trainer(SFTTrainer, tiny_model_dir, tmp_path, max_steps=2)
    name = "model.layers.1.mlp.up_proj.weight"
    trainer.model.get_parameter(name).register_hook(lambda gradient: gradient * float("inf"))
    before = weights(trainer)
    with pytest.raises(NumericsError, match=name.replace(".", r"\.")):
        trainer.train()
    assert same(weights(trainer), before)


@pytest.mark.parametrize("step", [1, 3])
def test_grpo_loss(tiny_model_dir: Path, tmp_path: Path, step: int) -> None:
    from posttrain.errors import NumericsError
    from posttrain.trainers.grpo import GRPOTrainer

    trainer = grpo_trainer(poisoned(GRPOTrainer, step), tiny_model_dir, tmp_path, max_steps=4, save_steps=1)
    with pytest.raises(NumericsError, match=f"step {step}"):
        trainer.train()
    assert finite(weights(trainer))


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinite_reward(tiny_model_dir: Path, tmp_path: Path, value: float) -> None:
    """Before the update, naming the reward; from Python by any function, and in a stage by a registered reward."""
    from posttrain.errors import RewardError
    from posttrain.trainers.grpo import GRPOTrainer

    calls = iter(range(10))

    def generous(completions: list[Any], **_: Any) -> list[float]:
        bad = next(calls) == 2
        return [value if bad and i == 1 else float(i) for i in range(len(completions))]

    trainer = grpo_trainer(GRPOTrainer, tiny_model_dir, tmp_path, rewards=generous, max_steps=4, save_steps=1)
    with pytest.raises(RewardError, match="generous") as error:
        trainer.train()
    assert "step 3" in str(error.value)
    assert finite(weights(trainer))
    assert not (tmp_path / "checkpoint-3").exists()


def test_nan_reward_in_a_stage(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from posttrain.errors import PosttrainError
    from posttrain.rewards import find_reward, registry

    broken = replace(find_reward("length"), function=lambda completions, **_: [float("nan")] * len(completions))
    monkeypatch.setitem(registry._REWARDS, "length", broken)
    fields = {"steps": 2, "group": 4, "batch": {"rows": 8}, "data": {"max_length": 64}, "rollout": {"max_tokens": 4}}
    with pytest.raises(PosttrainError, match="length") as error:
        run_stage(tmp_path, "grpo", TASKS[:4], "verifiable", tiny_model_dir, rewards=[{"use": "length"}], **fields)
    assert error.value.exit_code in (3, 5)


def test_reward_that_often_fails_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 5 % failures end the run; fewer are counted and left out, never scored 0."""
    from dataclasses import replace

    from posttrain.config.common import RewardUse
    from posttrain.errors import RewardError
    from posttrain.rewards import failures, find_reward, registry
    from posttrain.trainers._grpo_run import reward_functions

    def fragile(completions: list[str], **_: Any) -> list[float]:
        if any("boom" in text for text in completions):
            raise ValueError("boom")
        return [1.0] * len(completions)

    monkeypatch.setitem(registry._REWARDS, "length", replace(find_reward("length"), function=fragile))
    failures(reset=True)
    rows = [{"id": "0", **TASKS[0]}]
    (scored,) = reward_functions([RewardUse(use="length")], rows)

    def call(bad: int) -> list[float | None]:
        texts = ["boom"] * bad + ["fine"] * (100 - bad)
        return scored(completions=texts, prompts=[""] * 100, row_index=[0] * 100, completion_ids=[[1]] * 100)

    assert call(4)[:5] == [None, None, None, None, 1.0]
    with pytest.raises(RewardError, match="11 of 200"):
        call(7)
    failures(reset=True)


def test_no_trainable_parameter_is_refused(tiny_model_dir: Path) -> None:
    from trainer_kit import load

    from posttrain.errors import ConfigError
    from posttrain.trainers._train import check_trainable

    model, _ = load(tiny_model_dir)
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="trainable"):
        check_trainable(model, "stages.x.lora")
