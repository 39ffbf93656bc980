"""The sampling step against its definition."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from posttrain.rollout.base import Sampling, request_seed  # noqa: E402
from posttrain.rollout.sampling import SamplingRows, draw, sample, sampling_logprobs, uniforms  # noqa: E402


def reference(logits, sampling):
    """Float64 numpy: temperature, top-k, top-p, renormalise."""
    scaled = logits.astype(np.float64) / sampling.temperature
    if sampling.top_k:
        scaled[scaled < np.sort(scaled)[-min(sampling.top_k, len(scaled))]] = -np.inf
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    if sampling.top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        out = order[(before >= sampling.top_p) & (np.arange(len(p)) > 0)]
        p[out] = 0
    return p / p.sum()


SETTINGS = [
    Sampling(temperature=0.3),
    Sampling(temperature=1.7),
    Sampling(top_k=3),
    Sampling(top_k=500),
    Sampling(top_p=0.5),
    Sampling(top_p=1e-9),
    Sampling(temperature=0.7, top_k=10, top_p=0.8),
]


def test_distribution_equals_the_definition():
    logits = np.random.default_rng(0).normal(size=(len(SETTINGS), 50)).astype(np.float32) * 2
    found = sampling_logprobs(torch.from_numpy(logits), SamplingRows.of(SETTINGS)).exp().numpy()
    expected = np.stack([reference(row, sampling) for row, sampling in zip(logits, SETTINGS, strict=True)])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, -torch.inf, 0.5]])
    count = 40_000
    noise = torch.from_numpy(np.random.default_rng(1).random(count))
    ids, values = sample(logits.expand(count, -1), SamplingRows.of([Sampling()] * count), noise)
    p = torch.softmax(logits[0], -1)
    shares = torch.bincount(ids, minlength=6) / count
    chi2 = (count * (shares - p)[p > 0] ** 2 / p[p > 0]).sum()
    assert shares[4] == 0
    assert chi2 < 20.5
    torch.testing.assert_close(values, p.log()[ids])


def test_the_ends_of_the_unit_interval_never_pick_an_impossible_token():
    logprobs = torch.log_softmax(torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]] * 2), -1)
    assert draw(logprobs.exp(), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 2]


def test_far_tail_can_be_drawn():
    logits = torch.zeros(1, 3)
    logits[0, 0] = 25.0
    tail = 1 - 1e-12
    assert draw(torch.softmax(logits, -1), torch.tensor([tail], dtype=torch.float64)).item() in (1, 2)


def test_noise_belongs_to_the_seed():
    a, b = uniforms([3, 4], 5), uniforms([4, 3, 9], 8)
    np.testing.assert_array_equal(a[0], b[1, :5])
    np.testing.assert_array_equal(a[1], b[0, :5])
    big = uniforms([request_seed(0, "step", i) for i in range(200)], 100)
    assert abs(big.mean() - 0.5) < 0.01
    assert np.abs(np.corrcoef(big)[np.triu_indices(200, 1)]).max() < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_rows_take_the_best_with_certainty(dtype):
    logits = torch.tensor([[0.0, 3.0], [2.0, 1.0]], dtype=dtype)
    ids, values = sample(logits, SamplingRows.of([Sampling(temperature=0)] * 2), torch.tensor([0.9, 0.9], dtype=torch.float64))
    assert ids.tolist() == [1, 0]
    assert values.tolist() == [0.0, 0.0]
    assert values.dtype == torch.float32
