"""The child: reads `config.json` of each folder it is given, runs the stage, commits it.

    python -m posttrain.core.worker DIR [DIR ...]

Started plainly, by torchrun, or by accelerate launch. Every rank writes `attempts/N/exit-<rank>.json`; the parent maps
the most severe one, since launchers turn every code into 1. Each stage of a warm worker is re-seeded, committed and
freed by itself, so the result is the same as from separate processes.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from posttrain.core import process, registry
from posttrain.core.artifact import SCHEMA, InputRef, open_artifact
from posttrain.core.context import StageContext, World
from posttrain.core.durable import disk_errors, write_json
from posttrain.core.environment import code_version, package_versions
from posttrain.core.events import Events
from posttrain.core.rundir import commit, prepare_out, read_json, settle_work
from posttrain.errors import EXIT_PREEMPTED, ArtifactError, ConfigError, PosttrainError, format_error


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


def _ref(item: dict[str, Any]) -> InputRef:
    """A reference with what is now on disk: digest, kind and row type of the producer's artifact."""
    ref = InputRef(**item)
    if ref.origin != "stage":
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


class _SeedOnImport(MetaPathFinder):
    """Seeds torch when it is first imported, so that a stage that needs no torch does not wait for it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        """torch's own spec, with a loader that seeds after the import; None for all other modules."""
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_seed(module: Any) -> None:
                load(module)
                module.manual_seed(self.seed)

            spec.loader.exec_module = load_and_seed  # type: ignore[method-assign]
        return spec


def seed_all(seed: int) -> None:
    """Seeds python, numpy and torch; torch when it is imported, if it is not yet."""
    import random

    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _SeedOnImport)]
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
    else:
        sys.meta_path.insert(0, _SeedOnImport(seed))


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
    if rank.size == 1:
        changed = settle_work(folder, [r for refs in inputs.values() for r in refs] + heldout)
        if changed:
            events.warn(f"input `{changed}` was made again and differs; what was begun with the old one is deleted")
    return StageContext(
        name=spec["name"], method=spec["method"], seed=spec["seed"], inputs=inputs, out=out, work=folder / "work", events=events,
        world=rank, eval=evaluation, heldout=heldout, trust_remote_code=spec["trust_remote_code"],
    )  # fmt: skip


def _origin(ref: InputRef) -> dict[str, Any]:
    return {"port": ref.port, "name": ref.name, "split": ref.split, "key": ref.key, "digest": ref.digest, "origin": ref.origin}


def _manifest(spec: dict[str, Any], method: registry.Method, cfg: Any, ctx: StageContext, started: float) -> dict[str, Any]:
    inputs = [_origin(r) for refs in ctx.inputs.values() for r in refs]
    meta = dict(ctx.meta)
    if method.rows and "row_type" not in meta:
        rows = {port: refs[0].rows for port, refs in ctx.inputs.items() if refs and refs[0].rows}
        meta["row_type"] = method.rows if isinstance(method.rows, str) else method.rows(cfg, rows)
    return {
        "schema": SCHEMA, "kind": meta.pop("kind", method.output), "key": spec["key"], "name": spec["name"],
        "method": method.name, "method_version": method.version, "seed": spec["seed"],
        "inputs": inputs, "heldout": [_origin(r) for r in ctx.heldout],
        "code": code_version(), "packages": package_versions(), "attempts": spec["attempt"],
        "started": round(started, 3), "ended": round(time.time(), 3), "seconds": round(time.time() - started, 3),
        "summary": ctx.summary, "meta": meta,
    }  # fmt: skip


def _track(events: Events, spec: dict[str, Any], folder: Path) -> None:
    wanted = [tracker for tracker in spec["tracking"].get("to", []) if tracker != "jsonl"]
    if wanted:
        from posttrain.core.trackers import attach

        attach(events, wanted, spec["tracking"].get("project"), spec["tracking"]["name"], folder / "tracking")


