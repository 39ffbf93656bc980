"""ApiQ layer by layer (arXiv 2402.05147) from moments: no tokens in the loop.

With G and C of `quant/grams.py` the output error of V = Q(gamma, beta) + B A is tr(V G V^T) - 2 tr(W C V^T) + const, so loss
and gradient cost the same however many tokens were counted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.quant.closed_form import Fitted, Grid
from posttrain.quant.grams import Moments
from posttrain.quant.reconstruct import Trainable, Training

STEPS_A_PASS = 10


def fit_gram(
    weight: Tensor,
    train: Moments,
    held: Moments,
    grid: Grid,
    start: Fitted,
    training: Training,
    *,
    fresh: bool = True,
    name: str = "weight",
) -> Fitted:
    """Trains the quantizer and adapter of one layer; the state of least held-out error is kept, the start among them.

    Args:
        weight: W [out, in].
        train, held: moments that are fitted, and that judge.
        grid: bits, groups, scales.
        start: result to begin with.
        training: what is trained, and how; a pass is STEPS_A_PASS steps of all tokens.
        fresh: the quantizer begins at the ranges of the weight and not at the codes of `start`.
        name: of the layer.
    """
    made = Trainable(start, weight, fresh, training.train, grid)
    parts = {part: params for part, params in made.parts().items() if params}
    best, found = held.error(name, weight, start.effective()), start
    if not parts:
        return found
    groups = [{"params": params, "lr": training.lr[part], "weight_decay": training.decay.get(part, 0.0)} for part, params in parts.items()]
    optimizer = torch.optim.AdamW(groups)
    rates = [group["lr"] for group in optimizer.param_groups]
    gram, pull = train.gram.float(), (weight.double() @ train.cross).float()
    energy = max(train.energy[name], 1e-30)
    steps, since = training.epochs * STEPS_A_PASS, 0
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps if training.schedule == "linear" else 1.0)
        v = made.effective()
        loss = ((v @ gram * v).sum() - 2 * (pull * v).sum()) / energy
        optimizer.zero_grad(set_to_none=True)
        if not torch.isfinite(loss):
            break
        loss.backward()
        optimizer.step()
        if (step + 1) % STEPS_A_PASS == 0:
            now = made.fitted(f"step {step + 1}")
            error = held.error(name, weight, now.effective())
            since = 0 if error < best else since + 1
            if error < best:
                best, found = error, now
            if training.patience and since >= training.patience:
                break
    return found
