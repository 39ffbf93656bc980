"""Does the quickstart learn, or was one seed lucky? The whole pipeline for seeds 0, 1, 2, judged on the test part of its tasks.

    python benchmarks/quickstart_seeds.py            # three seeds, about half an hour on 2 cores
    python benchmarks/quickstart_seeds.py --quick    # configs/tiny/quickstart.yaml, one seed

Every figure is read from the manifests that the runs committed; `seconds` are those of the stages. Interrupted, it goes on where it
was, like any run.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _harness import Cells, arguments, finish

from posttrain.core.rundir import RunDir, read_json, runs_root, slug

REPO = Path(__file__).resolve().parent.parent
FACTS = (
    "rows_in", "rows_out", "tokens", "tokens_per_s", "steps", "kl_reduction", "kl_reduction_at_size", "kl_raw", "kl_random", "kl_picked",
    "size_bytes_before", "size_bytes",
)  # fmt: skip


def run_seed(pipeline: Path, seed: int, runs: Path) -> dict[str, Any]:
    """Runs the pipeline with one seed and returns what its manifests say; a failed run ends the benchmark."""
    name = f"{pipeline.stem}-{pipeline.parent.name}-seed-{seed}"
    command = [sys.executable, "-m", "posttrain", "run", str(pipeline), f"seed={seed}", f"name={name}", "--runs", str(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "HF_HUB_OFFLINE": "1"}
    code = subprocess.run(command, cwd=REPO, env=environment, stdout=sys.stderr).returncode
    if code:
        sys.exit(f"seed {seed} ended with code {code}; run the same command again to go on")
    stages = stages_of(RunDir(runs / slug(name)))
    return {"seconds": round(sum(stage["seconds"] for stage in stages.values()), 1), "stages": stages}


def stages_of(run: RunDir) -> dict[str, dict[str, Any]]:
    """Stage name -> seconds, evals before and after, and the single figures of its summary, in the order of the run."""
    found = {}
    for path in sorted(run.stages.glob("*/manifest.json")):
        manifest = read_json(path)
        summary = manifest["summary"]
        found[manifest["name"]] = {
            "method": manifest["method"],
            "seconds": manifest["seconds"],
            "eval": summary.get("eval", {}),
            **{name: summary[name] for name in FACTS if name in summary},
        }
    return found


def gains(results: list[dict[str, Any]], method: str, metric: str) -> dict[str, Any]:
    """Value of `metric` before and after the stage of `method` in each run, and how much it rose: each, mean and least."""
    before, after = [], []
    for result in results:
        for stage in (s for s in result["stages"].values() if s["method"] == method):
            for name, metrics in stage["eval"].get("after", {}).items():
                if metric in metrics:
                    before.append(stage["eval"]["before"][name][metric]["value"])
                    after.append(metrics[metric]["value"])
    rise = [b - a for a, b in zip(before, after, strict=True)]
    if not rise:
        return {}
    return {"before": before, "after": after, "rise": rise, "mean_rise": statistics.mean(rise), "least_rise": min(rise)}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Command line; returns the record."""
    args = arguments(__doc__ or "", argv, runs={"default": None, "help": "folder of the runs (default: $POSTTRAIN_RUNS or ./runs)"})
    pipeline = REPO / "configs" / ("tiny" if args.quick else "pipelines") / "quickstart.yaml"
    seeds = [0] if args.quick else [0, 1, 2]
    runs = runs_root(args.runs)
    cells = Cells("quickstart_seeds", args).measure({"quickstart": lambda seed: run_seed(pipeline, seed, runs)}, seeds)
    results = list(cells.values())
    metrics = sorted({m for r in results for s in r["stages"].values() for v in s["eval"].get("after", {}).values() for m in v})
    methods = ("sft", "grpo", "quantize.rtn")
    table = {method: found for method in methods if (found := {m: g for m in metrics if (g := gains(results, method, m))})}
    return finish("quickstart_seeds", {"pipeline": str(pipeline.relative_to(REPO)), "seeds": seeds, "gains": table, "runs": results}, args)


if __name__ == "__main__":
    main()
