"""Continuous batching in the transformers engine beside batch after batch.

    python benchmarks/rollout_continuous.py            # about five minutes on one core
    python benchmarks/rollout_continuous.py --quick

A Llama of 4 layers, hidden 256, 4,096 tokens, random weights, no end token, so that a request draws as many tokens as its limit says.
96 requests in batches of at most 16 rows. `skewed`: limits of 4 to 200 tokens, most of them short (log-normal). `equal`: all 32. The
peer hands the same requests to the same engine 16 at a time, as the engine itself ran them before; ended rows leave in both. `ratio`
is the peer's CPU seconds over ours.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from _harness import Cells, arguments, compare, finish, speed

from posttrain.rollout.base import Request, Sampling
from posttrain.rollout.hf import HFEngine

ROWS, COUNT, PAIRS = 16, 96, 20


class NoText:
    """A tokenizer of nothing: the engine needs one to decode."""

    eos_token_id = None
    added_tokens_decoder: dict[int, Any] = {}

    def decode(self, ids: list[int], **_: Any) -> str:
        """No text."""
        return ""


def model(quick: bool) -> Any:
    """With random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = 64 if quick else 256
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=size, intermediate_size=2 * size, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def requests(kind: str, count: int) -> list[Request]:
    """Requests with prompts of 4 to 40 tokens."""
    rng = random.Random(1)
    found = []
    for number in range(count):
        limit = min(200, max(4, round(rng.lognormvariate(2.6, 1.1)))) if kind == "skewed" else 32
        found.append(Request([rng.randrange(4096) for _ in range(rng.randint(4, 40))], number, Sampling(limit)))
    return found


def main() -> None:
    """Both kinds."""
    args = arguments(__doc__ or "")
    engine = HFEngine(model(args.quick), NoText(), max_batch=ROWS)

    def arm(kind: str) -> dict[str, Any]:
        wanted = sorted(requests(kind, 32 if args.quick else COUNT), key=lambda item: len(item.prompt_ids))

        def peer() -> None:
            for start in range(0, len(wanted), ROWS):
                engine.generate(wanted[start : start + ROWS])

        found = speed(compare(peer, lambda: engine.generate(wanted), pairs=2 if args.quick else PAIRS, warmup=1))
        tokens = sum(item.sampling.max_tokens for item in wanted)
        return {**found, "tokens": tokens, "tokens_per_s": {"ours": tokens / found["ours"], "peer": tokens / found["peer"]}}

    cells = Cells("rollout_continuous", args)
    kinds = {kind: lambda _seed, kind=kind: arm(kind) for kind in ("skewed", "equal")}
    results = {kind: result for (kind, _), result in cells.measure(kinds, [0]).items()}
    for kind, result in results.items():
        print(f"{kind}: {result['ratio']:.2f} {result['ci95']}, control {result['control']['value']:.2f}, {result['tokens_per_s']}")
    finish("rollout_continuous", {**results["skewed"], "equal": results["equal"], "unit": "CPU seconds"}, args)


if __name__ == "__main__":
    main()
