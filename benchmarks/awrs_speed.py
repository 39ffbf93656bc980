"""AWRS with sequential Monte Carlo, 8 particles: tokens a second beside genlm-control, the authors' package.

    python -m venv /tmp/genlm && /tmp/genlm/bin/pip install genlm-control==0.4.1 torch==2.13.0 transformers
    python benchmarks/awrs_speed.py --peer-python /tmp/genlm/bin/python            # about four minutes on one core
    python benchmarks/awrs_speed.py --peer-python /tmp/genlm/bin/python --quick

Same model (`_records.py`), prompt, JSON schema, particles, ESS threshold 0.5, at most 48 tokens. The peer runs in a process of its own
with its transformers backend, AWRS sampler and JSON-schema potential. One call is REQUESTS requests, one after the other, the same
ones in every call, since the peer's time hangs on how far a particle strays from the grammar. `hf` is our transformers engine, `vllm` our
engine on vLLM's CPU build; `together` are ours with all 8 requests at once, beside no peer (gathered, it takes minutes).
Seconds are wall seconds a token of all particles, since the peer is another process. The line's own `ratio` is that of `hf`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _harness import Cells, arguments, compare, finish, speed
from _records import PROMPT, SCHEMA, records_model

from posttrain.config.constraint import ConstraintConfig, SamplerConfig
from posttrain.rollout._build import build_constraint
from posttrain.rollout.base import Request, Sampling

PARTICLES, LONGEST, REQUESTS = 8, 48, 2
PEER = r"""
import asyncio, json, sys, warnings
warnings.simplefilter("ignore")
import numpy, torch
torch.set_num_threads(1)
from genlm.control import AWRS, JsonSchema, PromptedLLM
job = json.loads(sys.argv[1])
llm = PromptedLLM.from_name(job["folder"], backend="hf", prompt_ids=job["prompt"])
checker = JsonSchema(job["schema"]).coerce(llm, f=b"".join)
print("READY", flush=True)
for line in sys.stdin:
    tokens = 0
    for seed in range(json.loads(line)):
        numpy.random.seed(seed); torch.manual_seed(seed)
        sampler = AWRS(llm, checker, seed=seed)
        found = asyncio.run(sampler.smc(n_particles=job["particles"], ess_threshold=0.5, max_tokens=job["longest"]))
        tokens += sum(map(len, found.contexts))
    print(tokens, flush=True)
"""


class Peer:
    """genlm-control in its own process.

    Args:
        python: an interpreter that has it.
        folder: the model.
        prompt: token ids.
    """

    def __init__(self, python: str, folder: Path, prompt: list[int]) -> None:
        job = {"folder": str(folder), "prompt": prompt, "schema": SCHEMA, "particles": PARTICLES, "longest": LONGEST}
        command = [python, "-c", PEER, json.dumps(job)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if self._line() != "READY":
            raise SystemExit(f"{python} cannot run genlm-control; see the head of this file")

    def _line(self) -> str:
        """The next line that is an answer; libraries print, too."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == "READY" or line.strip().isdigit():
                return line.strip()
        return ""

    def __call__(self) -> int:
        """Tokens of all particles of REQUESTS requests."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{REQUESTS}\n")
        self._process.stdin.flush()
        return int(self._line())

    def close(self) -> None:
        """Ends the process."""
        self._process.terminate()
        self._process.wait()


def ours(engine: Any, ids: list[int], count: int, together: bool = False) -> int:
    """Tokens of all particles of `count` requests, one after the other or at once."""
    before = engine.tokens
    constraint = build_constraint(ConstraintConfig(json_schema=SCHEMA))
    sampler = SamplerConfig(particles=PARTICLES)
    requests = [Request(ids, 1000 + i, Sampling(LONGEST), "", constraint, sampler) for i in range(count)]
    for part in [requests] if together else [[request] for request in requests]:
        engine.generate(part)
    return int(engine.tokens - before)


def measured(peer: Peer, engine: Any, ids: list[int], pairs: int) -> dict[str, Any]:
    """`speed` in wall seconds a token."""
    tokens = peer(), ours(engine, ids, REQUESTS)
    found = speed(compare(peer, lambda: ours(engine, ids, REQUESTS), pairs=pairs, warmup=0), "wall")
    scale = tokens[1] / tokens[0]
    start = time.perf_counter()
    many = ours(engine, ids, 8, together=True)
    return {**found, "ours": found["ours"] / tokens[1], "peer": found["peer"] / tokens[0], "ratio": found["ratio"] * scale,
            "ci95": [value * scale for value in found["ci95"]], "tokens": tokens,
            "together": (time.perf_counter() - start) / many}  # fmt: skip


def main() -> None:
    """Both engines."""
    args = arguments(__doc__ or "", peer_python={"required": True, "help": "interpreter of an environment with genlm-control 0.4.1"})
    from posttrain.models.save import save_model

    model, tokenizer = records_model(args.quick)
    ids, pairs = tokenizer.encode(PROMPT), 2 if args.quick else 10

    def hf() -> Any:
        from posttrain.rollout.hf import HFEngine

        return HFEngine(model, tokenizer, max_batch=8 * PARTICLES)

    def vllm() -> Any:
        from posttrain.config.engine import VllmConfig
        from posttrain.rollout.vllm import VLLMEngine

        return VLLMEngine.of_model(model, tokenizer, VllmConfig(dtype="float32"), max_batch=8 * PARTICLES)

    with tempfile.TemporaryDirectory() as folder:
        save_model(model, tokenizer, Path(folder))

        def cell(make: Callable[[], Any]) -> dict[str, Any]:
            peer, engine = Peer(args.peer_python, Path(folder), ids), make()
            try:
                return measured(peer, engine, ids, pairs)
            finally:
                peer.close()
                engine.close()

        arms: dict[str, Callable[[int], Any]] = {"hf": lambda _: cell(hf), "vllm": lambda _: cell(vllm)}
        cells = Cells("awrs_speed", args).measure(arms, [0])
    table = {arm: cells[arm, 0] for arm in arms}
    for arm, value in table.items():
        low, high = value["ci95"]
        rates = f"{1 / value['ours']:.0f} tokens/s (together {1 / value['together']:.0f}) beside {1 / value['peer']:.0f}"
        print(f"{arm:5s} {rates}: {value['ratio']:.1f} [{low:.1f}, {high:.1f}]")
    finish("awrs_speed", {**table["hf"], "unit": "wall seconds a token", "cells": table}, args)


if __name__ == "__main__":
    main()
