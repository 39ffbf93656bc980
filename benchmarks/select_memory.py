"""Does a selector's memory depend on the size of the corpus? Peak memory of `posttrain select` at 1x and at 10x.

    python benchmarks/select_memory.py            # 5 and 50 MB, about ten minutes
    python benchmarks/select_memory.py --quick    # 1 and 10 MB

    many shards   files of equal size, whose number grows with the corpus
    one shard     one file that grows with the corpus

Each run is a process of its own with one worker; its peak is what the kernel counted (`ru_maxrss`). `ours` is the peak at 10x,
`peer` at 1x, `ratio` their quotient, which must stay above 0.95; `control` is 1x over 1x. `base` is the peak of a selection
from 50 kB: the interpreter, numpy, numba with its compiled code, pyarrow, and the tables of fixed size.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _corpus
from _harness import arguments, bootstrap, finish

from posttrain.core.events import dumps

REPO = Path(__file__).resolve().parents[1]
LEAST = 0.95
SHARD_BYTES = 1_000_000


def write_copies(folder: Path, texts: list[str], size: int, shard: int) -> int:
    """Rows of about `size` bytes, the texts again and again under new ids, in files of about `shard` bytes; returns the files."""
    folder.mkdir(parents=True)
    held: list[str] = []
    written = in_file = files = number = 0
    while written < size:
        line = dumps({"id": f"r{number}", "text": f"{texts[number % len(texts)]} copy{number // len(texts)}"}) + "\n"
        held.append(line)
        written, in_file, number = written + len(line), in_file + len(line), number + 1
        if in_file >= shard or written >= size:
            (folder / f"{files:04d}.jsonl").write_text("".join(held), encoding="utf-8")
            held, in_file, files = [], 0, files + 1
    return files


def peak(work: Path, raw: Path, target: Path, options: list[str]) -> float:
    """MiB of one selection in a fresh process.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryDirectory(dir=work) as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "posttrain", "select", "dsir", f"raw={raw}/*.jsonl", f"target={target}", f"out={out}", *options]
        env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "POSTTRAIN_RUNS": folder}
        with open(Path(folder) / "log", "wb") as log:
            child = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise RuntimeError((Path(folder) / "log").read_text(encoding="utf-8", errors="replace")[-2000:])
        return usage.ru_maxrss / 1024


def main() -> None:
    """Runs both layouts."""
    args = arguments(__doc__ or "")
    small = 1_000_000 if args.quick else 5_000_000
    repeats = 1 if args.quick else 3
    corpus = _corpus.build(0, _corpus.scaled(0.05 if args.quick else 0.25) | {"salad": 0})
    texts = [row["text"] for row in corpus.raw]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_copies(work / "target", [row["text"] for row in corpus.target], 200_000, 1 << 40)
        write_copies(work / "few", texts, 50_000, 1 << 40)
        target = work / "target" / "0000.jsonl"
        base = peak(work, work / "few", target, ["rows=1"])
        parts: dict[str, Any] = {}
        for name, shard in (("many shards", SHARD_BYTES * small // 5_000_000), ("one shard", 1 << 40)):
            files = [write_copies(work / f"{name}-{times}", texts, times * small, shard) for times in (1, 10)]
            once, tenfold, again = (
                [peak(work, work / f"{name}-{times}", target, ["share=0.1"]) for _ in range(repeats)] for times in (1, 10, 1)
            )
            ratio = bootstrap([a / b for a, b in zip(once, tenfold, strict=True)])
            control = bootstrap([a / b for a, b in zip(once, again, strict=True)])
            parts[name] = {
                "ours": sorted(tenfold)[repeats // 2], "peer": sorted(once)[repeats // 2], "ratio": ratio["value"],
                "ci95": [ratio["low"], ratio["high"]], "control": control, "shards": files, "reached": ratio["value"] >= LEAST,
            }  # fmt: skip
            print(f"{name:<12} {parts[name]['peer']:.0f} MiB at 1x, {parts[name]['ours']:.0f} MiB at 10x, ratio {ratio['value']:.3f}")
    facts = {"unit": "MiB at the peak", "base": base, "megabytes": [small / 1e6, small / 1e5], "runs": repeats}
    finish("select_memory", {**parts["one shard"], **facts, "parts": parts}, args)


if __name__ == "__main__":
    main()
