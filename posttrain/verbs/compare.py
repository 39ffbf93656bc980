"""`posttrain select compare`: which selector's pick trains the better model, judged on held-out target rows.

Every method picks from the same raw rows under the same budget of words; the same small model, with the same tokenizer and
(for a seed) the same initial weights, is trained on each pick for the same number of steps of equally many tokens; what is
reported is the loss on target rows that no selector has seen, over several seeds, and its difference from a random pick.

It is an ordinary pipeline, written to `RUNS/NAME/compare.yaml` and run once a seed as `NAME-seedN`, so the same command
goes on where it was stopped. Edit the file and give it as `file=` for anything that the command line cannot say.

How the budgets are equal. Words are those of the selectors; a pick ends before the row that would exceed the budget, so
picks differ by less than one row. Training takes `steps` packed batches of `batch.tokens` tokens from each pick, over and
over, whatever the pick's words are worth in tokens; rows longer than `data.max_length` are cut there, which is reported.

A small model must be trained past its first plateau, or the comparison ranks how soon a pick is learned at all: hence the
wide initial weights, small batches and several passes over small picks. `model=` takes a model of yours instead.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import os
from pathlib import Path
from typing import Any

from posttrain.config.fields import fields_of, nearest, short_form
from posttrain.config.load import load_yaml, parse_value
from posttrain.core.registry import Method, look_up, methods
from posttrain.errors import ConfigError
from posttrain.verbs.comparison import CONTROL

CONTROLS = ("raw", "target", "tokens", "methods", "seeds", "holdout", "steps", "passes", "model", "name", "file", "out")
DEFAULT_METHODS = "dsir,zipfit,classifier"
SAMPLE_SEED = 20_240_229
"""Seed of the rows that make the tokenizer: the same for all methods and all seeds."""
TOKENS_A_WORD = {"new": 1.9, "given": 1.4}
"""Rough tokens a word, by which one pass over a pick is turned into steps: a new tokenizer of 1,024 ids, and a usual one."""
SIZES = {
    "arch": "qwen2",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "layers": 2,
    "heads": 4,
    "kv_heads": 4,
    "init_std": 0.06,
}
"""The new model."""
FILES = ("compare.yaml", "compare.json", "report.html")

Tree = dict[str, Any]


def _split(pairs: list[str]) -> dict[str, str]:
    found = {}
    for text in pairs:
        key, mark, value = text.partition("=")
        if not mark or not key:
            raise ConfigError(f"expected KEY=VALUE, got `{text[:80]}`", where="command line", fix="e.g. tokens=200000")
        found["model" if key == "model.id" else key.removeprefix("in.")] = value
    return found


def _whole(pairs: dict[str, str], key: str, default: int | None = None) -> int:
    value = parse_value(pairs[key]) if key in pairs else default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"expected a whole number of at least 1, got `{pairs.get(key, '')}`", where=key, fix=f"e.g. {key}=200000")
    return value


def _number(pairs: dict[str, str], key: str, default: float) -> float:
    value = parse_value(pairs[key]) if key in pairs else default
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"expected a number above 0, got `{pairs.get(key, '')}`", where=key)
    return float(value)


def chosen_methods(text: str) -> dict[str, Method]:
    """Label -> method, the control first; an item is a selector's name, or `LABEL:NAME` to have one twice.

    Raises:
        ConfigError: no such selector, or a label twice.
    """
    known = {name.removeprefix("select."): method for name, method in methods().items() if name.startswith("select.")}
    listed = [item.strip().strip("\"'") for item in text.strip("[]").split(",") if item.strip()]
    found: dict[str, Method] = {CONTROL: known[CONTROL]}
    for item in listed:
        label, _, name = item.rpartition(":")
        label, name = label or name.removeprefix("select."), name.removeprefix("select.")
        if label in found and item != CONTROL:
            raise ConfigError(f"`{label}` is named twice", where="methods", fix=f"give it a label: methods={label},other:{name}")
        found[label] = look_up(name, known, "selector")
    return found


def _source(value: str, holdout: float) -> Tree:
    """A source of local rows, its row type seen from the first row."""
    from posttrain.data.sources import row_type_of

    given = parse_value(value)
    paths = [os.path.abspath(os.path.expanduser(str(path))) for path in (given if isinstance(given, list) else [given])]
    split = {"split": {"test": holdout}} if holdout else {}
    return {"kind": row_type_of(paths), "path": paths, **split}


def make_tree(pairs: dict[str, str]) -> Tree:
    """The pipeline of a comparison as plain values.

    Args:
        pairs: `raw`, `target`, `tokens`; optionally `methods`, `holdout` (share of the target to judge on), `steps` or
            `passes` (over the pick), `model` (trained instead of a new small one), `name`; fields of one method as
            `LABEL.FIELD`, of all selectors as `FIELD`, of stages as `base.FIELD`, `sft.FIELD`; `sources.`, `eval.`, `model.`.

    Raises:
        ConfigError: something is missing or unknown.
    """
    absent = [key for key in ("raw", "target", "tokens") if key not in pairs]
    if absent:
        fix = "posttrain select compare raw='shards/*.jsonl' target=target.jsonl tokens=200000 methods=dsir,zipfit"
        raise ConfigError(f"`select compare` needs {' and '.join(f'`{key}=`' for key in absent)}", where="command line", fix=f"e.g. {fix}")
    tokens, picked = _whole(pairs, "tokens"), chosen_methods(pairs.get("methods", DEFAULT_METHODS))
    holdout, own = _number(pairs, "holdout", 0.3), "model" in pairs
    if holdout >= 1:
        raise ConfigError(f"holdout: {holdout:g} leaves no target rows to select by", where="holdout", fix="e.g. holdout=0.3")
    tree: Tree = {"version": 1, "name": pairs.get("name", "select-compare"), "seed": 0}
    if own:
        tree["model"] = {"id": _model_id(pairs["model"])}
    tree["sources"] = {"raw": _source(pairs["raw"], 0.0), "target": _source(pairs["target"], holdout)}
    sft = _training(pairs, tokens, own)
    target = {"from": "target:test", "metrics": ["loss", "perplexity"], "max_length": sft["data"]["max_length"], "rows": 1000}
    tree["eval"] = {"when": ["after"], "sets": {"target": target}}
    late = [label for label, method in picked.items() if _wants_model(label, method, pairs)]
    tree["stages"] = _stages(picked, late, tokens, own, sft)
    _apply(tree, {key: text for key, text in pairs.items() if key not in CONTROLS}, picked)
    return tree


def _model_id(value: str) -> str:
    return os.path.abspath(value) if value.startswith((".", "/")) or os.path.exists(value) else value


def _training(pairs: dict[str, str], tokens: int, own: bool) -> Tree:
    """The training of each pick: about three passes over a small pick and one over a large one, in at most about 2,000 steps."""
    length = 1024 if own else 512
    passes = _number(pairs, "passes", 1.0 if own else min(3.0, max(1.0, 300_000 / tokens)))
    wanted = passes * tokens * TOKENS_A_WORD["given" if own else "new"]
    rows = max(8 if own else 1, math.ceil(wanted / length / 2000))
    steps = _whole(pairs, "steps", max(math.ceil(wanted / length / rows), 20))
    return {
        "steps": steps,
        "data": {"max_length": length, "packing": True},
        "batch": {"tokens": rows * length, "per_device": min(rows, 8)},
        "optim": {"lr": 2e-5 if own else 3e-3, "schedule": "cosine", "warmup": 0.05},
        "checkpoint": {"every": 1000, "keep": 1},
        "log_every": 50,
    }


def _wants_model(label: str, method: Method, pairs: dict[str, str]) -> bool:
    """A selector that needs the port `model`: by its declaration, or because its features come out of a causal model."""
    port, features = method.inputs.get("model"), method.config.model_fields.get("features")
    if port is None or not port.optional or features is None:
        return port is not None and not port.optional
    block = parse_value(pairs.get(f"{label}.features", "{}"))
    given = pairs.get(f"{label}.features.from") or (block.get("from") if isinstance(block, dict) else None)
    return (given or features.default.from_) in ("gradients", "hidden")


def _pick(label: str, method: Method, tokens: int, base: str | None, scored: list[str]) -> Tree:
    ports: Tree = {name: [f"pick-{other}" for other in scored] for name in ("scores",) if name in method.inputs}
    ports |= {name: name for name in ("raw", "target") if name in method.inputs}
    ports |= {"model": base} if base else {}
    return {"name": f"pick-{label}", "method": method.name, "in": ports, "budget": {"tokens": tokens, "on_short": "stop"}}


def _stages(picked: dict[str, Method], late: list[str], tokens: int, own: bool, sft: Tree) -> list[Tree]:
    """The picks, the tokenizer's sample and the base model, the trainings.

    Picks that do without a model stand before the base, so that they are not given it, and those in `late` behind it. `combine`
    comes last and takes all the others' scores, but not the control's.
    """
    base = "model" if own else "base"
    last = [label for label, method in picked.items() if "scores" in method.inputs]
    early = [label for label in picked if label not in (*late, *last)]
    scored = [label for label in (*early, *late) if label != CONTROL]
    picks = {label: _pick(label, picked[label], tokens, base if label in late else None, scored) for label in picked}
    stages = [picks[label] for label in early]
    if not own:
        sample = {"name": "sample", "method": "select.random", "seed": SAMPLE_SEED, "in": {"raw": "raw"}, "budget": {"tokens": tokens}}
        new = {"name": "base", "method": "init", "in": {"data": ["sample", "target"]}, **SIZES}
        stages += [sample, {**new, "max_length": sft["data"]["max_length"]}]
    stages += [picks[label] for label in (*late, *last)]
    stages.append({"name": "untrained", "method": "eval", "in": {"model": base}})
    ports = {label: {"model": base, "data": f"pick-{label}"} for label in picked}
    return stages + [{"name": f"sft-{label}", "method": "sft", "in": ports[label], **copy.deepcopy(sft)} for label in picked]


def _apply(tree: Tree, extra: dict[str, str], picked: dict[str, Method]) -> None:
    """Fields of the command line, put where they belong."""
    from posttrain.config.overrides import put

    names = {stage["name"]: index for index, stage in enumerate(tree["stages"])}
    for key, text in extra.items():
        head, _, rest = key.partition(".")
        if head in ("sources", "eval", "model") and rest:
            put(tree, tuple(key.split(".")), parse_value(text))
            continue
        for name, field in _places(key, head, rest, picked, names):
            put(tree, ("stages", names[name], *field.split(".")), parse_value(text))


def _places(key: str, head: str, rest: str, picked: dict[str, Method], names: dict[str, int]) -> list[tuple[str, str]]:
    """(stage, field) pairs that a key means."""
    if head in picked and rest:
        return [(f"pick-{head}", short_form(picked[head].config, rest))]
    if head in names and rest:
        return [(head, rest)]
    if head == "sft" and rest:
        return [(f"sft-{label}", rest) for label in picked]
    shared = fields_of(picked[CONTROL].config)
    full = short_form(picked[CONTROL].config, key)
    if full.partition(".")[0] in shared and full.partition(".")[0] not in ("budget", "name", "method", "in"):
        return [(f"pick-{label}", full) for label in picked]
    known = [*CONTROLS, *shared, *(f"{label}.FIELD" for label in picked), "sft.FIELD", "base.FIELD"]
    near = nearest(key, known)
    fix = f"did you mean `{near}`?" if near else f"known: {', '.join(known)}"
    raise ConfigError(f"`select compare` does not know `{key}`", where="command line", fix=fix)


def to_yaml(tree: Tree) -> str:
    """The tree as YAML, one line a field; its first lines say where it comes from and what it was."""
    from posttrain.core.events import dumps

    lines = [f"{key}: {dumps(value)}" for key, value in tree.items() if key not in ("sources", "stages")]
    lines += ["sources:", *(f"  {name}: {dumps(spec)}" for name, spec in tree["sources"].items()), "stages:"]
    for stage in tree["stages"]:
        first, *others = [f"{key}: {dumps(value)}" for key, value in stage.items()]
        lines += ["", f"  - {first}", *(f"    {line}" for line in others)]
    body = "\n".join(lines) + "\n"
    return f"# Written by `posttrain select compare`; edit it and run `posttrain select compare file=THIS`.\n{_stamp(body)}\n{body}"


def _stamp(body: str) -> str:
    return f"# as written: {hashlib.sha256(body.encode()).hexdigest()[:16]}"


def _write(path: Path, text: str) -> None:
    """Replaces the file of an earlier command, but never one that was edited."""
    from posttrain.core.durable import write_text

    if path.is_file():
        old = path.read_text(encoding="utf-8").split("\n", 2)
        if len(old) < 3 or old[1] != _stamp(old[2]):
            fix = f"run it by `posttrain select compare file={path}`, give another `name=`, or delete it"
            raise ConfigError("this file was edited, and would be overwritten", where=str(path), fix=fix)
    write_text(path, text)


def _seeds(text: str) -> list[int]:
    try:
        found = list(dict.fromkeys(int(part) for part in text.strip("[]").split(",")))
    except ValueError:
        raise ConfigError(f"expected whole numbers, got `{text}`", where="seeds", fix="e.g. seeds=0,1,2") from None
    return found


def _labels(path: Path) -> list[str]:
    """Labels of the methods in a file: those of its stages `sft-LABEL`."""
    stages = load_yaml(path).tree.get("stages")
    names = [str(stage.get("name", "")) for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    found = [name.removeprefix("sft-") for name in names if name.startswith("sft-")]
    if not found:
        raise ConfigError("no stage is called `sft-LABEL`", where=str(path), fix="give a file that `select compare` wrote")
    return found


def select(args: argparse.Namespace) -> int:
    """`posttrain select compare raw=... target=... tokens=... [methods=...] [seeds=0,1,2] [out=DIR]`."""
    from posttrain.core.rundir import runs_root, slug

    pairs = _split(args.overrides)
    seeds, out = _seeds(pairs.get("seeds", "0,1,2")), _out(pairs.get("out"))
    if "file" in pairs:
        path = Path(os.path.abspath(os.path.expanduser(pairs["file"])))
        strays = [key for key in pairs if key not in ("file", "seeds", "out")]
        if strays:
            raise ConfigError(f"`{strays[0]}=` cannot be given with `file=`", where="command line", fix="write it into the file")
    else:
        tree = make_tree(pairs)
        path = runs_root(args.runs) / slug(tree["name"]) / FILES[0]
        _check(tree)
        _write(path, to_yaml(tree))
    found = run_file(path, seeds, args)
    _finish(found, path, out)
    return 0


def _check(tree: Tree) -> None:
    """Refuses a wrong pipeline before it is written."""
    from posttrain.config.pipeline import parse_pipeline

    parse_pipeline(copy.deepcopy(tree), None, where="command line")


def run_file(path: Path, seeds: list[int], args: argparse.Namespace) -> Tree:
    """Runs the file once a seed; returns the comparison."""
    from posttrain.config.pipeline import load_pipeline
    from posttrain.core.events import dumps
    from posttrain.core.plan import Selection
    from posttrain.core.report import write_report
    from posttrain.core.run import RunOptions, execute, manifests
    from posttrain.verbs.comparison import summarise

    labels, runs = _labels(path), []
    options = RunOptions(args.runs, Selection(force=tuple(args.force)), args.isolate, args.trust_remote_code, args.quiet)
    base = load_pipeline(path)
    for seed in seeds:
        pipeline = load_pipeline(path, [f"seed={seed}", f"name={dumps(f'{base.name}-seed{seed}')}"])
        folder, plan = execute(pipeline, path.read_text(encoding="utf-8"), options)
        write_report(folder)
        runs.append((seed, manifests(plan)))
    stage = next(stage for stage in base.stages if stage.name == f"sft-{labels[0]}")
    pick = next((stage for stage in base.stages if stage.name == f"pick-{labels[0]}"), None)
    facts = {"name": base.name, "tokens": pick.budget.tokens if pick else None, "steps": stage.steps}  # type: ignore[attr-defined]
    return {**facts, **summarise(runs, labels)}


def _out(text: str | None) -> Path | None:
    """The folder of `out=`: new, empty, or of an earlier comparison."""
    if text is None:
        return None
    path = Path(os.path.abspath(os.path.expanduser(text)))
    if path.exists() and (not path.is_dir() or {item.name for item in path.iterdir()} - set(FILES)):
        raise ConfigError("there is something else at that place", where=f"out={text}", fix="name a new folder, or empty this one")
    return path


def _finish(found: Tree, path: Path, out: Path | None) -> None:
    """Prints the table; writes compare.json and report.html beside the file, and copies of all three to `out`."""
    from posttrain.core.durable import write_json, write_text
    from posttrain.verbs.comparison import html_of, text_of

    for folder in dict.fromkeys([path.parent, out or path.parent]):
        write_json(folder / "compare.json", found)
        write_text(folder / "report.html", html_of(found))
    if out is not None:
        write_text(out / FILES[0], path.read_text(encoding="utf-8"))
    print(text_of(found))
    print(f"\nfigures   {(out or path.parent) / 'compare.json'}\nreport    {(out or path.parent) / 'report.html'}\npipeline  {path}")
