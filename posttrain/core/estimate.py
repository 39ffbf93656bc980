"""Rough figures for `plan`: tokens, seconds, disk. Each method may give its own; these are the fallbacks."""

from __future__ import annotations

from pathlib import Path

from posttrain.core.plan import PlannedStage
from posttrain.core.registry import MODEL_KINDS
from posttrain.core.rundir import RunDir, read_json, read_manifest

CHECKPOINT_COPIES = 3.0
ADAPTER_SHARE = 0.2
SAVED = "saved_at_accept_rate_"
"""Keys of the share of rollouts that recovery saves, by the share of groups that carry information."""


def _folder_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else 0


def _earlier_seconds(stage: PlannedStage) -> float | None:
    """Seconds of an earlier run of the stage under any key, in proportion to the steps."""
    for folder in RunDir(stage.folder.parent.parent).siblings(stage.name):
        manifest, spec = read_manifest(folder), read_json(folder / "config.json")
        if manifest and spec:
            before, now = spec["config"].get("steps"), getattr(stage.config, "steps", None)
            return float(manifest["seconds"]) * (now / before if now and before else 1.0)
    return None


def _model_bytes(stage: PlannedStage) -> int | None:
    for ref in stage.inputs.get("model", []):
        path = Path(ref.path or ref.spec.get("id", ""))
        if path.is_file():
            return path.stat().st_size
        return _folder_bytes(path) or None
    return None


def _disk_bytes(stage: PlannedStage, size: int) -> float:
    """Output, and for a trainer the kept checkpoints and the one being written; an adapter's are small beside the model."""
    config = stage.config
    if getattr(config, "lora", None) is not None:
        return ADAPTER_SHARE * size
    copies = CHECKPOINT_COPIES * (config.checkpoint.keep + 1) if hasattr(config, "checkpoint") else 0.0
    return size * (1 + copies)


def estimate(stage: PlannedStage) -> dict[str, float]:
    """`tokens`, `seconds`, `disk_bytes` and what a method adds, as far as they can be told before the run.

    Tokens come from the method or from steps x rows x max_length; seconds from an earlier run of the stage, scaled by
    steps; disk from the model (a checkpoint holds weights and two moments) and the number of checkpoints kept.
    """
    found: dict[str, float] = dict(stage.method.estimate(stage.config)) if stage.method.estimate else {}
    config = stage.config
    steps, batch, data = (getattr(config, name, None) for name in ("steps", "batch", "data"))
    if "tokens" not in found and steps and batch and data:
        found["tokens"] = float(steps * (batch.tokens or (batch.rows or batch.per_device) * data.max_length))
    seconds = _earlier_seconds(stage)
    if seconds is not None:
        found["seconds"] = seconds
    size = _model_bytes(stage) if stage.method.output in MODEL_KINDS else None
    if size and "disk_bytes" not in found:
        found["disk_bytes"] = _disk_bytes(stage, size)
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
    saved = {key.removeprefix(SAVED): value for key, value in found.items() if key.startswith(SAVED)}
    if saved:
        parts.append("sample recovery saves " + ", ".join(f"{value:.0%} at accept rate {rate}" for rate, value in saved.items()))
    return ", ".join(parts) or "unknown until its inputs are made"
