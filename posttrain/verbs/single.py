"""`select`, `train`, `generate`, `eval`, `quantize`, `export`: one stage, with ports and fields on the command line.

They build a pipeline of one stage in memory (or read one from a file) and run it like any other, so resuming,
manifests and reports are the same. `model=`, `data=`, `raw=`, `target=` fill ports; a value is a name of the file's
sources, or a path whose row type is read off its first row; `model=[ONE,OTHER]` and `embedder=` name models where the method
takes them; `out=` puts a copy of the result there.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from posttrain.config.fields import short_form
from posttrain.config.load import load_yaml, parse_value
from posttrain.config.pipeline import Pipeline, load_pipeline, override_tree
from posttrain.core import registry
from posttrain.core.events import dumps
from posttrain.core.hashing import digest_of
from posttrain.core.registry import MODEL_KINDS
from posttrain.core.rundir import runs_root
from posttrain.errors import ConfigError, DataError

PORTS = ("model", "data", "raw", "target", "scores", "calib")
TOP = ("model", "sources", "eval", "tracking", "limits", "seed", "name")
CONTROL = ("out", "prompt")
EXAMPLES = {"model": "./model", "scores": "[picked-dsir,picked-zipfit]"}


def _split(overrides: list[str], method: registry.Method | None = None) -> dict[str, str]:
    pairs, ports = {}, _port_names(method)
    for text in overrides:
        key, mark, value = text.partition("=")
        if not mark or not key:
            raise ConfigError(f"expected KEY=VALUE, got `{text[:80]}`", where="command line", fix="e.g. bits=4")
        port = "model" if key == "model.id" else key.removeprefix("in.")
        pairs[port if port in ports else key] = value
    return pairs


def _port_names(method: registry.Method | None) -> tuple[str, ...]:
    """PORTS, and the others that the method has."""
    return tuple(dict.fromkeys([*PORTS, *(method.inputs if method else ())]))


def _prompt_file(prompt: str, runs: Path) -> str:
    from posttrain.core.durable import write_text

    path = runs / "prompts" / f"{digest_of(prompt)[:16]}.jsonl"
    if not path.is_file():
        write_text(path, dumps({"id": "prompt", "prompt": prompt}) + "\n")
    return str(path)


def _source(item: str, name: str, accepted: tuple[str, ...], kind: str | None) -> dict[str, Any]:
    """A source of local rows; the row type is `kind` where it is given, else read off the first row."""
    from posttrain.data.sources import row_type_of

    where = os.path.abspath(os.path.expanduser(item))
    if kind:
        return {"kind": kind, "path": where}
    try:
        return {"kind": row_type_of(where, accepted), "path": where}
    except DataError as error:
        if "columns" in error.fix:
            example = f"sources.{name}.kind={accepted[-1]} 'sources.{name}.columns={{prompt: THEIR_NAME}}'"
            error.fix = f"give the row type and the columns: {example}"
        raise


def _absolute_model(value: str) -> str:
    if value.startswith(("package:", "~", "${")):
        return value
    return os.path.abspath(value) if value.startswith((".", "/")) or os.path.exists(value) else value


def _ports(pairs: dict[str, str], stage: str, known: set[str], method: registry.Method) -> list[str]:
    """Overrides that fill the ports named in `pairs`, which are taken out of it."""
    found = []
    for port in [p for p in _port_names(method) if p in pairs]:
        value = parse_value(pairs.pop(port))
        if port == "model" and not isinstance(value, list):
            found.append(f"model.id={dumps(_absolute_model(str(value)))}")
            continue
        if port in method.inputs and not set(method.inputs[port].kinds) - set(MODEL_KINDS):
            models = [_absolute_model(str(item)) for item in (value if isinstance(value, list) else [value])]
            found.append(f"stages.{stage}.in.{port}={dumps(models)}")
            continue
        items, names = list(map(str, value if isinstance(value, list) else [value])), []
        for i, item in enumerate(items):
            if item.split(":")[0] in known:
                names.append(item)
                continue
            name = port if len(items) == 1 else f"{port}-{i + 1}"
            accepted = method.inputs[port].rows if port in method.inputs else ()
            found.append(f"sources.{name}={dumps(_source(item, name, accepted, pairs.get(f'sources.{name}.kind')))}")
            names.append(name)
        found.append(f"stages.{stage}.in.{port}={dumps(names if len(names) > 1 else names[0])}")
    return found


def _dotted(key: str, stage: str, method: registry.Method) -> str:
    """The full path of a key of the command line, on which a stage's fields stand without `stages.NAME`."""
    fields, head = method.config.model_fields, key.split(".")[0]
    if head == "stages" or (head in TOP and not (head == "eval" and "eval" in fields and key != "eval")):
        return key
    return f"stages.{stage}.{short_form(method.config, key)}"


