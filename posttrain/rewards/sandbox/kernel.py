"""Linux calls that Python does not wrap: namespaces, Landlock, seccomp, capabilities. Standard library only.

Each call either does what it says or raises OSError; what a kernel, a container or an architecture lacks is found out by
the caller, once, by trying.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterable
from pathlib import Path

NEW_USER, NEW_PID, NEW_NET, NEW_IPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
_PDEATHSIG, _DUMPABLE, _KEEPCAPS, _SECCOMP, _SUBREAPER, _NO_NEW_PRIVS = 1, 4, 8, 22, 36, 38
READ_ANY_FILE = 1 << 2
"""CAP_DAC_READ_SEARCH as a mask."""

_LIBC = ctypes.CDLL(None, use_errno=True)


def _call(function: str, *args: object) -> int:
    result: int = getattr(_LIBC, function)(*args)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
    return result


def _syscall(number: int, *args: object) -> int:
    return _call("syscall", ctypes.c_long(number), *args)


def _prctl(option: int, value: int) -> None:
    _call("prctl", option, ctypes.c_ulong(value), 0, 0, 0)


def die_with_parent(*parents: int) -> None:
    """The kernel kills this process when its parent ends; if it is none of `parents` any more, at once (0: one outside the namespace)."""
    _prctl(_PDEATHSIG, 9)
    if os.getppid() not in parents:
        os._exit(1)


def adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process."""
    _prctl(_SUBREAPER, 1)


def hide_memory(hidden: bool = True) -> None:
    """Other processes without privileges cannot read this one's memory and descriptors."""
    _prctl(_DUMPABLE, int(not hidden))


def no_new_privileges() -> None:
    """A set-uid program gains nothing from here on; Landlock and seccomp need it."""
    _prctl(_NO_NEW_PRIVS, 1)


def unshare(flags: int) -> None:
    """Leaves the namespaces named by NEW_* flags; NEW_PID concerns later children."""
    _call("unshare", flags)


def map_self(uid: int, gid: int) -> None:
    """In a fresh user namespace: this user and group keep their numbers, nobody else has one."""
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def become(user: int, capabilities: int = 0) -> None:
    """Gives up root for user and group number `user`, keeping only this mask of capabilities."""
    if capabilities:
        _prctl(_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    set_capabilities(capabilities)


def set_capabilities(mask: int) -> None:
    """Permitted and effective capabilities become `mask` (of the lowest 32), inheritable ones none."""
    number = {"x86_64": 126, "aarch64": 91}.get(platform.machine())
    if number is None:
        raise OSError(f"capset on {platform.machine()} is not known")
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    data = ctypes.create_string_buffer(struct.pack("=6I", mask, mask, 0, 0, 0, 0))
    _syscall(number, header, data)


_FILE_RIGHTS = 0b111 | 1 << 14
_ALL_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1}
_READ = 0b1101


def landlock_version() -> int:
    """Version of the kernel's Landlock; 0 where there is none."""
    try:
        return _syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    except OSError:
        return 0


def landlock(version: int, readable: Iterable[Path], writable: Iterable[Path]) -> None:
    """From here on: files below `readable` may be read and run, those below `writable` also written; no TCP, no signals outside.

    Args:
        version: of `landlock_version()`, at least 1; TCP needs 4, signals 6.
        readable, writable: existing files and folders; others are left out.
    """
    rights = _ALL_RIGHTS.get(version, (1 << 15) - 1)
    size, fields = (8, [rights]) if version < 4 else (16, [rights, 3]) if version < 6 else (24, [rights, 3, 3])
    attributes = ctypes.create_string_buffer(struct.pack(f"={len(fields)}Q", *fields))
    rules = _syscall(444, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    try:
        for paths, allowed in ((readable, _READ), (writable, rights)):
            for path in paths:
                _allow(rules, path, allowed & rights)
        _syscall(446, rules, ctypes.c_uint32(0))
    finally:
        os.close(rules)


def _allow(rules: int, path: Path, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not path.is_dir():
            rights &= _FILE_RIGHTS
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, descriptor))
        _syscall(445, rules, ctypes.c_int(1), rule, ctypes.c_uint32(0))
    finally:
        os.close(descriptor)


_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_KILL = {"x86_64": (62, 234), "aarch64": (129, 131)}
_FORBIDDEN = {
    # socket, ptrace, process_vm_readv/writev, pidfd_*, unshare, setns, mount, umount2, keyctl, add_key, request_key, bpf,
    # perf_event_open, io_uring_setup, userfaultfd, kcmp, shmget, msgget, semget, mq_open, tkill
    "x86_64": (41, 101, 310, 311, 434, 424, 438, 272, 308, 165, 166, 250, 248, 249, 321, 298, 425, 323, 312, 29, 68, 64, 240, 200),
    "aarch64": (198, 117, 270, 271, 434, 424, 438, 97, 268, 40, 39, 219, 217, 218, 280, 241, 425, 282, 272, 194, 186, 190, 180, 130),
}  # fmt: skip
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOWED, _REFUSED, _KILLED = 0x7FFF0000, 0x00050001, 0x80000000
_X32 = 0x40000000


def can_filter_calls() -> bool:
    """True where `filter_calls` knows the architecture."""
    return platform.machine() in _ARCHITECTURES


def filter_calls(own_pid: int | None) -> None:
    """From here on sockets, tracing, namespaces, mounts, keys, bpf, io_uring and shared memory of System V are refused (EPERM).

    Args:
        own_pid: with a number, signals go to that process only; None leaves them alone.
    """
    machine = platform.machine()
    signals = _KILL[machine] if own_pid is not None else ()
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _ARCHITECTURES[machine]), (_RETURN, 0, 0, _KILLED), (_LOAD, 0, 0, 0)]
    program += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _REFUSED)]
    for number in _FORBIDDEN[machine]:
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSED)]
    for number in signals:
        # Another call: skip these four. Else the low half of argument 0 decides; every way through them returns.
        program += [(_EQUAL, 0, 4, number), (_LOAD, 0, 0, 16), (_EQUAL, 0, 1, own_pid or 0), (_RETURN, 0, 0, _ALLOWED)]
        program += [(_RETURN, 0, 0, _REFUSED)]
    program.append((_RETURN, 0, 0, _ALLOWED))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    _call("prctl", _SECCOMP, ctypes.c_ulong(2), header, 0, 0)
