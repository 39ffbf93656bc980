"""One GRPO step on recorded rollouts: `fast: on` against TRL's GRPOTrainer, the same loss and gradient.

    python benchmarks/grpo_step.py            # 20 pairs of skewed, 20 of equal lengths; about a quarter of an hour on one core
    python benchmarks/grpo_step.py --quick    # a smaller model, three pairs of each

Both trainers get the same completions from `rollout_func`; all that a step does beside sampling is timed: decoding, a reward,
advantages, log-probabilities of old policy and reference where asked, the micro-batches' forward and backward passes, AdamW.
Before anything is timed, loss and gradient of both must agree to 1e-5 (float32). Lengths:

    skewed    log-normal, median a sixth of the limit, the longest of a step at the limit: what sampling with an end token gives
    equal     every completion at the limit: nothing to trim

and variants, by counted work alone: `kl`, with a reference and two updates a batch of rollouts; `alike`, where a quarter of
the groups has equal rewards and so no gradient; `long prompts`, three times as long.

`flops` are those of matrix products and attention, counted, and do not depend on the machine's load; `lean` are TRL's without
its output head at prompts and padding, which TRL leaves out where it has Triton (a GPU) and not on a CPU. `head` is the share
of a token's parameters that are the output head's. `memory` is the peak of resident memory in a step above that before it, each
trainer in its own process (Linux). `whole` adds the CPU seconds that our engine needs to draw completions of these lengths, the same for
both. `ratio` in the record is TRL's CPU seconds over ours at skewed lengths, `control` TRL against itself.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _harness import arguments, compare, finish, speed


@dataclass(frozen=True)
class Setting:
    """A step and the model that takes it."""

    hidden: int = 192
    layers: int = 4
    vocabulary: int = 4096
    prompts: int = 4
    group: int = 8
    per_device: int = 8
    prompt: tuple[int, int] = (48, 96)
    limit: int = 192
    lengths: str = "skewed"
    kl: bool = False
    alike: bool = False


FULL = Setting()
QUICK = Setting(hidden=64, layers=2, vocabulary=512, prompt=(16, 32), limit=64)
PAIRS = {False: 20, True: 3}


@dataclass(frozen=True)
class Rollouts:
    """Recorded prompts, each repeated for its group, and completions; and each one's reward."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    rewards: list[float]


def record(setting: Setting, seed: int = 0) -> Rollouts:
    """Random tokens with the lengths of a setting."""
    rng = random.Random(seed)
    rows = setting.prompts * setting.group

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, setting.vocabulary) for _ in range(count)]

    prompts = [tokens(rng.randint(*setting.prompt)) for _ in range(setting.prompts)]
    lengths = [min(max(round(rng.lognormvariate(0, 1) * setting.limit / 6), 1), setting.limit) for _ in range(rows)]
    lengths[rng.randrange(rows)] = setting.limit
    lengths = [setting.limit] * rows if setting.lengths == "equal" else lengths
    rewards = [rng.random() for _ in range(rows)]
    if setting.alike:
        rewards[: setting.group] = [0.0] * setting.group
    return Rollouts([prompt for prompt in prompts for _ in range(setting.group)], [tokens(length) for length in lengths], rewards)


def make_tokenizer(setting: Setting) -> Any:
    """One word an id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, setting.vocabulary)}
    core = Tokenizer(models.WordLevel(names, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def make_model(setting: Setting) -> Any:
    """A seeded float32 Qwen2 whose output head holds about the share of parameters that it has in a model of 0.5 billion."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=setting.vocabulary, hidden_size=setting.hidden, intermediate_size=4 * setting.hidden, num_hidden_layers=setting.layers,
        num_attention_heads=setting.hidden // 32, num_key_value_heads=setting.hidden // 64, max_position_embeddings=2048,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


