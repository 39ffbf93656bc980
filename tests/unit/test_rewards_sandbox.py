"""The sandbox: limits, isolation, what is left behind, and that it works where a machine allows nothing but limits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from posttrain.core.process import alive, descendants, start_time
from posttrain.errors import RewardError
from posttrain.rewards.sandbox import pool as pools
from posttrain.rewards.sandbox.jail import Limits
from posttrain.rewards.sandbox.pool import CODE, MATH, Outcome, Pool, Task, protection

FAST = Limits(wall_s=1.0, memory_mb=256, output_bytes=10_000, file_mb=2, processes=8)
HANG = ["7", "7^{7^{7^{7^7}}}"]


def alone(program: str, limits: Limits = FAST, pool: Pool = CODE, stdin: str = "") -> Outcome:
    """Outcome of a program that runs by itself."""
    return pool.run([Task({"alone": True, "program": program}, stdin=stdin)], limits)[0][0]


def jails() -> list[str]:
    """Folders of jails that are there now."""
    return [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("posttrain-jail-")]


@pytest.fixture(scope="module")
def bare():
    """A pool without namespaces, Landlock and seccomp."""
    found = Pool("code", workers=1, bare=True)
    yield found
    found.close()


@pytest.fixture(params=["shielded", "bare"])
def pool(request, bare):
    """Every protection this machine has, and none."""
    return CODE if request.param == "shielded" else bare


def test_output_and_exit_code(pool):
    program = "import sys\nprint(input()[::-1])\nprint('e', file=sys.stderr)\nsys.exit(3)"
    found = alone(program, pool=pool, stdin="abc\n")
    assert (found.status, found.code) == ("done", 3)
    assert sorted(found.output.split()) == ["cba", "e"]


@pytest.mark.parametrize(("program", "status"), [
    ("while True: pass", "timeout"),
    ("import time\ntime.sleep(60)", "timeout"),
    ("import signal, time\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
     "while True: time.sleep(1)", "timeout"),
    ("print('x' * 10_000_000)", "output"),
    ("import os\nos.close(1); os.close(2)\nwhile True: pass", "timeout"),
    ("import os, sys\nif os.fork(): sys.exit(0)\nos.setsid()\nwhile True: pass", "done"),
])  # fmt: skip
def test_whatever_it_does_it_ends_in_time_with_nothing_left(pool, program, status):
    alone("", pool=pool)
    start = time.monotonic()
    found = alone(program, pool=pool)
    assert time.monotonic() - start < FAST.wall_s * 1.1 + 1
    assert found.status == status
    assert not [below for worker in pool.pids() for below in descendants(worker)]


def test_memory_is_bounded(pool):
    found = alone("x = bytearray(10 << 30)\nprint('got it')", pool=pool)
    assert "got it" not in found.output and "MemoryError" in found.output and found.code


def test_files_are_bounded(pool):
    one = alone("f = open('big', 'wb')\nf.write(b'x' * (5 << 20)); f.flush()", pool=pool)
    assert one.code and "File too large" in one.output
    many = "i = 0\nwhile True:\n    open(f'f{i}', 'wb').write(b'x' * (1 << 20)); i += 1"
    assert alone(many, pool=pool).status == "disk"


def test_processes_are_bounded(pool):
    slow = "import os, time\nwhile True:\n    os.fork()\n    time.sleep(0.02)"
    start = time.monotonic()
    found = alone(slow, pool=pool)
    assert found.status in ("processes", "timeout") or "BlockingIOError" in found.output
    assert time.monotonic() - start < FAST.wall_s * 1.1 + 1
    assert not [below for worker in pool.pids() for below in descendants(worker)]


def test_threads_are_bounded():
    alone("")
    if CODE.shield["user"] == "same":
        pytest.skip("root without a user of its own: threads are not counted")
    program = "import threading, time\nfor _ in range(100): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    found = alone(program)
    assert found.code and "can't start new thread" in found.output


def test_it_sees_nothing_of_ours(pool):
    program = "import os\nprint(sorted(os.environ))\nprint(os.listdir('.'))\nprint(os.getcwd())\n" + (
        "for fd in range(64):\n    try:\n        os.fstat(fd)\n        print('open', fd)\n    except OSError: pass"
    )
    environment, here, folder, *opened = alone(program, pool=pool).output.splitlines()
    assert environment == "['MKL_NUM_THREADS', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'PYTHONHASHSEED']"
    assert here == "[]" and "posttrain-jail-" in folder and not Path(folder).exists()
    assert opened == ["open 0", "open 1", "open 2"]


def test_no_file_of_ours_can_be_read_or_written(tmp_path):
    alone("")
    if not CODE.shield["files"]:
        pytest.skip("no Landlock here")
    secret = tmp_path / "tests.jsonl"
    secret.write_text("the answers")
    os.chmod(secret, 0o644)
    found = alone(f"print(open({str(secret)!r}).read())")
    assert "PermissionError" in found.output and "the answers" not in found.output
    assert "PermissionError" in alone(f"open({str(tmp_path / 'new')!r}, 'w')").output
    assert "PermissionError" in alone(f"import os\nos.listdir({str(Path(__file__).parent)!r})").output
    assert alone("open('own', 'w').write('x')\nprint(open('own').read())").output == "x\n"


def test_no_network_and_no_signals():
    alone("")
    if not CODE.shield["calls"]:
        pytest.skip("no seccomp here")
    assert "PermissionError" in alone("import socket\nsocket.socket()").output
    killed = alone(f"import os\nos.kill({os.getpid()}, 0)").output
    assert "ProcessLookupError" in killed or "PermissionError" in killed
    assert "PermissionError" in alone(f"import os\nopen('/proc/{os.getpid()}/mem', 'rb')").output


def test_the_parent_of_a_jail_cannot_be_killed():
    program = (
        "import os, signal\nfor pid in (os.getppid(), -1):\n    try: os.kill(pid, signal.SIGKILL)\n    except OSError: pass\nprint('on')"
    )
    alone("")
    if not (CODE.shield["calls"] or CODE.shield["pids"]):
        pytest.skip("neither seccomp nor process namespaces here")
    before = sorted(CODE.pids())
    assert alone(program).status == "done"
    assert sorted(CODE.pids()) == before


def test_folders_are_removed_whatever_is_in_them(pool):
    before = jails()
    deep = (
        "import os\nfor _ in range(200):\n    os.mkdir('d'); os.chdir('d')\nopen('f', 'w').close()\nos.symlink('/', 's')\nos.chmod('.', 0)"
    )
    alone(deep, pool=pool)
    alone("import os\nos.symlink('/etc', 'link')\nos.mkfifo('pipe')\nos.mkdir('locked')\nos.chmod('locked', 0)", pool=pool)
    assert jails() == before and Path("/etc/passwd").exists()


def test_a_few_that_hang_do_not_starve_the_others():
    tasks = [Task(items=[HANG, ["7", "\\sqrt{49}"], ["x+1", "1+x"]], apart=True)] + [Task(items=[["7", "\\sqrt{49}"]])] * 6
    found = MATH.run(tasks, Limits(wall_s=2.0), 30.0)
    assert [item.status for item in found[0]] == ["timeout", "done", "done"]
    assert all(item[0] == Outcome("done", True) for item in found[1:])


def test_the_time_of_a_batch_is_kept_and_the_rest_is_late():
    MATH.run([Task(items=[["7", "\\sqrt{49}"]])] * 4, Limits(), 60.0)
    tasks = [Task(items=[HANG] * 3, apart=True) for _ in range(8)]
    start = time.monotonic()
    found = MATH.run(tasks, Limits(wall_s=30.0), 1.5)
    assert time.monotonic() - start < 2.5
    statuses = {item.status for items in found for item in items}
    assert "late" in statuses and statuses <= {"late", "timeout"}


def test_items_that_share_a_fate():
    hang = "def f(n):\n    while n == 2: pass\n    return n"
    tests = ["assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 3"]
    (found,) = CODE.run([Task({"program": hang}, items=tests)], FAST)
    assert [item.status for item in found] == ["done", "timeout", "timeout"]


def test_a_worker_that_is_killed_costs_its_item_alone():
    def kill() -> None:
        time.sleep(0.5)
        for worker in {pid for pid in descendants(os.getpid()) if pid in known}:
            os.kill(worker, signal.SIGKILL)

    pool = Pool("code", workers=2)
    pool.run([Task({"alone": True, "program": ""})] * 4, FAST)
    known = set(pool.pids())
    killer = threading.Thread(target=kill)
    killer.start()
    sleeper = Task({"alone": True, "program": "import time\ntime.sleep(50)"})
    found = pool.run([sleeper, sleeper], Limits(wall_s=3.0))
    killer.join()
    assert {item[0].status for item in found} <= {"died", "timeout"} and "died" in {item[0].status for item in found}
    assert alone("print(1)", pool=pool).output == "1\n"
    pool.close()
    assert not pool.pids()


def test_threads_share_the_workers():
    found: dict[int, str] = {}

    def work(number: int) -> None:
        found[number] = alone(f"print({number})").output

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: f"{i}\n" for i in range(8)}
    assert len(CODE.pids()) <= pools.default_workers()


def test_a_worker_outlives_the_thread_that_started_it():
    pool = Pool("code", workers=1)
    thread = threading.Thread(target=lambda: alone("", pool=pool))
    thread.start()
    thread.join()
    (pid,) = pool.pids()
    time.sleep(0.3)
    assert alone("print(1)", pool=pool).output == "1\n" and pool.pids() == [pid]
    pool.close()


PARENT = """
import sys, threading, time
from posttrain.rewards.sandbox.jail import Limits
from posttrain.rewards.sandbox.pool import CODE, Task
CODE.run([Task({"alone": True, "program": ""})], Limits())
program = "import os, time\\nos.fork()\\nos.fork()\\ntime.sleep(100)"
threading.Thread(target=lambda: CODE.run([Task({"alone": True, "program": program})], Limits(wall_s=100.0), 100.0), daemon=True).start()
time.sleep(1.5)
print("ready", flush=True)
time.sleep(100)
"""


@pytest.mark.multiproc
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_everything_dies_with_the_parent(how):
    before = jails()
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert parent.stdout and parent.stdout.readline() == "ready\n"
    family = [(pid, start_time(pid)) for pid in descendants(parent.pid)]
    assert len(family) >= 5
    parent.send_signal(how)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while any(alive(*process) for process in family) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [process for process in family if alive(*process)]
    time.sleep(0.2)
    assert jails() == before


def test_a_forked_process_starts_workers_of_its_own():
    alone("")
    ours, (reading, writing) = CODE.pids(), os.pipe()
    child = os.fork()
    if child == 0:
        text = alone("print(2)").output + str(not set(ours) & set(CODE.pids()))
        CODE.close()
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    assert os.read(reading, 100) == b"2\nTrue"
    os.close(reading)
    assert alone("print(3)").output == "3\n"


def test_a_kind_that_does_not_start_is_an_error():
    with pytest.raises(RewardError, match="did not start"):
        Pool("nothing").run([Task()], FAST)


def test_what_protects_is_told():
    there, missing = protection()
    assert isinstance(there, list) and all(isinstance(text, str) for text in missing)
    assert bool(missing) == bool(CODE.shield["missing"])


def test_what_is_missing_is_logged_once(caplog):
    pool = Pool("code")
    for _ in range(2):
        pool.greet({"missing": ["no process namespace"]})
    assert [record.message for record in caplog.records] == ["the sandbox of rewards works without: no process namespace"]


def test_ends_of_input():
    assert CODE.run([], FAST) == []
    assert alone("print(open(0).read())", stdin="").output == "\n"
