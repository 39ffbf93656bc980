"""`kill -9` at seeded moments: the run always goes on by the same command, and ends with the same bytes.

A kill comes only after a new progress event of its own attempt, so every attempt moves on; a third of them fall inside
a save or a commit. Victims: the parent, the child, one rank, or the whole family.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.core import process

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "tiny" / "quickstart.yaml"
DEADLINE_S = 240.0


def start(runs: Path, overrides: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "posttrain", "run", str(TINY), *overrides, "--runs", str(runs)]
    log = open(runs.with_suffix(".log"), "ab")  # noqa: SIM115
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def events(runs: Path) -> list[dict]:
    found = []
    for path in sorted(runs.glob("*/stages/*/attempts/*/events.jsonl")):
        for line in path.read_bytes().split(b"\n")[:-1]:
            found.append(json.loads(line))
    return sorted(found, key=lambda e: e["t"])


def moment_reached(runs: Path, since: float, wanted: str, count: int) -> bool:
    """True when `count` new events of the wanted sort have been written after `since`."""
    new = [e for e in events(runs) if e["t"] > since]
    if not any(e["kind"] in ("progress", "metrics") for e in new):
        return False
    if wanted == "save":
        return bool(new) and new[-1]["kind"] in ("checkpoint", "commit") and new[-1].get("state") == "begin"
    return sum(e["kind"] in ("progress", "metrics") for e in new) >= count


def victims(parent: subprocess.Popen, whom: str) -> list[int]:
    below = process.descendants(parent.pid)
    if whom == "parent" or not below:
        return [parent.pid]
    return {"child": below[:1], "rank": below[-1:], "family": [parent.pid, *below]}[whom]


def disturb(runs: Path, overrides: list[str], rng: random.Random, in_save: bool, whoms: tuple[str, ...]) -> str | None:
    """One attempt, killed; returns what was done, or None if the run ended first."""
    since, whom = time.time(), rng.choice(whoms)
    count, delay = rng.randint(1, 6), rng.random() * 0.02
    parent = start(runs, overrides)
    deadline = time.monotonic() + DEADLINE_S
    while not moment_reached(runs, since, "save" if in_save else "progress", count):
        if parent.poll() is not None:
            assert parent.returncode == 0, runs.with_suffix(".log").read_text()[-3000:]
            return None
        assert time.monotonic() < deadline, "no progress event in time"
        time.sleep(0.002)
    time.sleep(delay)
    for pid in victims(parent, whom):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    parent.wait(timeout=60)
    return f"{whom}{' in save' if in_save else ''}"


def finish(runs: Path, overrides: list[str]) -> dict[str, str]:
    done = start(runs, overrides).wait(timeout=600)
    assert done == 0, runs.with_suffix(".log").read_text()[-3000:]
    return {p.parent.name: json.loads(p.read_text())["digest"] for p in sorted(runs.glob("*/stages/*/manifest.json"))}


def kill_and_compare(tmp_path: Path, kills: int, overrides: list[str], whoms: tuple[str, ...]) -> None:
    rng = random.Random(20240501)
    straight = finish(tmp_path / "straight", overrides)
    done: list[str] = []
    for i in range(kills * 3):
        if len(done) == kills:
            break
        what = disturb(tmp_path / "disturbed", overrides, rng, in_save=i % 3 == 0, whoms=whoms)
        if what is None:
            for stage in sorted((tmp_path / "disturbed").glob("*/stages/*-rl-*")):
                subprocess.run(["rm", "-rf", str(stage)], check=True)
            continue
        done.append(what)
    assert len(done) == kills, done
    assert finish(tmp_path / "disturbed", overrides) == straight, done
    assert not list((tmp_path / "disturbed").glob("*/stages/*/out.tmp"))


@pytest.mark.timeout(900)
def test_five_kills(tmp_path: Path) -> None:
    kill_and_compare(tmp_path, 5, [], ("parent", "child", "family"))


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.timeout(3600)
def test_twenty_kills_with_two_ranks(tmp_path: Path) -> None:
    two = ["stages.sft.launch={with: torchrun, processes: 2}"]
    kill_and_compare(tmp_path, 20, two, ("parent", "child", "rank", "family"))