def to_overrides(tree: dict[str, Any], pairs: dict[str, str], method: registry.Method) -> list[str]:
    """Dotted overrides of a one-stage tree out of the command line's short forms."""
    stage = str(tree["stages"][0].get("name"))
    single = "model" in pairs and not isinstance(parse_value(pairs["model"]), list)
    model = ["model={}"] if single and not isinstance(tree.get("model"), dict) else []
    ports = _ports(pairs, stage, set(tree.get("sources") or {}), method)
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if given in pairs and other in tree["stages"][0]:
            pairs.setdefault(other, "null")
    return model + ports + [f"{_dotted(key, stage, method)}={text}" for key, text in pairs.items()]


def build(method_name: str, overrides: list[str], runs: str | None) -> tuple[Pipeline, str | None]:
    """A pipeline of one stage out of `KEY=VALUE` pairs; returns it and `out=`."""
    method = registry.method(method_name)
    pairs = _split(overrides, method)
    out, prompt = (pairs.pop(key, None) for key in CONTROL)
    if prompt is not None:
        pairs["data"] = dumps(_prompt_file(prompt, runs_root(runs)))
    _require_ports(method, pairs)
    name = method_name.replace(".", "-")
    tree: dict[str, Any] = {
        "version": 1,
        "name": name,
        "seed": 0,
        "stages": [{"name": name.split("-")[0], "method": method_name, "in": {}}],
    }
    return override_tree(tree, to_overrides(tree, pairs, method)), out


def _require_ports(method: registry.Method, pairs: dict[str, str]) -> None:
    """Refuses a command line that leaves a port open which the method cannot do without."""
    needed = [port for port, declared in method.inputs.items() if not declared.optional or (method.output == "eval" and port == "data")]
    absent = [port for port in needed if port not in pairs and not any(key.startswith(("eval.", "stages.")) for key in pairs)]
    if absent:
        names = " and ".join(f"`{port}=`" for port in absent)
        given = " ".join(f"{port}={EXAMPLES.get(port, 'rows.jsonl')}" for port in absent)
        raise ConfigError(f"`{method.name}` needs {names}", where="command line", fix=f"e.g. {given}")


def _same(target: Path, folder: Path) -> bool:
    """True if `target` already holds the committed artifact of a stage folder."""
    from posttrain.core.artifact import open_artifact
    from posttrain.core.hashing import files_digest, list_files

    return files_digest(list_files(target)) == open_artifact(folder).digest


