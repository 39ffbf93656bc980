"""Quantizers on a GPU: the checkpoint is one that a CPU reads with the same logits, and the error is that of the CPU's fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from quant_kit import run_stage, texts

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("quantize.gptq", {"bits": 3}),
    "closed_form": ("quantize.apiq", {"rank": 4}),
    "bw": ("quantize.apiq", {"rank": 4, "fit": "bw", "epochs": 2, "saliency": {"kind": "both"}}),
    "streamed": ("quantize.apiq", {"rank": 4, "stream": True}),
    "auto": ("quantize.auto", {"bits_per_weight": 4.5, "gradients": 4, "epochs": 0, "groups": [32, 64]}),
}


@pytest.mark.parametrize("way", list(WAYS))
def test_fit_on_a_gpu(way: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, fields = WAYS[way]
    data = texts(tmp_path / "t.jsonl")
    errors = []
    for device in ("cuda:0", "cpu"):
        monkeypatch.setattr("posttrain.models.load.default_device", lambda device=device: device)
        ctx = run_stage(name, tiny_model_dir, tmp_path / device / "out", data, **fields)
        assert ctx.summary.get("reload_max_diff", 0) <= ctx.summary.get("reload_limit", 0)
        errors.append(ctx.summary["blocks"][-1]["error_held"])
    assert errors[0] == pytest.approx(errors[1], rel=0.1)
