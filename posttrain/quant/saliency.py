"""Which weights a language model can least afford to move, and a penalty on moving them (arXiv 2504.13932).

    S_ij = mean over windows of (d loss / d W_ij)^2        fisher: diagonal empirical Fisher of the mean next-token loss
    S_ij = (W_ij)^2 mean over tokens of x_j^2               weight-activation
    penalty = weight * L_0 * R / R_0,   R = sum over layers of mean(S_ij / mean(S) * (V_ij - W_ij)^2) / mean(W^2)

V is Q or Q + BA, L_0 and R_0 are loss and R at the first step. The published code adds lambda * sum(S (Q - W)^2) with S summed
over samples and not normalised, so its lambda depends on the scale of the gradients; here `weight` is the share of the block's
first loss and means the same for every model. Squared gradients are kept in float32 (they vanish in float16).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.core.events import Events
from posttrain.quant.layers import linear_layers

if TYPE_CHECKING:
    from posttrain.quant.apiq import Saliency
    from posttrain.quant.blocks import Blocks
    from posttrain.quant.calibration import Windows
    from posttrain.quant.job import Job
    from posttrain.quant.reconstruct import Trainable


class Salience:
    """Saliency of every weight, one file a layer.

    Args:
        cfg: `saliency` of the stage.
        folder: of the files.
    """

    def __init__(self, cfg: Saliency, folder: Path) -> None:
        self.cfg, self.folder = cfg, folder

    def measure(self, blocks: Blocks, windows: Windows, names: set[str], events: Events) -> None:
        """Fisher of the layers in `names`, unless it was measured by an earlier attempt; squared gradients are added up on disk, so
        that memory holds the model and the gradient of one layer at a time."""
        if self.cfg.kind == "weight-activation" or (self.folder / "done").is_file():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        layers = [layer for layer in linear_layers(blocks.model) if layer.name in names]
        sums = {layer.name: self._map(layer.name, layer.module.weight.shape, new=True) for layer in layers}
        frozen = {name: parameter.requires_grad for name, parameter in blocks.model.named_parameters()}
        blocks.model.requires_grad_(False)
        handles = []
        for layer in layers:
            weight: Any = layer.module.weight
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(_adder(sums[layer.name])))
        count = min(self.cfg.samples, windows.train)
        with torch.enable_grad():
            for row in range(count):
                ids = windows.ids[row : row + 1].to(blocks.device)
                blocks.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                events.progress("saliency", row + 1, count, unit="window")
        for handle in handles:
            handle.remove()
        for name, parameter in blocks.model.named_parameters():
            parameter.requires_grad_(frozen[name])
        (self.folder / "done").touch()

    def read(self, job: Job) -> dict[str, Tensor]:
        """Layer name -> saliency [out, in] over its mean, and into the report: how unequal it is."""
        found: dict[str, Tensor] = {}
        for layer in job.layers:
            if layer.expert is not None:
                continue
            parts = []
            if self.cfg.kind in ("fisher", "both"):
                stored = self._map(layer.name, (layer.shape[1], layer.shape[0]) if layer.transposed else layer.shape)
                parts.append(_normal((stored.T if layer.transposed else stored).clone()))
            if self.cfg.kind in ("weight-activation", "both"):
                energy = job.moments([layer])[0].gram.diagonal().float()
                parts.append(_normal(job.weights[layer.name].float().square() * energy))
            found[layer.name] = torch.stack(parts).mean(0)
            top = found[layer.name].flatten().sort(descending=True).values
            job.rows.setdefault(layer.name, {})["saliency_top1"] = float(top[: max(len(top) // 100, 1)].sum() / top.sum().clamp(min=1e-30))
        return found

    def _map(self, name: str, shape: Any, new: bool = False) -> Tensor:
        size = int(shape[0]) * int(shape[1])
        file = self.folder / f"{name}.bin"
        if new:
            with open(file, "wb") as stream:
                stream.truncate(size * 4)
        return torch.from_file(str(file), shared=True, size=size, dtype=torch.float32).view(int(shape[0]), int(shape[1]))


class Penalty:
    """The penalty of one block, called with the layers as they are and the loss of the step.

    Args:
        cfg: `saliency` of the stage.
        saliency: layer name -> [out, in].
        weights: layer name -> float weight [out, in].
    """

    def __init__(self, cfg: Saliency, saliency: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        self.cfg, self.saliency, self.weights = cfg, saliency, weights
        self._scale: float | None = None

    def __call__(self, made: Mapping[str, Trainable], loss: Tensor, progress: float = 0.0) -> Tensor:
        """The loss of this step with the penalty; `progress` in [0, 1) says which of `stages` it belongs to."""
        moved = sum((self._moved(name, one) for name, one in made.items()), loss.new_zeros(()))
        if self._scale is None:
            self._scale = self.cfg.weight * float(loss.detach()) / max(float(moved.detach()), 1e-30)
        stage = self.cfg.stages[min(int(progress * len(self.cfg.stages)), len(self.cfg.stages) - 1)]
        penalty = self._scale * moved
        return loss if stage == "loss" else penalty if stage == "penalty" else loss + penalty

    def _moved(self, name: str, one: Trainable) -> Tensor:
        weight = self.weights[name].float()
        value = one.codes() if self.cfg.place == "before_adapter" else one.effective()
        return (self.saliency[name] * (value - weight).square()).mean() / weight.square().mean().clamp(min=1e-30)


def _adder(total: Tensor) -> Any:
    def add(parameter: Tensor) -> None:
        if parameter.grad is not None:
            total.add_(parameter.grad.float().square())
            parameter.grad = None

    return add


def _normal(values: Tensor) -> Tensor:
    return values / values.mean().clamp(min=1e-30)
