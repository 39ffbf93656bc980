"""Config blocks that all quantizers share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config.base import REPORT_ONLY, Strict


class QuantExport(Strict):
    """How the quantized checkpoint is written."""

    format: Literal["compressed-tensors"] = "compressed-tensors"
    """`pack-quantized` of compressed-tensors, read by transformers and vLLM."""
    engine: Literal["transformers", "vllm", "vllm-cpu"] = "transformers"
    """Engine that must be able to load it; a width that it cannot load is refused. `vllm` means vLLM on a GPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of what stays dense and of the scales; `auto` is the input checkpoint's type."""
    max_shard_gb: Annotated[float, Field(gt=0)] = 5.0
    """Size of a weight file in GB."""
    reload_check: Annotated[bool, REPORT_ONLY] = True
    """Read the export back and compare weights and logits before it is committed."""
    engine_check: Annotated[Literal["off", "try", "require"], REPORT_ONLY] = "off"
    """Run the export in vLLM too, in a process of its own, and compare log-probabilities; `try` goes on with a warning where vLLM
    cannot run it on this machine."""

    @model_validator(mode="after")
    def _check_needs_reload(self) -> QuantExport:
        if self.engine_check != "off" and not self.reload_check:
            raise ValueError("engine_check compares with the reloaded export; it needs `reload_check: true`")
        return self


def check_engine(bits: int, engine: str) -> None:
    """Refuses a width that the engine cannot load.

    Raises:
        ValueError: the engine, the width, and what would work.
    """
    if engine == "vllm" and bits == 3:
        raise ValueError(
            "bits: 3 cannot be loaded by vLLM, since codes are stored as transformers reads them; "
            "use 2, 4 or 8 bits, or `export.engine: transformers`"
        )
    if engine == "vllm-cpu" and bits != 4:
        raise ValueError(
            f"bits: {bits} has no CPU kernel in vLLM, which runs 4 bits only; use 4 bits, or `export.engine: vllm` (GPU) or `transformers`"
        )
