"""The forward pass of `fast: on`: log-probabilities and entropies at completion tokens, from the blocks of `_grpo_layout.py`.

`add_fast_forward(model)` lets `model(fast=work)` run a whole micro-batch, several blocks one after another, inside one call of
the model as it is wrapped (DDP, peft, autocast). Other calls are as before.

Prompts are shared through keys and values: one pass over each prompt once records those of every layer, and the passes
over completions attend to them, with gradient. Both caches are written at most once, so a layer under gradient
checkpointing may run again in the backward pass.

Positions are the columns of the padded batch, as TRL's forward has them, so that only sums in another order differ from it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.errors import PosttrainError
from posttrain.losses.token_logps import token_logps
from posttrain.trainers._grpo_layout import Block, Cluster


class PromptsNotShared(PosttrainError):
    """A layer did not take the cache that prompts are shared through."""


@dataclass
class Work:
    """One micro-batch.

    Args:
        ids: (B, P + T) prompts and completions as padded.
        mask: (B, T) bool, tokens whose log-probability is wanted.
        prompt_lengths: tokens of each prompt.
        temperature: of the distribution.
        moving: blocks that are computed with gradient, together.
        still: blocks that are computed without, one cluster after another.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    prompt_lengths: Sequence[int]
    temperature: float
    moving: Sequence[Cluster] = ()
    still: Sequence[Cluster] = ()


def head_shape(config: Any) -> dict[str, Any]:
    """`scale` and `softcap` of a model's logits, for `token_logps`, under the names that configs have for them.

    Args:
        config: of the text model.
    """
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
    scale = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    shared = getattr(config, "logits_scaling", None)
    if scale is None and shared is not None:
        scale = shared if config.model_type == "hyperclovax" else 1 / shared
    return {"scale": 1.0 if scale is None else scale, "softcap": getattr(config, "final_logit_softcapping", None)}


class _Recorder(DynamicLayer):
    """Keeps a layer's first keys and values, and shows the layer nothing but its own."""

    def get_seq_length(self) -> int:
        return 0

    def get_width(self) -> int:
        return 0 if self.keys is None else self.keys.size(-2)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is None:
            self.keys, self.values = key_states, value_states
        return key_states, value_states


class _Reader(DynamicLayer):
    """Puts the recorded keys and values of each row's prompt before its own, and keeps nothing."""

    def __init__(self, prompt: _Recorder, source: torch.Tensor | None, rows: int) -> None:
        super().__init__()
        self.prompt, self.source, self.rows = prompt, source, rows

    def get_seq_length(self) -> int:
        return self.prompt.get_width()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.prompt.keys is not None and self.prompt.values is not None
        keys, values = self._rows_of(self.prompt.keys), self._rows_of(self.prompt.values)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def _rows_of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.expand(self.rows, -1, -1, -1) if self.source is None else tensor.index_select(0, self.source)


def add_fast_forward(model: Any) -> None:
    """Lets a causal language model run a `Work`: `model(fast=work)` gives log-probabilities and entropies (B, T), 0 where masked."""
    before = model.forward
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]

    @functools.wraps(before)
    def forward(self: Any, *args: Any, fast: Work | None = None, **kwargs: Any) -> Any:
        if fast is None:
            return before(*args, **kwargs)
        with _caches_under_checkpoints(layers):
            return _run(self, fast)

    model.forward = types.MethodType(forward, model)


@contextmanager
def _caches_under_checkpoints(layers: Sequence[Any]) -> Iterator[None]:
    """Lets our caches through to layers under gradient checkpointing, which drop those that are written each time they run."""
    for layer in layers:
        layer._can_checkpoint_with_cache = True
    try:
        yield
    finally:
        for layer in layers:
            del layer._can_checkpoint_with_cache


