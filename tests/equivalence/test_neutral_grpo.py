"""GRPO: with TRL's own generation every number is TRL's, bit by bit; with the hf engine the pieces equal their formulas."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import TASKS, curve, grpo_trainer, lora, rng, same, weights

torch = pytest.importorskip("torch")


def engine() -> Any:
    """Maker of the hf engine."""
    from posttrain.rollout.hf import HFEngine

    return partial(HFEngine, max_batch=32)


def first_batch(trainer: Any) -> dict[str, Any]:
    """The scored first generation batch, without training on it."""
    trainer.model.train()
    loader = trainer.get_train_dataloader()
    return trainer._generate_and_score_completions(next(iter(loader)))


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora-kl"])
def test_ten_steps_equal_trl_bitwise(tiny_model_dir: Path, tmp_path: Path, adapter: bool) -> None:
    import trl

    from posttrain.core.events import Events
    from posttrain.trainers.grpo import GRPOTrainer

    seen: list[Any] = []
    for name, cls, extra in (("trl", trl.GRPOTrainer, {}), ("ours", GRPOTrainer, {"events": Events(None)})):
        args = {"beta": 0.1, "num_iterations": 2} if adapter else {}
        trainer = grpo_trainer(cls, tiny_model_dir, tmp_path / name, peft=lora() if adapter else None, extra=extra, save_steps=4, **args)
        trainer.train()
        seen.append((weights(trainer), curve(trainer), rng()))
    (w0, c0, r0), (w1, c1, r1) = seen
    assert len(c0) == 10
    assert any(norm > 0 for _, norm in c0)
    assert c0 == c1
    assert same(w0, w1)
    assert r0 == r1


@pytest.mark.parametrize("temperature", [0.3, 0.6, 1.0, 1.7])
def test_sampled_and_recomputed_log_probabilities_agree(tiny_model_dir: Path, tmp_path: Path, temperature: float) -> None:
    """C21: |ratio - 1| < 1e-4 before any update, at every temperature."""
    from posttrain.trainers._trl import policy_logps
    from posttrain.trainers.grpo import GRPOTrainer

    trainer = grpo_trainer(GRPOTrainer, tiny_model_dir, tmp_path, extra={"engine": engine()}, temperature=temperature)
    batch = first_batch(trainer)
    gap = (policy_logps(trainer, batch) - batch["sampling_per_token_logps"]) * batch["completion_mask"]
    assert gap.exp().sub(1).abs().max().item() < 1e-4
    assert trainer._metrics["train"]["rollout/logp_gap_max"][0] < 1e-4


def test_engine_with_other_weights_is_an_error(tiny_model_dir: Path, tmp_path: Path) -> None:
    from trainer_kit import load

    from posttrain.errors import RolloutError
    from posttrain.rollout.hf import HFEngine
    from posttrain.trainers.grpo import GRPOTrainer

    class Stale(HFEngine):
        def load_weights(self, source: Any, version: int) -> None:
            self.version = version

    other, _ = load(tiny_model_dir)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(3)
    trainer = grpo_trainer(GRPOTrainer, tiny_model_dir, tmp_path, extra={"engine": lambda _model, tokenizer: Stale(other, tokenizer)})
    with pytest.raises(RolloutError, match="differ by"):
        first_batch(trainer)


def test_correction_equals_trls_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Advantages (B, T) times weights give the loss that TRL gives with `importance_sampling_ratio`, in both modes."""
    from posttrain.trainers._grpo import correction_weights
    from posttrain.trainers.grpo import GRPOTrainer

    trainer = grpo_trainer(GRPOTrainer, tiny_model_dir, tmp_path, extra={"engine": engine()}, num_iterations=2)
    batch = first_batch(trainer)
    trainer.current_gradient_accumulation_steps = 1
    noise = torch.randn(batch["completion_mask"].shape, generator=torch.Generator().manual_seed(0))
    mask = batch["completion_mask"]
    batch["old_per_token_logps"] = batch["old_per_token_logps"] + 0.1 * noise
    gap = 0.8 * noise.flip(0) * mask
    for mode, cap in (("token_truncate", 1.5), ("sequence_mask", 1.2)):
        ratio = gap.exp().clamp(max=cap) if mode == "token_truncate" else gap.sum(1, keepdim=True).exp()
        ratio = torch.where(ratio > cap, torch.zeros_like(ratio), ratio) if mode == "sequence_mask" else ratio
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
        theirs = trainer._compute_loss(trainer.model, {**batch, "importance_sampling_ratio": ratio})
        trainer.use_vllm = False
        ours = trainer._compute_loss(
            trainer.model, {**batch, "advantages": batch["advantages"][:, None] * correction_weights(gap, mask, mode, cap)}
        )
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6, abs=1e-9)
        assert (ratio == 0).any() or mode == "token_truncate"
        trainer.correction, trainer.correction_cap = mode, cap
        trainer._measure_weights(correction_weights(gap, mask, mode, cap), gap, mask)
        seen = {name: trainer._metrics["train"][f"correction/{name}"][-1] for name in ("mean", "capped", "ess")}
        kept = ratio.expand_as(gap)[mask.bool()]
        capped = kept == (cap if mode == "token_truncate" else 0)
        ess = kept.mean() ** 2 / kept.square().mean()
        assert seen == pytest.approx({"mean": kept.mean().item(), "capped": capped.float().mean().item(), "ess": ess.item()}, rel=1e-5)


