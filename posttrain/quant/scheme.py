"""Which linear layers are quantized, decided from names and shapes alone (no torch).

Serving engines fuse q, k, v and gate, up into one matrix, so the members of such a group get one scheme: leaving one out
leaves all out. The output layer and the embeddings stay as they are, since many loaders cannot read them otherwise and
tied weights would come apart; so do the routers of mixtures of experts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import QuantError

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "fc2", "dense_4h_to_h")
ROUTER = re.compile(r".*(\.|^)(mlp|block_sparse_moe|feed_forward)\.(gate|router)$|.*\.shared_expert_gate$")
LINEAR = re.compile(r"(?!.*\.experts\.).*(_proj|\.fc[12])\.weight$")
USUAL_GROUPS = (256, 128, 64, 32, 16, 8)


@dataclass(frozen=True)
class Scheme:
    """Layers and how they are quantized.

    Args:
        layers: name -> (out, in) of each layer that is quantized.
        dense: names of the linear layers that stay as they are.
        notes: what was decided beyond the config, for a person.
    """

    layers: dict[str, tuple[int, int]]
    dense: tuple[str, ...]
    notes: tuple[str, ...]


def plan_scheme(
    shapes: Mapping[str, tuple[int, int]],
    *,
    group_size: int | None,
    ignore: tuple[str, ...] | list[str] = (),
    output: str = "lm_head",
    outside: frozenset[str] = frozenset(),
) -> Scheme:
    """Chooses the layers.

    Args:
        shapes: name -> (out, in) of every linear layer of the model.
        group_size: columns a group, or -1; None where layers have their own (`own_groups`).
        ignore: full names, last parts of names (`down_proj`, `layers.0.mlp.up_proj`), or `re:` and a regular expression.
        output: name of the output layer.
        outside: layers that are not quantized whatever their name.

    Raises:
        QuantError: an `ignore` entry that fits nothing, nothing left to quantize, or a group size that does not divide a layer.
    """
    kept = _ignored(shapes, ignore)
    spread = _whole_groups(shapes, kept)
    notes = [f"{name} stays dense because {why} is fused with it when served" for name, why in sorted(spread.items())]
    routers = {name for name in shapes if ROUTER.match(name)}
    dense = kept | set(spread) | routers | ({output} & set(shapes)) | outside
    layers = {name: shape for name, shape in shapes.items() if name not in dense}
    notes.append(f"output layer {output} and embeddings stay as they are" + (f"; so do {len(routers)} routers" if routers else ""))
    if not layers:
        raise QuantError("no linear layer is left to quantize", where="ignore", fix="shorten `ignore`")
    if group_size is None:
        return Scheme(layers, tuple(sorted(dense)), tuple(notes))
    check_groups(layers, group_size)
    return Scheme(layers, tuple(sorted(dense)), (*notes, parallel_note(layers, group_size)))


def own_groups(layers: Mapping[str, tuple[int, int]], group_size: int) -> tuple[dict[str, int], list[str]]:
    """(layer name -> group size, notes): the one asked for where it divides the layer's inputs, else the largest usual one below it
    that does, else one scale a row. Layers that are fused when served have the same inputs, hence the same size."""
    found: dict[str, int] = {}
    odd: dict[tuple[int, int], list[str]] = {}
    for name, (_, columns) in layers.items():
        found[name] = group_size
        if group_size != -1 and columns % group_size:
            found[name] = next((size for size in USUAL_GROUPS if size < group_size and columns % size == 0), -1)
            odd.setdefault((columns, found[name]), []).append(name)
    return found, [
        f"group_size {group_size} does not divide {columns} inputs: {len(names)} layers (first {names[0]}) use "
        + (f"{size}" if size != -1 else "one scale a row")
        for (columns, size), names in odd.items()
    ]


def check_groups(layers: Mapping[str, tuple[int, int]], group_size: int) -> None:
    """Refuses a group size that does not divide the input size of each layer.

    Raises:
        QuantError: the layer, its size, and the group sizes that would work for all layers.
    """
    odd = {name: shape for name, shape in layers.items() if group_size != -1 and shape[1] % group_size}
    if odd:
        name, shape = next(iter(odd.items()))
        fits = [size for size in USUAL_GROUPS if all(columns % size == 0 for _, columns in layers.values())]
        sizes = ", ".join(map(str, [*fits, -1]))
        raise QuantError(
            f"group_size {group_size} does not divide the {shape[1]} input features of {name} ({len(odd)} such layers)",
            where="group_size",
            fix=f"use one of {sizes} (-1 is one group a row), or name the layer in `ignore`",
        )


def check_experts(names: list[str]) -> None:
    """Refuses a mixture of experts: transformers holds its experts as one tensor, and cannot read such a checkpoint back.

    Raises:
        QuantError: `names`, the experts' tensors, are not empty.
    """
    if names:
        raise QuantError(
            f"experts of a mixture are stacked tensors, which transformers does not read in packed form ({len(names)}, first {names[0]})",
            where="in.model",
            fix="use quantize.gptq or quantize.apiq, with export.format: dequantized or with ignore: ['re:.*experts.*']",
        )


def check_stored(folder: Path, group_size: int | None, ignore: tuple[str, ...] | list[str] = (), *, experts: bool = False) -> None:
    """`check_groups` on a model folder, from the headers of its weight files alone.

    Only layers that are linear by their name are looked at; stacked experts are none.

    Raises:
        QuantError: as `check_groups`.
        ArtifactError: a damaged folder.
    """
    from posttrain.models.check import read_header, weight_files

    entries = {name: entry["shape"] for file in weight_files(folder) for name, entry in read_header(file).items()}
    if not experts:
        check_experts([name for name in entries if ".experts." in name])
    shapes = {
        name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in entries.items() if LINEAR.match(name) and len(shape) == 2
    }
    kept = {name for name in shapes if any(_fits(name, entry) for entry in ignore)}
    dense = kept | set(_whole_groups(shapes, kept))
    if group_size is not None:
        check_groups({name: shape for name, shape in shapes.items() if name not in dense}, group_size)


def parallel_note(layers: Mapping[str, tuple[int, int]], group_size: int | Mapping[str, int]) -> str:
    """Which tensor-parallel sizes can serve these groups: a layer cut along its input must keep whole groups."""
    sizes = {name: group_size if isinstance(group_size, int) else group_size[name] for name in layers}
    cut = [(shape[1], max(sizes[name], 1)) for name, shape in layers.items() if name.endswith(ROW_PARALLEL)]
    fits = [tp for tp in (1, 2, 4, 8) if all(columns % (tp * size) == 0 for columns, size in cut)]
    return f"tensor-parallel sizes that keep whole groups: {', '.join(map(str, fits))}"


def engines(
    bits: int | Iterable[int], symmetric: bool, *, dense_layout: bool = True, format: str = "compressed-tensors"
) -> dict[str, bool]:
    """Which engines load a checkpoint of these widths; `transformers` means without further packages."""
    widths = {bits} if isinstance(bits, int) else set(bits)
    if format == "dequantized":
        return {"transformers": True, "vllm": True, "vllm-cpu": True}
    if format == "gptq":
        return {"transformers": False, "vllm": symmetric and widths <= {4, 8}, "vllm-cpu": symmetric and widths == {4}}
    if format == "awq":
        return {"transformers": False, "vllm": widths == {4}, "vllm-cpu": widths == {4}}
    odd = bool(widths - {2, 4, 8})
    return {"transformers": True, "vllm": not odd or dense_layout, "vllm-cpu": widths == {4}}


def _ignored(shapes: Mapping[str, tuple[int, int]], ignore: tuple[str, ...] | list[str]) -> set[str]:
    found: set[str] = set()
    for entry in ignore:
        hits = {name for name in shapes if _fits(name, entry)}
        if not hits and entry != "lm_head":
            near = difflib.get_close_matches(entry, {*shapes, *(name.rpartition(".")[2] for name in shapes)}, n=1, cutoff=0.4)
            raise QuantError(
                f"`{entry}` fits no linear layer",
                where="ignore",
                fix=f"did you mean `{near[0]}`?" if near else "see the layer names in the model's index",
            )
        found |= hits
    return found


def _fits(name: str, entry: str) -> bool:
    if entry.startswith("re:"):
        try:
            return re.fullmatch(entry[3:], name) is not None
        except re.error as error:
            raise QuantError(f"`{entry}` is no regular expression: {error}", where="ignore", fix="correct the expression") from None
    return name == entry or name.endswith("." + entry)


def _whole_groups(shapes: Mapping[str, tuple[int, int]], kept: set[str]) -> dict[str, str]:
    """Further names that must stay dense -> the ignored member of their group."""
    spread: dict[str, str] = {}
    for name in kept:
        stem, _, last = name.rpartition(".")
        for group in FUSED:
            if last in group:
                spread |= {f"{stem}.{other}": name for other in group if f"{stem}.{other}" in shapes and f"{stem}.{other}" not in kept}
    return spread
