"""How much of a known text a row holds: shared n-grams, as evaluation sets are kept out of training data.

GPT-3 took a row for contaminated if it shares one 13-gram of words, lower-cased and without punctuation, with an
evaluation set, and found that the rule also hits long rows that only quote the same source (Brown et al. 2020, arXiv
2005.14165, appendix C). Here the measure is the largest

    share(row, known) = |grams(row) & grams(known)| / |grams(known)|        over the known rows, distinct n-grams

which is 1 for a row that holds a known one whole, however long the row is, and > 0 exactly where GPT-3's rule holds.
Known rows of fewer than n words have no n-gram and are never found this way.

The n-grams of the known rows lie in an open-addressed table, so a row costs one look-up an n-gram.
"""

from __future__ import annotations

import numpy as np

from data_pipelines.jit import jit
from data_pipelines.minhash import Sets

_EMPTY = np.uint64(0)


@jit
def _place(slot: np.ndarray, key: np.uint64) -> int:
    """Where a key is or would be."""
    mask = len(slot) - 1
    at = key & np.uint64(mask)
    while slot[at] != _EMPTY and slot[at] != key:
        at = (at + np.uint64(1)) & np.uint64(mask)
    return int(at)


@jit
def _fill(slot: np.ndarray, number: np.ndarray, key: np.ndarray) -> None:
    for i in range(len(key)):
        at = _place(slot, key[i])
        slot[at] = key[i]
        number[at] = i


@jit
def _best(
    key: np.ndarray, ends: np.ndarray, slot: np.ndarray, number: np.ndarray, first: np.ndarray, owner: np.ndarray, grams: np.ndarray,
    share: np.ndarray, known: np.ndarray,
) -> None:  # fmt: skip
    seen, count = np.zeros(len(first), np.bool_), np.zeros(len(grams), np.int64)
    hits, touched = np.empty(len(first), np.int64), np.empty(len(grams), np.int64)
    start = 0
    for text in range(len(ends)):
        found = rows = 0
        for i in range(start, ends[text]):
            at = _place(slot, key[i])
            gram = number[at]
            if slot[at] == _EMPTY or seen[gram]:
                continue
            seen[gram] = True
            hits[found] = gram
            found += 1
            for j in range(first[gram], first[gram + 1]):
                if count[owner[j]] == 0:
                    touched[rows] = owner[j]
                    rows += 1
                count[owner[j]] += 1
        start = ends[text]
        for i in range(rows):
            here = count[touched[i]] / grams[touched[i]]
            if here > share[text] or (here == share[text] and touched[i] < known[text]):
                share[text], known[text] = here, touched[i]
            count[touched[i]] = 0
        for i in range(found):
            seen[hits[i]] = False


def build(sets: Sets) -> dict[str, np.ndarray]:
    """The table of the known rows' n-grams, as arrays.

    Args:
        sets: distinct n-grams of each known row; a row is known by its place here.
    """
    size = np.diff(sets.end, prepend=0)
    key = np.where(sets.key == _EMPTY, np.uint64(1), sets.key)
    order = np.argsort(key, kind="stable")
    distinct, first = np.unique(key[order], return_index=True)
    slot = np.zeros(1 << max(4, (2 * len(distinct)).bit_length()), np.uint64)
    number = np.zeros(len(slot), np.int64)
    _fill(slot, number, distinct)
    owner = np.repeat(np.arange(len(size)), size)[order]
    return {"slot": slot, "number": number, "first": np.append(first, len(key)).astype(np.int64), "owner": owner, "grams": size}


def shares(rows: Sets, table: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(largest share float64[n], the known row it is of int64[n]; 0 and -1 where none is shared).

    Args:
        rows: n-grams of each row, repeats allowed.
        table: of `build`. Of known rows with equal shares the first is named.
    """
    share, known = np.zeros(len(rows.end)), np.full(len(rows.end), -1, np.int64)
    key = np.where(rows.key == _EMPTY, np.uint64(1), rows.key)
    _best(key, rows.end, table["slot"], table["number"], table["first"], table["owner"], table["grams"], share, known)
    return share, known
