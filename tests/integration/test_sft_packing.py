"""Packing in `sft`: documents stay apart on the model at hand or the stage is refused; both layouts give the same loss."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from trainer_kit import CHATS, Interrupted, at_step, curve, digest, interrupt, load, run_stage

torch = pytest.importorskip("torch")

PACKED = {"steps": 4, "batch": {"rows": 4, "per_device": 2}, "data": {"max_length": 64, "packing": True}, "checkpoint": {"every": 2}}
DOCUMENTS = [list(range(5, 17)), list(range(30, 41)), list(range(100, 107))]


def make_rows(lengths: list[int], seed: int = 0) -> list[Any]:
    """Random rows of these lengths; the first third of each carries no loss."""
    draw = random.Random(seed)
    return [
        SimpleNamespace(input_ids=[draw.randrange(5, 390) for _ in range(n)], loss_mask=[0] * (n // 3) + [1] * (n - n // 3))
        for n in lengths
    ]


def collators(pad: int = 0) -> dict[str, Any]:
    """Both layouts."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from posttrain.trainers._packing import collate_apart

    return {"end to end": DataCollatorForLanguageModeling(pad, padding_free=True), "apart": collate_apart(pad)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", ["end to end", "apart"])
def test_a_change_of_document_1_leaves_document_2(tiny_model_dir: Path, attention: str, layout: str) -> None:
    """By hand, logit for logit, and against the document alone; then the measure that guards every run."""
    from posttrain.trainers._packing import leak

    model, _ = load(tiny_model_dir)
    model.set_attn_implementation(attention)
    collate, second, found = collators()[layout], DOCUMENTS[1], []
    for first in (DOCUMENTS[0], [token + 200 for token in DOCUMENTS[0]]):
        both = {"input_ids": first + second, "labels": first + second, "seq_lengths": [len(first), len(second)]}
        batch = collate([both, {"input_ids": DOCUMENTS[2], "labels": DOCUMENTS[2], "seq_lengths": [len(DOCUMENTS[2])]}])
        assert batch.pop("labels")[0, len(first)] == -100
        with torch.no_grad():
            found.append(model(**batch, use_cache=False).logits[0, len(first) : len(first) + len(second)])
            alone = model(torch.tensor([second])).logits[0]
    assert torch.equal(found[0], found[1])
    assert torch.allclose(found[0], alone, atol=1e-5)
    assert leak(model, collate, DOCUMENTS) == 0.0


@pytest.mark.parametrize("layout", ["end to end", "apart"])
def test_the_measure_sees_a_leak(tiny_model_dir: Path, layout: str) -> None:
    """Positions that run on over the bounds let document 2 see document 1."""
    from posttrain.trainers._packing import LIMIT, leak

    model, _ = load(tiny_model_dir)
    model.train()
    collate = collators()[layout]

    def blind(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(examples)
        width = batch["input_ids"].size(1)
        return {
            "input_ids": batch["input_ids"],
            "labels": batch["labels"],
            "position_ids": torch.arange(width)[None].expand_as(batch["labels"]),
        }

    before = torch.get_rng_state()
    assert leak(model, blind, DOCUMENTS) > 100 * LIMIT[torch.float32]
    assert model.training and torch.equal(before, torch.get_rng_state())


def test_models_that_ignore_the_bounds_are_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """A state-space model carries its state over the bounds."""
    from transformers import MambaConfig, MambaForCausalLM

    from posttrain.errors import ConfigError

    torch.manual_seed(0)
    size = len(tiny_tokenizer)
    config = MambaConfig(
        vocab_size=size, hidden_size=32, state_size=8, num_hidden_layers=2, pad_token_id=tiny_tokenizer.pad_token_id,
        bos_token_id=None, eos_token_id=tiny_tokenizer.eos_token_id,
    )  # fmt: skip
    model = MambaForCausalLM(config)
    model.save_pretrained(tmp_path / "mamba")
    tiny_tokenizer.save_pretrained(tmp_path / "mamba")
    with pytest.raises(ConfigError, match=r"packed documents see one another.*mamba") as error:
        run_stage(tmp_path / "packed", "sft", CHATS, "messages", tmp_path / "mamba", **{**PACKED, "steps": 1})
    assert "stages.train.data.packing" in str(error.value) and "group_by_length" in str(error.value)
    plain = {**PACKED, "steps": 1, "data": {"max_length": 64, "group_by_length": True}}
    assert run_stage(tmp_path / "plain", "sft", CHATS, "messages", tmp_path / "mamba", **plain).summary["steps"] == 1


def test_packed_loss_against_float64_numpy(tiny_model_dir: Path, tmp_path: Path) -> None:
    """L = -(1/N) sum log p(y_t | y_<t) over the documents alone, in both layouts, and the count of tokens."""
    import trl

    from posttrain.trainers._packing import pack
    from posttrain.trainers._sft import SFTTrainer, encode_dataset

    rows = make_rows([40, 9, 21, 33, 12, 27, 5, 16])
    model, tokenizer = load(tiny_model_dir)
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row.input_ids])).logits[0].double().numpy()
        logp = logits - logits.max(-1, keepdims=True)
        logp = logp - np.log(np.exp(logp).sum(-1, keepdims=True))
        for t in range(1, len(row.input_ids)):
            if row.loss_mask[t]:
                total, count = total - logp[t - 1, row.input_ids[t]], count + 1
    dataset, found = pack(encode_dataset(rows), 48), {}
    for name, collate in collators(tokenizer.pad_token_id).items():
        fresh, tokenizer = load(tiny_model_dir)
        args = trl.SFTConfig(
            output_dir=str(tmp_path), max_length=48, packing=True, dataset_kwargs={"skip_prepare_dataset": True}, max_steps=1,
            per_device_train_batch_size=2, gradient_accumulation_steps=len(dataset) // 2 + len(dataset) % 2, use_cpu=True, bf16=False,
            report_to="none", disable_tqdm=True, logging_steps=1, learning_rate=0.0,
        )  # fmt: skip
        trainer = SFTTrainer(fresh, args=args, train_dataset=dataset, processing_class=tokenizer)
        trainer.data_collator = collate
        trainer.train()
        found[name] = curve(trainer)[0]
        assert found[name][0] == pytest.approx(total / count, rel=1e-5), name
        assert trainer.state.log_history[0]["num_tokens"] == sum(len(row.input_ids) for row in rows), name
    assert found["apart"][1] == pytest.approx(found["end to end"][1], rel=1e-4)


