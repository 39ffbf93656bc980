"""Process identity: alive, zombies, families, locks, dying with the parent."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.core import process


@pytest.fixture
def sleeper():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield child
    child.kill()
    child.wait()


def test_alive(sleeper: subprocess.Popen) -> None:
    started = process.start_time(sleeper.pid)
    assert started and process.alive(sleeper.pid, started) and process.alive(sleeper.pid, None)
    assert not process.alive(sleeper.pid, "12")
    sleeper.kill()
    time.sleep(0.1)
    assert process.start_time(sleeper.pid) is None, "a zombie is not alive"


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 5])
def test_no_such_process(pid: int) -> None:
    assert process.start_time(pid) is None and not process.alive(pid, None)


def test_names_with_brackets_and_spaces_are_read(tmp_path: Path) -> None:
    odd = tmp_path / "a) b (c"
    odd.symlink_to("/bin/sleep")
    child = subprocess.Popen([str(odd), "60"])
    try:
        assert process.alive(child.pid, process.start_time(child.pid))
        assert child.pid in process.descendants(os.getpid())
    finally:
        child.kill()
        child.wait()


def test_end_takes_the_family(tmp_path: Path) -> None:
    apart = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)"
    inner = f"import subprocess, sys, time; {apart}; print(1, flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", inner], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline()
    family = [child.pid, *process.descendants(child.pid)]
    assert len(family) == 2
    process.end([(child.pid, process.start_time(child.pid)), (2**22 + 5, None), (os.getpid(), "never")])
    assert not any(process.alive(p, None) for p in family)
    child.wait()


def test_lock_holders(tmp_path: Path, sleeper: subprocess.Popen) -> None:
    path = tmp_path / "lock"
    assert process.lock_holders(path) == []
    with open(path, "w") as held, open(path) as waiting:
        assert process.lock_holders(path) == []
        fcntl.flock(held, fcntl.LOCK_EX)
        assert process.lock_holders(path) == [os.getpid()]
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[held.fileno()])
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[waiting.fileno()])
        try:
            assert set(process.lock_holders(path)) == {os.getpid(), child.pid}
        finally:
            for p in (child, other):
                p.kill()
                p.wait()


def test_child_dies_with_its_parent() -> None:
    inner = "import os, time; from posttrain.core import process; process.die_with_parent(); print(os.getpid(), flush=True); time.sleep(60)"
    outer = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {inner!r}]); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert process.alive(child, None)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while process.alive(child, None) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not process.alive(child, None)


def test_child_whose_parent_is_gone_already_ends() -> None:
    code = "from posttrain.core.process import die_with_parent as d; d(1234567); print('lived')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
