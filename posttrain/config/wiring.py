"""Which input of which stage is what: resolves `in:` and its defaults, and checks the chain from the declarations.

Only sources and *earlier* stages can be referred to, so a chain cannot have cycles. `model` as a name means the
pipeline's own model. All problems of all stages are collected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from posttrain.config.common import InputItem, ModelConfig, SplitConfig, StageConfig
from posttrain.config.fields import nearest
from posttrain.core.artifact import InputRef
from posttrain.core.registry import MODEL_KINDS, Method, Port
from posttrain.core.registry import method as find_method
from posttrain.errors import ConfigError, Problem

if TYPE_CHECKING:
    from posttrain.config.pipeline import Pipeline

PARTS = ("train", "validation", "test", "all")
MODEL_NAME = "model"


@dataclass(frozen=True)
class WiredStage:
    """A stage with its inputs resolved.

    Args:
        index: place in the file, from 0.
        inputs: port -> references without key, path and digest; optional ports left empty are absent.
        output: kind of the artifact; `adapter` for a model trained with `lora`.
        rows: row type of an output dataset, None where unknown.
    """

    index: int
    config: StageConfig
    method: Method
    inputs: dict[str, list[InputRef]]
    output: str
    rows: str | None = None


class _Wirer:
    """State of one pass over the stages."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.done: dict[str, WiredStage] = {}
        self.problems: list[Problem] = []
        self.all_names = [s.name for s in pipeline.stages]

    def add(self, path: str, message: str, fix: str = "") -> None:
        """Records a problem."""
        self.problems.append(Problem(path, message, fix))

    def unknown(self, path: str, name: str, usable: list[str]) -> None:
        """Records a name that cannot be referred to."""
        if name in self.all_names and name not in self.done:
            self.add(path, f"`{name}` is a later stage (or this one); only sources and earlier stages can be used", "move that stage up")
            return
        known = [*self.pipeline.sources, *self.done]
        near = nearest(name, usable or known)
        if "/" in name or name.startswith((".", "~")):
            fix = "declare files under `sources` and a model under `model`, and refer to them by name"
        else:
            fix = f"did you mean `{near}`?" if near else f"known names: {', '.join(known) or 'none'}"
        self.add(path, f"no source or earlier stage is called `{name}`", fix)

    def ref(self, text: str, port: str, path: str, item: InputItem | None = None) -> InputRef | None:
        """The reference that `NAME` or `NAME:PART` means; None (and a problem) if it means none."""
        name, _, part = text.partition(":")
        part = part or "train"
        if part not in PARTS:
            near = nearest(part, PARTS)
            self.add(path, f"`{part}` is no part of a dataset; parts: {', '.join(PARTS)}", f"did you mean `{name}:{near}`?" if near else "")
            return None
        share, repeat = (item.share, item.repeat) if item else (None, None)
        common: dict[str, Any] = {"port": port, "name": name, "split": part, "share": share, "repeat": repeat}
        if name in self.pipeline.sources:
            source = self.pipeline.sources[name]
            self._check_part(path, f"sources.{name}.split", name, part, source.split)
            return InputRef(**common, origin="source", kind="dataset", rows=source.kind, spec=source.dump())
        if name in self.done:
            stage = self.done[name]
            if stage.output != "dataset" and part != "train":
                self.add(path, f"`{name}` is a {stage.output} and has no parts", f"write `{name}`")
                return None
            self._check_part(path, f"stages.{name}.split", name, part, getattr(stage.config, "split", None))
            return InputRef(**common, origin="stage", kind=stage.output, rows=stage.rows)
        if name == MODEL_NAME and self.pipeline.model:
            return self.pipeline_model(port)
        self.unknown(path, name, list(self.done))
        return None

    def _check_part(self, path: str, owner: str, name: str, part: str, split: Any) -> None:
        if part not in ("validation", "test"):
            return
        if not isinstance(split, SplitConfig):
            self.add(path, f"`{name}` keeps no {part} rows", f"refer to the {part} part of the source or stage that its rows come from")
        elif not getattr(split, part):
            self.add(path, f"`{name}` keeps no {part} rows", f"set `{owner}.{part}`, e.g. to 0.1")

    def pipeline_model(self, port: str) -> InputRef:
        """The pipeline's own model."""
        model = self.pipeline.model
        assert model is not None
        return InputRef(port, model.id, "model", "model", spec=model.dump())

    def port(self, stage: StageConfig, method: Method, name: str, port: Port) -> list[InputRef]:
        """References of one port."""
        path = f"stages.{stage.name}.in.{name}"
        given = stage.inputs.get(name)
        if given is None:
            return self._default(stage, method, name, port)
        if isinstance(given, list) and not port.many and len(given) != 1:
            self.add(path, f"takes one input, got a list of {len(given)}", "name one source or stage")
            return []
        items: list[InputItem | str] = given if isinstance(given, list) else [given]
        if not items:
            self.add(path, "the list is empty", "name at least one source or stage")
        refs = []
        for place, item in enumerate(items):
            here = f"{path}.{place}" if isinstance(given, list) else path
            text = item if isinstance(item, str) else item.from_
            if self._names_a_model(text, port):
                refs += self._model(text, name, here)
                continue
            found = self.ref(text, name, here, item if isinstance(item, InputItem) else None)
            if found and self._accepts(here, method, name, port, found):
                refs.append(found)
        self._check_mixture(path, items)
        return refs

    def _names_a_model(self, text: str, port: Port) -> bool:
        """True for a whole path, a hub id or `package:NAME/FILE` in a port that takes models only."""
        return not set(port.kinds) - set(MODEL_KINDS) and "/" in text and not text.startswith(".")

    def _model(self, text: str, name: str, path: str) -> list[InputRef]:
        try:
            model = ModelConfig(id=text)
        except ValidationError as error:
            self.add(path, error.errors()[0]["msg"], "give an absolute path, a hub id `owner/name`, or `package:NAME/FILE`")
            return []
        return [InputRef(name, model.id, "model", "model", spec=model.dump())]

    def _check_mixture(self, path: str, items: list[InputItem | str]) -> None:
        names = [i if isinstance(i, str) else i.from_ for i in items]
        twice = {n for n in names if names.count(n) > 1}
        if twice:
            self.add(path, f"`{min(twice)}` is named twice", "name it once, with `repeat`")
        shares = [i.share if isinstance(i, InputItem) else None for i in items]
        given = [s for s in shares if s is not None]
        if given and len(given) < len(shares):
            self.add(path, "some parts have a `share` and others do not", "give every part a `share`, or none")
        elif given and abs(sum(given) - 1) > 1e-6:
            self.add(path, f"the shares sum to {sum(given):g}, expected 1", "change them so that they sum to 1")

    def _accepts(self, path: str, method: Method, name: str, port: Port, ref: InputRef) -> bool:
        if ref.kind not in port.kinds:
            self.add(
                path,
                f"`{ref.name}` is a {ref.kind}, but port `{name}` of {method.name} takes {' or '.join(port.kinds)}",
                self._candidates(port),
            )
            return False
        if port.rows and ref.rows and ref.rows not in port.rows:
            self.add(
                path,
                f"`{ref.name}` holds {ref.rows} rows, but port `{name}` of {method.name} takes {' or '.join(port.rows)} rows",
                self._candidates(port),
            )
            return False
        if port.train and ref.split in ("validation", "test"):
            self.add(path, f"`{ref.label}` is held out, but port `{name}` feeds selection, training or calibration", f"write `{ref.name}`")
            return False
        return True

    def _fitting(self, port: Port) -> list[str]:
        """Names that the port would accept."""
        sources = [n for n, s in self.pipeline.sources.items() if "dataset" in port.kinds and (not port.rows or s.kind in port.rows)]
        stages = [n for n, s in self.done.items() if s.output in port.kinds and not (port.rows and s.rows and s.rows not in port.rows)]
        return sources + stages

    def _candidates(self, port: Port) -> str:
        found = self._fitting(port)
        return f"these would do: {', '.join(found)}" if found else "nothing before this stage would do; add a source or a stage"

    def _default(self, stage: StageConfig, method: Method, name: str, port: Port) -> list[InputRef]:
        path = f"stages.{stage.name}.in.{name}"
        if name == MODEL_NAME and set(port.kinds) & set(MODEL_KINDS):
            return self._default_model(method, name, port, path)
        if port.optional:
            return []
        fitting = self._fitting(port)
        required = [n for n, p in method.inputs.items() if not p.optional and n != MODEL_NAME]
        if len(fitting) == 1 and len(required) == 1:
            found = self.ref(fitting[0], name, path)
            return [found] if found else []
        self.add(path, f"{method.name} needs an input here ({_port_words(port)})", self._candidates(port))
        return []

    def _default_model(self, method: Method, name: str, port: Port, path: str) -> list[InputRef]:
        for earlier in reversed(self.done.values()):
            if earlier.output in MODEL_KINDS:
                found = InputRef(name, earlier.config.name, "stage", earlier.output)
                return [found] if self._accepts(path, method, name, port, found) else []
        if self.pipeline.model and "model" in port.kinds:
            return [self.pipeline_model(name)]
        if not port.optional:
            self.add(
                path,
                f"{method.name} needs a model, and there is none",
                "set `model.id` at the top level, or put a stage before it that makes one",
            )
        return []

    def stage(self, index: int, stage: StageConfig) -> None:
        """Wires the next stage."""
        method = find_method(stage.method)
        for given in stage.inputs:
            if given not in method.inputs:
                near = nearest(given, method.inputs)
                fix = f"did you mean `{near}`?" if near else f"ports: {', '.join(method.inputs) or 'none'}"
                self.add(f"stages.{stage.name}.in.{given}", f"{method.name} has no port `{given}`", fix)
        inputs = {name: self.port(stage, method, name, port) for name, port in method.inputs.items()}
        inputs = {name: refs for name, refs in inputs.items() if refs}
        self.done.setdefault(
            stage.name, WiredStage(index, stage, method, inputs, output_kind(stage, method), self._rows(stage, method, inputs))
        )

    def _rows(self, stage: StageConfig, method: Method, inputs: dict[str, list[InputRef]]) -> str | None:
        if not callable(method.rows):
            return method.rows
        try:
            return method.rows(stage, {port: refs[0].rows for port, refs in inputs.items() if refs[0].rows})
        except (KeyError, ValueError, ConfigError) as error:
            if isinstance(error, ConfigError):
                self.add(f"stages.{stage.name}", error.message, error.fix)
            return None


