"""`posttrain validate --deep`: what can only be told by looking at rows, models, installed TRL, disk and memory.

Everything is collected before anything is raised. Rows are read up to `ROWS` a source; templates, rewards and prompts
are tried on the first `SHOWN` of them. What cannot be had locally (a hub model that is not in the cache, the output of a
stage that has not run) is not checked, and said so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from posttrain.config.common import TrainConfig
from posttrain.config.pipeline import Pipeline, WiredStage, wire
from posttrain.core.artifact import InputRef
from posttrain.core.plan import PlannedStage, make_plan
from posttrain.core.run import run_dir
from posttrain.errors import ConfigError, DataError, PosttrainError, Problem

ROWS = 20_000
SHOWN = 64
LISTED = 20
Row = dict[str, Any]


@dataclass
class Findings:
    """What the checks have found so far.

    Args:
        data: problems of rows and files.
        config: all other problems.
        skipped: what could not be checked.
        rows: first rows of each source and committed dataset, by name.
        shown: the first training sequences of each supervised stage, the tokens with loss marked.
    """

    data: list[Problem] = field(default_factory=list)
    config: list[Problem] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    shown: list[str] = field(default_factory=list)

    def trying(self, path: str, check: Callable[[], None]) -> None:
        """Runs a check; its error becomes problems under `path`."""
        try:
            check()
        except ConfigError as error:
            self.config += error.problems or [Problem(_joined(path, error.where), error.message, error.fix)]
        except DataError as error:
            self.data.append(Problem(_joined(path, error.where), error.message, error.fix))
        except PosttrainError as error:
            self.config.append(Problem(_joined(path, error.where), error.message, error.fix))


def _joined(path: str, where: str) -> str:
    return f"{path} ({where})" if where and where != path else path


def deep_check(pipeline: Pipeline, runs: str | None = None, show: Callable[[str], object] | None = None) -> list[str]:
    """Checks rows, templates, `trl:` fields, rewards, lengths, disk and memory.

    Args:
        pipeline: a valid pipeline.
        runs: folder of all runs, where committed inputs are looked for.
        show: gets, line by line, the first training sequences of each supervised stage with the tokens marked that carry loss.

    Returns:
        What could not be checked, one line each.

    Raises:
        ConfigError: every problem found, if any of them is not about rows.
        DataError: every problem found, if all are about rows.
    """
    found = Findings()
    for name, source in pipeline.sources.items():
        ref = InputRef("data", name, "source", "dataset", split="all", rows=source.kind, spec=source.dump())
        found.trying(f"sources.{name}", partial(_check_source, name, ref, found))
    stages: list[PlannedStage] = []
    if found.rows.keys() >= {name for name, source in pipeline.sources.items() if not source.hub}:
        found.trying("plan", lambda: stages.extend(make_plan(pipeline, run_dir(pipeline, runs))))
    for stage in stages:
        _committed_rows(stage, found)
    for wired in wire(pipeline):
        _check_config(wired, found)
    _check_eval_rewards(pipeline, found)
    _check_stages(pipeline, stages, found)
    if show is not None:
        for line in found.shown:
            show(line)
    _raise(pipeline, found)
    return found.skipped


def _raise(pipeline: Pipeline, found: Findings) -> None:
    if found.config:
        raise ConfigError(problems=list(dict.fromkeys([*found.config, *found.data])), where=pipeline.name)
    if found.data:
        lines = "\n  ".join(str(p) for p in dict.fromkeys(found.data))
        raise DataError(f"{len(found.data)} problem{'s' if len(found.data) > 1 else ''} in the rows\n  {lines}", where=pipeline.name)


def _check_source(name: str, ref: InputRef, found: Findings) -> None:
    from posttrain.data.dataset import open_rows
    from posttrain.data.rows import row_key, split_of
    from posttrain.data.shards import BadRows
    from posttrain.data.sources import split_shares

    if ref.spec.get("hub"):
        found.skipped.append(f"sources.{name}: rows of a hub dataset are read when it runs")
        return
    bad, kept, parts = BadRows(keep=LISTED), [], set()
    shares, total = split_shares(ref), 0
    for total, row in enumerate(open_rows(replace(ref, spec={**ref.spec, "on_bad": "skip"}), bad=bad), 1):
        parts.add(split_of(row_key(row), *shares))
        if total <= SHOWN:
            kept.append(row)
        if total + bad.total >= ROWS:
            found.skipped.append(f"sources.{name}: rows after the first {ROWS:,}")
            break
    found.rows[name] = kept
    if bad.total and ref.spec.get("on_bad") != "skip":
        found.data += [Problem(f"sources.{name}", line, "mend the row, or set `on_bad: skip`") for line in bad.examples]
        if bad.total > len(bad.examples):
            found.data.append(Problem(f"sources.{name}", f"and {bad.total - len(bad.examples)} more bad rows ({bad})"))
    for part, share in zip(("validation", "test"), shares, strict=True):
        if share and part not in parts and total + bad.total < ROWS:
            fix = "give more rows or a larger share; rows with the same prompt are always in the same part"
            found.data.append(Problem(f"sources.{name}.split.{part}", f"not one of {total} rows falls into this part", fix))


def _check_config(stage: WiredStage, found: Findings) -> None:
    """Rewards and the `trl:` block of one stage."""
    for place, item in enumerate(getattr(stage.config, "rewards", [])):
        path, rows = f"stages.{stage.config.name}.rewards.{place}", _first_rows(stage.inputs, found)
        found.trying(path, partial(check_reward, item.use, item.columns, rows, path, item.options))
    if isinstance(stage.config, TrainConfig) and stage.config.trl:
        from posttrain.trainers._fields import check_block

        found.config += check_block(stage.config)


def _check_eval_rewards(pipeline: Pipeline, found: Findings) -> None:
    for name, item in pipeline.eval.sets.items():
        if {"accuracy", "pass@k"} & set(item.metrics):
            rows, path = found.rows.get(item.from_.split(":")[0], []), f"eval.sets.{name}.reward"
            found.trying(path, partial(check_reward, item.reward, {}, rows, path, item.reward_options))


def _check_stages(pipeline: Pipeline, stages: list[PlannedStage], found: Findings) -> None:
    from posttrain.verbs import deep_model

    models = deep_model.Models(stages, found)
    for stage in stages:
        if stage.todo:
            deep_model.check_stage(stage, models, _first_rows(stage.inputs, found), found)
    deep_model.check_disk(pipeline, stages, found)


def _committed_rows(stage: PlannedStage, found: Findings) -> None:
    """First rows of committed datasets that the stage reads."""
    from itertools import islice

    from posttrain.data.dataset import open_rows

    for refs in stage.inputs.values():
        for ref in refs:
            if ref.origin == "stage" and ref.kind == "dataset" and ref.digest and ref.name not in found.rows:
                found.rows[ref.name] = []
                take = lambda r=ref: found.rows[r.name].extend(islice(open_rows(replace(r, split="all")), SHOWN))  # noqa: E731
                found.trying(f"stages.{ref.name}", take)


def _first_rows(inputs: dict[str, list[InputRef]], found: Findings) -> list[Row]:
    return [row for ref in inputs.get("data", []) for row in found.rows.get(ref.name, [])]


def check_reward(name: str, columns: dict[str, str], rows: list[Row], path: str, options: dict[str, Any] | None = None) -> None:
    """The reward exists, its columns are there in the rows, and it gives a value for one made-up completion.

    Args:
        name: the reward.
        columns: the reward's column -> the rows' column.
        rows: rows to look at; with none only the name is checked.
        path: dotted path for messages.
        options: of the reward.

    Raises:
        ConfigError: no such reward, or an option that it does not take.
        DataError: a missing column; names those there.
        PosttrainError: whatever the reward raises.
    """
    from posttrain.rewards.registry import find_reward, get_reward

    needed = {column: columns.get(column, column) for column in find_reward(name).columns}
    for row in rows:
        missing = next((theirs for theirs in needed.values() if row.get(theirs) is None), None)
        if missing:
            there = ", ".join(key for key in row if key not in ("id", "prompt"))
            fix = f"set `columns` in the source or the reward, e.g. `{{{missing}: THEIR_NAME}}`"
            raise DataError(f"reward `{name}` needs the column `{missing}`; columns there: {there or 'none'}", where=path, fix=fix)
    if rows:
        own = {key: [value] for key, value in rows[0].items()} | {column: [rows[0].get(theirs)] for column, theirs in columns.items()}
        get_reward(name, options)(["I do not know."], **{k: v for k, v in own.items() if k not in ("completions", "prompts")})
