"""Mixtures of experts: each expert of a stacked parameter is a layer of its own, fitted to the tokens that reach it.

transformers holds the experts of a block as `gate_up_proj` [experts, 2 inner, hidden] and `down_proj` [experts, hidden, inner],
and computes down (act(gate) * up). An expert is fitted to the tokens that the float model's router sends to it. One that
gets fewer tokens than it has inputs borrows: moments of tokens of the whole layer, passed through it, are added with the
weight of the missing ones, so that no expert is left to chance; the report tells tokens and borrowed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from posttrain.errors import QuantError
from posttrain.quant.grams import Moments
from posttrain.quant.layers import Layer
from posttrain.quant.states import States, batches

if TYPE_CHECKING:
    from posttrain.quant.job import Job

UP, DOWN = "gate_up_proj", "down_proj"
LENT = 2048
"""Tokens of the whole layer that a starved expert borrows from, at most."""


@dataclass(frozen=True)
class Routed:
    """What the float block's experts were given.

    Args:
        inputs: hidden states [rows, length, hidden].
        choice: [rows * length, k], experts of each token.
    """

    inputs: States
    choice: Tensor


def banks(module: nn.Module) -> dict[str, nn.Module]:
    """Inner name -> module that stacks experts.

    Raises:
        QuantError: experts are stacked in a way this cannot quantize (biases, other products).
    """
    found: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        stacked = {key: value for key, value in part.named_parameters(recurse=False) if value.ndim == 3}
        if not stacked:
            continue
        up, down = stacked.get(UP), stacked.get(DOWN)
        plain = up is not None and down is not None and set(dict(part.named_parameters(recurse=False))) == {UP, DOWN}
        shapes = plain and up is not None and down is not None and (up.shape[2], up.shape[1]) == (down.shape[1], 2 * down.shape[2])
        if not shapes or not hasattr(part, "act_fn"):
            raise QuantError(
                f"{name}: experts of {type(part).__name__} are stacked in a way that is not known here",
                where="in.model",
                fix="leave them dense: ignore: ['re:.*experts.*']",
            )
        found[name] = part
    return found


def expert_layers(module: nn.Module, prefix: str = "") -> list[Layer]:
    """Every expert under a module, its up and its down projection: `PREFIX.mlp.experts.gate_up_proj.3`."""
    dot = f"{prefix}." if prefix else ""
    return [
        Layer(f"{dot}{name}.{attribute}.{expert}", name, part, False, attribute, expert)
        for name, part in banks(module).items()
        for expert in range(getattr(part, UP).shape[0])
        for attribute in (UP, DOWN)
    ]


def block_layers(module: nn.Module, prefix: str = "") -> list[Layer]:
    """Linear layers and experts under a module; experts that are stacked in an unknown way are left out."""
    from posttrain.quant.layers import linear_layers

    try:
        return [*linear_layers(module, prefix), *expert_layers(module, prefix)]
    except QuantError:
        return linear_layers(module, prefix)


def fit_experts(job: Job, fit: Callable[[Layer, Moments, Moments], None]) -> None:
    """Fits all experts of a block, up before down, to what the quantized layers before them give.

    Args:
        job: the block.
        fit: fits one layer, given moments of fitted and of held-out tokens.
    """
    for name, routed in job.routed.items():
        layers = [layer for layer in job.layers if layer.inner == name and layer.expert is not None]
        given = States(routed.inputs.file.with_suffix(".quantized"), routed.inputs.shape, routed.inputs.dtype, routed.inputs.device)
        _keep_inputs(job, name, given)
        for layer in layers:
            train, held = (_moments(job, layer, routed, given, start, end) for start, end in job.parts)
            if held.tokens == 0:
                held = train
            fit(layer, train, held)
            job.rows.setdefault(layer.name, {}).update(tokens=int(routed.choice.eq(layer.expert or 0).any(-1).sum()))
        given.remove()


def _keep_inputs(job: Job, name: str, given: States) -> None:
    low = 0

    def seen(module: Any, args: Any) -> None:
        given.write(low, args[0].reshape(-1, *given.shape[1:]))

    handle = job.quantized.get_submodule(name).register_forward_pre_hook(seen)
    with torch.no_grad():
        for low, high in batches(0, len(given), job.batch):
            job.blocks.run(job.index, job.quantized, job.states[1].read(low, high))
    handle.remove()


@torch.no_grad()
def _moments(job: Job, layer: Layer, routed: Routed, given: States, start: int, end: int) -> Moments:
    weight = job.weights[layer.name]
    columns = weight.shape[1]
    total = Moments.empty(columns, weight.device)
    for x, y in _tokens(job, layer, routed, given, start, end, own=True):
        total.add(x, y, {layer.name: weight})
    missing = columns - total.tokens
    if missing > 0:
        lent = Moments.empty(columns, weight.device)
        for x, y in _tokens(job, layer, routed, given, start, end, own=False):
            lent.add(x, y, {layer.name: weight})
        share = missing / max(lent.tokens, 1)
        total.gram += share * lent.gram
        total.cross += share * lent.cross
        total.energy[layer.name] = total.energy.get(layer.name, 0.0) + share * lent.energy.get(layer.name, 0.0)
        job.rows.setdefault(layer.name, {}).update(borrowed=missing)
    return total


def _tokens(job: Job, layer: Layer, routed: Routed, given: States, start: int, end: int, *, own: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs of one expert's layer in the quantized and in the float model: of its own tokens, or of evenly spaced ones of all."""
    length = given.shape[1]
    step = max((end - start) * length // LENT, 1)
    for low, high in batches(start, end, job.batch):
        choice = routed.choice[low * length : high * length]
        mine = choice.eq(layer.expert or 0).any(-1) if own else torch.arange(len(choice)) % step == 0
        if not mine.any():
            continue
        x, y = (states.read(low, high).flatten(0, 1)[mine.to(states.device)] for states in (given, routed.inputs))
        if layer.attribute == DOWN:
            x = inner(job.quantized.get_submodule(layer.inner), layer.expert, x)
            y = inner(job.plain.get_submodule(layer.inner), layer.expert, y)
        yield x, y


def inner(bank: Any, expert: int | None, x: Tensor) -> Tensor:
    """act(gate) * up of one expert: what enters its down projection."""
    gate, up = nn.functional.linear(x, getattr(bank, UP)[expert]).chunk(2, dim=-1)
    found: Tensor = bank.act_fn(gate) * up
    return found


@torch.no_grad()
def check_formula(bank: Any, hidden: Tensor) -> None:
    """Compares the module's own forward pass with ours on a few tokens that all go to one expert.

    Raises:
        QuantError: it computes something else.
    """
    x = hidden.reshape(-1, hidden.shape[-1])[:4]
    index = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
    wanted = bank.forward(x, index, torch.ones(len(x), 1, dtype=x.dtype, device=x.device))
    found = nn.functional.linear(inner(bank, 0, x), getattr(bank, DOWN)[0])
    if not torch.allclose(wanted.reshape(found.shape), found, rtol=1e-3, atol=1e-5 * float(found.abs().max()) + 1e-12):
        raise QuantError(
            f"experts of {type(bank).__name__} compute another product than down(act(gate) * up)",
            where="in.model",
            fix="leave them dense: ignore: ['re:.*experts.*']",
        )


def stacks(names: Mapping[str, Any]) -> dict[str, list[str]]:
    """Stacked parameter -> the names of its experts in order, among the names of quantized layers."""
    found: dict[str, list[str]] = {}
    for name in names:
        stem, _, last = name.rpartition(".")
        if last.isdigit() and stem.rpartition(".")[2] in (UP, DOWN):
            found.setdefault(stem, []).append(name)
    return {stem: sorted(experts, key=lambda name: int(name.rpartition(".")[2])) for stem, experts in found.items()}
