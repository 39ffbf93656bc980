"""What do many epochs over few tokens cost on held-out text, and does dropout soften it?

    python benchmarks/repeat_effect.py             # 5 seeds, every arm; about fifteen minutes on one core; goes on by (arm, seed)
    python benchmarks/repeat_effect.py --quick

A small GPT-2, whose architecture has dropout on embeddings, residuals and attention, is trained from scratch on docstrings of the
standard library by our SFT trainer. Every arm sees the same number of tokens:

    once          as many different blocks as are seen
    repeated      a 64th of them, 64 epochs
    dropout_0.1, dropout_0.2, dropout_0.3   the same with the stage's field `dropout`, set on modules and verified there
    qwen2_0.3     the same on a Qwen2, which has a place for dropout in its attention only, and
    qwen2         that without

Held-out loss is measured after 1, 2, 4, 8 and 16 sixteenths of the training. `differences` are arm minus repeated (for qwen2_0.3:
minus qwen2) at the end over the same seeds, with a 95 % t interval; negative is better. To Repeat or Not To Repeat
(arXiv 2305.13230) reports, on T5, that dropout takes back most of the loss.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _harness import Cells, arguments, finish
from _judges import log_ratio
from noisefit_effect import interval

ARMS: dict[str, tuple[str, float | None, int]] = {
    "once": ("gpt2", 0.0, 1),
    "repeated": ("gpt2", 0.0, 64),
    "dropout_0.1": ("gpt2", 0.1, 64),
    "dropout_0.2": ("gpt2", 0.2, 64),
    "dropout_0.3": ("gpt2", 0.3, 64),
    "qwen2": ("qwen2", 0.0, 64),
    "qwen2_0.3": ("qwen2", 0.3, 64),
}


@dataclass(frozen=True)
class Sizes:
    """Of the data, the model and the training."""

    blocks: int = 3840
    held: int = 150
    length: int = 64
    rows: int = 8
    hidden: int = 72
    layers: int = 2
    vocabulary: int = 1024
    rate: float = 2e-3


FULL, QUICK = Sizes(), Sizes(blocks=256, held=32, hidden=48, layers=2)


def texts() -> list[str]:
    """Docstrings of the standard library, by the stage `make.stdlib`."""
    from posttrain.stages.make_corpus import MakeStdlibConfig, stdlib_files, texts_of

    cfg = MakeStdlibConfig(name="t", parts=["docstrings"])
    rows = [row for module, file in stdlib_files(cfg.modules, cfg.exclude_modules) for row in texts_of(module, file, ["docstrings"], 4000)]
    return [row["text"] for row in rows if len(row["text"]) >= 120]


def encode(sizes: Sizes) -> list[list[int]]:
    """All blocks of `length` tokens of the shuffled texts joined by an end token, by a byte-level BPE trained on them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    found = sorted(texts())
    random.Random(0).shuffle(found)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=sizes.vocabulary,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(found, trainer)
    ids = [token for text in found for token in [*core.encode(text).ids, 1]]
    return [ids[at : at + sizes.length] for at in range(0, len(ids) - sizes.length, sizes.length)]