def _put(folder: Path, target: Path) -> None:
    """A copy of a stage's output, complete or absent."""
    from posttrain.core.durable import disk_errors

    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    with disk_errors(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(folder / "out", temporary)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _run(pipeline: Pipeline, out: str | None, args: argparse.Namespace) -> Path:
    """Runs the stage and puts a copy where `out=` says; returns the stage's folder."""
    from posttrain.core.plan import Selection, make_plan
    from posttrain.core.run import RunOptions, execute, finish, run_dir
    from posttrain.core.rundir import is_committed

    options = RunOptions(args.runs, Selection(force=tuple(args.force)), args.isolate, args.trust_remote_code, args.quiet)
    target = Path(os.path.abspath(os.path.expanduser(out))) if out else None
    there = False
    if target is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        last = make_plan(pipeline, run_dir(pipeline, args.runs), options.selection)[-1]
        there = target.is_dir() and last.action == "reuse" and is_committed(last.folder) and _same(target, last.folder)
        if not there:
            raise ConfigError("there is something else at that place", where=f"out={out}", fix="name a new folder, or empty this one")
    run, plan = execute(pipeline, dumps(pipeline.dump(), indent=1), options)
    finish(run, plan)
    if target is not None:
        if not there:
            _put(plan[-1].folder, target)
        print(f"copied to {out}")
    return plan[-1].folder


def select(args: argparse.Namespace) -> int:
    """`posttrain select METHOD raw=... target=... rows=...`; also methods of the data pipelines that are no selector: `dedup`."""
    name, known = f"select.{args.name.removeprefix('select.')}", registry.methods()
    if name not in known and args.name in known and known[args.name].module.startswith("data_pipelines."):
        name = args.name
    pipeline, out = build(name, args.overrides, args.runs)
    _run(pipeline, out, args)
    return 0


def quantize(args: argparse.Namespace) -> int:
    """`posttrain quantize METHOD model=... bits=...`."""
    pipeline, out = build(f"quantize.{args.name.removeprefix('quantize.')}", args.overrides, args.runs)
    _run(pipeline, out, args)
    return 0


def generate(args: argparse.Namespace) -> int:
    """`posttrain generate model=... prompt=... | data=...`."""
    pipeline, out = build("generate", args.overrides, args.runs)
    folder = _run(pipeline, out, args)
    if any(text.startswith("prompt=") for text in args.overrides):
        _print_completions(folder / "out")
    return 0


def _print_completions(out: Path) -> None:
    from posttrain.data.shards import BadRows, expand_shards, read_shard

    for shard in expand_shards([out]):
        for _, row in read_shard(shard, on_bad="stop", bad=BadRows()):
            print(f"\n{row['prompt']}{row['completion']}" if isinstance(row["prompt"], str) else f"\n{row['completion']}")


def eval(args: argparse.Namespace) -> int:
    """`posttrain eval model=... data=...`."""
    pipeline, out = build("eval", args.overrides, args.runs)
    _run(pipeline, out, args)
    return 0


def export(args: argparse.Namespace) -> int:
    """`posttrain export model=... out=...`."""
    pipeline, out = build("export", args.overrides, args.runs)
    _run(pipeline, out, args)
    return 0


def _one_stage(args: argparse.Namespace) -> tuple[Pipeline, str | None]:
    """The pipeline of a file with one stage, and `out=`; under a launcher `launch.with` is what is there."""
    tree = load_yaml(Path(args.file)).tree
    stages = tree.get("stages")
    if not isinstance(stages, list) or len(stages) != 1 or not isinstance(stages[0], dict):
        count = len(stages) if isinstance(stages, list) else "no"
        raise ConfigError(
            f"expected a file with one stage, found {count}", where=f"{args.file}: stages", fix="use `posttrain run FILE --only STAGE`"
        )
    name = stages[0].get("method")
    method = registry.method(name) if isinstance(name, str) else None
    pairs = _split(args.overrides, method)
    out = pairs.pop("out", None)
    if under_launcher():
        pairs.setdefault("launch.with", "torchrun" if "RANK" in os.environ else "accelerate")
    return load_pipeline(Path(args.file), to_overrides(tree, pairs, method) if method else ()), out


def under_launcher() -> bool:
    """True in a process started by torchrun (or another setter of RANK and WORLD_SIZE) or by accelerate launch."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys() or "ACCELERATE_MIXED_PRECISION" in os.environ


def train(args: argparse.Namespace) -> int:
    """`posttrain train FILE [in.data=... model.id=...]`; under torchrun or accelerate launch every rank runs this."""
    pipeline, out = _one_stage(args)
    if under_launcher():
        from posttrain.core.byhand import run_under_launcher

        if out is not None:
            raise ConfigError("`out=` is not available under a launcher", where="out", fix="the artifact's folder is printed at the end")
        return run_under_launcher(pipeline, args)
    _run(pipeline, out, args)
    return 0
