"""An arbitrary Python predicate as constraint: adaptive weighted rejection sampling beside a mask of the whole vocabulary.

    python benchmarks/awrs_predicate.py            # about five minutes on one core
    python benchmarks/awrs_predicate.py --quick

The predicate sees the bytes so far and knows nothing of tokens: brackets and quotes may only close what is open, and the letter x must not
come. A mask asks it about every token of the vocabulary (32,000; with `--quick` 4,000), at every token; AWRS about a few. Both run in the
transformers engine on the model of `_records.py`, with the same weights' meaning: the mask's are exact, AWRS's unbiased.
`calls` are questions a drawn token; the line's own `ratio` is the mask's CPU seconds a token over ours.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _harness import arguments, compare, finish, speed
from _records import PROMPT, records_model

from posttrain.config.constraint import ConstraintConfig, SamplerConfig
from posttrain.rollout._build import build_constraint
from posttrain.rollout.base import Request, Sampling
from posttrain.rollout.constraints import predicate
from posttrain.rollout.hf import HFEngine

CLOSES = {ord("]"): ord("["), ord("}"): ord("{")}
asked = [0]


@predicate("closes")
def closes(text: bytes, ends: bool) -> bool:
    """Brackets close what is open, outside of quotes; no x; a whole text leaves nothing open."""
    asked[0] += 1
    open_ones: list[int] = []
    quoted = False
    for byte in text:
        if byte == 120:
            return False
        if byte == 34:
            quoted = not quoted
        elif quoted:
            continue
        elif byte in (91, 123):
            open_ones.append(byte)
        elif byte in CLOSES and (not open_ones or open_ones.pop() != CLOSES[byte]):
            return False
    return not ends or not (open_ones or quoted)


def main() -> None:
    """One batch of the same requests by both methods."""
    args = arguments(__doc__ or "")
    model, tokenizer = records_model(args.quick)
    engine, ids = HFEngine(model, tokenizer, max_batch=8), tokenizer.encode(PROMPT)
    constraint = build_constraint(ConstraintConfig(plugin="closes"))
    longest, figures = 4 if args.quick else 8, {}

    def run(method: str) -> dict[str, Any]:
        asked[0], before = 0, engine.tokens
        found = engine.generate(
            [Request(ids, i, Sampling(longest), "", constraint, SamplerConfig.model_validate({"method": method})) for i in range(4)]
        )
        tokens = engine.tokens - before
        figures[method] = {
            "tokens": tokens,
            "calls": asked[0] / tokens,
            "refused": 1 - sum(c.extra["accepted"] for c in found) / len(found),
        }
        return figures[method]

    run("mask"), run("awrs")
    compared = speed(compare(lambda: run("mask"), lambda: run("awrs"), pairs=2 if args.quick else 20, warmup=0))
    scale = figures["awrs"]["tokens"] / figures["mask"]["tokens"]
    ratio = {"ratio": compared["ratio"] * scale, "ci95": [value * scale for value in compared["ci95"]]}
    fewer = figures["mask"]["calls"] / figures["awrs"]["calls"]
    low, high = ratio["ci95"]
    print(f"calls a token: {figures['awrs']['calls']:.1f} beside {figures['mask']['calls']:.0f}, {fewer:.0f} times fewer")
    print(f"time a token: {ratio['ratio']:.0f} [{low:.0f}, {high:.0f}] times less, control {compared['control']['value']:.2f}")
    finish("awrs_predicate", {**compared, **ratio, "vocabulary": len(tokenizer), "fewer_calls": fewer, "figures": figures}, args)


if __name__ == "__main__":
    main()
