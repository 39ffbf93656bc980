"""What a GRPO run measures about itself, against plain sums."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from posttrain.trainers import _grpo_metrics as metrics  # noqa: E402

NAN = math.nan


def test_spread_of_pass_rates_over_groups() -> None:
    rows = [[1, 1, 1, 1], [1, 1, -1, NAN], [1, -1, -1, -1], [-1, -1, -1, NAN], [NAN] * 4, [1, 1, -1, -1]]
    found = metrics.group_metrics(torch.tensor(rows).flatten(), 4)
    assert found["group/pass_rate"] == pytest.approx(9 / 18)
    shares = {name: found[f"group/{name}"] for name in ("all_correct", "mostly_correct", "mostly_wrong", "all_wrong")}
    assert shares == pytest.approx({"all_correct": 1 / 6, "mostly_correct": 2 / 6, "mostly_wrong": 1 / 6, "all_wrong": 1 / 6})
    assert metrics.group_metrics(torch.full((8,), NAN), 4) == {}


def test_weights_of_a_correction() -> None:
    weights = [0.5, 1.0, 2.0, 2.0, 0.25]
    sums = torch.tensor([5.0, sum(weights), sum(w * w for w in weights), 2.0])
    mean = sum(weights) / 5
    variance = sum((w - mean) ** 2 for w in weights) / 5
    assert metrics.weight_metrics(sums) == pytest.approx(
        {
            "correction/mean": mean,
            "correction/std": math.sqrt(variance),
            "correction/ess": sum(weights) ** 2 / (5 * sum(w * w for w in weights)),
            "correction/capped": 0.4,
        }
    )
    assert metrics.weight_metrics(torch.tensor([3.0, 3.0, 3.0, 0.0])) == {
        "correction/mean": 1.0, "correction/std": 0.0, "correction/ess": 1.0, "correction/capped": 0.0,
    }  # fmt: skip
    assert metrics.weight_metrics(torch.tensor([3.0, 0.0, 0.0, 3.0]))["correction/ess"] == 0.0
    assert metrics.weight_metrics(torch.zeros(4)) == {}


def test_sums_over_tokens_of_micro_batches_are_those_of_the_whole() -> None:
    """Ratios, gaps, useful tokens, and the completions of lowest and highest mean entropy; one completion is all masked."""
    noise = torch.Generator().manual_seed(0)
    logps, old, sampled, entropies = (torch.rand(6, 5, generator=noise, dtype=torch.float64) - 1 for _ in range(4))
    entropies = -entropies
    mask = (torch.arange(5) < torch.tensor([5, 3, 1, 0, 4, 2])[:, None]).long()
    sampled[1, 0] = NAN
    batch = {"old_per_token_logps": old, "sampling_per_token_logps": sampled, "advantages": torch.tensor([1.0, 0, -1, 1, 0, 2])}
    whole = metrics.token_sums(logps, entropies, batch, mask, comparable=True)
    parts = [
        metrics.token_sums(logps[i], entropies[i], {name: value[i] for name, value in batch.items()}, mask[i], comparable=True)
        for i in (slice(0, 3), slice(3, 4), slice(4, 6))
    ]
    assert torch.allclose(metrics.add_sums(metrics.add_sums(parts[0], parts[1]), parts[2]), whole)
    found = dict(zip((*metrics.SUMS, *metrics.LARGEST), whole.tolist(), strict=True))
    tokens = [(i, t) for i in range(6) for t in range(5) if mask[i, t]]
    gaps = [(old[i, t] - sampled[i, t]).item() for i, t in tokens if (i, t) != (1, 0)]
    ratios = [math.exp((logps[i, t] - old[i, t]).item()) for i, t in tokens]
    means = [entropies[i, : mask[i].sum()].mean().item() for i in (0, 1, 2, 4, 5)]
    expected = {
        "ratio_tokens": 15, "ratio": sum(ratios), "ratio_kl": sum(r - 1 - math.log(r) for r in ratios), "gap_tokens": 14,
        "gap": sum(map(abs, gaps)), "gap_kl": sum(math.exp(g) - 1 - g for g in gaps), "useful": 8, "ratio_max": max(ratios),
        "gap_max": max(map(abs, gaps)), "entropy_max": max(means), "entropy_min": -min(means),
    }  # fmt: skip
    assert found == pytest.approx(expected)


def test_nothing_but_masked_tokens() -> None:
    batch = {"advantages": torch.ones(2)}
    found = metrics.token_sums(torch.zeros(2, 3), torch.zeros(2, 3), batch, torch.zeros(2, 3, dtype=torch.long), comparable=True)
    values = dict(zip((*metrics.SUMS, *metrics.LARGEST), found.tolist(), strict=True))
    assert values.pop("entropy_max") == values.pop("entropy_min") == -math.inf
    assert not any(values.values())


def test_a_phase_inside_another_is_taken_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 4.0, 4.5, 9.0, 9.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(now))
    clock = metrics.PhaseClock()
    with clock.phase("generate"), clock.phase("reward"):
        pass
    clock.start("optimizer")
    clock.stop()
    assert clock.take() == {"generate": 1.0 + 0.5, "reward": 3.0, "optimizer": 0.0}
    assert clock.take() == {}
