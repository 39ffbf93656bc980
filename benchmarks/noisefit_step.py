"""One NoiseFiT step against three plain forward passes with whole logits, as in the authors' later script.

    python benchmarks/noisefit_step.py            # 20 pairs in each of three settings; about half an hour on one core; goes on by setting
    python benchmarks/noisefit_step.py --quick    # a smaller model, two pairs of each

The peer is written here from the formulas of github.com/akhadangi/NoiseFiT at 48c61c8 (`NoiseFiT.py`, loss_mode full, prefix
sharing off as by default): the model is called three times, hooks add noise to the outputs of the chosen layers, and
cross-entropy and divergences are taken from three (B, T, V) tensors of logits. Before anything is timed, loss and gradient of
both must agree to 1e-4 (float32) with the script's masks and the same normal draws. Timed are forward and backward passes and
AdamW. Settings:

    half     noise from a quarter of the depth on, half of the tokens carry loss: the setting of the figures quoted
    worst    noise from the first layer on, every token carries loss: nothing is shared, no logits are left out
    late     noise on the last three layers, a quarter of the tokens carry loss

`flops` are those of matrix products and attention, counted, and do not depend on the machine's load; `passes` is our cost in
passes through all layers (the peer's is 3). `memory` is how far the peak of two steps lies above what the process held before
them, each arm in its own process. `large` counts the work of two published models from their sizes alone, in forward passes
of the whole model.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _harness import Cells, arguments, compare, finish, speed

PAIRS = {False: 20, True: 2}
A, LAMBDA = 0.5, 0.1
SCALE = 0.06


@dataclass(frozen=True)
class Setting:
    """A step and the model that takes it: `noisy` layers, and the share of each row's tokens that carry loss."""

    noisy: tuple[int, ...] = (2, 4, 6)
    loss_share: float = 0.5
    hidden: int = 256
    layers: int = 8
    vocabulary: int = 32768
    rows: int = 4
    length: int = 128


def settings(quick: bool) -> dict[str, Setting]:
    """The three settings."""
    base = Setting(hidden=64, layers=8, vocabulary=4096, rows=2, length=48) if quick else Setting()
    return {
        "half": base,
        "worst": replace(base, noisy=(0, 3, 6), loss_share=1.0),
        "late": replace(base, noisy=(5, 6, 7), loss_share=0.25),
    }


