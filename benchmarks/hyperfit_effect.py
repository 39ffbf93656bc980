"""Does hyperfitting make greedy text less repetitive at a sharper distribution, at the price of held-out loss, on a small model too?

    python benchmarks/hyperfit_effect.py            # one base model, 5 seeds; about twenty minutes on one core; goes on by seed
    python benchmarks/hyperfit_effect.py --quick    # 1 seed, a shorter training

A 1-million-parameter Qwen2 reads docstrings of the standard library once, then is hyperfitted on 96 blocks of 64 tokens of docstrings
that it has not read; metrics are those of the stage `hyperfit`, on 48 further blocks, 24 of them continued. Seeds differ in
the blocks and their order, on the same base. Arms, all read off the same runs:

    before     the base model. Sampling it at a temperature that has the entropy of the hyperfitted model leaves its greedy text as it is
    early      the epoch with the least held-out loss: where one would stop by rule
    fitted     the last epoch

`differences` are arm minus before over the seeds with a 95 % t interval. The learning rate is 1e-3, since the model is tiny; the paper's is
1e-6. `ratio` is the type-token ratio of `fitted` over that of `before`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _harness import Cells, arguments, finish
from _judges import log_ratio
from noisefit_effect import interval

from posttrain.core.rundir import RunDir, read_json, slug

REPO = Path(__file__).resolve().parent.parent
FIGURES = ("loss", "entropy", "accuracy", "overlap", "ttr", "ttr_first", "rep4", "distinct2", "match", "ended", "train_loss")
HELD_OUT = ("argparse", "logging", "unittest", "email", "http", "xml", "urllib", "json", "typing", "collections")


def pipeline(quick: bool) -> dict[str, Any]:
    """Texts, a base model, and the stage that is measured."""
    names = list(HELD_OUT)
    size, steps = (64, 60) if quick else (128, 1500)
    common = {"method": "make.stdlib", "parts": ["docstrings"], "max_chars": 4000}
    return {
        "version": 1, "name": "hyperfit-effect-quick" if quick else "hyperfit-effect", "seed": 0,
        "stages": [
            {"name": "read", **common, "exclude_modules": names, "min_chars": 120},
            {"name": "fresh", **common, "modules": names, "min_chars": 260},
            {
                "name": "base", "method": "init", "in": {"data": "read"}, "vocab_size": 1024, "hidden_size": size,
                "intermediate_size": 4 * size, "layers": 4, "heads": 4, "kv_heads": 4, "max_length": 256,
            },
            {
                "name": "taught", "method": "sft", "in": {"data": "read"}, "steps": steps, "batch": {"rows": 16, "per_device": 16},
                "data": {"max_length": 64, "packing": True}, "optim": {"lr": 2e-3, "schedule": "cosine", "warmup": 0.05},
                "checkpoint": {"every": 500, "keep": 1}, "log_every": 100,
            },
            {
                "name": "fitted", "method": "hyperfit", "in": {"data": "fresh"}, "samples": 32 if quick else 96, "sequence_length": 64,
                "validation": 12 if quick else 48, "contexts": 6 if quick else 24, "context_tokens": 16, "window": 48, "target_loss": None,
                "epochs": 6 if quick else 40, "batch": {"rows": 8, "per_device": 8}, "optim": {"lr": 1e-3, "schedule": "constant"},
                "checkpoint": {"every": 1000, "keep": 1}, "log_every": 100,
            },
        ],
    }  # fmt: skip


def measure(plan: dict[str, Any], folder: Path, seed: int) -> dict[str, Any]:
    """The three arms of a seed, of a pipeline whose stage `fitted` is measured; a run that was stopped goes on."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{plan['name']}.json"
    file.write_text(json.dumps(plan), encoding="utf-8")
    command = [sys.executable, "-m", "posttrain", "run", str(file), f"stages.fitted.seed={seed}", "--runs", str(folder / "runs")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    code = subprocess.run(command, cwd=folder, env=environment, stdout=sys.stderr).returncode
    if code:
        sys.exit(f"seed {seed} ended with code {code}; run the same command again to go on")
    run = RunDir(folder / "runs" / slug(plan["name"]))
    found = [read_json(path) for path in run.stages.glob("*/manifest.json")]
    history = next(m["summary"]["hyperfit"] for m in found if m["name"] == "fitted" and m["seed"] == seed)
    trained = history[1:]
    return {"before": history[0], "early": min(trained, key=lambda item: item["loss"]), "fitted": trained[-1], "history": history}


def main() -> None:
    """Measures every seed and writes the result."""
    args = arguments(__doc__ or "")
    seeds = range(1) if args.quick else range(5)
    folder = Path(tempfile.gettempdir()) / "posttrain-hyperfit-effect"
    cells = Cells("hyperfit_effect", args).measure({"hyperfit": partial(measure, pipeline(args.quick), folder)}, seeds)
    rows = [cells["hyperfit", seed] for seed in seeds]
    arms: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for arm in ("before", "early", "fitted"):
        values = {name: [row[arm][name] for row in rows] for name in FIGURES if name in rows[0][arm]}
        arms[arm] = {name: interval(found) if len(found) > 1 else {"value": found[0], "n": 1} for name, found in values.items()}
        if arm != "before" and len(rows) > 1:
            differences[arm] = {
                name: interval([row[arm][name] - row["before"][name] for row in rows]) for name in values if name in rows[0]["before"]
            }  # fmt: skip
    ratio = log_ratio([row["fitted"]["ttr"] for row in rows], [row["before"]["ttr"] for row in rows]) if len(rows) > 1 else {}
    lead = {
        "ours": arms["fitted"]["ttr"]["value"], "peer": arms["before"]["ttr"]["value"], "ratio": ratio.get("value"),
        "ci95": [ratio.get("low"), ratio.get("high")], "control": None, "unit": "type-token ratio",
    }  # fmt: skip
    epochs = {"early": [row["early"]["step"] for row in rows], "fitted": [row["fitted"]["step"] for row in rows]}
    finish("hyperfit_effect", {**lead, "arms": arms, "differences": differences, "steps": epochs, "seeds": len(rows)}, args)


if __name__ == "__main__":
    main()
