"""Deduplication against rensa and datasketch: MinHash of word 5-grams, 112 permutations, one process, the same texts.

    text.*      texts -> signatures; the peer gets its 5-grams as Python makes them, by a regular expression and a join
    shingles.*  as `text`, but the peer finds its list of 5-grams ready, while ours begins at the text
    hashes.*    64-bit hashes of the 5-grams -> signatures, both ready
    whole.*     texts -> which rows are copies: 14 bands of 8; ours goes on to verify every pair by its true Jaccard similarity

`quality` counts, over all pairs of the texts by brute force, the rows that have a partner of similarity >= 0.7, and how many
of them each finds, and how many it flags that have none. `stage` is the whole stage over JSON lines, files and all.

    python benchmarks/select_dedup.py [--quick]
"""

from __future__ import annotations

import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import _corpus, _harness
from data_pipelines.clusters import Members, join_bands, resolve
from data_pipelines.minhash import Blob, MinHash, Sets, band_keys, distinct, grams, jaccard

WORD = re.compile(r"\w+|[^\w\s]+")
N, BANDS, ROWS, LEAST = 5, 14, 8, 0.7
PERMUTATIONS = BANDS * ROWS
BATCH = 1024
TIMES = 10
"""Repeats of `hashes`, which is over in milliseconds."""


def corpus(megabytes: float, seed: int) -> list[str]:
    """Chunks of this machine's text, and near copies of a fifth of them with one to forty words changed."""
    texts, draw = _corpus.texts(megabytes, seed), random.Random(seed)
    for text in draw.sample(texts, len(texts) // 5):
        words = text.split(" ")
        for _ in range(draw.choice([1, 2, 5, 10, 20, 40])):
            words[draw.randrange(len(words))] = "changed"
        texts.append(" ".join(words))
    draw.shuffle(texts)
    return texts


def shingles(text: str) -> list[str]:
    """Word 5-grams as a user of the peers makes them."""
    words = WORD.findall(text.lower())
    return [" ".join(words[i : i + N]) for i in range(max(1, len(words) - N + 1))]


def batches(items: list[Any]) -> list[list[Any]]:
    """The batches that all take their work in."""
    return [items[i : i + BATCH] for i in range(0, len(items), BATCH)]


OURS = MinHash(PERMUTATIONS)


def our_signatures(texts: list[str]) -> list[np.ndarray]:
    """Signatures from texts."""
    return [OURS.sign(grams(Blob(batch).words(), N)) for batch in batches(texts)]


def our_copies(texts: list[str]) -> np.ndarray:
    """bool mask of the rows that go, every one verified."""
    sets = [grams(Blob(batch).words(), N) for batch in batches(texts)]
    keys = np.concatenate([band_keys(OURS.sign(part), BANDS, ROWS) for part in sets], axis=1)
    root = join_bands(lambda band: iter([(keys[band], np.arange(len(texts)))]), BANDS, len(texts))
    size = np.bincount(root, minlength=len(texts))
    rows = np.flatnonzero(size[root] > 1)
    rows = rows[np.argsort(root[rows], kind="stable")]
    begins = np.append(np.flatnonzero(np.diff(root[rows], prepend=-1)), len(rows))
    found = distinct(grams(Blob([texts[i] for i in rows]).words(), N))
    verdict = resolve(Members(begins, np.zeros(len(rows), bool), keys[:, rows], *found), LEAST, 10_000)
    goes = np.zeros(len(texts), bool)
    goes[rows[verdict.kept != np.arange(len(rows))]] = True
    return goes


def rensa_signatures(lists: list[list[str]]) -> list[Any]:
    """Its bulk call, the fastest of its exact MinHash."""
    import rensa

    return [rensa.RMinHash.digest_matrix_from_token_sets(batch, PERMUTATIONS, 1) for batch in batches(lists)]


def rensa_flags(texts: list[str]) -> list[bool]:
    """Rows that share a band with another, nothing verified."""
    import rensa

    matrix = rensa.RMinHash.digest_matrix_from_token_sets([shingles(text) for text in texts], PERMUTATIONS, 1)
    return list(rensa.RMinHashLSH(LEAST, PERMUTATIONS, BANDS).query_duplicate_flags_matrix_one_shot(matrix))


def datasketch_signatures(lists: list[list[str]]) -> list[Any]:
    """Its bulk call."""
    import datasketch

    return datasketch.MinHash.bulk([[s.encode() for s in one] for one in lists], num_perm=PERMUTATIONS, seed=1)


def datasketch_flags(texts: list[str]) -> list[bool]:
    """Rows that share a band with another, nothing verified."""
    import datasketch

    signatures = datasketch_signatures([shingles(text) for text in texts])
    index = datasketch.MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, ROWS))
    for i, signature in enumerate(signatures):
        index.insert(i, signature)
    return [len(index.query(signature)) > 1 for signature in signatures]


