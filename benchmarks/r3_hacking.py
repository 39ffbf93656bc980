"""Is a policy that is paid for relevance alone hacked into copying the question, and does R3 prevent it?

    python benchmarks/r3_hacking.py            # five seeds, eight arms; about twenty minutes on one core
    python benchmarks/r3_hacking.py --quick    # one seed, a few steps, four arms

A two-layer policy learns questions and answers of a small world (`_topics.py`) by supervision, and is then reinforced with our
GRPOTrainer by one of the rewards, on completions of at most 20 words (an answer has 9); relevance is the dot product of
all-MiniLM-L6-v2's unit vectors. Arms:

    start               no reinforcement
    noise               a reward that says nothing of the text: what training as such does to the policy
    relevance           M(x) . M(y')
    relevance_length    relevance times words / 100: R3 without its repetition penalty
    r3                  relevance times words / 100 times the share of different trigrams
    r3_capped           r3 with a length cap of 10 words, about the length of an answer
    relevance_kl, r3_kl   with a KL term to the policy after supervision, as R3's authors trained

What each policy does is measured on questions it was not trained on. `verbatim` are completions that hold the whole question,
`nothing_new` those without any word of the question's topic that the question does not hold, which tell a reader nothing; primary
is `copy_only`, those that are both. Beside them: words; `full`, completions cut at the limit; `echo`, share of words that stand in
the question; `repetition`, 1 - share of different trigrams; `again`, share of words said before; `stray`, share of words of other
topics; relevance; `news`, different new words of the topic.
Means over seeds with 95 % intervals by Student's t; differences from `relevance` are paired by seed.

Learning rate, steps, limit of words and KL weight were chosen on pilot seeds 97 to 99, which are not reported.

In the record `ours` and `peer` are the `copy_only` of `r3` and of `relevance`, `ratio` is peer over ours (half a completion added
to both, so that none is no division by zero), `ci95` is that of the mean over seeds on a log scale, and `control` is the same
ratio of `relevance` sampled twice.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _harness import Cells, arguments, finish
from _judges import interval
from _topics import TOPICS, answer, make_policy, make_tokenizer, questions, sample, teach, topic_words

from posttrain.rewards import collecting, get_reward

MAX_WORDS, GROUP, ROWS = 20, 8, 64
SETTINGS = {"warmup": 300, "steps": 80, "drawn": 4}
QUICK = {"warmup": 60, "steps": 4, "drawn": 1}
QUICK_ARMS = ("start", "relevance", "r3", "r3_kl")
RATE, CAP, BETA = 6e-4, 0.1, 0.1
MEASURES = ("copy_only", "nothing_new", "verbatim", "words", "full", "echo", "repetition", "again", "stray", "relevance", "news")
ALL_WORDS = {word for topic in TOPICS for part in topic_words(topic).values() for word in part}


def split(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Questions to train on and, a quarter of them, to be measured on."""
    rows = questions()
    random.Random(f"split {seed}").shuffle(rows)
    return rows[len(rows) // 4 :], rows[: len(rows) // 4]


@functools.cache
def warm(seed: int, steps: int) -> tuple[Any, Any]:
    """(tokenizer, weights) of the policy after supervision."""
    tokenizer = make_tokenizer()
    model = make_policy(tokenizer, seed)
    teach(model, tokenizer, split(seed)[0], seed, steps)
    return tokenizer, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def product_without_repetition(completions: list[Any], **columns: Any) -> list[float | None]:
    """Relevance times length, from the parts that R3 records."""
    with collecting() as parts:
        get_reward("r3", R3)(completions, **columns)
    return [None if a is None or b is None else a * b for a, b in zip(parts["relevance"], parts["length_incentive"], strict=True)]


def noise(completions: list[Any], **_: Any) -> list[float | None]:
    """A number in [0, 1) that says nothing of the text."""
    return [random.Random(f"{i} {text}").random() for i, text in enumerate(completions)]


R3 = {"types": "open", "batch": 32}
ARMS: dict[str, tuple[Callable[..., list[float | None]] | None, float]] = {
    "start": (None, 0.0),
    "noise": (noise, 0.0),
    "relevance": (get_reward("relevance", {"batch": 32}), 0.0),
    "relevance_length": (product_without_repetition, 0.0),
    "r3": (get_reward("r3", R3), 0.0),
    "r3_capped": (get_reward("r3", {**R3, "length_cap": CAP}), 0.0),
    "relevance_kl": (get_reward("relevance", {"batch": 32}), BETA),
    "r3_kl": (get_reward("r3", R3), BETA),
}
"""Arm -> reward (None: no training), weight of the KL divergence to the policy after supervision."""


def reinforce(model: Any, tokenizer: Any, rows: list[dict[str, str]], arm: str, seed: int, steps: int) -> list[float]:
    """Trains `model` in place; returns the mean reward of each step."""
    import trl
    from datasets import Dataset
    from transformers import PrinterCallback
    from transformers.utils import logging as hf_logging

    from posttrain.trainers.grpo import GRPOTrainer

    hf_logging.disable_progress_bar()
    reward, beta = ARMS[arm]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.config._name_or_path = folder
        config = trl.GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, gradient_checkpointing=False, logging_steps=1,
            save_strategy="no", seed=seed, max_steps=steps, learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0,
            per_device_train_batch_size=ROWS, gradient_accumulation_steps=1, num_generations=GROUP, max_completion_length=MAX_WORDS,
            temperature=1.0, beta=beta, loss_type="dapo", scale_rewards="group", max_grad_norm=1.0,
        )  # fmt: skip
        trainer = GRPOTrainer(model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


def grams(words: list[str]) -> list[tuple[str, ...]]:
    """Trigrams."""
    return list(zip(words, words[1:], words[2:], strict=False))


def behaviour(texts: list[str], rows: list[dict[str, str]]) -> dict[str, float]:
    """Means over completions of everything in MEASURES."""
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    near = get_reward("relevance", {"batch": 32})(texts, query=[row["prompt"] for row in rows])
    for text, row, relevance in zip(texts, rows, near, strict=True):
        words, asked, own = text.split(), row["prompt"].split(), grams(text.split())
        topic = {word for part in topic_words(row["topic"]).values() for word in part}
        verbatim, nothing_new = row["prompt"] in text, not set(words) & topic - set(asked)
        values = {
            "copy_only": verbatim and nothing_new, "nothing_new": nothing_new, "verbatim": verbatim,
            "words": len(words), "full": len(words) >= MAX_WORDS,
            "echo": sum(word in asked for word in words) / max(len(words), 1),
            "repetition": 1 - len(set(own)) / len(own) if own else 0.0, "again": 1 - len(set(words)) / max(len(words), 1),
            "stray": sum(word in ALL_WORDS - topic for word in words) / max(len(words), 1),
            "relevance": relevance or 0.0, "news": len(set(words) & topic - set(asked)),
        }  # fmt: skip
        for name, value in values.items():
            found[name].append(float(value))
    return {name: statistics.fmean(values) for name, values in found.items()}


def cell(arm: str, settings: dict[str, int], seed: int) -> dict[str, Any]:
    """One arm with one seed: trained, sampled twice, measured."""
    started = time.process_time()
    tokenizer, weights = warm(seed, settings["warmup"])
    model = make_policy(tokenizer, seed)
    model.load_state_dict(weights)
    train, held = split(seed)
    curve = reinforce(model, tokenizer, train, arm, seed, settings["steps"]) if ARMS[arm][0] else []
    rows = held * settings["drawn"]
    first, again = (sample(model, tokenizer, [row["prompt"] for row in rows], MAX_WORDS, 1000 * seed + i) for i in (1, 2))
    return {
        **behaviour(first, rows), "completions": len(rows), "second": behaviour(again, rows)["copy_only"],
        "reward": [curve[0], curve[-1]] if curve else [], "cpu_s": round(time.process_time() - started, 1),
        "examples": [{"prompt": row["prompt"], "completion": text} for row, text in list(zip(rows, first, strict=True))[:4]],
    }  # fmt: skip


def references(seed: int) -> dict[str, float]:
    """The measures of reference answers to the held-out questions."""
    rows, rng = split(seed)[1] * 4, random.Random(seed)
    return behaviour([answer(row, rng) for row in rows], rows)


def ratio_of(peer: list[dict[str, Any]], ours: list[dict[str, Any]], column: str = "copy_only") -> dict[str, float | None]:
    """Geometric mean over seeds of peer's `copy_only` over ours, half a completion added to both, with its interval."""

    def share(result: dict[str, Any], name: str) -> float:
        return (result[name] * result["completions"] + 0.5) / (result["completions"] + 0.5)

    logs = interval([math.log(share(a, "copy_only") / share(b, column)) for a, b in zip(peer, ours, strict=True)])
    return {
        name: None if logs[side] is None else math.exp(logs[side]) for name, side in (("value", "mean"), ("low", "low"), ("high", "high"))
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Command line; returns the record."""
    args = arguments(__doc__ or "", argv, seeds={"type": int, "default": 5, "help": "seeds (default 5)"})
    settings = QUICK if args.quick else SETTINGS
    seeds = range(1 if args.quick else args.seeds)
    arms = {arm: functools.partial(cell, arm, settings) for arm in (QUICK_ARMS if args.quick else ARMS)}
    done = Cells("r3_hacking", args).measure(arms, seeds)
    results = {arm: [done[arm, seed] for seed in seeds] for arm in arms}
    table = {arm: {name: interval([cell[name] for cell in cells]) for name in MEASURES} for arm, cells in results.items()}
    paired = {
        arm: {name: interval([a[name] - b[name] for a, b in zip(cells, results["relevance"], strict=True)]) for name in MEASURES}
        for arm, cells in results.items() if arm != "relevance"
    }  # fmt: skip
    ratio, control = ratio_of(results["relevance"], results["r3"]), ratio_of(results["relevance"], results["relevance"], "second")
    record = {
        "ours": table["r3"]["copy_only"]["mean"], "peer": table["relevance"]["copy_only"]["mean"], "ratio": ratio["value"],
        "ci95": [ratio["low"], ratio["high"]], "control": control, "seeds": len(seeds), "settings": settings, "table": table,
        "minus_relevance": paired, "references": {name: interval([references(seed)[name] for seed in seeds]) for name in MEASURES},
        "cells": results,
    }  # fmt: skip
    return finish("r3_hacking", record, args)


if __name__ == "__main__":
    main()