class Arm:
    """A trainer on recorded rollouts.

    Args:
        kind: `peer` is TRL's own, `ours` and `off` are ours with and without `fast`.
        setting: the step.
        folder: for the reference model, and what the trainer writes.
    """

    def __init__(self, kind: str, setting: Setting, folder: Path) -> None:
        import torch
        import trl
        from datasets import Dataset

        from posttrain.trainers.grpo import GRPOTrainer

        torch.set_num_threads(1)
        model, self.tokenizer, self.rollouts, self.setting = make_model(setting), make_tokenizer(setting), record(setting), setting
        if setting.kl:
            model.save_pretrained(folder / "reference")
            model.config._name_or_path = str(folder / "reference")
        rows = setting.prompts * setting.group
        args = trl.GRPOConfig(
            output_dir=str(folder / kind), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, gradient_checkpointing=False,
            per_device_train_batch_size=setting.per_device, gradient_accumulation_steps=rows // setting.per_device,
            num_generations=setting.group, max_completion_length=setting.limit, learning_rate=1e-6, temperature=0.9,
            beta=0.02 if setting.kl else 0.0, num_iterations=2 if setting.kl else 1, seed=0,
        )  # fmt: skip
        own = {} if kind == "peer" else {"fast": kind == "ours"}
        self.rows = [{"prompt": f"w{3 + i // setting.group}", "row": i} for i in range(rows)]
        self.trainer = (trl.GRPOTrainer if kind == "peer" else GRPOTrainer)(
            model, reward_funcs=self._reward, args=args, train_dataset=Dataset.from_list(self.rows), processing_class=self.tokenizer,
            rollout_func=self._replay, **own,
        )  # fmt: skip
        self.trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
        self.trainer.create_optimizer()
        self.trainer.model.train()

    def _reward(self, completions: list[Any], row: list[int], **_: Any) -> list[float]:
        return [self.rollouts.rewards[i] for i in row]

    def _replay(self, prompts: list[Any], _trainer: Any) -> dict[str, Any]:
        drawn = self.rollouts.completion_ids
        return {"prompt_ids": self.rollouts.prompt_ids, "completion_ids": drawn, "logprobs": [[-1.0] * len(ids) for ids in drawn]}

    def passes(self) -> float:
        """Rollouts, and the passes of all updates on them; returns the mean loss of the last update's micro-batches."""
        import torch

        trainer, count = self.trainer, self.trainer.args.gradient_accumulation_steps
        torch.manual_seed(0)
        trainer._step = 0
        for update in range(trainer.num_iterations):
            if update:
                self.update()
            losses = [trainer.training_step(trainer.model, self.rows, None).item() for _ in range(count)]
        return sum(losses) / count

    def update(self) -> None:
        """AdamW."""
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()

    def step(self) -> None:
        """What is timed."""
        self.passes()
        self.update()

    def gradient(self) -> Any:
        """All gradients in one vector."""
        import torch

        return torch.cat([parameter.grad.flatten() for parameter in self.trainer.model.parameters()])

    def close(self) -> None:
        """Zeroes the gradients that `passes` left."""
        self.trainer.optimizer.zero_grad()


def assert_equal(peer: Arm, ours: Arm) -> dict[str, float]:
    """Loss and gradient of both on the rollouts, before either has taken a step.

    Raises:
        SystemExit: they differ.
    """
    losses, gradients = [], []
    for arm in (peer, ours):
        losses.append(arm.passes())
        gradients.append(arm.gradient())
        arm.close()
    gap = ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
    if gap > 1e-5 or abs(losses[0] - losses[1]) > 1e-5 * max(abs(losses[0]), 1e-2):
        raise SystemExit(f"not the same work: losses {losses[0]:.9g} and {losses[1]:.9g}, gradients differ by {gap:.3g}")
    return {"loss": losses[0], "loss_ours": losses[1], "gradient_gap": gap}


