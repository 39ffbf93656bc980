"""The commit under fire: each call of it fails or kills, the disk fills, the folder is read-only. Always absent or complete."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import core_kit
import pytest
from core_kit import Home

from posttrain.core import durable, rundir
from posttrain.core.artifact import open_artifact
from posttrain.core.rundir import commit, is_committed, prepare_out
from posttrain.errors import ArtifactError

CALLS = ("rename", "replace", "fsync")


class Killed(BaseException):
    """Stands for the end of the process."""


def fill(folder: Path) -> None:
    out = prepare_out(folder)
    (out / "sub").mkdir(exist_ok=True)
    for name in ("a.bin", "sub/b.bin"):
        (out / name).write_bytes(name.encode() * 100)


def count_calls(folder: Path, monkeypatch: pytest.MonkeyPatch, at: int, after: bool, error: BaseException) -> int:
    """Commits with the `at`-th system call of the commit failing, before or after it took effect; returns how many there were."""
    seen = 0

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == at and not after:
                raise error
            result = call(*args, **kwargs)
            if seen == at:
                raise error
            return result

        return inner

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrapped(getattr(os, name)))
        commit(folder, {"kind": "dataset"})
    return seen


def state(folder: Path) -> str:
    """`absent` or `complete`; anything else fails."""
    if not is_committed(folder):
        with pytest.raises(ArtifactError, match="not a committed artifact"):
            open_artifact(folder)
        return "absent"
    assert len(open_artifact(folder).manifest["files"]) == 2
    return "complete"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    fill(tmp_path / "count")
    return count_calls(tmp_path / "count", monkeypatch, 0, False, Killed())


@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")], ids=["killed", "full"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_fault_at_each_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int, after: bool, error: BaseException) -> None:
    assert calls >= 8, "2 files, 2 folders, rename, folder, manifest, replace, folder"
    states = []
    for at in range(1, calls + 1):
        folder = tmp_path / str(at)
        fill(folder)
        with pytest.raises((Killed, ArtifactError)):
            count_calls(folder, monkeypatch, at, after, error)
        states.append(state(folder))
        if states[-1] == "absent":
            fill(folder)
            commit(folder, {"kind": "dataset"})
        assert state(folder) == "complete"
        assert {p.name for p in folder.iterdir()} <= {"out", "manifest.json"} | {p.name for p in folder.glob(".manifest*")}
    assert states == sorted(states), "absent up to one point, complete from there on"
    assert states[0] == "absent" and (states[-1] == "complete" or not after)


KILL = """
import os, signal, sys
from pathlib import Path
from posttrain.core.rundir import commit
at, after, seen = int(sys.argv[2]), sys.argv[3] == "after", 0
def wrap(call):
    def inner(*args, **kwargs):
        global seen
        seen += 1
        if seen == at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*args, **kwargs)
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return inner
for name in ("rename", "replace", "fsync"):
    setattr(os, name, wrap(getattr(os, name)))
