"""What every trainer stage does around its TRL trainer: model in, schedule, TRL arguments, evaluation, weights out.

The batch is global: `rows` sequences an optimizer step over all processes, so

    accumulation = rows / (per_device * processes),

with `per_device` lowered to the largest divisor that fits. The order of the rows is laid out before training, one seeded
permutation an epoch, cut at `steps * rows`; TRL then reads it from front to back. So neither the number of processes nor
a resume in the middle of an epoch can change which rows a step sees, and there is no partial batch at an epoch's end.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import DistributedType
from transformers.utils import logging as hf_logging

from posttrain.config.common import REPEATS, BatchConfig, TrainConfig
from posttrain.config.lora import LoraConfig
from posttrain.core.context import StageContext
from posttrain.data.chat import set_template
from posttrain.errors import ConfigError, PosttrainError
from posttrain.models.fourbit import check_four_bit
from posttrain.models.load import LoadedModel, load_model
from posttrain.models.save import save_model
from posttrain.models.source import resolve_model
from posttrain.models.tokens import add_tokens, token_rows
from posttrain.rollout.base import request_seed
from posttrain.trainers._checkpoint import read_checkpoint
from posttrain.trainers._dropout import set_dropout
from posttrain.trainers._fields import check_trl_fields, owned_fields
from posttrain.trainers._optim import choose_optimizer
from posttrain.trainers._watch import evaluate_around, kept_folder, watch


@dataclass(frozen=True)
class Schedule:
    """Sizes of a run: optimizer steps, sequences a step over all processes, and how a step is cut up."""

    steps: int
    rows: int
    per_device: int
    accumulation: int
    warmup: int


def make_schedule(cfg: TrainConfig, steps_an_epoch: float, world: int, where: str) -> Schedule:
    """The schedule of a stage.

    Args:
        cfg: the stage.
        steps_an_epoch: optimizer steps that one pass over the data takes, not rounded.
        world: processes.
        where: dotted path of the stage.

    Raises:
        ConfigError: the batch cannot be cut into equal parts for the processes.
    """
    rows = global_rows(cfg.batch, cfg.data.max_length)
    if rows % world:
        raise ConfigError(
            f"{rows} rows a step cannot be shared equally by {world} processes",
            where=f"{where}.batch.rows",
            fix=f"use a multiple of {world}",
        )
    share = rows // world
    per_device = max(d for d in range(1, min(cfg.batch.per_device, share) + 1) if share % d == 0)
    steps = cfg.steps or max(math.ceil((cfg.epochs or 1.0) * steps_an_epoch - 1e-9), 1)
    warmup = 0 if cfg.optim.schedule == "constant" else _warmup_steps(cfg.optim.warmup, steps, where)
    return Schedule(steps, rows, per_device, share // per_device, warmup)


def _warmup_steps(warmup: float, steps: int, where: str) -> int:
    """Warm-up steps; the first of them has a learning rate of 0, so a share leaves at least one step at the peak."""
    if warmup < 1:
        return min(math.ceil(warmup * steps), steps - 1)
    if warmup >= steps:
        raise ConfigError(
            f"{warmup:g} warm-up steps of {steps} never reach the peak learning rate", where=f"{where}.optim.warmup", fix="lower it"
        )
    return int(warmup)


def global_rows(batch: BatchConfig, max_length: int) -> int:
    """Sequences of one optimizer step: `rows`, or `tokens` in packed sequences, or one pass of one device."""
    return batch.rows or (max(batch.tokens // max_length, 1) if batch.tokens else batch.per_device)


def epoch_order(items: int, count: int, seed: int) -> list[int]:
    """`count` indices below `items`: one seeded permutation after another, each index once an epoch."""
    order: list[int] = []
    for epoch in range(math.ceil(count / items)):
        order += epoch_permutation(items, epoch, seed)
    return order[:count]


def epoch_permutation(items: int, epoch: int, seed: int) -> list[int]:
    """The order of one pass over `items` indices."""
    generator = torch.Generator().manual_seed(request_seed(seed, "order", epoch))
    return torch.randperm(items, generator=generator).tolist()


def grouped_order(order: Sequence[int], lengths: Sequence[int], rows: int) -> list[int]:
    """`order` with the `rows` sequences of each step sorted by length.

    A pass of `per_device` sequences then pads little. Every step still sees the same sequences, so its loss and gradient
    are the same up to the order of summation.
    """
    steps = [order[start : start + rows] for start in range(0, len(order), rows)]
    return [i for step in steps for i in sorted(step, key=lambda i: (lengths[i], i))]


def load_for_training(cfg: TrainConfig, ctx: StageContext) -> LoadedModel:
    """The stage's input model; an adapter is merged, or left attached and trainable with `lora.on_input: continue`."""
    hf_logging.disable_progress_bar()
    ref = ctx.ref("model")
    form = resolve_model(ref).form
    keep = cfg.lora is not None and cfg.lora.on_input == "continue" and form == "adapter"
    options = {key: ref.spec[key] for key in ("dtype", "attn") if key in ref.spec}
    four_bit = cfg.lora is not None and cfg.lora.load_in_4bit
    if four_bit:
        check_four_bit(f"stages.{ctx.name}.lora.load_in_4bit", "folder" if keep else form)
    loaded = load_model(ref, merge=not keep, trust_remote_code=ctx.trust_remote_code, four_bit=four_bit, **options)
    if loaded.merge:
        ctx.summary["merge"] = loaded.merge
    if ref.origin == "model" and loaded.source.id == ref.spec.get("offline"):
        ctx.events.log(f"the hub is not asked: {loaded.source.id} is taken in place of {ref.spec.get('id')}")
    if not attached(loaded.model) and not four_bit:
        loaded.model.requires_grad_(True)
    if cfg.dropout is not None:
        count = set_dropout(loaded.model, cfg.dropout, f"stages.{ctx.name}.dropout")
        ctx.events.log(f"dropout {cfg.dropout:g} in {count} places")
    if cfg.data.template:
        set_template(loaded.tokenizer, cfg.data.template, replace=ref.origin == "model")
    if cfg.data.add_tokens:
        ids = add_tokens(loaded.model, loaded.tokenizer, cfg.data.add_tokens)
        ctx.events.log(f"added tokens: {', '.join(f'{token} = {i}' for token, i in zip(cfg.data.add_tokens, ids, strict=True))}")
    return loaded


