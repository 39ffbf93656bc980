"""Rollout engine on a transformers model in this process: the live policy during training, or a loaded model.

Requests enter by prompt length into one running batch of at most `max_batch` rows (`posttrain.rollout.running`), free and
constrained ones together. A prompt that several requests share is computed once and its key-value cache expanded. Log-probabilities
are float32 log-softmax values of the sampling distribution, those that a trainer recomputes with the same temperature.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import RolloutError
from posttrain.rollout.base import Completion, Progress, Request
from posttrain.rollout.constraints import Vocabulary
from posttrain.rollout.running import ContinuousBatch
from posttrain.rollout.stopping import end_ids


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

    def batch(self) -> ContinuousBatch:
        """An empty batch on this model, to be driven step by step within `evaluation_mode`.

        Raises:
            RolloutError: the engine is closed.
        """
        if self.model is None:
            raise RolloutError("the engine is closed")
        return ContinuousBatch(
            self.model,
            self.tokenizer,
            max_batch=self.max_batch,
            eos_ids=self.eos_ids,
            vocabulary=self.vocabulary,
            version=self.version,
        )

    def vocabulary(self) -> Vocabulary:
        """The bytes of the tokens, made once."""
        if self._vocabulary is None:
            self._vocabulary = Vocabulary.of(self.tokenizer, self.eos_ids)
        return self._vocabulary

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in the same order.

        Raises:
            RolloutError: an empty prompt, or prompt + max_tokens beyond the model's positions.
            ConfigError: a constrained request asks for what cannot be combined with a constraint.
            NumericsError: the logits are not finite.
        """
        batch, start = self.batch(), time.perf_counter()
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), tuple(requests[i].prompt_ids)))
        numbers = {batch.add(requests[i]): i for i in order}
        done: dict[int, Completion] = {}
        with evaluation_mode(self.model):
            while batch.busy:
                step = batch.step()
                self.tokens += step.drawn
                done.update((numbers[handle], completion) for handle, completion in step.finished)
                if self.progress is not None:
                    self.progress(len(done), len(requests), self.tokens)
        self.seconds += time.perf_counter() - start
        return [done[i] for i in range(len(requests))]

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
