"""What gradient spikes cost AdamW, AdamW behind a global clip, Stable-SPAM and GradientStabilizer.

    python benchmarks/stable_spam_spikes.py             # 5 seeds; about ten minutes on one core, less with --jobs
    python benchmarks/stable_spam_spikes.py --quick     # 2 seeds, 60 steps, four arms, two kinds

A two-layer language model on the bytes of the standard library's docstrings, 200 steps. Spikes are injected between the backward pass
and the step:

    none       no spike
    once       the whole gradient times 1000 at step 100
    whole      the whole gradient times 1000 every 20 steps from step 40
    entries    1 % of the entries of every tensor at 1000 times its largest entry, every 20 steps from step 40

Arms:

    adamw, clip          torch's AdamW, and it behind clip_grad_norm_ at 1.0
    stable_spam          ours, reset every 60 steps
    official             the authors' step (compat), reset every 60 steps
    no_reset             ours without resets
    limited              ours with clip_limit 10, reset every 60 steps
    limited_no_reset     both
    stabilizer           preset gradient_stabilizer

`loss` is the held-out loss in nats a byte after the last step. `cost` is that minus the same arm's without spikes, the same seed;
`after` is the training loss of the 10 steps after each spike minus that of the same steps of the run without spikes.
Intervals are 95 % by Student's t over seeds; `minus_adamw` and `minus_clip` are paired by seed. The peak learning rate is 4e-3,
which of 2, 4, 8 and 16e-3 was best for every arm on pilot seeds 97 and 98 without spikes (`--pilot`); those are not reported.

In the record `ours` and `peer` are the losses of `stable_spam` and `clip` after `whole` spikes, `ratio` is the peer's perplexity over
ours (above 1: ours is better), `control` the same ratio of `clip` with spikes 7 steps later over `clip`.
"""

from __future__ import annotations

import ast
import functools
import math
import os
import random
import statistics
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _harness import Cells, arguments, finish
from _judges import interval, paired

MODULES = ("argparse", "asyncio", "collections", "decimal", "email", "http", "logging", "multiprocessing", "statistics", "unittest", "xml")
LENGTH, ROWS, HELD, AFTER = 64, 4, 64, 10
STEPS, QUICK_STEPS = 200, 60
RESET, RATE = 60, 4e-3
KINDS = ("none", "once", "whole", "entries")
ARMS: dict[str, tuple[dict[str, Any] | None, float | None]] = {
    "adamw": (None, None),
    "clip": (None, 1.0),
    "stable_spam": ({"reset_every": RESET}, None),
    "official": ({"reset_every": RESET, "compat": "official"}, None),
    "no_reset": ({"reset_every": 0}, None),
    "limited": ({"reset_every": RESET, "clip_limit": 10.0}, None),
    "limited_no_reset": ({"reset_every": 0, "clip_limit": 10.0}, None),
    "stabilizer": ({"clip_decay": None, "norm_decays": (0.6, 0.999), "norm_eps": 1e-12, "reset_every": 0}, None),
}
"""Arm -> options of StableSPAM (None: AdamW), global clip."""
QUICK_ARMS, QUICK_KINDS = ("adamw", "clip", "stable_spam", "limited"), ("none", "whole")


