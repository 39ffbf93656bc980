"""Features of rows from a causal language model: projected gradients of its loss, or pooled hidden states.

    phi(x) = (1/C) sum_c R grad_theta loss(x; theta_c)        over C checkpoints of one model, R one random projection

(Feng et al. 2025, arXiv 2412.00420, eq. of the gradient embedding; Xia et al. 2024, arXiv 2402.04333 for language models.)
The loss of a row is the mean over its tokens that carry loss, in float32. Which gradient:

    last_layer   the output head's weight. Nothing is propagated back through the model: with the head's input h_t and the
                 loss's gradient g_t at its output, the gradient is sum_t g_t h_t^T.
    lora         the weights of the low-rank adapters, sum_t g_t a_t^T for each of them. A new adapter has B = 0, so the
                 gradient of its A is zero whatever the row: then B's is taken alone, and A is a random map of the inputs by
                 `seed`. A trained adapter gives both.
    full         every weight.

Gradients are projected weight by weight, so no vector of all of them is ever held. Rows one at a time give the same bits
whatever stands beside them; in batches they are sorted by length and padded at the end, where a causal model does not look,
and features are equal up to rounding.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_pipelines.projection import Projector
from posttrain.data.encode import Encoded, encoded
from posttrain.data.prompts import resolve_format
from posttrain.data.rows import place_of, prompt_messages
from posttrain.data.strict_json import RowError
from posttrain.errors import ConfigError, NumericsError
from posttrain.models.load import load_model
from posttrain.models.save import stop_ids

if TYPE_CHECKING:
    from data_pipelines.features import FeaturesConfig
    from posttrain.config.common import DataConfig

HEAD_ROWS = 1 << 22
"""Entries of the output head's gradient made at a time."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """`ids` int64[n, t], padded at the end; `weight` float32[n, t]: 1/tokens where the token carries loss, else 0; `length` int64[n]."""

    ids: Any
    weight: Any
    length: Any


