"""Which rows are picked: one or two rounds, each an order of the rows and where it is cut in each group.

Without quotas there is one round and one group. With quotas the first round cuts every named group at its share, and the
second spends what is left on the best of the remaining rows. With separate targets each round ranks its rows anew, see
`data_pipelines.targets`.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from data_pipelines.engine import Job
from data_pipelines.orders import ALL, Columns, Groups, Order, OwnOrder, TableOrder, keys_of, sweep
from data_pipelines.pick import Cut, cut_from_json, cut_to_json, find_cuts, picked
from data_pipelines.shards import Shard
from posttrain.core.durable import write_json

UNBOUNDED = 1 << 62


@dataclass(frozen=True)
class Round:
    """An order and its cuts; `groups` names the groups that are cut by themselves, none = all rows are one group."""

    order: Order
    cuts: list[Cut]
    groups: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    """Where all rows are one group: the names of the groups that take part; none = all do."""

    def grouping(self, quotas: bool) -> Groups:
        """The groups as numbers."""
        if not quotas:
            return ALL
        if self.groups:
            return Groups(list(self.groups))
        return Groups(list(self.only), merged=True, rest=not self.only)

    def mask(self, shard: Shard, columns: Columns, quotas: bool) -> np.ndarray:
        """bool[n]: the rows at or before their group's cut."""
        keys = keys_of(shard, columns, self.order, "rows", self.grouping(quotas))
        inside = np.zeros(len(keys.row), bool)
        group = keys.groups()
        for code, cut in enumerate(self.cuts):
            inside |= picked(keys, cut) & (group == code)
        found = np.zeros(len(columns["place"]), bool)
        found[np.searchsorted(columns["place"], keys.row[inside])] = True
        return found


@dataclass(frozen=True)
class Choice:
    """All rounds; a row is picked if one of them picks it."""

    rounds: list[Round]
    quotas: bool

    def mask(self, shard: Shard, columns: Columns) -> np.ndarray:
        """bool[n] of a batch of score columns."""
        found = np.zeros(len(columns["place"]), bool)
        for item in self.rounds:
            found |= item.mask(shard, columns, self.quotas)
        return found

    def repeats(self, shard: Shard, columns: Columns) -> np.ndarray | None:
        """int64[n] or None: how often a picked row should be seen."""
        order = self.rounds[0].order
        return order.column("repeat", shard, columns, 1) if isinstance(order, TableOrder) and order.has("repeat") else None

    @property
    def rows(self) -> int:
        """Rows picked."""
        return sum(cut.rows for item in self.rounds for cut in item.cuts)

    @property
    def weight(self) -> int:
        """What they weigh, in the budget's unit."""
        return sum(cut.weight for item in self.rounds for cut in item.cuts)

    @property
    def last(self) -> Round:
        """The round that spends what is left, or the only one."""
        return self.rounds[-1]


def group_amounts(quota: Any, amount: int, groups: Counter[str]) -> dict[str, int]:
    """Group -> its part of the budget, rounded down: by `shares`, or by the groups' numbers of raw rows where there are none."""
    if quota.shares:
        return {name: int(Decimal(str(share)) * amount) for name, share in sorted(quota.shares.items())}
    total = groups.total()
    return {name: amount * count // total for name, count in sorted(groups.items())}


def choose(job: Job, shards: list[Shard], amount: int | None, groups: Counter[str]) -> Choice:
    """Cuts the order(s) at the budget.

    Args:
        amount: the budget in its unit; None = the whole order (`budget: {auto: true}`).
        groups: raw rows by quota group.
    """
    quota = job.config.quotas
    amount = UNBOUNDED if amount is None else amount
    if quota is None:
        return Choice([_round(job, shards, "first", [amount])], False)
    amounts = group_amounts(quota, amount, groups)
    first = _round(job, shards, "first", list(amounts.values()), groups=tuple(amounts))
    choice = Choice([first], True)
    only = tuple(amounts) if quota.others == "none" else ()
    rest = _round(job, shards, "rest", [amount - choice.weight], only=only, before=choice)
    return Choice([first, rest], True)


def _round(
    job: Job,
    shards: list[Shard],
    name: str,
    amounts: list[int],
    *,
    groups: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    before: Any = None,
) -> Round:
    unit, draft = job.config.budget.unit, Round(OwnOrder(job), [], groups, only)
    numbers = draft.grouping(job.config.quotas is not None)
    without = before.mask if before else None
    order = _order(job, shards, name, amounts, numbers, without)
    return Round(order, find_cuts(sweep(job, shards, order, unit, numbers, without), amounts), groups, only)


def _order(job: Job, shards: list[Shard], name: str, amounts: list[int], groups: Groups, without: Any) -> Order:
    if job.hook("rank"):
        return TableOrder("ranking", job.folder / "orders" / "ranking")
    if len(job.targets) > 1:
        from data_pipelines.targets import merged_order

        return merged_order(job, shards, name, amounts, groups, without)
    return OwnOrder(job)


def save_choice(job: Job, choice: Choice) -> None:
    """Writes `choice.json`; the tables of its orders are there already."""
    rounds = [
        {"order": item.order.name, "groups": item.groups, "only": item.only, "cuts": [cut_to_json(cut) for cut in item.cuts]}
        for item in choice.rounds
    ]
    write_json(job.folder / "choice.json", {"rounds": rounds, "quotas": choice.quotas})


def load_choice(job: Job) -> Choice:
    """What `save_choice` wrote."""
    found = json.loads((job.folder / "choice.json").read_text(encoding="utf-8"))
    rounds = []
    for item in found["rounds"]:
        name = item["order"]
        order: Order = OwnOrder(job) if name == "own" else TableOrder(name, job.folder / "orders" / name)
        rounds.append(Round(order, [cut_from_json(cut) for cut in item["cuts"]], tuple(item["groups"]), tuple(item["only"])))
    return Choice(rounds, found["quotas"])
