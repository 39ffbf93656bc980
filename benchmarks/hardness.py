"""What does policy-specific hardness weighting change: accuracy, and on which problems?

    python benchmarks/hardness.py                # ten seeds; about forty minutes on one core
    python benchmarks/hardness.py --jobs 16
    python benchmarks/hardness.py --quick

Policy, tasks and loop are those of `_rl_toy.py`; every arm has dynamic sampling with recovery, M = N = 32. A group with the share p
of right completions is weighted by D; D = alpha mu + 1 - alpha with mu = 2 p - 1:

    none          D = 1
    published     alpha = -0.256; mean of D above 1, so that it also scales the loss
    normalised    the same, divided by its mean over the step
    half          alpha = -0.5, normalised
    extreme       D = 1 - p, normalised: the positive control, which must show an effect if the benchmark can

Seeds pair the arms. Told are exact pass@1, pass@8 and greedy accuracy on the test part after the last step, pass@1 by what it was
before reinforcement, and on one batch of the taught policy the cosine of the weighted to the unweighted gradient and the ratio of
their norms, beside the cosine of two batches.

In the record `ours` and `peer` are wrong answers, 1 - pass@1, of `normalised` and `none`, `ratio` is peer over ours with the
interval of its mean over seeds on a log scale, and `control` the same of `none` with another order of prompts.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from _harness import Cells, arguments, finish
from _judges import interval, log_ratio, paired
from _rl_toy import GROUP, Reinforcement, Setting, exact, reinforced, start, started, tasks
from rl_recovery import MOST_ROUNDS

ARMS: dict[str, dict[str, Any]] = {
    "none": {},
    "none again": {"shuffle": 1},
    "published": {"alpha": -0.256},
    "normalised": {"alpha": -0.256, "normalise": True},
    "half": {"alpha": -0.5, "normalise": True},
    "extreme": {"weigh": lambda share: 1 - share},
}
WEIGHTS = {"published": lambda p: 1.256 - 0.256 * (2 * p - 1), "half": lambda p: 1.5 - 0.5 * (2 * p - 1), "extreme": lambda p: 1 - p}
STRATA = {"hard": (0.0, 0.1), "middle": (0.1, 0.5), "easy": (0.5, 1.01)}
"""By pass rate before reinforcement."""


TESTS = ("pass@1", "pass@8", "greedy")


def told(found: dict[str, Any]) -> str:
    """Mean and interval."""
    return f"{found['mean']:+.4f}" + ("" if found["low"] is None else f" [{found['low']:+.4f}, {found['high']:+.4f}]")


def cell(arm: str, steps: int, seed: int) -> dict[str, Any]:
    """One run."""
    torch.set_num_threads(1)
    run = reinforced(seed, Setting(steps, {"max_rounds": MOST_ROUNDS}, **ARMS[arm]))
    before, after = exact(start(seed), tasks()["test"])["p"].double(), exact(run.policy, tasks()["test"])
    p = after["p"].double()
    strata = {name: p[(before >= low) & (before < high)].mean().item() for name, (low, high) in STRATA.items()}
    test = {"pass@1": p.mean().item(), "pass@8": (1 - (1 - p) ** 8).mean().item(), "greedy": after["greedy"].double().mean().item()}
    return {"test": test, "strata": strata, "prompts": run.summary["prompts"]}


def gradients(seed: int) -> dict[str, Any]:
    """Cosines and ratios of norms of gradients on one batch of the taught policy."""
    torch.set_num_threads(1)
    loop = Reinforcement(seed, Setting(1, {"max_rounds": MOST_ROUNDS}))
    batch, other = loop.batch(), loop.batch()

    def gradient(of: dict[str, torch.Tensor], weight: torch.Tensor | float = 1.0) -> torch.Tensor:
        loop.optimizer.zero_grad()
        loop.loss({**of, "advantages": of["advantages"] * weight}).backward()
        return torch.cat([parameter.grad.flatten() for parameter in loop.policy.parameters()]).double()

    plain, share = gradient(batch), (batch["advantages"] > 0).double().view(-1, GROUP).mean(1)
    found = {name: gradient(batch, weigh(share).float().repeat_interleave(GROUP)) for name, weigh in WEIGHTS.items()}
    cosines = {name: torch.cosine_similarity(plain, value, 0).item() for name, value in {**found, "another batch": gradient(other)}.items()}
    return {"cosine": cosines, "norm": {name: (value.norm() / plain.norm()).item() for name, value in found.items()}}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Command line; returns the record."""
    jobs = {"type": int, "default": 1, "help": "processes, one thread each"}
    args = arguments(__doc__ or "", argv, jobs=jobs, seeds={"type": int, "default": None, "help": "default 10; 1 with --quick"})
    os.environ["OMP_NUM_THREADS"] = "1"
    steps, seeds = (3, list(range(args.seeds or 1))) if args.quick else (60, list(range(args.seeds or 10)))
    cells = Cells("hardness", args)
    cells.measure({"start": started}, seeds, args.jobs)
    work = {"gradients": gradients, **{arm: functools.partial(cell, arm, steps) for arm in ARMS}}
    done = cells.measure(work, seeds, args.jobs)
    base = [done["none", seed] for seed in seeds]
    parts: dict[str, Any] = {}
    for arm in ARMS:
        mine = [done[arm, seed] for seed in seeds]
        parts[arm] = {
            "test": {name: interval([c["test"][name] for c in mine]) for name in TESTS},
            "minus_none": {name: paired([c["test"][name] for c in mine], [c["test"][name] for c in base]) for name in TESTS},
            "strata_minus_none": {name: paired([c["strata"][name] for c in mine], [c["strata"][name] for c in base]) for name in STRATA},
            "prompts": interval([c["prompts"] for c in mine]),
        }
        shown = {**parts[arm]["minus_none"], **parts[arm]["strata_minus_none"]}
        print(f"{arm:12}" + "".join(f"  {name} {told(found)}" for name, found in shown.items()))
    seen = [done["gradients", seed] for seed in seeds]
    alike = {kind: {name: interval([s[kind][name] for s in seen]) for name in seen[0][kind]} for kind in ("cosine", "norm")}
    wrong = {arm: [1 - done[arm, seed]["test"]["pass@1"] for seed in seeds] for arm in ("none", "none again", "normalised")}
    ratio, control = log_ratio(wrong["none"], wrong["normalised"]), log_ratio(wrong["none"], wrong["none again"])
    record = {
        "ours": float(np.mean(wrong["normalised"])), "peer": float(np.mean(wrong["none"])), "unit": "share of wrong answers",
        "ratio": ratio["value"], "ci95": [ratio["low"], ratio["high"]], "control": control, "steps": steps, "seeds": seeds,
        "gradients": alike, "parts": parts,
    }  # fmt: skip
    return finish("hardness", record, args)


if __name__ == "__main__":
    main()
