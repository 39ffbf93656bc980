"""Training of a block's quantizers and adapters against what the float block computes (ApiQ-bw, arXiv 2402.05147).

    loss = MSE(F(H), F^(H^)) [+ MSE(F(H^), F^(H^)) with `augmented`],   both divided by the mean square of F(H)

F is the float block, F^ the one with quantized weights and adapters, H and H^ the states that enter them. `train` says what
moves: `clip` (the ranges of the quantizer, codes follow), `scale` (scales of frozen codes), `lora` (A, B) and `weights` (the
weights that are rounded: block-wise training as in EfficientQAT, arXiv 2407.11062). After every pass over the rows the
error on the held-out rows is measured; the best state of all, the start among them, is what is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from posttrain.quant.closed_form import Fitted, Grid
from posttrain.quant.fake import Clip, Scaled
from posttrain.quant.job import Job
from posttrain.quant.layers import Layer, multiplied
from posttrain.quant.saliency import Penalty
from posttrain.quant.states import States, batches

MAX_SKIPS = 3


@dataclass(frozen=True)
class Training:
    """How a block is trained.

    Args:
        train: of clip, scale, lora, weights.
        epochs: passes over the rows.
        batch: rows a step.
        lr: learning rate of each of `train`.
        decay: weight decay of each of `train`.
        augmented: add the second term.
        schedule: `constant` or `linear` (to 0).
        patience: stop after so many passes without a better held-out error; 0 = never.
        shuffle: rows in a new order each pass; else always in the same.
        bfloat16: matrix products in bfloat16 (autocast), everything else in float32; None where the model is on a GPU.
    """

    train: tuple[str, ...]
    epochs: int
    batch: int
    lr: dict[str, float]
    decay: dict[str, float]
    augmented: bool = True
    schedule: str = "constant"
    patience: int = 2
    shuffle: bool = True
    bfloat16: bool | None = None


class Trainable(nn.Module):
    """Quantizer and adapter of one layer.

    Args:
        start: result to begin with.
        weight: float weight [out, in], which `clip` and `weights` round anew.
        fresh: the quantizer begins at the ranges of the weight and not at the codes of `start`.
        train: what takes gradients.
        grid: bits, groups, scales.
    """

    def __init__(self, start: Fitted, weight: Tensor, fresh: bool, train: tuple[str, ...], grid: Grid) -> None:
        super().__init__()
        self.quantizer: Clip | Scaled
        if "clip" in train or "weights" in train:
            base = weight if start.a is None or start.b is None or fresh else weight - start.b @ start.a
            self.quantizer = Clip(base, grid, None if fresh else start.q)
            self.quantizer.weight.requires_grad_("weights" in train)
            if "clip" not in train:
                self.quantizer.gamma.requires_grad_(False)
                self.quantizer.beta.requires_grad_(False)
        else:
            self.quantizer = Scaled(start.q, "scale" in train)
        moves = any(parameter.requires_grad for parameter in self.quantizer.parameters())
        self._still = None if moves else self.quantizer().detach()
        learn = "lora" in train
        self.a = None if start.a is None else nn.Parameter(start.a.clone(), requires_grad=learn)
        self.b = None if start.b is None else nn.Parameter(start.b.clone(), requires_grad=learn)

    def product(self) -> Callable[[Tensor], Tensor]:
        """x -> x (Q + B A)^T for the present state."""
        weight = self.codes()
        a, b = self.a, self.b
        if a is None or b is None:
            return lambda x: x @ weight.T
        return lambda x: x @ weight.T + (x @ a.T) @ b.T

    def codes(self) -> Tensor:
        """Q of the present state, [out, in], with gradients where it moves."""
        weight: Tensor = self.quantizer() if self._still is None else self._still
        return weight

    def effective(self) -> Tensor:
        """Q + B A of the present state, with gradients."""
        weight = self.codes()
        return weight if self.a is None or self.b is None else weight + self.b @ self.a

    def fitted(self, how: str = "") -> Fitted:
        """The present state."""
        a, b = (None if value is None else value.detach().clone() for value in (self.a, self.b))
        return Fitted(self.quantizer.quantized(), a, b, how)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters that take gradients, by the name `train` has for them."""
        q = self.quantizer
        found = {"lora": [self.a, self.b]}
        found |= {"clip": [q.gamma, q.beta], "weights": [q.weight]} if isinstance(q, Clip) else {"scale": [q.factor]}
        return {name: [p for p in params if p is not None and p.requires_grad] for name, params in found.items()}


