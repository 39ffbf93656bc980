"""Packed SFT against padded SFT on rows of skewed length: tokens per second, and what the padding alone would explain.

    python benchmarks/packing.py            # 30 pairs of each; about ten minutes on one core; goes on by arm
    python benchmarks/packing.py --quick    # a smaller model, two pairs of each

Lengths are log-normal, as those of answers in chats: many short rows, few long ones. One optimizer step of the stage `sft`
sees all rows once, in passes of `per_device` sequences, through the trainer, collator and loss that a run uses. The baseline
pads each pass to its longest row, in seeded random order. Before anything is timed, loss and gradient norm of all arms must
agree to 1e-4 with the baseline's (float32; only the order of sums differs).

    packed       `data.packing: true`, sequences of a pass kept apart (what a run does with sdpa and eager attention)
    end_to_end   the same sequences laid in one row, TRL's layout (what a run does with flash attention)
    grouped      `data.group_by_length: true`, no packing
    packed_wide  as `packed`, on a model twice as wide: attention, which costs more in sequences that are always full, weighs less

`ratio` is the baseline's time over ours for the same tokens, so the ratio of tokens per second. `expected` is the ratio of
computed positions, (tokens + padding) of the baseline over (tokens + padding) of ours: 1 / (1 - padding share) where ours
has no padding. `ratio_over_expected` within [0.9, 1.1] is the aim; above 1 there are other gains (fewer passes).
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _harness import Cells, arguments, compare, finish, speed

PAIRS = {False: 30, True: 2}
ARMS = ("packed", "end_to_end", "grouped", "packed_wide")


@dataclass(frozen=True)
class Setting:
    """Rows and the model that reads them; lengths are exp(N(mu, sigma)) between `shortest` and `longest`."""

    rows: int = 48
    longest: int = 256
    shortest: int = 8
    mu: float = 3.6
    sigma: float = 0.9
    per_device: int = 8
    hidden: int = 128
    layers: int = 2
    vocabulary: int = 2048


def setting_of(quick: bool) -> Setting:
    """The setting of the figures quoted, or a small one."""
    return Setting(rows=24, longest=96, mu=3.0, hidden=64, layers=1, vocabulary=1024) if quick else Setting()


def of_arm(name: str, quick: bool) -> tuple[str, Setting]:
    """How an arm lays out its rows, and its setting."""
    setting = setting_of(quick)
    return ("packed", replace(setting, hidden=2 * setting.hidden, rows=2 * setting.rows // 3)) if name == "packed_wide" else (name, setting)


def make_rows(setting: Setting) -> list[Any]:
    """Random tokens; the first third of each row carries no loss."""
    draw = random.Random(0)
    found = []
    for _ in range(setting.rows):
        length = min(max(round(draw.lognormvariate(setting.mu, setting.sigma)), setting.shortest), setting.longest)
        ids = [draw.randrange(3, setting.vocabulary) for _ in range(length)]
        found.append(SimpleNamespace(input_ids=ids, loss_mask=[0] * (length // 3) + [1] * (length - length // 3)))
    return found


def make_tokenizer(size: int) -> Any:
    """The smallest tokenizer that TRL takes: one word for each id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(size)}
    core = Tokenizer(models.WordLevel(words, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", bos_token="w1", eos_token="w2")


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


class Arm:
    """One way to lay out the rows; `step` is one optimizer step over all of them.

    Attributes:
        positions: computed in a step, padding included.
        tokens: of all rows.
        padding: share of the positions.
        passes: of a step.
    """

    def __init__(self, name: str, setting: Setting, folder: Path) -> None:
        import torch
        import trl

        from posttrain.trainers._packing import isolate, pack
        from posttrain.trainers._sft import SFTTrainer, encode_dataset
        from posttrain.trainers._train import epoch_order, grouped_order

        torch.set_num_threads(1)
        rows = make_rows(setting)
        dataset = encode_dataset(rows)
        documents, packing = dataset[:3]["input_ids"], name in ("packed", "end_to_end")
        dataset = pack(dataset, setting.longest) if packing else dataset
        order = epoch_order(len(dataset), len(dataset), 0)
        if name == "grouped":
            order = grouped_order(order, [len(ids) for ids in dataset["input_ids"]], len(order))
        dataset = dataset.select(order)
        args = trl.SFTConfig(
            output_dir=str(folder / name), max_length=setting.longest, packing=packing, dataset_kwargs={"skip_prepare_dataset": True},
            per_device_train_batch_size=setting.per_device, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=1,
            gradient_checkpointing=False,
        )  # fmt: skip
        tokenizer = make_tokenizer(setting.vocabulary)
        self.trainer = SFTTrainer(make_model(setting), args=args, train_dataset=dataset, processing_class=tokenizer)
        if packing:
            laid = isolate(self.trainer, documents, "stages.sft", apart=name == "packed")
            assert laid == ("apart" if name == "packed" else "end to end")
        self.model = self.trainer.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.examples = [dataset[i] for i in range(len(dataset))]
        self.size, self.passes = setting.per_device, -(-len(dataset) // setting.per_device)
        self.targets = sum(sum(row.loss_mask) for row in rows)
        self.tokens = sum(len(row.input_ids) for row in rows)
        self.positions = sum(self._batch(i)["input_ids"].numel() for i in range(self.passes))
        self.padding = 1 - self.tokens / self.positions

    def _batch(self, index: int) -> dict[str, Any]:
        return self.trainer.data_collator(self.examples[index * self.size : (index + 1) * self.size])

    def gradient(self) -> tuple[float, float]:
        """Loss of all rows and norm of its gradient; collating counts as part of the work."""
        import torch

        total = 0.0
        for index in range(self.passes):
            loss = self.trainer.compute_loss(self.model, self._batch(index), num_items_in_batch=torch.tensor(self.targets))
            loss.backward()
            total += float(loss.detach())
        return total, float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0))

    def step(self) -> None:
        """Gradient, clipping and AdamW."""
        self.gradient()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def assert_equal(ours: Arm, base: Arm) -> dict[str, float]:
    """Relative differences of loss and gradient norm; both must be at most 1e-4."""
    (loss, norm), (loss0, norm0) = ours.gradient(), base.gradient()
    ours.optimizer.zero_grad(set_to_none=True)
    base.optimizer.zero_grad(set_to_none=True)
    found = {"loss": abs(loss / loss0 - 1), "gradient_norm": abs(norm / norm0 - 1)}
    assert max(found.values()) <= 1e-4, found
    return found


def one_arm(args: Any, name: str, _: int) -> dict[str, Any]:
    """Equality, time and positions of one arm against the padded baseline."""
    layout, setting = of_arm(name, args.quick)
    with tempfile.TemporaryDirectory() as folder:
        base, ours = Arm("padded", setting, Path(folder)), Arm(layout, setting, Path(folder))
        equal = assert_equal(ours, base)
        compared = compare(base.step, ours.step, pairs=PAIRS[args.quick], warmup=1)
    cpu, expected = speed(compared), base.positions / ours.positions
    return {
        **cpu, "wall": speed(compared, "wall"), "expected": expected, "ratio_over_expected": cpu["ratio"] / expected, "equal": equal,
        "tokens": base.tokens, "tokens_per_s": {"padded": base.tokens / cpu["peer"], name: ours.tokens / cpu["ours"]},
        "positions": {"padded": base.positions, name: ours.positions}, "passes": {"padded": base.passes, name: ours.passes},
        "padding_share": {"padded": base.padding, name: ours.padding}, "of_padding_alone": 1 / (1 - base.padding),
        "setting": setting.__dict__,
    }  # fmt: skip


def main() -> None:
    """Measures, and prints the record."""
    args = arguments(__doc__.splitlines()[0])
    found = {
        name: result for (name, _), result in Cells("packing", args).measure({n: partial(one_arm, args, n) for n in ARMS}, [0]).items()
    }
    quoted = ("ours", "peer", "ratio", "ci95", "control", "verdict", "clock", "pairs", "expected", "ratio_over_expected")
    finish("packing", {**{key: found["packed"][key] for key in quoted}, "unit": "CPU seconds a step", **found}, args)


if __name__ == "__main__":
    main()
