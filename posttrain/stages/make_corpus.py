"""`make.stdlib`: real text that every machine with Python has, the sources and docstrings of its standard library.

`code` rows are the source of one function or class (a class too long for a row gives its methods instead, so no text
comes twice); `docstrings` rows are the cleaned docstring of a module, class or function. Rows outside
[min_chars, max_chars] and exact duplicates are left out and counted. Order is by hash, so each shard is a fair mixture;
the text depends on the Python version, which the manifest names.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import sys
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain.config.base import Positive
from posttrain.config.common import SplitConfig, StageConfig
from posttrain.core.registry import stage
from posttrain.errors import DataError

if TYPE_CHECKING:
    from posttrain.core.context import StageContext

SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "ensurepip", "lib-dynload"}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class MakeStdlibConfig(StageConfig):
    """Which modules and texts become rows."""

    method: Literal["make.stdlib"] = "make.stdlib"
    """Method name."""
    parts: Annotated[list[Literal["code", "docstrings"]], Field(min_length=1)] = ["code", "docstrings"]
    """Kinds of text."""
    modules: list[str] = []
    """Top-level module names to take, e.g. `[statistics, fractions]`; empty takes all."""
    exclude_modules: list[str] = []
    """Top-level module names to leave out."""
    min_chars: Positive = 80
    """Shortest text in characters."""
    max_chars: Positive = 2000
    """Longest text in characters."""
    max_rows: Positive | None = None
    """At most this many rows, chosen by hash; none = all."""
    shards: Positive = 1
    """Number of shard files."""
    split: SplitConfig = SplitConfig()
    """Held-out shares of the rows."""

    @field_validator("modules", "exclude_modules")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in sys.stdlib_module_names:
                near = difflib.get_close_matches(name, sys.stdlib_module_names, n=1)
                hint = f"; did you mean `{near[0]}`?" if near else ""
                raise ValueError(f"`{name}` is no top-level standard-library module{hint}")
        return names

    @model_validator(mode="after")
    def _some_length(self) -> MakeStdlibConfig:
        if self.min_chars > self.max_chars:
            raise ValueError(f"min_chars {self.min_chars} exceeds max_chars {self.max_chars}")
        return self


@stage("make.stdlib", config=MakeStdlibConfig, output="dataset", rows="text", estimate=lambda cfg: {"seconds": 10.0, "disk_bytes": 6e6})
def run(cfg: MakeStdlibConfig, ctx: StageContext) -> None:
    """Writes the rows; see the module docstring."""
    from posttrain.data.dataset import write_dataset

    files = stdlib_files(cfg.modules, cfg.exclude_modules)
    rows, dropped = _collect(cfg, ctx, files)
    if not rows:
        raise DataError(
            f"no text of {cfg.min_chars} to {cfg.max_chars} characters in {len(files)} source files",
            where=f"stages.{ctx.name}",
            fix="widen `modules`, `min_chars` or `max_chars`",
        )
    rows.sort(key=lambda row: hashlib.sha256(f"{ctx.seed}/{row['id']}".encode()).digest())
    rows = rows[: cfg.max_rows]
    facts = write_dataset(rows, ctx.out, "text", rows_per_shard=-(-len(rows) // cfg.shards))
    ctx.meta.update(row_type="text", rows=facts["rows"], split=cfg.split.dump(), python=sys.version.split()[0])
    ctx.summary.update(rows_out=facts["rows"], files=len(files), characters=sum(len(r["text"]) for r in rows), left_out=dropped)
    ctx.events.log(f"{facts['rows']} rows from {len(files)} standard-library files; left out {dropped}")


def stdlib_files(modules: list[str], exclude: list[str]) -> list[tuple[str, Path]]:
    """(dotted module name, file) of the standard library's sources, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for entry in root.iterdir():
        top = entry.stem if entry.suffix == ".py" else entry.name
        if top not in sys.stdlib_module_names or top in SKIPPED or top in exclude or (modules and top not in modules):
            continue
        for file in [entry] if entry.suffix == ".py" else entry.rglob("*.py"):
            parts = file.relative_to(root).with_suffix("").parts
            if not SKIPPED & set(parts):
                found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), file))
    return sorted(found)


def _collect(cfg: MakeStdlibConfig, ctx: StageContext, files: list[tuple[str, Path]]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    rows: list[dict[str, Any]] = []
    seen: set[bytes] = set()
    dropped = {"too short": 0, "too long": 0, "duplicate": 0, "unreadable file": 0}
    for done, (module, file) in enumerate(files, 1):
        try:
            found = list(texts_of(module, file, cfg.parts, cfg.max_chars))
        except (SyntaxError, UnicodeDecodeError, OSError):
            dropped["unreadable file"] += 1
            continue
        for row in found:
            reason = _reason(row["text"], cfg, seen)
            if reason:
                dropped[reason] += 1
            else:
                rows.append(row)
        ctx.events.progress("read the standard library", done, len(files), "files", rows=len(rows))
    return rows, dropped


def _reason(text: str, cfg: MakeStdlibConfig, seen: set[bytes]) -> str | None:
    if len(text) < cfg.min_chars:
        return "too short"
    if len(text) > cfg.max_chars:
        return "too long"
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    if digest in seen:
        return "duplicate"
    seen.add(digest)
    return None


def texts_of(module: str, file: Path, parts: Sequence[str], max_chars: int) -> Iterator[dict[str, Any]]:
    """Rows {id, text, module, part} of one source file; classes longer than `max_chars` are opened up."""
    with tokenize.open(file) as handle:
        source = handle.read()
    tree, lines = ast.parse(source), source.splitlines()
    if "code" in parts:
        for name, node in _definitions(tree, lines, max_chars):
            yield _row(module, f"{name}:{node.lineno}", "code", _source(node, lines))
    if "docstrings" in parts:
        documented: list[tuple[str, ast.Module | Definition]] = [("", tree), *_named(tree)]
        for name, owner in documented:
            if doc := ast.get_docstring(owner):
                yield _row(module, f"{name}:{getattr(owner, 'lineno', 0)}", "docstrings", doc.strip())


def _row(module: str, place: str, part: str, text: str) -> dict[str, Any]:
    return {"id": f"{module}:{place}:{part}", "text": text, "module": module, "part": part}


def _named(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition):
            yield prefix + node.name, node
            yield from _named(node, f"{prefix}{node.name}.")


def _definitions(tree: ast.AST, lines: list[str], max_chars: int, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, Definition):
            continue
        if isinstance(node, ast.ClassDef) and len(_source(node, lines)) > max_chars:
            yield from _definitions(node, lines, max_chars, f"{prefix}{node.name}.")
        else:
            yield prefix + node.name, node


def _source(node: Definition, lines: list[str]) -> str:
    first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
    indent = node.col_offset
    cut = [line[indent:] if not line[:indent].strip() else line for line in lines[first - 1 : node.end_lineno]]
    return "\n".join(cut).strip()
