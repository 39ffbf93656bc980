"""A real pretrained model, calibration text of two domains and held-out text of three, for the quantization benchmarks.

Calibration: docstrings of installed packages and their prose (README, NEWS, licences left out), half of the tokens each. Held out,
from other files: docstrings of the standard library (`py`), prose of other packages (`doc`), and function bodies (`code`), a domain
that calibration does not hold. A window is 512 tokens.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _corpus import _site_docstrings, _site_texts, _stdlib_code, _stdlib_docstrings
from noisefit_real import MODEL

LENGTH = 512
EVAL_WINDOWS = {"py": 8, "doc": 8, "code": 8}


def _windows(tokenizer: Any, texts: Iterator[tuple[str, str]], count: int) -> Any:
    import torch

    ids: list[int] = []
    for _, text in texts:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= count * LENGTH:
            break
    if len(ids) < count * LENGTH:
        sys.exit(f"this machine's packages hold {len(ids)} tokens of a domain, needed are {count * LENGTH}")
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


@cache
def calibration(windows: int, held: int, seed: int) -> Any:
    """`Windows`: half docstrings, half prose, in both parts; texts of another seed than the evaluation's, other places."""
    import torch

    from posttrain.quant.calibration import Windows

    tokenizer = model().tokenizer
    half, rest = windows // 2, held // 2
    parts = []
    for texts in (_site_docstrings(seed), _outside(_site_texts(seed))):
        parts.append(_windows(tokenizer, texts, half + rest))
    ids = torch.cat([*(part[:half] for part in parts), *(part[half:] for part in parts)])
    return Windows(ids, 2 * half)


def _outside(texts: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Prose whose file is not one of the evaluation's half, told by the parity of a hash of its place."""
    return ((place, text) for place, text in texts if _parity(place) == 0)


def _parity(place: str) -> int:
    import hashlib

    return hashlib.sha256(place.encode()).digest()[0] % 2


@cache
def evaluation(scale: float = 1.0) -> tuple[dict[str, Any], dict[str, Any]]:
    """(domain -> windows [n, 512], domain -> final states of the float model on them)."""
    loaded = model()
    tokenizer = loaded.tokenizer
    sources = {
        "py": _stdlib_docstrings(99),
        "doc": ((place, text) for place, text in _site_texts(99) if _parity(place) == 1),
        "code": _stdlib_code(99),
    }
    windows = {name: _windows(tokenizer, texts, max(int(EVAL_WINDOWS[name] * scale), 1)) for name, texts in sources.items()}
    return windows, {name: _final(loaded.model, ids) for name, ids in windows.items()}


@cache
def model() -> Any:
    """The float model in float32, with its tokenizer."""
    from posttrain.models.load import load_model

    return load_model(MODEL, dtype="float32")


def _final(model: Any, ids: Any) -> Any:
    import torch

    with torch.no_grad():
        return torch.cat([model.base_model(input_ids=row[None], use_cache=False).last_hidden_state for row in ids])


def compare(model: Any, windows: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """KL(float || model) in nats a token and loss by domain and over all, and the share of equal first choices."""
    import torch

    head = model.get_output_embeddings()
    sums: dict[str, list[float]] = {}
    with torch.no_grad():
        for name, ids in windows.items():
            found = _final(model, ids)
            total = [0.0, 0.0, 0.0, 0.0, 0.0]
            for row, one, two in zip(ids, wanted[name], found, strict=True):
                p, q = (head(states[:-1]).float().log_softmax(-1) for states in (one, two))
                target = row[1:, None]
                total[0] += float((p.exp() * (p - q)).sum())
                total[1] -= float(q.gather(-1, target).sum())
                total[2] -= float(p.gather(-1, target).sum())
                total[3] += float((p.argmax(-1) == q.argmax(-1)).sum())
                total[4] += len(target)
            sums[name] = total
    names = list(sums)
    sums["all"] = [sum(sums[name][place] for name in names) for place in range(5)]
    return {name: {"kl": t[0] / t[4], "loss": t[1] / t[4], "float_loss": t[2] / t[4], "top1": t[3] / t[4]} for name, t in sums.items()}


def quantized(
    fit: Callable[[Any, Any], None], *, bits: int, rank: int = 0, group: int = 64, windows: Any, blocks: int | None, choose: Any = None
) -> dict[str, Any]:
    """Quantizes a fresh copy of the model with `fit`; the copy, seconds a block, bits a weight with scales and adapter, reports."""
    import copy

    import torch

    from posttrain.core.events import Events
    from posttrain.quant.blocks import Blocks
    from posttrain.quant.closed_form import Grid
    from posttrain.quant.export import Form
    from posttrain.quant.layers import linear_layers
    from posttrain.quant.walk import Plan, Walk

    loaded = model()
    fresh = copy.deepcopy(loaded.model)
    walked = Blocks(fresh)
    names = {
        layer.name: layer.shape
        for index, module in enumerate(walked.modules)
        if blocks is None or index < blocks
        for layer in linear_layers(module, walked.name(index))
    }
    grid = Grid(bits, group, False, True, torch.bfloat16)
    plan = Plan(dict.fromkeys(names, grid), dict.fromkeys(names, rank), torch.bfloat16, torch.float32, 8, 0, blocks)
    if choose is not None:
        plan = choose(walked, windows, plan)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        walk = Walk(walked, plan, windows, Path(folder), Events(None), 0)
        store = walk(fit)
        forms = [Form.of(store[name].q) for name in store]
        adapter = sum(one.a.numel() + one.b.numel() for name in store if (one := store[name]).a is not None)
    weights = sum(out * columns for out, columns in names.values())
    return {
        "model": fresh,
        "seconds_a_block": (time.monotonic() - started) / len(store.reports),
        "bits_a_weight": (sum(form.stored_bits() for form in forms) + 16 * adapter) / weights,
        "blocks": [
            {key: report[key] for key in ("error_train", "error_held", "error_token_train", "error_token_held", "seconds")}
            for report in store.reports
        ],
    }
