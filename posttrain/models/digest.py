"""Content digests of models that exist before a run, for stage keys; no torch.

The digest is taken over the (name, sha256 of the bytes) pairs of the files that decide what a model computes: weights,
configs, tokenizer, template, remote code. README files, optimizer states and hidden files do not enter. A hub id needs
no bytes: its full commit names the content. Hashes of files are remembered as those of data files are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.core.artifact import InputRef
from posttrain.core.digests import file_digests
from posttrain.core.hashing import digest_of
from posttrain.models.source import BASE_FILE, Source, read_base, resolve_model

SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt", ".py", ".gguf", ".tiktoken"})


def model_digest(spec: InputRef | Mapping[str, Any] | str | Path | Source | Any) -> str:
    """Digest of a model: `hub:ID@REVISION` for a hub id, else 64 hex digits.

    Args:
        spec: a ModelConfig or its dict, an InputRef, a path, or a Source.

    Raises:
        ArtifactError: the model is not there.
    """
    source = resolve_model(spec)
    if source.digest:
        return source.digest
    if source.form == "hub":
        return f"hub:{source.id}@{source.revision or 'main'}"
    if source.form == "gguf":
        return file_digests([source.local])[0]
    files = model_files(source.local)
    pairs = list(zip((file.name for file in files), file_digests(files), strict=True))
    if source.form == "adapter" and not (source.local / BASE_FILE).is_file():
        pairs.append(("base", model_digest(read_base(source.local)[0])))
    return digest_of(sorted(pairs))


def model_files(folder: Path) -> list[Path]:
    """Files of a model folder that decide what the model computes, sorted by name."""
    return sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in SUFFIXES and not file.name.startswith("."))
