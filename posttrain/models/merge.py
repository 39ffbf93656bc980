"""Low-rank adapters on a live model: attach, and merge.

W' = W + s B A with s = alpha / r (rsLoRA: alpha / sqrt(r)), for DoRA each row scaled to its trained norm; computed in
float32 whatever the model will be used in, since a bfloat16 sum drops an update smaller than 2^-8 of the weight. Every
merge is checked: on fixed tokens the merged model must give the logits of the model with the adapter attached.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.errors import ArtifactError, NumericsError
from posttrain.models.check import ADAPTER_WEIGHTS, check_folder, read_header
from posttrain.models.quiet import quiet
from posttrain.models.reload import probe_logits
from posttrain.models.source import read_json

MERGE_LIMIT = 1e-3
"""Largest mean difference of the logits after a merge, in standard deviations of the logits; float32 gives about 1e-6."""
PROBE = {"rows": 8, "length": 16}


def attach_adapter(model: Any, folder: Path, *, trainable: bool = False) -> Any:
    """PeftModel of `model` with the adapter in `folder`; every adapter tensor must find its place.

    Args:
        model: transformers model, the adapter's base.
        folder: peft folder.
        trainable: the adapter's weights take gradients.

    Raises:
        ArtifactError: damaged folder, or an adapter made for another model.
    """
    from peft import PeftModel

    check_folder(folder)
    _fit_vocabulary(model, folder)
    try:
        with quiet():
            attached = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"the adapter does not fit its base: {str(error)[:400]}", where=str(folder), fix="give the base it was trained on"
        ) from error
    _all_found(attached, folder)
    return attached


def merge_adapter(model: Any, folder: Path) -> tuple[Any, dict[str, float]]:
    """`model` (float32) with the adapter of `folder` added into its weights; no peft module is left.

    Returns:
        (merged model, {"merge_difference", "merge_limit"}): the mean absolute difference of the logits that the merge made
        on 8 rows of 16 fixed tokens, and MERGE_LIMIT times their standard deviation.

    Raises:
        ArtifactError: see attach_adapter; or the merged model computes something else than the attached one.
        NumericsError: the merged weights are not finite.
    """
    attached = attach_adapter(model.float(), folder).eval()
    expected = probe_logits(attached, **PROBE)
    try:
        merged = attached.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise NumericsError(
            f"merging the adapter gives non-finite weights: {error}", where=str(folder), fix="train it again from its last good checkpoint"
        ) from error
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    merged.tie_weights()
    return merged, _same_logits(expected, probe_logits(merged, **PROBE), folder)


def _same_logits(expected: Any, found: Any, folder: Path) -> dict[str, float]:
    limit = MERGE_LIMIT * float(expected.std())
    difference = float((found - expected).abs().mean())
    if not difference <= limit:
        raise ArtifactError(
            f"merging the adapter changes what the model computes: its logits move by {difference:g} on average, the limit is {limit:g}",
            where=str(folder),
            fix="leave it attached (lora.on_input: continue), and report this with its adapter_config.json",
        )
    return {"merge_difference": difference, "merge_limit": limit}


def cast_weights(model: Any, dtype: Any) -> Any:
    """`model` with its weights in `dtype`; unlike `model.to`, the float32 tables of rotary embeddings keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _fit_vocabulary(model: Any, folder: Path) -> None:
    """Resizes the base's embeddings where the adapter carries rows for added tokens."""
    config = folder / "config.json"
    rows = model.get_input_embeddings().weight.shape[0]
    wanted = read_json(config).get("vocab_size", rows) if config.is_file() else rows
    if wanted == rows:
        return
    if not any("embed" in name for name in read_header(folder / ADAPTER_WEIGHTS)):
        raise ArtifactError(
            f"the adapter was trained with {wanted} embedding rows, its base has {rows}, and the new rows were not saved",
            where=str(folder),
            fix="add the embeddings to the adapter's `modules_to_save`, or add the tokens to the base first",
        )
    model.resize_token_embeddings(wanted, mean_resizing=False)


def _all_found(attached: Any, folder: Path) -> None:
    from peft import get_peft_model_state_dict

    held = set(read_header(folder / ADAPTER_WEIGHTS))
    wanted = set(get_peft_model_state_dict(attached, save_embedding_layers=False))
    lost = sorted(wanted - held)
    stray = sorted(name for name in held - wanted if "lora_" in name)
    if lost or stray:
        name, what = (lost[0], "lacks") if lost else (stray[0], "holds, for no module of the base,")
        raise ArtifactError(
            f"the adapter {what} {name} ({len(lost)} missing, {len(stray)} without a place)",
            where=str(folder / ADAPTER_WEIGHTS),
            fix="give the base it was trained on",
        )
