"""Block after block: fit, measure, commit, go on; a kill costs the block in hand.

Hidden states of the float and of the quantized model lie on disk between blocks. A finished block is in the store with its
report, and the states behind it are on disk before it counts as finished, so the same command goes on with the next one.
"""

from __future__ import annotations

import copy
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.core.events import Events
from posttrain.errors import QuantError
from posttrain.quant.blocks import Blocks
from posttrain.quant.calibration import Windows
from posttrain.quant.closed_form import Grid
from posttrain.quant.experts import block_layers
from posttrain.quant.job import Job, capture
from posttrain.quant.layers import Layer
from posttrain.quant.states import States, batches
from posttrain.quant.store import Store, rounded


@dataclass(frozen=True)
class Plan:
    """What every layer becomes.

    Args:
        grids: layer name -> bits, groups, scales; a layer without an entry stays dense.
        ranks: layer name -> rank of its adapter.
        adapter_dtype: type that A and B are stored in.
        states_dtype: type of the hidden states on disk.
        batch: windows in a forward pass.
        kl_windows: held-out windows on which KL is measured after every block; 0 = none.
        last: quantize only so many blocks from the first on; None = all.
    """

    grids: dict[str, Grid]
    ranks: dict[str, int]
    adapter_dtype: torch.dtype = torch.float32
    states_dtype: torch.dtype = torch.float32
    batch: int = 8
    kl_windows: int = 4
    last: int | None = None


