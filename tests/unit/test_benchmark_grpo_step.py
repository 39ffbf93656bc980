"""The benchmark of a GRPO step: its rollouts are what they are said to be, and trainers that differ are not timed."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_kit import load

pytest.importorskip("trl")


load("_harness")
bench = load("grpo_step")
TINY = bench.Setting(hidden=64, layers=1, vocabulary=64, prompts=2, group=4, per_device=4, prompt=(3, 6), limit=12)


def test_lengths_are_skewed_or_equal() -> None:
    skewed, equal = (bench.record(replace(bench.FULL, lengths=name)) for name in ("skewed", "equal"))
    lengths = [len(ids) for ids in skewed.completion_ids]
    assert max(lengths) == bench.FULL.limit > 3 * statistics.median(lengths)
    assert {len(ids) for ids in equal.completion_ids} == {bench.FULL.limit}
    assert len({tuple(ids) for ids in skewed.prompt_ids}) == bench.FULL.prompts
    assert len(set(bench.record(replace(TINY, alike=True)).rewards[: TINY.group])) == 1


@pytest.mark.parametrize("kl", [False, True], ids=["", "kl"])
def test_both_do_the_same_and_ours_less_of_it(tmp_path: Path, kl: bool) -> None:
    found = bench.work(replace(TINY, kl=kl), tmp_path)
    assert found["gradient_gap"] < 1e-5
    assert found["ratio"] > found["lean"] > 1.0
    assert found["positions_ours"] < 0.9


def test_another_loss_is_not_timed(tmp_path: Path) -> None:
    peer, ours = (bench.Arm(kind, TINY, tmp_path) for kind in ("peer", "ours"))
    bench.assert_equal(peer, ours)
    ours.trainer.temperature = 1.1
    with pytest.raises(SystemExit, match="not the same work"):
        bench.assert_equal(peer, ours)