def make_model(setting: Setting) -> Any:
    """A seeded float32 Qwen2 with tied embeddings."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=setting.vocabulary, hidden_size=setting.hidden, intermediate_size=4 * setting.hidden, num_hidden_layers=setting.layers,
        num_attention_heads=setting.hidden // 32, num_key_value_heads=setting.hidden // 64, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def make_batch(setting: Setting) -> dict[str, Any]:
    """Random rows of one length; the first tokens of each are a prompt without loss."""
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, setting.vocabulary, (setting.rows, setting.length), generator=generator)
    labels = ids.clone()
    labels[:, : max(1, round(setting.length * (1 - setting.loss_share)))] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Peer:
    """Three calls of the model."""

    def __init__(self, setting: Setting, _: Path) -> None:
        import torch

        torch.set_num_threads(1)
        self.model, self.batch, self.setting = make_model(setting).train(), make_batch(setting), setting
        self.number = 0
        self.draw: Callable[[int, int, Any], Any] = lambda layer, number, hidden: torch.randn_like(hidden)
        for layer in setting.noisy:
            self.model.model.layers[layer].register_forward_hook(self._hook(layer))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)

    def _hook(self, layer: int) -> Callable[..., Any]:
        def hook(_: Any, __: Any, hidden: Any) -> Any:
            if not self.number:
                return None
            variance = hidden.var(dim=-1, keepdim=True)
            factor = (variance / (variance.mean() + 1e-6)).exp().clamp(max=5.0)
            median = hidden.median(dim=-1, keepdim=True).values
            mad = (hidden - median).abs().median(dim=-1, keepdim=True).values.clamp(min=1e-6 * hidden.norm(dim=-1, keepdim=True))
            scale = SCALE * mad * (-0.1 * (hidden - median).abs() / (mad + 1e-6)).exp() * factor
            return hidden + (self.draw(layer, self.number, hidden) * scale).detach()

        return hook

    def passes(self) -> float:
        """Loss and gradient."""
        import torch.nn.functional as F

        batch, labels = self.batch, self.batch["labels"]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        self.number = 0
        clean = self.model(**batch)
        self.number = 1
        first = self.model(**inputs).logits
        self.number = 2
        second = self.model(**inputs).logits
        mask = (labels != -100).float()
        teacher = F.softmax(clean.logits.detach(), dim=-1)
        logs = F.log_softmax(first, dim=-1)
        soft = [F.kl_div(log, teacher, reduction="none").sum(-1) for log in (logs, F.log_softmax(second, dim=-1))]
        agree = F.kl_div(logs, F.softmax(second.detach(), dim=-1), reduction="none").sum(-1)

        def mean(values: Any) -> Any:
            return (values * mask).sum() / mask.sum()

        loss = A * clean.loss + (1 - A) * mean(0.5 * (soft[0] + soft[1])) + LAMBDA * mean(agree)
        loss.backward()
        return loss.item()

    def step(self) -> None:
        """What is timed."""
        self.passes()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradient(self) -> Any:
        """All gradients in one vector."""
        import torch

        return torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])


class Ours(Peer):
    """Our trainer's step on the same batch."""

    def __init__(self, setting: Setting, folder: Path, compat: str = "none") -> None:
        import torch
        import trl
        from datasets import Dataset

        from posttrain.trainers._noisefit_config import NoiseConfig
        from posttrain.trainers.noisefit import NoiseFiTTrainer

        torch.set_num_threads(1)
        self.setting, self.batch = setting, make_batch(setting)
        args = trl.SFTConfig(
            output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, gradient_checkpointing=False,
            per_device_train_batch_size=setting.rows, learning_rate=1e-6, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None,
        )  # fmt: skip
        rows = Dataset.from_dict({"input_ids": self.batch["input_ids"].tolist(), "labels": self.batch["labels"].tolist()})
        noise = NoiseConfig(selection="list", layers=list(setting.noisy), compat=compat, share_prefix="on")
        self.trainer = NoiseFiTTrainer(
            make_model(setting), args=args, train_dataset=rows, processing_class=_tokenizer(), noise=noise
        )  # fmt: skip
        self.model = self.trainer.model.train()
        scales = {str(layer): SCALE for layer in setting.noisy}
        self.trainer.policy = {"layers": list(setting.noisy), "scales": scales, "num_layers": setting.layers}
        self.trainer.create_optimizer()
        self.optimizer = self.trainer.optimizer
        self.trainer.current_gradient_accumulation_steps = 1
        self.items = int((self.batch["labels"] != -100).sum())

    def passes(self) -> float:
        """Loss and gradient by `training_step`."""
        self.trainer._at = (-1, -1)
        with self.trainer.injector.installed():
            return self.trainer.training_step(self.model, dict(self.batch), self.items).item()


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def assert_equal(setting: Setting, folder: Path) -> dict[str, float]:
    """Loss and gradient of both with the script's masks and one set of normal draws.

    Raises:
        SystemExit: they differ.
    """
    import torch

    from posttrain.trainers._noisefit_noise import Work

    def draw(layer: int, number: int, hidden: Any) -> Any:
        return torch.randn(hidden.shape[-3:], generator=torch.Generator().manual_seed(10 * layer + number))

    peer, ours = Peer(setting, folder), Ours(setting, folder, "v2")
    peer.draw, own = draw, Work._draw
    Work._draw = lambda self, layer, number, hidden: draw(layer, number, hidden)  # type: ignore[method-assign]
    try:
        losses, gradients = zip(*((arm.passes(), arm.gradient()) for arm in (peer, ours)), strict=True)
    finally:
        Work._draw = own  # type: ignore[method-assign]
    gap = ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
    if gap > 1e-4 or abs(losses[0] - losses[1]) > 1e-4 * abs(losses[0]):
        raise SystemExit(f"not the same work: losses {losses[0]:.9g} and {losses[1]:.9g}, gradients differ by {gap:.3g}")
    return {"loss": losses[0], "loss_ours": losses[1], "gradient_gap": gap}