class Walk:
    """The way through the blocks.

    Args:
        blocks: of the model; where they are all in memory, they compute with the quantized weights afterwards.
        plan: what every layer becomes.
        windows: calibration.
        work: folder that survives a kill.
        events: progress.
        seed: of the stage.
    """

    def __init__(self, blocks: Blocks, plan: Plan, windows: Windows, work: Path, events: Events, seed: int = 0) -> None:
        self.blocks, self.plan, self.windows, self.work, self.events, self.seed = blocks, plan, windows, work, events, seed
        self.store = Store(work / "blocks")
        self.width = 0
        self._wanted: Tensor | None = None

    def __call__(self, fit: Callable[[Job, States], None]) -> Store:
        """Fits what is not finished yet.

        Args:
            fit: fills `job.fitted` of a block; given the job and F(H), the states that the float block makes.
        """
        count = min(self.plan.last or len(self.blocks), len(self.blocks))
        started, first = time.monotonic(), self.store.done
        if first:
            self.events.log(f"going on after block {first} of {count}")
        if first < count:
            plain, quantized = self._entering(first)
            self._wanted = self._float_end(plain, first) if self.plan.kl_windows and not self.blocks.streamed else None
        for index in range(count):
            if index < first:
                self._restore(index)
                continue
            plain, quantized = self._block(index, plain, quantized, fit)
            spent = time.monotonic() - started
            self.events.progress("quantize", index + 1, count, unit="block", every_s=0)
            report = self.store.reports[-1]
            self.events.log(
                f"block {index + 1} of {count}: error {report['error_train']:.3g} fitted, {report['error_held']:.3g} held out"
                + (f", KL {report['kl']:.3g}" if "kl" in report else "")
                + f", {report['seconds']:.1f} s; {spent / (index + 1 - first) * (count - index - 1):.0f} s left"
            )
        shutil.rmtree(self.work / "states", ignore_errors=True)
        return self.store

    def _block(self, index: int, plain: States, quantized: States, fit: Callable[[Job, States], None]) -> tuple[States, States]:
        started = time.monotonic()
        with self.blocks.open(index) as block:
            after = self._states("float", index + 1), self._states("quantized", index + 1)
            work = copy.deepcopy(block)
            layers = [layer for layer in block_layers(work, self.blocks.name(index)) if layer.name in self.plan.grids]
            own = [layer.within(block) for layer in layers]
            inputs, routed = capture(self.blocks, index, block, own, (plain, after[0]), self.work / "states", self.plan.batch)
            job = Job(
                self.blocks, index, block, work, layers, (plain, quantized), self.windows.train, self.plan.grids, self.plan.ranks,
                self.plan.batch, inputs, routed, self.seed + index,
            )  # fmt: skip
            if layers:
                fit(job, after[0])
                for layer in layers:
                    if layer.name in job.fitted:
                        job.put(layer, rounded(job.fitted[layer.name], self.plan.adapter_dtype))
            report = self._report(job, after)
            for layer in layers:
                layer.within(block).set(layer.weight)
            if self._wanted is not None:
                report["kl"], report["top1"] = self._kl(index + 1, after[1])
        report["seconds"] = round(time.monotonic() - started, 2)
        for states in after:
            states.flush()
        self.store.commit(job.fitted, report)
        for states in (plain, quantized, *inputs.values()):
            states.remove()
        return after

    def _report(self, job: Job, after: tuple[States, States]) -> dict[str, Any]:
        """Runs the quantized block over all rows, keeps its states, and measures what they lost."""
        sums = {"train": torch.zeros(4, dtype=torch.float64), "held": torch.zeros(4, dtype=torch.float64)}
        for part, (start, end) in zip(sums, job.parts, strict=True):
            for low, high in batches(start, end, self.plan.batch):
                with torch.no_grad():
                    out = self.blocks.run(job.index, job.quantized, job.states[1].read(low, high))
                if not torch.isfinite(out).all():
                    raise QuantError(
                        "the quantized block gives NaN or infinity", where=self.blocks.name(job.index), fix="use more bits there"
                    )
                after[1].write(low, out)
                wanted = after[0].read(low, high)
                norm = wanted.square().sum(-1).double()
                lost = (out.float() - wanted).square().sum(-1).double()
                share = lost / norm.clamp(min=1e-30)
                sums[part] += torch.stack([lost.sum(), norm.sum(), share.sum(), norm.new_tensor(norm.numel())]).cpu()
        found: dict[str, Any] = {"block": self.blocks.name(job.index)}
        for part, total in sums.items():
            lost_sum, norm_sum, share_sum, tokens = total.tolist()
            found |= {f"error_{part}": lost_sum / max(norm_sum, 1e-30), f"error_token_{part}": share_sum / max(tokens, 1)}
        found |= job.facts
        found["layers"] = [self._layer(job, layer) for layer in job.layers]
        found["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
        return found

    def _layer(self, job: Job, layer: Layer) -> dict[str, Any]:
        row: dict[str, Any] = {"name": layer.name, "shape": list(layer.shape)}
        one = job.fitted.get(layer.name)
        if one is None:
            return row | {"dense": "no token reached it"}
        weight, effective = job.weights[layer.name].float(), one.effective()
        ends = ((one.q.codes == 0) | (one.q.codes == 2**one.q.bits - 1)).float().mean()
        rank = 0 if one.a is None else one.a.shape[0]
        row |= {"bits": one.q.bits, "group_size": one.q.group_size, "rank": rank}
        row["error"] = float((effective - weight).square().sum() / weight.square().sum().clamp(min=1e-30))
        row["at_ends"] = float(ends)
        return row | job.rows.get(layer.name, {})

    @torch.no_grad()
    def _entering(self, index: int) -> tuple[States, States]:
        """States that enter a block: on disk where the block before it is finished, else made from the embeddings on."""
        self.width = self.blocks.embed(self.windows.ids[:1]).shape[-1]
        rows, length = self.windows.ids.shape
        size = rows * length * self.width * self.plan.states_dtype.itemsize
        files = [self.work / "states" / f"{kind}-{index:05d}.bin" for kind in ("float", "quantized")]
        if index and all(file.is_file() and file.stat().st_size == size for file in files):
            return self._states("float", index), self._states("quantized", index)
        plain, quantized = self._states("float", 0), self._states("quantized", 0)
        for low, high in batches(0, len(self.windows.ids), self.plan.batch):
            hidden = self.blocks.embed(self.windows.ids[low:high])
            plain.write(low, hidden)
            quantized.write(low, hidden)
        for earlier in range(index):
            with self.blocks.open(earlier) as block:
                after = self._states("float", earlier + 1), self._states("quantized", earlier + 1)
                self._advance(earlier, block, plain, after[0])
                again = copy.deepcopy(block)
                self._give(earlier, again)
                self._advance(earlier, again, quantized, after[1])
            for states in (plain, quantized):
                states.remove()
            plain, quantized = after
        return plain, quantized

    def _states(self, kind: str, index: int) -> States:
        rows, length = self.windows.ids.shape
        return States(
            self.work / "states" / f"{kind}-{index:05d}.bin", (rows, length, self.width), self.plan.states_dtype, self.blocks.device
        )

    @torch.no_grad()
    def _advance(self, index: int, block: nn.Module, before: States, after: States) -> None:
        for low, high in batches(0, len(before), self.plan.batch):
            after.write(low, self.blocks.run(index, block, before.read(low, high)))

    def _restore(self, index: int) -> None:
        """Gives a finished block its weights back."""
        if self.blocks.streamed:
            return
        self._give(index, self.blocks.modules[index])

    def _give(self, index: int, block: nn.Module) -> None:
        for layer in block_layers(block, self.blocks.name(index)):
            if layer.name in self.store:
                layer.set(self.store[layer.name].effective())

    @torch.no_grad()
    def _float_end(self, states: States, index: int) -> Tensor:
        """States of the float model behind its last block, on the windows that KL is measured on."""
        return self._rest(index, states)

    @torch.no_grad()
    def _rest(self, index: int, states: States) -> Tensor:
        first = self.windows.train
        hidden = states.read(first, min(first + self.plan.kl_windows, len(states)))
        for later in range(index, len(self.blocks)):
            with self.blocks.open(later) as block:
                hidden = self.blocks.run(later, block, hidden)
        return hidden

    @torch.no_grad()
    def _kl(self, index: int, states: States) -> tuple[float, float]:
        """(mean over tokens of KL(float || quantized so far) in nats, share of tokens with the same first choice)."""
        assert self._wanted is not None
        found = self._rest(index, states)
        return divergence(self.blocks, self._wanted, found)


@torch.no_grad()
def divergence(blocks: Blocks, wanted: Tensor, found: Tensor) -> tuple[float, float]:
    """(mean KL(p || q) in nats, share of equal first choices) of the logits behind two sets of final states [rows, length, width]."""
    total, same, tokens = 0.0, 0, 0
    for row in range(len(wanted)):
        p, q = (blocks.head(states[row : row + 1])[0].log_softmax(-1) for states in (wanted, found))
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(p)
    return max(total / tokens, 0.0), same / tokens
