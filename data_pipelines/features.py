"""What a row looks like to a selector that compares vectors: gradients, hidden states, sentence embeddings, or a column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.base import Positive, Strict
from posttrain.config.lora import LoraConfig

if TYPE_CHECKING:
    import numpy as np

    from data_pipelines.selector import FeatureMaker
    from posttrain.core.artifact import InputRef

Row = dict[str, Any]

FIELDS = {
    "gradients": (
        "params", "lora", "projection", "dim", "nonzeros", "scale", "normalise", "seed", "format", "loss_on", "max_length", "batch",
    ),
    "hidden": ("layer", "pooling", "format", "max_length", "batch"),
    "embedder": ("max_length", "batch"),
    "column": ("column",),
}  # fmt: skip
"""Fields of FeaturesConfig by `from`."""


class FeaturesConfig(Strict):
    """Vectors of rows. Fields of another `from` than the one given must keep their defaults."""

    from_: Literal["gradients", "hidden", "embedder", "column"] = Field(default="gradients", alias="from")
    """`gradients`: projected gradients of a causal model's loss, port `model` (one or several checkpoints); `hidden`: its pooled hidden
    states; `embedder`: a sentence-embedding model, port `embedder`, else the packaged all-MiniLM-L6-v2 (extra `embed`); `column`: a
    list of numbers that the rows carry."""
    column: str | None = None
    """Name of the column."""
    params: Literal["lora", "last_layer", "full"] = "lora"
    """Weights whose gradients are taken. `lora`: of the port's adapters, or of a new one (its B matrices); `last_layer`: the output
    head, for which nothing is propagated back; `full`: all."""
    lora: LoraConfig = LoraConfig()
    """The new adapter, where the port gives whole models."""
    projection: Literal["sparse", "rademacher"] = "sparse"
    """`sparse`: a count sketch; `rademacher`: dense signs as in the paper, dim / nonzeros times the work."""
    dim: Positive = 2048
    """Coordinates after the projection."""
    nonzeros: Annotated[int, Field(ge=1, le=64)] = 4
    """Places of one gradient coordinate under `sparse`; more spread concentrated gradients better."""
    scale: Literal["norm", "trak"] = "norm"
    """`norm`: norms are kept; `trak`: signs divided by the root of the number of parameters, as published. Matters only to an
    absolute `whiten_eps`."""
    normalise: bool = False
    """Bring each checkpoint's projected gradient to unit length before they are averaged, as LESS does."""
    layer: int = -1
    """Hidden layer: 0 is the embedding, -1 the last."""
    pooling: Literal["mean", "position"] = "position"
    """Weights of the tokens: equal, or growing with their place as in RDS+."""
    format: Literal["auto", "chat", "plain"] = "auto"
    """How prompts are rendered; see `data.format` of a trainer."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Tokens whose loss is differentiated in rows with a prompt; text rows always carry loss everywhere."""
    max_length: Positive = 1024
    """Tokens of a row that are read; longer rows are cut and counted. An embedder's own limit holds too."""
    batch: Positive = 1
    """Rows in one pass of the model. 1: a row's vector has the same bits whatever stands beside it, so the pick does not depend on
    how the rows are cut into shards. More is faster on a GPU, and equal up to float32 rounding."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the projection and of a new adapter."""

    @model_validator(mode="after")
    def _fields_of_the_kind(self) -> FeaturesConfig:
        fields = type(self).model_fields
        others = self.model_fields_set - {"from_", *FIELDS[self.from_]}
        stray = sorted(name for name in others if getattr(self, name) != fields[name].default)
        if stray:
            raise ValueError(f"`{stray[0]}` means nothing with `from: {self.from_}`; its fields: {', '.join(FIELDS[self.from_])}")
        if self.from_ == "column" and not self.column:
            raise ValueError("`from: column` needs `column`, the name of the rows' column of numbers")
        return self


def feature_key(cfg: FeaturesConfig) -> dict[str, Any]:
    """JSON-ready: `from` and its fields, all that the vectors depend on besides the models."""
    dumped = cfg.dump()
    return {"from": cfg.from_, **{name: dumped[name] for name in FIELDS[cfg.from_]}}


def feature_maker(cfg: FeaturesConfig, inputs: Mapping[str, Sequence[InputRef | Any]]) -> FeatureMaker:
    """rows -> float32[n, d]; loads its model here, once. Its attribute `notes` counts what befell rows (cut, without text, ...).

    Args:
        cfg: which vectors.
        inputs: port -> references; `model` and `embedder` are read.

    Raises:
        ConfigError: a port is empty, or the extra `embed` is missing.
    """
    if cfg.from_ == "column":
        return ColumnFeatures(str(cfg.column))
    if cfg.from_ == "embedder":
        return EmbedderFeatures(list(inputs.get("embedder", ())), cfg)
    from data_pipelines.gradients import GradientFeatures, HiddenFeatures
    from posttrain.errors import ConfigError

    models = list(inputs.get("model", ()))
    if not models or (cfg.from_ == "hidden" and len(models) > 1):
        need = "a model" if not models else f"one model, got {len(models)}"
        fix = "set `model.id` at the top level, or name a model in the port `model`"
        raise ConfigError(f"features from {cfg.from_} need {need}", where="in.model", fix=fix)
    return GradientFeatures(models, cfg) if cfg.from_ == "gradients" else HiddenFeatures(models[0], cfg)