def _run(model: Any, work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    if work.moving:
        found.append(_tokens(model, work, work.moving))
    elif torch.is_grad_enabled():
        found.append(_anchor(model, work))
    with torch.no_grad():
        found.extend(_tokens(model, work, [cluster]) for cluster in work.still)
    wide = torch.float64 if any(logps.dtype == torch.float64 for _, logps, _ in found) else torch.float32
    logps, entropies = (torch.zeros(work.mask.shape, dtype=wide, device=work.ids.device) for _ in range(2))
    for chosen, new_logps, new_entropies in found:
        logps = logps.masked_scatter(chosen, new_logps)
        entropies = entropies.masked_scatter(chosen, new_entropies)
    return logps, entropies


def _anchor(model: Any, work: Work) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token through the model and no place for it: a gradient of 0 for every parameter, which DDP waits for."""
    place = work.ids.size(1) - work.mask.size(1) - 1
    hidden = _call(model.base_model, work.ids, Block((0,), (place,), 1))
    return torch.zeros_like(work.mask), *_score(model, work, hidden, work.ids[:1, place])


def _score(model: Any, work: Work, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies, (N,), at hidden states (N, H)."""
    output = model.get_output_embeddings()
    shape = head_shape(model.config.get_text_config())
    return token_logps(hidden, output.weight, targets, getattr(output, "bias", None), work.temperature, **shape)


def _tokens(model: Any, work: Work, clusters: Sequence[Cluster]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which tokens of the batch these clusters hold, (B, T), and their log-probabilities and entropies, (N,)."""
    device, width = work.ids.device, work.ids.size(1) - work.mask.size(1)
    hidden, head, tail = _hidden(model.base_model, work, clusters)
    here = torch.zeros(work.ids.size(0), dtype=torch.bool)
    here[[row for cluster in clusters for row in cluster.rows]] = True
    chosen = work.mask & here.to(device)[:, None]
    row, token = chosen.nonzero(as_tuple=True)
    origin = torch.tensor([head, tail], device=device)
    place = torch.where(token == 0, origin[0][row], origin[1][row]) + width + token - 1
    logps, entropies = _score(model, work, hidden.index_select(0, place), work.ids[row, width + token])
    return chosen, logps, entropies


def _hidden(backbone: Any, work: Work, clusters: Sequence[Cluster]) -> tuple[torch.Tensor, list[int], list[int]]:
    """Hidden states of all blocks, (positions, H), and for each row where its column 0 would lie there.

    The first completion token of a row is predicted from its prompt (first list), later ones from the completion (second).
    """
    pieces, head, tail = [], [0] * work.ids.size(0), [0] * work.ids.size(0)
    base = 0
    for cluster in clusters:
        prompts = cluster.prompts
        recorded: list[Any] = [_Recorder() for _ in range(backbone.config.get_text_config().num_hidden_layers)] if prompts else []
        if prompts:
            pieces.append(_call(backbone, work.ids, prompts, Cache(layers=recorded)))
            if any(layer.keys is None for layer in recorded):
                raise PromptsNotShared(f"{type(backbone).__name__} does not hand its cache to every layer")
            for part in cluster.parts:
                for row, source in zip(part.rows, part.source, strict=True):
                    head[row] = base + source * prompts.width - prompts.first[source]
            base += len(prompts.rows) * prompts.width
        for part in cluster.parts:
            for number, (row, first) in enumerate(zip(part.rows, part.first, strict=True)):
                tail[row] = base + number * part.width - first
                head[row] = head[row] if prompts else tail[row]
            if part.width:
                pieces.append(_call(backbone, work.ids, part, *_reading(work, prompts, part, recorded)))
            base += len(part.rows) * part.width
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0], head, tail


def _reading(work: Work, prompts: Block | None, part: Block, recorded: Sequence[_Recorder]) -> tuple[Cache | None, torch.Tensor | None]:
    """The cache through which a block of completions sees its prompts, and the mask where those differ in length."""
    if prompts is None:
        return None, None
    device, count = work.ids.device, len(part.rows)
    source = torch.tensor(part.source, device=device) if len(prompts.rows) > 1 else None
    cache = Cache(layers=[_Reader(layer, source, count) for layer in recorded])
    lengths = [work.prompt_lengths[row] for row in part.rows]
    if min(lengths) == prompts.width:
        return cache, None
    real = torch.arange(prompts.width, device=device) < torch.tensor(lengths, device=device)[:, None]
    return cache, torch.cat([real, real.new_ones(count, part.width)], dim=1)


def _call(backbone: Any, ids: torch.Tensor, block: Block, cache: Cache | None = None, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Hidden states of a block, (rows * width, H)."""
    first = torch.tensor(block.first, device=ids.device)[:, None]
    positions = first + torch.arange(block.width, device=ids.device)
    rows = torch.tensor(block.rows, device=ids.device)[:, None]
    tokens = ids[rows, positions.clamp(max=ids.size(1) - 1)]
    states = backbone(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=False)
    hidden: torch.Tensor = states.last_hidden_state
    return hidden.flatten(0, 1)
