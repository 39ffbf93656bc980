"""The order of rows: which rows a step sees is fixed before training, whatever the processes or a resume do."""

from __future__ import annotations

from collections import Counter


def test_grouping_keeps_the_rows_of_each_step_and_saves_padding() -> None:
    from posttrain.trainers._train import epoch_order, grouped_order

    rows, per_device = 16, 4
    lengths = [(i * 37) % 101 + 1 for i in range(500)]
    order = epoch_order(500, 40 * rows, seed=5)
    grouped = grouped_order(order, lengths, rows)
    for start in range(0, len(order), rows):
        assert Counter(grouped[start : start + rows]) == Counter(order[start : start + rows])

    def padded(items: list[int]) -> int:
        return sum(per_device * max(lengths[i] for i in items[k : k + per_device]) for k in range(0, len(items), per_device))

    assert padded(grouped) < 0.8 * padded(order)


def test_each_row_comes_once_an_epoch() -> None:
    from posttrain.trainers._train import epoch_order

    order = epoch_order(7, 21, seed=1)
    assert [sorted(order[k : k + 7]) for k in (0, 7, 14)] == [list(range(7))] * 3
    assert order[:7] != order[7:14]
