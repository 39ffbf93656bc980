"""Stable-SPAM against its formulas in float64, against the authors' order of steps, and against AdamW where all of it is off."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
from optim_kit import Official, Reference, gradients

torch = pytest.importorskip("torch")

from posttrain.errors import ConfigError, NumericsError  # noqa: E402
from posttrain.optim import _gradients, stable_spam  # noqa: E402
from posttrain.optim.presets import PRESETS  # noqa: E402
from posttrain.optim.stable_spam import AVERAGES, StableSPAM  # noqa: E402

SHAPES = [(3, 5), (7,), (2, 2, 3), (4,)]
ALL: dict[str, Any] = {
    "lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "clip_decay": 0.99, "clip_limit": None,
    "norm_decays": (0.7, 0.9), "norm_eps": 1e-8, "reset_every": 7, "decay_to": 1.0, "total_steps": None,
}  # fmt: skip
OFF = {"clip_decay": None, "norm_decays": None, "reset_every": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "clip": {**OFF, "clip_decay": 0.99},
    "normalise": {**OFF, "norm_decays": (0.7, 0.9)},
    "reset": {**OFF, "reset_every": 7},
    "cosine": {"decay_to": 0.5, "total_steps": 40},
    "limit": {"clip_limit": 5.0},
    "stabilizer": dict(PRESETS["gradient_stabilizer"]),
    "stable_spam": dict(PRESETS["stable_spam"]),
}
IMPLEMENTATIONS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False, "fused": False}}


def parameters(dtype: Any = torch.float64, seed: int = 1) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [torch.nn.Parameter(torch.tensor(rng.standard_normal(shape), dtype=dtype)) for shape in SHAPES]


def give(params: list[Any], row: list[Any]) -> None:
    for p, g in zip(params, row, strict=True):
        p.grad = None if g is None else torch.tensor(g, dtype=p.dtype)


def run(optimizer: Any, params: list[Any], rows: list[list[Any]]) -> list[Any]:
    """The weights after a step on each row of gradients."""
    for row in rows:
        give(params, row)
        optimizer.step()
    return [p.detach().clone() for p in params]


def groups(params: list[Any]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]


def expected(kind: type, options: dict[str, Any], params: list[Any], rows: list[list[Any]]) -> list[Any]:
    found = []
    for i, p in enumerate(params):
        decay = options["weight_decay"] if i < 2 else 0.0
        found.append(kind(p.detach().double().numpy().copy(), {**options, "weight_decay": decay}))
    for row in rows:
        for tensor, g in zip(found, row, strict=True):
            tensor.step(g)
    return found


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_formulas(variant: str, how: str) -> None:
    options, rows, params = {**ALL, **VARIANTS[variant]}, gradients(40, SHAPES), parameters()
    references = expected(Reference, options, params, rows)
    optimizer = StableSPAM(groups(params), **options, **IMPLEMENTATIONS[how])
    for got, reference in zip(run(optimizer, params, rows), references, strict=True):
        np.testing.assert_allclose(got.numpy(), reference.w, rtol=1e-10, atol=1e-12)
    if options["clip_decay"] is not None and options["norm_decays"] is not None:
        for p, reference in zip(params, references, strict=True):
            assert optimizer.state[p]["averaged"] == reference.t
            assert [optimizer.state[p][name] for name in AVERAGES[1:]] == pytest.approx(list(reference.averages.values()), rel=1e-12)


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", ["all", "cosine", "stabilizer"])
@pytest.mark.parametrize("long", [6, 1 << 16], ids=["long", "short"])
def test_float32_equals_the_formulas_up_to_rounding(monkeypatch: pytest.MonkeyPatch, variant: str, how: str, long: int) -> None:
    """AdaGN's factor of a long float32 tensor on a CPU goes into the fused kernel."""
    monkeypatch.setattr(stable_spam, "PIECE", long)
    options, params = {**ALL, **VARIANTS[variant]}, parameters(torch.float32)
    rows = [[None if g is None else g.astype(np.float32) for g in row] for row in gradients(40, SHAPES)]
    references = expected(Reference, options, params, rows)
    optimizer = StableSPAM(groups(params), **options, **IMPLEMENTATIONS[how])
    for got, reference in zip(run(optimizer, params, rows), references, strict=True):
        np.testing.assert_allclose(got.numpy(), reference.w, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("variant", ["all", "cosine"])
def test_official_equals_the_authors_order_of_steps(variant: str) -> None:
    options, rows, params = {**ALL, **VARIANTS[variant]}, gradients(40, SHAPES), parameters()
    references = expected(Official, options, params, rows)
    ours = expected(Reference, options, params, rows)
    optimizer = StableSPAM(groups(params), **options, compat="official")
    for got, reference, other in zip(run(optimizer, params, rows), references, ours, strict=True):
        np.testing.assert_allclose(got.numpy(), reference.w, rtol=1e-10, atol=1e-12)
        assert np.abs(reference.w - other.w).max() > 1e-3, "the defects must show, else this test says nothing"


def test_threshold_after_a_reset_is_not_inflated() -> None:
    """Separate counters: T' is about the largest entry; the authors' is 1 / (1 - d^2) times too high right after a reset."""
    found = {}
    for compat in ("none", "official"):
        params = [torch.nn.Parameter(torch.zeros(64, dtype=torch.float64))]
        optimizer = StableSPAM(params, clip_decay=0.999, reset_every=20, compat=compat)
        rng = np.random.default_rng(0)
        run(optimizer, params, [[rng.standard_normal(64)] for _ in range(20)])
        optimizer.figures()
        run(optimizer, params, [[rng.standard_normal(64)]])
        found[compat] = optimizer.figures()["optim/spike"]
    assert 0.5 < found["none"] < 2.0
    assert found["official"] < 0.2


@pytest.mark.parametrize("how", [*IMPLEMENTATIONS, "default"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_off_is_adamw_bitwise(how: str, dtype: Any) -> None:
    chosen = IMPLEMENTATIONS.get(how, {"fused": True})
    common = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
    weights, states = [], []
    for kind, extra in ((torch.optim.AdamW, chosen), (StableSPAM, {**OFF, **({} if how == "default" else chosen)})):
        params = parameters(dtype)
        optimizer = kind(groups(params), **common, **extra)
        weights.append(run(optimizer, params, gradients(50, SHAPES)))
        states.append([optimizer.state[p] for p in params])
    assert all(map(torch.equal, *weights))
    for one, two in zip(*states, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in ("exp_avg", "exp_avg_sq", "step"))


def test_long_odd_and_empty_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients in several pieces, with gaps in memory, or without entries."""
    monkeypatch.setattr(_gradients, "PIECE", 8)
    monkeypatch.setattr(_gradients, "LONG_PIECE", 24)
    rng, options = np.random.default_rng(3), {**ALL, "reset_every": 4}
    start = [rng.standard_normal(shape) for shape in ((61,), (6, 10), (0,))]
    params = [torch.nn.Parameter(torch.tensor(start[0])), torch.nn.Parameter(torch.tensor(start[1].T.copy()).T)]
    params.append(torch.nn.Parameter(torch.tensor(start[2])))
    references = [Reference(w.copy(), options) for w in start[:2]]
    optimizer = StableSPAM(params, **options)
    for step in range(12):
        long, odd = rng.standard_normal(61) * (1 + step % 3), rng.standard_normal((10, 6))
        long[step] *= 30
        params[0].grad, params[1].grad, params[2].grad = torch.tensor(long), torch.tensor(odd).T, torch.zeros(0, dtype=torch.float64)
        optimizer.step()
        references[0].step(long), references[1].step(odd.T)
    for p, reference in zip(params, references, strict=False):
        np.testing.assert_allclose(p.detach().numpy(), reference.w, rtol=1e-10, atol=1e-12)


def test_dtypes_may_be_mixed_in_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 and float32, long and short: each as in a group of its own."""
    monkeypatch.setattr(stable_spam, "PIECE", 6)
    rows, dtypes = gradients(20, SHAPES), [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]
    found = []
    for apart in (False, True):
        params = [torch.nn.Parameter(p.detach().to(dtype)) for p, dtype in zip(parameters(), dtypes, strict=True)]
        found.append(run(StableSPAM([{"params": [p]} for p in params] if apart else params, **ALL), params, rows))
    assert all(map(torch.equal, *found))


def test_norms_of_long_float32_tensors_are_exact() -> None:
    """In one piece torch's float32 norm of 2^22 entries is off by 1e-5 and more."""
    values = torch.rand(1 << 22, generator=torch.Generator().manual_seed(0)) + 1
    p = torch.nn.Parameter(torch.zeros_like(values))
    p.grad = values
    exact = values.double().norm().item()
    assert _gradients.norms([_gradients.Gradient(p)])[0] == pytest.approx(exact, rel=1e-6)


def halved(row: list[Any]) -> list[Any]:
    """A row of gradients in bfloat16's numbers."""
    return [None if g is None else torch.tensor(g, dtype=torch.bfloat16).double().numpy() for g in row]


def test_bfloat16_parameters() -> None:
    """Averages follow in double precision; entries are clipped on the right side of a threshold that bfloat16 cannot hold."""
    options, params = {**ALL, "clip_decay": 0.999, "reset_every": 0}, parameters(torch.bfloat16)
    rows = [halved(row) for row in gradients(60, SHAPES)]
    clips = [Reference(p.detach().double().numpy().copy(), {**options, "norm_decays": None}) for p in params]
    optimizer = StableSPAM(params, **{**options, "norm_decays": None})
    for row in rows:
        give(params, row)
        wanted = []
        for reference, g in zip(clips, row, strict=True):
            reference.t += g is not None and bool(np.any(g))
            wanted.append(g if g is None or not np.any(g) else reference._clipped(g))
        optimizer.step()
        for p, g in zip(params, wanted, strict=True):
            if g is not None:
                np.testing.assert_allclose(p.grad.double().numpy(), g, rtol=2**-8, atol=0)
    for p, reference in zip(params, clips, strict=True):
        assert optimizer.state[p]["max_average"] == pytest.approx(reference.averages["T"], rel=1e-12)
        assert p.dtype == optimizer.state[p]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["all", "cosine", "stabilizer"])
def test_state_dict_is_complete(dtype: Any, variant: str) -> None:
    """Stopped after 17 of 30 steps and loaded into a new optimizer: the same bits, also with weights_only."""
    options, rows = {**ALL, **VARIANTS[variant]}, gradients(30, SHAPES)
    params = parameters(dtype)
    straight = run(StableSPAM(groups(params), **options), params, rows)
    params = parameters(dtype)
    first = StableSPAM(groups(params), **options)
    run(first, params, rows[:17])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = StableSPAM(groups(params), **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert all(map(torch.equal, straight, run(second, params, rows[17:])))
    assert second.figures().get("optim/resets") == (30 // 7 if options["reset_every"] else None)


def test_state_of_plain_adamw_is_taken_on() -> None:
    rows, params = gradients(20, SHAPES), parameters()
    plain = torch.optim.AdamW(params)
    run(plain, params, rows[:10])
    optimizer = StableSPAM(params, reset_every=5)
    optimizer.load_state_dict(plain.state_dict())
    run(optimizer, params, rows[10:])
    assert optimizer.param_groups[0]["updates"] == 10
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("variant", ["all", "stabilizer"])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float, variant: str) -> None:
    params, rows = parameters(torch.float32), gradients(6, SHAPES)
    optimizer = StableSPAM(params, **{**ALL, **VARIANTS[variant]})
    before = run(optimizer, params, rows[:5])
    kept = {i: dict(optimizer.state[p]) for i, p in enumerate(params)}
    give(params, rows[5])
    params[2].grad.view(-1)[3] = value
    with pytest.raises(NumericsError, match=r"shape \(2, 2, 3\) is not finite; nothing was updated"):
        optimizer.step()
    assert all(map(torch.equal, before, params))
    assert all(kept[i][name] == optimizer.state[p][name] for i, p in enumerate(params) for name in AVERAGES)
    assert optimizer.param_groups[0]["updates"] == 5


@pytest.mark.parametrize("whole", [True, False], ids=["whole gradient", "few entries"])
def test_a_spike_is_stopped(whole: bool) -> None:
    """After 50 quiet steps a gradient 1000 times as large throws v of AdamW off, hardly ours."""
    moved = {}
    for name, kind, extra in (("adamw", torch.optim.AdamW, {}), ("ours", StableSPAM, {}), ("limited", StableSPAM, {"clip_limit": 10.0})):
        rng, params = np.random.default_rng(5), [torch.nn.Parameter(torch.zeros(400, dtype=torch.float64))]
        optimizer = kind(params, lr=1e-3, weight_decay=0.0, **extra)
        run(optimizer, params, [[rng.standard_normal(400)] for _ in range(50)])
        before = optimizer.state[params[0]]["exp_avg_sq"].sum().item()
        spike = rng.standard_normal(400)
        spike[slice(None) if whole else slice(4)] *= 1000
        run(optimizer, params, [[spike]])
        moved[name] = optimizer.state[params[0]]["exp_avg_sq"].sum().item() / before
    assert moved["adamw"] > 30
    assert moved["ours"] < 1.1
    assert moved["limited"] < 1.1


def test_clip_limit_keeps_the_threshold_down() -> None:
    thresholds = {}
    for limit in (None, 10.0):
        rng, params = np.random.default_rng(5), [torch.nn.Parameter(torch.zeros(400, dtype=torch.float64))]
        optimizer = StableSPAM(params, clip_limit=limit)
        run(optimizer, params, [[rng.standard_normal(400)] for _ in range(40)])
        quiet = optimizer.state[params[0]]["max_average"] / (1 - 0.999**40)
        run(optimizer, params, [[1000 * rng.standard_normal(400)]])
        thresholds[limit] = optimizer.state[params[0]]["max_average"] / (1 - 0.999**41) / quiet
    assert thresholds[None] > 20
    assert thresholds[10.0] < 1.3


def test_zero_gradients_leave_the_averages_alone() -> None:
    params = parameters()
    optimizer = StableSPAM(params)
    run(optimizer, params, [[np.zeros(shape) for shape in SHAPES]] * 3)
    assert all(optimizer.state[p][name] == 0 for p in params for name in AVERAGES)
    run(optimizer, params, gradients(2, SHAPES)[1:])
    assert all(optimizer.state[p]["averaged"] == 1 for p in params)


def test_figures() -> None:
    params = parameters()
    optimizer = StableSPAM(params, reset_every=10)
    run(optimizer, params, gradients(25, SHAPES))
    found = optimizer.figures()
    assert 0 < found["optim/clipped"] < 1 < found["optim/spike"]
    assert 0 < found["optim/norm_min"] < found["optim/norm"] < 1.5
    assert found["optim/resets"] == 2
    assert optimizer.figures() == {"optim/resets": 2.0}


def test_hooks_and_closure_run_once() -> None:
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).step()
    params, calls = parameters(), []
    optimizer = StableSPAM(params)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Any:
        calls.append("closure")
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert calls == ["before", "closure", "after"]


def test_what_cannot_work_is_refused() -> None:
    embedding = torch.nn.Embedding(8, 2, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ConfigError, match="dense gradients"):
        StableSPAM(embedding.parameters()).step()
    waves = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    waves.grad = torch.ones_like(waves)
    with pytest.raises(ConfigError, match="complex"):
        StableSPAM([waves]).step()
    flat = torch.nn.Parameter(torch.zeros(3))
    flat.grad, flat._fsdp_flattened = torch.ones(3), True
    with pytest.raises(ConfigError, match="FSDP version 1"):
        StableSPAM([flat]).step()


@pytest.mark.parametrize(
    "options",
    [
        {"clip_decay": 1.0}, {"norm_decays": (0.5, -0.1)}, {"reset_every": -1}, {"decay_to": 0.5}, {"decay_to": 0.0, "total_steps": 5},
        {"clip_limit": 1.0}, {"clip_decay": None, "clip_limit": 2.0}, {"compat": "paper"}, {"compat": "official", "clip_limit": 2.0},
    ],
    ids=str,
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options)) if "clip_limit" not in options else "clip_limit"):
        StableSPAM(parameters(), **options)
