"""`report`, `ls`, `show`, `verify`, `prune`: verbs on what runs left on disk."""

from __future__ import annotations

import argparse
import re
import shutil
import time
from pathlib import Path
from typing import Any

from posttrain.config.fields import nearest
from posttrain.core.artifact import MANIFEST, OUT
from posttrain.core.display import clock
from posttrain.core.events import dumps
from posttrain.core.hashing import file_digest
from posttrain.core.rundir import RunDir, is_committed, lock, read_json, read_manifest, runs_root
from posttrain.core.table import render, size
from posttrain.data.mask import told
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
    near = nearest(name, known)
    fix = f"did you mean `{near}`?" if near else f"runs there: {', '.join(known) or 'none'}"
    raise ArtifactError(f"no run `{name}`", where=str(root), fix=fix)


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
    print(render(["stage", "kind", "time", "on disk", "made"], [_listed(f) for f in _stage_folders(find_run(args.run, args.runs))]))
    return 0


def _listed(folder: Path) -> list[str]:
    manifest = read_manifest(folder)
    if not manifest:
        return [folder.name, "", "", size(_bytes(folder)), "unfinished"]
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(manifest.get("ended", 0)))
    return [folder.name, manifest.get("kind", "?"), clock(manifest.get("seconds", 0)), size(_bytes(folder)), made]


def _find_stage(run: RunDir, name: str) -> Path:
    there = _stage_folders(run)
    found = [p for p in there if p.name == name or re.fullmatch(rf"\d+-{re.escape(name)}-[0-9a-f]{{10}}", p.name)]
    if not found:
        names = dict.fromkeys(p.name.partition("-")[2].rpartition("-")[0] for p in there)
        near = nearest(name, names)
        raise ArtifactError(
            f"no stage `{name}`", where=str(run.path), fix=f"did you mean `{near}`?" if near else f"stages: {', '.join(names)}"
        )
    return max(found, key=lambda p: p.stat().st_mtime)


def show(args: argparse.Namespace) -> int:
    """`posttrain show RUN [STAGE]`."""
    run = find_run(args.run, args.runs)
    for folder in [_find_stage(run, args.stage)] if args.stage else _stage_folders(run):
        print(_describe(folder))
    return 0


def _describe(folder: Path) -> str:
    manifest = read_manifest(folder)
    if not manifest:
        return f"{folder.name}: not committed; logs in {folder / 'attempts'}"
    try:
        return "\n".join([folder.name, *_facts(manifest, folder / OUT)])
    except (KeyError, TypeError) as error:
        return f"{folder.name}: unreadable manifest ({type(error).__name__}: {error}); delete the folder and run again"


def _facts(m: dict[str, Any], out: Path) -> list[str]:
    head = f"  {m['kind']} by {m['method']} v{m['method_version']}, seed {m['seed']}, {clock(m['seconds'])}, attempt {m['attempts']}"
    inputs = [f"  in.{i['port']}: {i['name']}{'' if i['split'] == 'train' else ':' + i['split']}  {i['digest'][:16]}" for i in m["inputs"]]
    files = [f"  {size(f['size']):>12}  {out / f['path']}" for f in m["files"]]
    shown = [f"  {line}" for line in told((m["summary"].get("encoding") or {}).get("shown") or [])]
    return [head, f"  digest {m['digest']}", *inputs, *files, *shown, "  " + dumps(m["summary"])[:2000]]


def damaged(folder: Path) -> list[str]:
    """What of a committed stage does not agree with its manifest; empty if all is well."""
    found = []
    try:
        files = [(folder / OUT / item["path"], item["size"], item["sha256"]) for item in read_manifest(folder)["files"]]
    except (KeyError, TypeError):
        return [f"{folder / MANIFEST}: unreadable"]
    for path, expected, sha256 in files:
        if not path.is_file():
            found.append(f"{path}: missing")
        elif path.stat().st_size != expected:
            found.append(f"{path}: expected {expected} bytes, found {path.stat().st_size}")
        elif file_digest(path) != sha256:
            found.append(f"{path}: its bytes have changed since it was committed")
    return found


def verify(args: argparse.Namespace) -> int:
    """`posttrain verify RUN`: exit 4 if any committed byte has changed; with --load quantized checkpoints are loaded again."""
    run = find_run(args.run, args.runs)
    folders = [f for f in _stage_folders(run) if is_committed(f)]
    bad = [line for folder in folders for line in damaged(folder)]
    if bad:
        raise ArtifactError(f"{len(bad)} damaged file{'s' if len(bad) > 1 else ''}\n    " + "\n    ".join(bad), where=str(run.path),
                            fix="delete the damaged stage's folder and run the pipeline again")  # fmt: skip
    print(f"{len(folders)} stages, every committed file is as it was")
    if args.load:
        from posttrain.verbs.loaders import load_again

        print("\n".join(load_again(folders)))
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
                (path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path)
        print(f"{size(total)} {'would be freed' if args.dry_run else 'freed'}")
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
