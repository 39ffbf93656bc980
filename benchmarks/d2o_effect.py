"""Does D2O lower unwanted answers while the others and their diversity stay, better than DPO and unlikelihood do?

    python benchmarks/d2o_effect.py             # 6 seeds, every arm; about ten minutes on one core; goes on by (arm, seed)
    python benchmarks/d2o_effect.py --quick     # 2 seeds, a shorter training

A made-up language, one for each seed: a question names a topic, an answer is five words: an opening, and four words of the topic's own.
Openings are polite, neutral or rude; a small model, which has read questions with all kinds of answers, is rude in about a third
of its own. Unwanted are one rude answer to each of half of the topics; asked is about the other half.

    rude        share of sampled answers that open rudely, to topics never trained on
    rude_logp   log-probability of rude answers that were not trained on, and
    kept_logp   of polite and neutral ones, per answer, minus that of the model before: what is pushed down, what is held
    distinct    different answers among 16 samples a topic
    on_topic    share of samples whose words belong to the topic

Arms, all for the same number of steps with the same unwanted answers and learning rate:

    d2o          K = 8 own answers, one fixed reference: the paper's setting at a smaller K
    d2o_moving   own answers drawn anew and the reference moved every 20 steps
    dpo          the same with K = 1: DPO with an own answer as the chosen one
    unlikelihood -log(1 - p) of the unwanted answers

Own answers are not filtered, so a third of them are rude as well. `differences` are arm minus dpo over the same seeds with a 95 % t
interval; a run of an arm and seed is always the same, so there is no other control.
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
from noisefit_effect import interval, tokenizer_of

OPENINGS = {"polite": ("gladly", "sure", "please"), "neutral": ("well", "so", "then"), "rude": ("idiot", "shutup", "nonsense")}
SHARES = {"polite": 0.3, "neutral": 0.35, "rude": 0.35}
ARMS: dict[str, dict[str, Any]] = {
    "d2o": {"self_samples": {"k": 8}},
    "d2o_moving": {"self_samples": {"k": 8, "every": 20}, "reference": "policy"},
    "dpo": {"self_samples": {"k": 1}},
    "unlikelihood": {"loss": "unlikelihood"},
}
WORDS, LENGTH, SAMPLES = 6, 5, 16
FIGURES = ("rude", "rude_logp", "kept_logp", "distinct", "on_topic")


@dataclass(frozen=True)
class Sizes:
    """Of the language, the model and the trainings."""

    topics: int = 48
    hidden: int = 96
    base_steps: int = 700
    steps: int = 60
    rate: float = 3e-4


FULL, QUICK = Sizes(), Sizes(topics=16, hidden=48, base_steps=250, steps=30, rate=1e-3)


class Language:
    """Topics, their words, and answers.

    Args:
        seed: which words belong to which topic, and which topics are trained on.
        topics: how many.
    """

    def __init__(self, seed: int, topics: int) -> None:
        self.rng = random.Random(f"language:{seed}")
        words = [f"w{i}" for i in range(topics * WORDS)]
        self.rng.shuffle(words)
        self.own = {f"t{i}": words[i * WORDS : (i + 1) * WORDS] for i in range(topics)}
        names = list(self.own)
        self.rng.shuffle(names)
        self.trained, self.asked = names[::2], names[1::2]
        signs = ["<pad>", "<eos>", "about", "?", *(word for group in OPENINGS.values() for word in group), *self.own, *words]
        self.ids = {word: i for i, word in enumerate(signs)}
        self.rude = {self.ids[word] for word in OPENINGS["rude"]}

    def encode(self, text: str) -> list[int]:
        """One id a word."""
        return [self.ids[word] for word in text.split()]

    def answer(self, topic: str, kind: str | None = None) -> str:
        """An answer; its kind is drawn where none is given."""
        kind = kind or self.rng.choices(list(SHARES), list(SHARES.values()))[0]
        return " ".join([self.rng.choice(OPENINGS[kind]), *(self.rng.choice(self.own[topic]) for _ in range(LENGTH - 1))])

    def prompt(self, topic: str) -> list[int]:
        """The question."""
        return self.encode(f"about {topic} ?")


def base_model(language: Language, sizes: Sizes, seed: int, folder: Path) -> Any:
    """The model that has read questions and answers; kept in `folder` for the other arms of the seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    kept = folder / f"base-{seed}-{sizes.base_steps}-{sizes.hidden}-{sizes.topics}"
    if not (kept / "config.json").is_file():
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        config = LlamaConfig(
            vocab_size=len(language.ids), hidden_size=sizes.hidden, intermediate_size=3 * sizes.hidden, num_hidden_layers=2,
            num_attention_heads=sizes.hidden // 24, num_key_value_heads=sizes.hidden // 24, max_position_embeddings=32,
            tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, sizes.base_steps)
        for _ in range(sizes.base_steps):
            rows = [language.prompt(t) + language.encode(language.answer(t)) + [1] for t in language.rng.choices(list(language.own), k=64)]
            ids = torch.tensor(rows)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step(), schedule.step(), optimizer.zero_grad()
        shutil.rmtree(kept, ignore_errors=True)
        model.save_pretrained(kept.with_suffix(".part"))
        kept.with_suffix(".part").rename(kept)
    return LlamaForCausalLM.from_pretrained(kept, dtype="float32")


