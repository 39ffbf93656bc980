"""The stage `grpo`: rows to prompts, rewards to functions, and the trainer around them.

Rewards see the rows themselves, looked up by number, so a column may hold anything (mixed types, nested lists); only
prompts travel through the data loader. Everything that could fail at one row hours later is checked before step 1:
prompt lengths, and the columns that each reward needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import trl
from datasets import Dataset

from posttrain.core.context import StageContext
from posttrain.data.chat import scan_prompts
from posttrain.data.dataset import repeat_rows, training_rows
from posttrain.data.rows import place_of, prompt_messages
from posttrain.errors import ConfigError, DataError, RewardError
from posttrain.models.load import LoadedModel
from posttrain.models.save import save_model
from posttrain.rewards import collecting, failed_rows, failures, find_reward, get_reward
from posttrain.rollout.hf import HFEngine
from posttrain.trainers._grpo import PROMPT_IDS, GRPOTrainer
from posttrain.trainers._grpo_constrained import Constrained
from posttrain.trainers._grpo_sampling import PASS, ROW_ID
from posttrain.trainers._grpo_terms import terms_of
from posttrain.trainers._train import (
    Schedule,
    describe,
    epoch_order,
    global_rows,
    is_sharded,
    load_for_training,
    make_schedule,
    peft_config,
    train_and_commit,
    trl_arguments,
    trl_refusals,
)
from posttrain.trainers._watch import evaluate_around

if TYPE_CHECKING:
    from posttrain.config.common import RewardUse
    from posttrain.rollout.base import RolloutEngine
    from posttrain.trainers._grpo_config import RolloutConfig
    from posttrain.trainers.grpo import GRPOStage

INDEX = "row_index"
FAILURE_SHARE = 0.05
FAILURE_ROWS = 64
Row = dict[str, Any]


def reward_functions(uses: Sequence[RewardUse], rows: Sequence[Row]) -> list[Callable[..., list[float | None]]]:
    """TRL reward functions that look the columns of their rows up.

    Raises:
        DataError: a row lacks a column that a reward needs; names reward, column and row.
    """
    return [_reward_function(use, rows) for use in uses]


def _reward_function(use: RewardUse, rows: Sequence[Row]) -> Callable[..., list[float | None]]:
    _check_columns(use, rows)
    checked, judged = get_reward(use.use, use.options), 0
    names = sorted({key for row in rows for key in row} - {"prompt", "id"})

    def scored(completions: list[Any], prompts: list[Any], **extra: Any) -> list[float | None]:
        nonlocal judged
        chosen = [rows[i] for i in extra[INDEX]]
        columns = {name: [row.get(name) for row in chosen] for name in names}
        if "finish_reason" in extra:
            columns["finish_reason"] = extra["finish_reason"]
        renamed = {name: [row.get(theirs) for row in chosen] for name, theirs in use.columns.items()}
        before = failed_rows(use.use)
        with collecting() as parts:
            values = checked(completions, **{**columns, **renamed, "prompts": prompts, "completion_ids": extra["completion_ids"]})
        judged += len(values)
        if "log_metric" in extra:
            extra["log_metric"](f"reward/{use.use}/failed", float(failed_rows(use.use) - before))
            _log_parts(use.use, parts, extra)
        _stop_on_failures(use.use, judged)
        return values

    scored.__name__ = use.use
    return scored


def _log_parts(name: str, parts: dict[str, list[float | None]], extra: dict[str, Any]) -> None:
    """Each part's mean over the completions it applies to as a metric, and its values beside the sampled completions."""
    for part, values in parts.items():
        for value in values:
            if value is not None:
                extra["log_metric"](f"reward/{name}/{part}", value)
        extra["log_extra"](f"{name}/{part}", values)


def _check_columns(use: RewardUse, rows: Sequence[Row]) -> None:
    needed = {name: use.columns.get(name, name) for name in find_reward(use.use).columns}
    for row in rows:
        for name, theirs in needed.items():
            if row.get(theirs) is None:
                there = ", ".join(key for key in row if key not in ("prompt", "id"))
                raise DataError(
                    f"reward `{use.use}` needs `{name}`, read from the column `{theirs}`; columns there: {there or 'none'}",
                    where=place_of(row),
                    fix=f"set rewards[].columns: {{{name}: THEIR_NAME}}",
                )


