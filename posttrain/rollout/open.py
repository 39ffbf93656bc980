"""From a model source to a rollout engine that holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from posttrain.config.engine import VllmConfig

EngineName = Literal["hf", "vllm"]


def open_engine(
    ref: Any,
    engine: EngineName,
    *,
    scratch: Path,
    max_batch: int = 64,
    vllm: VllmConfig | None = None,
    dtype: str = "auto",
    attn: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[Any, int | None]:
    """An engine, and the positions of its model (None: no limit is declared).

    Args:
        ref: any model source, see `posttrain.models.load.load_model`.
        engine: `hf` or `vllm`.
        scratch: where an adapter merged for vLLM is written.
        max_batch: most completions at once.
        vllm: options of vLLM.
        dtype: of the weights; where it is `auto`, vLLM's own option.
        attn: of the transformers engine.
        trust_remote_code: run code that comes with the model.

    Raises:
        ArtifactError: the model cannot be read.
        ConfigError: vLLM is missing, or refuses the model.
    """
    from posttrain.models.load import fetch, load_model, load_tokenizer
    from posttrain.models.source import resolve_model

    if engine == "hf":
        from posttrain.rollout.hf import HFEngine

        loaded = load_model(ref, dtype=dtype, attn=attn, trust_remote_code=trust_remote_code)
        limit = getattr(loaded.model.config, "max_position_embeddings", None)
        return HFEngine(loaded.model, loaded.tokenizer, max_batch=max_batch), limit
    from posttrain.models.check import check_folder
    from posttrain.rollout.vllm import VLLMEngine

    source = fetch(resolve_model(ref), trust_remote_code)
    if source.form == "adapter":
        from posttrain.models.save import save_model

        loaded = load_model(ref, trust_remote_code=trust_remote_code)
        folder = scratch / "merged"
        save_model(loaded.model, loaded.tokenizer, folder)
        tokenizer = loaded.tokenizer
        del loaded
    else:
        folder = source.local
        check_folder(folder)
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    options = vllm or VllmConfig()
    if options.dtype == "auto" and dtype != "auto":
        options = VllmConfig.model_validate({**options.dump(), "dtype": dtype})
    made = VLLMEngine(folder, tokenizer, options, max_batch=max_batch, trust_remote_code=trust_remote_code)
    return made, made.max_model_len
