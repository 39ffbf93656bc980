"""The hybrid loss of NoiseFiT (2504.03302), and the scale of its noise; no trainer, no model.

Noise on a hidden state h, per token t over H features (the paper's operator; the authors' scripts agree on it):

    var_t = Var_i(h_ti)                                f_t  = min(exp(var_t / (v + 1e-6)), cap),   v a mean of var_t
    med_t = median_i(h_ti),  mad_t = median_i|h_ti - med_t|, at least 1e-6 |h_t|
    w_ti  = exp(-beta |h_ti - med_t| / (mad_t + 1e-6))
    h'_ti = h_ti + base * mad_t w_ti f_t eps_ti,       eps ~ N(0, 1)

Loss of one target, with logits z of the clean and z_k of the m noisy passes, p_T = softmax(. / T):

    CE   = -log p_1(z)_y
    soft = T^2 mean_k KL(p_T(z) || p_T(z_k))           the clean pass without gradient
    cons = T^2 KL(p_T(z_2) || p_T(z_1))                the second pass without gradient
    loss = a CE + (1 - a) soft + lambda cons

Each target brings the weights of its three terms, so one normalisation, row weights, and the unshifted masks of the scripts
are all the same sum. Logits exist for one tile of targets at a time: loss and gradient of a tile are computed together, and
only the gradients of hidden states and head are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

EPSILON = 1e-6
MAD_OF_NORMAL = 0.6744897501960817
"""Median of |x| for a standard normal x."""
TILE = {"cpu": 1 << 22}
TILE_ELSEWHERE = 1 << 27
"""Numbers of a tile: passes * targets * vocabulary, by type of device."""


def token_variance(hidden: torch.Tensor) -> torch.Tensor:
    """Unbiased variance over the features, (..., T, H) -> (..., T, 1)."""
    return hidden.var(dim=-1, keepdim=True)


def adaptive_scale(hidden: torch.Tensor, mean_variance: torch.Tensor, beta: float = 0.1, cap: float = 5.0) -> torch.Tensor:
    """mad_t w_ti f_t of the module's operator.

    Args:
        hidden: (..., T, H).
        mean_variance: v, broadcastable to (..., T, 1).
        beta: how fast noise falls off from the median.
        cap: most that a token's variance can multiply its noise by.

    Returns:
        (..., T, H), finite also for constant tokens.
    """
    factor = torch.exp(token_variance(hidden) / (mean_variance + EPSILON)).clamp(max=cap)
    away = (hidden - hidden.median(dim=-1, keepdim=True).values).abs()
    mad = away.median(dim=-1, keepdim=True).values.clamp(min=EPSILON * hidden.norm(dim=-1, keepdim=True))
    return mad * factor * torch.exp(-beta * away / (mad + EPSILON))


def gaussian_ratio(beta: float = 0.1, cap: float = 5.0) -> float:
    """Root mean square of `adaptive_scale` over the standard deviation of h, for normal features of one variance.

    With mad = 0.6745 sd and f = min(e, cap):  E w^2 = E exp(-k |x|) = 2 exp(k^2 / 2) Phi(-k),  k = 2 beta / 0.6745.
    1.641 at the defaults; dividing the noise by it makes `relative_std` what its name says.
    """
    k = 2 * beta / MAD_OF_NORMAL
    return MAD_OF_NORMAL * min(math.e, cap) * math.sqrt(math.exp(k * k / 2) * math.erfc(k / math.sqrt(2)))


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: z = softcap tanh(scale (W h + b) / softcap), or scale (W h + b) without a cap.

    Args:
        weight: (V, H).
        bias: (V,) or None.
        scale: of the logits.
        softcap: bound of the logits.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., H) -> (..., V), float32 for narrower types."""
        raw = torch.nn.functional.linear(hidden, self.weight, self.bias)
        raw = raw if raw.dtype == torch.float64 else raw.float()
        raw = raw if self.scale == 1 else raw.mul_(self.scale)
        return raw if self.softcap is None else raw.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """d z / d (W h + b)."""
        return self.scale if self.softcap is None else self.scale * (1 - (logits / self.softcap).square())


@dataclass(frozen=True)
class Weights:
    """What the three terms of each target count, all (N,): a, 1 - a and lambda over the number of targets of the step."""

    ce: torch.Tensor
    soft: torch.Tensor
    consistency: torch.Tensor


