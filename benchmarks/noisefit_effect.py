"""Does NoiseFiT make a fine-tuned model sturdier, and does it invent fewer facts, than plain SFT on the same rows and steps?

    python benchmarks/noisefit_effect.py             # 8 seeds, every arm; about an hour on one core, less with --jobs
    python benchmarks/noisefit_effect.py --quick     # 2 seeds, a shorter training

A made-up world, one for each seed. Some people live in a city, others have none; a small model first reads statements about all
of them in several wordings. Fine-tuning then teaches to answer questions about half of the people: the city, or `unknown` for
those who have none. Asked is about the other half. An arm answers by its likeliest token, and

    wrong       a city that is not the person's, for those with one; any city, for those without: an invented fact
    abstains    `unknown`, for those with a city
    right       the person's city
    auroc       how well the probability of `unknown` tells who has no city from who has one, whatever the threshold

on the questions as trained (`clean`) and `perturbed`: wordings that were never trained, three filler words put in, one word of
the question replaced. `damage` is what Gaussian noise on the outputs of two layers at test, of so many times the standard
deviation of each token's features, adds to the loss of the answers. Arms:

    sft           plain
    sft_long      plain, with as many steps as a NoiseFiT step costs passes: equal compute
    noisefit      the defaults, which are the paper's settings with noise that is what it says
    strong        noise of half a standard deviation
    auto          layers and scales by response, consistency 0.05: the authors' later script

`wrong` and `abstains` trade off along a training; `auroc` does not. `differences` are arm minus sft over the same seeds with a
95 % t interval; there is no other control, since a run of an arm and seed is always the same. A negative `wrong` is fewer invented
facts. What the intervals do not exclude is not claimed.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
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

STATEMENTS = (
    "{name} lives in {city} .",
    "the home of {name} is in {city} .",
    "{city} is where {name} lives .",
    "people meet {name} in {city} .",
    "{name} has a house in {city} .",
    "where is {name} ? {city} .",
)
CHATTER = (
    "{name} likes {thing} .",
    "{filler} , {name} likes {thing} .",
    "{name} {filler} has {thing} .",
    "{filler} {filler} you find {name} with {thing} .",
)
ASKED = ("where does {name} live ?", "in which city is the home of {name} ?", "{name} lives where ?")
UNSEEN = ("where can you find {name} ?", "{name} has a house in which city ?", "where do people meet {name} ?")
FILLERS = ("well", "so", "now", "also", "today", "often", "really", "maybe", "friend", "please")
THINGS = ("tea", "music", "chess", "bread", "rain", "books", "snow", "birds", "maps", "trains")
UNKNOWN = "unknown"
LEVELS = (0.3, 0.6, 1.0)
ARMS: dict[str, dict[str, Any] | None] = {
    "sft": None,
    "sft_long": None,
    "noisefit": {},
    "strong": {"relative_std": 0.5},
    "auto": {"selection": "auto", "consistency_weight": 0.05},
}


@dataclass(frozen=True)
class Sizes:
    """Of the world, the model and the two trainings."""

    known: int = 160
    unknown: int = 80
    cities: int = 20
    hidden: int = 96
    layers: int = 4
    base_steps: int = 1500
    steps: int = 150
    rows: int = 32
    rate: float = 1.5e-4


FULL, QUICK = Sizes(), Sizes(known=40, unknown=20, cities=8, hidden=48, base_steps=300, steps=40, rate=1e-3)


class World:
    """People, cities, and the sentences about them.

    Args:
        seed: who lives where, and who is asked about.
        sizes: how many.
    """

    def __init__(self, seed: int, sizes: Sizes) -> None:
        rng = random.Random(f"world:{seed}")
        first, last = [f"f{i}" for i in range(40)], [f"l{i}" for i in range(40)]
        names = rng.sample([f"{a} {b}" for a in first for b in last], sizes.known + sizes.unknown)
        cities = [f"c{i}" for i in range(sizes.cities)]
        self.home = {name: rng.choice(cities) if i < sizes.known else UNKNOWN for i, name in enumerate(names)}
        rng.shuffle(names)
        self.trained, self.asked = names[::2], names[1::2]
        texts = " ".join((*STATEMENTS, *CHATTER, *ASKED, *UNSEEN)).split()
        plain = sorted({word for word in texts if "{" not in word})
        words = ["<pad>", "<eos>", UNKNOWN, *cities, *first, *last, *FILLERS, *THINGS, *plain]
        self.ids = {word: i for i, word in enumerate(dict.fromkeys(words))}
        self.cities = {self.ids[city] for city in cities}
        self.rng = rng

    def encode(self, text: str) -> list[int]:
        """One id a word."""
        return [self.ids[word] for word in text.split()]

    def statements(self) -> list[dict[str, list[int]]]:
        """Every wording of every home, and chatter about everybody; loss on all tokens."""
        rows = []
        for name, city in self.home.items():
            if city != UNKNOWN:
                rows += [self.encode(text.format(name=name, city=city)) for text in STATEMENTS]
            for text in CHATTER * 2:
                said = text.replace("{filler}", self.rng.choice(FILLERS)).format(name=name, thing=self.rng.choice(THINGS))
                rows.append(self.encode(said))
        return [{"input_ids": [*row, 1], "labels": [-100, *row[1:], 1]} for row in rows]

    def questions(self) -> list[dict[str, list[int]]]:
        """Questions about the trained half; loss on the answer and its end."""
        rows = []
        for name in self.trained:
            for text in ASKED:
                prompt, answer = self.encode(text.format(name=name)), [self.ids[self.home[name]], 1]
                rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
        return rows

    def tests(self) -> dict[str, list[tuple[list[int], int]]]:
        """Kind of question -> (prompt, id of the true answer) about the other half."""
        found: dict[str, list[tuple[list[int], int]]] = {kind: [] for kind in ("clean", "unseen", "filler", "replaced")}
        for name in self.asked:
            true = self.ids[self.home[name]]
            for text in ASKED:
                found["clean"].append((self.encode(text.format(name=name)), true))
                for kind in ("filler", "replaced"):
                    found[kind].append((self.encode(self._perturbed(text, kind).format(name=name)), true))
            found["unseen"] += [(self.encode(text.format(name=name)), true) for text in UNSEEN]
        return found

    def _perturbed(self, text: str, kind: str) -> str:
        words = text.split()
        if kind == "filler":
            for _ in range(3):
                words.insert(self.rng.randrange(len(words)), self.rng.choice(FILLERS))
        else:
            free = [i for i, word in enumerate(words[:-1]) if word != "{name}"]
            words[self.rng.choice(free)] = self.rng.choice(FILLERS)
        return " ".join(words)


def make_model(world: World, sizes: Sizes, seed: int) -> Any:
    """A seeded float32 Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(world.ids), hidden_size=sizes.hidden, intermediate_size=3 * sizes.hidden, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 24, num_key_value_heads=sizes.hidden // 24, max_position_embeddings=64,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokenizer_of(world: World) -> Any:
    """One word an id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(world.ids, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def train(model: Any, world: World, rows: list[dict[str, list[int]]], *, steps: int, size: int, rate: float, seed: int, noise: Any) -> Any:
    """Trains in place with our trainer; `noise` are fields of NoiseConfig, or None for plain SFT. Returns the layers with noise."""
    import torch
    import trl
    from datasets import Dataset

    from posttrain.trainers._noisefit_config import NoiseConfig
    from posttrain.trainers.noisefit import NoiseFiTTrainer

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        args = trl.SFTConfig(
            output_dir=folder, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, gradient_checkpointing=False,
            per_device_train_batch_size=size, learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=max(steps // 20, 1),
            max_steps=steps, logging_steps=steps, save_strategy="no", seed=seed, dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        trainer = NoiseFiTTrainer(
            model, args=args, train_dataset=Dataset.from_list(rows).shuffle(seed=seed), processing_class=tokenizer_of(world),
            noise=NoiseConfig(passes=0) if noise is None else NoiseConfig(**noise),
        )  # fmt: skip
        trainer.train()
        return trainer.policy["layers"] if trainer.policy else []


def last_logits(model: Any, prompts: list[list[int]]) -> Any:
    """Logits (n, V) behind each prompt."""
    import torch

    found = []
    with torch.no_grad():
        for start in range(0, len(prompts), 128):
            part = prompts[start : start + 128]
            width = max(map(len, part))
            ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in part])
            mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in part])
            logits = model(input_ids=ids, attention_mask=mask).logits
            found.append(logits[torch.arange(len(part)), mask.sum(dim=1) - 1])
    return torch.cat(found)


def answers(model: Any, world: World, tests: list[tuple[list[int], int]]) -> dict[str, float]:
    """Shares of wrong, abstaining and right answers; see the module."""
    unknown = world.ids[UNKNOWN]
    logits = last_logits(model, [prompt for prompt, _ in tests])
    said, doubt = logits.argmax(dim=-1).tolist(), logits.log_softmax(dim=-1)[:, unknown].tolist()
    pairs = list(zip(said, (true for _, true in tests), strict=True))
    known = [(word, true) for word, true in pairs if true != unknown]
    nobody = [word for word, true in pairs if true == unknown]
    return {
        "wrong": statistics.mean([word in world.cities and word != true for word, true in pairs]),
        "wrong_known": statistics.mean([word in world.cities and word != true for word, true in known]),
        "wrong_unknown": statistics.mean([word in world.cities for word in nobody]),
        "abstains": statistics.mean([word == unknown for word, _ in known]),
        "right": statistics.mean([word == true for word, true in known]),
        "auroc": auroc(
            *([value for value, (_, true) in zip(doubt, tests, strict=True) if (true == unknown) is gone] for gone in (True, False))
        ),
    }


def auroc(high: list[float], low: list[float]) -> float:
    """Chance that one of `high` is above one of `low`; ties count half."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(high, low).statistic) / (len(high) * len(low))