class ColumnFeatures:
    """float32[n, d] of a column of numbers; all rows must have as many as the first.

    Raises:
        DataError: no such column, not a list of finite numbers, or another length; names the row.
    """

    def __init__(self, column: str) -> None:
        self.column, self.dim = column, 0
        self.notes: Counter[str] = Counter()

    def __call__(self, rows: Sequence[Row]) -> np.ndarray:
        import numpy as np

        found = [self._vector(row) for row in rows]
        return np.stack(found) if found else np.zeros((0, self.dim), np.float32)

    def _vector(self, row: Row) -> np.ndarray:
        import numpy as np

        value = row.get(self.column)
        numbers = isinstance(value, list) and value and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)
        if not numbers:
            what = f"of {type(value).__name__}" if self.column in row else "missing"
            raise self._error(row, f"the column `{self.column}` is {what}, expected a list of numbers")
        with np.errstate(over="ignore"):
            vector = np.array(value, np.float32)
        if not np.isfinite(vector).all():
            raise self._error(row, f"the column `{self.column}` holds a number that is not finite in float32")
        self.dim = self.dim or len(vector)
        if len(vector) != self.dim:
            raise self._error(row, f"the column `{self.column}` has {len(vector)} numbers, other rows have {self.dim}")
        return vector

    def _error(self, row: Row, message: str) -> Exception:
        from posttrain.data.rows import place_of
        from posttrain.errors import DataError

        return DataError(message, where=place_of(row), fix="write the vectors of all rows by one model, or use `from: embedder`")


class EmbedderFeatures:
    """float32[n, d] sentence embeddings of unit length; zeros for a row without text.

    Args:
        models: at most one, as `load_encoder` takes it; the packaged model where there is none.
        cfg: `max_length` and `batch`.
    """

    def __init__(self, models: Sequence[Any], cfg: FeaturesConfig) -> None:
        from posttrain.errors import ConfigError
        from posttrain.models.encoder import PACKAGED, load_encoder

        if len(models) > 1:
            raise ConfigError(f"features from an embedder need one model, got {len(models)}", where="in.embedder", fix="name one")
        self.loaded = load_encoder(models[0] if models else PACKAGED)
        self.dim, self.batch = self.loaded.dim, cfg.batch
        self.limit = min(cfg.max_length, self.loaded.max_length)
        self.notes: Counter[str] = Counter()

    def __call__(self, rows: Sequence[Row]) -> np.ndarray:
        import numpy as np

        from data_pipelines.gradients import batches, exact_arithmetic
        from posttrain.data.rows import row_text

        out = np.zeros((len(rows), self.dim), np.float32)
        ids = [self._tokens(row_text(row)) for row in rows]
        for index in batches([i for i, found in enumerate(ids) if found], [len(found) for found in ids], self.batch):
            with exact_arithmetic():
                out[index] = self._embed([ids[i] for i in index])
        return out

    def _tokens(self, text: str) -> list[int]:
        if not text.strip():
            self.notes["without text"] += 1
            return []
        found = list(self.loaded.tokenizer(text, verbose=False)["input_ids"])
        if len(found) > self.limit:
            self.notes["cut at max_length"] += 1
            found = list(self.loaded.tokenizer(text, truncation=True, max_length=self.limit)["input_ids"])
        return found

    def _embed(self, sequences: list[list[int]]) -> np.ndarray:
        import torch

        model = self.loaded.model
        width, device = max(map(len, sequences)), next(model.parameters()).device
        ids = torch.full((len(sequences), width), self.loaded.tokenizer.pad_token_id or 0, dtype=torch.long)
        seen = torch.zeros_like(ids)
        for i, sequence in enumerate(sequences):
            ids[i, : len(sequence)], seen[i, : len(sequence)] = torch.as_tensor(sequence), 1
        with torch.no_grad():
            states = model(input_ids=ids.to(device), attention_mask=seen.to(device)).last_hidden_state.double()
        weight = seen.to(device).double()[:, :, None]
        pooled = states[:, 0] if self.loaded.pooling == "cls" else (states * weight).sum(1) / weight.sum(1)
        pooled = pooled / pooled.norm(dim=1, keepdim=True).clamp_min(1e-12)
        out: np.ndarray = pooled.float().cpu().numpy()
        return out