def _stop_on_failures(name: str, judged: int) -> None:
    """Ends a run whose reward mostly cannot judge: what it leaves out is not a random sample."""
    failed = failed_rows(name)
    if judged >= FAILURE_ROWS and failed > FAILURE_SHARE * judged:
        raise RewardError(
            f"reward `{name}` failed on {failed} of {judged} completions, more than {FAILURE_SHARE:.0%}: {failures()}",
            where=f"rewards.{name}",
            fix="mend the rows' gold answers or the reward, or drop the rows it cannot judge",
        )


def prompt_dataset(rows: Sequence[Row], prompt_ids: Sequence[list[int]], order: Sequence[int], chat: bool) -> Dataset:
    """One entry for each prompt of the run, in order: `prompt` as TRL takes it, its ids, and which row and pass it is."""
    prompts = [_trl_prompt(row, chat) for row in rows]
    return Dataset.from_dict(
        {
            "prompt": [prompts[i] for i in order],
            PROMPT_IDS: [prompt_ids[i] for i in order],
            ROW_ID: [str(rows[i]["id"]) for i in order],
            PASS: [position // len(rows) for position in range(len(order))],
            INDEX: list(order),
        }
    )


def _trl_prompt(row: Row, chat: bool) -> Any:
    turns = prompt_messages(row)
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns] if chat else turns[0]["content"]


def prompt_limit(cfg: GRPOStage, model: Any, where: str) -> int:
    """Longest prompt in tokens: what `data.max_length`, and the model's positions, leave beside the completion.

    Raises:
        ConfigError: nothing is left.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or cfg.data.max_length
    limit = min(cfg.data.max_length, positions) - cfg.rollout.max_tokens
    if limit < 1:
        raise ConfigError(
            f"max_tokens ({cfg.rollout.max_tokens}) leaves no room for a prompt in the model's {positions} positions",
            where=f"{where}.rollout.max_tokens",
            fix="lower it",
        )
    return limit


def _set_reference(cfg: GRPOStage, ctx: StageContext, loaded: LoadedModel) -> None:
    """Names the folder that TRL builds the KL reference from: the stage's input, written out where it is no plain folder."""
    if cfg.beta == 0 or cfg.lora is not None:
        return
    folder = loaded.source.path
    if loaded.source.form != "folder" or loaded.kind != "model":
        folder = ctx.work / "reference"
        if ctx.world.main:
            save_model(loaded.model, loaded.tokenizer, folder)
    loaded.model.config._name_or_path = str(folder)


def build(
    cfg: GRPOStage, ctx: StageContext, loaded: LoadedModel, rows: list[Row], prompt_ids: list[list[int]], chat: bool
) -> tuple[GRPOTrainer, Schedule]:
    """The trainer of a stage, its prompts laid out in the order in which they will be asked."""
    asked = global_rows(cfg.batch, cfg.data.max_length) // cfg.group
    plan = make_schedule(cfg, len(rows) / asked * cfg.num_iterations, ctx.world.size, f"stages.{ctx.name}")
    order = epoch_order(len(rows), math.ceil(plan.steps / cfg.num_iterations) * asked, ctx.seed)
    rollout, every_row = cfg.rollout, partial(prompt_dataset, rows, prompt_ids, chat=chat)
    args = trl_arguments(
        trl.GRPOConfig, cfg, ctx, plan, loaded.model,
        num_generations=cfg.group, num_iterations=cfg.num_iterations, beta=cfg.beta, epsilon=cfg.epsilon, epsilon_high=cfg.epsilon_high,
        loss_type="dr_grpo" if cfg.loss_type == "sum" else cfg.loss_type, scale_rewards=cfg.scale_rewards,
        mask_truncated_completions=cfg.mask_truncated,
        max_completion_length=rollout.max_tokens, temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k,
        reward_weights=[use.weight if use.role == "add" else 0.0 for use in cfg.rewards], use_vllm=False, remove_unused_columns=False,
    )  # fmt: skip
    with trl_refusals(cfg, ctx):
        trainer = GRPOTrainer(
            loaded.model,
            reward_funcs=reward_functions(cfg.rewards, rows),
            args=args,
            train_dataset=every_row(order),
            processing_class=loaded.tokenizer,
            peft_config=peft_config(cfg.lora, loaded.model, where=f"stages.{ctx.name}"),
            events=ctx.events,
            terms=terms_of(cfg),
            constrained=_constrained(cfg, f"stages.{ctx.name}"),
            fast=cfg.fast == "on",
            dynamic=cfg.dynamic,
            prompts=(every_row(range(len(rows))), ctx.seed) if cfg.dynamic else None,
            engine=_engine(rollout, ctx, f"stages.{ctx.name}"),
            correction=rollout.correction,
            correction_cap=rollout.correction_cap,
        )
    return trainer, plan


