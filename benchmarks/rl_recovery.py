"""How many prompts does recent sample recovery save, and at what price?

    python benchmarks/rl_recovery.py                 # eight seeds; about an hour on one core
    python benchmarks/rl_recovery.py --jobs 16
    python benchmarks/rl_recovery.py --quick

Policy, tasks and loop are those of `_rl_toy.py`; the sampling is `method: grpo`'s. A step needs N = 32 groups whose rewards
differ, a round samples M, for M/N of 1/4, 1, 2 and 3:

    grpo       no dynamic sampling: N groups a step, whatever their rewards
    dapo       dynamic sampling; what does not fit into a step is discarded
    recovery   it is kept and goes first into the next step; no round is sampled while a whole step is held

Seeds pair the arms: same taught policy, same order of prompts. Told are prompts generated for the same number of steps beside
the saving that `posttrain plan` predicts from the accept rate, the buffer and the age of what it gave; exact accuracy on the
test part at equal steps, where recovery is called not inferior if the whole 95 % interval of its difference lies above -`MARGIN`;
and accuracy on the validation part at equal prompts, of the policy at that time and not of the best so far.

In the record `ours` and `peer` are prompts of `recovery` and `dapo` at M = N, `ratio` is peer over ours with the interval of
its mean over seeds on a log scale, and `control` the same of `dapo` with another order of prompts against `dapo`.
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
from _rl_toy import GROUPS, Setting, column, measured, reinforced, started

SHARES = (0.25, 1.0, 2.0, 3.0)
"""M over N."""
MARGIN = 0.02
WINDOW = 10
"""Steps over which an accept rate is taken to be constant."""
MOST_ROUNDS = 100


def settings(steps: int) -> dict[str, Setting]:
    """Arm -> how it is reinforced."""
    arms = {"grpo": Setting(steps), "dapo 1 again": Setting(steps, {"recover": False, "max_rounds": MOST_ROUNDS}, shuffle=1)}
    for share in SHARES:
        for name, recover in (("dapo", False), ("recovery", True)):
            arms[f"{name} {share:g}"] = Setting(steps, {"round": int(share * GROUPS), "recover": recover, "max_rounds": MOST_ROUNDS})
    return arms


def cell(arm: str, steps: int, seed: int) -> dict[str, Any]:
    """One run."""
    torch.set_num_threads(1)
    run = reinforced(seed, settings(steps)[arm])
    names = ("recovered_share", "age_mean", "age_max", "buffer", "accept_rate")
    seen = {name: [round(value, 4) for value in column(run.steps, f"dynamic/{name}")] for name in names}
    sampled = [step["prompts"] for step in run.steps]
    return {"summary": run.summary, "test": measured(run.policy, "test"), "curve": run.curve, "prompts": sampled, "steps": seen}


def predicted(cells: dict[str, Any], share: float) -> float:
    """The saving that the accept rates of a run without recovery foretell, window by window."""
    from posttrain.trainers._grpo_saving import expected_rounds

    size, kept, asked = int(share * GROUPS), 0.0, 0.0
    rates = cells["steps"]["accept_rate"]
    for at in range(0, len(rates), WINDOW):
        rate = float(np.mean(rates[at : at + WINDOW]))
        kept += GROUPS / rate
        asked += size * expected_rounds(GROUPS, size, rate)
    return 1 - kept / asked


def at_each(runs: list[dict[str, Any]], prompts: list[int]) -> list[float]:
    """Validation accuracy of each run when so many prompts were generated, between the measurements."""
    curves = [([point["prompts"] for point in c["curve"]], [point["pass@1"] for point in c["curve"]]) for c in runs]
    return [float(np.interp(n, *curve)) for n, curve in zip(prompts, curves, strict=True)]


def compared(done: dict[tuple[str, int], Any], seeds: list[int], share: float) -> dict[str, Any]:
    """Recovery against DAPO at one size of a round."""
    ours, peer = ([done[f"{name} {share:g}", seed] for seed in seeds] for name in ("recovery", "dapo"))
    plain = [done["grpo", seed] for seed in seeds]
    prompts = [[cells["summary"]["prompts"] for cells in arm] for arm in (ours, peer)]
    test = {name: paired([c["test"][name] for c in ours], [c["test"][name] for c in peer]) for name in ("pass@1", "pass@8", "greedy")}
    low = test["pass@1"]["low"]
    steps = [c["steps"] for c in ours]
    return {
        "prompts": {"recovery": interval(prompts[0]), "dapo": interval(prompts[1])},
        "saving": interval([1 - a / b for a, b in zip(*prompts, strict=True)]),
        "predicted": interval([predicted(c, share) for c in peer]),
        "accept_rate": interval([float(np.mean(c["steps"]["accept_rate"])) for c in peer]),
        "recovered_share": interval([float(np.mean(s["recovered_share"])) for s in steps]),
        "age": {"mean": interval([float(np.mean(s["age_mean"])) for s in steps]), "most": max(max(s["age_max"]) for s in steps)},
        "buffer_most": max(max(s["buffer"]) for s in steps),
        "expired": interval([float(c["summary"]["expired"]) for c in ours]),
        "test_minus_dapo": test,
        "not_inferior": None if low is None else low > -MARGIN,
        "validation_at_equal_prompts_minus_dapo": paired(at_each(ours, prompts[0]), at_each(peer, prompts[0])),
        "validation_at_grpos_prompts_minus_grpo": paired(
            at_each(ours, [c["summary"]["prompts"] for c in plain]), [c["curve"][-1]["pass@1"] for c in plain]
        ),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Command line; returns the record."""
    jobs = {"type": int, "default": 1, "help": "processes, one thread each"}
    args = arguments(__doc__ or "", argv, jobs=jobs, seeds={"type": int, "default": None, "help": "default 8; 1 with --quick"})
    os.environ["OMP_NUM_THREADS"] = "1"
    steps, seeds = (3, list(range(args.seeds or 1))) if args.quick else (60, list(range(args.seeds or 8)))
    cells = Cells("rl_recovery", args)
    first = cells.measure({"start": started}, seeds, args.jobs)
    done = cells.measure({arm: functools.partial(cell, arm, steps) for arm in settings(steps)}, seeds, args.jobs)
    parts = {f"{share:g}": compared(done, seeds, share) for share in SHARES}
    for share, found in parts.items():
        test, equal = (found[name] for name in ("test_minus_dapo", "validation_at_equal_prompts_minus_dapo"))
        print(
            f"M/N {share:>4}  saving {found['saving']['mean']:6.1%} (predicted {found['predicted']['mean']:6.1%})"
            f"  accept {found['accept_rate']['mean']:.2f}  age {found['age']['mean']['mean']:.2f} most {found['age']['most']:.0f}"
            f"  buffer most {found['buffer_most']:.0f}  test {test['pass@1']['mean']:+.4f}  at equal prompts {equal['mean']:+.4f}"
        )
    prompts = {arm: [done[arm, seed]["summary"]["prompts"] for seed in seeds] for arm in ("dapo 1", "recovery 1", "dapo 1 again")}
    ratio, control = log_ratio(prompts["dapo 1"], prompts["recovery 1"]), log_ratio(prompts["dapo 1"], prompts["dapo 1 again"])
    accuracy = {arm: interval([done[arm, seed]["test"]["pass@1"] for seed in seeds]) for arm in settings(steps)}
    record = {
        "ours": float(np.mean(prompts["recovery 1"])), "peer": float(np.mean(prompts["dapo 1"])), "unit": "prompts",
        "ratio": ratio["value"], "ci95": [ratio["low"], ratio["high"]], "control": control, "steps": steps, "seeds": seeds,
        "margin": MARGIN, "start": interval([first["start", seed]["pass@1"] for seed in seeds]), "test_pass@1": accuracy, "parts": parts,
    }  # fmt: skip
    return finish("rl_recovery", record, args)


if __name__ == "__main__":
    main()