def test_correction_off_policy_by_nothing_changes_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    from posttrain.trainers.grpo import GRPOTrainer

    losses = []
    for mode in ("none", "token_truncate", "sequence_mask"):
        trainer = grpo_trainer(GRPOTrainer, tiny_model_dir, tmp_path / mode, extra={"engine": engine(), "correction": mode}, max_steps=2)
        trainer.train()
        losses.append([value for pair in curve(trainer) for value in pair])
        seen = [item["correction/mean"] for item in trainer.state.log_history if "correction/mean" in item]
        assert seen == ([] if mode == "none" else pytest.approx([1.0, 1.0], abs=1e-5))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)


def test_requests_are_seeded_by_row_and_place_not_by_batch(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The same completions whether a step is generated in one pass of 8 or in engine batches of 3."""
    from posttrain.rollout.hf import HFEngine
    from posttrain.trainers.grpo import GRPOTrainer

    drawn = []
    for size in (32, 3):
        trainer = grpo_trainer(GRPOTrainer, tiny_model_dir, tmp_path / str(size), extra={"engine": partial(HFEngine, max_batch=size)})
        drawn.append(first_batch(trainer)["completion_ids"])
    assert torch.equal(drawn[0], drawn[1])
    assert len({tuple(row) for row in drawn[0].tolist()}) > 4


def test_groups_are_rows_not_texts(tiny_model_dir: Path, tmp_path: Path) -> None:
    """C52: identical prompts with different answers are different groups, each scored by its own answer."""
    from posttrain.trainers.grpo import GRPOTrainer

    seen: list[list[str]] = []

    def by_answer(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        seen.append(list(answer))
        return [float(value) + i % 4 for i, value in enumerate(answer)]

    rows = [
        {"prompt": [{"role": "user", "content": text}], "answer": answer}
        for text, answer in (("same", "10"), ("same", "20"), ("b", "30"), ("c", "40"))
    ]
    trainer = grpo_trainer(
        GRPOTrainer,
        tiny_model_dir,
        tmp_path,
        rows=rows,
        rewards=by_answer,
        extra={"engine": engine()},
        per_device_train_batch_size=8,
        scale_rewards="none",
    )
    batch = first_batch(trainer)
    groups = [seen[0][i : i + 4] for i in range(0, 16, 4)]
    assert sorted(set(group).pop() for group in groups if len(set(group)) == 1) == ["10", "20", "30", "40"]
    assert batch["advantages"].tolist() == pytest.approx([-1.5, -0.5, 0.5, 1.5] * 4)


def test_none_rewards_do_not_apply(tiny_model_dir: Path, tmp_path: Path) -> None:
    """C18: None leaves a value out; a completion without any value has advantage 0 and is counted; nothing is NaN."""
    from posttrain.trainers.grpo import GRPOTrainer

    def a(completions: list[Any], **_: Any) -> list[float | None]:
        return [1.0, 0.0, None, None] * (len(completions) // 4)

    def b(completions: list[Any], **_: Any) -> list[float | None]:
        return [0.2, 0.1, 0.3, None] * (len(completions) // 4)

    trainer = grpo_trainer(GRPOTrainer, tiny_model_dir, tmp_path, rewards=[a, b], extra={"engine": engine()}, scale_rewards="none")
    batch = first_batch(trainer)
    totals = [1.2, 0.1, 0.3]
    mean = sum(totals) / 3
    assert batch["advantages"].tolist() == pytest.approx([*(value - mean for value in totals), 0.0] * 2, abs=1e-6)
    assert trainer._metrics["train"]["rewards/unscored"] == [2.0]


def test_all_truncated_step_changes_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    """C80: every completion masked: no update even with momentum, counted, no NaN logged."""
    from posttrain.rollout.hf import HFEngine
    from posttrain.trainers.grpo import GRPOTrainer

    class Endless(HFEngine):
        """From step 2 on, no completion ends."""

        def generate(self, requests: Any) -> Any:
            self.eos_ids = frozenset({-1}) if self.version >= 2 else self.eos_ids
            from dataclasses import replace

            end = self.tokenizer.eos_token_id
            done = super().generate(requests)
            if self.version >= 2:
                return [replace(c, token_ids=[5 if t == end else t for t in c.token_ids]) for c in done]
            return [replace(c, token_ids=[*c.token_ids[:-1], end]) for c in done]

    trainer = grpo_trainer(
        GRPOTrainer,
        tiny_model_dir,
        tmp_path,
        extra={"engine": Endless},
        mask_truncated_completions=True,
        max_completion_length=4,
        max_steps=3,
        save_steps=2,
        weight_decay=0.1,
        lr_scheduler_type="constant",
    )
    trainer._check_gap = lambda *_: None
    trainer.train()
    from safetensors.torch import load_file

    after_two, after_three = (load_file(tmp_path / f"checkpoint-{n}" / "model.safetensors") for n in (2, 3))
    assert same(after_two, after_three)
    logs = [item for item in trainer.state.log_history if "loss" in item]
    assert [item["steps_skipped"] for item in logs] == [0.0, 0.0, 1.0]
    assert logs[2]["loss"] == 0.0
    assert not same(after_two, load_file(tiny_model_dir / "model.safetensors"))


def test_half_truncated_gradient_is_that_of_the_unmasked_rows(tiny_model_dir: Path, tmp_path: Path) -> None:
    """C80: with the `dapo` normaliser (unmasked tokens of the batch) masked rows do not shrink the rest of the gradient."""
    from posttrain.trainers.grpo import GRPOTrainer

    trainer = grpo_trainer(
        GRPOTrainer, tiny_model_dir, tmp_path, extra={"engine": engine()}, gradient_accumulation_steps=1, per_device_train_batch_size=8
    )
    batch = first_batch(trainer)
    trainer.current_gradient_accumulation_steps = 1
    keep = torch.tensor([True, False] * 4)

    def gradient(part: dict[str, Any]) -> Any:
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, part).backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])

    masked = {**batch, "completion_mask": batch["completion_mask"] * keep[:, None]}
    masked["num_items_in_batch"] = masked["completion_mask"].sum()
    subset = {name: value[keep] if value.dim() else value for name, value in masked.items()}
    assert torch.allclose(gradient(masked), gradient(subset), atol=1e-7)


def test_sampler_moves_to_a_later_epoch() -> None:
    from trl.trainer.utils import RepeatSampler

    from posttrain.trainers._grpo import ResumableRepeatSampler

    data = list(range(7))
    straight = RepeatSampler(data, 2, 3, 2, True, 5)
    expected = [list(straight) for _ in range(3)]
    ours, late = ResumableRepeatSampler(data, 2, 3, 2, True, 5), ResumableRepeatSampler(data, 2, 3, 2, True, 5)
    for epoch in range(3):
        ours.set_epoch(epoch)
        assert list(ours) == expected[epoch]
    late.set_epoch(2)
    assert list(late) == expected[2]


def test_stage_rewards_see_whole_rows_and_missing_columns_are_named() -> None:
    from posttrain.config.common import RewardUse
    from posttrain.errors import DataError
    from posttrain.trainers._grpo_run import reward_functions

    rows = [{"id": str(i), **row} for i, row in enumerate(TASKS[:3])]
    (scored,) = reward_functions([RewardUse(use="exact")], rows)
    values = scored(completions=[rows[2]["answer"], "no"], prompts=["", ""], row_index=[2, 0], completion_ids=[[1], [1]])
    assert values == [1.0, 0.0]
    renamed = [{"id": "0", "prompt": "p", "gold": "4"}]
    with pytest.raises(DataError, match="columns there: gold"):
        reward_functions([RewardUse(use="exact")], renamed)
    (scored,) = reward_functions([RewardUse(use="exact", columns={"answer": "gold"})], renamed)
    assert scored(completions=["4"], prompts=[""], row_index=[0], completion_ids=[[1]]) == [1.0]
