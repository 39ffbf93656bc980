"""What confines one process of the sandbox, and how it is ended with all that it started. Standard library only.

Every jailed process has: an address-space, processor-time, file-size, descriptor and process limit; a folder of its own as
current folder, removed afterwards; no descriptor but those given; an empty environment but for thread counts of numerical
libraries. Beyond that, what the kernel and the container allow, tried once in each worker (`Shield`):

- *network*: no network and System V namespace with an interface in it;
- *pids*: a process namespace of its own, so that one kill ends all in it, at once and without a race;
- *user*: under root a user number that nobody else has, so that the process limit counts this jail only; otherwise a user
  namespace without capabilities;
- *files*: Landlock: only Python's own folders may be read and only the jail's folder be written;
- *calls*: seccomp: no sockets, no tracing, no signals to others.

`end_all` works without any of them: it stops and kills descendants until none is left, adopting orphans as it goes.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from posttrain.rewards.sandbox import kernel

KEPT_VARIABLES = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
OPEN_FILES = 64
FIRST_USER = 1_800_000_000
SLACK = 64
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/etc/passwd", "/etc/group", *DEVICES)


@dataclass(frozen=True)
class Limits:
    """Limits of one task.

    Args:
        wall_s: seconds on the clock for one item, after which everything is killed.
        task_s: the same for all items of a task.
        cpu_s: processor seconds of one process, rounded up.
        memory_mb: address space of one process, in MiB beyond what the interpreter has.
        output_bytes: of standard output and error together.
        file_mb: size of one file, and of the whole folder, in MiB.
        processes: processes and threads alive at once.
    """

    wall_s: float = 5.0
    task_s: float = math.inf
    cpu_s: float = 60.0
    memory_mb: int = 1024
    output_bytes: int = 1 << 18
    file_mb: int = 16
    processes: int = 16


@dataclass(frozen=True)
class Shield:
    """What protects beyond limits; see the module. `missing` names what this machine does not allow."""

    network: bool
    pids: bool
    user: str
    files: int
    calls: bool
    capabilities: int = 0
    uncounted: int = 0

    def counts(self) -> bool:
        """The kernel holds jails to their process limit; root's processes are not counted."""
        return self.user != "same" or os.geteuid() != 0

    def missing(self) -> list[str]:
        """Protections that are not there, for people."""
        found = {
            "no network namespace": self.network or self.calls,
            "no process namespace": self.pids,
            "no user of its own": self.user != "same",
            "no Landlock, so that files can be read": self.files > 0,
            "no seccomp": self.calls,
        }
        return [text for text, there in found.items() if not there]


def bare_shield() -> Shield:
    """Limits and killing alone, which every Linux allows."""
    kernel.adopt_orphans()
    kernel.hide_memory()
    return Shield(network=False, pids=False, user="same", files=0, calls=False, uncounted=_own_threads() + SLACK)


def raise_shield() -> Shield:
    """Leaves the worker's namespaces, once, as far as it may, and tells what its jails will have."""
    root, user = os.geteuid() == 0, "same"
    network = _tried(kernel.NEW_NET | kernel.NEW_IPC) if root else False
    if not root and _tried(kernel.NEW_USER | kernel.NEW_NET | kernel.NEW_IPC):
        network, user = True, "namespace"
    files = kernel.landlock_version()
    capabilities = 0
    if root and _succeeds(lambda: kernel.become(FIRST_USER, 0)):
        readable = _succeeds(lambda: _read_as(FIRST_USER, 0))
        if not readable and files and _succeeds(lambda: _read_as(FIRST_USER, kernel.READ_ANY_FILE)):
            capabilities, readable = kernel.READ_ANY_FILE, True
        user = "own" if readable else "same"
    kernel.adopt_orphans()
    kernel.hide_memory()
    return Shield(
        network=network,
        pids=_succeeds(_try_pids),
        user=user,
        files=files,
        calls=kernel.can_filter_calls() and _succeeds(_try_calls),
        capabilities=capabilities,
        uncounted=0 if user == "own" or (user == "namespace" and _kernel() >= (5, 14)) else _own_threads() + SLACK,
    )


def _tried(flags: int) -> bool:
    uid, gid = os.geteuid(), os.getegid()

    def leave() -> None:
        kernel.unshare(flags)
        if flags & kernel.NEW_USER:
            kernel.map_self(uid, gid)

    if not _succeeds(leave):
        return False
    leave()
    return True


