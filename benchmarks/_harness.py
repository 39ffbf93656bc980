"""What every benchmark shares: paired timing that cannot fool itself, resumable cells, one JSON line at the end.

Timing. Baseline A and candidate B run in one process, single-threaded, garbage collector frozen, warm-up discarded, in the
order A B | A A' | B A | A' A | ... The pairs B/A give the median of paired ratios and its bootstrap 95 % interval; the
pairs A'/A are the control. No verdict is given where the control's interval excludes 1 or leaves [0.95, 1.05]: the machine
was then too noisy for any claim. CPU seconds stand beside wall seconds.

Cells. A benchmark over arms and seeds measures each (arm, seed) once; finished cells lie in a JSON-lines file beside the
result, so a run that was interrupted goes on, and `--fresh` starts over.

Results go to `benchmarks/results/NAME.json` (`NAME.quick.json` with `--quick`); the same record is the last line printed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from posttrain.core.durable import write_json
from posttrain.core.environment import code_version, package_versions
from posttrain.core.events import dumps

RESULTS = Path(__file__).resolve().parent / "results"
CONTROL_BAND = (0.95, 1.05)
Work = Callable[[], Any]


def arguments(description: str, argv: list[str] | None = None, **extra: dict[str, Any]) -> argparse.Namespace:
    """The options all benchmarks have, and `extra`: option name -> keywords of `add_argument`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a small version that shows the benchmark works; its figures are not quoted")
    parser.add_argument("--fresh", action="store_true", help="measure again what is already measured")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    for name, keywords in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **keywords)
    return parser.parse_args(argv)


def machine() -> dict[str, Any]:
    """Where a result was measured: processor, cores, threads, load, versions, commit; no host name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": model, "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS"), "platform": platform.system(),
        "python": platform.python_version(), "load": round(os.getloadavg()[0], 2), "code": code_version(), "packages": package_versions(),
    }  # fmt: skip


@contextmanager
def frozen_gc() -> Iterator[None]:
    """No garbage collection inside a timed region."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def timed(work: Work) -> tuple[float, float]:
    """(wall, CPU) seconds of one call."""
    with frozen_gc():
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        return time.perf_counter() - wall, time.process_time() - cpu


def bootstrap(values: list[float], draws: int = 2000, seed: int = 0) -> dict[str, float]:
    """Median of `values` with its percentile-bootstrap 95 % interval."""
    if not values:
        raise ValueError("nothing was measured")
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(draws))
    low, high = medians[int(0.025 * draws)], medians[min(draws - 1, int(0.975 * draws))]
    return {"value": statistics.median(values), "low": low, "high": high, "n": len(values)}


def verdict(ratio: dict[str, float], control: dict[str, float]) -> str:
    """`faster`, `slower` or `no difference` of candidate over baseline, or `too noisy` when the control says so."""
    if not (control["low"] <= 1.0 <= control["high"] and CONTROL_BAND[0] <= control["low"] and control["high"] <= CONTROL_BAND[1]):
        return "too noisy"
    if ratio["high"] < 1.0:
        return "faster"
    return "slower" if ratio["low"] > 1.0 else "no difference"


def _pair(first: Work, second: Work, prepare: Work) -> list[tuple[float, float]]:
    found = []
    for work in (first, second):
        prepare()
        found.append(timed(work))
    return found


def compare(
    baseline: Work, candidate: Work, *, pairs: int = 20, warmup: int = 2, prepare: Work = lambda: None, units: int = 1
) -> dict[str, Any]:
    """Candidate against baseline by paired ratios of time; below 1 is faster.

    Args:
        baseline, candidate: the same work done in two ways; neither may change what the other sees.
        pairs: B/A pairs, and as many A'/A control pairs; at least 20 for a figure that is quoted.
        warmup: calls of each that are not counted.
        prepare: called before each of all these calls, outside the clock.
        units: how many times the baseline's work one call of the candidate does; its time is divided by it.

    Returns:
        {"wall": {"ratio", "control", "verdict", "baseline_s", "candidate_s"}, "cpu": {...}, "pairs"}.
    """
    for _ in range(warmup):
        prepare(), baseline(), prepare(), candidate()
    ratios: dict[str, list[list[float]]] = {"b_over_a": [], "a_over_a": []}
    seconds: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for index in range(pairs):
        swap = bool(index % 2)
        for name, other in (("b_over_a", candidate), ("a_over_a", baseline)):
            one, two = _pair(other, baseline, prepare) if swap else _pair(baseline, other, prepare)
            a, b = (two, one) if swap else (one, two)
            if other is candidate:
                b = b[0] / units, b[1] / units
            ratios[name].append([b[clock] / max(a[clock], 1e-9) for clock in (0, 1)])
            if name == "b_over_a":
                seconds.append((a, b))
    return {"pairs": pairs, **{clock: _summary(ratios, seconds, column) for column, clock in enumerate(("wall", "cpu"))}}


