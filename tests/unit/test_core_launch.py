"""Command lines, groups, attempts, what an end means, worlds; the worker's guard; seeds of a torch that is not yet there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.config.common import LaunchConfig
from posttrain.core import launch, worker
from posttrain.core.context import StageContext, World
from posttrain.core.events import Events
from posttrain.core.launch import child_environment, command, groups, next_attempt, outcome
from posttrain.errors import ConfigError, NumericsError


def stage(name: str = "a", **fields: Any) -> Any:
    config = SimpleNamespace(launch=LaunchConfig.model_validate(fields))
    return SimpleNamespace(name=name, config=config, folder=Path("/runs/x") / name, processes=config.launch.processes)


def test_commands() -> None:
    plain = [sys.executable, "-m", "posttrain.core.worker", "/runs/x/a"]
    assert command(stage()) == plain
    assert command(stage(), [Path("/1"), Path("/2 [b]")])[3:] == ["/1", "/2 [b]"]
    torchrun = command(stage(**{"with": "torchrun", "processes": 2}))
    assert torchrun[1:3] == ["-m", "torch.distributed.run"] and "--nproc_per_node=2" in torchrun and torchrun[-3:] == plain[1:]
    accelerate = command(stage(**{"with": "accelerate", "processes": 4, "config": "/c.yaml"}))
    assert accelerate[3:] == ["--config_file", "/c.yaml", "--num_processes", "4", *plain[1:]]


def test_groups() -> None:
    a, b, c, d = stage("a"), stage("b"), stage("c", **{"with": "torchrun", "processes": 2}), stage("d")
    assert groups([a, b, c, d], isolate=False) == [[a, b], [c], [d]]
    assert groups([a, b, c, d], isolate=True) == [[a], [b], [c], [d]]
    assert groups([], isolate=False) == []


def test_attempts_are_counted_by_what_was_started(tmp_path: Path) -> None:
    assert next_attempt(tmp_path) == 1
    for name, text in (("1", "x"), ("2", ""), ("notes", "x")):
        (tmp_path / "attempts" / name).mkdir(parents=True)
        if text:
            (tmp_path / "attempts" / name / "events.jsonl").write_text(text)
    assert next_attempt(tmp_path) == 2


@pytest.mark.parametrize(
    ("exits", "code", "processes", "expected"),
    [
        ({0: (4, "bad row")}, 4, 1, (4, "bad row")),
        ({0: (75, "stopped"), 1: (3, "nan")}, 1, 2, (3, "nan")),
        ({0: (4, "a"), 1: (5, "b"), 2: (2, "c")}, 1, 3, (5, "b")),
        ({0: (75, "stopped"), 1: (75, "stopped")}, 1, 2, (75, "stopped")),
        ({0: (75, "stopped")}, 1, 2, (1, "1 of 2 processes ended without a word; the kernel kills")),
        ({}, 1, 2, (1, "2 of 2 processes ended without a word")),
        ({}, -9, 1, (1, "the stage's process was ended by SIGKILL; the kernel kills")),
        ({}, -11, 1, (1, "the stage's process was ended by SIGSEGV")),
        ({}, 4, 1, (4, "exited with code 4")),
        ({}, 77, 1, (1, "exited with code 77")),
        ({0: (0, "")}, 0, 1, (0, "")),
        ({0: (99, "odd"), 1: (0, "")}, 1, 2, (99, "odd")),
    ],
)
def test_outcome(tmp_path: Path, exits: dict[int, tuple[int, str]], code: int, processes: int, expected: tuple[int, str]) -> None:
    for rank, (value, text) in exits.items():
        (tmp_path / f"exit-{rank}.json").write_text(json.dumps({"code": value, "error": text}))
    (tmp_path / "exit-9.json").write_text("{half")
    found = outcome(tmp_path, code, processes)
    assert found[0] == expected[0] and expected[1] in found[1]


def test_child_finds_no_more_modules_than_its_parent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setattr(sys, "path", ["/elsewhere"])
    assert child_environment()["PYTHONSAFEPATH"] == "1"
    monkeypatch.setattr(sys, "path", ["", "/elsewhere"])
    assert "PYTHONSAFEPATH" not in child_environment()
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    assert child_environment()["TOKENIZERS_PARALLELISM"] == "true"


@pytest.mark.parametrize(
    ("expected", "found", "words"),
    [(2, 1, "expected 2 processes, the launcher started 1"), (1, 4, "expected 1 process, the launcher started 4")],
)
def test_world_size_is_compared(expected: int, found: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    with pytest.raises(ConfigError, match=words) as caught:
        worker.check_world(expected, World(0, found))
    assert f"launch.processes={found}" in caught.value.fix
    worker.check_world(found, World(0, found))


def test_world_size_names_the_launcher_that_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(ConfigError, match="use torchrun on CPU"):
        worker.check_world(2, World(0, 1))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config.json").write_text('{"attempt": 3}')
    (tmp_path / "out.tmp").mkdir()
    monkeypatch.delenv("RANK", raising=False)
    return tmp_path


def ends(monkeypatch: pytest.MonkeyPatch, folder: Path, error: BaseException | None) -> tuple[int, dict[str, Any]]:
    def run(_: Path) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(worker, "run_stage", run)
    code = worker.guarded(folder)
    return code, json.loads((folder / "attempts" / "3" / "exit-0.json").read_text())


class OutOfMemoryError(RuntimeError):
    """As torch calls it."""


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (None, 0, ""),
        (NumericsError("nan", where="step 3"), 3, "step 3: nan"),
        (KeyError("surprise"), 1, "KeyError: 'surprise'"),
        (ValueError("two\n  lines"), 1, "ValueError: two lines"),
        (RuntimeError(), 1, "RuntimeError"),
        (MemoryError(), 1, "the machine's memory is used up"),
        (OutOfMemoryError("CUDA"), 1, "the GPU's memory is used up"),
        (SystemExit(7), 1, "SystemExit: 7"),
        (KeyboardInterrupt(), 75, "stopped by SIGINT"),
        (RuntimeError("token hf_" + "a" * 34), 1, "RuntimeError: token"),
    ],
)
def test_guard_writes_how_it_ended(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, code: int, text: str
) -> None:
    found, record = ends(monkeypatch, folder, error)
    assert (found, record["code"]) == (code, code)
    assert record["error"].startswith(text) and "hf_a" not in record["error"]
    assert (folder / "out.tmp").exists() == (error is None)


def test_memory_errors_name_the_three_knobs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ends(monkeypatch, folder, MemoryError())[1]["error"]
    assert all(knob in text for knob in ("batch.per_device", "data.max_length", "model.gradient_checkpointing"))


def test_guard_unwinds_on_sigterm_even_where_exceptions_are_swallowed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    def run(_: Path) -> None:
        try:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except Exception:
                pytest.fail("swallowed")
        finally:
            closed.append(True)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(worker, "run_stage", run)
    assert worker.guarded(folder) == 75 and closed
    assert "stopped by SIGTERM" in (folder / "attempts" / "3" / "exit-0.json").read_text()
    assert signal.getsignal(signal.SIGTERM) is before


def test_guard_survives_a_disk_that_takes_no_exit_file(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (folder / "attempts").write_text("no folder")
    monkeypatch.setattr(worker, "run_stage", lambda _: (_ for _ in ()).throw(NumericsError("nan")))
    with pytest.raises(OSError):
        worker.guarded(folder)
    monkeypatch.setattr(worker, "write_json", lambda *_: (_ for _ in ()).throw(worker.ArtifactError("the disk is full")))
    assert worker.guarded(folder) == 3
    assert "the disk is full" in capsys.readouterr().err


SEEDS = """
import sys
from posttrain.core.worker import seed_all
if sys.argv[1] == "before":
    import torch
seed_all(1)
seed_all(7)
import torch, random, numpy
print(torch.rand(2).tolist(), random.random(), numpy.random.random(), torch.manual_seed(7) and torch.rand(2).tolist())
"""


@pytest.mark.timeout(120)
def test_torch_is_seeded_whether_it_comes_before_or_after() -> None:
    done = [
        subprocess.run([sys.executable, "-c", SEEDS, how], capture_output=True, text=True, check=True).stdout for how in ("before", "after")
    ]
    assert done[0] == done[1] and done[0].count(done[0].split("]")[0] + "]") == 2


def test_context_refs() -> None:
    from posttrain.core.artifact import InputRef

    ref = InputRef("data", "texts", "source", "dataset", split="test")
    ctx = StageContext("a", "m", 0, {"data": [ref]}, Path("o"), Path("w"), Events(None))
    assert ctx.ref("data") is ref and ctx.refs("none") == [] and ref.label == "texts:test" and replace(ref, split="train").label == "texts"
    with pytest.raises(ConfigError, match="stages.a.in.none: expected one input, got 0"):
        ctx.ref("none")


def test_default_environment_does_not_override(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(launch._ENV_DEFAULTS) <= child_environment().keys()
