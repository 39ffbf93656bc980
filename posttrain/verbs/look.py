"""`report`, `ls`, `show`, `verify`, `prune`: verbs on what runs left on disk."""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from posttrain.core.artifact import OUT
from posttrain.core.display import clock
from posttrain.core.events import dumps
from posttrain.core.hashing import file_digest
from posttrain.core.rundir import RunDir, is_committed, lock, read_json, runs_root
from posttrain.core.table import render, size
from posttrain.errors import ArtifactError


def find_run(name: str, runs: str | None) -> RunDir:
    """A run by folder or by name.

    Raises:
        ArtifactError: there is none; lists those there are.
    """
    for path in (Path(name), runs_root(runs) / name):
        if (path / "stages").is_dir() or (path / "pipeline.resolved.json").is_file():
            return RunDir(path.absolute())
    root = runs_root(runs)
    known = sorted(p.name for p in root.iterdir() if (p / "stages").is_dir()) if root.is_dir() else []
    raise ArtifactError(f"no run `{name}`", where=str(root), fix=f"runs there: {', '.join(known) or 'none'}")


def _stage_folders(run: RunDir) -> list[Path]:
    return sorted(p for p in run.stages.iterdir() if p.is_dir()) if run.stages.is_dir() else []


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def ls(args: argparse.Namespace) -> int:
    """`posttrain ls [RUN]`."""
    if not args.run:
        root = runs_root(args.runs)
        runs = [RunDir(p) for p in sorted(root.iterdir()) if (p / "stages").is_dir()] if root.is_dir() else []
        rows = [[r.path.name, f"{sum(map(is_committed, _stage_folders(r)))}/{len(_stage_folders(r))}", size(_bytes(r.path))] for r in runs]
        print(render(["run", "committed", "on disk"], rows) or f"no runs in {root}")
        return 0
    rows = []
    for folder in _stage_folders(find_run(args.run, args.runs)):
        manifest = read_json(folder / "manifest.json") or {}
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(manifest["ended"])) if manifest else "unfinished"
        rows.append([folder.name, manifest.get("kind", ""), clock(manifest.get("seconds", 0)), size(_bytes(folder)), made])
    print(render(["stage", "kind", "time", "on disk", "made"], rows))
    return 0


def _find_stage(run: RunDir, name: str) -> Path:
    found = [p for p in _stage_folders(run) if p.name == name or p.name.split("-", 1)[1].rsplit("-", 1)[0] == name]
    if not found:
        raise ArtifactError(f"no stage `{name}`", where=str(run.path), fix=f"stages: {', '.join(p.name for p in _stage_folders(run))}")
    return max(found, key=lambda p: p.stat().st_mtime)


def show(args: argparse.Namespace) -> int:
    """`posttrain show RUN [STAGE]`."""
    run = find_run(args.run, args.runs)
    for folder in [_find_stage(run, args.stage)] if args.stage else _stage_folders(run):
        print(_describe(folder))
    return 0


def _describe(folder: Path) -> str:
    manifest = read_json(folder / "manifest.json")
    if manifest is None:
        return f"{folder.name}: not committed; log {folder}/attempts"
    lines = [f"{folder.name}", f"  {manifest['kind']} by {manifest['method']} v{manifest['method_version']}, seed {manifest['seed']}, "
             f"{clock(manifest['seconds'])}, attempt {manifest['attempts']}", f"  digest {manifest['digest']}"]  # fmt: skip
    lines += [
        f"  in.{i['port']}: {i['name']}{'' if i['split'] == 'train' else ':' + i['split']}  {i['digest'][:16]}" for i in manifest["inputs"]
    ]
    lines += [f"  {size(f['size']):>12}  {folder / OUT / f['path']}" for f in manifest["files"]]
    return "\n".join([*lines, "  " + dumps(manifest["summary"])[:2000]])


def damaged(folder: Path) -> list[str]:
    """What does not agree with the manifest; empty if all is well."""
    manifest: dict[str, Any] = read_json(folder / "manifest.json") or {"files": []}
    found = []
    for item in manifest["files"]:
        path = folder / OUT / item["path"]
        if not path.is_file():
            found.append(f"{path}: missing")
        elif path.stat().st_size != item["size"]:
            found.append(f"{path}: expected {item['size']} bytes, found {path.stat().st_size}")
        elif file_digest(path) != item["sha256"]:
            found.append(f"{path}: its bytes have changed since it was committed")
    return found


def verify(args: argparse.Namespace) -> int:
    """`posttrain verify RUN`: exit 4 if any committed byte has changed."""
    run = find_run(args.run, args.runs)
    folders = [f for f in _stage_folders(run) if is_committed(f)]
    bad = [line for folder in folders for line in damaged(folder)]
    if bad:
        raise ArtifactError(f"{len(bad)} damaged file{'s' if len(bad) > 1 else ''}\n    " + "\n    ".join(bad), where=str(run.path),
                            fix="delete the damaged stage's folder and run the pipeline again")  # fmt: skip
    print(f"{len(folders)} stages, every committed file is as it was")
    return 0


def prune(args: argparse.Namespace) -> int:
    """`posttrain prune RUN`: deletes stage folders of older configs, and checkpoints with --work."""
    run = find_run(args.run, args.runs)
    with lock(run):
        doomed = _unused(run)
        if args.work:
            doomed += [f / "work" for f in _stage_folders(run) if is_committed(f) and (f / "work").is_dir() and f not in doomed]
        total = 0
        for path in doomed:
            total += _bytes(path)
            print(f"{'would delete' if args.dry_run else 'deleting'} {path} ({size(_bytes(path))})")
            if not args.dry_run:
                (path / "manifest.json").unlink(missing_ok=True)
                shutil.rmtree(path)
        print(f"{size(total)} {'would be' if args.dry_run else ''} freed".replace("  ", " "))
    return 0


def _unused(run: RunDir) -> list[Path]:
    """Stage folders that the newest run of this pipeline did not lead to."""
    used = read_json(run.path / "plan.json")
    if used is None:
        raise ArtifactError("no plan.json, so nothing tells what is still needed", where=str(run.path), fix="run the pipeline again first")
    return [f for f in _stage_folders(run) if f.name not in used]


def report(args: argparse.Namespace) -> int:
    """`posttrain report RUN`."""
    from posttrain.core.report import write_report

    print(write_report(find_run(args.run, args.runs)))
    return 0