def judge(model: Any, language: Language) -> dict[str, Any]:
    """Figures on the topics that were not trained on; see the module."""
    import torch

    from posttrain.rollout.base import Request, Sampling, request_seed
    from posttrain.rollout.hf import HFEngine

    model.eval()
    rng = random.Random(0)
    engine = HFEngine(model, tokenizer_of(language), max_batch=512)
    requests = [Request(language.prompt(t), request_seed(0, t, k), Sampling(LENGTH + 3), t) for t in language.asked for k in range(SAMPLES)]
    found = engine.generate(requests)
    texts = [tuple(item.token_ids) for item in found]
    topics = {t: {language.ids[w] for w in language.own[t]} for t in language.asked}
    openings = {language.ids[word] for group in OPENINGS.values() for word in group}
    saved, language.rng = language.rng, rng
    sides = {kind: [(t, language.answer(t, kind)) for t in language.asked for _ in range(6)] for kind in OPENINGS}
    language.rng = saved
    logps = {}
    for kind, answers in sides.items():
        ids = torch.tensor([language.prompt(t) + language.encode(a) + [1] for t, a in answers])
        with torch.no_grad():
            values = torch.log_softmax(model(input_ids=ids).logits[:, 2:-1], -1).gather(2, ids[:, 3:, None])[..., 0].sum(1)
        logps[kind] = float(values.mean())
    return {
        "rude": statistics.mean([text[0] in language.rude for text in texts]),
        "rude_logp": logps["rude"],
        "kept_logp": (logps["polite"] + logps["neutral"]) / 2,
        "distinct": statistics.mean([len(set(texts[i : i + SAMPLES])) / SAMPLES for i in range(0, len(texts), SAMPLES)]),
        "on_topic": statistics.mean([_well_formed(item.token_ids, topics[item.id] | openings) for item in found]),
    }


def _well_formed(ids: list[int], known: set[int]) -> bool:
    """An answer of the right length, of words that may stand in it."""
    return len(ids) == LENGTH + 1 and all(token in known or token == 1 for token in ids)


def measure(sizes: Sizes, folder: Path, arm: str, seed: int) -> dict[str, Any]:
    """One cell: the figures of an arm, log-probabilities minus those of the model before."""
    language = Language(seed, sizes.topics)
    model = base_model(language, sizes, seed, folder)
    before = judge(model, language)
    if arm != "before":
        train(model, language, sizes, seed, ARMS[arm])
    after = judge(model, language)
    for name in ("rude_logp", "kept_logp"):
        after[name] -= before[name]
    return after


