"""A small model that writes JSON records, a third of them wrong, for the benchmarks of constrained sampling.

A record is one line, {"a": integer, "b": [up to four of red, green, blue], "c": string of at most 12 characters}; wrong ones name a
fourth colour, write too long a string, a float, or five colours. So the model is near the grammar and strays from it now and then,
as a prompted model does. Llama, 2 layers, hidden 128, a byte-level BPE of 32,000 tokens trained on the standard library's sources.
Trained once (about a minute on one core) and kept in the temporary folder.
"""

from __future__ import annotations

import json
import random
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer"},
        "b": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
        "c": {"type": "string", "maxLength": 12},
    },
    "required": ["a", "b", "c"],
    "additionalProperties": False,
}
PROMPT = "record: "
WRONG = 0.35
STEPS, BATCH, VOCABULARY = 120, 48, 32_000


def record(rng: random.Random) -> str:
    """One line, wrong with probability WRONG."""
    colours = ["red", "green", "blue"]
    wrong = rng.choice(["colour", "long", "float", "many"]) if rng.random() < WRONG else ""
    b = [rng.choice(colours) for _ in range(rng.randint(0, 4))]
    if wrong == "colour":
        b.insert(rng.randint(0, len(b)), "black")
    if wrong == "many":
        b = [rng.choice(colours) for _ in range(rng.randint(5, 6))]
    words = ["tea", "sun", "moss", "river", "stone", "lamp", "cloud", "pine", "salt", "wheel"]
    c = rng.choice(words) + rng.choice(["", " " + rng.choice(["one", "two", "six"])])
    if wrong == "long":
        c = " ".join(rng.choice(words) for _ in range(4))
    a = rng.randint(0, 999)
    return json.dumps({"a": a + 0.5 if wrong == "float" else a, "b": b, "c": c})


def _sources(limit: int) -> list[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")) + sorted(Path(sysconfig.get_path("stdlib")).glob("*/*.py"))
    texts, size = [], 0
    for file in files:
        if "site-packages" in file.parts or "test" in file.parts:
            continue
        texts.append(file.read_text(encoding="utf-8", errors="ignore"))
        size += len(texts[-1])
        if size > limit:
            break
    return texts


def records_model(quick: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer), trained if that was not done before."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(tempfile.gettempdir()) / f"posttrain-records-{'quick' if quick else 'model'}-5"
    if not (folder / "done").exists():
        _train(folder, 40 if quick else STEPS, 4_000 if quick else VOCABULARY)
        (folder / "done").touch()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _train(folder: Path, steps: int, size: int) -> None:
    import torch

    from posttrain.models.create import new_model, train_tokenizer
    from posttrain.models.save import save_model

    rng = random.Random(0)
    tokenizer = train_tokenizer([*_sources(1_000_000 if size < 10_000 else 14_000_000), *(record(rng) for _ in range(3000))], size, 512)
    model = new_model(
        "llama", tokenizer, 0, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 10) * max(0.05, 1 - step / steps)
        rows = [tokenizer.encode(PROMPT) + tokenizer.encode(record(rng)) + [tokenizer.eos_token_id] for _ in range(BATCH)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])[:, None]
        labels = ids.masked_fill(torch.arange(width)[None] >= lengths, -100)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model.eval(), tokenizer, folder)
    print(f"trained the records model: {steps} steps, loss {float(loss):.3f}", flush=True)
