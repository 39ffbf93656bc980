"""The one loader: any model source becomes a float transformers model with its tokenizer.

A quantized checkpoint is dequantized on loading and a GGUF file too, so what is returned can be evaluated, trained and
saved like any other. An adapter is merged into its base in float32 (or left attached, `merge=False`); bases may
themselves be adapters. Weights that the checkpoint lacks are an error, never a fresh initialisation.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from posttrain.core.artifact import InputRef
from posttrain.errors import ArtifactError
from posttrain.models.check import check_folder
from posttrain.models.digest import model_digest
from posttrain.models.plain import plain_model
from posttrain.models.quiet import quiet
from posttrain.models.source import ADAPTER_CONFIG, Source, offline, read_base, read_json, resolve_model

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
EXPECTED = (OSError, ValueError, RuntimeError, KeyError, ImportError, AttributeError, TypeError)
SMALL_MODEL = 10_000_000


@dataclass
class LoadedModel:
    """A live model.

    Args:
        model: transformers model in eval mode (a PeftModel for an adapter with `merge=False`).
        tokenizer: its tokenizer.
        source: what was named: hub id, package, path or artifact.
        base: base of an adapter, named the same way; for every other form the source itself. `save_model(base=loaded.base)` after training
            the same adapter on, `save_model(base=loaded.source)` after starting a new one.
        kind: `model`, `adapter` or `quantized`: what the source is.
        dtype: the checkpoint's own type, e.g. `bfloat16`.
        merge: `{"merge_difference", "merge_limit"}` of `merge_adapter` where an adapter was merged, else empty.
    """

    model: Any
    tokenizer: Any
    source: Source
    base: Source
    kind: str
    dtype: str
    merge: dict[str, float] = field(default_factory=dict)


def load_model(
    ref: InputRef | Mapping[str, Any] | str | Path | Source | Any,
    *,
    dtype: str = "auto",
    attn: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    merge: bool = True,
    four_bit: bool = False,
) -> LoadedModel:
    """Loads a model and its tokenizer.

    Args:
        ref: InputRef, ModelConfig (or its dict), id, or path; an adapter's base is found by itself.
        dtype: `auto` is float32 on a CPU and the checkpoint's own type on a GPU.
        attn: transformers' `attn_implementation`; `auto` leaves the choice to transformers.
        device: default is this process' GPU where there is one, else `cpu`.
        trust_remote_code: run code that comes with the model.
        merge: merge an adapter into its base; False returns a PeftModel whose adapter is trainable.
        four_bit: hold the weights in NF4 (`models/fourbit.py`), for training an adapter on them; not with an adapter to merge.

    Raises:
        ArtifactError: the source is unreachable, incomplete, damaged, of another size than its tokenizer, or lacks weights.
    """
    named = resolve_model(ref)
    source = fetch(named, trust_remote_code)
    where = device or default_device()
    options = {"attn": attn, "trust": trust_remote_code, "four_bit": where if four_bit else None}
    own = checkpoint_dtype(source)
    final = _torch_dtype(dtype, own, where)
    model, base, kind, merged = _load(source, final, merge, options)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    _same_size(model, tokenizer, source)
    model = model.to(where) if where != "cpu" and not four_bit else model
    fit_threads(model, where)
    return LoadedModel(model.eval(), tokenizer, named, base or named, kind, own, merged)


def _load(source: Source, dtype: Any, merge: bool, options: dict[str, Any]) -> tuple[Any, Source | None, str, dict[str, float]]:
    """(model, base of an adapter as it is named, kind, what the check of a merge found) of a fetched source."""
    import torch

    if source.form == "adapter":
        base = _checked_base(source)
        model, _, _, _ = _load(fetch(base, options["trust"]), torch.float32 if merge else dtype, True, options)
        model, found = _merged(model, source, dtype) if merge else (_attached(model, source), {})
        return model, base, "adapter", found
    check_folder(source.local)
    quantized = read_json(source.local / "config.json").get("quantization_config")
    model = _from_folder(source, dtype, options, quantized)
    return model, None, "quantized" if quantized else "model", {}


def _merged(model: Any, source: Source, dtype: Any) -> tuple[Any, dict[str, float]]:
    from posttrain.models.merge import cast_weights, merge_adapter

    merged, found = merge_adapter(model, source.local)
    return cast_weights(merged, dtype), found


def _attached(model: Any, source: Source) -> Any:
    from posttrain.models.merge import attach_adapter

    return attach_adapter(model, source.local, trainable=True)


def _checked_base(adapter: Source) -> Source:
    base, recorded = read_base(adapter.local)
    found = model_digest(base)
    if recorded and recorded != found:
        raise ArtifactError(
            f"the adapter was trained on another base: expected {recorded[:12]}, found {found[:12]} at {base.where}",
            where=adapter.where,
            fix="restore the base, or train the adapter again",
        )
    return base


def fetch(source: Source, trust_remote_code: bool = False) -> Source:
    """A local folder: hub files are downloaded (or found in the local cache), a GGUF file is converted once.

    Raises:
        ArtifactError: not reachable, not cached, no such repository or commit, access refused, or an unreadable GGUF file.
    """
    if source.form == "gguf":
        from posttrain.models.gguf import converted

        return converted(source)
    if source.form != "hub":
        return source
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = [*HUB_FILES, "*.py"] if trust_remote_code else HUB_FILES
    try:
        folder = Path(
            snapshot_download(
                source.id, revision=source.revision, allow_patterns=patterns, ignore_patterns=["*/*"], local_files_only=offline()
            )
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ArtifactError(
            "the model is not in the local hub cache and the hub cannot be asked",
            where=source.where,
            fix="unset HF_HUB_OFFLINE, or set `model.offline` to a local folder, GGUF file or package",
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ArtifactError(
            f"the hub refused: {str(error).splitlines()[0]}",
            where=source.where,
            fix="check id and revision; a gated model needs `hf auth login`",
        ) from error
    form = "adapter" if (folder / ADAPTER_CONFIG).is_file() else "folder"
    return replace(source, form=form, path=folder, digest=model_digest(source))


def checkpoint_dtype(source: Source) -> str:
    """The type a checkpoint was saved in (`float32` where it does not say); an adapter answers for its base."""
    source = fetch(source)
    if source.form == "adapter":
        return checkpoint_dtype(read_base(source.local)[0])
    config = read_json(source.local / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def load_tokenizer(ref: InputRef | Mapping[str, Any] | str | Path | Source | Any, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model source; an adapter without one takes its base's.

    Raises:
        ArtifactError: there is none, or it cannot be read.
    """
    source = fetch(resolve_model(ref), trust_remote_code)
    folder = source.local
    if source.form == "adapter" and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return load_tokenizer(read_base(folder)[0], trust_remote_code=trust_remote_code)
    try:
        with quiet():
            return _tokenizer_class(folder).from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    except EXPECTED as error:
        raise ArtifactError(
            f"the tokenizer cannot be read: {_first_line(error)}",
            where=source.where,
            fix="the model folder must hold tokenizer.json and tokenizer_config.json",
        ) from error


