"""The one datatrove step of a pass; in a file of its own, since its class needs datatrove when it is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datatrove.pipeline.base import PipelineStep

from data_pipelines.engine import Job, Step
from data_pipelines.shards import Shard


class ShardStep(PipelineStep):  # type: ignore[misc, unused-ignore]
    """Does the shards rank, rank + world_size, ... that have no part yet.

    Args:
        task, job, step, shards: as for `engine.Driver.run`.
    """

    name = "posttrain shards"
    type = "posttrain"

    def __init__(self, task: Step, job: Job, step: str, shards: list[Shard]) -> None:
        super().__init__()
        self.task, self.job, self.step, self.shards = task, job, step, shards

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Documents of earlier steps pass through."""
        for shard in self.shards[rank::world_size]:
            if not self.job.done(self.step, shard):
                self.task(self.job, self.step, shard)
                self.stat_update("shards")
        yield from data or ()