def test_width_and_padding_of_sequences_kept_apart() -> None:
    from posttrain.trainers._packing import collate_apart

    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "seq_lengths": [2, 3]},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "seq_lengths": [3]},
    ]
    batch = collate_apart(0, 4)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [5, 6, 7, 0, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 0, 0], [0, 1, 2, 0, 0, 0, 0, 0]]
    ignored = [-100] * 3
    assert batch["labels"].tolist() == [[-100, 6, -100, 8, 9, *ignored], [-100, 6, 7, -100, -100, *ignored]]
    assert "attention_mask" not in batch


def test_trls_wrapped_packing_cannot_bring_the_leak_back(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`packing_strategy: wrapped` gives an attention mask, under which transformers looks for no bounds."""
    from posttrain.errors import ConfigError
    from posttrain.trainers._sft import SFTTrainer

    wrapped = {**PACKED, "steps": 1, "trl": {"packing_strategy": "wrapped"}}
    run_stage(tmp_path / "apart", "sft", CHATS, "messages", tiny_model_dir, **wrapped)
    monkeypatch.setattr(SFTTrainer, "keeps_apart", False)
    with pytest.raises(ConfigError, match="packed documents see one another"):
        run_stage(tmp_path / "wrapped", "sft", CHATS, "messages", tiny_model_dir, **wrapped)


def test_packed_stage_resumes_bitwise_and_says_how_it_lies(tiny_model_dir: Path, tmp_path: Path) -> None:
    ctx = run_stage(tmp_path / "a", "sft", CHATS, "messages", tiny_model_dir, **PACKED)
    assert any("lie apart" in str(event.get("message")) for event in ctx.seen)
    assert 0 <= ctx.summary["padding_share"] < 0.2
    with pytest.raises(Interrupted):
        run_stage(tmp_path / "b", "sft", CHATS, "messages", tiny_model_dir, sinks=[at_step(3, interrupt)], **PACKED)
    run_stage(tmp_path / "b", "sft", CHATS, "messages", tiny_model_dir, **PACKED)
    assert digest(tmp_path / "a" / "out") == digest(tmp_path / "b" / "out")