def _succeeds(action: Callable[[], object]) -> bool:
    """Tries it in a child process."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            action()
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _read_as(user: int, capabilities: int) -> None:
    kernel.become(user, capabilities)
    for path in {os.__file__, contextlib.__file__, *(p for p in sys.path if os.path.isdir(p))}:
        os.listdir(path) if os.path.isdir(path) else Path(path).read_bytes()


def _try_pids() -> None:
    kernel.unshare(kernel.NEW_PID)
    child = os.fork()
    if child == 0:
        os._exit(0 if os.getpid() == 1 else 1)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise OSError("no process namespace")


def _try_calls() -> None:
    kernel.no_new_privileges()
    kernel.filter_calls(None)


def _kernel() -> tuple[int, int]:
    parts = os.uname().release.split(".")
    return int(parts[0]), int(parts[1].split("-")[0])


def _own_threads() -> int:
    count, user = 0, os.getuid()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == user:
                count += len(os.listdir(entry / "task"))
    return count


def jail_user(role: int) -> int:
    """Number of the user of this worker's jails, different for each of two roles; called in the worker."""
    return FIRST_USER + (os.getpid() % 50_000_000) * 2 + role


def spawn(
    shield: Shield,
    limits: Limits,
    folder: Path,
    role: int,
    descriptors: Mapping[int, int],
    target: Callable[[], int],
    first: Callable[[], None] | None = None,
) -> int:
    """Starts `target` in a jail; returns the process id of its keeper, whose exit code is the target's (128 + signal if killed).

    Args:
        folder: its current folder.
        role: 0 or 1; jails of different roles cannot touch one another.
        descriptors: number in the jail, from 0 without gaps -> descriptor here; all others are closed.
        target: runs confined; its result is the exit code.
        first: runs before, in the keeper, unconfined and with this process's descriptors.
    """
    worker, user = os.getpid(), jail_user(role)
    keeper = os.fork()
    if keeper:
        return keeper
    code = 70
    try:
        kernel.die_with_parent(worker)
        os.setsid()
        if first:
            first()
        if shield.pids:
            kernel.unshare(kernel.NEW_PID)
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            _confine(shield, limits, folder, user, descriptors, parent)
            kernel.hide_memory(role == 0)
            code = target()
            os._exit(code)
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        os.closerange(3, 65536)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        code = 128 - code if code < 0 else code
    finally:
        os._exit(code)


def _confine(shield: Shield, limits: Limits, folder: Path, user: int, descriptors: Mapping[int, int], keeper: int) -> None:
    os.chdir(folder)
    _place(descriptors)
    _set_limits(limits, shield)
    if shield.user == "own":
        kernel.become(user, shield.capabilities)
    elif os.geteuid() == 0 or shield.user == "namespace":
        kernel.set_capabilities(0)
    kernel.die_with_parent(keeper, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(KEPT_VARIABLES)
    kernel.no_new_privileges()
    if shield.files:
        own = {*sys.path, sys.prefix, sys.base_prefix, sys.exec_prefix}
        kernel.landlock(shield.files, [Path(p) for p in (*own, *SYSTEM) if p], [folder, Path("/dev/null")])
    if shield.calls:
        kernel.filter_calls(None if shield.pids else os.getpid())


def _place(descriptors: Mapping[int, int]) -> None:
    import fcntl

    high = {number: fcntl.fcntl(given, fcntl.F_DUPFD, 64) for number, given in descriptors.items()}
    for number, given in high.items():
        os.dup2(given, number, inheritable=number < 3)
    os.closerange(len(descriptors), 65536)


def _set_limits(limits: Limits, shield: Shield) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    seconds = int(limits.cpu_s) + 1
    wanted = {
        resource.RLIMIT_AS: used + (limits.memory_mb << 20),
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: limits.file_mb << 20,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: limits.processes + shield.uncounted + (4 if shield.user == "namespace" else 0),
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def descendants() -> list[int]:
    """Live processes below this one, as far as they can be seen now."""
    below: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError):
                text = Path(f"/proc/{entry}/stat").read_text()
                state, parent = text[text.rindex(")") + 2 :].split()[:2]
                if state not in "ZX":
                    below.setdefault(int(parent), []).append(int(entry))
    found, todo = [], [os.getpid()]
    while todo:
        children = below.get(todo.pop(), [])
        found += children
        todo += children
    return found


def end_all(shield: Shield, patience_s: float = 10.0) -> dict[int, int]:
    """Kills all descendants and waits for them; returns exit code by process id of direct children.

    Without a process namespace each sweep first stops what it sees, so that a fork bomb cannot outrun it.
    """
    codes: dict[int, int] = {}
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if not shield.pids:
            _signal(descendants(), signal.SIGSTOP)
        if shield.user == "own" and not shield.pids:
            _kill_users()
        _signal(descendants(), signal.SIGKILL)
        if not reap(codes, 0.01):
            return codes
    return codes


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _kill_users() -> None:
    """Kills every process of the jails' users, wherever it hides."""
    for role in (0, 1):
        user = jail_user(role)
        helper = os.fork()
        if helper == 0:
            with contextlib.suppress(OSError):
                os.setresuid(user, user, user)
                os.kill(-1, signal.SIGKILL)
            os._exit(0)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(helper, 0)


def reap(codes: dict[int, int], wait_s: float = 0.0) -> bool:
    """Collects ended children into `codes`; False when there is none left, ended or alive."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            time.sleep(wait_s)
            return True
        codes[pid] = os.waitstatus_to_exitcode(status)
