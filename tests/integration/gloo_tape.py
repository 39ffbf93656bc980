"""Started by torchrun, or called: ten steps of a GRPO trainer on recorded rollouts, each process on its share of them.

Arguments: tokenizer folder, output folder. For each case, the first step's gradient and the last weights lie in `CASE.safetensors`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    f"{'fast' if fast else 'trl'}-{name}": (fast, args)
    for fast in (False, True)
    for name, args in {
        "sgd": {"optim": "sgd", "learning_rate": 0.05},
        "adamw": {"optim": "adamw_torch", "learning_rate": 1e-3},
    }.items()
}


def run(case: str, tokenizer_dir: Path, out: Path) -> None:
    """One case, on all processes; the first writes."""
    import torch
    from fast_kit import make_model, make_tape, make_trainer
    from safetensors.torch import save_file
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    fast, args = CASES[case]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    model = make_model("llama", tokenizer)
    sizes = {"per_device_train_batch_size": 4, "max_steps": 10, "lr_scheduler_type": "constant", "max_grad_norm": 1e9, "loss_type": "grpo"}
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    trainer = make_trainer(
        model, tokenizer, out / "work", fast=fast, gradient_accumulation_steps=4 // world,
        ddp_backend="gloo" if world > 1 else None, **sizes, **args,
    )  # fmt: skip
    found: dict[str, Any] = {}
    drawn = iter(range(99))

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if not found:
                found.update({f"gradient.{name}": p.grad.clone() for name, p in trainer.model.named_parameters()})

    def recorded(_inputs: Any) -> dict[str, Any]:
        batch = make_tape(len(tokenizer), seed=next(drawn))
        share = len(batch["advantages"]) // world
        mine = slice(rank * share, (rank + 1) * share)
        trainer.reward_matrix = torch.zeros(share, 1)
        return {name: value[mine] if value.dim() else value for name, value in batch.items()}

    trainer.add_callback(Keep())
    trainer._generate_and_score_completions = recorded
    trainer.train()
    if rank == 0:
        weights = {f"weight.{name}": p.detach().clone() for name, p in trainer.model.named_parameters()}
        save_file({**found, **weights}, out / f"{case}.safetensors")
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    for name in CASES:
        run(name, Path(sys.argv[1]), Path(sys.argv[2]))
