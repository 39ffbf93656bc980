"""What the quantization tests share: correlated inputs, hostile weights, stages on a tiny model, and calibration text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from posttrain.core.artifact import InputRef
from posttrain.core.context import StageContext
from posttrain.core.events import Events
from posttrain.core.registry import method

WORDS = [
    *(
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "and",
        "asks",
        "what",
        "is",
        "12",
        "plus",
        "34",
        "then",
        "writes",
    ),
    *("code", "def", "add", "left", "right", "return", "true", "false", "none", "list", "name", "value", "open", "read", "write", "close"),
]


def correlated(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs [tokens, columns] with a decaying spectrum and columns of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(7)) * torch.logspace(0, -1.5, columns)
    size = torch.exp(0.7 * torch.randn(columns, generator=torch.Generator().manual_seed(8)))
    return torch.randn(tokens, columns, generator=generator) @ mix * size


def hostile(rows: int = 12, columns: int = 64, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights whose groups break quantizers."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    outliers = w.clone()
    outliers[:, ::16] *= 1000
    half = w.clone()
    half[:, :32] = 0
    return {
        "plain": w,
        "positive": w.abs() + 1,
        "negative": -w.abs() - 1,
        "constant": torch.full_like(w, 0.3),
        "zero": torch.zeros_like(w),
        "zero_group": half,
        "outliers": outliers,
        "tiny": w * 1e-30,
        "huge": w * 1e20,
    }


def texts(file: Path, rows: int = 200, words: int = 40) -> Path:
    """A file of text rows."""
    rng = random.Random(0)
    file.write_text("".join(json.dumps({"text": " ".join(rng.choices(WORDS, k=words))}) + "\n" for _ in range(rows)), encoding="utf-8")
    return file


def run_stage(name: str, model: Path, out: Path, data: Path, **fields: Any) -> StageContext:
    """A quantization stage on `model` with little calibration text, in this process."""
    found = method(name)
    out.mkdir(parents=True)
    inputs = {
        "model": [InputRef("model", "m", "model", "model", spec={"id": str(model)})],
        "data": [InputRef("data", "d", "source", "dataset", spec={"kind": "text", "path": str(data)})],
    }
    ctx = StageContext("q", name, 0, inputs, out, out.parent / "work", Events(None))
    little: dict[str, Any] = {"group_size": 32, "calibration": {"tokens": 2048, "held_out": 512, "length": 64}}
    if name == "quantize.auto":
        del little["group_size"]
    found.run(found.config.model_validate({"name": "q", "method": name, **little, **fields}), ctx)
    return ctx
