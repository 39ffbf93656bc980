"""The part of `validate --deep` that looks at models: files, templates on real rows, lengths, memory, disk.

Memory of a training stage is at least

    weights + gradients + two moments = P * (w + 4 * t),   t = 4 bytes in float32,

with P parameters of w bytes (4 on a CPU); with `lora` only the adapter has gradients and moments, which is left out
here. Activations come on top, so the check refuses only what cannot fit.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.common import TrainConfig
from posttrain.config.pipeline import Pipeline
from posttrain.core.doctor import gpu_memory_bytes, memory_bytes
from posttrain.core.durable import free_bytes
from posttrain.core.estimate import estimate
from posttrain.core.plan import PlannedStage
from posttrain.core.rundir import read_json
from posttrain.errors import ArtifactError, ConfigError, Problem
from posttrain.models.fourbit import check_four_bit

if TYPE_CHECKING:
    from posttrain.verbs.deep import Findings, Row

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Models:
    """Models as far as they can be known before the run, each looked at once."""

    def __init__(self, stages: list[PlannedStage], found: Findings) -> None:
        self._stages = {stage.name: stage for stage in stages}
        self._found = found
        self._folders: dict[str, Path | None] = {}
        self._tokenizers: dict[str, Any] = {}

    def maker(self, stage: PlannedStage) -> PlannedStage | None:
        """The `init` stage that a model goes back to, or None."""
        while True:
            ref = next(iter(stage.inputs.get("model", [])), None)
            if ref is None or ref.origin != "stage":
                return stage if stage.method.name == "init" else None
            stage = self._stages[ref.name]

    def folder(self, stage: PlannedStage) -> Path | None:
        """Local folder of the stage's input model, or of the one that it goes back to; its files are checked."""
        ref = next(iter(stage.inputs.get("model", [])), None)
        if ref is None:
            return None
        if ref.origin == "stage" and not ref.digest:
            return self.folder(self._stages[ref.name])
        if ref.key not in self._folders:
            self._folders[ref.key] = None
            self._found.trying(f"stages.{stage.name}.in.model", lambda: self._folders.__setitem__(ref.key, self._locate(ref)))
        return self._folders[ref.key]

    def _locate(self, ref: Any) -> Path | None:
        from posttrain.models.check import check_folder
        from posttrain.models.source import read_base, resolve_model

        source = resolve_model(ref)
        if source.form == "hub":
            source = _cached(source)
        if source is None or source.form == "gguf":
            self._found.skipped.append(f"{ref.name}: not a local folder, so template and lengths are checked when it runs")
            return None
        check_folder(source.local)
        if source.form == "adapter":
            base = read_base(source.local)[0]
            return self._locate(replace(ref, origin="model", name=base.id, spec={"id": base.id, "revision": base.revision}))
        return source.path

    def tokenizer(self, stage: PlannedStage) -> Any:
        """Tokenizer of the stage's model, or None."""
        folder = self.folder(stage)
        if folder is None:
            return None
        if str(folder) not in self._tokenizers:
            from posttrain.models.load import load_tokenizer

            self._tokenizers[str(folder)] = load_tokenizer(folder)
        return self._tokenizers[str(folder)]

    def positions(self, stage: PlannedStage) -> int | None:
        """Longest sequence that the model takes."""
        maker = self.maker(stage)
        if maker is not None:
            return getattr(maker.config, "max_length", None)
        folder = self.folder(stage)
        config = read_json(folder / "config.json") if folder else None
        text = (config or {}).get("text_config") or config or {}
        found = text.get("max_position_embeddings")
        return found if isinstance(found, int) else None

    def parameters(self, stage: PlannedStage) -> int | None:
        """Parameters in the model's safetensors files."""
        from posttrain.models.check import read_header, weight_files

        folder = self.folder(stage)
        if folder is None:
            return None
        try:
            tensors = [entry for file in weight_files(folder) for entry in read_header(file).values()]
        except ArtifactError:
            return None
        return sum(int(math.prod(entry["shape"])) for entry in tensors)


