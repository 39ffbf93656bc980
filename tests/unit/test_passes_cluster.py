"""datatrove as the driver: the same bytes from its local executor, and the others built from options."""

from __future__ import annotations

from pathlib import Path

import pytest
import selector_kit as kit

from data_pipelines.cluster import ClusterDriver, make_executor
from data_pipelines.selector import Engine
from posttrain.errors import ConfigError, PosttrainError

pytest.importorskip("datatrove", reason="extra datatrove")

TARGET = [{"text": "alpha beta", "id": "t"}]


def engine(name: str, **fields) -> Engine:
    return Engine.model_validate({"with": f"datatrove-{name}", **fields})


@pytest.mark.multiproc
def test_two_tasks_give_the_same_bytes_and_take_up_what_is_there(tmp_path):
    raw = kit.write_shards(tmp_path / "raw", kit.corpus(), 5)
    target = {"target": kit.write_rows(tmp_path / "t.jsonl", TARGET)}
    kit.run(tmp_path / "pool", raw, target, kit.config())
    cfg = kit.config(workers=2, engine={"with": "datatrove-local", "tasks": 2, "options": {"start_method": "spawn"}})
    kit.run(tmp_path / "trove", raw, target, cfg)
    assert kit.tree(tmp_path / "pool" / "out") == kit.tree(tmp_path / "trove" / "out")
    lost = next((tmp_path / "trove" / "work").glob("*/scores/000003.parquet"))
    kept = lost.with_name("000002.parquet").stat().st_mtime_ns
    lost.unlink()
    for path in (tmp_path / "trove" / "out").iterdir():
        path.unlink()
    log: list[str] = []
    kit.run(tmp_path / "trove", raw, target, kit.config(engine={"with": "datatrove-local", "tasks": 2}), log=log)
    assert "scores: 4 of 5 shards were done before" in log and lost.exists()
    assert lost.with_name("000002.parquet").stat().st_mtime_ns == kept
    assert kit.tree(tmp_path / "pool" / "out") == kit.tree(tmp_path / "trove" / "out")


def test_slurm_is_built_from_the_options(tmp_path):
    cfg = engine("slurm", tasks=12, options={"partition": "cpu", "time": "01:00:00", "cpus_per_task": 4})
    made = make_executor(cfg, [], tmp_path)
    assert (made.tasks, made.partition, made.time, made.cpus_per_task, made.skip_completed) == (12, "cpu", "01:00:00", 4, False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"options": {"partition": "cpu"}}, "time"),
        ({"options": {"partition": "cpu", "time": "1:00:00", "colour": "red"}}, "colour"),
        ({"options": {"tasks": 3}}, "`tasks` is set by the passes"),
    ],
)
def test_wrong_options_are_named(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        make_executor(engine("slurm", **fields), [], tmp_path)


class Job:
    """Parts that appear at the third look."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def done(self, step: str, shard: int) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize(("looks", "fails"), [(2, False), (10**9, True)])
def test_parts_made_elsewhere_are_waited_for(tmp_path, monkeypatch, looks, fails):
    from data_pipelines import cluster

    class Executor:
        def run(self) -> None:
            """Returns at once, as one that only submits."""

    monkeypatch.setattr(cluster, "make_executor", lambda *a: Executor())
    driver = ClusterDriver(engine("slurm", poll_s=0.01, stall_s=0.2), Path(tmp_path))
    found = driver.run(lambda *a: None, Job(looks), "scores", [7])  # type: ignore[arg-type, list-item]
    if fails:
        with pytest.raises(PosttrainError, match="1 of 1 shards have no part"):
            list(found)
    else:
        assert list(found) == [None, None, 7]
