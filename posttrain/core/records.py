"""What a run left on disk, read back for people: the report and the model cards are made from these.

Nothing is trusted to be there: a killed attempt, a half-written line, an artifact of another version give less to show,
never an error.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.core.rundir import RunDir, read_json, read_manifest

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class StageRecord:
    """One stage folder.

    Args:
        folder: the stage's folder.
        manifest: parsed manifest.json; empty if it is not committed.
        spec: parsed config.json: config, inputs, seed, plugins.
        env: parsed env.json.
    """

    folder: Path
    manifest: dict[str, Any] = field(repr=False)
    spec: dict[str, Any] = field(repr=False)
    env: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """Stage name."""
        return str(self.manifest.get("name") or self.spec.get("name") or self.folder.name)

    @property
    def summary(self) -> dict[str, Any]:
        """What the stage reported about itself."""
        found = self.manifest.get("summary")
        return found if isinstance(found, dict) else {}

    @property
    def config(self) -> dict[str, Any]:
        """The stage's resolved config."""
        found = self.spec.get("config")
        return found if isinstance(found, dict) else {}


def _dict(path: Path) -> dict[str, Any]:
    found = read_json(path)
    return found if isinstance(found, dict) else {}


def read_stage(folder: Path) -> StageRecord:
    """The record of one stage folder."""
    return StageRecord(folder, read_manifest(folder), _dict(folder / "config.json"), _dict(folder / "env.json"))


def read_stages(run: RunDir) -> list[StageRecord]:
    """Stages of the newest plan that have a folder, in order; without a plan, every stage folder."""
    planned = read_json(run.path / "plan.json")
    there = sorted(p for p in run.stages.iterdir() if p.is_dir()) if run.stages.is_dir() else []
    if isinstance(planned, list):
        order = {name: i for i, name in enumerate(planned)}
        there = sorted((p for p in there if p.name in order), key=lambda p: order[p.name])
    return [read_stage(p) for p in there]


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    return float(value.replace("Infinity", "inf")) if value in ("NaN", "Infinity", "-Infinity") else None


def read_curves(folder: Path) -> dict[str, Curve]:
    """Metrics logged at least twice, by name, as (step, value) in step order; a later attempt overrides an earlier one's steps.

    An attempt that resumed at step s makes the earlier attempts' values from s on void, whether it logged the same
    metric at the same steps or not.
    """
    found: dict[str, dict[float, float]] = {}
    attempts = sorted((folder / "attempts").glob("[0-9]*"), key=lambda p: int(p.name) if p.name.isdigit() else 0)
    for attempt in attempts:
        fresh: dict[str, dict[float, float]] = {}
        for step, name, value in _metrics(attempt / "events.jsonl"):
            fresh.setdefault(name, {})[step] = value
        first = min((s for values in fresh.values() for s in values), default=math.inf)
        found = {name: {s: v for s, v in values.items() if s < first} for name, values in found.items()}
        for name, values in fresh.items():
            found.setdefault(name, {}).update(values)
    return {name: sorted(values.items()) for name, values in found.items() if len(values) > 1}


def _metrics(path: Path) -> list[tuple[float, str, float]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        if '"metrics"' not in line:
            continue
        try:
            event = json.loads(line)
            step, values = float(event["step"]), event["values"].items()
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        found += [(step, name, number) for name, value in values if (number := _number(value)) is not None]
    return found


def ancestors(folder: Path) -> list[StageRecord]:
    """Committed stages that a stage was made from, directly or not, inputs before what is made of them."""
    run = RunDir(folder.parent.parent)
    found: dict[Path, StageRecord] = {}

    def visit(record: StageRecord) -> None:
        for item in record.manifest.get("inputs", []):
            parent = run.find(item["name"], item["key"]) if item.get("origin") == "stage" else None
            if parent is not None and parent not in found:
                above = read_stage(parent)
                visit(above)
                found[parent] = above

    visit(read_stage(folder))
    return list(found.values())