commit(Path(sys.argv[1]), {"kind": "dataset"})
"""


@pytest.mark.parametrize("after", ["before", "after"])
def test_real_kills_around_the_two_renames(tmp_path: Path, calls: int, after: str) -> None:
    for at in (5, 6, calls - 1, calls):
        folder = tmp_path / str(at)
        fill(folder)
        done = subprocess.run([sys.executable, "-c", KILL, str(folder), str(at), after])
        assert done.returncode == -signal.SIGKILL
        if state(folder) == "absent":
            fill(folder)
            commit(folder, {"kind": "dataset"})
        assert state(folder) == "complete"


def test_the_files_are_flushed_before_the_rename_and_the_manifest_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for name in CALLS:
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, call=call, name=name: (order.append(name), call(*a))[1])
    fill(tmp_path)
    commit(tmp_path, {"kind": "dataset"})
    assert order == ["fsync"] * 4 + ["rename", "fsync", "fsync", "replace", "fsync"]
    assert durable.os is rundir.os is os


# ---------------------------------------------------------------- disks


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Home:
    core_kit.prepare(monkeypatch, tmp_path)
    return Home(tmp_path, capsys)


@pytest.fixture
def small_disk(home: Home) -> Iterator[Home]:
    """The runs lie on a file system of 2 MB, where one may be mounted."""
    home.runs.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(home.runs)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    yield home
    subprocess.run(["umount", "-l", str(home.runs)], check=False)


def test_full_disk(small_disk: Home) -> None:
    home = small_disk
    assert home.run("--until", "made").code == 0
    home.trouble(used="disk")
    result = home.run("--until", "used")
    assert result.code == 4 and "the disk is full" in result.err and str(home.runs) in result.err and "Traceback" not in result.err
    assert set(home.stages()) == {"made"} and home("verify", "chain").code == 0
    home.trouble()
    assert home.run("--until", "used").code == 0, "nothing has to be cleaned up by hand"


def test_disk_that_is_full_from_the_start(small_disk: Home) -> None:
    home = small_disk
    filler = subprocess.run(["dd", "if=/dev/zero", f"of={home.runs}/filler", "bs=4096"], capture_output=True)
    assert filler.returncode
    result = home.run()
    assert result.code == 4 and "the disk is full (" in result.err and "Traceback" not in result.err
    (home.runs / "filler").unlink()
    assert home.run("--until", "made").code == 0


def test_file_size_limit(home: Home) -> None:
    home.trouble(used="disk")
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # noqa: E731
    parent = home.start("--until", "used", preexec_fn=limited)
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == 4 and "the file-size limit is reached" in err and "02-used" in err and "Traceback" not in err
    assert set(home.stages()) == {"made"} and home("verify", "chain").code == 0
    home.trouble()
    assert home.run("--until", "used").code == 0


def test_read_only_folder(home: Home) -> None:
    """As a read-only mount where one may be made, else as a folder without the right to write (not felt by root)."""
    home.runs.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(home.runs)], capture_output=True).returncode == 0
    if not mounted and os.geteuid() == 0:
        pytest.skip("root without the right to mount")
    if not mounted:
        home.runs.chmod(0o500)
    try:
        result = home.run()
    finally:
        subprocess.run(["umount", "-l", str(home.runs)], check=False) if mounted else home.runs.chmod(0o700)
    assert result.code == 4 and "Traceback" not in result.err
    assert ("read-only" if mounted else "permission denied") in result.err and str(home.runs) in result.err


def test_a_file_where_the_run_should_be(home: Home) -> None:
    home.runs.write_text("not a folder")
    result = home.run()
    assert result.code == 4 and str(home.runs) in result.err and "Traceback" not in result.err


# ---------------------------------------------------------------- two at once


def test_two_runs_on_one_folder(home: Home) -> None:
    home.trouble(used="hang")
    first = home.start()
    core_kit.wait_for(lambda: any("hanging" in p.read_text() for p in home.runs.glob("*/stages/*used*/attempts/*/events.jsonl")))
    second = home.start()
    _, err = second.communicate(timeout=30)
    assert second.returncode == 4 and f"in use by process {first.pid} on {os.uname().nodename}" in err
    assert home("prune", "chain").code == 4
    assert home("ls", "chain").code == 0, "looking is free"
    first.kill()
    first.communicate()
    holder = json.loads((home.runs / "chain" / "lock").read_text())
    assert holder["pid"] == first.pid, "the lock is stale now"
    home.trouble()
    assert home.run("--until", "used").code == 0


def test_four_at_once_end_in_one_result(home: Home) -> None:
    parents = [home.start("--until", "used") for _ in range(4)]
    ends = [(p.communicate(timeout=90)[1], p.returncode) for p in parents]
    assert {code for _, code in ends} <= {0, 4} and any(code == 0 for _, code in ends)
    assert all("in use by process" in err for err, code in ends if code == 4)
    assert home.manifest("used")["attempts"] == 1 and home("verify", "chain").code == 0
