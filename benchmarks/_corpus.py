"""A labelled corpus for selector benchmarks, built from the text that any machine with Python has; no network, no hub.

    label       what                                                       first source, then what tops it up where it is missing
    docstring   docstrings of installed packages (what should be picked)   site-packages
    code        function bodies without their docstrings                   site-packages, then the standard library
    copyright   licence texts                                              /usr/share/doc, then licence files of site-packages
    man         manual pages in roff                                       /usr/share/man, then texts (.rst, .txt, .md) of site-packages
    changelog   changelogs                                                 /usr/share/doc, then package metadata of site-packages
    header      C headers                                                  Python's, numpy's and others' include folders
    salad       independent draws from the words of the target             -

The target and the held-out rows are docstrings of the standard library, a source that no raw row comes from. Every row is a
chunk of 100 to 400 words (`\\w+|[^\\w\\s]+`) and no text comes twice. The same seed, sizes and machine give the same corpus,
another seed another draw of files and chunks; `Corpus.sources` says how many rows each source has given.
"""

from __future__ import annotations

import ast
import functools
import gzip
import hashlib
import json
import math
import os
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Row = dict[str, str]
Finder = Callable[[int], Iterator[tuple[str, str]]]

WORD = re.compile(r"\w+|[^\w\s]+")
SHORTEST, LONGEST = 100, 400
"""Words of a chunk."""
RELEVANT = "docstring"
SALAD = "salad"
SIZES = {
    "docstring": 2000, "code": 4000, "copyright": 1500, "man": 2000, "changelog": 1500, "header": 1000, "salad": 1000,
    "target": 400, "heldout": 400,
}  # fmt: skip
PER_FILE = 8
"""Chunks of one file at most, so that no file dominates."""
PER_PACKAGE = 0.1
"""Share of a label's rows that one installed package gives at most."""
MOST_BYTES = 1 << 21
"""Longer files are left out."""
DOC, MAN = Path("/usr/share/doc"), Path("/usr/share/man")
_NOT_STDLIB = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "ensurepip"}
_OURS = {"posttrain", "data_pipelines"}
_RECIPE = 1
"""Raised when the same seed and sizes would give other rows; old caches are then not read."""


@dataclass(frozen=True)
class Corpus:
    """Rows {id, text, label}; `raw` is shuffled.

    Args:
        seed, sizes: as given to `build`.
        raw: what to select from.
        target: standard-library docstrings for the selector.
        heldout: others of the same source, for the judge.
        sources: label -> source -> rows.
    """

    seed: int
    sizes: dict[str, int]
    raw: list[Row]
    target: list[Row]
    heldout: list[Row]
    sources: dict[str, dict[str, int]]

    def without(self, label: str) -> Corpus:
        """The same corpus without the raw rows of one label."""
        return Corpus(self.seed, self.sizes, [row for row in self.raw if row["label"] != label], self.target, self.heldout, self.sources)


def scaled(factor: float) -> dict[str, int]:
    """`SIZES` times `factor`, at least one row each."""
    return {label: max(1, round(size * factor)) for label, size in SIZES.items()}


def build(seed: int = 0, sizes: dict[str, int] | None = None, cache: Path | str | None = None) -> Corpus:
    """The corpus of a seed; under a minute at full size.

    Args:
        seed: draws files, chunks and the split of the target.
        sizes: rows by label, and `target` and `heldout`; labels that are not named have none. Default: `SIZES`.
        cache: folder to keep corpora in; it notices when packages or documents are installed.

    Raises:
        RuntimeError: a label that no source on this machine has.
    """
    sizes = dict(SIZES if sizes is None else sizes)
    kept = Path(cache) / f"corpus-{_hash(_RECIPE, seed, sorted(sizes.items()), _machine_stamp())[:16]}.json" if cache else None
    if kept and kept.exists():
        return Corpus(**json.loads(kept.read_text(encoding="utf-8")))
    corpus = _build(seed, sizes)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(corpus)), encoding="utf-8")
        os.replace(partial, kept)
    return corpus


def _build(seed: int, sizes: dict[str, int]) -> Corpus:
    seen: set[bytes] = set()
    sources: dict[str, dict[str, int]] = {}

    def take(label: str, wanted: int, finders: list[Finder]) -> list[Row]:
        rows, sources[label] = _take(label, wanted, finders, seed, seen)
        return rows

    wanted = sizes.get("target", 0) + sizes.get("heldout", 0)
    ours = take("target", wanted, [_stdlib_docstrings]) if wanted else []
    cut = math.ceil(len(ours) * sizes.get("target", 0) / wanted) if wanted else 0
    target, heldout = ours[:cut], ours[cut:]
    raw = [row for label in _FINDERS if sizes.get(label) for row in take(label, sizes[label], _FINDERS[label])]
    if sizes.get(SALAD):
        raw += _salad(target, sizes[SALAD], seed)
        sources[SALAD] = {"words of the target": sizes[SALAD]}
    raw.sort(key=lambda row: _hash(seed, "raw", row["id"]))
    return Corpus(seed, sizes, raw, target, heldout, sources)


