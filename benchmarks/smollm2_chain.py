"""The chain on a real pretrained model: what each stage of configs/pipelines/smollm2_cpu.yaml does to SmolLM2-135M-Instruct.

    python benchmarks/smollm2_chain.py            # half an hour on 2 busy cores
    python benchmarks/smollm2_chain.py --quick    # a few steps of each trainer; its figures mean nothing

It is the run `smollm2-cpu`, the same as that of `launch/quickstart.sh --real`: what is committed there is not made again. Every
figure is read from the manifests; `seconds` of a stage are those of its last attempt.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _harness import arguments, finish
from quickstart_seeds import REPO, stages_of

from posttrain.core.rundir import RunDir, read_json, runs_root, slug

PIPELINE = REPO / "configs" / "pipelines" / "smollm2_cpu.yaml"
QUICK = (
    "eval.sets.text.rows=4", "eval.sets.tasks.rows=8", "eval.sets.tasks.samples=1",
    "stages.sft.steps=2", "stages.sft.batch.rows=4", "stages.sft.optim.warmup=0",
    "stages.rl.steps=2", "stages.rl.batch.rows=8", "stages.answers.rows=4",
)  # fmt: skip
MORE = ("steps", "tokens_unique", "tokens_supervised", "parameters_trained", "seconds_train", "bits_per_weight", "engine_check")
METRICS = ("loss", "perplexity", "accuracy", "accuracy_sampled", "pass@1", "pass@2", "pass@4")


def run_chain(runs: Path, quick: bool, overrides: list[str]) -> RunDir:
    """Runs, or goes on with, the pipeline; returns its folder. A failed run ends the benchmark."""
    name = f"smollm2-cpu{'-quick' if quick else ''}"
    chosen = [*(QUICK if quick else ()), *overrides, f"name={name}"]
    command = [sys.executable, "-m", "posttrain", "run", str(PIPELINE), *chosen, "--runs", str(runs)]
    code = subprocess.run(command, cwd=REPO, env={"HF_HUB_OFFLINE": "1", **os.environ}, stdout=sys.stderr).returncode
    if code:
        sys.exit(f"the run ended with code {code}; run the same command again to go on")
    return RunDir(runs / slug(name))


def figures(run: RunDir) -> dict[str, dict[str, Any]]:
    """`stages_of`, and what else the manifests of trainers and quantizers say."""
    found = stages_of(run)
    for path in sorted(run.stages.glob("*/manifest.json")):
        manifest = read_json(path)
        found[manifest["name"]] |= {key: manifest["summary"][key] for key in MORE if key in manifest["summary"]}
    return found


def path_of(stages: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The model's way: each metric of each set as it was before the first stage and after every one, with its interval."""
    points: list[dict[str, Any]] = []
    for name, stage in stages.items():
        evals = stage["eval"]
        moments = [("base", evals.get("before"))] if not points else []
        points += [{"after": label, **_flat(results)} for label, results in [*moments, (name, evals.get("after"))] if results]
    return points


def _flat(results: dict[str, dict[str, Any]]) -> dict[str, list[Any]]:
    return {
        f"{name}.{metric}": [value["value"], value["low"], value["high"]]
        for name, metrics in results.items()
        for metric, value in metrics.items()
        if metric in METRICS
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Command line; returns the record."""
    runs_help = {"default": None, "help": "folder of the runs (default: $POSTTRAIN_RUNS or ./runs)"}
    args = arguments(__doc__ or "", argv, runs=runs_help, set={"action": "append", "default": [], "help": "an override, as of `run`"})
    run = run_chain(runs_root(args.runs), args.quick, args.set)
    stages = figures(run)
    seconds = round(sum(stage["seconds"] for stage in stages.values()), 1)
    record = {
        "pipeline": str(PIPELINE.relative_to(REPO)), "overrides": args.set, "stage_seconds": seconds,
        "path": path_of(stages), "engine_check": next((s["engine_check"] for s in stages.values() if "engine_check" in s), None),
        "stages": stages,
    }  # fmt: skip
    return finish("smollm2_chain", record, args)


if __name__ == "__main__":
    main()
