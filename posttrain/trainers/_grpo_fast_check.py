"""What `fast: on` supports, by fields and by model.

A model is tried when the trainer is built: a few rows of fixed tokens go through TRL's forward pass and through ours, in
both forms (`_grpo_layout.py`).

    plain differs or fails       ConfigError: the model does not run with `fast: on`
    shared differs or fails      rows are forwarded whole, each with its prompt; the log and the events say so, and why

Prompts are not shared either where the shape of the cache forbids it: attention kernels other than sdpa and eager, layers
that are neither full nor sliding attention, and batches wider than the sliding window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from posttrain.errors import ConfigError
from posttrain.trainers._grpo_config import fast_problem
from posttrain.trainers._grpo_forward import PromptsNotShared, Work
from posttrain.trainers._grpo_layout import lay_out, spans_of

KERNELS = ("sdpa", "eager")
LAYERS = ("full_attention", "sliding_attention")
PROMPTS, LENGTHS = (5, 5, 5, 2, 2), (4, 1, 3, 5, 2)
LIMITS = {torch.float64: 1e-4, torch.float32: 1e-3}
COARSE = 0.1
"""Largest mean difference of log-probabilities: rounding stays far below, a prompt that is not seen far above."""


@dataclass(frozen=True)
class Form:
    """How a model's rows are forwarded.

    Args:
        share_within: columns of the widest batch whose prompts are shared; 0 is none, inf any.
        reason: why not in every batch, or empty.
    """

    share_within: float
    reason: str


def find_form(trainer: Any, trl_forward: Callable[..., Any]) -> Form:
    """Tries the trainer's model, and tells the events what was found.

    Args:
        trainer: its model has `add_fast_forward`.
        trl_forward: TRL's `_get_per_token_logps_and_entropies`, bound.

    Raises:
        ConfigError: the trainer's arguments or its model are not supported.
    """
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    problem = fast_problem({**vars(args), "tools": trainer.tools or None})
    if trainer._is_vlm:
        problem = problem or "a model of text and images; fast: on takes text only"
    if trainer.aux_loss_enabled:
        problem = problem or "a mixture of experts with a load-balancing loss; set trl.router_aux_loss_coef: 0, or fast: off"
    if problem:
        raise ConfigError(problem, where="fast")
    batch = _probe(model)
    with _evaluating(model), torch.no_grad():
        wanted = trl_forward(trainer.model, batch["ids"], batch["attention"], batch["mask"].size(1))[0]
    plain = _fault(trainer, batch, wanted, share=False)
    if plain:
        raise ConfigError(f"{type(model).__name__} does not run with our forward pass: {plain}", where="fast", fix="set fast: off")
    form = _shape(model)
    shared = _fault(trainer, batch, wanted, share=True) if form.share_within else ""
    form = Form(0, shared) if shared else form
    if trainer.events is not None:
        limit = "shared in every batch" if form.share_within == math.inf else f"shared in batches of up to {form.share_within} columns"
        trainer.events.log(f"fast: on: prompts of a group are {limit if form.share_within else 'not shared'}" + _because(form.reason))
    return form


def _because(reason: str) -> str:
    return f", because of {reason}" if reason else ""


def _shape(model: Any) -> Form:
    """What the model's configuration allows."""
    config = model.config.get_text_config()
    if config._attn_implementation not in KERNELS:
        return Form(0, f"attn: {config._attn_implementation} (of {' and '.join(KERNELS)})")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= set(LAYERS):
        return Form(0, f"layers of {', '.join(sorted(kinds - set(LAYERS)))}")
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds if getattr(config, "layer_types", None) else getattr(config, "use_sliding_window", True)
    return Form(int(window), "sliding attention") if window and slides else Form(math.inf, "")


def _probe(model: Any) -> dict[str, Any]:
    """Five rows of two prompts, padded as TRL pads them."""
    device, vocab = next(model.parameters()).device, model.get_output_embeddings().weight.size(0)
    width, length = max(PROMPTS), max(LENGTHS)
    ids = (torch.arange(len(PROMPTS) * (width + length), device=device).view(len(PROMPTS), -1) * 7919 + 11) % vocab
    first = [PROMPTS.index(size) for size in PROMPTS]
    ids[:, :width] = ids[first, :width]
    prompts, lengths = (torch.tensor(sizes, device=device)[:, None] for sizes in (PROMPTS, LENGTHS))
    before = torch.arange(width, device=device) >= width - prompts
    mask = torch.arange(length, device=device) < lengths
    return {"ids": ids, "mask": mask, "attention": torch.cat([before, mask], dim=1).long(), "width": width}


def _fault(trainer: Any, batch: Mapping[str, Any], wanted: torch.Tensor, share: bool) -> str:
    """What is wrong with our forward pass in one of its forms, or nothing."""
    model, ids, mask, width = trainer.model, batch["ids"], batch["mask"], batch["width"]
    spans = spans_of(ids[:, :width], batch["attention"][:, :width], mask)
    clusters = lay_out(spans, range(len(PROMPTS)), width, share, 0.0)
    work = Work(ids, mask, PROMPTS, trainer.temperature, still=clusters)
    try:
        with trainer.accelerator.autocast(), torch.no_grad():
            with _evaluating(model):
                found = model(fast=work)[0]
            if share and trainer.args.gradient_checkpointing:
                with _checkpointing(model, trainer.args.gradient_checkpointing_kwargs):
                    model(fast=work)
    except PromptsNotShared as error:
        return str(error) + (" with gradient checkpointing" if trainer.args.gradient_checkpointing else "")
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    gap = ((found - wanted) * mask).abs().sum().item() / mask.sum().item()
    limit = LIMITS.get(next(model.parameters()).dtype, COARSE) if not torch.is_autocast_enabled(ids.device.type) else COARSE
    return "" if gap <= limit else f"log-probabilities differ by {gap:.3g} from TRL's, limit {limit:g}"


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    with _mode(model, training=False):
        yield


@contextmanager
def _checkpointing(model: Any, options: Any) -> Iterator[None]:
    """In training, with gradient checkpointing, which transformers turns on when training starts; the noise of dropout is put back."""
    was = model.is_gradient_checkpointing
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    try:
        with torch.random.fork_rng(), _mode(model, training=True):
            yield
    finally:
        if not was:
            model.gradient_checkpointing_disable()


@contextmanager
def _mode(model: Any, training: bool) -> Iterator[None]:
    """Every module in one mode, and afterwards each as it was."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was in before.items():
            module.training = was
