"""How `quantize.apiq` fits one block: a start layer by layer, training by block, the guard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain.core.context import StageContext
from posttrain.quant.fit_gram import fit_gram
from posttrain.quant.fit_layers import CANDIDATES, Candidate, fit_layers
from posttrain.quant.job import Job
from posttrain.quant.reconstruct import train_block
from posttrain.quant.saliency import Penalty, Salience
from posttrain.quant.states import States, batches

if TYPE_CHECKING:
    from posttrain.quant.apiq import ApiqConfig
    from posttrain.quant.calibrated import Opened
    from posttrain.quant.calibration import Windows
    from posttrain.quant.scheme import Scheme


class BlockFit:
    """Fits blocks by the config of `quantize.apiq`.

    Args:
        cfg: of the stage.
        ctx: of the stage.
    """

    def __init__(self, cfg: ApiqConfig, ctx: StageContext) -> None:
        self.cfg, self.ctx = cfg, ctx
        self.training = cfg.training()
        self.salience: Salience | None = None

    def prepare(self, opened: Opened, scheme: Scheme, windows: Windows) -> None:
        """Measures the saliency, while the model is still the float one."""
        from posttrain.quant.calibrated import need_whole

        if self.cfg.saliency.kind in ("fisher", "both"):
            need_whole(opened, "the Fisher")
        if self.cfg.saliency.kind != "off":
            self.salience = Salience(self.cfg.saliency, Path(self.ctx.work) / "saliency")
            self.salience.measure(opened.blocks, windows, set(scheme.layers), self.ctx.events)

    def __call__(self, job: Job, target: States) -> None:
        """Fills `job.fitted`."""
        cfg = self.cfg
        others: list[str] = list(cfg.guard)
        if cfg.fit == "closed_form":
            fit_layers(job, list(dict.fromkeys(["closed_form", *others])))
        elif cfg.fit == "lw":
            fit_layers(job, list(dict.fromkeys(["lw", *others])), {"lw": self._lw()})
            return
        else:
            fit_layers(job, [cfg.start or "zero"])
        if not cfg.passes:
            return
        job.facts["start_held"] = job.block_error(1)[0]
        before = None
        if self.training.augmented:
            before = States(Path(self.ctx.work) / "states" / "augmented.bin", target.shape, target.dtype, target.device)
            with torch.no_grad():
                for low, high in batches(0, len(target), job.batch):
                    before.write(low, job.blocks.run(job.index, job.plain, job.states[1].read(low, high)))
        penalty = None if self.salience is None else Penalty(cfg.saliency, self.salience.read(job), job.weights)
        fresh = cfg.fit == "bw" and cfg.start in (None, "zero")
        train_block(job, self.training, (target, before), fresh=fresh, penalty=penalty)
        if before is not None:
            before.remove()
        if cfg.fit == "bw":
            self._guard(job, others)

    def _lw(self) -> Candidate:
        training, start = self.training, CANDIDATES[self.cfg.start or "zero"]

        def fit(weight: Any, train: Any, held: Any, grid: Any, rank: int, name: str) -> Any:
            begun = start(weight, train, held, grid, rank, name)
            return fit_gram(weight, train, held, grid, begun, training, fresh=self.cfg.start in (None, "zero"), name=name)

        return fit

    def _guard(self, job: Job, others: list[str]) -> None:
        """Keeps the block as it was trained unless another method, layer by layer, has a lower held-out error."""
        trained, rows = dict(job.fitted), dict(job.rows)
        found = {"fit": job.block_error(1)[0]}
        best = (found["fit"], "fit", trained, rows)
        for method in others:
            for layer in job.layers:
                layer.set(job.weights[layer.name])
            fit_layers(job, [method])
            found[method] = job.block_error(1)[0]
            if found[method] < best[0]:
                best = (found[method], method, dict(job.fitted), dict(job.rows))
        job.facts |= {"tried": found, "method": best[1]}
        job.rows.update(best[3])
        for layer in job.layers:
            if layer.name in best[2]:
                job.put(layer, best[2][layer.name])
        if best[1] == "fit":
            for layer in job.layers:
                if layer.name in best[2]:
                    job.rows[layer.name] = rows.get(layer.name, {}) | {"method": "bw", "how": best[2][layer.name].how}