def _tokenizer_class(folder: Path) -> Any:
    """The generic class where the folder asks for it, else transformers' choice.

    transformers 5 goes by `model_type` before `tokenizer_class`: beside a Qwen2 config it swaps the splitting rules of a
    generic tokenizer.json for Qwen's and adds a token, so text would be cut another way than in training.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    config = folder / "tokenizer_config.json"
    named = read_json(config).get("tokenizer_class") if config.is_file() else None
    generic = named in {"TokenizersBackend", "PreTrainedTokenizerFast"} and (folder / "tokenizer.json").is_file()
    return PreTrainedTokenizerFast if generic else AutoTokenizer


def _from_folder(source: Source, dtype: Any, options: dict[str, Any], quantized: Mapping[str, Any] | None) -> Any:
    if quantized and options.get("four_bit"):
        raise ArtifactError(
            f"a `{quantized.get('quant_method')}` checkpoint cannot be held in four bits",
            where=source.where,
            fix="give the float checkpoint, or set lora.load_in_4bit: false",
        )
    extra = {"quantization_config": _dequantizing(quantized, source)} if quantized else {}
    model, report = pretrained(source, str(source.local), dtype, options, **extra)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ArtifactError(
            f"the checkpoint lacks {len(missing)} weights, first {missing[0]}; they would be random",
            where=source.where,
            fix="copy the model folder again, whole; for a classifier or encoder give a causal language model",
        )
    return plain_model(model) if quantized else model


def pretrained(source: Source, folder: str, dtype: Any, options: dict[str, Any], **extra: Any) -> tuple[Any, dict[str, Any]]:
    """(model, loading report) of transformers' `from_pretrained` on a local folder, which never asks the hub.

    Raises:
        ArtifactError: transformers refuses; `source` names the place in the message.
    """
    from transformers import AutoModelForCausalLM

    if options["attn"] != "auto":
        extra["attn_implementation"] = options["attn"]
    if options.get("four_bit"):
        from posttrain.models.fourbit import four_bit_options

        extra |= four_bit_options(dtype, options["four_bit"])
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                trust_remote_code=options["trust"],
                local_files_only=True,
                output_loading_info=True,
                use_safetensors=None if "gguf_file" in extra else True,
                **extra,
            )
            return loaded[0], loaded[1]
    except EXPECTED as error:
        raise ArtifactError(
            f"transformers cannot load it: {_first_line(error)}",
            where=source.where,
            fix="see the message; `--trust-remote-code` runs code that comes with a model",
        ) from error


def _dequantizing(quantized: Mapping[str, Any], source: Source) -> Any:
    method = quantized.get("quant_method")
    if method != "compressed-tensors":
        raise ArtifactError(
            f"cannot load a `{method}` checkpoint as a float model",
            where=source.where,
            fix="give the float checkpoint, or one in compressed-tensors format",
        )
    from transformers import CompressedTensorsConfig

    return CompressedTensorsConfig(dequantize=True)


def _same_size(model: Any, tokenizer: Any, source: Source) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    top = max(tokenizer.get_vocab().values(), default=0)
    if top >= rows:
        raise ArtifactError(
            f"the tokenizer knows token id {top}, the embedding has {rows} rows",
            where=source.where,
            fix="resize the model's embeddings and save it with its tokenizer, or give the tokenizer that belongs to it",
        )


def _torch_dtype(dtype: str, own: str, device: str) -> Any:
    import torch

    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.float32 if device == "cpu" else getattr(torch, own)


def default_device() -> str:
    """This process' GPU where there is one, else `cpu`."""
    import os

    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def fit_threads(model: Any, device: str) -> None:
    """One CPU thread for a small model, all of them for a larger one; OMP_NUM_THREADS, where it is set, decides alone.

    Below about ten million parameters handing work over to threads costs more than it saves, on a busy machine many times
    more.
    """
    import torch

    if device != "cpu" or os.environ.get("OMP_NUM_THREADS"):
        return
    _all_threads()
    small = sum(p.numel() for p in model.parameters()) < SMALL_MODEL
    torch.set_num_threads(1 if small else _all_threads())


@functools.cache
def _all_threads() -> int:
    import torch

    return torch.get_num_threads()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:400]
