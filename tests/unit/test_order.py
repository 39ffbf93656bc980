"""The order of rows: which rows a step sees is fixed before training, whatever the processes or a resume do."""

from __future__ import annotations

from collections import Counter

import pytest


@pytest.mark.parametrize("rows", [3, 8])
def test_grouping_keeps_the_rows_of_each_window_and_saves_padding(rows: int) -> None:
    from posttrain.trainers._train import GROUP_WINDOW, epoch_order, grouped_order

    lengths = [(i * 37) % 101 + 1 for i in range(500)]
    order = epoch_order(500, 400 * rows, seed=5)
    grouped = grouped_order(order, lengths, rows, seed=5)
    window = GROUP_WINDOW * rows
    for start in range(0, len(order), window):
        assert Counter(grouped[start : start + window]) == Counter(order[start : start + window])

    def padded(items: list[int]) -> int:
        return sum(rows * max(lengths[i] for i in items[k : k + rows]) for k in range(0, len(items), rows))

    assert padded(grouped) < 0.7 * padded(order)
    assert grouped == grouped_order(order, lengths, rows, seed=5) != grouped_order(order, lengths, rows, seed=6)


def test_each_row_comes_once_an_epoch() -> None:
    from posttrain.trainers._train import epoch_order

    order = epoch_order(7, 21, seed=1)
    assert [sorted(order[k : k + 7]) for k in (0, 7, 14)] == [list(range(7))] * 3
    assert order[:7] != order[7:14]