def _summary(ratios: dict[str, list[list[float]]], seconds: list[Any], column: int) -> dict[str, Any]:
    ratio, control = (bootstrap([pair[column] for pair in ratios[name]]) for name in ("b_over_a", "a_over_a"))
    base, ours = (statistics.median(pair[arm][column] for pair in seconds) for arm in (0, 1))
    return {"ratio": ratio, "control": control, "verdict": verdict(ratio, control), "baseline_s": base, "candidate_s": ours}


def speed(compared: dict[str, Any], clock: str = "cpu") -> dict[str, Any]:
    """What a speed benchmark's last line holds, of `compare(peer, ours)`.

    Returns:
        {"ours", "peer": median seconds, "ratio": the peer's time over ours (above 1: ours is faster), "ci95": its bootstrap
        interval, "control": the same ratio of the peer against itself, "verdict", "clock"}.
    """
    found = compared[clock]
    control = {**found["control"], "value": 1 / found["control"]["value"]}
    control["low"], control["high"] = 1 / found["control"]["high"], 1 / found["control"]["low"]
    return {
        "ours": found["candidate_s"], "peer": found["baseline_s"], "ratio": 1 / found["ratio"]["value"],
        "ci95": [1 / found["ratio"]["high"], 1 / found["ratio"]["low"]], "control": control,
        "verdict": found["verdict"], "clock": clock, "pairs": compared["pairs"],
    }  # fmt: skip


class Cells:
    """Finished (arm, seed) cells of a benchmark, kept in `OUT/NAME.cells.jsonl`.

    Args:
        name: the benchmark's name.
        args: options of `arguments`.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.path = Path(args.out) / f"{_file_name(name, args)}.cells.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if args.fresh:
            self.path.unlink(missing_ok=True)
        self.done = {(cell["arm"], cell["seed"]): cell["result"] for cell in _complete_lines(self.path)}

    def measure(self, arms: dict[str, Callable[[int], Any]], seeds: Iterable[int], jobs: int = 1) -> dict[tuple[str, int], Any]:
        """Calls `arms[arm](seed)` for each cell that is not there yet; every result is on disk as soon as it is known.

        With `jobs` above 1 so many processes do it, and the functions must be those of a module, or partials of them.
        """
        wanted = [(arm, seed) for seed in seeds for arm in arms]
        missing = [cell for cell in wanted if cell not in self.done]
        if jobs == 1:
            for arm, seed in missing:
                self._keep(arm, seed, arms[arm](seed))
        else:
            with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
                running = {pool.submit(arms[arm], seed): (arm, seed) for arm, seed in missing}
                for future in as_completed(running):
                    self._keep(*running[future], future.result())
        return {cell: self.done[cell] for cell in wanted}

    def _keep(self, arm: str, seed: int, result: Any) -> None:
        self.done[arm, seed] = result
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(dumps({"arm": arm, "seed": seed, "result": result}) + "\n")


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """Parsed lines; a last one that was cut off by a kill is dropped from the file too, so that the next is not glued to it."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def _file_name(name: str, args: argparse.Namespace) -> str:
    return f"{name}.quick" if args.quick else name


def _told(argv: list[str]) -> list[str]:
    """Arguments without folders, which are of this machine only."""
    kept = [word for word, before in zip(argv, ["", *argv], strict=False) if "--out" not in (word, before)]
    return [Path(word).name if word.startswith("/") else word for word in kept if not word.startswith("--out=")]


def finish(name: str, result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Adds machine and command, writes `OUT/NAME.json` and prints the record as the last line."""
    command = "python " + " ".join([f"benchmarks/{name}.py", *_told(sys.argv[1:])])
    record = {"name": name, "quick": bool(args.quick), "command": command, "machine": machine(), **result}
    write_json(Path(args.out) / f"{_file_name(name, args)}.json", record)
    print(dumps(record), flush=True)
    return record
