"""The key-value cache of a running batch: rows enter with their prompt computed, go on by one token each, and leave.

Rows are padded on the left, so that the next token of every row has the same column; a row's own positions count from its first
token. A row enters by padding whichever is narrower. Columns that no row needs any more are cut, so the cache is as wide
as its longest row.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

Prompt = tuple[int, ...]
STORED = 8
"""Prompts whose cache is kept for requests that still wait."""


class _Stored(NamedTuple):
    """A computed prompt: (keys, values) of each layer, (1, heads, length, size), and its logits (1, V)."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    logits: torch.Tensor


class RowCache:
    """Cache and next logits of the rows of a batch.

    Args:
        model: a transformers or peft causal language model in evaluation mode.

    Attributes:
        insertable: rows may enter while others run. False where some layer keeps more than the keys and values of all tokens in
            order (a sliding window, a linear-attention state); then rows enter an empty cache only.
        lengths: (rows,) tokens of each row in the cache.
        width: columns of the cache.
        logits: (rows, V) for the next token.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.names = model, _forward_names(model)
        self.device = next(model.parameters()).device
        self.insertable = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
        self._stored: OrderedDict[Prompt, _Stored] = OrderedDict()
        self.clear()

    def __len__(self) -> int:
        return len(self.lengths)

    def clear(self) -> None:
        """Lets every row go."""
        self.cache: Any = None
        self.lengths, self.width, self.logits = np.zeros(0, np.int64), 0, torch.empty(0)

    def insert(self, prompts: Sequence[Prompt], awaited: Callable[[Prompt], bool]) -> None:
        """Appends rows; each distinct prompt is computed once.

        Args:
            prompts: token ids of each new row's prompt.
            awaited: whether more rows with this prompt will come, so that its cache is worth keeping.

        Raises:
            ValueError: rows run, and the cache is not insertable.
        """
        if len(self) and not self.insertable:
            raise ValueError("this model's cache takes no rows while others run")
        distinct = list(dict.fromkeys(prompts))
        stored = [self._stored[prompt] for prompt in distinct if prompt in self._stored]
        places = {prompt: i for i, prompt in enumerate(sorted(distinct, key=self._stored.__contains__))}
        rows = torch.tensor([places[prompt] for prompt in prompts], device=self.device)
        fresh, logits = self._prefill([prompt for prompt in distinct if prompt not in self._stored])
        if self.insertable:
            if fresh is not None:
                self._keep(distinct, places, fresh, logits, awaited)
            self._merge(fresh, stored, rows, max(map(len, distinct)))
        else:
            fresh.reorder_cache(rows)
            self.cache, self.width = fresh, fresh.get_seq_length()
        parts = [] if fresh is None else [logits]
        added = torch.cat([*parts, *(one.logits for one in stored)])[rows]
        self.logits = torch.cat([self.logits, added]) if len(self) else added
        self.lengths = np.concatenate([self.lengths, np.array([len(prompt) for prompt in prompts], np.int64)])

    def forget(self, prompt: Prompt) -> None:
        """No more rows with this prompt will come."""
        self._stored.pop(prompt, None)

    def select(self, rows: np.ndarray) -> None:
        """Keeps these rows, in this order; a row may be taken several times."""
        if len(rows) == len(self) and bool((rows == np.arange(len(rows))).all()):
            return
        index = torch.from_numpy(rows).to(self.device)
        self.lengths, self.logits = self.lengths[rows], self.logits[index]
        if not self.insertable:
            self.cache.reorder_cache(index)
            return
        self.width = int(self.lengths.max())
        for layer in self.cache.layers:
            here = index.to(layer.keys.device)
            layer.keys, layer.values = (part[:, :, -self.width :][here] for part in (layer.keys, layer.values))

    def advance(self, tokens: np.ndarray) -> None:
        """Feeds one token a row, (rows,) int64."""
        positions = torch.from_numpy(self.lengths).to(self.device)[:, None]
        self.lengths, self.width = self.lengths + 1, self.width + 1
        ids = torch.from_numpy(tokens).to(self.device)[:, None]
        self.logits = self._forward(self.cache, ids, positions, self._mask(self.lengths, self.width))

    def _mask(self, lengths: np.ndarray, width: int) -> torch.Tensor | None:
        """(rows, width) attention mask, or None where no row is padded."""
        if bool((lengths == width).all()):
            return None
        begins = torch.from_numpy(width - lengths).to(self.device)[:, None]
        return (torch.arange(width, device=self.device) >= begins).long()

    def _prefill(self, prompts: Sequence[Prompt]) -> tuple[Any, torch.Tensor]:
        """A cache of these prompts, padded to the longest, and their logits; None where there are none."""
        if not prompts:
            return None, torch.empty(0)
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        width = int(lengths.max())
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
        positions = (torch.arange(width) - torch.from_numpy(width - lengths)[:, None]).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(cache, ids.to(self.device), positions.to(self.device), self._mask(lengths, width))
        return cache, logits

    def _keep(
        self, distinct: Sequence[Prompt], places: dict[Prompt, int], fresh: Any, logits: torch.Tensor, awaited: Callable[[Prompt], bool]
    ) -> None:
        """Stores the new prompts that more rows will ask for; the oldest beyond `STORED` are dropped."""
        for prompt in distinct:
            if prompt in self._stored or not awaited(prompt):
                continue
            at = slice(places[prompt], places[prompt] + 1)
            layers = [tuple(part[at, :, -len(prompt) :].clone() for part in (layer.keys, layer.values)) for layer in fresh.layers]
            self._stored[prompt] = _Stored(layers, logits[at].clone())
        while len(self._stored) > STORED:
            self._stored.popitem(last=False)

    def _merge(self, fresh: Any, stored: Sequence[_Stored], rows: torch.Tensor, longest: int) -> None:
        """Appends rows of the pool (computed prompts, then stored ones) to the cache."""
        if self.cache is None and not stored:
            fresh.reorder_cache(rows)
            self.cache, self.width = fresh, longest
            return
        self.width = max(self.width, longest)
        cache = self.cache
        target = DynamicCache(config=self.model.config) if cache is None else cache
        for number, layer in enumerate(target.layers):
            found = []
            for side, name in enumerate(("keys", "values")):
                pool = [] if fresh is None else [getattr(fresh.layers[number], name)]
                pool = [_fit(part, self.width) for part in (*pool, *(one.layers[number][side] for one in stored))]
                added = torch.cat(pool)[rows.to(pool[0].device)]
                found.append(added if cache is None else torch.cat([_fit(getattr(layer, name), self.width), added]))
            if not layer.is_initialized:
                layer.lazy_initialization(*found)
            layer.keys, layer.values = found
        self.cache = target

    def _forward(self, cache: Any, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        name, keeps = self.names
        extra: dict[str, Any] = {name: cache, "use_cache": True}
        if keeps:
            extra["logits_to_keep"] = 1
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, **extra)
        logits: torch.Tensor = out.logits[:, -1]
        return logits


def _fit(part: torch.Tensor, width: int) -> torch.Tensor:
    """(rows, heads, length, size) with `width` columns: cut or padded on the left."""
    have = part.shape[2]
    return part[:, :, have - width :] if have >= width else pad(part, (0, 0, width - have, 0))


def _forward_names(model: Any) -> tuple[str, bool]:
    """Name of the cache argument (`cache` replaces `past_key_values` in transformers 5.24), and whether `logits_to_keep` exists."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = inspect.signature(base.forward).parameters
    return "cache" if "cache" in names else "past_key_values", "logits_to_keep" in names