def warn_of_epochs(cfg: TrainConfig, ctx: StageContext, epochs: float) -> None:
    """Many passes over the same tokens cost held-out quality (Xue et al. 2023, arXiv 2305.13230)."""
    if epochs <= REPEATS or cfg.guard is not None:
        return
    ctx.events.warn(
        f"{epochs:g} epochs over the same data, more than {REPEATS:g}: held-out loss may rise; set `guard` to stop where it does, "
        "`dropout` (verified on the model's modules) to soften it, or train on more data"
    )


def attached(model: Any) -> bool:
    """True for a PeftModel; a merged model may still carry peft's attributes."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def peft_config(lora: LoraConfig | None, model: Any, token_ids: Sequence[int] = (), where: str = "stage") -> Any:
    """peft's config of a new adapter that also trains the rows `token_ids`; None for full fine-tuning or an attached adapter.

    Raises:
        ConfigError: the output layer, or one of two tied tables, would get an adapter; `where` is the stage's dotted path.
    """
    if lora is None or attached(model):
        return None
    from peft import LoraConfig as PeftLora

    rows = token_rows(model, token_ids) if token_ids else None
    targets, layers = lora.targets, None
    if lora.last_layers is not None:
        count = model.config.get_text_config().num_hidden_layers
        if lora.last_layers > count:
            raise ConfigError(f"the model has {count} layers, got {lora.last_layers}", where=f"{where}.lora.last_layers", fix="lower it")
        layers = list(range(count - lora.last_layers, count))
        targets = _linear_names(model) if targets == "all-linear" else targets
    config = PeftLora(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=targets,
        layers_to_transform=layers,
        lora_dropout=lora.dropout,
        trainable_token_indices=rows,
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        task_type="CAUSAL_LM",
    )
    _check_tables(config, model, where)
    return config


def _check_tables(config: Any, model: Any, where: str) -> None:
    """Refuses a low-rank update of one of two tied tables, and of the output layer."""
    from peft.tuners.tuners_utils import check_target_module_exists

    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    everything = config.target_modules == "all-linear"
    hit = {id(module): name for name, module in model.named_modules() if not everything and check_target_module_exists(config, name)}
    tied = outputs is not None and inputs.weight is outputs.weight
    found = [hit[id(module)] for module in (inputs, outputs) if id(module) in hit]
    if found and tied:
        raise ConfigError(
            f"{' and '.join(found)} would get an adapter, but embedding and output layer are one tied table, of which the update "
            "would reach one side only",
            where=f"{where}.lora.targets",
            fix=f"leave out {' and '.join(found)}; data.add_tokens trains rows of the table",
        )
    if id(outputs) in hit:
        raise ConfigError(
            f"{hit[id(outputs)]} would get an adapter that would never be trained: TRL's losses read the output layer's weight alone",
            where=f"{where}.lora.targets",
            fix=f"leave out {hit[id(outputs)]}",
        )


def _linear_names(model: Any) -> list[str]:
    """Last parts of the names of linear modules, the output head left out."""
    head = model.get_output_embeddings()
    return sorted(
        {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head}
    )


def trl_arguments(config_class: Any, cfg: TrainConfig, ctx: StageContext, plan: Schedule, model: Any, **own: Any) -> Any:
    """The TRL config of a stage: our fields, then the `trl:` block, which cannot override them.

    Raises:
        ConfigError: a field of `trl:` that TRL lacks or that we own; a combination that TRL refuses.
    """
    where = f"stages.{ctx.name}.trl"
    problems = check_trl_fields(
        cfg.trl, config_class, where, dict.fromkeys(own, f"the fields of `{cfg.method}`") | owned_fields(config_class)
    )
    if problems:
        raise ConfigError(problems=problems)
    gpu = torch.cuda.is_available()
    optim = cfg.optim
    ours = {
        "output_dir": str(ctx.work),
        "seed": ctx.seed % 2**32,
        "max_steps": plan.steps,
        "per_device_train_batch_size": plan.per_device,
        "gradient_accumulation_steps": plan.accumulation,
        "learning_rate": optim.lr,
        "lr_scheduler_type": optim.schedule,
        "warmup_steps": plan.warmup,
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.beta1,
        "adam_beta2": optim.beta2,
        "adam_epsilon": optim.eps,
        "max_grad_norm": optim.max_grad_norm,
        "logging_steps": cfg.log_every,
        "save_strategy": "steps",
        "save_steps": cfg.checkpoint.every,
        "save_total_limit": cfg.checkpoint.keep,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "use_cpu": not gpu,
        "bf16": gpu and model.dtype == torch.bfloat16,
        "fp16": False,
        "gradient_checkpointing": bool(ctx.ref("model").spec.get("gradient_checkpointing", False)),
        "dataloader_pin_memory": gpu,
        "train_sampling_strategy": "sequential",
        **({"shuffle_dataset": False} if "shuffle_dataset" in config_class.__dataclass_fields__ else {}),
        "ddp_backend": "gloo" if not gpu and ctx.world.size > 1 else None,
    }
    try:
        return config_class(**{**cfg.trl, **ours, **own})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{config_class.__name__} refuses these values: {error}", where=where) from error


@contextmanager
def trl_refusals(cfg: TrainConfig, ctx: StageContext) -> Iterator[None]:
    """What TRL refuses of a stage with a `trl:` block is a ConfigError that names the block."""
    try:
        yield
    except PosttrainError:
        raise
    except (ValueError, TypeError) as error:
        if not cfg.trl:
            raise
        fields = ", ".join(cfg.trl)
        raise ConfigError(f"TRL refuses it: {error}", where=f"stages.{ctx.name}.trl", fix=f"correct or remove: {fields}") from error


def describe(ctx: StageContext, plan: Schedule, unit: str) -> None:
    """Tells how a step is cut up."""
    ctx.events.log(
        f"{plan.steps} steps of {plan.rows} {unit}: {ctx.world.size} process{'es' if ctx.world.size > 1 else ''} x {plan.per_device} a pass"
        f" x {plan.accumulation} accumulated; {plan.warmup} warm-up steps"
    )


def check_trainable(model: Any, where: str) -> int:
    """Number of trainable parameters; ConfigError where there are none."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not count:
        raise ConfigError("no parameter is trainable", where=where, fix="check lora.targets")
    return count


