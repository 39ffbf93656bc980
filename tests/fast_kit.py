"""For `fast: on`: small models of several architectures, a tape of rollouts, and loss and gradient of a trainer on it."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 8}),
    "gpt2": ("GPT2", GPT2),
    "neox": ("GPTNeoX", {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}),
    "gemma2": ("Gemma2", {**SIZES, "head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 512}),
    "granite": ("Granite", {**SIZES, "logits_scaling": 4.0}),
    "mistral-window": ("Mistral", {**SIZES, "sliding_window": 6}),
}


def make_model(name: str, tokenizer: Any, dtype: Any = None) -> Any:
    """A seeded model; in float64 its RMS norms no longer go through float32."""
    import torch
    import transformers

    family, sizes = ARCHITECTURES[name]
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **sizes, **ids)
    torch.manual_seed(0)
    kind = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, kind)(config).to(dtype or torch.float32)
    if dtype == torch.float64:
        exact_norms(model, 1.0 if family.startswith("Gemma") else 0.0)
    return model


def exact_norms(model: Any, offset: float) -> None:
    """Lets RMS norms compute in the type of their input."""
    import torch

    def forward(self: Any, hidden: Any) -> Any:
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps) * (offset + self.weight)

    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = types.MethodType(forward, module)


def make_tape(vocabulary: int, seed: int = 0, prompts: int = 4, group: int = 4, limit: int = 9, dtype: Any = None) -> dict[str, Any]:
    """Scored rollouts of ragged lengths; the second group's advantages are 0, one completion is masked."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows, width = prompts * group, 8
    sizes = torch.randint(2, width + 1, (prompts,), generator=generator).repeat_interleave(group)
    lengths = torch.randint(1, limit + 1, (rows,), generator=generator)
    lengths[-1], lengths[0], sizes[:group] = 0, limit, width
    prompt_mask = (torch.arange(width) >= width - sizes[:, None]).long()
    mask = (torch.arange(limit) < lengths[:, None]).long()
    texts = torch.randint(3, vocabulary, (prompts, width), generator=generator).repeat_interleave(group, dim=0)
    drawn = torch.randint(3, vocabulary, (rows, limit), generator=generator)
    advantages = torch.randn(rows, generator=generator, dtype=dtype)
    advantages[group : 2 * group] = 0
    return {
        "prompt_ids": texts * prompt_mask, "prompt_mask": prompt_mask, "completion_ids": drawn * mask, "completion_mask": mask,
        "advantages": advantages, "num_items_in_batch": mask.sum(),
    }  # fmt: skip


def plain_forward(trainer: Any) -> Any:
    """The log-probabilities and entropies of every completion token from all logits of the padded batch, in the model's type."""
    import torch

    def forward(model: Any, ids: Any, attention: Any, keep: int, *_: Any, **__: Any) -> Any:
        logits = model(input_ids=ids, attention_mask=attention).logits[:, -keep - 1 : -1] / trainer.temperature
        found = torch.log_softmax(logits, dim=-1)
        mask = attention[:, -keep:]
        logps, entropies = found.gather(-1, ids[:, -keep:, None]).squeeze(-1) * mask, -(found.exp() * found).sum(-1) * mask
        trainer._kept = (logps, entropies, None) if torch.is_grad_enabled() else ()
        return logps, entropies, None

    return forward


def step_of(trainer: Any, batch: dict[str, Any], parts: int = 1) -> tuple[float, Any, dict[str, list[float]]]:
    """Loss, gradient in one vector, and metrics of one micro-batch of `parts`."""
    import torch

    trainer.model.train()
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs)
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer._window = type(trainer._window)()
    trainer.entropy_before = 5.0
    trainer.current_gradient_accumulation_steps = parts
    trainer._buffered_inputs = [batch] * parts
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return loss.item(), gradient, {name: list(values) for name, values in trainer._metrics["train"].items()}


def make_trainer(model: Any, tokenizer: Any, out: Path, *, fast: bool, peft: Any = None, **args: Any) -> Any:
    """Our GRPO trainer around a model that is already there."""
    import trl
    from datasets import Dataset
    from trainer_kit import COMMON, TASKS, distinct_letters

    from posttrain.trainers.grpo import GRPOTrainer

    terms = args.pop("terms", None)
    rows = [{"prompt": row["prompt"]} for row in TASKS[:12]]
    given = {"num_generations": 4, "max_completion_length": 9, "temperature": 0.7, "save_steps": 100, **COMMON, **args}
    config = trl.GRPOConfig(output_dir=str(out), **given)
    return GRPOTrainer(
        model, reward_funcs=distinct_letters, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=peft, fast=fast, terms=terms,
    )  # fmt: skip
