"""D2O's loss: against numpy in float64, gradients, its equality with DPO at one own answer, and its diagnostics."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from posttrain.losses.d2o import d2o_loss, d2o_margin, jeffrey_divergence, unlikelihood  # noqa: E402


def by_hand(own, refs, negative, negative_ref, alpha, beta) -> float:
    """One prompt's loss, as it is written down."""
    k = len(own)
    inside = beta / k * sum(a - b for a, b in zip(own, refs, strict=True)) - alpha * (negative - negative_ref)
    return -math.log(1 / (1 + math.exp(-inside)))


def draw(seed: int, prompts: int = 4, k: int = 5):
    rng = np.random.default_rng(seed)
    return rng.normal(-30, 8, (prompts, k)), rng.normal(-30, 8, (prompts, k)), rng.normal(-30, 8, prompts), rng.normal(-30, 8, prompts)


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.1), (0.05, 0.1), (1.0, 0.3), (0.0, 0.1)])
def test_the_loss_is_the_papers(alpha, beta):
    own, refs, negative, negative_refs = draw(0)
    want = [by_hand(*row, alpha, beta) for row in zip(own, refs, negative, negative_refs, strict=True)]
    found = d2o_loss(d2o_margin(*(torch.tensor(x) for x in (own, refs, negative, negative_refs)), alpha, beta))
    assert np.allclose(found.numpy(), want, rtol=1e-12)


def test_gradients():
    own, refs, negative, negative_refs = (torch.tensor(x) for x in draw(1))
    own.requires_grad_(True), negative.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda a, b: d2o_loss(d2o_margin(a, refs, b, negative_refs, 0.2, 0.3)), (own, negative))
    margin = d2o_margin(own, refs, negative, negative_refs, 0.2, 0.3)
    d2o_loss(margin).sum().backward()
    weight = torch.sigmoid(-margin).detach()
    assert torch.allclose(own.grad, (-0.3 / 5 * weight)[:, None].expand(-1, 5)) and torch.allclose(negative.grad, 0.2 * weight)


def test_one_own_answer_is_dpo():
    own, refs, negative, negative_refs = (torch.tensor(x) for x in draw(2, k=1))
    ratio = (own[:, 0] - refs[:, 0]) - (negative - negative_refs)
    assert torch.allclose(d2o_loss(d2o_margin(own, refs, negative, negative_refs, 0.1, 0.1)), -torch.nn.functional.logsigmoid(0.1 * ratio))


def test_the_mean_is_inside_the_sigmoid():
    own, refs, negative, negative_refs = (torch.tensor(x) for x in draw(3))
    inside = d2o_loss(d2o_margin(own, refs, negative, negative_refs))
    outside = torch.stack([d2o_loss(d2o_margin(own[:, i : i + 1], refs[:, i : i + 1], negative, negative_refs)) for i in range(5)]).mean(0)
    assert (inside < outside).all()


def test_prompts_may_have_fewer_own_answers():
    own, refs, negative, negative_refs = (torch.tensor(x) for x in draw(4, prompts=2))
    refs[0, 3:] = math.nan
    own[0, 3:] = 0.0
    own.requires_grad_(True)
    found = d2o_loss(d2o_margin(own, refs, negative, negative_refs))
    want = d2o_loss(d2o_margin(own[:1, :3], refs[:1, :3], negative[:1], negative_refs[:1]))
    assert torch.allclose(found[0], want[0])
    found.sum().backward()
    assert not own.grad[0, 3:].any() and own.grad.isfinite().all()


def test_jeffreys_divergence_is_estimated_without_bias():
    rng = np.random.default_rng(0)
    p, r = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    exact = float(((p - r) * (np.log(p) - np.log(r))).sum())
    drawn = rng.choice(6, 200_000, p=r)
    found = jeffrey_divergence(torch.tensor(np.log(p)[drawn])[None], torch.tensor(np.log(r)[drawn])[None])
    spread = np.std((p / r - 1)[drawn] * (np.log(p) - np.log(r))[drawn]) / math.sqrt(len(drawn))
    assert abs(float(found) - exact) < 5 * spread
    assert float(jeffrey_divergence(torch.tensor([[-3.0, -4.0]]), torch.tensor([[-3.0, -4.0]]))) == 0.0


def test_unlikelihood():
    p = np.array([0.2, 0.9, 1e-12])
    logps = torch.tensor(np.log(p), requires_grad=True)
    assert float(unlikelihood(logps)) == pytest.approx(-np.log(1 - p).mean(), rel=1e-12)
    assert torch.autograd.gradcheck(unlikelihood, torch.tensor(np.log([0.2, 0.9, 0.5]), requires_grad=True))
    certain = unlikelihood(torch.zeros(2, requires_grad=True))
    assert float(certain) == pytest.approx(-math.log(1e-6), rel=1e-6)
