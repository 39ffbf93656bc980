"""Shared by the tests of D2O and DPO: rows, trainers on given groups, and gradients of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer_kit import load

PAIRS = [{"prompt": f"What is {i} + {i}?", "chosen": f"It is {2 * i}.", "rejected": f"Go away, {i}!", "id": f"r{i}"} for i in range(12)]
BASE: dict[str, Any] = {
    "steps": 6,
    "batch": {"rows": 4, "per_device": 2},
    "optim": {"lr": 1e-3, "schedule": "constant"},
    "data": {"max_length": 64},
}
D2O: dict[str, Any] = {**BASE, "self_samples": {"k": 3, "max_tokens": 6}}


def groups_of(k: int, seed: int = 0) -> list[Any]:
    """Four groups of random tokens with references."""
    import torch

    from posttrain.trainers._d2o_samples import Group

    draw = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 300, (count,), generator=draw).tolist()

    found = []
    for i in range(4):
        prompt = ids(4 + i)
        own = [([*prompt, *ids(3 + j)], len(prompt)) for j in range(k)]
        refs = (-5.5 * torch.rand(k, generator=draw) * 6 - 10).tolist()
        found.append(Group({"id": str(i)}, ([*prompt, *ids(5)], len(prompt)), own, refs, -27.0 - i))
    return found


def d2o_trainer(folder: Path, out: Path, groups: list[Any], *, checkpointing: bool = False, adapter: Any = None, **fields: Any) -> Any:
    """A D2OTrainer on given groups."""
    from datasets import Dataset
    from transformers import TrainingArguments

    from posttrain.trainers.d2o import D2OStage, D2OTrainer

    model, tokenizer = load(folder)
    if adapter is not None:
        from peft import get_peft_model

        model = get_peft_model(model, adapter)
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **fields.pop("sizes", {})}
    args = TrainingArguments(
        output_dir=str(out), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=3, learning_rate=1e-3, logging_steps=1,
        lr_scheduler_type="constant", max_grad_norm=0.0, save_steps=100, gradient_checkpointing=checkpointing, remove_unused_columns=False,
        train_sampling_strategy="sequential", **sizes,
    )  # fmt: skip
    cfg = D2OStage(name="t", steps=3, **fields)
    data = Dataset.from_dict({"group": [i % len(groups) for i in range(12)]})
    return D2OTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, groups=groups, cfg=cfg)


def gradient(trainer: Any, groups: list[Any], double: bool = True) -> tuple[float, dict[str, Any]]:
    """Loss and gradient of one micro-batch."""
    if double:
        trainer.model.double()
    trainer.model.zero_grad()
    loss = trainer.own_step(trainer.model, groups, 1.0)
    return float(loss), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
