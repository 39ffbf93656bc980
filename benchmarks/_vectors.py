"""Vectors of a corpus' rows for the selectors that compare vectors, made once and kept by row id.

svd        TF-IDF of words, reduced to 128 coordinates by a singular value decomposition of raw and target rows
gradients  projected gradients of the loss of a small Qwen2 that was trained on raw rows (`_lm.Transformer`)
minilm     sentence embeddings of all-MiniLM-L6-v2 (extra `embed`), the first 128 tokens of a row
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _corpus import SALAD, WORD, Corpus, Row

KINDS = ("svd", "gradients", "minilm")
AT_ONCE = 500
"""Rows between two saves of the slow kinds."""
PROXY_STEPS = 2000
DIMENSIONS = 128


def vectors(kind: str, corpus: Corpus, cache: Path) -> dict[str, np.ndarray]:
    """Row id -> float32[d], of raw and target rows.

    Args:
        kind: see the module.
        corpus: with or without salad rows.
        cache: folder of what is slow to make, shared by corpora; a call that was interrupted goes on.
    """
    rows = [*corpus.raw, *corpus.target]
    if kind == "svd":
        return dict(zip((row["id"] for row in rows), _svd([row["text"] for row in rows]), strict=True))
    known = _load(cache / f"{kind}.npz")
    missing = [row for row in rows if row["id"] not in known]
    maker = _maker(kind, corpus, cache) if missing else None
    for at in range(0, len(missing), AT_ONCE):
        part = missing[at : at + AT_ONCE]
        known.update(zip((row["id"] for row in part), maker(part), strict=True))
        _save(cache / f"{kind}.npz", known)
    return {row["id"]: known[row["id"]] for row in rows}


def _svd(texts: list[str]) -> np.ndarray:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    matrix = TfidfVectorizer(token_pattern=WORD.pattern, sublinear_tf=True, min_df=2, max_features=50_000).fit_transform(texts)
    found: np.ndarray = TruncatedSVD(min(DIMENSIONS, matrix.shape[1] - 1), random_state=0).fit_transform(matrix)
    return found.astype(np.float32)


def _maker(kind: str, corpus: Corpus, cache: Path) -> Callable[[list[Row]], np.ndarray]:
    from data_pipelines.door import model_ref
    from data_pipelines.features import FeaturesConfig, feature_maker

    if kind == "minilm":
        return feature_maker(FeaturesConfig.model_validate({"from": "embedder", "max_length": 128}), {})
    spec = {"from": "gradients", "params": "full", "dim": 256, "max_length": 256}
    return feature_maker(FeaturesConfig.model_validate(spec), {"model": [model_ref(proxy(corpus, cache))]})


def proxy(corpus: Corpus, cache: Path) -> Path:
    """Folder of the small model whose gradients are taken; trained on raw rows of the first corpus that asks."""
    from _lm import Transformer

    folder = cache / "proxy"
    if not folder.exists():
        texts = [row["text"] for row in corpus.raw if row["label"] != SALAD]
        judge = Transformer(texts, steps=PROXY_STEPS)
        new = cache / f"proxy.{os.getpid()}"
        judge.save(judge.train(texts, seed=0), new)
        os.replace(new, folder)
    return folder


def _load(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as found:
        return dict(zip(found["ids"].tolist(), found["vectors"], strict=True))


def _save(path: Path, known: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(partial, ids=np.array(list(known)), vectors=np.stack(list(known.values())))
    os.replace(partial, path)


def write(folder: Path, corpus: Corpus, kind: str, found: dict[str, np.ndarray], shards: int = 4) -> dict[str, list[Path]]:
    """`raw-*.parquet` and `target.parquet`, the vectors in the column `vector`; returns the files of each."""
    folder.mkdir(parents=True, exist_ok=True)
    size = max(1, -(-len(corpus.raw) // shards))
    files: dict[str, list[Path]] = {"raw": [], "target": []}
    for at in range(0, len(corpus.raw), size):
        files["raw"].append(_parquet(folder / f"raw-{at // size:04d}.parquet", corpus.raw[at : at + size], found))
    files["target"].append(_parquet(folder / "target.parquet", corpus.target, found))
    return files


def _parquet(path: Path, rows: list[Row], found: dict[str, Any]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [row[name] for row in rows] for name in ("id", "text", "label")}
    pq.write_table(pa.table({**columns, "vector": pa.array([found[row["id"]] for row in rows], pa.list_(pa.float32()))}), path)
    return path
