"""`posttrain verify RUN --load`: every quantized checkpoint of a run loaded again, in each loader that is present.

transformers must give the logits that were recorded when the checkpoint was committed; vLLM, where it is installed and can
run the width on this machine, the log-probabilities that transformers gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.core.artifact import OUT
from posttrain.core.rundir import read_manifest
from posttrain.errors import ArtifactError


def load_again(folders: list[Path], trust_remote_code: bool = False) -> list[str]:
    """Loads the quantized artifacts among committed stages; one line for each loader of each.

    Args:
        folders: stage folders.
        trust_remote_code: run code that comes with a model.

    Raises:
        ArtifactError: a checkpoint that no longer computes what it did.
        QuantError: vLLM and transformers disagree.
    """
    lines: list[str] = []
    for folder in folders:
        manifest = read_manifest(folder)
        if manifest["kind"] == "quantized":
            lines += _load(folder / OUT, manifest["name"], manifest["summary"], trust_remote_code)
    return lines or ["no quantized checkpoint in this run"]


def _load(out: Path, name: str, summary: dict[str, Any], trust: bool) -> list[str]:
    from posttrain.models.load import load_model
    from posttrain.models.reload import LIMIT, probe_logits
    from posttrain.quant.engine_check import check_engine, unavailable

    facts = {"format": "compressed-tensors", **summary}
    if not facts["loads_in"]["transformers"]:
        return [f"{name}: transformers does not read {facts['format']} by itself"]
    model = load_model(out, dtype="float32", trust_remote_code=trust).model
    logits = probe_logits(model)
    lines = [f"{name}: transformers loads it"]
    if recorded := summary.get("probe"):
        worst = float((logits[0, : len(recorded), : len(recorded[0])] - logits.new_tensor(recorded)).abs().max())
        limit = max(LIMIT * float(logits.std()), 1e-5)
        if not worst <= limit:
            raise ArtifactError(
                f"its logits differ by {worst:g} from those recorded when it was committed, the limit is {limit:g}",
                where=str(out),
                fix="compare the versions of transformers and compressed-tensors with the run's env.json",
            )
        lines = [f"{name}: transformers gives the recorded logits (largest difference {worst:.1e})"]
    reason = unavailable(facts["bits"], facts["format"])
    if reason:
        return [*lines, f"{name}: not loaded in vLLM: {reason}"]
    adapter = out if (out / "adapter_config.json").is_file() else None
    found = check_engine(out / "base" if adapter else out, model, adapter=adapter, rank=summary.get("max_lora_rank", 0))
    return [*lines, f"{name}: vLLM agrees, log-probabilities within {found['max_logprob_diff']:.2g}"]
