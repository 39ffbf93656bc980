"""The run folder, its lock, and the commit protocol.

    runs/<name>/pipeline.yaml  pipeline.resolved.json  lock  plan.json  report.html
    runs/<name>/stages/03-rl-9f31c2d4a7/{config.json, env.json, attempts/N/, work/, out/, manifest.json}

Commit: files are written into `out.tmp`, flushed, the folder renamed to `out`, then the manifest written the same way.
A stage without a manifest does not exist for its readers.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.core import process
from posttrain.core.artifact import MANIFEST, OUT, InputRef
from posttrain.core.durable import disk_errors, fsync_dir, fsync_tree, write_json
from posttrain.core.hashing import digest_of, files_digest, list_files
from posttrain.errors import ArtifactError

RUNS_ENV = "POSTTRAIN_RUNS"
LOCK = "lock"
INPUTS = "inputs.json"


def slug(name: str) -> str:
    """Folder name of a run: lower-case ASCII letters, digits, `-`, `_`, `.`.

    Accents are dropped. A name with letters of another script gets a hash, so that two such names never share a folder.
    """
    parts = unicodedata.normalize("NFKD", name)
    plain = parts.encode("ascii", "ignore").decode().lower()
    short = re.sub(r"[^a-z0-9_.-]+", "-", plain).strip("-.") or "run"
    lossy = short == "run" != name.lower() or any(c.isalnum() and not c.isascii() for c in parts)
    return f"{short[:80]}-{digest_of(name)[:8]}" if lossy else short


def runs_root(given: str | None = None) -> Path:
    """`--runs`, else $POSTTRAIN_RUNS, else `./runs`."""
    return Path(given or os.environ.get(RUNS_ENV) or "runs").absolute()


@dataclass(frozen=True)
class RunDir:
    """Paths of one run."""

    path: Path

    @property
    def stages(self) -> Path:
        """Folder of the stage folders."""
        return self.path / "stages"

    def stage_dir(self, index: int, name: str, key: str) -> Path:
        """Folder of one stage; the key makes it unique, the index keeps listings in order."""
        return self.stages / f"{index + 1:02d}-{name}-{key[:10]}"

    def find(self, name: str, key: str) -> Path | None:
        """An existing folder of that stage and key, whatever its index was."""
        found = sorted(self.stages.glob(f"*-{name}-{key[:10]}")) if self.stages.is_dir() else []
        return next((p for p in found if re.fullmatch(rf"\d+-{re.escape(name)}-{key[:10]}", p.name)), None)

    def siblings(self, name: str) -> list[Path]:
        """Folders of that stage under any key, newest first."""
        if not self.stages.is_dir():
            return []
        found = [p for p in self.stages.iterdir() if re.fullmatch(rf"\d+-{re.escape(name)}-[0-9a-f]{{10}}", p.name)]
        return sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)


def is_committed(folder: Path) -> bool:
    """True if the stage has its manifest."""
    return (folder / MANIFEST).is_file()


def read_json(path: Path) -> Any:
    """Parsed JSON, or None if the file is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Manifest of a stage folder; empty if there is none, or one that cannot be read."""
    found = read_json(folder / MANIFEST)
    return found if isinstance(found, dict) and {"kind", "digest", "files"} <= found.keys() else {}


def made_from(folder: Path) -> list[dict[str, Any]]:
    """What a stage's result, or else the work of its unfinished attempt, was made from: {port, name, split, digest} each."""
    manifest = read_manifest(folder)
    if manifest:
        return [*manifest.get("inputs", []), *manifest.get("heldout", [])]
    return read_json(folder / "work" / INPUTS) or []


def changed_input(folder: Path, refs: list[InputRef]) -> str | None:
    """Name of a present input whose content is not what the stage, or its unfinished work, was made from."""
    recorded = {(i["port"], i["name"], i["split"]): i["digest"] for i in made_from(folder)}
    for ref in refs:
        if ref.digest and recorded.get((ref.port, ref.name, ref.split), ref.digest) != ref.digest:
            return ref.name
    return None


