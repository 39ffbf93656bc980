"""The one writer of model and adapter folders: complete, and the same bytes for the same weights on every machine.

A folder holds weights, config.json, tokenizer, chat_template.jinja and generation_config.json. Nothing in it tells where
it was made: paths and the name of the folder it was loaded from are removed. An adapter folder also holds its
`base.json` (digest and relative place of its base), and config.json of the model it belongs to.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.models.check import ADAPTER_WEIGHTS, folder_bytes
from posttrain.models.digest import model_digest
from posttrain.models.quiet import quiet
from posttrain.models.source import ADAPTER_CONFIG, BASE_FILE, Source, base_record, read_json, resolve_model

PRIVATE_KEYS = frozenset({"_name_or_path", "name_or_path", "is_local", "local_files_only", "tokenizer_file", "_commit_hash"})


def save_model(
    model: Any,
    tokenizer: Any,
    out: Path,
    *,
    base: Any = None,
    meta: dict[str, Any] | None = None,
    max_shard_gb: float = 5.0,
    state: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a complete model folder, or adapter folder for a PeftModel.

    Args:
        model: transformers model, or PeftModel.
        tokenizer: its tokenizer, with the chat template.
        out: folder to write into.
        base: what the adapter was trained on (InputRef, Source, LoadedModel, path); required for a PeftModel.
        meta: updated in place with the returned facts (pass `ctx.meta`).
        max_shard_gb: size of a weight file in GB.
        state: written instead of the model's own tensors (quantized weights).

    Returns:
        `{"parameters", "size_bytes", "vocab_size", "dtype"}` and for an adapter `{"base_digest", "trained_parameters"}`.

    Raises:
        ValueError: a PeftModel without `base`.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    adapter = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    facts = _save_adapter(model, out, base) if adapter else _save_weights(model, out, max_shard_gb, state)
    inner = model.get_base_model() if adapter else model
    save_tokenizer(tokenizer, out)
    save_generation_config(inner, tokenizer, out)
    facts |= {
        "size_bytes": folder_bytes(out),
        "vocab_size": inner.get_input_embeddings().weight.shape[0],
        "dtype": str(inner.dtype).removeprefix("torch."),
    }
    if meta is not None:
        meta.update(facts)
    return facts


def save_tokenizer(tokenizer: Any, out: Path) -> None:
    """Tokenizer files and chat template, without paths."""
    tokenizer.save_pretrained(str(out))
    clean_json(out / "tokenizer_config.json")


def save_generation_config(model: Any, tokenizer: Any, out: Path) -> None:
    """generation_config.json with every end token: the model's own, and the tokenizer's."""
    settings = json.loads(model.generation_config.to_json_string(use_diff=True))
    settings.pop("_from_model_config", None)
    settings["eos_token_id"] = stop_ids(model, tokenizer)
    if settings.get("pad_token_id") is None and tokenizer.pad_token_id is not None:
        settings["pad_token_id"] = tokenizer.pad_token_id
    write_json(out / "generation_config.json", settings)


def stop_ids(model: Any, tokenizer: Any) -> list[int] | int | None:
    """End tokens of a model: those of its generation config, then the tokenizer's; one is a number, several a list."""
    own = model.generation_config.eos_token_id
    listed = [] if own is None else own if isinstance(own, list) else [own]
    ids = list(dict.fromkeys([*listed, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]))
    return (ids[0] if len(ids) == 1 else ids) if ids else None


def _save_weights(model: Any, out: Path, max_shard_gb: float, state: dict[str, Any] | None) -> dict[str, Any]:
    from transformers import GenerationConfig

    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with quiet():
            model.save_pretrained(str(out), state_dict=state, max_shard_size=f"{max(int(max_shard_gb * 1e6), 1)}KB")
    finally:
        model.generation_config = kept
    clean_json(out / "config.json")
    return {"parameters": sum(p.numel() for p in model.parameters())}


def _save_adapter(model: Any, out: Path, base: Any) -> dict[str, Any]:
    if base is None:
        raise ValueError("saving an adapter needs `base`: what it was trained on")
    source = resolve_base(base)
    digest = model_digest(source)
    with quiet():
        model.save_pretrained(str(out))
    (out / "README.md").unlink(missing_ok=True)
    _finish_adapter(model.get_base_model(), out, source, digest)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return {"parameters": total, "trained_parameters": trained, "base_digest": digest, "weights": ADAPTER_WEIGHTS}


def save_adapter_folder(model: Any, tokenizer: Any, config: Any, out: Path, *, base: Any) -> None:
    """Completes a folder that holds `adapter_model.safetensors` already: configs, tokenizer, and what it was made for.

    Args:
        model: transformers model that the adapter belongs to.
        tokenizer: its tokenizer.
        config: peft config of the adapter.
        out: the folder.
        base: what the adapter belongs to (InputRef, Source, LoadedModel, path).
    """
    source = resolve_base(base)
    config.save_pretrained(str(out))
    _finish_adapter(model, out, source, model_digest(source))
    save_tokenizer(tokenizer, out)
    save_generation_config(model, tokenizer, out)


def _finish_adapter(model: Any, out: Path, source: Source, digest: str) -> None:
    model.config.save_pretrained(str(out))
    clean_json(out / "config.json", drop=frozenset({"quantization_config"}))
    record = base_record(source, digest, out)
    write_json(out / BASE_FILE, record)
    _clean_adapter_config(out / ADAPTER_CONFIG, record)


def resolve_base(base: Any) -> Source:
    """The Source behind whatever names an adapter's base."""
    return base.source if hasattr(base, "source") and hasattr(base, "tokenizer") else resolve_model(base)


def _clean_adapter_config(file: Path, record: dict[str, Any]) -> None:
    """Sorts what peft keeps in sets, and names the base relative to the folder, so that the bytes are the same everywhere."""
    config = read_json(file)
    for key in ("target_modules", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    config["base_model_name_or_path"] = record.get("path") or record["id"]
    config["revision"] = record.get("revision")
    config["inference_mode"] = True
    write_json(file, config)


def clean_json(file: Path, drop: frozenset[str] = frozenset()) -> None:
    """Rewrites a JSON file of a model folder with sorted keys, without those that tell where it came from and those in `drop`."""
    if file.is_file():
        write_json(file, {key: value for key, value in read_json(file).items() if key not in PRIVATE_KEYS | drop})


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Sorted, indented JSON with a final newline."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