def _engine(rollout: RolloutConfig, ctx: StageContext, where: str) -> Callable[[Any, Any], RolloutEngine] | None:
    if rollout.engine == "trl":
        return None
    if rollout.engine == "hf":
        return partial(HFEngine, max_batch=rollout.batch)
    from posttrain.rollout._vllm import unavailable
    from posttrain.rollout.vllm import VLLMEngine

    problem = unavailable()
    if ctx.world.size > 1:
        problem = "vLLM runs beside a trainer of one process only"
    if problem:
        raise ConfigError(problem, where=f"{where}.rollout.engine", fix="set engine: hf")
    settings = {"max_batch": rollout.batch, "trust_remote_code": ctx.trust_remote_code, "seed": ctx.seed % 2**32}
    return partial(VLLMEngine.of_model, options=rollout.vllm, **settings)


def _constrained(cfg: GRPOStage, where: str) -> Constrained | None:
    rollout = cfg.rollout
    if rollout.constraint is None:
        return None
    from posttrain.rollout._build import build_constraint

    built = build_constraint(rollout.constraint, f"{where}.rollout.constraint")
    return Constrained(built, rollout.sampler, rollout.weighting, rollout.weight_clip, rollout.free_share)


def last_samples(trainer: GRPOTrainer, limit: int = 8) -> list[dict[str, Any]]:
    """Prompt, completion, rewards and advantage of a few completions of the last generation batch."""
    logs = trainer._logs
    every = max(len(logs["prompt"]) // limit, 1)
    return [
        {
            "prompt": logs["prompt"][i],
            "completion": logs["completion"][i],
            **{name: values[i] for name, values in logs["rewards"].items()},
            **{name: values[i] for name, values in logs["extra"].items() if len(values) == len(logs["prompt"])},
            "advantage": logs["advantages"][i],
        }
        for i in range(0, len(logs["prompt"]), every)
    ][:limit]


def run_grpo(cfg: GRPOStage, ctx: StageContext) -> None:
    """The stage `grpo`; see `grpo.py`."""
    for use in cfg.rewards:
        find_reward(use.use)
    rows = training_rows(ctx, "data")
    if cfg.data.weights == "repeat":
        rows = repeat_rows(rows, ctx.seed)
    loaded = load_for_training(cfg, ctx)
    limit = prompt_limit(cfg, loaded.model, f"stages.{ctx.name}")
    rows, prompt_ids, report = scan_prompts(
        loaded.tokenizer, rows, format=cfg.data.format, max_prompt=limit, on_bad=cfg.data.on_bad, events=ctx.events
    )
    ctx.summary["prompts"] = report
    evaluate_around(ctx, "before", loaded.model, loaded.tokenizer)
    _set_reference(cfg, ctx, loaded)
    trainer, plan = build(cfg, ctx, loaded, rows, prompt_ids, report["format"] == "chat")
    describe(ctx, plan, f"completions in groups of {cfg.group}")
    where = f"stages.{ctx.name}"
    whole = (
        f"the {cfg.rollout.engine} engine samples from" if cfg.rollout.engine != "trl" else "fast: on forwards" if cfg.fast == "on" else ""
    )
    if whole and is_sharded(trainer, where):
        raise ConfigError(
            f"{whole} whole weights, these are sharded (FSDP, ZeRO-3)", where=f"{where}.launch", fix="use ddp.yaml or zero2.yaml"
        )
    failures(reset=True)
    try:
        train_and_commit(trainer, cfg, ctx, loaded)
    finally:
        if trainer.engine is not None:
            trainer.engine.close()
    ctx.summary.update(reward_failures=failures(), samples=last_samples(trainer))
    if trainer.dynamic is not None:
        ctx.summary["dynamic"] = trainer.dynamic.summary()
