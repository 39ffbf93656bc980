"""Two small language models that judge a pick: what is their loss on held-out text after training on nothing but the pick?

`Trigrams` is a word trigram model with interpolated absolute discounting (Ney, Essen, Kneser 1994). With counts c, N the
number of different words seen after a context, and d the discount,

    P(w|uv) = max(c(uvw) - d, 0)/c(uv) + d N(uv)/c(uv) P(w|v)
    P(w|v)  = max(c(vw) - d, 0)/c(v)   + d N(v)/c(v) P(w)
    P(w)    = max(c(w) - d, 0)/c       + d N/c 1/V                V the size of the vocabulary

and a context never seen leaves the shorter one. `Transformer` is a Qwen2 of one layer and 0.35 million parameters, trained for
a fixed number of small steps. Both see the same fixed vocabulary whatever was picked, so their losses can be compared.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from _corpus import WORD

RATE = 5e-3
"""Peak learning rate of the transformer."""


def words_of(text: str) -> list[str]:
    """Lower-cased words."""
    return WORD.findall(text.lower())


class Vocabulary:
    """Ids of the most frequent words; every other word is id 0.

    Args:
        texts: where to count.
        size: ids, including the one of unknown words.
    """

    def __init__(self, texts: Iterable[str], size: int = 20_000) -> None:
        counts = Counter(word for text in texts for word in words_of(text))
        known = sorted(counts, key=lambda word: (-counts[word], word))[: size - 1]
        self.ids = {word: i for i, word in enumerate(known, 1)}
        self.size = len(known) + 1

    def encode(self, texts: Iterable[str]) -> list[np.ndarray]:
        """int64[words] of each text."""
        get = self.ids.get
        return [np.array([get(word, 0) for word in words_of(text)], np.int64) for text in texts]


class _Grams:
    """Counts of (context, word) pairs, and of each context: how often, and by how many different words it was followed."""

    def __init__(self, context: np.ndarray, word: np.ndarray, base: int) -> None:
        self.base = base
        self.pair, self.count = np.unique(context * base + word, return_counts=True)
        self.context, first = np.unique(self.pair // base, return_index=True)
        self.total = np.add.reduceat(self.count, first) if len(first) else self.count
        self.kinds = np.diff(np.append(first, len(self.pair)))

    def mix(self, context: np.ndarray, word: np.ndarray, discount: float, below: np.ndarray) -> np.ndarray:
        """The discounted estimate of `word` after `context`, with the rest of its mass spread as `below`."""
        count = _looked_up(self.pair, self.count, context * self.base + word)
        total, kinds = (_looked_up(self.context, values, context) for values in (self.total, self.kinds))
        seen = np.maximum(total, 1)
        return np.where(total > 0, np.maximum(count - discount, 0) / seen + discount * kinds / seen * below, below)


def _looked_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[i] where keys[i] is wanted, 0 where no key is; `keys` are sorted."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


class Trigrams:
    """Word trigram model.

    Args:
        documents: int64[words] each; two sentence starts go before each.
        vocabulary: number of ids.
        discount: d, between 0 and 1.
    """

    def __init__(self, documents: list[np.ndarray], vocabulary: int, discount: float = 0.75) -> None:
        self.vocabulary, self.discount = vocabulary, discount
        u, v, w = _triples(documents, vocabulary)
        base = vocabulary + 1
        none = np.zeros(len(w), np.int64)
        self.levels = [_Grams(none, w, base), _Grams(v, w, base), _Grams(u * base + v, w, base)]

    def probability(self, documents: list[np.ndarray]) -> np.ndarray:
        """float64[all words], P of each word after the two before it."""
        u, v, w = _triples(documents, self.vocabulary)
        found = np.full(len(w), 1 / self.vocabulary)
        for level, context in zip(self.levels, (np.zeros(len(w), np.int64), v, u * (self.vocabulary + 1) + v), strict=True):
            found = level.mix(context, w, self.discount, found)
        return found

    def loss(self, documents: list[np.ndarray]) -> float:
        """Mean negative log-probability of a word in nats; its exponential is the perplexity."""
        return float(-np.log(self.probability(documents)).mean())


def _triples(documents: list[np.ndarray], start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    padded = [np.concatenate([[start, start], document]) for document in documents if len(document)]
    if not padded:
        return (np.zeros(0, np.int64),) * 3
    u, v, w = (np.concatenate([document[i : len(document) - 2 + i] for document in padded]) for i in range(3))
    return u, v, w


class Transformer:
    """A small Qwen2 and a byte-level BPE tokenizer, made once from text that no selector has touched.

    Args:
        texts: what the tokenizer is trained on.
        vocabulary: tokens.
        steps, rows, length: optimizer steps of so many rows of so many tokens.
    """

    def __init__(self, texts: list[str], vocabulary: int = 2048, steps: int = 3000, rows: int = 4, length: int = 64) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        self.steps, self.rows, self.length = steps, rows, length
        self.tokenizer = Tokenizer(models.BPE())
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
        self.tokenizer.train_from_iterator(texts, trainer)

    def _tokens(self, texts: list[str]) -> list[int]:
        return [token for text in texts for token in (0, *self.tokenizer.encode(text).ids)]

    def _model(self, seed: int) -> Any:
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(seed)
        size = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
        size |= {"initializer_range": 0.1}
        config = Qwen2Config(vocab_size=self.tokenizer.get_vocab_size(), max_position_embeddings=1024, tie_word_embeddings=True, **size)
        return Qwen2ForCausalLM(config)

    def loss(self, texts: list[str], heldout: list[str], seed: int) -> float:
        """Nats per held-out word after training on `texts`."""
        return self._heldout(self.train(texts, seed), heldout)

    def train(self, texts: list[str], seed: int) -> Any:
        """A new model trained on the texts laid end to end; their rows of tokens come in a new order each epoch."""
        import torch

        model, data = self._model(seed), self._rows(texts)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
        rng, order = random.Random(f"order:{seed}"), []
        for step in range(self.steps):
            share = (step + 1) / self.steps
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, 20 * share) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))
            while len(order) < self.rows:
                order += rng.sample(range(len(data)), len(data))
            picked, order = order[: self.rows], order[self.rows :]
            batch = data[picked]
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return model.eval()

    def save(self, model: Any, folder: Any) -> None:
        """Model and tokenizer as a folder that transformers loads."""
        from transformers import PreTrainedTokenizerFast

        model.save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=self.tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>").save_pretrained(folder)

    def _rows(self, texts: list[str]) -> Any:
        import torch

        tokens = self._tokens(texts)
        count = max(1, len(tokens) // self.length)
        tokens = (tokens * (self.length // max(1, len(tokens)) + 1))[: count * self.length]
        return torch.tensor(tokens).view(count, self.length)

    def _heldout(self, model: Any, texts: list[str]) -> float:
        import torch

        data = self._rows(texts)
        words = sum(len(words_of(text)) for text in texts) * data.numel() / max(1, len(self._tokens(texts)))
        with torch.no_grad():
            total = sum(float(model(input_ids=part, labels=part).loss) * part[:, 1:].numel() for part in data.split(32))
        return total / words
