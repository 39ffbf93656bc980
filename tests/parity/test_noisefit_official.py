"""NoiseFiT against the authors' two scripts, written here from their formulas: three plain forward passes with hooks, whole logits.

Scripts: github.com/akhadangi/NoiseFiT at 48c61c8, `NoiseFiT_v1_manual_snr.py` (v1) and `NoiseFiT.py`, loss_mode full (v2).
Their normal draws are replaced by given ones, the same on both sides. With shared layers the gradients differ by float32
rounding also in float64, since the model takes its norms in float32 and the passes' gradients are summed before them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from noisefit_kit import batch_of, deep_model, gap, loss_and_gradient, noise_trainer

torch = pytest.importorskip("torch")

LAYERS = [1, 2]
SCALE = 0.3


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deep_model(tiny_model_dir, tmp_path_factory.mktemp("deep") / "model")


def draw(layer: int, number: int, shape: Any) -> Any:
    """The normal numbers of a layer in a pass, padding included."""
    generator = torch.Generator().manual_seed(100 * layer + number)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def noisy_output(version: str, std: float, layer: int, number: int, h: Any) -> Any:
    """What the scripts' hooks make of a layer's output."""
    variance = h.var(dim=-1, keepdim=True)
    factor = torch.exp(variance / (variance.mean() + 1e-6)).clamp(max=5.0)
    median = h.median(dim=-1, keepdim=True).values
    away = (h - median).abs()
    mad = away.median(dim=-1, keepdim=True).values
    mad = torch.maximum(mad, 1e-6 * h.norm(dim=-1, keepdim=True))
    weight = torch.exp(-0.1 * away / (mad + 1e-6))
    base = h.std() * std * std if version == "v1" else std
    added = base * mad * weight * factor * draw(layer, number, h.shape)
    return h + (added if version == "v1" else added.detach())


def script_loss(model: Any, batch: dict[str, Any], version: str, std: float, a: float, lam: float, tau: float) -> Any:
    """Three forward passes and the loss on whole logits, with the scripts' masks and means."""
    state = {"pass": 0}
    hooks = []
    for layer in LAYERS:

        def hook(_: Any, __: Any, output: Any, layer: int = layer) -> Any:
            return noisy_output(version, std, layer, state["pass"], output) if state["pass"] else None

        hooks.append(model.model.layers[layer].register_forward_hook(hook))
    z = []
    for state["pass"] in (0, 1, 2):
        z.append(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)
    for handle in hooks:
        handle.remove()
    labels = batch["labels"]
    ce = torch.nn.functional.cross_entropy(z[0][:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    held = (lambda x: x) if version == "v1" else (lambda x: x.detach())
    student = 1.0 if version == "v1" else tau
    logs = [(x / student).log_softmax(-1) for x in z]
    teacher, second = (held(z[0]) / tau).softmax(-1), (held(z[2]) / student).softmax(-1)
    mask = labels != -100

    def mean(values: Any) -> Any:
        return values[mask].mean() * (1.0 if version == "v1" else tau**2)

    soft = mean(sum(0.5 * (teacher * (teacher.log() - log)).sum(-1) for log in logs[1:]))
    cons = mean((second * (second.log() - logs[1])).sum(-1))
    return a * ce + (1 - a) * soft + lam * cons


@pytest.mark.parametrize("share", ["on", "off"])
@pytest.mark.parametrize(("version", "tau"), [("v1", 1.0), ("v1", 2.0), ("v2", 1.0), ("v2", 2.0)])
def test_loss_and_gradient_equal_the_scripts(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, tau: float, share: str
) -> None:
    from posttrain.trainers import _noisefit_noise

    def given(self: Any, layer: int, number: int, hidden: Any) -> Any:
        return draw(layer, number, hidden.shape[1:])

    monkeypatch.setattr(_noisefit_noise.Work, "_draw", given)
    fields = {"selection": "list", "layers": LAYERS, "compat": version, "relative_std": 0.5, "temperature": tau, "share_prefix": share}
    trainer = noise_trainer(model_dir, tmp_path, ce_weight=0.4, consistency_weight=0.3, **fields)
    trainer.model.double()
    batch = batch_of(trainer)
    assert (batch["attention_mask"] == 0).any()
    std = 0.5
    if version == "v2":
        std = SCALE
        trainer._take({"layers": LAYERS, "scales": {str(layer): SCALE for layer in LAYERS}, "num_layers": 4})
    loss, gradient = loss_and_gradient(trainer, batch)
    assert trainer.shared is (share == "on")
    trainer.model.zero_grad()
    expected = script_loss(trainer.model, batch, version, std, 0.4, 0.3, tau)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    wanted = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    assert gap(gradient, wanted) < (1e-9 if share == "off" else 1e-6)


def test_snr_chooses_the_scripts_layers(model_dir: Path, tmp_path: Path) -> None:
    """The first script's statistics of the layers' outputs on one batch without padding, with many draws."""
    trainer = noise_trainer(model_dir, tmp_path, num_layers=2, calibration_rows=1)
    trainer.model.double()
    loss_and_gradient(trainer, batch_of(trainer))
    hidden: list[Any] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: hidden.append(out)) for layer in trainer.model.model.layers]
    batch = batch_of(trainer, range(1))
    batch.pop("labels")
    with torch.no_grad():
        trainer.model.eval()(**batch)
    for hook in hooks:
        hook.remove()
    snr = []
    for layer, h in enumerate(hidden):
        std = (0.1 * h.std()) ** 0.5
        changes = []
        for number in range(300):
            base = noisy_output("v1", 1.0, layer, number, h) - h
            changes.append((base / h.std() * std * std).abs().mean())
        snr.append((h.abs().mean() / (torch.stack(changes).mean() + 1e-6)).item())
    assert trainer.policy["snr"] == pytest.approx(snr, rel=0.02)
    assert trainer.policy["layers"] == sorted(sorted(range(4), key=lambda i: -snr[i])[:2])
