"""Looking into config classes: which fields a dotted path may have, and which one was probably meant."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo

SYNONYMS = {
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "scheduler": "optim.schedule",
    "warmup_ratio": "optim.warmup",
    "warmup_steps": "optim.warmup",
    "optimizer": "optim.name",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_epsilon": "optim.eps",
    "grad_clip": "optim.max_grad_norm",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "batch_size": "batch.rows",
    "train_batch_size": "batch.rows",
    "per_device_train_batch_size": "batch.per_device",
    "gradient_accumulation_steps": "batch.rows",
    "logging_steps": "log_every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "eval.every",
    "max_seq_length": "data.max_length",
    "max_new_tokens": "max_tokens",
    "num_generations": "group",
    "dataset": "in.data",
    "datasets": "in.data",
    "inputs": "in",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "use_dora": "lora.dora",
    "use_rslora": "lora.rslora",
    "load_in_4bit": "lora.load_in_4bit",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attn",
    "model_name_or_path": "model.id",
    "type": "method",
    "dataset_path": "path",
    "split_ratio": "split.validation",
}
"""Names of other tools -> ours; offered where the class has the target."""


def alternatives(annotation: Any) -> list[Any]:
    """The branches of a union, without `Annotated` and None; a plain type is its own only branch."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return alternatives(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [b for a in typing.get_args(annotation) if a is not type(None) for b in alternatives(a)]
    return [annotation]


def models(annotation: Any) -> list[type[BaseModel]]:
    """Config classes among the branches."""
    return [a for a in alternatives(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]


def fields_of(config: type[BaseModel]) -> dict[str, FieldInfo]:
    """Fields by the name written in YAML."""
    return {f.alias or name: f for name, f in config.model_fields.items()}


def known_fields(config: type[BaseModel]) -> dict[str, str]:
    """Field name as written in YAML -> its documentation."""
    return {name: f.description or "" for name, f in fields_of(config).items()}


def annotations_at(annotation: Any, path: Iterable[str | int]) -> list[Any]:
    """Annotations that the value at `path` may have; empty for a path that does not exist."""
    found = alternatives(annotation)
    for part in path:
        found = [b for a in found for step in _step(a, part) for b in alternatives(step)]
    return found


def _step(annotation: Any, part: str | int) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = fields_of(annotation).get(str(part)) or annotation.model_fields.get(str(part))
        return [field.annotation] if field else []
    args = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin in (list, tuple, set) and isinstance(part, int):
        return [args[0]] if args else []
    if origin is dict and isinstance(part, str):
        return [args[1]]
    return []


SHORT_BLOCKS = ("budget", "filters")
"""Blocks whose fields may stand alone on a command line and in a call: `rows=500` is `budget.rows=500`."""


def short_form(config: type[BaseModel], key: str) -> str:
    """`BLOCK.KEY` where exactly one of SHORT_BLOCKS has such a field and `config` itself has none, else `key`."""
    blocks = [block for block in SHORT_BLOCKS if annotations_at(config, (block, key))]
    return f"{blocks[0]}.{key}" if len(blocks) == 1 and key not in fields_of(config) else key


def field_at(annotation: Any, path: tuple[str | int, ...]) -> FieldInfo | None:
    """The field that `path` ends in."""
    for parent in annotations_at(annotation, path[:-1]) if path else []:
        if isinstance(parent, type) and issubclass(parent, BaseModel):
            return fields_of(parent).get(str(path[-1]))
    return None


def nested_fields(config: type[BaseModel], prefix: str = "", depth: int = 3) -> Iterator[tuple[str, str]]:
    """(field name, dotted path) of all fields of the blocks inside `config`, outermost first."""
    inner = []
    for name, field in fields_of(config).items():
        path = f"{prefix}{name}"
        if prefix:
            yield name, path
        inner += [(m, path) for m in models(field.annotation)]
    for model, path in inner if depth > 1 else []:
        yield from nested_fields(model, path + ".", depth - 1)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that was probably meant, or None; hyphens and case do not count."""
    by_plain = {_plain(k): k for k in known}
    plain = _plain(name)
    if plain in by_plain:
        return by_plain[plain]
    found = difflib.get_close_matches(plain, by_plain, n=1, cutoff=cutoff)
    return by_plain[found[0]] if found else None


def _synonym(name: str, config: type[BaseModel], here: tuple[str | int, ...]) -> str | None:
    target = SYNONYMS.get(_plain(name), "")
    block, _, field = target.rpartition(".")
    if block and here[-1:] == (block,) and field in fields_of(config):
        return field
    return target if target and annotations_at(config, target.split(".")) else None


def _elsewhere(name: str, root: type[BaseModel], here: tuple[str | int, ...]) -> str | None:
    """Dotted path, below `root`, of a field of this very name in another block; blocks around `here` come first."""
    outer = [here[:n] for n in range(len(here) - 1, -1, -1)]
    for above in outer:
        for annotation in annotations_at(root, above):
            if isinstance(annotation, type) and issubclass(annotation, BaseModel) and name in fields_of(annotation):
                return ".".join(str(p) for p in (*above, name))
    for start in [here, *outer]:
        for model in [a for a in annotations_at(root, start) if isinstance(a, type) and issubclass(a, BaseModel)]:
            for field, path in nested_fields(model):
                if field == name:
                    return ".".join([*(str(p) for p in start), path])
    return None


def suggest(key: str, root: type[BaseModel], here: tuple[str | int, ...], where: str, other_level: Iterable[str] = ()) -> str:
    """What to do about an unknown key.

    Args:
        key: as written.
        root: class of the stage (or of the whole pipeline).
        here: path of the block that holds the key, below `root`.
        where: dotted path of `root` in the file, with a trailing dot, or empty.
        other_level: top-level keys of the file where `root` is a stage, else keys of stages.
    """
    level = [a for a in annotations_at(root, here) if isinstance(a, type) and issubclass(a, BaseModel)]
    known = {name: None for model in level for name in fields_of(model)}
    same = {_plain(k): k for k in known}.get(_plain(key))
    if same:
        return f"write `{same}`"
    for model in level:
        target = _synonym(key, model, here)
        if target:
            return f"it is called `{target}` here"
    other = _elsewhere(_plain(key), root, here)
    if other:
        block, _, name = other.rpartition(".")
        return (
            f"`{name}` belongs under `{where}{block}`"
            if block
            else f"`{name}` belongs directly under `{where.rstrip('.') or 'the top level'}`"
        )
    if _plain(key) in other_level and not here:
        return f"`{_plain(key)}` belongs {'at the top level of the file' if where else 'inside a stage'}"
    near = nearest(key, known)
    if near:
        return f"did you mean `{near}`?"
    inner = dict(pair for model in level for pair in reversed(list(nested_fields(model))))
    near = nearest(key, inner, cutoff=0.75)
    if near:
        return f"did you mean `{where}{'.'.join([*map(str, here), inner[near]])}`?"
    return f"known keys: {', '.join(known)}" if known else "remove it"
