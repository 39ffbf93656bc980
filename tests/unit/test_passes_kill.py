"""kill -9 in the middle of every pass: a rerun goes on with what is there and ends in the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import selector_kit as kit
from selector_kit_rank import RankConfig

TESTS = Path(__file__).parent.parent
TARGET = [{"text": "alpha beta", "id": f"t{i}", "v": [float(i), 1.0, -0.5, 0.25]} for i in range(8)]
CODE = """
import sys, time
from pathlib import Path
import selector_kit as kit, selector_kit_rank
from data_pipelines import engine
step, folder = sys.argv[1], Path(sys.argv[2])
run = engine.Inline.run
def slow(self, task, job, name, shards):
    for shard in run(self, task, job, name, shards):
        if name == step:
            time.sleep(0.15)
        yield shard
engine.Inline.run = slow
cfg = kit.config(selector_kit_rank.RankConfig, guard={"salad": True}, chunks={"words": 6})
kit.run(folder / "cut", folder / "raw", {"target": folder / "target"}, cfg, selector="selector_kit_rank")
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    kit.write_shards(folder / "raw", kit.corpus(90), 9)
    kit.write_shards(folder / "target", TARGET, 8)
    run(folder, "whole")
    return folder


def run(folder: Path, name: str) -> list[str]:
    log: list[str] = []
    cfg = kit.config(RankConfig, guard={"salad": True}, chunks={"words": 6})
    kit.run(folder / name, folder / "raw", {"target": folder / "target"}, cfg, selector="selector_kit_rank", log=log)
    return log


@pytest.mark.multiproc
@pytest.mark.parametrize("step", ["features.target", "features.raw", "target", "raw", "guard", "scores", "picked"])
def test_kill_9_costs_one_shard_of_any_pass(whole, tmp_path, step):
    for name in ("raw", "target"):
        (tmp_path / name).symlink_to(whole / name)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    child = subprocess.Popen([sys.executable, "-c", CODE, step, tmp_path], env=env)
    folder = f"features-*/{step[9:]}" if step.startswith("features") else f"{'?' * 16}/{step}"
    work, parts = tmp_path / "cut" / "work", f"{folder}/[0-9]*"
    while child.poll() is None and len(list(work.glob(parts))) < 3:
        time.sleep(0.01)
    child.kill()
    child.wait()
    done = len(list(work.glob(parts)))
    every = 9 if step in ("features.raw", "raw", "scores", "picked") else 8
    assert 3 <= done < every
    assert f"{step}: {done} of {every} shards were done before" in run(tmp_path, "cut")
    assert kit.tree(tmp_path / "cut" / "out") == kit.tree(whole / "whole" / "out")