@functools.cache
def text() -> bytes:
    """Docstrings of some modules, in ASCII."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), []
    for name in MODULES:
        files = sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / f"{name}.py"]
        for file in files:
            nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="ignore")))
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            found += [doc for node in nodes if isinstance(node, kinds) and (doc := ast.get_docstring(node))]
    return "\n\n".join(found).encode("ascii", "ignore")


def rows() -> Any:
    """int64 (N, 64): the bytes in rows; a seed decides which of them are held out."""
    import torch

    data = torch.tensor(list(text()))
    return data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)


def make_model(seed: int) -> Any:
    """A Qwen2 of two layers, 64 wide."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=True, initializer_range=0.05,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def spike_steps(kind: str, steps: int, shift: int) -> list[int]:
    """Steps, from 1, whose gradient is spoilt."""
    if kind in ("none", "once"):
        return [] if kind == "none" else [steps // 2 + shift]
    return list(range(min(40, steps // 2) + shift, steps - 10, 20))


def spoil(gradients: list[Any], kind: str, generator: Any) -> None:
    """Makes a spike of them, in place."""
    import torch

    for gradient in gradients:
        if kind == "entries":
            hit = torch.rand(gradient.shape, generator=generator) < 0.01
            gradient[hit] = 1000 * gradient.abs().max() * gradient[hit].sign()
        else:
            gradient.mul_(1000)


def make_optimizer(params: list[Any], options: dict[str, Any] | None, rate: float) -> Any:
    """AdamW, or ours."""
    import torch

    from posttrain.optim.stable_spam import StableSPAM

    return torch.optim.AdamW(params, rate, weight_decay=0.0, fused=True) if options is None else StableSPAM(params, rate, **options)


def train(arm: str, kind: str, steps: int, seed: int, rate: float = RATE, shift: int = 0) -> dict[str, Any]:
    """One run: training loss of every step, held-out loss at the end."""
    import torch

    torch.set_num_threads(1)
    options, clip = ARMS[arm]
    data = rows()[torch.randperm(len(rows()), generator=torch.Generator().manual_seed(seed))]
    held, data = data[:HELD], data[HELD:]
    model, generator = make_model(seed), torch.Generator().manual_seed(seed + 1000)
    params = list(model.parameters())
    optimizer = make_optimizer(params, options, rate)
    spikes, losses, order = set(spike_steps(kind, steps, shift)), [], random.Random(f"order {seed}")
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / 20) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        batch = data[order.sample(range(len(data)), ROWS)]
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        if step in spikes:
            spoil([p.grad for p in params if p.grad is not None], kind, generator)
        if clip:
            torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        final = model(input_ids=held, labels=held).loss.item()
    return {"loss": final, "losses": [round(value, 5) for value in losses]}


def after(spiked: dict[str, Any], quiet: dict[str, Any], steps: list[int]) -> float:
    """Mean training loss of the steps after each spike above that of the run without."""
    places = sorted({place for step in steps for place in range(step, min(step + AFTER, len(quiet["losses"])))})
    return statistics.fmean(spiked["losses"][i] - quiet["losses"][i] for i in places) if places else 0.0


def table(done: dict[tuple[str, str], list[dict[str, Any]]], arms: list[str], kinds: list[str], steps: int) -> dict[str, Any]:
    """Kind -> arm -> loss, cost, after, and differences from both AdamWs."""
    found: dict[str, Any] = {kind: {} for kind in kinds}
    for kind in kinds:
        losses = {arm: [cell["loss"] for cell in done[arm, kind]] for arm in arms}
        for arm in arms:
            pairs = list(zip(done[arm, kind], done[arm, "none"], strict=True))
            found[kind][arm] = {
                "loss": interval(losses[arm]),
                "cost": interval([spiked["loss"] - quiet["loss"] for spiked, quiet in pairs]),
                "after": interval([after(spiked, quiet, spike_steps(kind, steps, 0)) for spiked, quiet in pairs]),
                "minus_adamw": paired(losses[arm], losses["adamw"]),
                "minus_clip": paired(losses[arm], losses["clip"]),
            }
    return found


def perplexities(peer: list[float], ours: list[float]) -> dict[str, Any]:
    """Geometric mean over seeds of peer's perplexity over ours, with its interval."""
    logs = interval([a - b for a, b in zip(peer, ours, strict=True)])
    names = {"value": "mean", "low": "low", "high": "high"}
    return {name: None if logs[side] is None else math.exp(logs[side]) for name, side in names.items()}


def pilot(steps: int, jobs: int, args: Any) -> dict[str, float]:
    """Arm -> best of four peak learning rates, by held-out loss without spikes on seeds that are not reported."""
    rates, seeds = (2e-3, 4e-3, 8e-3, 16e-3), (97, 98)
    arms = {f"pilot/{arm}/{rate}": functools.partial(train, arm, "none", steps, rate=rate) for arm in ARMS for rate in rates}
    done = Cells("stable_spam_spikes", args).measure(arms, seeds, jobs)
    means = {arm: {rate: statistics.fmean(done[f"pilot/{arm}/{rate}", seed]["loss"] for seed in seeds) for rate in rates} for arm in ARMS}
    for arm, found in means.items():
        print(arm, {rate: round(value, 4) for rate, value in found.items()}, flush=True)
    return {arm: min(found, key=found.__getitem__) for arm, found in means.items()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Command line; returns the record."""
    args = arguments(
        __doc__ or "", argv,
        seeds={"type": int, "default": 5, "help": "seeds (default 5)"},
        jobs={"type": int, "default": 1, "help": "processes (default 1)"},
        pilot={"action": "store_true", "help": "only look for each arm's learning rate"},
    )  # fmt: skip
    steps = QUICK_STEPS if args.quick else STEPS
    if args.pilot:
        return pilot(steps, args.jobs, args)
    arms, kinds = (list(QUICK_ARMS), list(QUICK_KINDS)) if args.quick else (list(ARMS), list(KINDS))
    seeds = range(2 if args.quick else args.seeds)
    wanted: dict[str, Callable[[int], Any]] = {
        f"{kind}/{arm}": functools.partial(train, arm, kind, steps) for kind in kinds for arm in arms
    }
    wanted["whole, later/clip"] = functools.partial(train, "clip", "whole", steps, shift=7)
    cells = Cells("stable_spam_spikes", args).measure(wanted, seeds, args.jobs)
    done = {(arm, kind): [cells[f"{kind}/{arm}", seed] for seed in seeds] for kind in kinds for arm in arms}
    ours, peer = ([cell["loss"] for cell in done[arm, "whole"]] for arm in ("stable_spam", "clip"))
    later = [cells["whole, later/clip", seed]["loss"] for seed in seeds]
    ratio = perplexities(peer, ours)
    record = {
        "ours": statistics.fmean(ours), "peer": statistics.fmean(peer), "ratio": ratio["value"], "ci95": [ratio["low"], ratio["high"]],
        "control": perplexities(later, peer), "seeds": len(seeds), "steps": steps, "rate": RATE,
        "table": table(done, arms, kinds, steps),
    }  # fmt: skip
    return finish("stable_spam_spikes", record, args)


if __name__ == "__main__":
    main()