def _take(label: str, wanted: int, finders: list[Finder], seed: int, seen: set[bytes]) -> tuple[list[Row], dict[str, int]]:
    """`wanted` rows whose text was not seen before, and how many each finder gave, by its docstring."""
    rows: list[Row] = []
    counts: Counter[str] = Counter()
    for finder in finders:
        groups: Counter[str] = Counter()
        most = max(PER_FILE, int(wanted * PER_PACKAGE))
        for group, text in finder(seed) if len(rows) < wanted else ():
            digest = hashlib.blake2b(" ".join(text.lower().split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if digest in seen or (group and groups[group] >= most):
                continue
            seen.add(digest)
            groups[group] += 1
            counts[str(finder.__doc__)] += 1
            rows.append({"id": f"{label}-{digest.hex()[:16]}", "text": text, "label": label})
            if len(rows) == wanted:
                break
    if not rows:
        raise RuntimeError(f"no text for the label `{label}` on this machine; give it size 0")
    return rows, dict(counts)


def chunks(text: str) -> list[str]:
    """`text` cut after every 400th word, white space kept; a rest below 100 words is dropped."""
    ends = [match.end() for match in WORD.finditer(text)]
    found, start = [], 0
    for at in range(0, len(ends), LONGEST):
        words = min(LONGEST, len(ends) - at)
        end = ends[at + words - 1]
        if words >= SHORTEST:
            found.append(text[start:end].strip())
        start = end
    return found


def _some(texts: Iterable[str], place: str, seed: int) -> list[str]:
    """At most PER_FILE chunks of a file's texts, drawn by hash."""
    found = [chunk for text in texts for chunk in chunks(text)]
    return sorted(found, key=lambda chunk: _hash(seed, place, chunk))[:PER_FILE]


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "backslashreplace")).hexdigest()


# Files


def _site() -> Path:
    return Path(sysconfig.get_paths()["purelib"])


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


@functools.cache
def _files(root: Path) -> tuple[Path, ...]:
    """Every file below a folder, sorted; links to folders are not followed."""
    found = [Path(folder) / name for folder, _, names in os.walk(root) for name in names]
    return tuple(sorted(found))


def _shuffled(root: Path, wanted: Callable[[Path], bool], seed: int) -> Iterator[tuple[str, Path]]:
    """(first folder, file) of the files below `root` that are `wanted`, in an order of the seed; not this project's."""
    listed = [(file.relative_to(root), file) for file in _files(root) if wanted(file)]
    listed.sort(key=lambda item: _hash(seed, item[0].as_posix()))
    return ((short.parts[0], file) for short, file in listed if short.parts[0] not in _OURS)


def _read(file: Path) -> str:
    """A file's text, unpacked; empty where it is too long, binary or unreadable."""
    try:
        if file.stat().st_size > MOST_BYTES:
            return ""
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, gzip.BadGzipFile):
        return ""
    return "" if b"\0" in data or len(data) > MOST_BYTES else data.decode("utf-8", "replace")


def _whole(root: Path, wanted: Callable[[Path], bool], seed: int) -> Iterator[tuple[str, str]]:
    for group, file in _shuffled(root, wanted, seed):
        yield from ((group, chunk) for chunk in _some([_read(file)], str(file), seed))


def _parsed(root: Path, texts: Callable[[ast.Module], Iterable[str]], seed: int) -> Iterator[tuple[str, str]]:
    """Chunks of what `texts` finds in the Python files below `root`."""
    for group, file in _shuffled(root, lambda file: file.suffix == ".py", seed):
        if not (source := _read(file)):
            continue
        try:
            tree = ast.parse(source)
            yield from ((group, chunk) for chunk in _some(texts(tree), str(file), seed))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, Documented) and (doc := ast.get_docstring(node)):
            yield doc


def _bodies(tree: ast.Module) -> Iterator[str]:
    """Source of each function without its docstring and comments; of methods too, of functions in functions with their outer one."""
    for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        for node in owner.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for inner in ast.walk(node):
                    if isinstance(inner, Documented) and ast.get_docstring(inner, clean=False) is not None:
                        inner.body = inner.body[1:] or [ast.Pass()]
                yield ast.unparse(node)


# Sources; the first line of each docstring is its name in the record


def _stdlib_docstrings(seed: int) -> Iterator[tuple[str, str]]:
    """standard library"""
    found = list(_stdlib(_docstrings, seed))
    found.sort(key=lambda item: _hash(seed, "split", item[1]))
    yield from (("", text) for _, text in found)


def _stdlib(texts: Callable[[ast.Module], Iterable[str]], seed: int) -> Iterator[tuple[str, str]]:
    root = _library()
    for entry in sorted(root.iterdir()):
        if entry.name in _NOT_STDLIB:
            continue
        for file in [entry] if entry.suffix == ".py" else _files(entry) if entry.is_dir() else ():
            if file.suffix == ".py" and not _NOT_STDLIB & set(file.relative_to(root).parts):
                try:
                    tree = ast.parse(_read(file))
                except (SyntaxError, ValueError):
                    continue
                yield from ((entry.stem, chunk) for text in texts(tree) for chunk in chunks(text))


