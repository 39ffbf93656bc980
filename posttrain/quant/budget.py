"""The best choice of bits, groups and ranks within a budget, from a table of sizes and expected losses.

Units (layers, or layers that are fused when served) have options (size in bits, expected loss). The lower convex hull of a
unit's options is walked by steps of falling gain a bit; taking the steepest steps of all units first is optimal up to one
step (Lagrange relaxation of the multiple-choice knapsack). What is left is filled with single better options that fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key")


@dataclass(frozen=True)
class Option(Generic[Key]):
    """One way to store a unit.

    Args:
        key: what it is.
        size: bits on disk.
        loss: expected increase of the loss, nats a token.
    """

    key: Key
    size: float
    loss: float


def choose(units: Mapping[str, Sequence[Option[Key]]], budget: float) -> dict[str, Option[Key]] | None:
    """An option for each unit, of least total loss with total size within the budget; None where nothing fits.

    Args:
        units: unit -> its options, at least one each.
        budget: bits in all.
    """
    hulls = {unit: lower_hull(options) for unit, options in units.items()}
    place = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0].size for hull in hulls.values())
    if left < 0:
        return None
    steps = sorted(
        ((hull[i].loss - hull[i + 1].loss) / (hull[i + 1].size - hull[i].size), unit, i)
        for unit, hull in hulls.items()
        for i in range(len(hull) - 1)
    )
    stopped: set[str] = set()
    for _, unit, i in reversed(steps):
        need = hulls[unit][i + 1].size - hulls[unit][i].size
        if unit in stopped or need > left:
            stopped.add(unit)
            continue
        place[unit], left = i + 1, left - need
    found = {unit: hull[place[unit]] for unit, hull in hulls.items()}
    return _filled(found, units, left)


def lower_hull(options: Sequence[Option[Key]]) -> list[Option[Key]]:
    """Options of growing size on the lower convex hull of (size, loss), losses falling."""
    hull: list[Option[Key]] = []
    for option in sorted(options, key=lambda o: (o.size, o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        if hull and option.size == hull[-1].size:
            hull.pop()
        hull.append(option)
    return hull


def _slope(one: Option[Key], two: Option[Key]) -> float:
    return (two.loss - one.loss) / (two.size - one.size) if two.size > one.size else float("-inf")


def _filled(found: dict[str, Option[Key]], units: Mapping[str, Sequence[Option[Key]]], left: float) -> dict[str, Option[Key]]:
    while True:
        better = [
            ((found[unit].loss - option.loss), unit, option)
            for unit, options in units.items()
            for option in options
            if option.loss < found[unit].loss and option.size - found[unit].size <= left
        ]
        if not better:
            return found
        _, unit, option = max(better, key=lambda item: item[0])
        left -= option.size - found[unit].size
        found[unit] = option
