"""The `optim` block: presets, parts that are off, fields that would do nothing, and the way through a file and back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from posttrain.config.optim import OptimConfig

REPO = Path(__file__).resolve().parents[2]
OFF = {"clip_decay": None, "norm_decays": None, "reset_every": 0}


@pytest.mark.parametrize(
    "given",
    [
        {}, {"schedule": "constant"}, {"name": "stable_spam"}, {"name": "stable_spam", "max_grad_norm": 1.0},
        {"name": "stable_spam", "stable_spam": {"preset": "gradient_stabilizer"}}, {"name": "stable_spam", "stable_spam": OFF},
        {"name": "stable_spam", "stable_spam": {"clip_limit": 10.0, "decay_to": 0.5}},
    ],
    ids=str,
)  # fmt: skip
def test_a_dumped_block_is_read_as_the_same(given: dict[str, Any]) -> None:
    block = OptimConfig.model_validate(given)
    assert OptimConfig.model_validate(block.dump()) == block


def test_presets_fill_what_is_not_given() -> None:
    first, later, changed = (
        OptimConfig.model_validate({"name": "stable_spam", "stable_spam": fields}).stable_spam
        for fields in (None, {"preset": "gradient_stabilizer"}, {"preset": "gradient_stabilizer", "reset_every": 500})
    )
    assert first and (first.clip_decay, first.norm_decays, first.norm_eps, first.reset_every) == (0.999, [0.7, 0.9], 1e-8, 1000)
    assert later and (later.clip_decay, later.norm_decays, later.norm_eps, later.reset_every) == (None, [0.6, 0.999], 1e-12, 0)
    assert changed and (changed.clip_decay, changed.reset_every) == (None, 500)


def test_no_global_clip_unless_asked_for() -> None:
    assert OptimConfig().max_grad_norm == 1.0
    assert OptimConfig.model_validate({"name": "stable_spam"}).max_grad_norm == 0.0
    assert OptimConfig.model_validate({"name": "stable_spam", "max_grad_norm": 2.0}).max_grad_norm == 2.0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stable_spam": {}}, "does nothing without name: stable_spam"),
        ({"name": "lion"}, "'adamw' or 'stable_spam'"),
        ({"schedule": "constant", "warmup": 0.1}, "has no warm-up"),
        ({"name": "stable_spam", "stable_spam": {"preset": "spam"}}, "'stable_spam' or 'gradient_stabilizer'"),
        ({"name": "stable_spam", "stable_spam": {"norm_decays": [0.5]}}, "at least 2 items"),
        ({"name": "stable_spam", "stable_spam": {"clip_decay": None, "clip_limit": 3.0}}, "clip_limit does nothing"),
        ({"name": "stable_spam", "stable_spam": {"norm_decays": None, "norm_eps": 1e-8}}, "norm_eps belongs to norm_decays"),
        ({"name": "stable_spam", "stable_spam": {"preset": "gradient_stabilizer", "compat": "official"}}, "the authors' Stable-SPAM"),
        ({"name": "stable_spam", "stable_spam": {"gamma1": 0.7}}, "gamma1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as error:
        OptimConfig.model_validate(given)
    assert words in str(error.value)


@pytest.mark.parametrize(("kind", "version", "words"), [("DEEPSPEED", None, "DeepSpeed makes its own step"), ("FSDP", 1, "FSDP 1")])
def test_a_step_that_is_not_ours_is_refused(kind: str, version: int | None, words: str) -> None:
    pytest.importorskip("torch")
    from accelerate import DistributedType

    from posttrain.errors import ConfigError
    from posttrain.trainers._optim import choose_optimizer

    plugin = SimpleNamespace(fsdp_version=version)
    accelerator = SimpleNamespace(distributed_type=DistributedType[kind], state=SimpleNamespace(fsdp_plugin=plugin))
    trainer = SimpleNamespace(accelerator=accelerator, args=SimpleNamespace(max_steps=10))
    ctx = SimpleNamespace(name="tune", events=SimpleNamespace(log=lambda _: None))
    with pytest.raises(ConfigError, match=words) as error:
        choose_optimizer(trainer, SimpleNamespace(optim=OptimConfig.model_validate({"name": "stable_spam"})), ctx)  # type: ignore[arg-type]
    assert "stages.tune.optim.name" in str(error.value)
    choose_optimizer(trainer, SimpleNamespace(optim=OptimConfig()), ctx)  # type: ignore[arg-type]


def test_numbers_of_the_authors_runs() -> None:
    """The full-scale stage holds what their 4-bit scripts and their optimizer's defaults say."""
    from posttrain.config.pipeline import load_pipeline

    stage: Any = load_pipeline(
        REPO / "configs" / "stages" / "sft_stable_spam.yaml", ["model.id=./m", "sources.rows.path=./r.jsonl"]
    ).stages[0]
    optim, own = stage.optim, stage.optim.stable_spam
    assert (stage.steps, stage.batch.rows, stage.data.max_length) == (20000, 512, 256)
    assert (optim.lr, optim.schedule, optim.warmup, optim.weight_decay, optim.max_grad_norm) == (4e-4, "cosine", 2000, 0.0, 0.0)
    assert (optim.beta1, optim.beta2, optim.eps) == (0.9, 0.999, 1e-8)
    assert (own.clip_decay, own.norm_decays, own.norm_eps, own.reset_every, own.decay_to) == (0.999, [0.7, 0.9], 1e-8, 500, 0.5)
