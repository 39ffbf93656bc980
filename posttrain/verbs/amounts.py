"""What `plan` says of the data of a training stage: rows, unique tokens, tokens seen, epochs.

Rows are those the stage will train on, mixed and without held-out ones, and are exact. Tokens are counted on the text of up to
`SAMPLED` rows with the model's own tokenizer, without chat template, each cut at `data.max_length`, and scaled up: an estimate. The
run counts what it really trains on, and reports it. What cannot be known yet, or only by reading a lot, is said to be known later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from posttrain.config.common import REPEATS, TrainConfig
from posttrain.core.artifact import InputRef
from posttrain.core.plan import PlannedStage

SAMPLED = 400
READ_MIB = 64
"""Rows of larger files are counted by the run only; a plan should take a second."""


def amounts(stage: PlannedStage, done: Mapping[str, PlannedStage]) -> dict[str, Any]:
    """Of a training stage that is to run: `rows`, `epochs`, where they can be told `unique_tokens`, `tokens_seen`; `later`: what is not.

    Args:
        stage: of the plan.
        done: all stages of the plan, by name.

    Returns:
        Empty for other stages. `meant` is there where many epochs are what the method is about.
    """
    cfg, refs = stage.config, stage.inputs.get("data", [])
    if not isinstance(cfg, TrainConfig) or not refs or not stage.todo:
        return {}
    waits = [ref.name for ref in [*refs, *stage.heldout] if ref.origin == "stage" and done[ref.name].todo]
    if waits:
        return {"later": f"known once `{waits[0]}` has run"}
    far = next((ref for ref in refs if ref.spec.get("hub") and ref.origin == "source"), None)
    if far is not None:
        return {"later": f"known when the rows of `{far.name}` have been fetched"}
    if _mib(refs) > READ_MIB:
        return {"later": f"counted when it runs: more than {READ_MIB} MiB of rows"}
    from posttrain.data.dataset import heldout_keys, mix_rows, repeat_rows

    holder: Any = SimpleNamespace(heldout=stage.heldout)
    rows, _ = mix_rows(list(refs), stage.seed, exclude=heldout_keys(holder))
    if cfg.data.weights == "repeat":
        rows = repeat_rows(rows, stage.seed)
    unique = list({row["id"]: row for row in rows}.values())
    found: dict[str, Any] = {"rows": len(unique)}
    if cfg.part is not None:
        return {**found, **_of_part(cfg, *cfg.part)}
    lengths = _lengths(stage, done, unique, cfg.data.max_length)
    once = sum(lengths) / len(lengths) * len(rows) if lengths else None
    if lengths and once is not None:
        found["unique_tokens"] = round(sum(lengths) / len(lengths) * len(unique))
    epochs = _epochs(cfg, len(rows), once)
    if epochs is None:
        return {**found, "later": "epochs are known when the tokens are counted"}
    repeats = len(rows) / len(unique)
    found["epochs"] = round(epochs * repeats, 3)
    if once is not None and stage.method.name != "grpo":
        found["tokens_seen"] = round(once * epochs)
    return found


def _of_part(cfg: TrainConfig, items: int, tokens: int) -> dict[str, Any]:
    """Figures of a stage that trains on a part of its data, of a size that its config gives."""
    epochs = (cfg.epochs or 1.0) if cfg.steps is None else cfg.steps * (cfg.batch.rows or cfg.batch.per_device) / items
    found = {"unique_tokens": items * tokens, "tokens_seen": round(items * tokens * epochs), "epochs": round(epochs, 3)}
    return {**found, "meant": True} if cfg.repeats_meant else found


def _epochs(cfg: TrainConfig, rows: int, tokens: float | None) -> float | None:
    """Passes over the mixture."""
    if cfg.steps is None:
        return cfg.epochs or 1.0
    batch = cfg.batch
    if batch.tokens is not None or cfg.data.packing:
        each = batch.tokens or (batch.rows or batch.per_device) * cfg.data.max_length
        return None if tokens is None else cfg.steps * each / max(tokens, 1.0)
    asked = (batch.rows or batch.per_device) / getattr(cfg, "group", 1)
    return float(cfg.steps * asked / rows / getattr(cfg, "num_iterations", 1))


def _mib(refs: Sequence[InputRef]) -> float:
    from posttrain.data.shards import expand_shards

    size = 0
    for ref in refs:
        places = [ref.path] if ref.origin == "stage" and ref.path else expand_shards(ref.spec["path"]) if "path" in ref.spec else []
        for place in map(Path, places):
            size += sum(p.stat().st_size for p in place.rglob("*") if p.is_file()) if place.is_dir() else place.stat().st_size
    return size / 2**20


def _lengths(stage: PlannedStage, done: Mapping[str, PlannedStage], rows: Sequence[Any], limit: int) -> list[int]:
    """Tokens of some rows, cut at the limit; empty where the tokenizer is not here yet. A stage passes its input's tokenizer on."""
    from tokenizers import Tokenizer

    from posttrain.data.rows import row_text

    file = _tokenizer_file(stage, done)
    if file is None:
        return []
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    every = max(1, math.ceil(len(rows) / SAMPLED))
    return [min(len(item.ids), limit) for item in tokenizer.encode_batch([row_text(row) for row in rows[::every]])]


def _tokenizer_file(stage: PlannedStage, done: Mapping[str, PlannedStage]) -> Path | None:
    from posttrain.errors import PosttrainError
    from posttrain.models.source import read_base, resolve_model

    ref = next(iter(stage.inputs.get("model", [])), None)
    while ref is not None and ref.origin == "stage" and done[ref.name].todo:
        ref = next(iter(done[ref.name].inputs.get("model", [])), None)
    if ref is None:
        return None
    try:
        source = resolve_model(ref)
        while source.form == "adapter" and not (source.local / "tokenizer.json").is_file():
            source = read_base(source.local)[0]
    except PosttrainError:
        return None
    if source.form not in ("folder", "adapter"):
        return None
    file = source.local / "tokenizer.json"
    return file if file.is_file() else None


def describe_amounts(found: Mapping[str, Any]) -> list[str]:
    """Lines for a person: the figures, and a warning where the data is passed too often."""
    from posttrain.core.display import quantity

    if not found:
        return []
    parts = []
    if "rows" in found:
        parts.append(f"{found['rows']:,} rows")
    if "unique_tokens" in found:
        parts.append(f"about {quantity(found['unique_tokens'])} unique tokens")
    if "tokens_seen" in found:
        parts.append(f"{quantity(found['tokens_seen'])} seen")
    if "epochs" in found:
        parts.append(f"{found['epochs']:g} epochs")
    if "later" in found:
        parts.append(found["later"])
    lines = [f"   data {', '.join(parts)}"]
    if found.get("epochs", 0.0) > REPEATS and "meant" not in found:
        lines.append(
            f"   warning {found['epochs']:g} epochs over the same data, more than {REPEATS:g}: held-out loss may rise; see `guard`"
        )
    return lines
