"""Packed against padded SFT at skewed lengths: are the tokens a second what the padding says?

    python benchmarks/packing.py            # 10 pairs in each setting, about six minutes on one core
    python benchmarks/packing.py --quick

Rows have log-normal lengths, at most `limit` tokens. The padded arm takes them in a shuffled order, eight in a pass, padded to the
longest; the packed one fills sequences of `limit` tokens with whole rows, which do not see one another. Both do the
forward and backward passes over the same rows by the trainer of the stage `sft`. `padding` is the share of real tokens among
those that the padded arm computes, and so 1 / padding the ratio of the tokens a second if a token costs the same wherever it is;
`of_expected` is the measured ratio over it. `grouped` is `data.group_by_length` against the padded arm, over eight passes a step.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _harness import arguments, compare, finish, speed

PASS = 8


def lengths_of(count: int, limit: int, spread: float) -> list[int]:
    """Log-normal lengths around an eighth of the limit."""
    rng = random.Random(0)
    return [max(4, min(limit, round(rng.lognormvariate(0, spread) * limit / 8))) for _ in range(count)]


class Arm:
    """A trainer and its batches.

    Args:
        batches: of rows, or of packed sequences.
        packed: the rows carry `seq_lengths`.
        size: of the model.
    """

    def __init__(self, batches: list[list[dict[str, Any]]], packed: bool, size: tuple[int, int, int]) -> None:
        import torch
        import trl
        from datasets import Dataset
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

        from posttrain.trainers.sft import SFTTrainer

        torch.set_num_threads(1)
        torch.manual_seed(0)
        hidden, layers, vocabulary = size
        config = Qwen2Config(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, tie_word_embeddings=True, pad_token_id=0,
            bos_token_id=None, eos_token_id=2, max_position_embeddings=4096,
        )  # fmt: skip
        words = {f"w{i}": i for i in range(8)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")), pad_token="w0", eos_token="w2"
        )
        args = trl.SFTConfig(
            output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, gradient_checkpointing=False,
            max_steps=1, packing=packed, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None,
        )  # fmt: skip
        first = [row for batch in batches for row in batch][:2]
        self.trainer = SFTTrainer(Qwen2ForCausalLM(config), args=args, train_dataset=Dataset.from_list(first), processing_class=tokenizer)
        self.batches = [dict(self.trainer.data_collator(batch)) for batch in batches]
        self.positions = sum(batch["input_ids"].numel() for batch in self.batches)

    def __call__(self) -> None:
        """Forward and backward passes over all batches."""
        self.trainer.model.train()
        self.trainer.model.zero_grad()
        for batch in self.batches:
            self.trainer.compute_loss(self.trainer.model, dict(batch), num_items_in_batch=100).backward()


def setting(name: str, quick: bool) -> dict[str, Any]:
    """One setting: ours packed and grouped against padded."""
    from datasets import Dataset

    from posttrain.trainers._sft import pack
    from posttrain.trainers._train import grouped_order

    limit, spread, count = {"skewed": (256, 0.8, 64), "very skewed": (512, 1.1, 64)}[name]
    size = (64, 2, 512) if quick else (192, 4, 4096)
    count = 16 if quick else count
    lengths = lengths_of(count, limit, spread)
    rng = random.Random(1)
    rows = [{"input_ids": [rng.randrange(3, size[2]) for _ in range(n)]} for n in lengths]
    rows = [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in rows]
    chunks = [rows[at : at + PASS] for at in range(0, count, PASS)]
    order = grouped_order(range(count), lengths, count)
    grouped = [[rows[i] for i in order[at : at + PASS]] for at in range(0, count, PASS)]
    packed = pack(Dataset.from_list(rows), limit)
    sequences = [packed[i] for i in range(len(packed))]
    per_pass = max(1, len(sequences) // len(chunks))
    arms = {
        "padded": Arm(chunks, False, size),
        "packed": Arm([sequences[at : at + per_pass] for at in range(0, len(sequences), per_pass)], True, size),
        "grouped": Arm(grouped, False, size),
    }
    padding = sum(lengths) / arms["padded"].positions
    pairs = 3 if quick else 10
    found = speed(compare(arms["padded"], arms["packed"], pairs=pairs, warmup=1))
    also = speed(compare(arms["padded"], arms["grouped"], pairs=pairs, warmup=1))
    computed = {arm: made.positions for arm, made in arms.items()}
    return {
        **found, "padding": padding, "expected": 1 / padding, "of_expected": found["ratio"] * padding, "tokens": sum(lengths),
        "positions": computed, "rows": count, "limit": limit, "grouped": also,
        "tokens_per_s": {"packed": sum(lengths) / found["ours"], "padded": sum(lengths) / found["peer"]},
    }  # fmt: skip


def main() -> None:
    """Both settings."""
    args = arguments(__doc__ or "")
    parts = {name: setting(name, args.quick) for name in ("skewed", "very skewed")}
    lead = {name: parts["skewed"][name] for name in ("ours", "peer", "ratio", "ci95", "control", "verdict", "clock")}
    finish("packing", {**lead, "parts": parts}, args)


if __name__ == "__main__":
    main()