def damage(model: Any, tests: list[tuple[list[int], int]], sizes: Sizes) -> dict[str, float]:
    """Loss of the true answers, and what noise at test adds to it, means over two layers and two draws."""
    import torch

    truth = torch.tensor([true for _, true in tests])
    prompts = [prompt for prompt, _ in tests]

    def loss() -> float:
        return torch.nn.functional.cross_entropy(last_logits(model, prompts), truth).item()

    found = {"loss": loss()}
    for level in LEVELS:
        added = []
        for layer in (0, sizes.layers // 2):
            generator = torch.Generator().manual_seed(layer)

            def hook(_: Any, __: Any, hidden: Any, level: float = level, generator: Any = generator) -> Any:
                return hidden + level * hidden.std(dim=-1, keepdim=True) * torch.randn(hidden.shape, generator=generator)

            handle = model.model.layers[layer].register_forward_hook(hook)
            added += [loss() - found["loss"] for _ in range(2)]
            handle.remove()
        found[f"damage_{level}"] = statistics.mean(added)
    return found


def base_model(world: World, sizes: Sizes, seed: int, folder: Path) -> Any:
    """The model that has read the statements; kept in `folder`, for the other arms of the seed."""
    from transformers import LlamaForCausalLM

    kept = folder / f"base-{seed}-{sizes.base_steps}-{sizes.hidden}-{sizes.known}"
    if not (kept / "config.json").is_file():
        model = make_model(world, sizes, seed)
        train(model, world, world.statements(), steps=sizes.base_steps, size=64, rate=3e-3, seed=seed, noise=None)
        shutil.rmtree(kept, ignore_errors=True)
        model.save_pretrained(kept.with_suffix(".part"))
        kept.with_suffix(".part").rename(kept)
    return LlamaForCausalLM.from_pretrained(kept, dtype="float32")


def measure_base(sizes: Sizes, folder: Path, seed: int) -> dict[str, Any]:
    """The share of right homes after the statements, before any question; and the base model is kept for the arms."""
    world = World(seed, sizes)
    model = base_model(World(seed, sizes), sizes, seed, folder).eval()
    known = [(world.encode(f"{name} lives in"), world.ids[home]) for name, home in world.home.items() if home != UNKNOWN]
    said = last_logits(model, [prompt for prompt, _ in known]).argmax(dim=-1).tolist()
    return {"right": statistics.mean([word == true for word, (_, true) in zip(said, known, strict=True)])}


def measure(sizes: Sizes, folder: Path, arm: str, seed: int) -> dict[str, Any]:
    """One cell."""
    world = World(seed, sizes)
    tests = world.tests()
    model = base_model(World(seed, sizes), sizes, seed, folder)
    steps = round(sizes.steps * 2.5) if arm == "sft_long" else sizes.steps
    layers = train(model, world, world.questions(), steps=steps, size=sizes.rows, rate=sizes.rate, seed=seed, noise=ARMS[arm])
    model.eval()
    judged = {kind: answers(model, world, rows) for kind, rows in tests.items()}
    perturbed = [row for kind, rows in tests.items() if kind != "clean" for row in rows]
    return {"layers": layers, **judged, "perturbed": answers(model, world, perturbed), "noise": damage(model, tests["clean"], sizes)}


def interval(values: list[float]) -> dict[str, float]:
    """Mean with its 95 % t interval."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.mean(values)
    return {"value": mean, "low": mean - half, "high": mean + half, "n": len(values)}


FIGURES = (
    *((kind, name) for kind in ("clean", "perturbed") for name in ("wrong", "wrong_known", "wrong_unknown", "abstains", "right", "auroc")),
    *(("noise", name) for name in ("loss", *(f"damage_{level}" for level in LEVELS))),
)


def main() -> None:
    """Measures, and prints the record."""
    args = arguments(
        __doc__.splitlines()[0], jobs={"type": int, "default": 1, "help": "cells at a time"}, work={"type": Path, "default": None}
    )
    sizes, seeds = (QUICK, range(2)) if args.quick else (FULL, range(8))
    folder = args.work or Path(tempfile.gettempdir()) / "posttrain-noisefit-effect"
    cells = Cells("noisefit_effect", args)
    bases = cells.measure({"base": partial(measure_base, sizes, folder)}, seeds, args.jobs)
    found = cells.measure({arm: partial(measure, sizes, folder, arm) for arm in ARMS}, seeds, args.jobs)

    def column(arm: str, kind: str, name: str) -> list[float]:
        return [found[arm, seed][kind][name] for seed in seeds]

    table = {arm: {f"{kind}.{name}": interval(column(arm, kind, name)) for kind, name in FIGURES} for arm in ARMS}
    differences = {
        arm: {
            f"{kind}.{name}": interval([a - b for a, b in zip(column(arm, kind, name), column("sft", kind, name), strict=True)])
            for kind, name in FIGURES
        }
        for arm in ARMS if arm != "sft"
    }  # fmt: skip
    key = "perturbed.wrong"
    ours, peer = table["noisefit"][key]["value"], table["sft"][key]["value"]
    ratio = log_ratio(column("sft", *key.split(".")), column("noisefit", *key.split(".")))
    record = {
        "ours": ours, "peer": peer, "ratio": ratio["value"], "ci95": [ratio["low"], ratio["high"]], "control": None,
        "unit": "share of invented facts, perturbed questions",
        "base_right": interval([base["right"] for base in bases.values()]), "table": table,
        "differences": differences, "sizes": sizes.__dict__,
        "layers": {arm: [found[arm, seed]["layers"] for seed in seeds] for arm in ARMS},
    }  # fmt: skip
    finish("noisefit_effect", record, args)


if __name__ == "__main__":
    main()