def settle_work(folder: Path, refs: list[InputRef]) -> str | None:
    """Makes the work folder fit its inputs: what was begun with other content is deleted; returns the changed input's name."""
    work, changed = folder / "work", changed_input(folder, refs)
    if changed:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / INPUTS, [{"port": r.port, "name": r.name, "split": r.split, "digest": r.digest} for r in refs])
    return changed


def retire(folder: Path) -> None:
    """Forgets a committed result and its work. The work goes first: a kill in between leaves a result that is retired again."""
    shutil.rmtree(folder / "work", ignore_errors=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in (OUT, "out.tmp"):
        shutil.rmtree(folder / name, ignore_errors=True)


def prepare_out(folder: Path) -> Path:
    """An empty `out.tmp`; leftovers of a killed attempt are removed."""
    for name in ("out.tmp", OUT):
        if (folder / name).exists() and not is_committed(folder):
            shutil.rmtree(folder / name)
    temporary = folder / "out.tmp"
    with disk_errors(temporary):
        temporary.mkdir(parents=True, exist_ok=True)
    return temporary


def commit(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Publishes `out.tmp` as the stage's artifact; returns the full manifest."""
    temporary, out = folder / "out.tmp", folder / OUT
    with disk_errors(folder):
        files = list_files(temporary)
        fsync_tree(temporary)
        os.rename(temporary, out)
        fsync_dir(folder)
    full = {**manifest, "files": files, "digest": files_digest(files)}
    write_json(folder / MANIFEST, full)
    return full


def record_processes(run: RunDir, pids: list[int]) -> None:
    """Notes the children of this run, so that a later run can end orphans."""
    write_json(run.path / ".processes.json", [{"pid": p, "start": process.start_time(p)} for p in pids])


def _end_orphans(run: RunDir, holder: dict[str, Any]) -> bool:
    """Ends the children of a run whose parent is gone; False if the parent still lives, or is on another machine."""
    if holder.get("host") != socket.gethostname() or process.alive(int(holder.get("pid") or 0), holder.get("start")):
        return False
    recorded = [(int(item["pid"]), item.get("start")) for item in read_json(run.path / ".processes.json") or []]
    process.end(recorded + [(pid, process.start_time(pid)) for pid in process.lock_holders(run.path / LOCK)])
    return True


@contextmanager
def lock(run: RunDir) -> Iterator[int]:
    """Exclusive use of a run folder; yields the descriptor that children inherit.

    Raises:
        ArtifactError: another live process holds the run; names its pid and host.
    """
    with disk_errors(run.path / LOCK):
        run.path.mkdir(parents=True, exist_ok=True)
        fd = os.open(run.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(run, fd)
        mine = {"pid": os.getpid(), "start": process.start_time(os.getpid()), "host": socket.gethostname(), "since": time.time()}
        with disk_errors(run.path / LOCK):
            os.ftruncate(fd, 0)
            os.pwrite(fd, (json.dumps(mine) + "\n").encode(), 0)
        os.set_inheritable(fd, True)
        yield fd
    finally:
        os.close(fd)


def _take(run: RunDir, fd: int, patience_s: float = 5.0, blank_s: float = 0.5) -> None:
    """Takes the flock. A holder that has not yet written its name gets `blank_s`, dying orphans get `patience_s`."""
    start = time.monotonic()
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder, waited = read_json(run.path / LOCK) or {}, time.monotonic() - start
            dying = bool(holder) and _end_orphans(run, holder)
            if waited > (patience_s if dying else 0.0 if holder else blank_s):
                raise ArtifactError(
                    f"this run is in use by process {holder.get('pid', '?')} on {holder.get('host', '?')}",
                    where=str(run.path),
                    fix="wait for it, stop it, or give the run another `name`",
                ) from None
            time.sleep(0.05)