def flops(arm: Arm) -> float:
    """Floating-point operations of one step, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        arm.step()
    return float(counter.get_total_flops())


def work(setting: Setting, folder: Path) -> dict[str, Any]:
    """Counted work of both trainers, and that they do the same."""
    peer, ours = Arm("peer", setting, folder), Arm("ours", setting, folder)
    equality = assert_equal(peer, ours)
    rollouts, rows = peer.rollouts, setting.prompts * setting.group
    width, tokens = max(map(len, rollouts.prompt_ids)), sum(map(len, rollouts.completion_ids))
    counted = flops(peer), flops(ours)
    without = 2 * setting.hidden * setting.vocabulary * (rows * (width + max(map(len, rollouts.completion_ids)) - 1) - tokens)
    lean = counted[0] - without * (10 if setting.kl else 4)
    logged = ours.trainer._metrics["train"]["fast/positions"]
    return {
        **equality, "flops": counted[0], "flops_ours": counted[1], "ratio": counted[0] / counted[1], "lean": lean / counted[1],
        "completion_tokens": tokens, "positions": rows * (width + max(map(len, rollouts.completion_ids))),
        "positions_ours": sum(logged) / len(logged),
    }  # fmt: skip


def phases(setting: Setting, folder: Path) -> dict[str, dict[str, float]]:
    """Seconds by phase of one step of our trainer with `fast` off (TRL's passes) and on; and of drawing such completions."""
    found = {}
    for kind in ("off", "ours"):
        arm = Arm(kind, setting, folder)
        arm.step()
        arm.trainer.clock.take()
        start = time.perf_counter()
        arm.passes()
        middle = time.perf_counter()
        arm.update()
        taken = {name: round(value, 3) for name, value in arm.trainer.clock.take().items()}
        found[kind] = {**taken, "optimizer": round(time.perf_counter() - middle, 3), "step": round(time.perf_counter() - start, 3)}
    return found


def drawing(setting: Setting) -> float:
    """CPU seconds of our engine for completions of the recorded lengths, all in one batch."""
    from posttrain.rollout.base import Request, Sampling
    from posttrain.rollout.hf import HFEngine

    rollouts = record(setting)
    engine = HFEngine(make_model(setting), make_tokenizer(setting))
    engine.eos_ids = frozenset()
    pairs = enumerate(zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True))
    requests = [Request(prompt, i, Sampling(len(drawn), 0.9), str(i)) for i, (prompt, drawn) in pairs]
    engine.generate(requests)
    start = time.process_time()
    engine.generate(requests)
    return time.process_time() - start


def peak(kind: str, quick: bool, lengths: str) -> dict[str, float]:
    """MiB of resident memory at the peak of a second step, above those before the first."""
    setting = replace(QUICK if quick else FULL, lengths=lengths)
    with tempfile.TemporaryDirectory() as folder:
        arm = Arm(kind, setting, Path(folder))
        before = resident("VmRSS")
        arm.step()
        Path("/proc/self/clear_refs").write_text("5")
        arm.step()
    return {"mib": resident("VmHWM") - before}


def resident(field: str) -> float:
    """MiB of this process: `VmRSS` now, `VmHWM` at the peak since it was cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def memory(args: Any, lengths: str) -> dict[str, float]:
    """`peak` of both trainers, each in its own process."""
    found = {}
    for kind in ("peer", "ours"):
        command = [sys.executable, __file__, "--peak", kind, "--lengths", lengths, *(["--quick"] if args.quick else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[kind] = round(json.loads(done.stdout.splitlines()[-1])["mib"], 1)
    return found


def timed_pair(setting: Setting, folder: Path, pairs: int) -> dict[str, Any]:
    """Paired times of both trainers, after they were found equal."""
    peer, ours = Arm("peer", setting, folder), Arm("ours", setting, folder)
    assert_equal(peer, ours)
    return compare(peer.step, ours.step, pairs=pairs, warmup=1)


def main() -> None:
    """Measures, and prints the record."""
    args = arguments(__doc__.splitlines()[0], peak={"default": ""}, lengths={"default": "skewed"})
    if args.peak:
        print(json.dumps(peak(args.peak, args.quick, args.lengths)))
        return
    base = QUICK if args.quick else FULL
    settings = {"skewed": base, "equal": replace(base, lengths="equal")}
    long = tuple(3 * size for size in base.prompt)
    variants = {"kl": replace(base, kl=True), "alike": replace(base, alike=True), "long prompts": replace(base, prompt=long)}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, measure = Path(name), partial(timed_pair, pairs=PAIRS[args.quick])
        for lengths, setting in settings.items():
            compared = measure(setting, folder)
            seconds = phases(setting, folder)
            draw = drawing(setting)
            cpu = speed(compared)
            whole = {"drawing_s": round(draw, 3), "ratio": (draw + cpu["peer"]) / (draw + cpu["ours"])}
            found[lengths] = {
                **cpu, "wall": speed(compared, "wall"), "work": work(setting, folder), "phases_s": seconds, "whole": whole,
                "memory_mib": memory(args, lengths) if lengths == "skewed" or not args.quick else {},
            }  # fmt: skip
        found["variants"] = {label: work(setting, folder) for label, setting in variants.items() if not args.quick}
    head = base.vocabulary / (base.vocabulary + base.layers * 14 * base.hidden)
    setup = {**base.__dict__, "head": round(head, 3), "rows": base.prompts * base.group}
    finish("grpo_step", {**{key: found["skewed"][key] for key in ("ours", "peer", "ratio", "ci95", "control", "verdict", "clock", "pairs")},
                         "unit": "CPU seconds a step", "setting": setup, **found}, args)  # fmt: skip


if __name__ == "__main__":
    main()
