"""One D2O step with stored references and own answers, against working them out at every step.

    python benchmarks/d2o_step.py            # 20 pairs in each setting, about five minutes on one core
    python benchmarks/d2o_step.py --quick

Timed are the forward and backward passes of two prompts with K own answers each. Peers, on the same model and answers:

    references    the reference model's log-probabilities of all answers are worked out anew at each step, by a second model
    answers       the own answers are drawn anew as well, by the same engine

and `rows`: our own step through two answers at a time (the exact two-pass gradient) against all at once, in time; `memory` is how far
the peak of two steps lies above what the process held before, all at once over two at a time, each in its own process.
References cost one forward pass beside a forward and a backward pass, so their ratio can hardly exceed 4/3.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _harness import arguments, compare, finish, speed

K, PROMPT, ANSWER = 11, 24, 40


class Step:
    """A trainer on random groups.

    Args:
        quick: a smaller model.
        rows: answers in one pass.
    """

    def __init__(self, quick: bool, rows: int | None = None) -> None:
        import torch
        from datasets import Dataset
        from transformers import Qwen2Config, Qwen2ForCausalLM, TrainingArguments

        from posttrain.trainers._d2o_samples import Group
        from posttrain.trainers.d2o import D2OStage, D2OTrainer

        torch.set_num_threads(1)
        torch.manual_seed(0)
        size, layers, vocabulary = (64, 2, 1024) if quick else (192, 6, 8192)
        config = Qwen2Config(
            vocab_size=vocabulary, hidden_size=size, intermediate_size=4 * size, num_hidden_layers=layers, num_attention_heads=size // 32,
            num_key_value_heads=size // 64, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=2,
        )  # fmt: skip
        model = Qwen2ForCausalLM(config)
        self.reference = copy.deepcopy(model).eval().requires_grad_(False)
        draw = torch.Generator().manual_seed(1)

        def ids(count: int) -> list[int]:
            return torch.randint(3, vocabulary, (count,), generator=draw).tolist()

        self.groups = []
        for _ in range(2):
            prompt = ids(PROMPT)
            own = [([*prompt, *ids(ANSWER)], PROMPT) for _ in range(K)]
            self.groups.append(Group({"id": "x"}, ([*prompt, *ids(ANSWER)], PROMPT), own, [-300.0] * K, -300.0))
        args = TrainingArguments(output_dir=tempfile.mkdtemp(), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1)
        self.trainer = D2OTrainer(
            model=model, args=args, train_dataset=Dataset.from_dict({"group": [0, 1]}), groups=self.groups,
            cfg=D2OStage(name="s", steps=1, rows_per_pass=rows),
        )  # fmt: skip

    def __call__(self) -> float:
        """Passes with what is stored."""
        self.trainer.model.zero_grad()
        return float(self.trainer.own_step(self.trainer.model, self.groups, 1.0))

    def with_references(self) -> float:
        """The references worked out first."""
        import torch

        with torch.no_grad():
            answers = [answer for group in self.groups for answer in group.answers]
            values = self.trainer.logps(self.reference, answers).view(len(self.groups), K + 1)
        for group, found in zip(self.groups, values.tolist(), strict=True):
            group.own_refs, group.negative_ref = found[:K], found[K]
        return self()

    def with_answers(self) -> float:
        """Own answers drawn first, then the references."""
        from posttrain.rollout.base import Request, Sampling
        from posttrain.rollout.hf import HFEngine

        engine = HFEngine(self.trainer.model, _NoText())
        engine.eos_ids = frozenset({-1})
        requests = [Request(group.prompt, k, Sampling(ANSWER)) for group in self.groups for k in range(K)]
        engine.generate(requests)
        return self.with_references()


class _NoText:
    """A tokenizer that is only asked for text."""

    eos_token_id = None
    added_tokens_decoder: dict[int, Any] = {}

    def decode(self, *_: Any, **__: Any) -> str:
        """Nothing."""
        return ""


def peak_above(quick: bool, rows: int | None) -> float:
    """MiB that two steps take above what the process held before, in a process of its own."""
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
        f"from d2o_step import Step, resident\nstep = Step({quick}, {rows})\nbefore = resident('VmRSS')\nstep(); step()\n"
        "print(resident('VmHWM') - before)"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1])


def resident(name: str) -> float:
    """MiB of this process, from /proc."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Runs all settings."""
    args = arguments(__doc__ or "")
    pairs = 3 if args.quick else 20
    whole, parts = Step(args.quick), Step(args.quick, 2)
    assert abs(whole() - parts()) < 1e-6
    found = {
        "references": speed(compare(whole.with_references, whole, pairs=pairs)),
        "answers": speed(compare(whole.with_answers, whole, pairs=pairs)),
        "rows": speed(compare(whole, parts, pairs=pairs)),
    }
    memory = {"whole": peak_above(args.quick, None), "two": peak_above(args.quick, 2)}
    memory["ratio"] = memory["whole"] / max(memory["two"], 1e-9)
    lead = {name: found["references"][name] for name in ("ours", "peer", "ratio", "ci95", "control", "verdict", "clock")}
    finish("d2o_step", {**lead, "parts": found, "memory_mib": memory, "k": K, "prompt": PROMPT, "answer": ANSWER}, args)


if __name__ == "__main__":
    main()
