"""The child: reads `config.json` of each folder it is given, runs the stage, commits it.

    python -m posttrain.core.worker DIR [DIR ...]

Started plainly, by torchrun, or by accelerate launch. Every rank writes `attempts/N/exit-<rank>.json`; the parent maps
the most severe one, since launchers turn every code into 1. Each stage of a warm worker is re-seeded, committed and
freed by itself, so the result is the same as from separate processes.
"""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain.core import process, registry
from posttrain.core.artifact import SCHEMA, InputRef, open_artifact
from posttrain.core.context import StageContext, World
from posttrain.core.durable import disk_errors, write_json
from posttrain.core.environment import code_version, package_versions
from posttrain.core.events import Events
from posttrain.core.rundir import commit, is_committed, prepare_out, read_json
from posttrain.errors import ArtifactError, ConfigError, PosttrainError, format_error


def world() -> World:
    """Rank and size as the launcher says."""
    return World(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def check_world(expected: int, found: World) -> None:
    """Refuses to run with another number of processes than the config says."""
    if found.size == expected:
        return
    hint = ""
    if found.size == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ:
        hint = " (`accelerate launch --cpu --num_processes N` runs one process; use torchrun on CPU)"
    raise ConfigError(
        f"expected {expected} process{'es' if expected > 1 else ''}, the launcher started {found.size}{hint}",
        where="launch.processes",
        fix=f"set launch.processes={found.size}, or start {expected} with `torchrun --nproc_per_node {expected}`",
    )


def _ref(item: dict[str, Any], *, at_start: bool = True) -> InputRef:
    ref = InputRef(**item)
    if ref.origin != "stage" or not at_start:
        return ref
    artifact = open_artifact(Path(ref.path))
    rows = artifact.manifest.get("meta", {}).get("row_type") or ref.rows
    return replace(ref, digest=artifact.digest, kind=artifact.kind, rows=rows)


def _redirect(log: Path) -> None:
    """Sends this process's stdout and stderr to the attempt's log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush(), sys.stderr.flush()
    os.dup2(fd, 1), os.dup2(fd, 2)
    os.close(fd)


def seed_all(seed: int) -> None:
    """Seeds python, numpy and torch."""
    import random

    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    if "torch" in sys.modules or importlib.util.find_spec("torch"):
        import torch

        torch.manual_seed(seed)


def free_all() -> None:
    """Lets go of what a stage left behind: launcher state, cached memory."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _barrier() -> None:
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.barrier()


def _context(folder: Path, spec: dict[str, Any], rank: World, events: Events) -> StageContext:
    inputs = {port: [_ref(item) for item in refs] for port, refs in spec["inputs"].items()}
    heldout = [_ref(item) for item in spec["heldout"]]
    evaluation = dict(spec["eval"])
    if evaluation:
        evaluation["sets"] = {n: {**s, "ref": _ref(s["ref"])} for n, s in evaluation["sets"].items()}
    out = prepare_out(folder) if rank.main else folder / "out.tmp"
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    return StageContext(
        name=spec["name"], method=spec["method"], seed=spec["seed"], inputs=inputs, out=out, work=work, events=events,
        world=rank, eval=evaluation, heldout=heldout, trust_remote_code=spec["trust_remote_code"],
    )  # fmt: skip


def _manifest(spec: dict[str, Any], method: registry.Method, cfg: Any, ctx: StageContext, started: float) -> dict[str, Any]:
    inputs = [
        {"port": port, "name": r.name, "split": r.split, "key": r.key, "digest": r.digest, "origin": r.origin}
        for port, refs in ctx.inputs.items() for r in refs
    ]  # fmt: skip
    meta = dict(ctx.meta)
    if method.rows and "row_type" not in meta:
        meta["row_type"] = method.rows if isinstance(method.rows, str) else method.rows(cfg, {p: r[0].rows for p, r in ctx.inputs.items() if r})
    return {
        "schema": SCHEMA, "kind": meta.pop("kind", method.output), "key": spec["key"], "name": spec["name"],
        "method": method.name, "method_version": method.version, "inputs": inputs, "seed": spec["seed"],
        "code": code_version(), "packages": package_versions(), "attempts": spec["attempt"],
        "started": round(started, 3), "ended": round(time.time(), 3), "seconds": round(time.time() - started, 3),
        "summary": ctx.summary, "meta": meta,
    }  # fmt: skip


def run_stage(folder: Path) -> None:
    """Runs and commits one prepared stage folder.

    Raises:
        PosttrainError: whatever the stage raises, unchanged.
    """
    spec = read_json(folder / "config.json")
    if spec is None:
        raise ArtifactError("no readable config.json", where=str(folder), fix="start the stage with `posttrain run` or `posttrain train`")
    rank = world()
    check_world(spec["processes"], rank)
    registry.use_plugins(spec["plugins"])
    method = registry.method(spec["method"])
    cfg = method.config.model_validate(spec["config"])
    attempt = folder / "attempts" / str(spec["attempt"])
    events = Events(attempt / "events.jsonl", spec["name"], main=rank.main)
    started = time.time()
    try:
        events.log(f"{spec['name']} started", method=method.name, attempt=spec["attempt"], state="start")
        ctx = _context(folder, spec, rank, events)
        seed_all(ctx.seed)
        with disk_errors(folder):
            method.run(cfg, ctx)
        _barrier()
        if rank.main:
            events.emit("commit", state="begin")
            manifest = commit(folder, _manifest(spec, method, cfg, ctx, started))
            events.emit("commit", state="end", digest=manifest["digest"], seconds=manifest["seconds"], summary=ctx.summary)
        _barrier()
    finally:
        events.close()
        shutil.rmtree(folder / "out.tmp", ignore_errors=True) if rank.main and is_committed(folder) else None


def _exit_file(folder: Path, code: int, error: str) -> None:
    spec = read_json(folder / "config.json") or {"attempt": 0}
    path = folder / "attempts" / str(spec["attempt"]) / f"exit-{world().rank}.json"
    write_json(path, {"code": code, "error": error})


def guarded(folder: Path) -> int:
    """`run_stage` with its end written to the exit file; returns the exit code."""
    from posttrain.config.redact import redact

    try:
        run_stage(folder)
        code, text = 0, ""
    except PosttrainError as error:
        code, text = error.exit_code, redact(str(error))
        print(format_error(error), file=sys.stderr)
    except MemoryError:
        code, text = 1, _out_of_memory("the machine's memory")
    except Exception as error:
        traceback.print_exc()
        oom = type(error).__name__ == "OutOfMemoryError"
        code, text = 1, _out_of_memory("the GPU's memory") if oom else redact(f"{type(error).__name__}: {error}")
    _exit_file(folder, code, text)
    return code


def _out_of_memory(what: str) -> str:
    return f"{what} is used up\n  fix: lower batch.per_device, then data.max_length (or rollout.max_tokens), or set model.gradient_checkpointing: true"


def main(argv: list[str]) -> int:
    """Runs the folders in order; stops at the first failure."""
    process.die_with_parent()
    for name in argv:
        folder = Path(name)
        if world().main and world().size == 1:
            spec = read_json(folder / "config.json") or {"attempt": 0}
            _redirect(folder / "attempts" / str(spec["attempt"]) / "stdout.log")
        code = guarded(folder)
        free_all()
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