def make_model(kind: str, sizes: Sizes, seed: int) -> Any:
    """A seeded model of the kind."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    heads = sizes.hidden // 24
    shape: dict[str, Any] = {"n_embd": sizes.hidden, "n_layer": sizes.layers, "n_head": heads, "n_positions": 128}
    if kind == "qwen2":
        shape = {
            "hidden_size": sizes.hidden, "intermediate_size": 4 * sizes.hidden, "num_hidden_layers": sizes.layers,
            "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 128, "tie_word_embeddings": True,
        }  # fmt: skip
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, vocab_size=sizes.vocabulary, pad_token_id=0, eos_token_id=1, bos_token_id=None, **shape)
    )


def held_out(model: Any, blocks: list[list[int]]) -> float:
    """Mean loss."""
    import torch

    model.eval()
    with torch.no_grad():
        total = [float(model(input_ids=ids, labels=ids).loss) * len(ids) for ids in torch.tensor(blocks).split(50)]
    model.train()
    return sum(total) / len(blocks)


def measure(sizes: Sizes, arm: str, seed: int) -> dict[str, Any]:
    """Held-out loss along one training."""
    import torch
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    from posttrain.trainers._dropout import set_dropout
    from posttrain.trainers.sft import SFTTrainer

    torch.set_num_threads(1)
    kind, rate, epochs = ARMS[arm]
    blocks = encode(sizes)
    order = list(range(len(blocks)))
    random.Random(f"split:{seed}").shuffle(order)
    held = [blocks[i] for i in order[: sizes.held]]
    count = sizes.blocks // epochs
    seen = [blocks[i] for i in order[sizes.held : sizes.held + count]]
    if len(seen) < count:
        sys.exit(f"the corpus has {len(blocks)} blocks, needed are {sizes.held + count}")
    rows = []
    for epoch in range(epochs):
        shuffled = list(range(count))
        random.Random(f"order:{seed}:{epoch}").shuffle(shuffled)
        rows += [{"input_ids": seen[i], "labels": [-100, *seen[i][1:]]} for i in shuffled]
    model = make_model(kind, sizes, seed)
    places = set_dropout(model, rate or 0.0, "dropout")
    steps = len(rows) // sizes.rows
    marks = {max(1, round(steps * share / 16)) for share in (1, 2, 4, 8, 16)}
    curve: dict[int, float] = {}

    class Look(TrainerCallback):
        """Measures at the marks."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """After the update."""
            if state.global_step in marks:
                with torch.random.fork_rng(devices=[]):
                    curve[state.global_step] = held_out(model, held)

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"p": 0, "e": 1}, unk_token="p")), pad_token="p", eos_token="e"
    )
    with tempfile.TemporaryDirectory() as out:
        args = trl.SFTConfig(
            output_dir=out, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, gradient_checkpointing=False, max_length=None,
            per_device_train_batch_size=sizes.rows, learning_rate=sizes.rate, lr_scheduler_type="cosine", warmup_steps=steps // 20,
            max_steps=steps, logging_steps=steps, save_strategy="no", seed=seed, dataset_kwargs={"skip_prepare_dataset": True},
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = SFTTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.add_callback(Look())
        trainer.train()
    return {"loss": held_out(model, held), "curve": [curve[step] for step in sorted(curve)], "epochs": epochs, "places": places}


def main() -> None:
    """Measures every cell and writes the result."""
    args = arguments(__doc__ or "", jobs={"type": int, "default": 1, "help": "processes"})
    sizes, seeds = (QUICK, range(2)) if args.quick else (FULL, range(5))
    found = Cells("repeat_effect", args).measure({arm: partial(measure, sizes, arm) for arm in ARMS}, seeds, args.jobs)
    arms = {
        arm: {
            "loss": interval([found[arm, seed]["loss"] for seed in seeds]),
            "curve": [sum(values) / len(values) for values in zip(*(found[arm, seed]["curve"] for seed in seeds), strict=True)],
            "epochs": found[arm, 0]["epochs"], "places": found[arm, 0]["places"],
        }
        for arm in ARMS
    }  # fmt: skip
    control = {arm: "qwen2" if arm == "qwen2_0.3" else "repeated" for arm in ARMS if arm not in ("repeated", "qwen2")}
    differences = {
        arm: interval([found[arm, seed]["loss"] - found[than, seed]["loss"] for seed in seeds]) for arm, than in control.items()
    }  # fmt: skip
    best = min(("dropout_0.1", "dropout_0.2", "dropout_0.3"), key=lambda arm: arms[arm]["loss"]["value"])
    ratio = log_ratio([found["repeated", seed]["loss"] for seed in seeds], [found[best, seed]["loss"] for seed in seeds])
    lead = {
        "ours": arms[best]["loss"]["value"], "peer": arms["repeated"]["loss"]["value"], "ratio": ratio["value"],
        "ci95": [ratio["low"], ratio["high"]], "control": None, "unit": f"held-out loss, {best} and no dropout",
    }  # fmt: skip
    finish("repeat_effect", {**lead, "arms": arms, "differences": differences, "seeds": len(seeds)}, args)


if __name__ == "__main__":
    main()
