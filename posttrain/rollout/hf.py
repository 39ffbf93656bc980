"""Rollout engine on a transformers model in this process: the live policy during training, or a loaded model.

Requests are sorted by prompt length and drawn in batches of at most `max_batch`, constrained ones (see
`posttrain.rollout.particles`) by themselves. A prompt that several requests of a batch
share is computed once and its key-value cache expanded. Rows that have ended leave the batch. Log-probabilities are float32
log-softmax values of the sampling distribution, those that a trainer recomputes with the same temperature.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain.errors import NumericsError, RolloutError
from posttrain.rollout.base import Completion, Progress, Request
from posttrain.rollout.constraints import Vocabulary
from posttrain.rollout.sampling import SamplingRows, sample, uniforms
from posttrain.rollout.stopping import StopRule, end_ids


class HFEngine:
    """Batched sampling with a key-value cache.

    Args:
        model: a transformers or peft causal language model; it is used as it stands, and its train/eval modes are restored.
        tokenizer: decodes completions and names the end token.
        max_batch: most rows in one forward pass.
        dtype: moves an own model to this type first; leave it None for a live model.
        progress: see Progress.

    Attributes:
        version: version of the weights, stamped on completions.
        eos_ids: ids that end a completion: the generation config's, and the tokenizer's end token.
        tokens, seconds: drawn so far, and the time it took.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, max_batch: int = 64, dtype: torch.dtype | None = None, progress: Progress | None = None
    ) -> None:
        self.model = model if dtype is None else model.to(dtype)
        self.tokenizer, self.max_batch, self.progress = tokenizer, max_batch, progress
        self.version, self.tokens, self.seconds = 0, 0, 0.0
        self.eos_ids = end_ids(model, tokenizer)
        self._vocabulary: Vocabulary | None = None

    @property
    def tokens_per_s(self) -> float:
        """Sampled tokens per second since the start."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in the same order.

        Raises:
            RolloutError: an empty prompt, or prompt + max_tokens beyond the model's positions.
            NumericsError: the logits are not finite.
        """
        self._check(requests)
        start = time.perf_counter()
        done: dict[int, Completion] = {}
        with evaluation_mode(self.model), torch.no_grad():
            for rows in self._batches(requests):
                draw = self._batch if requests[rows[0]].constraint is None else self._constrained
                done.update(zip(rows, draw([requests[i] for i in rows], len(done), len(requests)), strict=True))
        self.seconds += time.perf_counter() - start
        return [done[i] for i in range(len(requests))]

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Numbers of the requests, free ones first, by length; at most `max_batch` rows a batch, a particle being a row."""
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), tuple(requests[i].prompt_ids)))
        for free in (True, False):
            rows: list[int] = []
            size = 0
            for i in order:
                if (requests[i].constraint is None) is not free:
                    continue
                count = 1 if free else requests[i].sampler.particles
                if rows and size + count > self.max_batch:
                    yield rows
                    rows, size = [], 0
                rows.append(i)
                size += count
            if rows:
                yield rows

    def _constrained(self, requests: Sequence[Request], before: int, total: int) -> list[Completion]:
        from posttrain.rollout.particles import Particles

        if self._vocabulary is None:
            self._vocabulary = Vocabulary.of(self.tokenizer, self.eos_ids)
        device = next(self.model.parameters()).device
        drawn = Particles(requests, self.tokenizer, self._vocabulary)
        prefix = _Prefix(self.model, [list(requests[i].prompt_ids) for i in drawn.owners], drawn.longest, device)
        for step in range(drawn.longest):
            self.tokens += drawn.take(step, prefix.logits)
            self._report(before + drawn.done, total)
            rows = drawn.next_rows()
            if rows is None or step + 1 == drawn.longest:
                break
            prefix.select(torch.from_numpy(rows).to(device))
            prefix.advance(torch.from_numpy(drawn.last_tokens()).to(device))
        return drawn.completions(self.version)

    def load_weights(self, source: Any, version: int) -> None:
        """Takes new weights and stamps them.

        Args:
            source: the live module itself (only the version changes), another module of the same shape, or a model folder.
            version: e.g. the policy's optimizer step.

        Raises:
            RolloutError: names or shapes of the weights differ.
        """
        if source is not self.model:
            _copy_weights(self.model, source)
        self.version = version

    def close(self) -> None:
        """Lets go of the model."""
        self.model = None

    def _check(self, requests: Sequence[Request]) -> None:
        if self.model is None:
            raise RolloutError("the engine is closed")
        limit = getattr(self.model.config, "max_position_embeddings", None)
        for request in requests:
            size, wanted = len(request.prompt_ids), request.sampling.max_tokens
            if size == 0:
                raise RolloutError("the prompt has no tokens", where=f"request {request.id!r}")
            if limit and size + wanted > limit:
                raise RolloutError(
                    f"prompt of {size} tokens + max_tokens {wanted} exceeds the model's {limit} positions",
                    where=f"request {request.id!r}",
                    fix="shorten or drop the prompt, or lower max_tokens",
                )

    def _batch(self, requests: Sequence[Request], before: int, total: int) -> list[Completion]:
        device = next(self.model.parameters()).device
        drawn = _Drawn(requests, self.tokenizer, self.eos_ids)
        settings = SamplingRows.of([request.sampling for request in requests], device)
        prefix = _Prefix(self.model, [list(request.prompt_ids) for request in requests], drawn.longest, device)
        for step in range(drawn.longest):
            noise = torch.from_numpy(drawn.noise[drawn.rows, step]).to(device)
            chosen, values = sample(prefix.logits, settings, noise)
            self.tokens += drawn.take(step, chosen.cpu().numpy(), values.cpu().numpy())
            keep = drawn.compact()
            self._report(before + drawn.done, total)
            if drawn.done == len(requests):
                break
            if keep is not None:
                index = torch.from_numpy(keep).to(device)
                chosen, settings = chosen[index], settings.select(index)
                prefix.select(index)
            prefix.advance(chosen)
        return drawn.completions(self.version)

    def _report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total, self.tokens)


class _Drawn:
    """Bookkeeping of a batch on the host: tokens, log-probabilities and ends of its requests, and which rows are still computed.

    `rows[j]` is the request behind row j of the model's batch; `lengths` is 0 until a request has ended.
    """

    def __init__(self, requests: Sequence[Request], tokenizer: Any, eos_ids: frozenset[int]) -> None:
        self.requests, count = requests, len(requests)
        self.limits = np.array([request.sampling.max_tokens for request in requests])
        self.longest = int(self.limits.max())
        self.noise = uniforms([request.seed for request in requests], self.longest)
        self.ids, self.logprobs = np.zeros((count, self.longest), np.int64), np.zeros((count, self.longest), np.float32)
        self.rows, self.lengths, self.ended = np.arange(count), np.zeros(count, np.int64), np.zeros(count, bool)
        self.rules = [StopRule(tokenizer, request.sampling.stop, eos_ids) for request in requests]
        self.with_stop = np.array([bool(request.sampling.stop) for request in requests])
        self.eos = np.array(sorted(eos_ids), np.int64)

    @property
    def done(self) -> int:
        """Requests that have ended."""
        return int((self.lengths > 0).sum())

    def take(self, step: int, chosen: np.ndarray, values: np.ndarray) -> int:
        """Records the tokens of one step, and returns how many of them belong to open requests."""
        live = self.lengths[self.rows] == 0
        open_rows, new = self.rows[live], chosen[live]
        if not np.isfinite(values).all():
            raise NumericsError("the model's logits are not finite while sampling", fix="check the weights: training may have diverged")
        self.ids[open_rows, step], self.logprobs[open_rows, step] = new, values[live]
        stopped = np.isin(new, self.eos)
        for j in np.flatnonzero(self.with_stop[open_rows]):
            stopped[j] = self.rules[open_rows[j]].ends(self.ids[open_rows[j], : step + 1].tolist())
        over = open_rows[stopped | (self.limits[open_rows] == step + 1)]
        self.lengths[over] = step + 1
        self.ended[open_rows[stopped]] = True
        return len(open_rows)

    def compact(self) -> np.ndarray | None:
        """Drops ended rows once they are an eighth of the batch; returns the kept row numbers, or None where nothing changed."""
        keep = np.flatnonzero(self.lengths[self.rows] == 0)
        if len(self.rows) - len(keep) < max(1, len(self.rows) // 8):
            return None
        self.rows = self.rows[keep]
        return keep

    def completions(self, version: int) -> list[Completion]:
        """The requests' completions, in order."""
        out = []
        for i, request in enumerate(self.requests):
            tokens, logprobs = self.ids[i, : self.lengths[i]].tolist(), self.logprobs[i, : self.lengths[i]].tolist()
            reason = "stop" if self.ended[i] else "length"
            out.append(Completion(request.id, list(request.prompt_ids), tokens, logprobs, self.rules[i].text(tokens), reason, version))
        return out


