"""NoiseFiT's operator and loss against slow float64 references in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from posttrain.losses.noisefit import (  # noqa: E402
    Form,
    Head,
    Weights,
    adaptive_scale,
    gaussian_ratio,
    noisefit_loss,
    response,
    token_variance,
)

FORMS = [Form(), Form(2.5), Form(0.7, scripts=True), Form(scripts=True)]


def lower_median(values: Any) -> Any:
    """Median over the last axis, the lower one of two."""
    return np.sort(values, axis=-1)[..., (values.shape[-1] - 1) // 2, None]


def scale_reference(hidden: Any, mean: Any, beta: float, cap: float) -> Any:
    """mad * w * f, token by token."""
    found = np.empty_like(hidden)
    for index in np.ndindex(hidden.shape[:-1]):
        h = hidden[index]
        factor = min(np.exp(h.var(ddof=1) / (mean + 1e-6)), cap)
        away = np.abs(h - lower_median(h))
        mad = max(lower_median(away)[0], 1e-6 * np.sqrt((h * h).sum()))
        found[index] = mad * factor * np.exp(-beta * away / (mad + 1e-6))
    return found


def log_softmax(z: Any) -> Any:
    """Over the last axis."""
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def loss_reference(z: Any, targets: Any, weights: Any, form: Form) -> tuple[float, Any]:
    """The loss of logits (K, N, V), and its three terms (3, N)."""
    n = np.arange(len(targets))
    ce = -log_softmax(z[0])[n, targets]
    teacher = log_softmax(z[0] / form.temperature)
    students = [log_softmax(x / (1.0 if form.scripts else form.temperature)) for x in z[1:]]
    factor = 1.0 if form.scripts else form.temperature**2
    soft = factor * np.mean([(np.exp(teacher) * (teacher - s)).sum(-1) for s in students], axis=0)
    cons = factor * (np.exp(students[1]) * (students[1] - students[0])).sum(-1) if len(students) == 2 else 0 * soft
    terms = np.stack([ce, soft, cons])
    return float((weights * terms).sum()), terms


def given(passes: int = 2, n: int = 9, vocab: int = 101, hidden: int = 6, seed: int = 0) -> tuple[Any, ...]:
    """Hidden states (K, N, H), head weight and bias, targets, weights (3, N); float64."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(1, n, hidden)) + 0.3 * rng.normal(size=(passes + 1, n, hidden))
    return states, rng.normal(size=(vocab, hidden)), rng.normal(size=vocab), rng.integers(vocab, size=n), rng.random((3, n))


def run(values: tuple[Any, ...], form: Form, tile: int | None = None, **head: Any) -> tuple[Any, Any, Any]:
    """Loss, terms, and the gradients of hidden states, weight and bias."""
    states, weight, bias = (torch.tensor(value, requires_grad=True) for value in values[:3])
    given_weights = Weights(*torch.tensor(values[4]))
    loss, terms = noisefit_loss(states, torch.tensor(values[3]), Head(weight, bias, **head), given_weights, form, tile)
    loss.backward()
    return loss.item(), terms, (states.grad, weight.grad, bias.grad)


@pytest.mark.parametrize("mean", [0.5, 3.0])
def test_the_scale_is_the_papers_also_at_constant_tokens(mean: float) -> None:
    rng = np.random.default_rng(3)
    hidden = rng.normal(size=(2, 5, 8)) * np.array([1, 0.2, 9, 1e-3, 2])[:, None]
    hidden[0, 1], hidden[1, 4] = 0.0, 4.2
    for beta, cap in ((0.1, 5.0), (0.0, 1.0), (1.3, 2.0)):
        found = adaptive_scale(torch.tensor(hidden), torch.tensor(mean, dtype=torch.float64), beta, cap).numpy()
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, scale_reference(hidden, mean, beta, cap), rtol=1e-12)


def test_relative_std_means_what_it_says_on_normal_features() -> None:
    """Mean 0 within 3 standard errors, and the root mean square within 2 %."""
    generator = torch.Generator().manual_seed(0)
    hidden = 3.7 * torch.randn(64, 4096, generator=generator, dtype=torch.float64) + 11
    for beta, cap in ((0.1, 5.0), (0.5, 2.0)):
        scale = adaptive_scale(hidden, token_variance(hidden).mean(), beta, cap) * 0.2 / gaussian_ratio(beta, cap)
        noise = scale * torch.randn(64, 4096, generator=generator, dtype=torch.float64)
        assert (noise.square().mean().sqrt() / (0.2 * 3.7)).item() == pytest.approx(1, rel=0.02)
        assert abs(noise.mean().item()) < 3 * noise.std().item() / noise.numel() ** 0.5
    assert gaussian_ratio() == pytest.approx(1.641, abs=5e-4)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("passes", [1, 2])
