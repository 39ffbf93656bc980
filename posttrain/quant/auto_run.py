"""How `quantize.auto` goes: measure, choose, fit the choice and the best uniform one, keep the better."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, replace
from typing import Any

import torch

from posttrain.core.context import StageContext
from posttrain.core.durable import write_json
from posttrain.errors import QuantError
from posttrain.quant.auto import AutoConfig, kinds_for
from posttrain.quant.budget import Option, choose
from posttrain.quant.calibrated import Opened, complete, need_whole, open_model, prepared
from posttrain.quant.closed_form import Grid
from posttrain.quant.experts import stacks
from posttrain.quant.export import Form
from posttrain.quant.fit_block import BlockFit
from posttrain.quant.formats.compressed_tensors import reader_layout
from posttrain.quant.measure import Kind, losses, sensitivities
from posttrain.quant.scheme import FUSED, Scheme
from posttrain.quant.walk import Plan, Walk

Table = dict[str, dict[Kind, tuple[float, float]]]


def run_auto(cfg: AutoConfig, ctx: StageContext) -> None:
    """Runs the stage.

    Raises:
        QuantError: the smallest choice is larger than the budget.
    """
    opened = open_model(cfg, ctx)
    need_whole(opened, "the sensitivity of the layers")
    dtype, scheme, windows, plan, transposed = prepared(cfg, ctx, opened)
    names = set(scheme.layers)
    if stacks(dict.fromkeys(names)):
        raise QuantError(
            "quantize.auto does not choose for stacked experts",
            where=f"stages.{ctx.name}.ignore",
            fix="use quantize.apiq, or leave them dense: ignore: ['re:.*experts.*']",
        )
    kinds = {name: kinds_for(cfg, shape[1]) for name, shape in scheme.layers.items()}
    table = _measured(cfg, ctx, opened, windows, names, kinds, dtype)
    weights = sum(out * columns for out, columns in scheme.layers.values())
    budget = cfg.bits_per_weight * weights if cfg.bits_per_weight is not None else (cfg.mib or 0) * 8 * 2**20
    units = units_of(scheme)
    options = {unit: _options(members, table, scheme.layers, dtype) for unit, members in units.items()}
    found = choose(options, budget)
    if found is None:
        least = sum(min(option.size for option in one) for one in options.values())
        raise QuantError(
            f"the smallest choice takes {least / weights:.2f} bits a weight ({least / 8 / 2**20:.1f} MiB), the budget is "
            f"{budget / weights:.2f} ({budget / 8 / 2**20:.1f} MiB)",
            where=f"stages.{ctx.name}",
            fix="raise the budget, or allow larger groups or fewer bits",
        )
    uniform = best_uniform(options, budget)
    plans = {"auto": found} | ({"uniform": uniform} if uniform is not None and cfg.against_uniform else {})
    told = {way: {"bits": _bits(chosen, weights), "expected": sum(one.loss for one in chosen.values())} for way, chosen in plans.items()}
    results: dict[str, tuple[float, Any, Plan]] = {}
    for way, chosen in plans.items():
        if results:
            opened = _again(cfg, ctx, scheme, dtype)
        own = plan_of(plan, chosen, units, dtype)
        ctx.events.log(f"{way}: {told[way]['bits']:.2f} bits a weight, expected loss +{told[way]['expected']:.4g} nats a token")
        store = Walk(opened.blocks, own, windows, ctx.work / way, ctx.events, ctx.seed)(BlockFit(cfg, ctx))
        results[way] = (store.reports[-1].get("kl", 0.0), store, own)
        told[way]["kl"] = results[way][0]
    best = min(results, key=lambda way: results[way][0])
    if best != list(results)[-1]:
        opened = _again(cfg, ctx, scheme, dtype)
        Walk(opened.blocks, results[best][2], windows, ctx.work / best, ctx.events, ctx.seed)(BlockFit(cfg, ctx))
    why = _why(found, options, units, table)
    ctx.summary["auto"] = {"budget_bits_per_weight": budget / weights, "kept": best, "plans": told, "layers": why}
    ctx.events.log(", ".join(f"{way} KL {kl:.4g}" for way, (kl, _, _) in results.items()) + f"; {best} is kept")
    complete(cfg, ctx, opened, results[best][1], scheme, dtype, transposed)


def _again(cfg: AutoConfig, ctx: StageContext, scheme: Scheme, dtype: torch.dtype) -> Opened:
    """The float model once more."""
    from posttrain.quant.apply import round_dense

    opened = open_model(cfg, ctx)
    round_dense(opened.loaded.model, dtype, scheme)
    return opened


def _measured(
    cfg: AutoConfig, ctx: StageContext, opened: Opened, windows: Any, names: set[str], kinds: Mapping[str, list[Kind]], dtype: torch.dtype
) -> Table:
    """The table of errors; kept in the work folder, so that it is measured once."""
    file = ctx.work / "measured.json"
    if file.is_file():
        held = json.loads(file.read_text(encoding="utf-8"))
        return {name: {Kind(*kind): (error, loss) for kind, error, loss in rows} for name, rows in held.items()}
    costs = sensitivities(opened.blocks, windows, names, cfg.gradients, ctx.events)
    found = dict(losses(opened.blocks, windows, names, kinds, costs, cfg.calibration.batch, dtype, ctx.events))
    rows = {name: [[list(astuple(kind)), *values] for kind, values in one.items()] for name, one in found.items()}
    write_json(file, rows)
    return found


def units_of(scheme: Scheme) -> dict[str, list[str]]:
    """Unit -> layers that must be of one kind, since engines fuse them."""
    units: dict[str, list[str]] = {}
    for name in scheme.layers:
        stem, _, last = name.rpartition(".")
        group = next((group for group in FUSED if last in group), None)
        units.setdefault(name if group is None else f"{stem}.{'+'.join(group)}", []).append(name)
    return units


def _options(members: list[str], table: Table, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype) -> list[Option[Kind]]:
    found = []
    for kind in table[members[0]]:
        size = sum(size_of(shapes[name], kind, dtype) for name in members)
        found.append(Option(kind, size, sum(table[name][kind][1] for name in members)))
    return found


def size_of(shape: tuple[int, int], kind: Kind, dtype: torch.dtype) -> float:
    """Bits of a layer with scales, zero points and adapter."""
    width = dtype.itemsize * 8
    form = Form(shape, kind.bits, kind.group_size, kind.symmetric, width)
    return form.stored_bits(reader_layout(kind.bits)) + kind.rank * sum(shape) * width


def best_uniform(options: Mapping[str, list[Option[Kind]]], budget: float) -> dict[str, Option[Kind]] | None:
    """The same bits, group and rank everywhere (where a group does not divide, a layer's nearest), of least expected loss."""
    kinds = {option.key for one in options.values() for option in one}
    best: dict[str, Option[Kind]] | None = None
    for kind in sorted(kinds, key=lambda k: (k.bits, k.group_size, k.rank)):
        chosen = {unit: _nearest(kind, one) for unit, one in options.items()}
        if sum(option.size for option in chosen.values()) > budget:
            continue
        if best is None or sum(o.loss for o in chosen.values()) < sum(o.loss for o in best.values()):
            best = chosen
    return best


def _nearest(kind: Kind, options: list[Option[Kind]]) -> Option[Kind]:
    same = [option for option in options if (option.key.bits, option.key.rank) == (kind.bits, kind.rank)]
    return min(same, key=lambda option: abs(option.key.group_size - kind.group_size))


def plan_of(plan: Plan, chosen: Mapping[str, Option[Kind]], units: Mapping[str, list[str]], dtype: torch.dtype) -> Plan:
    """The plan with the chosen kinds in place of the uniform ones."""
    kinds = {name: chosen[unit].key for unit, members in units.items() for name in members}
    grids = {name: Grid(kind.bits, kind.group_size, kind.symmetric, True, dtype) for name, kind in kinds.items()}
    return replace(plan, grids=grids, ranks={name: kind.rank for name, kind in kinds.items()})


def _bits(chosen: Mapping[str, Option[Kind]], weights: int) -> float:
    return sum(option.size for option in chosen.values()) / weights


def _why(
    chosen: Mapping[str, Option[Kind]], options: Mapping[str, list[Option[Kind]]], units: Mapping[str, list[str]], table: Table
) -> list[dict[str, Any]]:
    """For each unit: what it became, what that is expected to cost, and what the next larger choice would have gained a bit."""
    rows = []
    for unit, option in chosen.items():
        kind = option.key
        more = [o for o in options[unit] if o.size > option.size and o.loss < option.loss]
        gain = max(((option.loss - o.loss) / (o.size - option.size) for o in more), default=0.0)
        errors = [table[name][kind][0] for name in units[unit]]
        rows.append(
            {
                "unit": unit,
                "bits": kind.bits,
                "group_size": kind.group_size,
                "rank": kind.rank,
                "error_held": max(errors),
                "expected_loss": option.loss,
                "next_gain_per_mbit": gain * 1e6,
            }
        )
    return rows
