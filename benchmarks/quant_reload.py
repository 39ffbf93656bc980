"""What is lost between a fitted model and its checkpoint loaded again: by format, width, and loader.

    python benchmarks/quant_reload.py            # five minutes on 2 cores; vLLM's CPU build for the 4-bit rows
    python benchmarks/quant_reload.py --quick    # three rows, without vLLM

A small Llama (width 128, 2 blocks) is quantized by `quantize.gptq`, or by `quantize.apiq` where there is an adapter, and exported in
bfloat16. `transformers` is the largest difference of a logit between the fitted model in memory and the checkpoint that transformers
loads in float32, over the standard deviation of the logits; `vllm` the largest difference of a log-probability between vLLM and
transformers, in float32 where vLLM's 4-bit kernel cannot run on this processor (`kernel: dense`), else in bfloat16.

`ours` is the largest of the packed `transformers` rows, `peer` that of plain bfloat16 weights, whose rounding a packed checkpoint does
not add to; there is no `ratio` where ours is 0.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _harness import arguments, finish

ROWS: list[dict[str, Any]] = [
    {"bits": 2}, {"bits": 3}, {"bits": 4}, {"bits": 8}, {"bits": 4, "symmetric": False}, {"bits": 4, "group_size": -1},
    {"bits": 4, "format": "gptq"}, {"bits": 4, "format": "awq", "symmetric": False}, {"bits": 2, "rank": 8}, {"bits": 4, "rank": 8},
    {"bits": 4, "format": "dequantized"},
]  # fmt: skip


def build(folder: Path) -> None:
    """The model and its text."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from posttrain.models.create import train_tokenizer
    from posttrain.models.save import save_model

    texts = [f"Row {i}: the sum of {i} and {i * 7} is {i * 8}, as anyone can see who adds the two." for i in range(600)]
    tokenizer = train_tokenizer(texts, 320, 512)
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 3
    save_model(model, tokenizer, folder / "model")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def measure(folder: Path, number: int, row: dict[str, Any], vllm: bool) -> dict[str, Any]:
    """One export, loaded again."""
    from posttrain.core.artifact import InputRef
    from posttrain.core.context import StageContext
    from posttrain.core.events import Events
    from posttrain.core.registry import method
    from posttrain.models.load import load_model
    from posttrain.models.reload import probe_logits

    rank = row.get("rank", 0)
    name = "quantize.apiq" if rank else "quantize.gptq"
    inputs = {
        "model": [InputRef("model", "m", "model", "model", spec={"id": str(folder / "model")})],
        "data": [InputRef("data", "d", "source", "dataset", spec={"kind": "text", "path": str(folder / "text.jsonl")})],
    }
    out = folder / f"out-{number}"
    out.mkdir()
    ctx = StageContext("q", name, 0, inputs, out, folder / f"work-{number}", Events(None))
    fields = {key: value for key, value in row.items() if key in ("bits", "symmetric", "rank", "group_size")}
    packed = row.get("format") != "dequantized"
    check = "try" if vllm and row["bits"] == 4 and packed else "off"
    export = {"format": row.get("format", "compressed-tensors"), "dtype": "bfloat16", "engine_check": check}
    calibration = {"tokens": 2048, "held_out": 512, "length": 64}
    found = method(name)
    with contextlib.redirect_stdout(sys.stderr):
        found.run(found.config.model_validate({"name": "q", "method": name, "export": export, "calibration": calibration, **fields}), ctx)
    s = ctx.summary
    result = {**row, "bits_a_weight": s["total_bits_per_weight"], "loads_in": s["loads_in"], "vllm": s.get("engine_check")}
    if s["loads_in"]["transformers"]:
        std = float(probe_logits(load_model(out, dtype="float32").model).std())
        result["transformers"] = s["reload_max_diff"] / std
    print({key: value for key, value in result.items() if key != "loads_in"}, flush=True)
    return result


def main() -> None:
    """Exports and loads every row."""
    args = arguments(__doc__ or "")
    vllm = not args.quick and importlib.util.find_spec("vllm") is not None
    chosen = [ROWS[1], ROWS[8], ROWS[10]] if args.quick else ROWS
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        rows = [measure(Path(folder), number, row, vllm) for number, row in enumerate(chosen)]
    packed = [row["transformers"] for row in rows if "transformers" in row and row.get("format") != "dequantized"]
    plain = [row["transformers"] for row in rows if row.get("format") == "dequantized"]
    ours, peer = max(packed), max(plain)
    unit = "largest difference of a logit over their standard deviation"
    lead = {"ours": ours, "peer": peer, "ratio": peer / ours if ours else None, "ci95": None, "control": None, "unit": unit}
    finish("quant_reload", {**lead, "rows": rows}, args)


if __name__ == "__main__":
    main()
