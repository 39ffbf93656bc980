"""Peak memory of quantizing and exporting a model block by block, against loading it whole.

    python benchmarks/quant_memory.py            # ten minutes
    python benchmarks/quant_memory.py --quick

A Llama with random weights in bfloat16, its blocks the greater part, is quantized by `quantize.gptq` in a process of its own, streamed
and whole; the peak is what the kernel counted (`ru_maxrss`), less that of the same work on a model of one block (interpreter, torch,
embeddings, calibration). `ours` and `peer` are MiB above that base; `blocks_mib` is what the blocks take in float32, `block_mib` one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _harness import arguments, bootstrap, finish

REPO = Path(__file__).resolve().parents[1]
SCRIPT = """
import sys
from pathlib import Path
from posttrain.core.artifact import InputRef
from posttrain.core.context import StageContext
from posttrain.core.events import Events
from posttrain.core.registry import method
folder, stream = Path(sys.argv[1]), sys.argv[2] == "streamed"
found = method("quantize.gptq")
inputs = {
    "model": [InputRef("model", "m", "model", "model", spec={"id": str(folder / "model")})],
    "data": [InputRef("data", "d", "source", "dataset", spec={"kind": "text", "path": str(folder / "text.jsonl")})],
}
out = folder / sys.argv[2]
out.mkdir()
ctx = StageContext("q", "quantize.gptq", 0, inputs, out, folder / f"work-{sys.argv[2]}", Events(None))
fields = {"bits": 4, "stream": stream, "kl_windows": 0, "calibration": {"tokens": 2048, "held_out": 512, "length": 128, "batch": 4}}
export = {"max_shard_gb": 0.01, "reload_check": True}
found.run(found.config.model_validate({"name": "q", "method": "quantize.gptq", "export": export, **fields}), ctx)
"""


def build(folder: Path, blocks: int, width: int) -> float:
    """A model and some text; returns MiB of its blocks in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from posttrain.models.create import train_tokenizer
    from posttrain.models.save import save_model

    texts = [f"Row {i}: the sum of {i} and {i * 7} is {i * 8}, as anyone can see who adds the two." for i in range(400)]
    tokenizer = train_tokenizer(texts, 320, 512)
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": 8, "num_hidden_layers": blocks}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).to(torch.bfloat16)
    folder.mkdir()
    save_model(model, tokenizer, folder / "model")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return sum(p.numel() for p in model.model.layers.parameters()) * 4 / 2**20


def peak(folder: Path, way: str) -> float:
    """MiB of one run in a fresh process."""
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    with open(folder / "log", "wb") as log:
        child = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), way], env=env, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError((folder / "log").read_text(encoding="utf-8", errors="replace")[-2000:])
    return usage.ru_maxrss / 1024


def main() -> None:
    """Measures both ways."""
    args = arguments(__doc__ or "", runs={"type": int, "default": 3, "help": "runs of each way"})
    blocks, width, repeats = (6, 256, 1) if args.quick else (24, 512, args.runs)
    found: dict[str, list[float]] = {"base": [], "streamed": [], "whole": [], "again": []}
    size = 0.0
    for _ in range(repeats):
        for name, count, way in (
            ("base", 1, "streamed"),
            ("streamed", blocks, "streamed"),
            ("whole", blocks, "whole"),
            ("again", blocks, "whole"),
        ):
            with tempfile.TemporaryDirectory() as folder:
                held = build(Path(folder) / "m", count, width)
                size = held if count > 1 else size
                found[name].append(peak(Path(folder) / "m", way))
    base = sorted(found["base"])[repeats // 2]
    above = {name: [value - base for value in values] for name, values in found.items()}
    ratio = bootstrap([b / max(a, 1.0) for a, b in zip(above["streamed"], above["whole"], strict=True)])
    control = bootstrap([b / a for a, b in zip(above["again"], above["whole"], strict=True)])
    middle = {name: sorted(values)[repeats // 2] for name, values in above.items()}
    print(f"base {base:.0f} MiB; above it streamed {middle['streamed']:.0f}, whole {middle['whole']:.0f}; blocks {size:.0f} MiB in float32")
    facts: dict[str, Any] = {"unit": "MiB above the base", "base": base, "blocks_mib": size, "block_mib": size / blocks, "peaks": found}
    lead = {"ours": middle["streamed"], "peer": middle["whole"], "ratio": ratio["value"], "ci95": [ratio["low"], ratio["high"]]}
    finish("quant_memory", {**lead, "control": control, **facts}, args)


if __name__ == "__main__":
    main()
