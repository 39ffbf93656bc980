"""The clean pass and the noisy passes in one call of the model.

`add_noisy_forward(model, injector)` lets `model(noisy=work)` run a `Work` inside one call of the model as it is wrapped (DDP,
peft, autocast); other calls are as before, and without noise. The batch is repeated K times, at the input, or, where the
model allows it, only behind the first noisy layer (`shared`). Logits are taken where a token is predicted, in tiles.

Whether a model's layers before the noise can be shared is found out on the model itself, see `sharing_problem`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.errors import ConfigError
from posttrain.losses.noisefit import Head
from posttrain.models.rng import preserved_rng
from posttrain.trainers._grpo_forward import head_shape
from posttrain.trainers._noisefit_noise import Injector, Operator, Work, repeated, segments_of

LIMITS = {torch.float64: 1e-8, torch.float32: 1e-3}
COARSE = 0.05
"""Largest difference of hidden states over their size: rounding stays far below, a wrong mask or position far above."""


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The decoder layers of a causal language model, first to last.

    Raises:
        ConfigError: there are not as many as its config says.
    """
    found: list[torch.nn.Module] = [module for module in model.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    count = model.config.get_text_config().num_hidden_layers
    if len(found) != count:
        raise ConfigError(
            f"{type(model).__name__}: found {len(found)} decoder layers, its config has {count}", where="noise", fix="use method: sft"
        )
    return found


def add_noisy_forward(model: Any, injector: Injector) -> None:
    """Lets a causal language model run a `Work`: `model(noisy=work)` gives what `work.score` makes of its hidden states."""
    before = model.forward

    @functools.wraps(before)
    def forward(self: Any, *args: Any, noisy: Work | None = None, **kwargs: Any) -> Any:
        injector.work = noisy
        return before(*args, **kwargs) if noisy is None else _run(self, noisy)

    model.forward = types.MethodType(forward, model)


def _run(model: Any, work: Work) -> Any:
    rows, copies = len(work.inputs["input_ids"]), work.copies
    inputs = work.inputs if work.share else {name: repeated(name, value, rows, copies) for name, value in work.inputs.items()}
    states = model.base_model(**inputs, use_cache=False).last_hidden_state
    if len(states) != copies * rows:
        raise ConfigError(f"{type(model).__name__} gave {len(states)} rows for {copies} passes of {rows}", where="noise.share_prefix")
    chosen = states.unflatten(0, (copies, rows)).flatten(1, 2).index_select(1, work.places)
    return work.score(chosen, head_of(model))


def head_of(model: Any) -> Head:
    """The output head; gathered from its shards under FSDP2.

    Raises:
        ConfigError: its weights lie with other processes (ZeRO-3).
    """
    output = model.get_output_embeddings()
    if hasattr(output.weight, "ds_id"):
        raise ConfigError("noisefit does not run with weights sharded by ZeRO-3", where="launch.config", fix="use ZeRO-2 or DDP")
    weight, bias = (_whole(value) for value in (output.weight, getattr(output, "bias", None)))
    return Head(weight, bias, **head_shape(model.config.get_text_config()))


def _whole(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _keep(hidden: torch.Tensor, _: Head) -> torch.Tensor:
    return hidden


def sharing_problem(model: Any, injector: Injector, vocabulary: int, scales: Mapping[int, float]) -> str:
    """Why the layers up to the first noisy one cannot run once for all passes, or nothing; by trying, on two short rows.

    Args:
        model: with `add_noisy_forward`, as it is wrapped.
        injector: its hooks, installed.
        vocabulary: ids that may be used.
        scales: of the noisy layers.
    """
    work = _trial(injector, vocabulary, scales)
    try:
        with torch.no_grad(), preserved_rng(), evaluating(model):
            apart = model(noisy=work)
            gap = _gap(model(noisy=replace(work, share=True)), apart)
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError, ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    limit = LIMITS.get(apart.dtype, COARSE)
    return f"hidden states differ by {gap:.3g} of their size, limit {limit:g}" if gap > limit else ""


def dropout_before(model: Any, layers: Sequence[torch.nn.Module], first: int) -> str:
    """Name of a module that drops something out before or in layer `first`, or nothing.

    By the modules and not by a trial: the dropout of a new adapter shows only once it has been trained.
    """
    later = {module for layer in layers[first + 1 :] for module in layer.modules()}
    for name, module in model.named_modules():
        shares = [value for key, value in vars(module).items() if "drop" in key and isinstance(value, float)]
        shares += [module.p] if isinstance(module, torch.nn.modules.dropout._DropoutNd) else []
        if module not in later and any(share > 0 for share in shares):
            return name
    return ""


def _gap(left: torch.Tensor, right: torch.Tensor) -> float:
    return ((left - right).norm() / right.norm().clamp(min=1e-12)).item()


def _trial(injector: Injector, vocabulary: int, scales: Mapping[int, float]) -> Work:
    """Two rows of 9 and 6 tokens."""
    device = next(injector.layers[0].parameters()).device
    ids = (torch.arange(18, device=device).view(2, 9) * 7919 + 11) % vocabulary
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    places = mask.flatten().nonzero().flatten()
    return Work(inputs, places, [scales, scales], Operator(), segments_of(inputs, 0, 2), (0, "trial"), False, _keep)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards each as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was in before:
            module.training = was


def forward_units(layers: int, first: int, passes: int, share: bool) -> float:
    """Cost of a step's passes in passes through all layers."""
    shared = (first + 1) / layers if share else 0.0
    return shared + (1 + passes) * (1 - shared)
