"""`run`, `plan`, `validate`: verbs on a pipeline file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from posttrain.config.pipeline import Pipeline, load_pipeline
from posttrain.core.plan import PlannedStage, Selection, make_plan
from posttrain.core.run import RunOptions, execute, finish, manifests, run_dir
from posttrain.errors import ConfigError


def selection(args: argparse.Namespace) -> Selection:
    """The stages a command asks for."""
    return Selection(only=tuple(args.only), from_=args.from_, until=args.until, force=tuple(args.force))


def options(args: argparse.Namespace, chosen: Selection) -> RunOptions:
    """Run options of a command."""
    return RunOptions(runs=args.runs, selection=chosen, isolate=args.isolate, trust_remote_code=args.trust_remote_code, quiet=args.quiet)


def run(args: argparse.Namespace) -> int:
    """`posttrain run FILE`."""
    if args.seeds:
        return _run_seeds(args)
    pipeline = load_pipeline(Path(args.file), args.overrides)
    folder, plan = execute(pipeline, Path(args.file).read_text(encoding="utf-8"), options(args, selection(args)))
    finish(folder, plan)
    return 0


def _seeds(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(s) for s in text.split(",")))
    except ValueError:
        raise ConfigError(f"expected whole numbers, got `{text}`", where="--seeds", fix="e.g. --seeds 0,1,2") from None


def _run_seeds(args: argparse.Namespace) -> int:
    from posttrain.core.table import seeds_table

    collected = []
    for seed in _seeds(args.seeds):
        base = load_pipeline(Path(args.file), args.overrides)
        pipeline = load_pipeline(Path(args.file), [*args.overrides, f"seed={seed}", f"name={json.dumps(f'{base.name}-seed{seed}')}"])
        folder, plan = execute(pipeline, Path(args.file).read_text(encoding="utf-8"), options(args, selection(args)))
        finish(folder, plan)
        collected.append((seed, manifests(plan)))
    print("\n" + seeds_table(collected))
    return 0


def plan(args: argparse.Namespace) -> int:
    """`posttrain plan FILE`."""
    pipeline = load_pipeline(Path(args.file), args.overrides)
    stages = make_plan(pipeline, run_dir(pipeline, args.runs), selection(args))
    if args.json:
        from posttrain.config.redact import redact
        from posttrain.core.events import dumps

        print(dumps(redact([_facts(s, stages) for s in stages]), indent=1))
        return 0
    for stage in stages:
        print(_plan_text(stage, stages))
    todo = sum(s.todo for s in stages)
    print(f"{todo} to run, {len(stages) - todo} not; run folder {run_dir(pipeline, args.runs).path}")
    return 0


def _facts(stage: PlannedStage, stages: list[PlannedStage]) -> dict[str, Any]:
    from posttrain.core.estimate import estimate
    from posttrain.core.launch import command
    from posttrain.verbs.amounts import amounts

    return {
        "name": stage.name, "method": stage.method.name, "key": stage.key, "action": stage.action, "why": stage.why,
        "command": command(stage), "folder": str(stage.folder), "estimate": estimate(stage),
        "data": amounts(stage, {other.name: other for other in stages}),
    }  # fmt: skip


def _plan_text(stage: PlannedStage, stages: list[PlannedStage]) -> str:
    from posttrain.config.redact import redact
    from posttrain.core.estimate import describe
    from posttrain.verbs.amounts import describe_amounts

    facts = _facts(stage, stages)
    ports = ", ".join(f"{port}={'+'.join(r.label for r in refs)}" for port, refs in stage.inputs.items())
    lines = [f"{stage.index + 1:2d} {stage.name} ({stage.method.name})  {stage.action}: {stage.why}", f"   key {stage.key[:16]}  {ports}"]
    if stage.todo:
        lines += [
            f"   estimate {describe(facts['estimate'])}",
            *describe_amounts(facts["data"]),
            f"   {redact(' '.join(facts['command']))}",
        ]
    return "\n".join(lines)


def validate(args: argparse.Namespace) -> int:
    """`posttrain validate FILE`: exit 0, or 2 with every problem."""
    pipeline: Pipeline = load_pipeline(Path(args.file), args.overrides)
    if args.deep:
        from posttrain.verbs.deep import deep_check

        deep_check(pipeline, args.runs, show=print)
    print(f"{args.file}: valid, {len(pipeline.stages)} stages" + (" (deep)" if args.deep else ""), file=sys.stdout)
    return 0