class _Prefix:
    """Cache, mask and next logits of the rows in a batch; prompts are padded on the left, each distinct one computed once."""

    def __init__(self, model: Any, prompts: list[list[int]], room: int, device: torch.device) -> None:
        from transformers import DynamicCache

        distinct = {tuple(prompt): index for index, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        self.model, self.names = model, _forward_names(model)
        self.width = max(map(len, distinct))
        self.cache: Any = DynamicCache(config=model.config)
        self.logits = torch.empty(0)
        ids = torch.zeros(len(distinct), self.width, dtype=torch.long)
        self.mask = torch.ones(len(distinct), self.width + room, dtype=torch.long, device=device)
        for prompt, row in distinct.items():
            ids[row, self.width - len(prompt) :] = torch.tensor(prompt)
            self.mask[row, : self.width - len(prompt)] = 0
        self.padded = bool((self.mask == 0).any())
        self.next = torch.tensor([len(prompt) for prompt in distinct], device=device)[:, None]
        positions = (self.mask[:, : self.width].cumsum(-1) - 1).clamp(min=0)
        self._forward(ids.to(device), positions)
        self.select(torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=device))

    def select(self, rows: torch.Tensor) -> None:
        """Keeps these rows, in this order; a row may be taken several times."""
        if len(rows) == len(self.logits) and bool((rows == torch.arange(len(rows), device=rows.device)).all()):
            return
        self.cache.reorder_cache(rows)
        self.mask, self.next, self.logits = self.mask[rows], self.next[rows], self.logits[rows]

    def advance(self, chosen: torch.Tensor) -> None:
        """Feeds one token a row."""
        self.width += 1
        self._forward(chosen[:, None], self.next)
        self.next = self.next + 1

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        cache_name, keeps = self.names
        extra: dict[str, Any] = {cache_name: self.cache, "use_cache": True}
        if keeps:
            extra["logits_to_keep"] = 1
        mask = self.mask[:, : self.width] if self.padded else None
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, **extra)
        self.logits = out.logits[:, -1]