def run_stage(folder: Path) -> None:
    """Runs and commits one prepared stage folder.

    Raises:
        PosttrainError: whatever the stage raises, unchanged.
    """
    spec = _spec(folder)
    rank = world()
    check_world(spec["processes"], rank)
    registry.use_plugins(spec["plugins"])
    method = registry.method(spec["method"])
    cfg = method.config.model_validate(spec["config"])
    events = Events(folder / "attempts" / str(spec["attempt"]) / "events.jsonl", spec["name"], main=rank.main)
    started = time.time()
    try:
        with disk_errors(folder):
            _track(events, spec, folder)
            events.log(f"{spec['name']} started", method=method.name, attempt=spec["attempt"], state="start")
            ctx = _context(folder, spec, rank, events)
            seed_all(ctx.seed)
            method.run(cfg, ctx)
            _barrier()
            if rank.main:
                events.emit("commit", state="begin")
                manifest = commit(folder, _manifest(spec, method, cfg, ctx, started))
                events.emit("commit", state="end", digest=manifest["digest"], seconds=manifest["seconds"], summary=ctx.summary)
            _barrier()
    finally:
        events.close()


def _spec(folder: Path) -> dict[str, Any]:
    spec: dict[str, Any] | None = read_json(folder / "config.json")
    if spec is None:
        raise ArtifactError("no readable config.json", where=str(folder), fix="start the stage with `posttrain run` or `posttrain train`")
    return spec


def _failure(error: BaseException) -> tuple[int, str]:
    """(exit code, text) of what ended a stage; prints the traceback of what nobody expected."""
    if isinstance(error, PosttrainError):
        _say(format_error(error))
        return error.exit_code, str(error)
    if isinstance(error, _Stopped | KeyboardInterrupt):
        return EXIT_PREEMPTED, f"stopped by {str(error) or 'SIGINT'}"
    _say("".join(traceback.format_exception(error)))
    if type(error).__name__ == "OutOfMemoryError":
        return 1, _out_of_memory("the GPU's memory")
    if isinstance(error, MemoryError):
        return 1, _out_of_memory("the machine's memory")
    text = " ".join(str(error).split())
    return 1, f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__


def _say(text: str) -> None:
    """A text for the log, which may lie on the very disk that is full."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def guarded(folder: Path) -> int:
    """`run_stage` with its end written to the rank's exit file; returns the exit code.

    What a failed attempt left in `out.tmp` is deleted first, so that a full disk has room for the exit file.
    """
    from posttrain.config.redact import redact

    rank = world()
    code, text = 0, ""
    try:
        with _stoppable():
            run_stage(folder)
    except BaseException as error:
        if rank.main:
            shutil.rmtree(folder / "out.tmp", ignore_errors=True)
        code, text = _failure(error)
    attempt = (read_json(folder / "config.json") or {}).get("attempt", 0)
    try:
        write_json(folder / "attempts" / str(attempt) / f"exit-{rank.rank}.json", {"code": code, "error": redact(text)})
    except ArtifactError as error:
        _say(format_error(error))
    return code


class _Stopped(BaseException):
    """SIGTERM came while no trainer was there to save first; no `except Exception` may swallow it."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Makes the first SIGTERM unwind the stage, so that pools are closed and the exit file is written; a second kills."""

    def stop(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise _Stopped(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _out_of_memory(what: str) -> str:
    knobs = "lower batch.per_device, then data.max_length (or rollout.max_tokens), or set model.gradient_checkpointing: true"
    return f"{what} is used up\n  fix: {knobs}"


def main(argv: list[str]) -> int:
    """Runs the folders in order; stops at the first failure."""
    process.die_with_parent()
    for name in argv:
        folder = Path(name)
        if world().size == 1:
            _redirect(folder / "attempts" / str(_spec(folder)["attempt"]) / "stdout.log")
        code = guarded(folder)
        free_all()
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
