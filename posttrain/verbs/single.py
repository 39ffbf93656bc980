"""`select`, `train`, `generate`, `eval`, `quantize`, `export`: one stage, with ports and fields on the command line.

They build a pipeline of one stage in memory (or read one from a file) and run it like any other, so resuming,
manifests and reports are the same. `model=`, `data=`, `raw=`, `target=` fill ports; a value is a name of the file's
sources, or a path whose row type is read off its first row; `out=` puts a copy of the result there.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from posttrain.config.load import load_yaml, parse_value
from posttrain.config.pipeline import Pipeline, load_pipeline, parse_pipeline
from posttrain.core import registry
from posttrain.core.events import dumps
from posttrain.core.hashing import digest_of
from posttrain.core.rundir import runs_root
from posttrain.errors import ConfigError, DataError

PORTS = ("model", "data", "raw", "target", "calib")
TOP = ("model", "sources", "eval", "tracking", "limits", "seed", "name")
BUDGET = ("rows", "tokens", "share", "bytes")
CONTROL = ("out", "prompt")


def _split(overrides: list[str]) -> dict[str, str]:
    pairs = {}
    for text in overrides:
        key, mark, value = text.partition("=")
        if not mark or not key:
            raise ConfigError(f"expected KEY=VALUE, got `{text}`", where="command line", fix="e.g. bits=4")
        pairs[key.removeprefix("in.") if key.startswith("in.") and key[3:] in PORTS else key] = value
    return pairs


def sniff(path: str, accepted: tuple[str, ...]) -> str:
    """Row type of local shards: the only one the port takes, else what the first row looks like.

    Raises:
        DataError: no rows, or columns of none of the accepted types.
    """
    if len(accepted) == 1:
        return accepted[0]
    from posttrain.core.rundir import read_json
    from posttrain.data.shards import BadRows, expand_shards, read_shard

    folder = Path(path)
    stored = read_json(folder / "dataset.json") if folder.is_dir() else None
    if stored:
        return stored["row_type"]
    row = next((row for shard in expand_shards([path]) for _, row in read_shard(shard, on_bad="skip", bad=BadRows())), None)
    if row is None:
        raise DataError("no row can be read", where=path, fix="give a file with at least one row")
    columns = set(row)
    tests = {"preference": {"chosen", "rejected"}, "messages": {"messages"}, "verifiable": {"prompt", "answer"}, "prompt": {"prompt"}, "text": {"text"}}
    kind = next((k for k, need in tests.items() if need <= columns and (not accepted or k in accepted)), None)
    if kind is None:
        raise DataError(f"the first row has columns {', '.join(sorted(columns))}; expected rows of type {' or '.join(accepted)}", where=path,
                        fix="rename the columns, or write a pipeline file with `sources.NAME.columns`")  # fmt: skip
    return kind


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"`{part}` is not a block", where=dotted, fix="check the dotted path with `posttrain schema`")
    tree[last] = value


def _prompt_file(prompt: str, runs: Path) -> str:
    path = runs / "prompts" / f"{digest_of(prompt)[:16]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps({"id": "prompt", "prompt": prompt}) + "\n", encoding="utf-8")
    return str(path)


def _fill_ports(tree: dict[str, Any], stage: dict[str, Any], pairs: dict[str, str], method: registry.Method) -> None:
    known = set(tree.get("sources", {}))
    for port in PORTS:
        if port not in pairs:
            continue
        value = parse_value(pairs.pop(port))
        if port == "model":
            model = {} if isinstance(tree.get("model"), str) else dict(tree.get("model") or {})
            tree["model"] = {**model, "id": _absolute_model(str(value))}
            continue
        paths = value if isinstance(value, list) else [value]
        names = []
        for i, item in enumerate(map(str, paths)):
            if item.split(":")[0] in known:
                names.append(item)
                continue
            name = port if len(paths) == 1 else f"{port}-{i + 1}"
            where = os.path.abspath(os.path.expanduser(item))
            accepted = method.inputs[port].rows if port in method.inputs else ()
            tree.setdefault("sources", {})[name] = {"kind": sniff(where, accepted), "path": where}
            names.append(name)
        stage.setdefault("in", {})[port] = names if len(names) > 1 else names[0]


def _absolute_model(value: str) -> str:
    if value.startswith("package:") or value.startswith("~") or value.startswith("${"):
        return value
    return os.path.abspath(value) if value.startswith((".", "/")) or os.path.exists(value) else value


def build(method_name: str, overrides: list[str], runs: str | None, tree: dict[str, Any] | None = None) -> tuple[Pipeline, str | None]:
    """A pipeline of one stage out of `KEY=VALUE` pairs; returns it and `out=`."""
    method = registry.method(method_name)
    pairs = _split(overrides)
    out, prompt = (pairs.pop(key, None) for key in CONTROL)
    slug = method_name.replace(".", "-")
    tree = tree or {"version": 1, "name": slug, "seed": 0, "stages": [{"name": slug.split("-")[0], "method": method_name, "in": {}}]}
    stage = tree["stages"][0]
    if prompt is not None:
        pairs["data"] = _prompt_file(prompt, runs_root(runs))
    _fill_ports(tree, stage, pairs, method)
    for key, text in pairs.items():
        head = key.split(".")[0]
        if head in TOP and not (head == "eval" and "eval" in method.config.model_fields and key != "eval"):
            _set(tree, key, parse_value(text))
        elif key in BUDGET and "budget" in method.config.model_fields and key not in method.config.model_fields:
            _set(stage, f"budget.{key}", parse_value(text))
        else:
            _set(stage, key, parse_value(text))
    return parse_pipeline(tree, Path.cwd()), out


def _run(pipeline: Pipeline, out: str | None, args: argparse.Namespace) -> int:
    from posttrain.core.durable import disk_errors
    from posttrain.core.plan import Selection
    from posttrain.core.run import RunOptions, execute, finish

    options = RunOptions(args.runs, Selection(force=tuple(args.force)), args.isolate, args.trust_remote_code, args.quiet)
    target = Path(out).absolute() if out else None
    if target is not None and target.exists() and any(target.iterdir()):
        raise ConfigError("the folder is not empty", where=f"out={out}", fix="name a new folder, or empty this one")
    run, plan = execute(pipeline, dumps(pipeline.dump(), indent=1), options)
    finish(run, plan)
    if target is not None:
        with disk_errors(target):
            shutil.copytree(plan[-1].folder / "out", target, dirs_exist_ok=True)
        print(f"copied to {out}")
    return 0


def select(args: argparse.Namespace) -> int:
    """`posttrain select METHOD raw=... target=... rows=...`."""
    pipeline, out = build(f"select.{args.name.removeprefix('select.')}", args.overrides, args.runs)
    return _run(pipeline, out, args)


def quantize(args: argparse.Namespace) -> int:
    """`posttrain quantize METHOD model=... bits=...`."""
    pipeline, out = build(f"quantize.{args.name.removeprefix('quantize.')}", args.overrides, args.runs)
    return _run(pipeline, out, args)


def generate(args: argparse.Namespace) -> int:
    """`posttrain generate model=... prompt=... | data=...`."""
    pipeline, out = build("generate", args.overrides, args.runs)
    return _run(pipeline, out, args)


def eval(args: argparse.Namespace) -> int:  # noqa: A001
    """`posttrain eval model=... data=...`."""
    pipeline, out = build("eval", args.overrides, args.runs)
    return _run(pipeline, out, args)


def export(args: argparse.Namespace) -> int:
    """`posttrain export model=... out=...`."""
    pipeline, out = build("export", args.overrides, args.runs)
    return _run(pipeline, out, args)


def _one_stage(args: argparse.Namespace) -> tuple[Pipeline, str | None]:
    document = load_yaml(Path(args.file))
    stages = document.tree.get("stages")
    if not isinstance(stages, list) or len(stages) != 1:
        count = len(stages) if isinstance(stages, list) else "no"
        raise ConfigError(f"expected a file with one stage, found {count}", where=f"{args.file}: stages", fix="use `posttrain run FILE --only STAGE`")
    if not args.overrides:
        return load_pipeline(Path(args.file)), None
    tree = _absolute_paths(document.tree, Path(args.file).absolute().parent)
    return build(str(stages[0].get("method")), args.overrides, args.runs, tree)


def _absolute_paths(tree: dict[str, Any], base: Path) -> dict[str, Any]:
    """The tree with its own relative paths resolved against the file, so that the command line's may be relative to here."""
    from posttrain.config.paths import expand_model_id, expand_path

    model = tree.get("model")
    if isinstance(model, dict) and isinstance(model.get("id"), str):
        model["id"] = expand_model_id(model["id"], base)
    for source in (tree.get("sources") or {}).values():
        if isinstance(source, dict) and isinstance(source.get("path"), str):
            source["path"] = expand_path(source["path"], base)
    launch = tree["stages"][0].get("launch")
    if isinstance(launch, dict) and isinstance(launch.get("config"), str):
        launch["config"] = expand_path(launch["config"], base)
    return tree


def train(args: argparse.Namespace) -> int:
    """`posttrain train FILE [in.data=... model.id=...]`; under torchrun or accelerate launch every rank runs this."""
    pipeline, out = _one_stage(args)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        from posttrain.core.byhand import run_under_launcher

        return run_under_launcher(pipeline, args)
    return _run(pipeline, out, args)
