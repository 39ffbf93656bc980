"""Shared by the tests of NoiseFiT: a model of four layers, trainers on it, and the loss and gradient of one micro-batch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from trainer_kit import sft_trainer


def deep_model(tiny: Path, folder: Path, **fields: Any) -> Path:
    """A seeded float32 Llama of four layers of 32 features in `folder`, with the tokenizer of `tiny`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shutil.copytree(tiny, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.2, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, dtype="float32", **{**sizes, **fields},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def noise_trainer(
    folder: Path, out: Path, *, peft: Any = None, events: Any = None, args: dict[str, Any] | None = None, **noise: Any
) -> Any:
    """A NoiseFiTTrainer on CHATS; `noise` are fields of NoiseConfig."""
    from posttrain.trainers._noisefit_config import NoiseConfig
    from posttrain.trainers.noisefit import NoiseFiTTrainer

    extra = {"noise": NoiseConfig(**noise), "events": events}
    return sft_trainer(NoiseFiTTrainer, folder, out, peft=peft, extra=extra, **(args or {}))


def batch_of(trainer: Any, rows: range = range(3, 7), prompt: int = 10) -> dict[str, Any]:
    """Rows of the training set as the trainer collates them, some of them padded; without loss on the first tokens."""
    batch = dict(trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in rows])))
    batch["labels"][:, :prompt] = -100
    return batch


def loss_and_gradient(trainer: Any, batch: dict[str, Any], items: int | None = None, step: int = 0) -> tuple[Any, dict[str, Any]]:
    """Loss of one micro-batch, the first of a step, and its gradient by parameter."""
    trainer.state.global_step, trainer._at = step, (-1, -1)
    trainer.model.train()
    trainer.model.zero_grad()
    with trainer.injector.installed():
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
        loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters() if parameter.grad is not None}
    return loss.detach(), found


def gap(left: dict[str, Any], right: dict[str, Any]) -> float:
    """Norm of the difference of two gradients over the norm of the second."""
    assert left.keys() == right.keys()
    apart = sum((left[name] - right[name]).double().square().sum().item() for name in left)
    return (apart / sum(value.double().square().sum().item() for value in right.values())) ** 0.5
