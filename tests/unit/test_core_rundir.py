"""Names, stage folders, the lock, the commit, and artifacts as they are opened again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.core import process
from posttrain.core.artifact import InputRef, open_artifact
from posttrain.core.rundir import (
    RunDir,
    changed_input,
    commit,
    is_committed,
    lock,
    prepare_out,
    record_processes,
    retire,
    runs_root,
    settle_work,
    slug,
)
from posttrain.errors import ArtifactError

MANIFEST = {"kind": "dataset", "inputs": [], "meta": {}}


def committed(folder: Path, text: str = "x") -> dict:
    (prepare_out(folder) / "a.txt").write_text(text)
    return commit(folder, MANIFEST)


@pytest.mark.parametrize(
    ("name", "folder"),
    [("My Run", "my-run"), ("café [1] 100%", "cafe-1-100"), ("a_b-c.d", "a_b-c.d"), ("../../etc", "etc"), ("run", "run"), ("  x  ", "x")],
)
def test_slug(name: str, folder: str) -> None:
    assert slug(name) == folder


def test_names_of_other_scripts_do_not_share_a_folder() -> None:
    names = ["первый", "второй", "実験", "...", "run", "β-run", "γ-run"]
    assert len({slug(n) for n in names}) == len(names)
    assert all(s.isascii() and "/" not in s for s in map(slug, names))


def test_runs_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POSTTRAIN_RUNS", raising=False)
    assert runs_root() == tmp_path / "runs"
    monkeypatch.setenv("POSTTRAIN_RUNS", "elsewhere")
    assert runs_root() == tmp_path / "elsewhere"
    assert runs_root("given") == tmp_path / "given"


def test_stage_folders_are_found_by_name_and_key_whatever_their_index(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a [1] %")
    key = "0123456789abcdef"
    assert run.find("sft", key) is None and run.siblings("sft") == []
    folder = run.stage_dir(2, "sft", key)
    folder.mkdir(parents=True)
    run.stage_dir(1, "more-sft", key).mkdir()
    assert folder.name == "03-sft-0123456789"
    assert run.find("sft", key) == folder and run.find("sft", "f" * 10) is None
    assert run.siblings("sft") == [folder]


def test_commit_and_open(tmp_path: Path) -> None:
    manifest = committed(tmp_path)
    assert is_committed(tmp_path) and not (tmp_path / "out.tmp").exists()
    for place in (tmp_path, tmp_path / "out"):
        artifact = open_artifact(place)
        assert (artifact.kind, artifact.digest, artifact.path) == ("dataset", manifest["digest"], tmp_path / "out")


@pytest.mark.parametrize(("damage", "words"), [("", "missing"), ("longer", "expected 1 bytes, found 6 bytes")])
def test_damaged_artifact(tmp_path: Path, damage: str, words: str) -> None:
    committed(tmp_path)
    (tmp_path / "out" / "a.txt").write_text(damage) if damage else (tmp_path / "out" / "a.txt").unlink()
    with pytest.raises(ArtifactError, match=words):
        open_artifact(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"files": []}', '{"files": 3, "kind": "a", "digest": "b"}', '{"files": [{}], "kind": "a", "digest": "b"}']
)
def test_unreadable_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="unreadable manifest"):
        open_artifact(tmp_path)


def test_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a committed artifact"):
        open_artifact(tmp_path / "nowhere")


def test_prepare_out_removes_leftovers_only_of_what_is_not_committed(tmp_path: Path) -> None:
    for name in ("out.tmp", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("1")
    assert list(prepare_out(tmp_path).iterdir()) == [] and not (tmp_path / "out").exists()
    committed(tmp_path)
    prepare_out(tmp_path)
    assert open_artifact(tmp_path)


def test_retire_takes_the_work_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed(tmp_path)
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        retire(tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "work").exists() and open_artifact(tmp_path)
    retire(tmp_path)
    assert list(tmp_path.iterdir()) == []


def ref(digest: str, name: str = "made") -> InputRef:
    return InputRef("data", name, "stage", "dataset", digest=digest)


def test_work_begun_with_other_input_is_deleted(tmp_path: Path) -> None:
    assert settle_work(tmp_path, [ref("a")]) is None
    (tmp_path / "work" / "checkpoint").write_text("1")
    assert settle_work(tmp_path, [ref("a"), ref("n", "new")]) is None
    assert (tmp_path / "work" / "checkpoint").exists()
    assert changed_input(tmp_path, [ref("")]) is None
    assert changed_input(tmp_path, [ref("b")]) == "made"
    assert settle_work(tmp_path, [ref("b")]) == "made"
    assert not (tmp_path / "work" / "checkpoint").exists()
    assert settle_work(tmp_path, [ref("b")]) is None


HOLD = """
import os, subprocess, sys, time
from pathlib import Path
from posttrain.core import process
from posttrain.core.rundir import RunDir, lock, record_processes
run = RunDir(Path(sys.argv[1]))
with lock(run) as fd:
    if sys.argv[2] == "orphan":
        apart = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], close_fds=False, start_new_session=True)"
        inner = f"import subprocess, sys, time; p = {apart}; time.sleep(60)"
        child = subprocess.Popen([sys.executable, "-c", inner], pass_fds=[fd], start_new_session=True)
        if sys.argv[3] == "recorded":
            record_processes(run, [child.pid])
        time.sleep(0.7)
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path, *how: str) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *how], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


def test_second_user_is_refused_at_once_and_told_by_whom(tmp_path: Path) -> None:
    child = holder(tmp_path, "plain", "")
    try:
        start = time.monotonic()
        with pytest.raises(ArtifactError, match=rf"in use by process {child.pid} on {os.uname().nodename}"), lock(RunDir(tmp_path)):
            pass
        assert time.monotonic() - start < 1
    finally:
        child.kill()
        child.wait()


def test_stale_lock_is_taken_over(tmp_path: Path) -> None:
    child = holder(tmp_path, "plain", "")
    child.kill()
    child.wait()
    with lock(RunDir(tmp_path)):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("known", ["recorded", "unknown"])
def test_orphans_of_a_killed_parent_are_ended(tmp_path: Path, known: str) -> None:
    """Also grandchildren in sessions of their own, and children that nobody wrote down, since they hold the lock."""
    child = holder(tmp_path, "orphan", known)
    family = process.descendants(child.pid)
    assert len(family) == 2
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert all(process.alive(p, None) for p in family)
    with lock(RunDir(tmp_path)):
        assert not any(process.alive(p, None) for p in family)


def test_a_holder_on_another_machine_is_left_alone(tmp_path: Path) -> None:
    child = holder(tmp_path, "plain", "")
    record_processes(RunDir(tmp_path), [child.pid])
    (tmp_path / "lock").write_text(json.dumps({"pid": 2**22 + 1, "start": "1", "host": "another"}))
    try:
        with pytest.raises(ArtifactError, match="on another"), lock(RunDir(tmp_path)):
            pass
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()