def _forward_names(model: Any) -> tuple[str, bool]:
    """Name of the cache argument (`cache` replaces `past_key_values` in transformers 5.24), and whether `logits_to_keep` exists."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = inspect.signature(base.forward).parameters
    return "cache" if "cache" in names else "past_key_values", "logits_to_keep" in names


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Evaluation mode inside; every submodule's own mode is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _copy_weights(model: Any, source: Any) -> None:
    if isinstance(source, str | Path):
        from safetensors.torch import load_file

        files = sorted(Path(source).glob("*.safetensors"))
        if not files:
            raise RolloutError("no safetensors files", where=str(source))
        state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    else:
        state = source.state_dict()
    own = model.state_dict()
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    missing, foreign = own.keys() - state.keys() - tied, state.keys() - own.keys()
    if missing or foreign:
        name = sorted(missing or foreign)[0]
        raise RolloutError(
            f"the weights do not fit the engine's model: {len(missing)} missing, {len(foreign)} unknown, e.g. `{name}`",
            fix="hand over the live model itself (adapters included), or a folder with merged weights",
        )
    with torch.no_grad():
        for name, tensor in state.items():
            if own[name].shape != tensor.shape:
                raise RolloutError(f"`{name}` has shape {tuple(tensor.shape)}, the engine's model {tuple(own[name].shape)}")
            own[name].copy_(tensor)