def is_sharded(trainer: Any, where: str) -> bool:
    """Whether the weights are split over the processes (FSDP, ZeRO-3).

    Raises:
        ConfigError: FSDP was asked for, but accelerate fell back to plain data parallelism, as it does without a GPU.
    """
    kind = trainer.accelerator.distributed_type
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and kind != DistributedType.FSDP:
        raise ConfigError(
            f"the launcher asked for FSDP, accelerate runs {kind.value}",
            where=f"{where}.launch",
            fix="FSDP needs GPUs; use torchrun on a CPU",
        )
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return kind == DistributedType.FSDP or (kind == DistributedType.DEEPSPEED and plugin is not None and plugin.zero_stage == 3)


def whole_model(trainer: Any, sharded: bool) -> Any:
    """The trained model in one piece: the live one, or on rank 0 a CPU copy gathered from the shards (None on the others)."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not sharded:
        return model
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.accelerator.is_main_process:
        return None
    whole = type(model)(model.config).to(model.dtype)
    whole.load_state_dict(state, strict=not model.config.tie_word_embeddings)
    whole.generation_config = model.generation_config
    return whole


def stops_early(cfg: TrainConfig) -> bool:
    """Whether something may end the run before its last step; a method of its own rules has `stops_itself`."""
    return bool(cfg.stop or cfg.guard or getattr(cfg, "stops_itself", False))


def _take_kept(trainer: Any, cfg: TrainConfig, ctx: StageContext) -> int:
    """Loads the weights of an early stop, or the best ones, where the config asks for them; returns the steps of the run."""
    steps = int(trainer.state.global_step)
    for kind, wanted in (("stop", stops_early(cfg)), ("best", cfg.commit.best or cfg.guard or getattr(cfg, "keeps_best", False))):
        folder = kept_folder(ctx.work, kind) if wanted else None
        if folder is None:
            continue
        kept = read_checkpoint(folder)
        trainer._load_from_checkpoint(str(folder))
        ctx.summary[kind] = {"step": kept.step, "value": kept.extra["value"]}
        steps = kept.step if kind == "stop" else steps
    return steps


def train_and_commit(trainer: Any, cfg: TrainConfig, ctx: StageContext, loaded: LoadedModel) -> None:
    """Trains (resuming where a complete checkpoint exists), evaluates, and writes the model or adapter into `ctx.out`."""
    where = f"stages.{ctx.name}"
    sharded = is_sharded(trainer, where)
    if sharded and cfg.lora:
        raise ConfigError(
            "LoRA with sharded weights (FSDP, ZeRO-3) is not supported", where=f"{where}.lora", fix="use ddp.yaml or zero2.yaml"
        )
    count = check_trainable(trainer.model, f"{where}.lora")
    base = loaded.base if attached(loaded.model) else loaded.source
    ctx.events.log(f"{count:,} trainable parameters")
    choose_optimizer(trainer, cfg, ctx)
    watch(cfg, ctx, trainer, loaded.tokenizer)
    start = time.monotonic()
    stopped = kept_folder(ctx.work, "stop") if stops_early(cfg) else None
    if stopped is None:
        trainer.train(resume_from_checkpoint=True)
    seconds = read_checkpoint(stopped).extra["seconds"] if stopped else trainer.seconds_before + time.monotonic() - start
    steps = _take_kept(trainer, cfg, ctx)
    model = whole_model(trainer, sharded)
    if attached(model) and "ref" in model.peft_config:
        model.delete_adapter("ref")
    if model is not None:
        model.gradient_checkpointing_disable()
        model.eval()
    ctx.summary.update(trainer.facts_after(steps), steps=steps, parameters_trained=count, seconds_train=round(seconds, 3))
    if ctx.summary.setdefault("tokens", trainer.state.num_input_tokens_seen):
        ctx.summary["tokens_per_s"] = round(ctx.summary["tokens"] / max(seconds, 1e-9), 1)
    evaluate_around(ctx, "after", model, loaded.tokenizer)
    if ctx.world.main:
        save_model(model, loaded.tokenizer, ctx.out, base=base, meta=ctx.meta)
        ctx.summary["size_bytes"] = ctx.meta.get("size_bytes")
    ctx.meta["kind"] = "adapter" if cfg.lora else "model"
    trainer.accelerator.wait_for_everyone()
