"""Artifacts as data: what a stage commits, and references to what a stage is given.

An artifact is a folder with a `manifest.json` beside its `out/`; the manifest is written last, so its presence *is*
"done". Readers trust only what a manifest lists.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import ArtifactError

MANIFEST = "manifest.json"
OUT = "out"
SCHEMA = 1


@dataclass(frozen=True)
class Artifact:
    """A committed stage output.

    Args:
        kind: dataset, state, features, scores, model, adapter, rollouts, logprobs, quantized, eval, report.
        path: folder that holds the files (`.../out`).
        digest: sha256 over the sorted (name, sha256) pairs of its files.
        manifest: the parsed manifest.
    """

    kind: str
    path: Path
    digest: str
    manifest: dict[str, Any] = field(repr=False, compare=False)

    @property
    def summary(self) -> dict[str, Any]:
        """What the stage reported about itself (`ctx.summary`)."""
        found: dict[str, Any] = self.manifest.get("summary", {})
        return found


def open_artifact(folder: Path) -> Artifact:
    """Opens a committed stage folder (or its `out`); sizes are checked, hashes only by `verify`.

    Raises:
        ArtifactError: no manifest, an unreadable one, or a listed file that is missing or of another size.
    """
    folder = Path(folder)
    if folder.name == OUT and not (folder / MANIFEST).exists():
        folder = folder.parent
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError("not a committed artifact: it has no manifest.json", where=str(folder), fix="run its pipeline again")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        kind, digest = manifest["kind"], manifest["digest"]
        files = [(str(item["path"]), int(item["size"])) for item in manifest["files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"unreadable manifest ({error})", where=str(path), fix="delete the stage folder and run again") from None
    out = folder / OUT
    for name, expected in files:
        file = out / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            found = "missing" if size is None else f"{size} bytes"
            raise ArtifactError(
                f"damaged artifact: expected {expected} bytes, found {found}",
                where=str(file),
                fix=f"delete {folder} and run again",
            )
    return Artifact(kind, out, digest, manifest)


@dataclass(frozen=True)
class InputRef:
    """One input of a stage, as written into its config.json.

    Args:
        port: port of the stage, e.g. `data`.
        name: as written in the YAML, without the part: source, stage, or model id.
        origin: `stage` (another stage's output), `source` (rows that existed before), `model` (hub id, folder, GGUF, package).
        kind: artifact kind it will be read as.
        path: absolute folder of a committed output (`.../out`); empty for sources and hub models.
        key: stage key of the producer, or content digest of a source or local model, or `hub:ID@REVISION`.
        digest: content digest; empty until the producer is committed.
        split: part of a dataset: `train` (what is not held out), `validation`, `test`, or `all`.
        rows: row type of a dataset.
        share, repeat: mixture; see InputItem.
        spec: SourceConfig or ModelConfig as a dict, for origins `source` and `model`.
    """

    port: str
    name: str
    origin: str
    kind: str
    path: str = ""
    key: str = ""
    digest: str = ""
    split: str = "train"
    rows: str | None = None
    share: float | None = None
    repeat: float | None = None
    spec: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dict."""
        return asdict(self)

    @property
    def label(self) -> str:
        """`name` or `name:split`."""
        return self.name if self.split == "train" else f"{self.name}:{self.split}"

    def artifact(self) -> Artifact:
        """The committed artifact behind a reference of origin `stage`."""
        return open_artifact(Path(self.path))
