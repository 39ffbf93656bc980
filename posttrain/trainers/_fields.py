"""The `trl:` block of a stage against the installed TRL: every field of its config class may be set, except those that posttrain owns.

Used when a trainer is built, and without building one by `validate --deep`.
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from posttrain.config.common import TrainConfig
from posttrain.errors import Problem

OWNED = {
    "output_dir": "the run folder",
    "seed": "seed",
    "data_seed": "seed",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch.per_device",
    "gradient_accumulation_steps": "batch.rows",
    "train_batch_size": "batch.rows",
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "warmup_steps": "optim.warmup",
    "warmup_ratio": "optim.warmup",
    "weight_decay": "optim.weight_decay",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_epsilon": "optim.eps",
    "max_grad_norm": "optim.max_grad_norm",
    "optim": "optim.name",
    "save_steps": "checkpoint.every",
    "save_strategy": "checkpoint",
    "save_total_limit": "checkpoint.keep",
    "load_best_model_at_end": "commit.best",
    "metric_for_best_model": "commit.best.metric",
    "greater_is_better": "commit.best.mode",
    "logging_steps": "log_every",
    "logging_strategy": "log_every",
    "logging_nan_inf_filter": "nothing: a NaN is always shown",
    "report_to": "tracking.to",
    "eval_strategy": "eval",
    "eval_steps": "eval.every",
    "do_eval": "eval",
    "resume_from_checkpoint": "nothing: the same command resumes",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "model_init_kwargs": "model",
    "trust_remote_code": "--trust-remote-code",
    "max_length": "data.max_length",
    "packing": "data.packing",
    "chat_template_path": "data.template",
    "dataset_kwargs": "data",
    "push_to_hub": "nothing: a run publishes nothing",
    "use_cpu": "nothing: a GPU is used where there is one",
    "ddp_backend": "launch",
    "deepspeed": "launch.config",
    "fsdp": "launch.config",
    "fsdp_config": "launch.config",
    "train_sampling_strategy": "nothing: the order is laid out by seed",
    "shuffle_dataset": "nothing: the order is laid out by seed",
    "tools": "an environment stage; not supported together with our engines",
    "environment_factory": "an environment stage; not supported together with our engines",
}
OWNED_BY = {
    "GRPOConfig": {
        "num_generations": "group",
        "num_iterations": "num_iterations",
        "beta": "beta",
        "epsilon": "epsilon",
        "epsilon_high": "epsilon_high",
        "loss_type": "loss_type",
        "scale_rewards": "scale_rewards",
        "mask_truncated_completions": "mask_truncated",
        "reward_weights": "rewards[].weight",
        "max_completion_length": "rollout.max_tokens",
        "temperature": "rollout.temperature",
        "top_p": "rollout.top_p",
        "top_k": "rollout.top_k",
        "use_vllm": "rollout.engine",
        "remove_unused_columns": "nothing: rewards see every column",
    }
}


def owned_fields(config_class: type) -> dict[str, str]:
    """Fields of a TRL config that posttrain sets itself -> what to set instead."""
    return OWNED | OWNED_BY.get(config_class.__name__, {})


def check_trl_fields(trl: dict[str, Any], config_class: type, where: str, owned: dict[str, str] | None = None) -> list[Problem]:
    """Problems of a `trl:` block against the installed TRL config class.

    Args:
        trl: the block.
        config_class: `trl.SFTConfig`, `trl.GRPOConfig`, ...
        where: dotted path of the block, e.g. `stages.sft.trl`.
        owned: field -> the field of ours that sets it (`owned_fields` by default).
    """
    owned = owned_fields(config_class) if owned is None else owned
    known = {field.name: field.type for field in fields(config_class) if field.init}
    problems = []
    for key, value in trl.items():
        path = f"{where}.{key}"
        if key in owned:
            problems.append(Problem(path, "posttrain sets this field itself", f"use {owned[key]}"))
        elif key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            hint = f"did you mean `{near[0]}`?" if near else f"see the fields of {config_class.__name__} in the installed TRL"
            problems.append(Problem(path, f"{config_class.__name__} has no field `{key}`", hint))
        elif not _fits(value, str(known[key])):
            problems.append(Problem(path, f"expected {known[key]}, got {value!r}"))
    return problems


def _fits(value: Any, annotation: str) -> bool:
    """Whether a scalar fits a dataclass annotation; anything but bool, int, float and str is left to TRL."""
    words = {word.strip() for word in annotation.replace("<class '", "").replace("'>", "").split("|")}
    words = {word.removeprefix("Optional[").removesuffix("]") for word in words}
    if not words <= {"bool", "int", "float", "str", "None"}:
        return True
    if value is None:
        return "None" in words or "Optional" in annotation
    if isinstance(value, bool):
        return "bool" in words
    if isinstance(value, int):
        return bool(words & {"int", "float"})
    return type(value).__name__ in words


def check_block(config: TrainConfig) -> list[Problem]:
    """Fields that the stage's TRL config lacks, that posttrain sets itself, or whose values have the wrong type.

    Args:
        config: a trainer stage; one with `rollout` is built on GRPOConfig, any other on SFTConfig.
    """
    import trl

    kind = trl.GRPOConfig if hasattr(config, "rollout") else trl.SFTConfig
    return check_trl_fields(config.trl, kind, f"stages.{config.name}.trl")