def _port_words(port: Port) -> str:
    kinds = " or ".join(port.kinds)
    return f"{kinds} of {' or '.join(port.rows)} rows" if port.rows else kinds


def output_kind(stage: StageConfig, method: Method) -> str:
    """Kind of the artifact a stage commits: its method's, but `adapter` where a model is trained with `lora`."""
    return "adapter" if method.output == "model" and getattr(stage, "lora", None) is not None else method.output


def _wire_all(pipeline: Pipeline) -> _Wirer:
    wirer = _Wirer(pipeline)
    for index, stage in enumerate(pipeline.stages):
        wirer.stage(index, stage)
    return wirer


def wire(pipeline: Pipeline) -> list[WiredStage]:
    """The stages with their inputs resolved, in order.

    Raises:
        ConfigError: every unknown name, wrong kind, missing input.
    """
    wirer = _wire_all(pipeline)
    if wirer.problems:
        raise ConfigError(problems=wirer.problems, where=pipeline.name)
    return list(wirer.done.values())


def data_ref(text: str, pipeline: Pipeline, *, port: str) -> InputRef:
    """The reference that `NAME` or `NAME:PART` means at the end of the pipeline.

    Raises:
        ConfigError: no such source or stage, or it has no such part.
    """
    wirer = _wire_all(pipeline)
    wirer.problems.clear()
    found = wirer.ref(text, port, port)
    if found is None or wirer.problems:
        raise ConfigError(problems=wirer.problems, where=pipeline.name)
    return found


def check_chain(pipeline: Pipeline) -> list[Problem]:
    """Problems of the chain as a whole; empty if it can be planned."""
    from posttrain.config.checks import check_eval, check_names

    wirer = _wire_all(pipeline)
    return [*check_names(pipeline), *wirer.problems, *check_eval(wirer)]