def quality(texts: list[str]) -> dict[str, Any]:
    """Rows with a partner of similarity >= 0.7, by all pairs, and what each finds of them."""
    sets = distinct(grams(Blob(texts).words(), N))
    parts = np.split(sets.key, sets.end[:-1])
    partner, between = np.zeros(len(texts), bool), np.zeros(len(texts), bool)
    for i, one in enumerate(parts):
        for j in range(i):
            if jaccard(one, parts[j], LEAST) >= 0:
                partner[i] = partner[j] = True
    copies = our_copies(texts)
    record: dict[str, Any] = {"rows": len(texts), "rows_with_a_partner": int(partner.sum()), "ours_removed": int(copies.sum())}
    record["ours_removed_without_a_partner"] = int((copies & ~partner).sum())
    pairs_left = np.flatnonzero(~copies & partner).tolist()
    for a in pairs_left:
        for b in pairs_left:
            between[a] |= a != b and jaccard(parts[a], parts[b], LEAST) >= 0
    record["ours_rows_left_with_a_partner_left"] = int(between.sum())
    for name, flags in (("rensa", rensa_flags(texts)), ("datasketch", datasketch_flags(texts))):
        mask = np.array(flags)
        record[name] = {
            "flagged": int(mask.sum()),
            "flagged_without_a_partner": int((mask & ~partner).sum()),
            "missed": int((partner & ~mask).sum()),
        }
    return record


def stage(texts: list[str]) -> dict[str, Any]:
    """CPU seconds of the stage over JSON lines on disk, and its megabytes of text a second."""
    import json

    from data_pipelines.dedup import dedup

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps({"text": text, "id": str(i)}) + "\n" for i, text in enumerate(texts)), encoding="utf-8")
        dedup(path, Path(folder) / "warm", suffix=".jsonl")
        cpu = time.process_time()
        summary = dedup(path, Path(folder) / "out", suffix=".jsonl")
        cpu = time.process_time() - cpu
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    return {"cpu_s": cpu, "mb_s": size / 1e6 / cpu, "rows_in": summary["rows_in"], "removed": summary["removed"]}


def main() -> None:
    """Measures all parts and writes the record."""
    import rensa

    args = _harness.arguments(__doc__ or "")
    texts = corpus(0.5 if args.quick else 3.0, seed=0)
    few = texts[: len(texts) // (2 if args.quick else 6)]
    lists, few_lists = [shingles(text) for text in texts], [shingles(text) for text in few]
    keys: list[Sets] = [grams(Blob(batch).words(), N) for batch in batches(texts)]
    offsets = [np.concatenate([[0], part.end]).astype(np.uint64) for part in keys]
    assert [len(set(one)) for one in lists] == np.diff(distinct(grams(Blob(texts).words(), N)).end, prepend=0).tolist()

    def rensa_hashes() -> None:
        for part, offset in list(zip(keys, offsets, strict=True)) * TIMES:
            rensa.RMinHash.digest_matrix_from_flat_token_hashes(part.key, offset, PERMUTATIONS, 1)

    pairs = 3 if args.quick else 20
    arms: dict[str, tuple[Any, Any]] = {
        "text.rensa": (lambda: rensa_signatures([shingles(text) for text in texts]), lambda: our_signatures(texts)),
        "text.datasketch": (lambda: datasketch_signatures([shingles(text) for text in few]), lambda: our_signatures(few)),
        "shingles.rensa": (lambda: rensa_signatures(lists), lambda: our_signatures(texts)),
        "shingles.datasketch": (lambda: datasketch_signatures(few_lists), lambda: our_signatures(few)),
        "hashes.rensa": (rensa_hashes, lambda: [OURS.sign(part) for part in keys * TIMES]),
        "whole.rensa": (lambda: rensa_flags(texts), lambda: our_copies(texts)),
        "whole.datasketch": (lambda: datasketch_flags(few), lambda: our_copies(few)),
    }
    parts = {name: _harness.speed(_harness.compare(peer, ours, pairs=pairs, warmup=1)) for name, (peer, ours) in arms.items()}
    size = {"texts": len(texts), "mb": sum(map(len, texts)) / 1e6, "texts_datasketch": len(few), "mb_datasketch": sum(map(len, few)) / 1e6}
    more = {"size": size, "quality": quality(few if args.quick else texts), "stage": stage(texts)}
    _harness.finish("select_dedup", {**parts["text.rensa"], "parts": parts, **more}, args)


if __name__ == "__main__":
    main()
