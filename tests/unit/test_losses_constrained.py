"""Weights of constrained completions, on a language whose texts are all listed."""

from __future__ import annotations

import itertools
import math

import pytest

torch = pytest.importorskip("torch")

from posttrain.losses.constrained import weighted_advantages  # noqa: E402

END, LETTERS, LONGEST = 3, 3, 3
ALLOWED = {(0,), (0, 0), (0, 1, 2), (1, 2, 0), (1, 2, 1), (2, 2)}
"""Whole texts; after (1,) and (0, 1) most of the policy's mass is forbidden."""


class Language:
    """A policy with free logits after every beginning; every text ends with END, at the latest after LONGEST letters."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.starts = [text for n in range(LONGEST + 1) for text in itertools.product(range(LETTERS), repeat=n)]
        self.theta = (1.5 * torch.randn(len(self.starts), LETTERS + 1, generator=generator, dtype=torch.float64)).requires_grad_()
        self.texts = self.starts
        self.reward = torch.randn(len(self.texts), generator=generator, dtype=torch.float64)
        self.c = torch.tensor([float(text in ALLOWED) for text in self.texts], dtype=torch.float64)

    def rows(self) -> torch.Tensor:
        """(starts, tokens) log-probabilities; the longest beginnings can only end."""
        logits = self.theta.clone()
        long = torch.tensor([len(text) == LONGEST for text in self.starts])
        keep = torch.zeros(LETTERS + 1, dtype=torch.bool)
        keep[END] = True
        return logits.masked_fill(long[:, None] & ~keep, -math.inf).log_softmax(-1)

    def allowed(self) -> torch.Tensor:
        """(starts, tokens) what a prefix checker allows."""
        found = torch.zeros(len(self.starts), LETTERS + 1)
        for i, start in enumerate(self.starts):
            for token in range(LETTERS):
                found[i, token] = any(text[: len(start) + 1] == (*start, token) for text in ALLOWED)
            found[i, END] = start in ALLOWED
        return found.double()

    def paths(self) -> list[list[tuple[int, int]]]:
        """(start, token) steps of each text."""
        place = {start: i for i, start in enumerate(self.starts)}
        return [[(place[text[:n]], text[n] if n < len(text) else END) for n in range(len(text) + 1)] for text in self.texts]

    def logprobs(self) -> torch.Tensor:
        """(texts,) log pi(y), with gradient."""
        rows = self.rows()
        return torch.stack([sum((rows[i, t] for i, t in path), torch.zeros((), dtype=torch.float64)) for path in self.paths()])

    def law(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(texts,) a(y) and W(y) of sampling each token from what is allowed; 0 where that cannot give the text."""
        p, allowed = self.rows().detach().exp(), self.allowed()
        z = (p * allowed).sum(-1)
        a, w = [], []
        for path in self.paths():
            a.append(math.prod(float(p[i, t] * allowed[i, t] / z[i]) if z[i] else 0.0 for i, t in path))
            w.append(math.prod(float(z[i]) for i, t in path))
        return torch.tensor(a, dtype=torch.float64), torch.tensor(w, dtype=torch.float64)

    def gradient(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Gradient of sum_y coefficient(y) log pi(y)."""
        return torch.autograd.grad((coefficients * self.logprobs()).sum(), self.theta)[0]


@pytest.fixture(params=range(4))
def language(request):
    return Language(request.param)


def test_the_law_is_one_of_the_allowed_texts(language):
    a, w = language.law()
    assert float(a.sum()) == pytest.approx(1.0, abs=1e-12) and not a[language.c == 0].any()
    assert torch.allclose(a * w, language.logprobs().detach().exp() * language.c, atol=1e-14)


def test_weights_carry_any_mean_over_to_the_policy_without_bias(language):
    """E_a[W f grad log pi] = E_pi[c f grad log pi], to 1e-10; with f = r it is the gradient of E_pi[c r]."""
    a, w = language.law()
    probabilities = language.logprobs().exp()
    wanted = torch.autograd.grad((probabilities * language.c * language.reward).sum(), language.theta)[0]
    assert torch.allclose(language.gradient(a * w * language.reward), wanted, atol=1e-12, rtol=1e-10)


def test_the_group_formula_is_the_gradient_of_the_mean_reward_given_the_constraint(language):
    """A group of all texts, as a sampler that takes them alike would give it: its weights are W a over that."""
    a, w = language.law()
    possible = a > 0
    logs = torch.where(possible, (a * w * len(a)).log(), torch.zeros_like(a))
    found, facts = weighted_advantages(language.reward, logs, possible, len(a), math.inf)
    found = torch.where(possible, found, 0.0)
    probabilities = language.logprobs().exp() * language.c
    mean = (probabilities * language.reward).sum() / probabilities.sum()
    wanted = torch.autograd.grad(mean, language.theta)[0]
    scale = len(a) / int(possible.sum())
    assert torch.allclose(language.gradient(found / len(a)) * scale, wanted, atol=1e-12, rtol=1e-9)
    exact = float((a * w * len(a))[possible].mean().log())
    assert float(facts["log_mean"][0]) == pytest.approx(exact, abs=1e-12)


def test_without_weights_it_is_another_direction(language):
    """The documented target of `none`, E_a[(r - E_a r) grad log pi], is not the gradient of the mean reward given the constraint."""
    a, _ = language.law()
    none = language.gradient(a * (language.reward - (a * language.reward).sum()))
    probabilities = language.logprobs().exp() * language.c
    wanted = torch.autograd.grad((probabilities * language.reward).sum() / probabilities.sum(), language.theta)[0]
    assert float((none - wanted).abs().max()) > 1e-3
    local = torch.autograd.grad((language.logprobs() * (a * (language.reward - (a * language.reward).sum()))).sum(), language.theta)[0]
    assert torch.allclose(none, local, atol=1e-14)


def test_a_group_by_hand():
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, 0.0, 0.0, -2.0])
    logs = torch.tensor([0.0, math.log(3.0), -50.0, -math.inf, math.log(2.0), 0.0, 0.0, 0.0])
    weighted = torch.tensor([True, True, False, False, True, False, False, False])
    found, facts = weighted_advantages(advantages, logs, weighted, 4, 10.0)
    w = torch.tensor([0.5, 1.5])
    centre = float((w * advantages[:2]).sum() / 2)
    assert torch.allclose(found[:2], w * (advantages[:2] - centre)) and torch.equal(found[2:4], advantages[2:4])
    assert float(found[4]) == 0.0 and torch.equal(found[5:], advantages[5:])
    assert facts["ess"].tolist() == pytest.approx([4 / 2.5 / 2, 1.0])
    assert facts["log_mean"].tolist() == pytest.approx([math.log(2), math.log(2)])
    shifted, _ = weighted_advantages(advantages + 7, logs - 300, weighted, 4, 10.0)
    assert torch.allclose(shifted[weighted], found[weighted], atol=1e-4)


def test_large_weights_are_cut_and_the_group_still_sums_to_nothing():
    advantages = torch.tensor([1.0, -1.0, 0.5, 3.0])
    found, facts = weighted_advantages(advantages, torch.tensor([40.0, 0.0, 0.0, 0.0]), torch.ones(4, dtype=torch.bool), 4, 2.0)
    assert facts["clipped"].tolist() == [True, False, False, False]
    assert float(found.sum()) == pytest.approx(0.0, abs=1e-6) and float(found.abs().max()) < 1e-6 + 2.0 * 4


def test_groups_without_constrained_completions_stay_as_they_are():
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    found, facts = weighted_advantages(advantages, torch.full((4,), -math.inf), torch.zeros(4, dtype=torch.bool), 2, 10.0)
    assert torch.equal(found, advantages) and facts["ess"].isnan().all() and facts["log_mean"].isnan().all()