def _site_docstrings(seed: int) -> Iterator[tuple[str, str]]:
    """site-packages"""
    return _parsed(_site(), _docstrings, seed)


def _site_code(seed: int) -> Iterator[tuple[str, str]]:
    """site-packages"""
    return _parsed(_site(), _bodies, seed)


def _stdlib_code(seed: int) -> Iterator[tuple[str, str]]:
    """standard library"""
    found = sorted(_stdlib(_bodies, seed), key=lambda item: _hash(seed, "code", item[1]))
    yield from (("", text) for _, text in found)


def _doc_copyright(seed: int) -> Iterator[tuple[str, str]]:
    """/usr/share/doc"""
    return _whole(DOC, lambda file: file.name == "copyright", seed)


def _site_licences(seed: int) -> Iterator[tuple[str, str]]:
    """licence files of site-packages"""
    return _whole(_site(), lambda file: bool(re.match(r"licen[cs]e|copying|notice", file.name, re.I)) and file.suffix != ".py", seed)


def _man_pages(seed: int) -> Iterator[tuple[str, str]]:
    """/usr/share/man"""
    return _whole(MAN, lambda file: bool(re.fullmatch(r"man\d", file.parent.name)), seed)


def _site_texts(seed: int) -> Iterator[tuple[str, str]]:
    """texts of site-packages"""
    return _whole(_site(), lambda file: file.suffix in (".rst", ".txt", ".md"), seed)


def _doc_changelogs(seed: int) -> Iterator[tuple[str, str]]:
    """/usr/share/doc"""
    return _whole(DOC, lambda file: bool(re.match(r"changelog|changes|news", file.name, re.I)), seed)


def _site_metadata(seed: int) -> Iterator[tuple[str, str]]:
    """package metadata of site-packages"""
    return _whole(_site(), lambda file: file.name == "METADATA", seed)


def _headers(seed: int) -> Iterator[tuple[str, str]]:
    """include folders"""
    yield from _whole(Path(sysconfig.get_paths()["include"]), lambda file: file.suffix == ".h", seed)
    yield from _whole(_site(), lambda file: file.suffix == ".h", seed)


_FINDERS: dict[str, list[Finder]] = {
    "docstring": [_site_docstrings],
    "code": [_site_code, _stdlib_code],
    "copyright": [_doc_copyright, _site_licences],
    "man": [_man_pages, _site_texts],
    "changelog": [_doc_changelogs, _site_metadata],
    "header": [_headers],
}


def _salad(target: list[Row], count: int, seed: int) -> list[Row]:
    """Rows of independent draws from the words of the target, as frequent as they are there."""
    words = [word for row in target for word in WORD.findall(row["text"])]
    rng = random.Random(f"salad:{seed}")
    texts = [" ".join(rng.choices(words, k=rng.randint(SHORTEST, LONGEST))) for _ in range(count)]
    return [{"id": f"{SALAD}-{seed}-{index}", "text": text, "label": SALAD} for index, text in enumerate(texts)]


def _machine_stamp() -> str:
    """Changes when packages or documents are installed or removed."""
    site = sorted(entry.name for entry in _site().iterdir() if entry.name.endswith(".dist-info") and not entry.name.startswith("posttrain"))
    docs = [sorted(os.listdir(root)) if root.exists() else [] for root in (DOC, MAN)]
    return _hash(site, docs, sysconfig.get_python_version())


# Files and plain texts out of it


def write(folder: Path | str, corpus: Corpus, shards: int = 4) -> dict[str, list[Path]]:
    """Writes `raw-*.jsonl.zst`, `target.jsonl.zst` and `heldout.jsonl.zst`; returns the files of each."""
    import zstandard

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    size = max(1, math.ceil(len(corpus.raw) / shards))
    parts = {f"raw-{i:04d}": corpus.raw[i * size : (i + 1) * size] for i in range(shards)}
    written: dict[str, list[Path]] = {"raw": [], "target": [], "heldout": []}
    for name, rows in {**parts, "target": corpus.target, "heldout": corpus.heldout}.items():
        if not rows:
            continue
        path = folder / f"{name}.jsonl.zst"
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(zstandard.ZstdCompressor(level=3).compress(lines.encode()))
        written[name.partition("-")[0]].append(path)
    return written


def texts(megabytes: float, seed: int = 0) -> list[str]:
    """At least so many megabytes (10^6 bytes of UTF-8) of chunks of Python files and documents, for benchmarks of speed.

    Raises:
        RuntimeError: this machine has less text.
    """
    found: list[str] = []
    size = 0
    for root, suffixes in ((_site(), (".py", ".h", ".txt", ".md", ".rst")), (DOC, (".gz", "")), (MAN, (".gz",))):
        for _, file in _shuffled(root, lambda file, suffixes=suffixes: file.suffix in suffixes, seed):
            for chunk in chunks(_read(file)):
                found.append(chunk)
                size += len(chunk.encode("utf-8", "surrogatepass"))
                if size >= megabytes * 1e6:
                    return found
    raise RuntimeError(f"asked for {megabytes} MB of text, this machine has {size / 1e6:.0f}")