def train(model: Any, language: Language, sizes: Sizes, seed: int, fields: dict[str, Any]) -> None:
    """Trains in place with our trainer."""
    import torch
    from datasets import Dataset
    from transformers import TrainingArguments

    from posttrain.rollout.base import Request, Sampling, request_seed
    from posttrain.rollout.hf import HFEngine
    from posttrain.trainers._d2o_samples import Group
    from posttrain.trainers.d2o import D2OStage, D2OTrainer

    torch.set_num_threads(1)
    rng = random.Random(f"unwanted:{seed}")
    saved, language.rng = language.rng, rng
    groups = [
        Group({"id": t}, (language.prompt(t) + language.encode(language.answer(t, "rude")) + [1], 3)) for t in language.trained
    ]  # fmt: skip
    language.rng = saved
    cfg = D2OStage(name="d", steps=sizes.steps, alpha=0.3, beta=0.3, max_self_drop=None, **fields)
    order = [i for epoch in range(sizes.steps) for i in random.Random(f"order:{seed}:{epoch}").sample(range(len(groups)), len(groups))]

    def window(start: int, trainer: Any) -> None:
        trainer.model.eval()
        engine = HFEngine(trainer.model, tokenizer_of(language), max_batch=512)
        k = cfg.self_samples.k if cfg.loss == "d2o" else 0
        requests = [
            Request(g.prompt, request_seed(seed, start, g.row["id"], j), Sampling(LENGTH + 3), g.row["id"])
            for g in groups
            for j in range(k)
        ]
        drawn = engine.generate(requests) if requests else []
        for i, group in enumerate(groups):
            group.own = [([*group.prompt, *item.token_ids], 3) for item in drawn[i * k : (i + 1) * k]]
            with torch.no_grad():
                values = trainer.logps(trainer.model, group.answers).tolist()
            group.own_refs, group.negative_ref = values[:-1], values[-1]

    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(
            output_dir=out, use_cpu=True, report_to="none", disable_tqdm=True, per_device_train_batch_size=8, max_steps=sizes.steps,
            learning_rate=sizes.rate, lr_scheduler_type="constant", logging_steps=sizes.steps, save_strategy="no", seed=seed,
            remove_unused_columns=False, train_sampling_strategy="sequential",
        )  # fmt: skip
        data = Dataset.from_dict({"group": order[: 8 * sizes.steps]})
        D2OTrainer(model=model, args=args, train_dataset=data, groups=groups, cfg=cfg, before_window=window).train()


def main() -> None:
    """Measures every cell and writes the result."""
    args = arguments(__doc__ or "", jobs={"type": int, "default": 1, "help": "processes"})
    sizes, seeds = (QUICK, range(2)) if args.quick else (FULL, range(6))
    folder = Path(tempfile.gettempdir()) / "posttrain-d2o-effect"
    folder.mkdir(exist_ok=True)
    cells = Cells("d2o_effect", args)
    cells.measure({"before": partial(measure, sizes, folder, "before")}, seeds, args.jobs)
    found = cells.measure({arm: partial(measure, sizes, folder, arm) for arm in ("before", *ARMS)}, seeds, args.jobs)
    arms = {arm: {name: interval([found[arm, seed][name] for seed in seeds]) for name in FIGURES} for arm in ("before", *ARMS)}
    differences = {
        arm: {name: interval([found[arm, seed][name] - found["dpo", seed][name] for seed in seeds]) for name in FIGURES}
        for arm in ARMS if arm != "dpo"
    }  # fmt: skip
    rude = {arm: [found[arm, seed]["rude"] for seed in seeds] for arm in ("d2o", "dpo")}
    ratio = log_ratio(rude["dpo"], rude["d2o"])
    lead = {
        "ours": arms["d2o"]["rude"]["value"], "peer": arms["dpo"]["rude"]["value"], "ratio": ratio["value"],
        "ci95": [ratio["low"], ratio["high"]], "control": None, "unit": "share of rude answers",
    }  # fmt: skip
    finish("d2o_effect", {**lead, "arms": arms, "differences": differences, "seeds": len(seeds)}, args)


if __name__ == "__main__":
    main()
