"""What constrained sampling costs beside free sampling, and beside masks of the vocabulary, in both engines.

    python benchmarks/awrs_overhead.py            # about ten minutes on one core
    python benchmarks/awrs_overhead.py --quick

The model writes JSON records (`_records.py`, 32,000 tokens); the constraint is their schema. Seconds are CPU seconds a drawn token.

`hf`: the transformers engine, 32 completions a batch. `free` is the engine without a constraint; `llguidance` and `xgrammar` are masks
in the same loop, as engines with structured output do it: fill each row's bit mask, set refused logits to -inf, sample.
`vllm`: vLLM's CPU build, 32 requests at once. `free` is `LLM.generate` of the same engine without a constraint, `structured` its
own structured output (xgrammar). Ours are `awrs` (`probes: auto`, with a weight) and `local` (the same law, no weight).

Every ratio is the peer's seconds a token over ours. The line's own `ratio` is hf awrs beside free.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from _harness import Cells, arguments, compare, finish, speed
from _records import PROMPT, SCHEMA, records_model

from posttrain.config.constraint import ConstraintConfig, SamplerConfig
from posttrain.rollout._build import build_constraint
from posttrain.rollout.base import Request, Sampling
from posttrain.rollout.hf import HFEngine
from posttrain.rollout.particles import GroupRows

LONGEST = 48
PAIRS = 20


class MaskLoop:
    """Draws for the engine's loop with a mask library instead of our sampler: no weights, no point queries.

    Args:
        library: `llguidance` or `xgrammar`.
        matchers: makes a matcher.
        ends: end tokens.
    """

    def __init__(self, library: str, matchers: Callable[[], Any], ends: frozenset[int]) -> None:
        self.library, self.matchers, self.ends = library, matchers, ends
        self.begin()

    def begin(self) -> None:
        """Before other requests are drawn."""
        self._matchers: dict[int, Any] = {}
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, logits: torch.Tensor, rows: Sequence[tuple[int, GroupRows, int]]) -> int:
        """Masks all rows that go on, samples them, and moves their matchers; in place of `draw_particles`."""
        live = [(row, unit) for row, unit, j in rows if unit.goes_on(j)]
        matchers = [self._matchers.get(unit.handle) or self.matchers() for _, unit in live]
        self._matchers = {unit.handle: matcher for (_, unit), matcher in zip(live, matchers, strict=True)}
        chosen = logits if len(live) == len(logits) else logits[[row for row, _ in live]]
        self._mask(chosen, matchers)
        drawn = torch.multinomial(torch.softmax(chosen, -1), 1, generator=self._generator).squeeze(1).tolist()
        for (_, unit), matcher, token in zip(live, matchers, drawn, strict=True):
            particle = unit.particles[0]
            particle.tokens.append(token)
            particle.logprobs.append(0.0)
            if token in self.ends:
                particle.reason = "stop"
            elif unit.step + 1 == unit.request.sampling.max_tokens:
                particle.reason = "length"
            else:
                self._advance(matcher, token)
            unit.settle(np.zeros(1))
        return len(live)

    def _mask(self, logits: torch.Tensor, matchers: Sequence[Any]) -> None:
        if self.library == "xgrammar":
            import xgrammar

            bits = xgrammar.allocate_token_bitmask(len(matchers), logits.shape[-1])
            for row, matcher in enumerate(matchers):
                matcher.fill_next_token_bitmask(bits, row)
            xgrammar.apply_token_bitmask_inplace(logits, bits)
            return
        from llguidance.torch import allocate_token_bitmask, apply_token_bitmask_inplace, fill_next_token_bitmask

        bits = allocate_token_bitmask(len(matchers), logits.shape[-1])
        for row, matcher in enumerate(matchers):
            fill_next_token_bitmask(matcher, bits, row)
        apply_token_bitmask_inplace(logits, bits)

    def _advance(self, matcher: Any, token: int) -> None:
        taken = matcher.accept_token(token) if self.library == "xgrammar" else matcher.consume_token(token)
        assert taken, "a masked token was refused"


def mask_loop(library: str, tokenizer: Any, ends: frozenset[int]) -> MaskLoop:
    """MaskLoop with matchers of the library."""
    if library == "xgrammar":
        import xgrammar

        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, stop_token_ids=[tokenizer.eos_token_id])
        grammar = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(SCHEMA))
        matchers: Callable[[], Any] = partial(xgrammar.GrammarMatcher, grammar)
    else:
        import llguidance
        from llguidance.hf import from_tokenizer

        matcher = llguidance.LLMatcher(from_tokenizer(tokenizer), llguidance.LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA)))
        matchers = matcher.deep_copy
    return MaskLoop(library, matchers, ends)


def requests(tokenizer: Any, count: int, **sampler: Any) -> list[Request]:
    """`count` requests, constrained where `sampler` is given."""
    ids = tokenizer.encode(PROMPT)
    if not sampler:
        return [Request(ids, 100 + i, Sampling(LONGEST)) for i in range(count)]
    constraint = build_constraint(ConstraintConfig(json_schema=SCHEMA))
    return [Request(ids, 100 + i, Sampling(LONGEST), "", constraint, SamplerConfig(**sampler)) for i in range(count)]


def versus(peer: Callable[[], int], ours: Callable[[], int], pairs: int) -> dict[str, Any]:
    """`speed` of two arms that return how many tokens they drew, in seconds a token."""
    tokens = peer(), ours()
    found = speed(compare(peer, ours, pairs=pairs, warmup=1))
    scale = tokens[1] / tokens[0]
    return {**found, "ours": found["ours"] / tokens[1], "peer": found["peer"] / tokens[0],
            "ratio": found["ratio"] * scale, "ci95": [value * scale for value in found["ci95"]], "tokens": tokens}  # fmt: skip


def hf(peer: str, ours: str, quick: bool) -> dict[str, Any]:
    """Ours beside a peer in the transformers engine."""
    import posttrain.rollout.running as module

    model, tokenizer = records_model(quick)
    engine, count = HFEngine(model, tokenizer, max_batch=32), 32 if quick else 96

    def ours_arm() -> int:
        return sum(len(c.token_ids) for c in engine.generate(requests(tokenizer, count, method=ours)))

    def peer_arm() -> int:
        if peer == "free":
            return sum(len(c.token_ids) for c in engine.generate(requests(tokenizer, count)))
        assert loop is not None
        loop.begin()
        given, module.draw_particles = module.draw_particles, loop
        try:
            return sum(len(c.token_ids) for c in engine.generate(requests(tokenizer, count, method="local")))
        finally:
            module.draw_particles = given

    loop = None if peer == "free" else mask_loop(peer, tokenizer, engine.eos_ids)
    return versus(peer_arm, ours_arm, 2 if quick else PAIRS)


def vllm(quick: bool) -> dict[str, Any]:
    """Ours beside vLLM's own, in one engine."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    from posttrain.config.engine import VllmConfig
    from posttrain.rollout.vllm import VLLMEngine

    model, tokenizer = records_model(quick)
    engine, count = VLLMEngine.of_model(model, tokenizer, VllmConfig(dtype="float32"), max_batch=32), 32 if quick else 96
    ids = tokenizer.encode(PROMPT)

    def native(structured: bool) -> int:
        parts = StructuredOutputsParams(json=json.dumps(SCHEMA)) if structured else None
        params = SamplingParams(max_tokens=LONGEST, temperature=1.0, detokenize=False, structured_outputs=parts)
        found = engine._llm.generate([{"prompt_token_ids": ids}] * count, params, use_tqdm=False)
        return sum(len(item.outputs[0].token_ids) for item in found)

    def ours(method: str) -> int:
        return sum(len(c.token_ids) for c in engine.generate(requests(tokenizer, count, method=method)))

    pairs = 2 if quick else PAIRS
    return {
        f"{method}_beside_{peer}": versus(lambda peer=peer: native(peer == "structured"), lambda method=method: ours(method), pairs)
        for method in ("awrs", "local")
        for peer in ("free", "structured")
    }


def main() -> None:
    """All pairs."""
    args = arguments(__doc__ or "")
    arms: dict[str, Callable[[int], Any]] = {
        f"hf_{ours}_beside_{peer}": lambda _, peer=peer, ours=ours: hf(peer, ours, args.quick)
        for ours in ("awrs", "local")
        for peer in ("free", "llguidance", "xgrammar")
    }
    arms["vllm"] = lambda _: vllm(args.quick)
    cells = Cells("awrs_overhead", args).measure(arms, [0])
    found = {arm: cells[arm, 0] for arm in arms}
    table = {
        **{arm: value for arm, value in found.items() if arm != "vllm"},
        **{f"vllm_{key}": value for key, value in found["vllm"].items()},
    }
    for arm, value in table.items():
        low, high = value["ci95"]
        rate, control = 1 / value["ours"], value["control"]["value"]
        print(f"{arm:36s} {value['ratio']:.2f} [{low:.2f}, {high:.2f}]  control {control:.2f}  {rate:.0f} tokens/s")
    finish("awrs_overhead", {**table["hf_awrs_beside_free"], "unit": "CPU seconds a token", "pairs_of": table}, args)


if __name__ == "__main__":
    main()
