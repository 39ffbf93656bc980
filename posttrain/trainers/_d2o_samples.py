"""Unwanted answers and the model's own ones as tokens, and the log-probabilities of both under the references.

A window is a span of optimizer steps with the same own answers and references; without `self_samples.every` there is one.
Each lies in `work/window-STEP/`: `self-R.jsonl` (blocks of rank R while it is drawn) and `references-R.safetensors`, so that a killed
run draws only what is missing. Every rank does its share of the prompts and reads all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from posttrain.core.blocks import join_blocks, write_blocks
from posttrain.core.context import StageContext
from posttrain.data.dataset import training_rows
from posttrain.data.prompts import render_prompt
from posttrain.data.rows import prompt_messages
from posttrain.data.shards import json_line
from posttrain.errors import ConfigError, DataError
from posttrain.rollout.base import Request, Sampling, request_seed
from posttrain.rollout.hf import HFEngine
from posttrain.trainers._answers import Answer, encode_answers

BLOCK = 32
"""Prompts of one block of own answers."""


@dataclass
class Group:
    """One prompt: what is asked, the unwanted answer, the own ones, and the references' log-probabilities.

    Args:
        row: as read.
        negative: the unwanted answer.
        own: the own answers.
        own_refs, negative_ref: sums over the answer's tokens.
    """

    row: dict[str, Any]
    negative: Answer
    own: list[Answer] = field(default_factory=list)
    own_refs: list[float] = field(default_factory=list)
    negative_ref: float = 0.0

    @property
    def prompt(self) -> list[int]:
        """Token ids of the prompt."""
        return self.negative[0][: self.negative[1]]

    @property
    def answers(self) -> list[Answer]:
        """The own answers, then the unwanted one."""
        return [*self.own, self.negative]


def load_groups(cfg: Any, ctx: StageContext, model: Any, tokenizer: Any) -> tuple[list[Group], list[int]]:
    """The stage's different rows as groups without own answers, and for each row of the mixture its group's number.

    Raises:
        DataError: rows that cannot be used.
    """
    rows = training_rows(ctx, "data")
    unwanted = encode_answers(cfg, ctx, rows, "rejected", model, tokenizer)
    groups = {str(row["id"]): Group(row, unwanted[str(row["id"])]) for row in rows if str(row["id"]) in unwanted}
    number = {name: i for i, name in enumerate(groups)}
    return list(groups.values()), [number[str(row["id"])] for row in rows if str(row["id"]) in number]


def asked(row: dict[str, Any], template: str) -> dict[str, Any]:
    """The prompt with its last user turn put into a template."""
    turns = [dict(turn) for turn in prompt_messages(row)]
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    if template == "{prompt}" or last < 0:
        return {"prompt": row.get("prompt", turns), **({"tools": row["tools"]} if "tools" in row else {})}
    turns[last]["content"] = template.replace("{prompt}", str(turns[last]["content"]))
    plain = isinstance(row.get("prompt"), str)
    return {"prompt": turns[last]["content"] if plain else turns, **({"tools": row["tools"]} if "tools" in row else {})}


def take_rollouts(groups: Sequence[Group], cfg: Any, ctx: StageContext) -> None:
    """Own answers from the port `samples`.

    Raises:
        DataError: a prompt has fewer than `self_samples.k`.
    """
    found: dict[str, list[list[int]]] = {}
    with open(ctx.ref("samples").artifact().path / "rollouts.jsonl", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if record["token_ids"]:
                found.setdefault(str(record["id"]), []).append(record["token_ids"])
    lacking = [group.row["id"] for group in groups if len(found.get(str(group.row["id"]), [])) < cfg.self_samples.k]
    if lacking:
        raise DataError(
            f"{len(lacking)} of {len(groups)} prompts have fewer than {cfg.self_samples.k} answers, e.g. `{lacking[0]}`",
            where=f"stages.{ctx.name}.in.samples",
            fix="generate from the same rows with `samples` of at least `self_samples.k`, or lower it",
        )
    for group in groups:
        group.own = [([*group.prompt, *ids], len(group.prompt)) for ids in found[str(group.row["id"])][: cfg.self_samples.k]]


def draw(groups: Sequence[Group], window: int, cfg: Any, ctx: StageContext, model: Any, tokenizer: Any, folder: Path) -> None:
    """Own answers of this rank's share of the prompts, by `model`; what is drawn already is kept."""
    wanted, mine = cfg.self_samples, groups[ctx.world.rank :: ctx.world.size]
    engine = HFEngine(model, tokenizer, max_batch=wanted.batch)
    sampling = Sampling(wanted.max_tokens, wanted.temperature)
    limit = getattr(model.config, "max_position_embeddings", None) or float("inf")

    def lines(number: int) -> list[bytes]:
        block = mine[number * BLOCK : (number + 1) * BLOCK]
        requests = []
        for group in block:
            for k in range(wanted.k):
                ids = render_prompt(tokenizer, asked(group.row, wanted.templates[k % len(wanted.templates)]), cfg.data.format)
                room = min(wanted.max_tokens, cfg.data.max_length - len(group.prompt), int(min(limit - len(ids), 2**31)))
                if room < 1:
                    raise ConfigError(
                        f"no room for an answer: the prompt of row `{group.row['id']}` has {len(ids)} tokens",
                        where=f"stages.{ctx.name}.data.max_length",
                        fix="raise it, or drop long prompts",
                    )
                seed = request_seed(ctx.seed, "d2o", window, str(group.row["id"]), k)
                requests.append(Request(ids, seed, Sampling(room, sampling.temperature), str(group.row["id"])))
        return [json_line({"id": item.id, "token_ids": item.token_ids, "text": item.text}) for item in engine.generate(requests)]

    count = -(-len(mine) // BLOCK)

    def finished(number: int) -> None:
        ctx.events.progress("own answers", min(len(mine), (number + 1) * BLOCK), len(mine), "prompts")

    files = write_blocks(folder / f"blocks-{ctx.world.rank}", count, lines, finished)
    join_blocks(files, folder / f"self-{ctx.world.rank}.jsonl")


def read_drawn(groups: Sequence[Group], folder: Path, world: int) -> None:
    """Puts the own answers of all ranks into the groups."""
    own: dict[str, list[list[int]]] = {}
    for rank in range(world):
        with open(folder / f"self-{rank}.jsonl", encoding="utf-8") as found:
            for line in found:
                record = json.loads(line)
                own.setdefault(record["id"], []).append(record["token_ids"])
    for group in groups:
        group.own = [([*group.prompt, *ids], len(group.prompt)) for ids in own[str(group.row["id"])]]


Logps = Callable[[Sequence[Answer]], list[float]]
"""Answers -> sums of their tokens' log-probabilities under a reference, without gradient."""


def write_references(groups: Sequence[Group], ctx: StageContext, folder: Path, own: Logps, negative: Logps) -> None:
    """References of this rank's share of the prompts, unless they are there."""
    file = folder / f"references-{ctx.world.rank}.safetensors"
    if file.exists():
        return
    mine = groups[ctx.world.rank :: ctx.world.size]
    tensors = {
        "negative": torch.zeros(len(mine), dtype=torch.float64),
        "own": torch.zeros(sum(len(g.own) for g in mine), dtype=torch.float64),
    }
    at = 0
    for i, group in enumerate(mine):
        tensors["negative"][i] = negative([group.negative])[0]
        if group.own:
            tensors["own"][at : at + len(group.own)] = torch.tensor(own(group.own), dtype=torch.float64)
        at += len(group.own)
        ctx.events.progress("references", i + 1, len(mine), "prompts")
    partial = file.with_suffix(".tmp")
    save_file(tensors, partial)
    partial.replace(file)


def read_references(groups: Sequence[Group], folder: Path, world: int) -> None:
    """Puts the references of all ranks into the groups."""
    for rank in range(world):
        found, at = load_file(folder / f"references-{rank}.safetensors"), 0
        for i, group in enumerate(groups[rank::world]):
            group.negative_ref = float(found["negative"][i])
            group.own_refs = found["own"][at : at + len(group.own)].tolist()
            at += len(group.own)


def write_artifact(groups: Sequence[Group], out: Path) -> None:
    """`self_samples.jsonl` and `references.safetensors` of the last window, in the order of the rows."""
    with open(out / "self_samples.jsonl", "wb") as file:
        for group in groups:
            for k, (ids, start) in enumerate(group.own):
                file.write(json_line({"id": group.row["id"], "sample": k, "prompt_ids": ids[:start], "token_ids": ids[start:]}))
    own = torch.tensor([value for group in groups for value in group.own_refs], dtype=torch.float64)
    save_file({"own": own, "negative": torch.tensor([g.negative_ref for g in groups], dtype=torch.float64)}, out / "references.safetensors")
