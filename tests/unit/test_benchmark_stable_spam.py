"""The benchmarks of Stable-SPAM: the peer is the published method, spikes are what they are said to be."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from benchmark_kit import BENCHMARKS, load
from optim_kit import Official, gradients

torch = pytest.importorskip("torch")


for part in ("_harness", "_corpus", "_lm", "_judges"):
    load(part)
step, spikes = load("stable_spam_step"), load("stable_spam_spikes")


def test_the_peer_is_the_published_method() -> None:
    shapes = [(3, 5), (7,)]
    options = {
        "lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "clip_decay": 0.999, "norm_decays": (0.7, 0.9),
        "norm_eps": 1e-8, "reset_every": 7, "decay_to": 1.0, "total_steps": None,
    }  # fmt: skip
    params = [torch.nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in shapes]
    references = [Official(np.ones(shape), options) for shape in shapes]
    peer = step.Published(params, 0.01, reset_every=7)
    for row in gradients(20, [*shapes, (1,)]):
        for p, reference, g in zip(params, references, row, strict=False):
            p.grad = torch.tensor(g)
            reference.step(g)
        peer.step()
    for p, reference in zip(params, references, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), reference.w, rtol=1e-9)


def test_both_take_the_same_steps_and_another_method_is_not_timed() -> None:
    sizes = step.shapes(layers=1, hidden=16, inner=24, vocabulary=20)
    assert step.assert_equal(sizes, step.authors(None)) < 1e-2
    with pytest.raises(SystemExit, match="not the same method"):
        step.assert_equal(sizes, lambda params, lr, reset: step.Published(params, lr, decays=(0.8, 0.9, 0.999), reset_every=reset))


def test_sizes_and_gradients() -> None:
    assert sum(int(np.prod(size)) for size in step.shapes(**step.FULL)) == pytest.approx(42e6, rel=0.01)
    bench = step.Bench([(4, 6), (5,)])
    one, two = bench.parameters(), bench.parameters()
    bench.prepare()
    before = [p.grad.clone() for p in one]
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(one, two, strict=True)) and one[0] is not two[0]
    bench.prepare()
    assert not torch.equal(one[0].grad, before[0])


@pytest.mark.parametrize(("kind", "found"), [("none", []), ("once", [100]), ("whole", list(range(40, 190, 20)))])
def test_spikes_come_when_they_are_said_to(kind: str, found: list[int]) -> None:
    assert spikes.spike_steps(kind, 200, 0) == found


def test_spikes_are_as_large_as_they_are_said_to_be() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(200, 200, generator=generator)
    whole, entries = gradient.clone(), gradient.clone()
    spikes.spoil([whole], "whole", generator), spikes.spoil([entries], "entries", generator)
    assert torch.equal(whole, gradient * 1000)
    hit = entries != gradient
    assert hit.float().mean().item() == pytest.approx(0.01, abs=0.002)
    assert torch.allclose(entries[hit].abs(), 1000 * gradient.abs().max())


def test_the_cost_is_against_the_same_seed_without_spikes() -> None:
    quiet = {"loss": 2.0, "losses": [3.0] * 30}
    spiked: dict[str, Any] = {"loss": 2.5, "losses": [3.0] * 10 + [4.0] * 10 + [3.0] * 10}
    assert spikes.after(spiked, quiet, [10]) == pytest.approx(1.0)
    assert spikes.after(spiked, quiet, [15]) == pytest.approx(0.5)
    done = {(arm, kind): [spiked if kind == "whole" else quiet] * 2 for arm in ("adamw", "clip") for kind in ("none", "whole")}
    found = spikes.table(done, ["adamw", "clip"], ["none", "whole"], 30)
    assert found["whole"]["clip"]["cost"]["mean"] == pytest.approx(0.5) and found["none"]["clip"]["cost"]["mean"] == 0


def test_a_run_is_the_same_twice_and_spikes_change_it() -> None:
    first, again, spiked = (spikes.train("adamw", kind, 8, 0) for kind in ("none", "none", "once"))
    assert first == again
    assert first["losses"][:4] == spiked["losses"][:4] and first["loss"] != spiked["loss"]
    assert first["losses"][0] > first["losses"][-1]


def test_the_document_says_what_the_results_say() -> None:
    said = (BENCHMARKS.parent / "docs" / "optimizers.md").read_text(encoding="utf-8")
    results = [json.loads((BENCHMARKS / "results" / f"stable_spam_{name}.json").read_text(encoding="utf-8")) for name in ("step", "spikes")]
    assert f"{results[0]['ratio']:.1f} times faster" in said
    for name in ("stable_spam", "gradient_stabilizer"):
        assert f"| {results[0]['rest'][name]['ours_over_clip']['value']:.2f} |" in said
    rows = [line for line in said.splitlines() if line.startswith("|")]
    for arm in spikes.ARMS:
        table = results[1]["table"]
        costs = [table[kind][arm]["cost"] for kind in ("once", "whole", "entries")]
        cells = [f"{table['none'][arm]['loss']['mean']:.3f}", *(f"{c['mean']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in costs)]
        wanted = " | ".join(cells).replace("-0.000", "0.000")
        assert any(wanted in row.replace("-0.000", "0.000") for row in rows), (arm, wanted)
