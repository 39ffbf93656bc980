"""Runs pipelines of the stages in `core_methods` from a test: the parent in this process or apart, the children apart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core_methods import METHODS, hide

from posttrain.cli import main
from posttrain.core import registry

hide()

TESTS = Path(__file__).resolve().parent
PATH = os.pathsep.join([str(TESTS.parent), str(TESTS)])
CHAIN = """\
version: 1
name: chain
seed: 3
sources:
  texts: {kind: text, path: texts.jsonl, split: {validation: 0.3}}
stages:
  - {name: made, method: core.make, rows: 5}
  - {name: used, method: core.use, in: {data: made}}
  - {name: also, method: core.use, in: {data: [made, texts]}, factor: 2.0}
"""


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


class Home:
    """A folder with a pipeline file and its runs.

    Args:
        folder: where everything lies.
        capture: pytest's `capsys`, to split off what a command printed.
    """

    def __init__(self, folder: Path, capture: Any = None) -> None:
        self.folder, self.capture = folder, capture
        self.file, self.runs = folder / "p.yaml", folder / "runs"
        self.write(CHAIN)
        (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(12)))

    def write(self, text: str) -> None:
        """Replaces the pipeline file."""
        self.file.write_text(text, encoding="utf-8")

    def trouble(self, **actions: str) -> None:
        """What goes wrong from now on: stage -> action."""
        (self.folder / "trouble.json").write_text(json.dumps(actions))

    def __call__(self, verb: str, *args: object) -> Result:
        """A command in this process, on the pipeline file where the verb takes one."""
        if self.capture is not None:
            self.capture.readouterr()
        before = signal.getsignal(signal.SIGTERM)
        try:
            code = main([verb, *map(str, args), "--runs", str(self.runs)])
        finally:
            signal.signal(signal.SIGTERM, before)
        out, err = self.capture.readouterr() if self.capture is not None else ("", "")
        return Result(code, out, err)

    def run(self, *args: object) -> Result:
        """`posttrain run` of the pipeline file."""
        return self("run", self.file, *args)

    def start(self, *args: object, **kwargs: Any) -> subprocess.Popen[str]:
        """`posttrain run` in a process of its own."""
        command = [
            sys.executable,
            "-m",
            "posttrain",
            "run",
            str(self.file),
            "--plugin",
            "core_methods",
            "--runs",
            str(self.runs),
            *map(str, args),
        ]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder, **kwargs)

    def stages(self) -> dict[str, Path]:
        """Committed stage folders of all runs, by stage name; the newest of a name."""
        found = sorted(self.runs.glob("*/stages/*/manifest.json"), key=lambda p: p.stat().st_mtime_ns)
        return {json.loads(p.read_text())["name"]: p.parent for p in found}

    def manifest(self, stage: str) -> dict[str, Any]:
        """Manifest of a committed stage."""
        return json.loads((self.stages()[stage] / "manifest.json").read_text())

    def digests(self) -> dict[str, str]:
        """Digest of every committed stage."""
        return {name: self.manifest(name)["digest"] for name in self.stages()}

    def plan(self, *args: object) -> dict[str, dict[str, Any]]:
        """`posttrain plan --json`, by stage name."""
        result = self("plan", self.file, "--json", *args)
        assert result.code == 0, result.err
        return {item["name"]: item for item in json.loads(result.out)}


def prepare(monkeypatch: Any, folder: Path) -> None:
    """Makes the test-only methods known here and in children."""
    monkeypatch.setenv("PYTHONPATH", PATH)
    monkeypatch.setenv("CORE_TROUBLE", str(folder / "trouble.json"))
    registry.methods()
    monkeypatch.setattr(registry, "_PLUGINS", ("core_methods",))
    for name, found in METHODS.items():
        monkeypatch.setitem(registry._METHODS, name, found)


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")
