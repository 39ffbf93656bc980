"""GGUF files, dequantized once into an ordinary folder that is kept in the user's cache.

transformers needs a minute a gigabyte to read a GGUF file, and every adapter over one needs its base again, so the
converted float32 folder stays under `$XDG_CACHE_HOME/posttrain/gguf` (`~/.cache/posttrain/gguf`), named by the file's
digest and the version of transformers that read it. It may be deleted at any time. Where it cannot be written, the
conversion goes to a temporary folder.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain.core.digests import cache_folder
from posttrain.errors import ArtifactError
from posttrain.models.digest import model_digest
from posttrain.models.quiet import quiet
from posttrain.models.source import Source


def converted(source: Source) -> Source:
    """The folder made from a GGUF file.

    Raises:
        ArtifactError: the package `gguf` is missing, the file cannot be read, or it lacks weights.
    """
    import transformers

    name = f"{model_digest(source)[:24]}-transformers-{transformers.__version__}"
    folder = cache_folder() / "gguf" / name
    if not (folder / "config.json").is_file():
        folder = _convert(source, folder)
    return replace(source, form="folder", path=folder)


def _convert(source: Source, folder: Path) -> Path:
    from posttrain.models.save import save_model

    model, tokenizer = _read(source)
    made = _scratch(folder.parent)
    save_model(model, tokenizer, made)
    try:
        os.replace(made, folder)
    except OSError:
        if not (folder / "config.json").is_file():
            return made
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _scratch(home: Path) -> Path:
    try:
        home.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=home, prefix="."))
    except OSError:
        return Path(tempfile.mkdtemp())


def _read(source: Source) -> tuple[Any, Any]:
    """(float32 model, tokenizer) from a GGUF file."""
    import torch
    from transformers import AutoTokenizer

    from posttrain.models.load import pretrained
    from posttrain.models.plain import plain_model

    if importlib.util.find_spec("gguf") is None:
        raise ArtifactError("reading a GGUF file needs the package `gguf`", where=source.where, fix="pip install gguf")
    folder, name = str(source.local.parent), source.local.name
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
    model, report = pretrained(source, folder, torch.float32, {"attn": "auto", "trust": False}, gguf_file=name)
    missing = sorted(set(report["missing_keys"]) - {"lm_head.weight"})
    if missing:
        raise ArtifactError(f"the GGUF file lacks {len(missing)} weights, first {missing[0]}", where=source.where, fix="download it again")
    return plain_model(model), tokenizer
