"""A written folder loaded again: it must compute what the model in memory computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.errors import QuantError

LIMIT = 1e-4


def probe_logits(model: Any, rows: int = 2, length: int = 32) -> Any:
    """float32 logits [rows, length, vocab] on fixed pseudo-random tokens."""
    import torch

    size = model.get_input_embeddings().weight.shape[0]
    length = min(length, getattr(model.config, "max_position_embeddings", None) or length)
    ids = torch.randint(0, size, (rows, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()


def check_reload(folder: Path, expected: Any, **options: Any) -> tuple[Any, dict[str, float]]:
    """Loads a folder with transformers and compares its logits.

    Args:
        folder: what was written.
        expected: `probe_logits` of the model in memory.
        options: of `load_model`.

    Returns:
        (LoadedModel, {"reload_max_diff", "reload_limit"}); the limit is LIMIT times the standard deviation of the logits.

    Raises:
        QuantError: logits differ by more, or are not finite.
    """
    import torch

    from posttrain.models.load import load_model

    loaded = load_model(folder, **options)
    found = probe_logits(loaded.model)
    limit = LIMIT * float(expected.std())
    worst = float((found - expected).abs().max()) if torch.isfinite(found).all() else float("inf")
    if not worst <= limit:
        raise QuantError(
            f"logits of the written folder differ by {worst:g} from the model in memory, the limit is {limit:g}",
            where=str(folder),
            fix="report this with the model's config.json; `reload_check: false` writes the folder all the same",
        )
    return loaded, {"reload_max_diff": worst, "reload_limit": limit}