def train_block(
    job: Job, plan: Training, targets: tuple[States, States | None], *, fresh: bool = False, penalty: Penalty | None = None
) -> None:
    """Trains the layers of a block from `job.fitted` on and leaves the best state there.

    Args:
        job: a block whose layers are all fitted (the start).
        plan: how.
        targets: F(H), and F(H^) where the loss is augmented.
        fresh: quantizers begin at the ranges of the float weights.
        penalty: on moving salient weights (quant/saliency.py), or None.
    """
    layers = [layer for layer in job.layers if layer.name in job.fitted and layer.expert is None]
    start = dict(job.fitted)
    made = {layer.name: Trainable(start[layer.name], job.weights[layer.name], fresh, plan.train, job.grids[layer.name]) for layer in layers}
    optimizer, rates = _optimizer(plan, made)
    if optimizer is None:
        return
    steps = plan.epochs * math.ceil(job.train / plan.batch)
    size = _mean_square(targets[0], job.train, job.batch)
    best, best_state = job.facts.get("start_held", heldout_error(job, layers, made, targets[0])), start
    since = skips = step = 0
    losses: list[float] = []
    generator = torch.Generator().manual_seed(job.seed)
    for epoch in range(plan.epochs):
        order = torch.randperm(job.train, generator=generator) if plan.shuffle else torch.arange(job.train)
        total = 0.0
        for low, high in batches(0, job.train, plan.batch):
            factor = (1 - step / steps if plan.schedule == "linear" else 1.0) * 0.5**skips
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            loss = _loss(job, layers, made, targets, order[low:high].tolist(), size, plan)
            if penalty is not None:
                loss = penalty(made, loss, step / steps)
            optimizer.zero_grad(set_to_none=True)
            if torch.isfinite(loss):
                loss.backward()
                optimizer.step()
                total += float(loss.detach()) * (high - low)
                step += 1
            else:
                skips += 1
            if skips > MAX_SKIPS:
                break
        if skips > MAX_SKIPS:
            job.facts["fallback"] = f"the loss was not finite {skips} times; the start is kept"
            best_state = start
            break
        losses.append(total / job.train)
        error = heldout_error(job, layers, made, targets[0])
        since = 0 if error < best else since + 1
        if error < best:
            best, best_state = error, {name: one.fitted(f"pass {epoch + 1}") for name, one in made.items()}
            clipped = {name: one.quantizer.clipped() for name, one in made.items() if isinstance(one.quantizer, Clip)}
            for name, (mean, least) in clipped.items():
                job.rows.setdefault(name, {}).update(clip_mean=mean, clip_min=least)
        if plan.patience and since >= plan.patience:
            break
    for layer in layers:
        job.put(layer, best_state[layer.name])
    job.facts |= {"passes": len(losses), "steps": step, "losses": losses, "skipped_steps": skips, "kept_start": best_state is start}


def _optimizer(plan: Training, made: dict[str, Trainable]) -> tuple[torch.optim.Optimizer | None, list[float]]:
    """AdamW over what is trained, and the learning rate of each of its groups."""
    found: dict[str, list[nn.Parameter]] = {}
    for one in made.values():
        for part, params in one.parts().items():
            found.setdefault(part, []).extend(params)
    parts = [part for part in plan.train if found.get(part)]
    groups = [{"params": found[part], "lr": plan.lr[part], "weight_decay": plan.decay.get(part, 0.0)} for part in parts]
    return (torch.optim.AdamW(groups) if groups else None), [plan.lr[part] for part in parts]


def _loss(
    job: Job,
    layers: list[Layer],
    made: dict[str, Trainable],
    targets: tuple[States, States | None],
    rows: list[int],
    size: float,
    plan: Training,
) -> Tensor:
    hidden = torch.cat([job.states[1].read(row, row + 1) for row in rows])
    with multiplied(layers, {name: one.product() for name, one in made.items()}), _matmul(hidden.device, plan.bfloat16):
        out = job.blocks.run(job.index, job.quantized, hidden).float()
    loss = out.new_zeros(())
    for target in targets:
        if target is not None:
            wanted = torch.cat([target.read(row, row + 1) for row in rows])
            loss = loss + (out - wanted).square().mean() / size
    return loss


def _matmul(device: torch.device, wanted: bool | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda" if wanted is None else wanted)


@torch.no_grad()
def heldout_error(job: Job, layers: list[Layer], made: dict[str, Trainable], target: States) -> float:
    """||F(H) - F^(H^)||^2 / ||F(H)||^2 over the held-out rows."""
    wrong = total = 0.0
    with multiplied(layers, {name: one.product() for name, one in made.items()}):
        for low, high in batches(*job.parts[1], job.batch):
            wanted = target.read(low, high)
            out = job.blocks.run(job.index, job.quantized, job.states[1].read(low, high))
            wrong += float((out - wanted).square().sum(dtype=torch.float64))
            total += float(wanted.square().sum(dtype=torch.float64))
    return wrong / max(total, 1e-30)


def _mean_square(states: States, rows: int, batch: int) -> float:
    total = sum(float(states.read(low, high).square().sum(dtype=torch.float64)) for low, high in batches(0, rows, batch))
    return max(total / (rows * states.shape[1] * states.shape[2]), 1e-30)