def flops(arm: Peer) -> float:
    """Floating-point operations of one step, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        arm.step()
    return float(counter.get_total_flops())


def resident(field: str) -> float:
    """MiB of this process: `VmRSS` now, `VmHWM` the peak."""
    return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))


def peak(kind: str, setting: Setting) -> dict[str, float]:
    """MiB by which the peak of two steps is above what the process held before them; Linux only."""
    with tempfile.TemporaryDirectory() as folder:
        arm = {"peer": Peer, "ours": Ours}[kind](setting, Path(folder))
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        arm.step()
        arm.step()
    return {"mib": resident("VmHWM") - before}


def memory(args: Any, name: str) -> dict[str, float]:
    """`peak` of both arms, each in its own process, and ours over the peer's."""
    found = {}
    for kind in ("peer", "ours"):
        command = [sys.executable, __file__, "--peak", kind, "--setting", name, *(["--quick"] if args.quick else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[kind] = round(json.loads(done.stdout.splitlines()[-1])["mib"], 1)
    return {**found, "ours_over_peer": round(found["ours"] / found["peer"], 3)}


LARGE = {
    "Llama-3.2-1B": {"layers": 16, "layer": 60.8e6, "head": 262.7e6},
    "Llama-2-7B": {"layers": 32, "layer": 202.4e6, "head": 131.1e6},
}
"""Parameters of a layer and of the head, from the models' published configurations."""


def large(share: float) -> dict[str, dict[str, float]]:
    """Our work over the peer's at the size of published models, by first noisy layer, with a `share` of tokens that carry loss."""
    from posttrain.trainers._noisefit_forward import forward_units

    found: dict[str, dict[str, float]] = {}
    for name, sizes in LARGE.items():
        layers, body, head = int(sizes["layers"]), sizes["layers"] * sizes["layer"], sizes["head"]
        for depth in (0.0, 0.25, 0.5, 0.75):
            units = forward_units(layers, round(depth * layers), 2, share=True)
            found.setdefault(name, {})[f"depth {depth}"] = round((units * body + 3 * share * head) / (3 * (body + head)), 3)
    return found


def one_setting(args: Any, label: str, setting: Setting, _: int) -> dict[str, Any]:
    """Equality, time, work and memory of one setting."""
    from posttrain.trainers._noisefit_forward import forward_units

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        equal = assert_equal(setting, folder)
        peer, ours = Peer(setting, folder), Ours(setting, folder)
        counted = flops(peer), flops(ours)
        compared = compare(peer.step, ours.step, pairs=PAIRS[args.quick], warmup=1)
    cpu = speed(compared)
    held = memory(args, label) if label == "half" or not args.quick else None
    return {
        **cpu, "ours_over_peer": 1 / cpu["ratio"], "wall": speed(compared, "wall"), "equal": equal,
        "flops": counted[0], "flops_ours": counted[1], "flops_ours_over_peer": counted[1] / counted[0],
        "passes": forward_units(setting.layers, min(setting.noisy), 2, share=True), "memory_mib": held, "setting": setting.__dict__,
    }  # fmt: skip


def main() -> None:
    """Measures, and prints the record."""
    args = arguments(__doc__.splitlines()[0], peak={"default": ""}, setting={"default": "half"})
    chosen = settings(args.quick)
    if args.peak:
        print(json.dumps(peak(args.peak, chosen[args.setting])))
        return
    cells = Cells("noisefit_step", args)
    arms = {label: partial(one_setting, args, label, setting) for label, setting in chosen.items()}
    found = {label: result for (label, _), result in cells.measure(arms, [0]).items()}
    quoted = {key: found["half"][key] for key in ("ours", "peer", "ratio", "ci95", "control", "verdict", "clock", "pairs")}
    finish("noisefit_step", {**quoted, "unit": "CPU seconds a step", **found, "large": large(0.5)}, args)


if __name__ == "__main__":
    main()