def test_loss_and_terms_equal_the_reference(form: Form, passes: int) -> None:
    values = given(passes)
    states, weight, bias, targets, weights = values
    expected, terms = loss_reference(states @ weight.T + bias, targets, weights, form)
    for tile in (None, 1, 7 * 101 * (passes + 1)):
        loss, found, _ = run(values, form, tile)
        assert loss == pytest.approx(expected, rel=1e-12)
        np.testing.assert_allclose(torch.stack([found[name] for name in ("ce", "soft", "consistency")]).numpy(), terms, atol=1e-12)
    logs = log_softmax(states[0] @ weight.T + bias)
    np.testing.assert_allclose(found["entropy"].numpy(), -(np.exp(logs) * logs).sum(-1), rtol=1e-12)
    assert found["top1"].tolist() == (logs.argmax(-1) == targets).tolist()


@pytest.mark.parametrize("head", [{}, {"scale": 0.6}, {"scale": 1.2, "softcap": 4.0}], ids=["plain", "scaled", "capped"])
@pytest.mark.parametrize("passes", [1, 2])
def test_gradient_where_teachers_move(passes: int, head: dict[str, Any]) -> None:
    """The form of the first script is the gradient of its value, so gradcheck applies."""
    values = given(passes, n=4, vocab=11, hidden=3)
    targets, weights = torch.tensor(values[3]), Weights(*torch.tensor(values[4]))

    def value(states: Any, weight: Any, bias: Any) -> Any:
        return noisefit_loss(states, targets, Head(weight, bias, **head), weights, Form(1.7, scripts=True), tile=20)[0]

    assert torch.autograd.gradcheck(value, [torch.tensor(v, requires_grad=True) for v in values[:3]])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("passes", [1, 2])
def test_gradient_where_teachers_are_held(passes: int, temperature: float) -> None:
    """Finite differences of the numpy loss in which teachers do not move: each stands in a copy of the logits."""
    values = given(passes, n=3, vocab=7, hidden=2)
    states, weight, bias, targets, weights = values
    form = Form(temperature)

    def held(moving: Any) -> float:
        z, still = moving @ weight.T + bias, states @ weight.T + bias
        ce = loss_reference(z, targets, weights * [[1], [0], [0]], form)[0]
        soft = loss_reference(np.concatenate([still[:1], z[1:]]), targets, weights * [[0], [1], [0]], form)[0]
        pair = np.concatenate([z[:2], still[2:]]) if passes == 2 else z
        return ce + soft + loss_reference(pair, targets, weights * [[0], [0], [1]], form)[0]

    expected = np.zeros_like(states)
    for index in np.ndindex(states.shape):
        step = np.zeros_like(states)
        step[index] = 1e-5
        expected[index] = (held(states + step) - held(states - step)) / 2e-5
    np.testing.assert_allclose(run(values, form)[2][0].numpy(), expected, atol=1e-8)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_gradient_of_the_head_equals_autograds(form: Form) -> None:
    values = given()
    _, _, (d_states, d_weight, d_bias) = run(values, form, tile=500)
    states, weight, bias = (torch.tensor(value, requires_grad=True) for value in values[:3])
    z = states @ weight.T + bias
    held = z if form.scripts else z.detach()
    student = 1.0 if form.scripts else form.temperature
    logs, teacher = (z[1:] / student).log_softmax(-1), (held[0] / form.temperature).log_softmax(-1)
    second = (held[2] / student).log_softmax(-1)
    terms = [
        -z[0].log_softmax(-1).gather(1, torch.tensor(values[3])[:, None])[:, 0],
        form.factor * (teacher.exp() * (teacher - logs.mean(0))).sum(-1),
        form.factor * (second.exp() * (second - logs[0])).sum(-1),
    ]
    (torch.stack(terms) * torch.tensor(values[4])).sum().backward()
    for found, like in ((d_states, states), (d_weight, weight), (d_bias, bias)):
        assert torch.allclose(found, like.grad, rtol=1e-10, atol=1e-12)


def test_no_targets_is_a_differentiable_zero() -> None:
    values = given(n=0)
    loss, _, gradients = run(values, Form())
    assert loss == 0
    assert all(grad is not None and not grad.any() for grad in gradients)


def test_narrow_types_keep_their_type_and_sum_in_float32() -> None:
    values = given(n=40)
    states = torch.tensor(values[0], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor(values[1], dtype=torch.bfloat16, requires_grad=True)
    loss, _ = noisefit_loss(states, torch.tensor(values[3]), Head(weight), Weights(*torch.tensor(values[4]).float()))
    loss.backward()
    assert loss.dtype == torch.float32
    assert states.grad.dtype == weight.grad.dtype == torch.bfloat16
    expected = loss_reference(states.detach().double().numpy() @ weight.detach().double().numpy().T, values[3], values[4], Form())[0]
    assert loss.item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_response_equals_the_reference(temperature: float) -> None:
    states, weight, bias, targets, _ = given(passes=4)
    z = states @ weight.T + bias
    head = Head(torch.tensor(weight), torch.tensor(bias))
    entropies, apart = response(torch.tensor(states), torch.tensor(targets), head, temperature)
    logs = log_softmax(z)
    np.testing.assert_allclose(entropies.numpy(), [-row[np.arange(len(targets)), targets].sum() for row in logs], rtol=1e-12)
    p = log_softmax(z / temperature)
    both = [0.5 * ((np.exp(p[0]) - np.exp(q)) * (p[0] - q)).sum() * temperature**2 for q in p[1:]]
    np.testing.assert_allclose(apart.numpy(), both, rtol=1e-12)