def _cached(source: Any) -> Any:
    """A hub model in the local cache as a folder, or None; nothing is downloaded."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(source.id, revision=source.revision, local_files_only=True)
    except Exception:
        return None
    return replace(source, form="folder", path=Path(folder))


def check_stage(stage: PlannedStage, models: Models, rows: list[Row], found: Findings) -> None:
    """Lengths, template on the first rows, and memory of one stage that will run."""
    if "model" not in stage.inputs:
        return
    path = f"stages.{stage.name}"
    fits = _check_lengths(stage, models.positions(stage), path, found)
    if isinstance(stage.config, TrainConfig):
        if stage.config.lora is not None and stage.config.lora.load_in_4bit:
            field = f"{path}.lora.load_in_4bit"
            found.trying(field, lambda: check_four_bit(field, "folder"))
        if fits:
            found.trying(path, lambda: _check_rows(stage, models, rows, found))
        _check_memory(stage, models.parameters(stage), path, found)


def _max_tokens(stage: PlannedStage) -> tuple[str, int] | None:
    rollout = getattr(stage.config, "rollout", None)
    if rollout is not None:
        return "rollout.max_tokens", rollout.max_tokens
    return ("max_tokens", stage.config.max_tokens) if hasattr(stage.config, "max_tokens") else None


def _check_lengths(stage: PlannedStage, positions: int | None, path: str, found: Findings) -> bool:
    """Whether the completion leaves room for a prompt."""
    limit = _max_tokens(stage)
    if positions is None or limit is None or limit[1] < positions:
        return True
    message = f"{limit[1]} leaves no room for a prompt in the model's {positions} positions"
    found.config.append(Problem(f"{path}.{limit[0]}", message, "lower it"))
    return False


def _check_rows(stage: PlannedStage, models: Models, rows: list[Row], found: Findings) -> None:
    from posttrain.data.chat import encode_rows, scan_prompts, set_template
    from posttrain.data.mask import check_stops, shown_rows, told

    tokenizer = models.tokenizer(stage) if rows else None
    if tokenizer is None:
        return
    data, positions = stage.config.data, models.positions(stage) or stage.config.data.max_length
    if data.template:
        ref = stage.inputs["model"][0]
        set_template(tokenizer, data.template, replace=ref.origin == "model")
    limit = _max_tokens(stage)
    if limit is None:
        encoded, report = encode_rows(tokenizer, rows, data, data.on_bad)
        check_stops(report, f"stages.{stage.name}.data.max_length")
        found.shown += [f"stages.{stage.name}: {line}" for line in told(shown_rows(tokenizer, encoded))]
        if report["longest"] > positions:
            message = f"a row has {report['longest']} tokens, the model takes {positions}"
            raise ConfigError(message, where=f"stages.{stage.name}.data.max_length", fix=f"set it to at most {positions}")
    else:
        room = min(data.max_length, positions) - limit[1]
        scan_prompts(tokenizer, rows, format=data.format, max_prompt=max(room, 0), on_bad=data.on_bad)


def _check_memory(stage: PlannedStage, parameters: int | None, path: str, found: Findings) -> None:
    if parameters is None:
        return
    gpu = gpu_memory_bytes()
    there, processes = (gpu, 1) if gpu else (memory_bytes(), stage.processes)
    spec = stage.inputs["model"][0].spec
    lora = stage.config.lora
    width = 0.5 if lora and lora.load_in_4bit else BYTES.get(spec.get("dtype", "auto"), 2 if gpu else 4)
    weights = parameters * width * processes
    state = 0 if stage.config.lora else 3 * parameters * 4 * processes
    if there and weights + state > there:
        parts = f"weights {weights / GIB:.1f}, gradients and moments {state / GIB:.1f}"
        message = (
            f"needs at least {(weights + state) / GIB:.1f} GiB ({parts}) for {parameters:,} parameters, {there / GIB:.1f} GiB are available"
        )
        fix = "use a larger machine" if stage.config.lora else "train with `lora`, or use a larger machine"
        found.config.append(Problem(path, message, fix))


def check_disk(pipeline: Pipeline, stages: list[PlannedStage], found: Findings) -> None:
    """Estimated bytes of the stages to run against the free space and `limits.disk_gb`."""
    needs = {stage.name: estimate(stage).get("disk_bytes", 0.0) for stage in stages if stage.todo}
    limit = pipeline.limits.disk_gb
    for name, need in needs.items():
        if limit and need > limit * 1e9:
            found.config.append(
                Problem(f"stages.{name}", f"needs about {need / 1e9:.2f} GB, limits.disk_gb is {limit:g}", "lower checkpoint.keep")
            )
    free = free_bytes(stages[0].folder) if stages else 0
    if sum(needs.values()) > free and stages:
        most = max(needs, key=lambda name: needs[name])
        message = f"the stages to run need about {sum(needs.values()) / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; `{most}` needs most"
        found.config.append(Problem("disk", message, "free space, lower checkpoint.keep, or give another --runs folder"))
