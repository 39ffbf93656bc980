"""`quantize.gptq`: GPTQ, layer by layer in the order in which they run, with searched ranges and coordinate descent.

The strongest method without an adapter; see `quant/obq.py` for the maths. Each layer is fitted to what reaches it in the
quantized model, and its error is told on text that was not fitted.
"""

from __future__ import annotations

from typing import Any

from posttrain.core.context import StageContext
from posttrain.core.registry import data_port, model_port, stage
from posttrain.quant.calibrated import CalibratedConfig, check, run_calibrated


class GptqConfig(CalibratedConfig):
    """GPTQ."""


@stage(
    "quantize.gptq",
    config=GptqConfig,
    inputs={"model": model_port(kinds=("model", "adapter")), "data": data_port("text", "messages", "verifiable")},
    output="quantized",
    evals=True,
    check=check,
)
def run(cfg: GptqConfig, ctx: StageContext) -> None:
    """Fits codes to calibration text and commits a checkpoint that has been read back."""
    from posttrain.quant.fit_layers import fit_layers

    def fit(job: Any, target: Any) -> None:
        fit_layers(job, ["gptq", "rtn"])

    run_calibrated(cfg, ctx, fit)
