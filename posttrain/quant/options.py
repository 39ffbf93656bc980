"""Config blocks that all quantizers share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config.base import REPORT_ONLY, Positive, Strict
from posttrain.config.common import StageConfig, StageEval


class CalibrationConfig(Strict):
    """Text that the fit sees, and text that judges it."""

    tokens: Annotated[int, Field(ge=64)] = 65536
    """Tokens that are fitted. An adapter and an unconstrained optimum learn the noise of fewer than about 64k."""
    held_out: Annotated[int, Field(ge=64)] = 16384
    """Tokens that only judge: every choice between results (ridge, method, pass) is made by their error."""
    length: Annotated[int, Field(ge=16)] = 512
    """Tokens of a window."""
    batch: Positive = 8
    """Windows in a forward pass."""
    format: Literal["auto", "chat", "plain"] = "auto"
    """How rows that are no plain text are written out, as for training."""

    @model_validator(mode="after")
    def _whole_windows(self) -> CalibrationConfig:
        if min(self.tokens, self.held_out) < self.length:
            raise ValueError(f"tokens and held_out must hold a window of {self.length} tokens; lower `length` or raise them")
        return self


class QuantExport(Strict):
    """How the quantized checkpoint is written."""

    format: Literal["compressed-tensors", "gptq", "awq", "dequantized"] = "compressed-tensors"
    """`compressed-tensors`: pack-quantized, read by transformers and vLLM. `gptq` (symmetric, 4 or 8 bits) and `awq` (4 bits): for vLLM and
    tools that know those; transformers reads them only with the packages optimum and gptqmodel. `dequantized`: float weights, read
    everywhere, no smaller."""
    engine: Literal["transformers", "vllm", "vllm-cpu"] | None = None
    """Engine that must be able to load it; what it cannot load is refused. `vllm` means vLLM on a GPU. Default: the first that reads the
    format."""
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


def check_engine(bits: int, export: QuantExport, symmetric: bool) -> None:
    """Refuses a width that the format cannot hold or the engine cannot load.

    Raises:
        ValueError: the engine, the width, and what would work.
    """
    from posttrain.quant.scheme import engines

    if export.format == "gptq" and (bits not in (4, 8) or not symmetric):
        raise ValueError(
            "export.format: gptq holds symmetric codes of 4 or 8 bits; use compressed-tensors, or `symmetric: true` at 4 or 8 bits"
        )
    if export.format == "awq" and bits != 4:
        raise ValueError(f"export.format: awq holds 4 bits, not {bits}; use compressed-tensors")
    if export.engine is None:
        return
    if export.format in ("gptq", "awq") and export.engine == "transformers":
        raise ValueError(
            f"export.format: {export.format} is read by transformers only with the packages optimum and gptqmodel; "
            "use compressed-tensors, or `export.engine: vllm`"
        )
    if export.engine == "vllm" and bits == 3 and export.format == "compressed-tensors":
        raise ValueError(
            "bits: 3 cannot be loaded by vLLM, since codes are stored as transformers reads them; "
            "use 2, 4 or 8 bits, or `export.engine: transformers`"
        )
    if not engines(bits, symmetric, format=export.format)[export.engine]:
        raise ValueError(
            f"bits: {bits} has no CPU kernel in vLLM, which runs 4 bits only; use 4 bits, or `export.engine: vllm` (GPU) or `transformers`"
        )


class QuantConfig(StageConfig):
    """Fields of every quantizer."""

    bits: Literal[2, 3, 4, 8] = 4
    """Width of a code."""
    group_size: Annotated[int, Field(ge=-1)] = 64
    """Input columns that share a scale; -1 is one scale an output row."""
    symmetric: bool | None = None
    """No zero points. Default: true at 4 and 8 bits (the widest choice of kernels), false at 2 and 3 (better weights)."""
    ignore: list[str] = []
    """Layers that stay dense: full names, last parts (`down_proj`), or `re:` and a regular expression; the output layer and embeddings
    always do."""
    export: QuantExport = QuantExport()
    """Checkpoint format and checks."""
    eval: StageEval = StageEval()
    """Evaluation around this stage."""

    @model_validator(mode="after")
    def _loadable(self) -> QuantConfig:
        if self.group_size == 0:
            raise ValueError("group_size: give -1 (one scale a row) or a positive number")
        for bits in self.possible_widths():
            check_engine(bits, self.export, self.symmetric_at(bits))
        return self

    def possible_widths(self) -> list[int]:
        """Widths that a layer may get; each must suit the format and the engine."""
        return [self.bits]

    def symmetric_at(self, bits: int) -> bool:
        """`symmetric`, with the default for a width."""
        return bits >= 4 if self.symmetric is None else self.symmetric

    @property
    def is_symmetric(self) -> bool:
        """`symmetric`, with the default for `bits`."""
        return self.symmetric_at(self.bits)