@dataclass(frozen=True)
class Form:
    """How the distributions are compared.

    Args:
        temperature: T.
        scripts: the form of the authors' first script: T for the clean pass only, without T^2, and with gradient through it
            and through the second noisy pass.
    """

    temperature: float = 1.0
    scripts: bool = False

    @property
    def student(self) -> float:
        """Temperature of the noisy passes."""
        return 1.0 if self.scripts else self.temperature

    @property
    def factor(self) -> float:
        """T^2."""
        return 1.0 if self.scripts else self.temperature**2


def noisefit_loss(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, weights: Weights, form: Form = Form(), tile: int | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum over all targets.

    Args:
        hidden: (K, N, H), the clean pass and one or two noisy passes (K = 2, 3) where a token is predicted.
        targets: (N,) token ids.
        head: the output head.
        weights: of each target's terms.
        form: see Form.
        tile: numbers of a tile; by type of device where None.

    Returns:
        The scalar loss, with gradient for hidden states and head, and without gradient (N,) each: `ce`, `soft`, `consistency`,
        `entropy` of the clean pass in nats, `top1`, whether it likes the target best.
    """
    apply: Any = _Loss.apply
    loss, terms = apply(hidden, head.weight, head.bias, targets, head, weights, form, tile)
    return loss, dict(zip(NAMES, terms.unbind(), strict=True))


NAMES = ("ce", "soft", "consistency", "entropy", "top1")


def response(hidden: torch.Tensor, targets: torch.Tensor, head: Head, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """How noisy passes differ from the clean one, without gradient.

    Args:
        hidden: (K, N, H), the clean pass first.
        targets: (N,) token ids.
        head: the output head.
        temperature: T of the divergence.

    Returns:
        (K,) cross-entropy of each pass, and (K - 1,) symmetric divergence T^2 (KL(p || p_k) + KL(p_k || p)) / 2, both as
        sums over the targets in float64.
    """
    entropies, apart = torch.zeros(len(hidden), dtype=torch.float64), torch.zeros(len(hidden) - 1, dtype=torch.float64)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head, hidden = _same_type(head, hidden)
        for part in _parts(hidden, head, None):
            logits = head.logits(hidden[:, part])
            logs = logits.log_softmax(dim=-1)
            index = targets[part].expand(len(hidden), -1).unsqueeze(-1)
            entropies -= logs.gather(2, index).double().sum(dim=(1, 2)).cpu()
            logs = logs if temperature == 1 else (logits / temperature).log_softmax(dim=-1)
            gap = logs[:1] - logs[1:]
            apart += ((logs[:1].exp() - logs[1:].exp()) * gap).double().sum(dim=(1, 2)).cpu() * temperature**2 / 2
    return entropies, apart


def _same_type(head: Head, hidden: torch.Tensor) -> tuple[Head, torch.Tensor]:
    """Head and hidden states in the type that the head's product is taken in."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    bias = None if head.bias is None else head.bias.to(dtype)
    return Head(head.weight.to(dtype), bias, head.scale, head.softcap), hidden.to(dtype)


def _parts(hidden: torch.Tensor, head: Head, tile: int | None) -> Iterator[slice]:
    tile = TILE.get(hidden.device.type, TILE_ELSEWHERE) if tile is None else tile
    rows = max(tile // (hidden.size(0) * head.weight.size(0)), 1)
    return (slice(start, start + rows) for start in range(0, hidden.size(1), rows))


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        head: Head,
        weights: Weights,
        form: Form,
        tile: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wants = ctx.needs_input_grad
        given = Head(weight, bias, head.scale, head.softcap)
        head, states = _same_type(given, hidden)
        wide = torch.promote_types(states.dtype, torch.float32)
        terms = torch.empty((len(NAMES), hidden.size(1)), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(states) if wants[0] else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wants[1] else None
        d_bias = torch.zeros(len(weight), dtype=wide, device=weight.device) if bias is not None and wants[2] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _parts(states, head, tile):
                inner = states[:, part]
                logits = head.logits(inner)
                slope = head.slope(logits) if any(wants) else 1.0
                chosen = [value[part, None].to(wide) for value in (weights.ce, weights.soft, weights.consistency)]
                terms[:, part], grad = _tile(logits, targets[part, None], chosen, form, any(wants))
                if grad is None:
                    continue
                flat = (grad if isinstance(slope, float) and slope == 1 else grad.mul_(slope)).to(states.dtype).flatten(0, 1)
                if d_hidden is not None:
                    d_hidden[:, part] = (flat @ head.weight).view(inner.shape)
                if d_weight is not None:
                    d_weight.addmm_(flat.t().to(wide), inner.flatten(0, 1).to(wide))
                if d_bias is not None:
                    d_bias += flat.sum(dim=0)
        found = (d_hidden, hidden), (d_weight, weight), (d_bias, bias)
        ctx.has = [grad is not None for grad, _ in found]
        ctx.save_for_backward(*(grad.to(like.dtype) for grad, like in found if grad is not None and like is not None))
        ctx.mark_non_differentiable(terms)
        sums = zip((weights.ce, weights.soft, weights.consistency), terms[:3], strict=True)
        return torch.stack([torch.dot(weight.to(wide), term) for weight, term in sums]).sum(), terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> Any:
        saved = iter(ctx.saved_tensors)
        found = [next(saved) * grad_loss if has else None for has in ctx.has]
        return (*found, None, None, None, None, None)


def _tile(
    logits: torch.Tensor, targets: torch.Tensor, weights: Sequence[torch.Tensor], form: Form, wants: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Terms (5, n) of a tile's logits (K, n, V), and their gradient (K, n, V), which takes the logits' place.

    With s = softmax(z_k / T_s), t = softmax(z / T), and c the factor of the divergences:

        d CE / d z = p - 1_y      d soft / d z_k = c / (m T_s) (s_k - t)      d cons / d z_1 = c / T_s (s_1 - s_2)

    and in the form of the first script, where teachers are not held fixed,

        d soft / d z = c / T t (log t - mean_k log s_k - soft / c)      d cons / d z_2 = c / T_s s_2 (log s_2 - log s_1 - cons / c).
    """
    ce, soft, consistency = weights
    noisy = len(logits) - 1
    terms = logits.new_zeros((len(NAMES), logits.size(1)))
    terms[4] = logits[0].argmax(dim=-1) == targets[:, 0]
    plain = logits[0].log_softmax(dim=-1)
    terms[0] = -plain.gather(1, targets)[:, 0]
    if form.temperature == form.student == 1:
        logs = torch.cat([plain[None], logits[1:].log_softmax(dim=-1)])
    else:
        logs = torch.cat([(logits[:1] / form.temperature).log_softmax(dim=-1), (logits[1:] / form.student).log_softmax(dim=-1)])
    probs = torch.exp(logs, out=logits)
    clean = probs[0] if form.temperature == 1 else plain.exp()
    terms[3] = -_dot(clean, plain)
    soft_term = _dot(probs[0], logs[0]) - sum(_dot(probs[0], log) for log in logs[1:]) / noisy
    both = noisy == 2
    cons_term = _dot(probs[2], logs[2]) - _dot(probs[2], logs[1]) if both else torch.zeros_like(soft_term)
    terms[1], terms[2] = form.factor * soft_term, form.factor * cons_term
    if not wants:
        return terms, None
    a, b = form.factor / (noisy * form.student) * soft, form.factor / form.student * consistency
    extra: list[tuple[int, torch.Tensor]] = []
    if form.scripts:
        apart = logs[0] - logs[1:].mean(dim=0) - soft_term[:, None]
        extra.append((0, form.factor / form.temperature * soft * probs[0] * apart))
        if both:
            extra.append((2, b * probs[2] * (logs[2] - logs[1] - cons_term[:, None])))
    probs[1].mul_(a + b if both else a).addcmul_(probs[0], a, value=-1)
    if both:
        probs[1].addcmul_(probs[2], b, value=-1)
        probs[2].sub_(probs[0]).mul_(a)
    if form.temperature == 1:
        probs[0].mul_(ce)
    else:
        torch.mul(clean, ce, out=probs[0])
    probs[0].scatter_add_(1, targets, -ce)
    for row, value in extra:
        probs[row] += value
    return terms, probs


def _dot(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Sums over the vocabulary, (n, V), (n, V) -> (n,)."""
    return torch.bmm(left.unsqueeze(1), right.unsqueeze(2)).view(-1)
