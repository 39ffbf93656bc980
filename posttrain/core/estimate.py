"""Rough figures for `plan`: tokens, seconds, disk. Each method may give its own; these are the fallbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.core.plan import PlannedStage

CHECKPOINT_COPIES = 3.0


def _folder_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else 0


def _previous(stage: PlannedStage) -> dict[str, Any] | None:
    """Manifest of an earlier run of the same stage, under any key."""
    from posttrain.core.rundir import RunDir, read_json

    run = RunDir(stage.folder.parent.parent)
    for folder in run.siblings(stage.name):
        manifest = read_json(folder / "manifest.json")
        if manifest:
            return manifest
    return None


def _model_bytes(stage: PlannedStage) -> int | None:
    for ref in stage.inputs.get("model", []):
        path = Path(ref.path or ref.spec.get("id", ""))
        if path.is_file():
            return path.stat().st_size
        return _folder_bytes(path) or None
    return None


def estimate(stage: PlannedStage) -> dict[str, float]:
    """`tokens`, `seconds`, `disk_bytes`, as far as they can be told before the run.

    Tokens come from the method or from steps x rows x max_length; seconds from an earlier run of the stage, scaled by
    steps; disk from the model (a checkpoint holds weights and two moments) and the number of checkpoints kept.
    """
    found: dict[str, float] = dict(stage.method.estimate(stage.config)) if stage.method.estimate else {}
    config = stage.config
    steps, batch, data = (getattr(config, name, None) for name in ("steps", "batch", "data"))
    if "tokens" not in found and steps and batch and data:
        found["tokens"] = float(steps * (batch.tokens or (batch.rows or batch.per_device) * data.max_length))
    earlier = _previous(stage)
    if earlier and "seconds" not in found:
        found["seconds"] = float(earlier["seconds"])
    size = _model_bytes(stage)
    if size and "disk_bytes" not in found:
        keep = config.checkpoint.keep if hasattr(config, "checkpoint") else 0
        found["disk_bytes"] = size * (1 + CHECKPOINT_COPIES * (keep + 1 if keep else 0))
    return found


def describe(found: dict[str, float]) -> str:
    """Figures for a person; `unknown` where nothing can be told yet."""
    from posttrain.core.display import clock, quantity

    parts = []
    if "tokens" in found:
        parts.append(f"at most {quantity(found['tokens'])} tokens")
    if "seconds" in found:
        parts.append(f"about {clock(found['seconds'])}")
    if "disk_bytes" in found:
        parts.append(f"{found['disk_bytes'] / 2**20:.1f} MiB on disk")
    return ", ".join(parts) or "unknown until its inputs are made"