class _ModelFeatures:
    """What features of a causal model share: tokens, batches, and one vector a row."""

    dim: int

    def __init__(self, cfg: FeaturesConfig, loss_on: str) -> None:
        self.cfg, self.loss_on = cfg, loss_on
        self.notes: Counter[str] = Counter()

    def __call__(self, rows: Sequence[Row]) -> np.ndarray:
        """float32[n, dim]; zeros for a row that has no tokens to learn from, counted in `notes`."""
        sequences = [self._tokens(row) for row in rows]
        out = np.zeros((len(rows), self.dim), np.float32)
        usable = [i for i, sequence in enumerate(sequences) if sequence is not None]
        for index in batches(usable, [len(s.input_ids) if s else 0 for s in sequences], self.cfg.batch):
            with exact_arithmetic():
                out[index] = self._features([sequences[i] for i in index])
        self._check(out, rows)
        return out

    def _data(self) -> DataConfig:
        from posttrain.config.common import DataConfig

        return DataConfig(format=self.cfg.format, max_length=self.cfg.max_length, loss_on=self.loss_on)  # type: ignore[arg-type]

    def _open(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer, self.data = tokenizer, self._data()
        stops = stop_ids(model, tokenizer)
        self.stops = set(stops if isinstance(stops, list) else [stops] if stops is not None else [])
        self.format = resolve_format(tokenizer, self.data.format)

    def _tokens(self, row: Row) -> Encoded | None:
        try:
            found = encoded(self.tokenizer, trainable(row), self.data, self.format, self.stops)
        except RowError as error:
            self.notes[error.reason] += 1
            return None
        self.notes.update(found.notes)
        return found

    def _features(self, sequences: list[Any]) -> np.ndarray:
        raise AssertionError("a subclass gives the features")

    def _check(self, out: np.ndarray, rows: Sequence[Row]) -> None:
        bad = np.flatnonzero(~np.isfinite(out).all(axis=1))
        if bad.size:
            fix = "look at the row, or use a model whose loss on it is finite"
            raise NumericsError("the features of a row are not finite", where=place_of(rows[int(bad[0])]), fix=fix)


class GradientFeatures(_ModelFeatures):
    """float32[n, dim] projected gradients, the mean over the checkpoints.

    Args:
        models: checkpoints of one model, as `load_model` takes them; all are kept in memory.
        cfg: which gradient, and the projection.

    Raises:
        ConfigError: no checkpoint, checkpoints with other parameters, or none to take gradients of.
        NumericsError: a gradient that is not finite.
    """

    def __init__(self, models: Sequence[Any], cfg: FeaturesConfig) -> None:
        super().__init__(cfg, cfg.loss_on)
        self.dim = cfg.dim
        self.checkpoints = [Checkpoint(model, cfg) for model in models]
        _same_parameters(self.checkpoints)
        first = self.checkpoints[0]
        self._open(first.tokenizer, first.model)
        self.projector = Projector(first.size, cfg.dim, cfg.projection, cfg.seed, cfg.nonzeros)
        self.factor = (cfg.dim / first.size) ** 0.5 if cfg.scale == "trak" else 1.0

    def _features(self, sequences: list[Any]) -> np.ndarray:
        total = np.zeros((len(sequences), self.dim))
        for checkpoint in self.checkpoints:
            batch = _padded(sequences, checkpoint.device)
            sums = self.projector.zeros(len(sequences), None if checkpoint.device.type == "cpu" else checkpoint.device)
            for offset, values in checkpoint.gradients(batch):
                self.projector.add(sums, values.numpy() if isinstance(sums, np.ndarray) else values, offset)
            found = self.projector.finish(sums).astype(np.float64) * self.factor
            if self.cfg.normalise:
                norm = np.linalg.norm(found, axis=1, keepdims=True)
                found /= np.where(norm > 0, norm, 1)
            total += found
        out: np.ndarray = (total / len(self.checkpoints)).astype(np.float32)
        return out


class Checkpoint:
    """One model, ready to give per-row gradients.

    Args:
        ref: as `load_model` takes it.
        cfg: which gradient.

    Attributes:
        names: parameters in the order of the gradient's coordinates; `shapes` likewise; `size` is their number of coordinates.
    """

    def __init__(self, ref: Any, cfg: FeaturesConfig) -> None:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        loaded = load_model(ref, dtype="float32", merge=cfg.params != "lora")
        self.model, self.tokenizer, self.params = loaded.model, loaded.tokenizer, cfg.params
        if cfg.params == "lora":
            fresh = loaded.kind != "adapter"
            self.model = _new_adapter(self.model, cfg) if fresh else self.model
            self._linears = _adapter_layers(self.model, fresh)
            parameters = [(f"{name}.weight", layer.weight) for name, layer in self._linears]
        elif cfg.params == "last_layer":
            self.model.requires_grad_(False)
            self.head = self.model.get_output_embeddings()
            parameters = [] if self.head is None else [("head.weight", self.head.weight)]
        else:
            self.model.requires_grad_(True)
            parameters = list(self.model.named_parameters())
        if not parameters:
            fix = "take gradients of `params: full` or `last_layer`, or name other `lora.targets`"
            raise ConfigError(f"the model has no parameters for `params: {cfg.params}`", where="features.params", fix=fix)
        self.model.eval()
        self.names = [name for name, _ in parameters]
        self.shapes = [tuple(parameter.shape) for _, parameter in parameters]
        self.size = sum(parameter.numel() for _, parameter in parameters)

    @property
    def device(self) -> Any:
        """Where the model is."""
        return next(self.model.parameters()).device

    def gradients(self, batch: Batch) -> Iterator[tuple[int, Any]]:
        """(offset, float32[n, m]) pieces of the rows' gradients, in the order of the coordinates; between them they are all."""
        if self.params == "full":
            return self._full(batch)
        return self._head(batch) if self.params == "last_layer" else self._adapters(batch)

    def _head(self, batch: Batch) -> Iterator[tuple[int, Any]]:
        """sum_t g_t h_t^T, some rows of the head at a time."""
        held: list[tuple[Any, Any]] = []

        def cut(_: Any, given: Any, output: Any) -> Any:
            held.append((given[0].detach(), output.detach().requires_grad_()))
            return held[-1][1]

        hook = self.head.register_forward_hook(cut)
        try:
            loss = weighted_loss(self.model(input_ids=batch.ids, use_cache=False).logits, batch)
        finally:
            hook.remove()
        ((hidden, output),) = held
        (slope,) = torch.autograd.grad(loss, [output])
        width = hidden.shape[-1]
        step = max(1, HEAD_ROWS // (width * len(batch.ids)))
        for start in range(0, slope.shape[-1], step):
            piece = slope[:, :, start : start + step].transpose(1, 2) @ hidden
            yield start * width, piece.reshape(len(batch.ids), -1)

    def _adapters(self, batch: Batch) -> Iterator[tuple[int, Any]]:
        """sum_t g_t a_t^T of every adapter matrix; a layer that is used several times adds up."""
        held: dict[str, list[tuple[Any, Any]]] = {name: [] for name, _ in self._linears}

        def keep(name: str) -> Any:
            return lambda _, given, output: held[name].append((given[0], output))

        hooks = [layer.register_forward_hook(keep(name)) for name, layer in self._linears]
        try:
            loss = weighted_loss(self.model(input_ids=batch.ids, use_cache=False).logits, batch)
        finally:
            for hook in hooks:
                hook.remove()
        slopes = iter(torch.autograd.grad(loss, [output for uses in held.values() for _, output in uses], allow_unused=True))
        offset, n = 0, len(batch.ids)
        for name, layer in self._linears:
            total = torch.zeros(n, layer.weight.numel(), device=batch.ids.device)
            for given, _ in held[name]:
                slope = next(slopes)
                if slope is not None:
                    total = total + (
                        slope.reshape(n, -1, slope.shape[-1]).transpose(1, 2) @ given.detach().reshape(n, -1, given.shape[-1])
                    ).flatten(1)
            yield offset, total
            offset += total.shape[1]

    def _full(self, batch: Batch) -> Iterator[tuple[int, Any]]:
        """Every parameter: plain differentiation of one row, `torch.func` over several."""
        parameters = dict(self.model.named_parameters())
        if len(batch.ids) == 1:
            loss = weighted_loss(self.model(input_ids=batch.ids, use_cache=False).logits, batch)
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            slopes = {name: None if g is None else g[None] for name, g in zip(parameters, found, strict=True)}
        else:
            slopes = self._mapped(parameters, batch)
        offset = 0
        for name, parameter in parameters.items():
            slope = slopes.pop(name)
            if slope is not None:
                yield offset, slope.reshape(len(batch.ids), -1)
            offset += parameter.numel()

    def _mapped(self, parameters: dict[str, Any], batch: Batch) -> dict[str, Any]:
        from torch.func import functional_call, grad, vmap
        from torch.nn.attention import SDPBackend, sdpa_kernel

        detached = {name: parameter.detach() for name, parameter in parameters.items()}
        buffers = dict(self.model.named_buffers())

        def loss(weights: dict[str, Any], ids: Any, weight: Any) -> Any:
            output = functional_call(self.model, (weights, buffers), (), {"input_ids": ids[None], "use_cache": False})
            return weighted_loss(output.logits, Batch(ids[None], weight[None], None))

        with sdpa_kernel(SDPBackend.MATH):
            found: dict[str, Any] = vmap(grad(loss), in_dims=(None, 0, 0))(detached, batch.ids, batch.weight)
        return found


class HiddenFeatures(_ModelFeatures):
    """float32[n, hidden size] pooled hidden states of a causal model.

    `position` weighs token i of T by i / (1 + ... + T), as RDS+ does (Ivison et al. 2025, arXiv 2503.01807): under causal
    attention the later tokens have seen more of the row.

    Args:
        model: as `load_model` takes it.
        cfg: pooling and layer.
    """

    def __init__(self, model: Any, cfg: FeaturesConfig) -> None:
        super().__init__(cfg, "all")
        loaded = load_model(model, dtype="float32")
        self.model = loaded.model
        self._open(loaded.tokenizer, loaded.model)
        layers = self.model.config.get_text_config().num_hidden_layers
        if not -layers - 1 <= cfg.layer <= layers:
            raise ConfigError(
                f"layer {cfg.layer} of a model with {layers}", where="features.layer", fix=f"0 to {layers}, or -1 for the last"
            )
        self.dim = int(self.model.config.get_text_config().hidden_size)

    def _features(self, sequences: list[Any]) -> np.ndarray:
        batch = _padded(sequences, next(self.model.parameters()).device)
        last = self.cfg.layer == -1
        with torch.no_grad():
            output = self.model.base_model(input_ids=batch.ids, use_cache=False, output_hidden_states=not last)
        states = (output.last_hidden_state if last else output.hidden_states[self.cfg.layer]).double()
        place = torch.arange(1, batch.ids.shape[1] + 1, device=batch.ids.device)
        weight = (place[None] <= batch.length[:, None]).double()
        weight = weight * place if self.cfg.pooling == "position" else weight
        pooled = (states * (weight / weight.sum(1, keepdim=True))[:, :, None]).sum(1)
        out: np.ndarray = pooled.float().cpu().numpy()
        return out


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """float32 products without TF32, attention written out, and algorithms that give the same bits twice; then as before."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not torch.cuda.is_available():
        yield
        return
    precision, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def weighted_loss(logits: Any, batch: Batch) -> Any:
    """Sum over rows of their mean next-token cross-entropy over the tokens that carry loss; a scalar."""
    from torch.nn.functional import cross_entropy

    targets = batch.ids[:, 1:]
    loss = cross_entropy(logits[:, :-1].flatten(0, 1).to(batch.weight.dtype), targets.flatten(), reduction="none")
    return (loss * batch.weight[:, 1:].flatten()).sum()


def trainable(row: Row) -> Row:
    """The row as something to learn: a preference row as its chosen answer; others as they are."""
    if "chosen" not in row:
        return row
    chosen = row["chosen"]
    turns = chosen if isinstance(chosen, list) else [{"role": "assistant", "content": chosen}]
    return {"messages": [*prompt_messages(row), *turns], **{name: row[name] for name in ("tools", "id", "weight") if name in row}}


def batches(usable: list[int], lengths: list[int], size: int) -> Iterator[list[int]]:
    """Row numbers in batches; sorted by length where there are several in a batch."""
    order = sorted(usable, key=lambda i: (lengths[i], i)) if size > 1 else usable
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _padded(sequences: list[Encoded], device: Any) -> Batch:
    width = max(len(s.input_ids) for s in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    weight = torch.zeros(len(sequences), width)
    for i, sequence in enumerate(sequences):
        n = len(sequence.input_ids)
        ids[i, :n] = torch.as_tensor(sequence.input_ids)
        weight[i, 1:n] = torch.as_tensor(sequence.loss_mask[1:]).float() / sequence.supervised
    length = torch.tensor([len(s.input_ids) for s in sequences])
    return Batch(ids.to(device), weight.to(device), length.to(device))


def _same_parameters(checkpoints: list[Checkpoint]) -> None:
    if not checkpoints:
        raise ConfigError(
            "features from gradients need a model", where="in.model", fix="set `model.id`, or name models in the port `model`"
        )
    first = checkpoints[0]
    for number, other in enumerate(checkpoints[1:], 2):
        if (other.names, other.shapes) != (first.names, first.shapes):
            message = f"checkpoint {number} has other parameters than the first ({other.size} against {first.size})"
            fix = "give checkpoints of one training run: all adapters of one shape, or all whole models"
            raise ConfigError(message, where="in.model", fix=fix)


def _new_adapter(model: Any, cfg: FeaturesConfig) -> Any:
    """A PeftModel whose A matrices depend on `cfg.seed` only."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=cfg.lora.r, lora_alpha=cfg.lora.alpha, target_modules=cfg.lora.targets, task_type="CAUSAL_LM")
    try:
        with torch.random.fork_rng():
            torch.manual_seed(cfg.seed)
            return get_peft_model(model, lora)
    except ValueError as error:
        raise ConfigError(
            str(error).splitlines()[0], where="features.lora.targets", fix="name modules of the model, or `all-linear`"
        ) from None


def _adapter_layers(model: Any, fresh: bool) -> list[tuple[str, Any]]:
    """(name, linear layer) of the adapter matrices whose gradient says something."""
    wanted = ("lora_B",) if fresh else ("lora_A", "lora_B")
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(f".{part}." in name for part in wanted)
    ]
