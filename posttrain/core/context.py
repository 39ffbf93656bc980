"""What a stage function is given, besides its config."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.core.artifact import InputRef
from posttrain.errors import ConfigError

if TYPE_CHECKING:
    from posttrain.core.events import Events


@dataclass(frozen=True)
class World:
    """Processes of the stage."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0


@dataclass
class StageContext:
    """Inputs, folders, randomness, events of one running stage.

    Args:
        name, method: the stage.
        seed: seed of the stage; derive every generator from it.
        inputs: port -> references, in the order written.
        out: empty folder to write the artifact into; committed by the worker when `run` returns. Bytes must depend on
            config, inputs and seed only (no time stamps, no absolute paths).
        work: scratch folder that survives a kill; checkpoints go here.
        events: progress, metrics and log lines.
        world: rank and world size.
        eval: resolved evaluation, `{"sets": {name: {...EvalSet, "ref": InputRef}}, "when": [...], "batch": n, "every": n|None}`.
        heldout: validation and test rows of the pipeline; `data.heldout_keys(ctx)` reads them.
        trust_remote_code: only from the command line.
        summary: JSON-ready facts that go into the manifest; tables and the report read them.
        meta: JSON-ready facts about the artifact's form (row type, quantization scheme, base digest).
    """

    name: str
    method: str
    seed: int
    inputs: dict[str, list[InputRef]]
    out: Path
    work: Path
    events: Events
    world: World = World()
    eval: dict[str, Any] = field(default_factory=dict)
    heldout: list[InputRef] = field(default_factory=list)
    trust_remote_code: bool = False
    summary: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def refs(self, port: str) -> list[InputRef]:
        """References of a port; empty where it is optional and not filled."""
        return self.inputs.get(port, [])

    def ref(self, port: str) -> InputRef:
        """The single reference of a port."""
        found = self.refs(port)
        if len(found) != 1:
            raise ConfigError(f"expected one input, got {len(found)}", where=f"stages.{self.name}.in.{port}")
        return found[0]
