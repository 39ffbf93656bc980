"""A small world of questions and answers in about a hundred English words, and a policy small enough to learn it in seconds.

A question asks how the people of one of eight topics do something; an answer says with what, where, and what they do then:

    how do cooks bake bread ?    cooks bake bread with flour in the kitchen and then slice cake

Answers have two to four clauses of their topic. One in ten starts by saying the whole question again, one in ten goes over a
clause twice: so a policy trained on them can copy and can repeat, and a reward decides whether it does so more or less.
"""

from __future__ import annotations

import random
from typing import Any

TOPICS = {
    "food": ("cooks bakers", "bake taste slice", "bread cake soup", "flour sugar", "kitchen bakery"),
    "sea": ("sailors divers", "sail steer anchor", "ships boats rafts", "ropes maps", "harbor ocean"),
    "music": ("singers pianists", "practice record perform", "songs tunes operas", "guitars drums", "studio theater"),
    "sport": ("players coaches", "kick throw catch", "balls goals matches", "gloves boots", "stadium gym"),
    "space": ("astronauts pilots", "launch land orbit", "rockets satellites moons", "telescopes fuel", "observatory planet"),
    "garden": ("gardeners farmers", "plant water harvest", "flowers trees crops", "shovels seeds", "field greenhouse"),
    "money": ("bankers traders", "invest lend spend", "cash loans stocks", "accounts coins", "market bank"),
    "school": ("teachers students", "read write study", "books essays lessons", "pencils chalk", "classroom library"),
}
GLUE = ("how", "do", "?", "with", "in", "the", "and", "then")
PARTS = ("people", "deeds", "things", "tools", "places")
ECHO, AGAIN = 0.1, 0.1
"""Shares of answers that start with the question, and that say a clause twice."""


def topic_words(topic: str) -> dict[str, list[str]]:
    """Words of a topic by kind."""
    return {part: words.split() for part, words in zip(PARTS, TOPICS[topic], strict=True)}


def questions() -> list[dict[str, str]]:
    """All {topic, prompt}: people x deeds x things of each topic."""
    out = []
    for topic in TOPICS:
        own = topic_words(topic)
        out += [
            {"topic": topic, "prompt": f"how do {who} {deed} {thing} ?"}
            for who in own["people"] for deed in own["deeds"] for thing in own["things"]
        ]  # fmt: skip
    return out


def answer(question: dict[str, str], rng: random.Random) -> str:
    """One reference answer, drawn anew at each call."""
    own = topic_words(question["topic"])
    _, _, who, deed, thing, _ = question["prompt"].split()
    more = [
        f"with {rng.choice(own['tools'])}",
        f"in the {rng.choice(own['places'])}",
        f"and then {rng.choice(own['deeds'])} {rng.choice(own['things'])}",
    ]
    clauses = [f"{who} {deed} {thing}", *rng.sample(more, rng.randint(1, 3))]
    if rng.random() < ECHO:
        clauses[0] = question["prompt"]
    if rng.random() < AGAIN:
        clauses.append(rng.choice(clauses[1:]))
    return " ".join(clauses)


def make_tokenizer() -> Any:
    """One id a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *GLUE, *(word for topic in TOPICS.values() for part in topic for word in part.split())]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def make_policy(tokenizer: Any, seed: int) -> Any:
    """A Qwen2 of two layers with random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def teach(model: Any, tokenizer: Any, rows: list[dict[str, str]], seed: int, steps: int) -> float:
    """Supervised warm-up on fresh answers, loss on the answer only; returns the last loss."""
    import torch

    rng, loss = random.Random(seed), torch.zeros(())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1 - step / (steps + 1)))
    for _ in range(steps):
        drawn = rng.choices(rows, k=64)
        pairs = [
            (tokenizer(row["prompt"])["input_ids"], tokenizer(answer(row, rng))["input_ids"] + [tokenizer.eos_token_id]) for row in drawn
        ]
        width = max(len(a) + len(b) for a, b in pairs)
        ids, labels = torch.full((64, width), tokenizer.pad_token_id), torch.full((64, width), -100)
        for i, (a, b) in enumerate(pairs):
            ids[i, : len(a) + len(b)] = torch.tensor(a + b)
            labels[i, len(a) : len(a) + len(b)] = torch.tensor(b)
        loss = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return float(loss.detach())


def sample(model: Any, tokenizer: Any, prompts: list[str], max_tokens: int, seed: int) -> list[str]:
    """One completion of each prompt at temperature 1."""
    import torch

    torch.manual_seed(seed)
    model.eval()
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        ids = model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_tokens)
    return list(tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True))
