"""NoiseFiT: SFT's numbers at the neutral setting, and the same step however its passes are carried out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from noisefit_kit import batch_of, deep_model, gap, loss_and_gradient, noise_trainer
from trainer_kit import curve, lora, rng, same, sft_trainer, weights

torch = pytest.importorskip("torch")

NOISE = {"selection": "list", "layers": [1, 2], "relative_std": 0.5, "consistency_weight": 0.4}
ROUNDING = 1e-6
"""Of a gradient in float64: all but GPT-2 take their norms in float32 whatever the type, and its sums have another order."""


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deep_model(tiny_model_dir, tmp_path_factory.mktemp("deep") / "model")


@pytest.mark.parametrize(
    ("adapter", "noise"), [(False, {"passes": 0}), (True, {"ce_weight": 1.0, "consistency_weight": 0.0})], ids=["full", "lora"]
)
def test_ten_neutral_steps_equal_trl_bitwise(tiny_model_dir: Path, tmp_path: Path, adapter: bool, noise: dict[str, Any]) -> None:
    import trl

    seen: list[Any] = []
    for name in ("trl", "ours"):
        peft = lora() if adapter else None
        if name == "trl":
            trainer = sft_trainer(trl.SFTTrainer, tiny_model_dir, tmp_path / name, peft=peft)
        else:
            trainer = noise_trainer(tiny_model_dir, tmp_path / name, peft=peft, **noise)
        trainer.train()
        seen.append((weights(trainer), curve(trainer), rng()))
    (w0, c0, r0), (w1, c1, r1) = seen
    assert len(c0) == 10
    assert c0 == c1
    assert same(w0, w1)
    assert r0 == r1


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("fields", [{}, {"passes": 1, "consistency_weight": 0.0}, {"layers": [3]}, {"layers": [0, 3], "temperature": 2.0}])
def test_shared_layers_change_nothing(model_dir: Path, tmp_path: Path, fields: dict[str, Any], adapter: bool) -> None:
    found = []
    for share in ("on", "off"):
        torch.manual_seed(0)
        trainer = noise_trainer(model_dir, tmp_path, peft=lora() if adapter else None, **{**NOISE, **fields, "share_prefix": share})
        trainer.model.double()
        found.append(loss_and_gradient(trainer, batch_of(trainer)))
        assert trainer.shared is (share == "on")
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-10)
    assert gap(found[0][1], found[1][1]) < ROUNDING


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gemma2", "mistral"])
def test_other_architectures_share_too_or_say_why(tmp_path: Path, kind: str) -> None:
    """Absolute positions, logit caps and a norm behind attention, a sliding window: the same loss both ways."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from posttrain.losses.noisefit import Form, Weights, noisefit_loss
    from posttrain.trainers._noisefit_forward import add_noisy_forward, decoder_layers, sharing_problem
    from posttrain.trainers._noisefit_noise import Injector, Operator, Work, segments_of

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    extra = {"gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
             "gemma2": {**sizes, "head_dim": 16, "sliding_window": 4}, "mistral": {**sizes, "sliding_window": 4}}  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=64, **extra.get(kind, sizes), bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).train()
    injector = Injector(decoder_layers(model))
    add_noisy_forward(model, injector)
    ids = torch.randint(3, 64, (3, 11))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    places = mask.flatten().nonzero().flatten()
    count = torch.full((len(places),), 1 / len(places), dtype=torch.float64)

    def score(states: Any, head: Any) -> Any:
        return noisefit_loss(states, ids.flatten()[places], head, Weights(count, count, count), Form())[0]

    found = []
    with injector.installed():
        assert sharing_problem(model, injector, 64, {1: 0.5}) == ""
        for share in (True, False):
            work = Work(inputs, places, [{1: 0.5}, {1: 0.5, 2: 0.3}], Operator(), segments_of(inputs, 0, 3), (0, 0), share, score)
            model.zero_grad()
            loss = model(noisy=work)
            loss.backward()
            found.append((loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-10)
    assert gap(found[0][1], found[1][1]) < (1e-10 if kind == "gpt2" else ROUNDING)


@pytest.mark.parametrize("share", ["on", "off"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_gradient_checkpointing_changes_nothing(model_dir: Path, tmp_path: Path, share: str, reentrant: bool, adapter: bool) -> None:
    """Also with dropout in the adapter, whose masks are the ones of the first run."""
    from peft import LoraConfig

    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        peft = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
        trainer = noise_trainer(model_dir, tmp_path, peft=peft, **NOISE, share_prefix=share)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if checkpointing:
            trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if adapter:
                trainer.model.enable_input_require_grads()
        batch = batch_of(trainer)
        loss_and_gradient(trainer, batch)
        torch.manual_seed(3)
        found.append(loss_and_gradient(trainer, batch))
    assert found[0][0] == found[1][0]
    assert gap(found[1][1], found[0][1]) == 0


def test_noise_is_new_each_step_and_the_same_again(model_dir: Path, tmp_path: Path) -> None:
    trainer = noise_trainer(model_dir, tmp_path, **NOISE)
    batch = batch_of(trainer)
    losses = [loss_and_gradient(trainer, batch, step=step)[0].item() for step in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]
    before = rng()
    loss_and_gradient(trainer, batch)
    assert rng() == before


def test_noise_does_not_depend_on_neighbours_or_padding(model_dir: Path, tmp_path: Path) -> None:
    """The rows of a micro-batch one by one, each in its place in the step, have the same losses; weights multiply a row's."""
    trainer = noise_trainer(model_dir, tmp_path, **NOISE)
    trainer.model.double()
    row_weights = torch.tensor([2.0, 0.0, 1.0, 0.5])
    weighted, _ = loss_and_gradient(trainer, {**batch_of(trainer), "loss_weight": row_weights}, items=50)
    whole, gradient = loss_and_gradient(trainer, batch_of(trainer), items=50)
    trainer.args.per_device_train_batch_size = 1
    trainer.model.zero_grad()
    trainer._at = (-1, -1)
    parts = []
    with trainer.injector.installed():
        for row in range(3, 7):
            loss = trainer.compute_loss(trainer.model, batch_of(trainer, range(row, row + 1)), num_items_in_batch=50)
            loss.backward()
            parts.append(loss.item())
    assert sum(parts) == pytest.approx(whole.item(), rel=1e-6)
    assert weighted.item() == pytest.approx(sum(w * part for w, part in zip(row_weights.tolist(), parts, strict=True)), rel=1e-6)
    assert gap({name: p.grad for name, p in trainer.model.named_parameters()}, gradient) < 1e-6


def test_accumulation_does_not_change_a_step_nor_the_last_short_one(model_dir: Path, tmp_path: Path) -> None:
    """24 rows in steps of 10, 10 and 4: one row a pass, two, and all at once."""
    found = []
    for per_device, accumulation in ((1, 10), (2, 5), (10, 1)):
        args = {
            "per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation, "max_steps": -1, "num_train_epochs": 1,
        }  # fmt: skip
        trainer = noise_trainer(model_dir, tmp_path / str(per_device), args=args, **NOISE)
        trainer.train()
        found.append((curve(trainer), weights(trainer)))
    assert len(found[0][0]) == 3
    for losses, held in found[1:]:
        assert [loss for loss, _ in losses] == pytest.approx([loss for loss, _ in found[0][0]], abs=1e-5)
        assert max((held[name] - found[0][1][name]).abs().max().item() for name in held) < 1e-5


def test_packed_documents_have_their_own_noise(model_dir: Path, tmp_path: Path) -> None:
    """The loss of a packed pass does not change for document 2 when document 1 does, and both layouts agree."""
    trainer = noise_trainer(model_dir, tmp_path, **NOISE)
    trainer.model.double()
    losses = []
    for first, share in ((5, True), (105, True), (5, False)):
        ids = torch.tensor([[*range(first, first + 6), *range(30, 40)]])
        positions = torch.tensor([[*range(6), *range(10)]])
        labels = ids.clone()
        labels[:, :7] = -100
        trainer.noise = trainer.noise.model_copy(update={"share_prefix": "on" if share else "off"})
        trainer.shared = None
        losses.append(loss_and_gradient(trainer, {"input_ids": ids, "position_ids": positions, "labels": labels})[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)


def test_bounds_of_packed_sequences_are_shifted_from_copy_to_copy() -> None:
    from posttrain.trainers._noisefit_noise import repeated

    assert repeated("cu_seq_lens_q", torch.tensor([0, 3, 5]), 1, 3).tolist() == [0, 3, 5, 8, 10, 13, 15]
    assert repeated("attention_mask", torch.ones(2, 4), 2, 3).shape == (6, 4)
    assert repeated("position_embeddings", (torch.ones(1, 4, 8),) * 2, 2, 3)[0].shape == (1, 4, 8)
    assert repeated("max_length_q", 4, 1, 3) == 4


def test_dropout_before_the_noise_is_not_shared_unless_asked(model_dir: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    for mode, wanted in (("auto", False), ("on", True)):
        peft = LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = noise_trainer(model_dir, tmp_path, peft=peft, **NOISE, share_prefix=mode)
        loss_and_gradient(trainer, batch_of(trainer))
        assert trainer.shared is wanted


def test_hooks_are_gone_after_training_and_after_an_error(model_dir: Path, tmp_path: Path) -> None:
    from trainer_kit import Interrupted, at_step, interrupt

    from posttrain.core.events import Events

    trainer = noise_trainer(model_dir, tmp_path, args={"max_steps": 1}, **NOISE)
    trainer.train()
    stopped = noise_trainer(model_dir, tmp_path, events=Events(None), args={"max_steps": 2}, **NOISE)
    stopped.events.sinks.append(at_step(1, interrupt))
    with pytest.raises(Interrupted):
        stopped.train()
    for done in (trainer, stopped):
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in done.injector.layers)
        assert done.injector.work is None


def test_evaluation_in_the_middle_is_without_noise(model_dir: Path, tmp_path: Path) -> None:
    trainer = noise_trainer(model_dir, tmp_path, **NOISE)
    batch = batch_of(trainer)
    loss_and_gradient(trainer, batch)
    trainer.model.eval()
    with trainer.injector.installed(), torch.no_grad():
        trainer.injector.work = "what is left of a training pass"
        found = [trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=None) for _ in range(2)]
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert found[0] == found[1]
    assert found[0].item() == pytest.approx(plain.item(), rel=1e-5)


def test_a_micro_batch_without_targets_gives_zero_for_every_parameter(model_dir: Path, tmp_path: Path) -> None:
    trainer = noise_trainer(model_dir, tmp_path, **NOISE)
    loss, gradient = loss_and_gradient(trainer, batch_of(trainer, prompt=99), items=7)
    assert loss == 0
    assert len(gradient) == len(list(trainer.model.parameters()))
    assert not any(value.any() for value in gradient.values())


def test_virtual_tokens_are_refused(model_dir: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig

    from posttrain.errors import ConfigError

    with pytest.raises(ConfigError, match="virtual tokens"):
        noise_trainer(model_dir, tmp_path, peft=PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), **NOISE)
