"""Does targeted entropy hold a level, from which side, with which coefficient, and what does it cost?

    python benchmarks/entropy_target.py                # five seeds; about forty minutes on one core
    python benchmarks/entropy_target.py --jobs 16
    python benchmarks/entropy_target.py --quick

Policy, tasks and loop are those of `_rl_toy.py`; plain GRPO of 32 groups of 8. The target is 0.55 nats, as published; here the
entropy begins above it and falls to about 0.64 by itself. Regimes, of which the last two are artificial disturbances:

    own     nothing is done to it
    high    the entropy is subtracted from the loss in all arms, which drives it up
    low     the entropy is added to the loss in all arms, which drives it down

Arms are no term; ours, coeff * |H - H*|, with the coefficients of `COEFFICIENTS` (0.001 is the published one); and the one-sided
controller of Skywork-OR1 as TRL has it, which raises a coefficient below the target and applies none above. Told are the mean of
|H - H*| over the last half of the steps, and exact pass@1, pass@8 and greedy accuracy on the test part.

In the record `ours` and `peer` are |H - H*| of ours with coefficient 2 and of the one-sided controller, the mean of the
disturbed regimes that were run, `ratio` is peer over ours with the interval of its mean over seeds on a log scale, and `control`
the same of the one-sided controller with another order of prompts.
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
from _rl_toy import Setting, column, measured, reinforced, started

TARGET, PUSH = 0.55, 1.0
COEFFICIENTS = (0.001, 0.1, 0.3, 1.0, 2.0, 4.0)
FIGURES = ("gap", "pass@1", "pass@8", "greedy")


REGIMES = {"own": 0.0, "high": PUSH, "low": -PUSH}
"""Name -> how much of the entropy is subtracted from the loss."""


def settings(steps: int, regimes: list[str]) -> dict[str, Setting]:
    """Arm -> how it is reinforced."""
    terms: dict[str, Any] = {"none": None, "one-sided": ("below", 0.0, TARGET), "one-sided again": ("below", 0.0, TARGET)}
    terms |= {f"ours {coefficient:g}": ("both", coefficient, TARGET) for coefficient in COEFFICIENTS}
    return {
        f"{regime} {name}": Setting(steps, entropy=term, push=REGIMES[regime], shuffle=int(name.endswith("again")))
        for regime in regimes
        for name, term in terms.items()
    }


def cell(arm: str, steps: int, seed: int) -> dict[str, Any]:
    """One run."""
    torch.set_num_threads(1)
    run = reinforced(seed, settings(steps, list(REGIMES))[arm])
    level = list(column(run.steps, "entropy"))
    fifths = [float(np.mean(part)) for part in np.array_split(level, min(5, len(level)))]
    gap = float(np.mean([abs(h - TARGET) for h in level[len(level) // 2 :]]))
    return {**measured(run.policy, "test"), "gap": gap, "entropy_by_fifths": fifths}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Command line; returns the record."""
    jobs = {"type": int, "default": 1, "help": "processes, one thread each"}
    names = {"default": ",".join(REGIMES), "help": "comma-separated; default all"}
    args = arguments(
        __doc__ or "", argv, jobs=jobs, regimes=names, seeds={"type": int, "default": None, "help": "default 5; 1 with --quick"}
    )
    regimes = args.regimes.split(",")
    if unknown := set(regimes) - set(REGIMES):
        raise SystemExit(f"unknown regimes {sorted(unknown)}; known: {', '.join(REGIMES)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    steps, seeds = (4, list(range(args.seeds or 1))) if args.quick else (80, list(range(args.seeds or 5)))
    cells = Cells("entropy_target", args)
    cells.measure({"start": started}, seeds, args.jobs)
    done = cells.measure({arm: functools.partial(cell, arm, steps) for arm in settings(steps, regimes)}, seeds, args.jobs)
    parts: dict[str, Any] = {}
    for arm in settings(steps, regimes):
        mine, base = ([done[name, seed] for seed in seeds] for name in (arm, f"{arm.split()[0]} none"))
        parts[arm] = {name: interval([c[name] for c in mine]) for name in FIGURES}
        parts[arm] |= {f"{name}_minus_none": paired([c[name] for c in mine], [c[name] for c in base]) for name in FIGURES}
        parts[arm]["entropy_by_fifths"] = np.mean([c["entropy_by_fifths"] for c in mine], axis=0).tolist()
        fifths = " ".join(f"{h:.2f}" for h in parts[arm]["entropy_by_fifths"])
        print(f"{arm:20} H {fifths}" + "".join(f"  {name} {parts[arm][name]['mean']:.3f}" for name in FIGURES))

    disturbed = [regime for regime in regimes if REGIMES[regime]] or regimes

    def gaps(name: str) -> list[float]:
        return [float(np.mean([done[f"{regime} {name}", seed]["gap"] for regime in disturbed])) for seed in seeds]

    ratio, control = log_ratio(gaps("one-sided"), gaps("ours 2")), log_ratio(gaps("one-sided"), gaps("one-sided again"))
    record = {
        "ours": float(np.mean(gaps("ours 2"))), "peer": float(np.mean(gaps("one-sided"))), "unit": "nats from the target",
        "ratio": ratio["value"], "ci95": [ratio["low"], ratio["high"]], "control": control, "target": TARGET, "push": PUSH,
        "steps": steps, "seeds": seeds, "regimes": regimes, "parts": parts,
    }  # fmt: skip
    return finish("entropy_target", record, args)


if __name__ == "__main__":
    main()
