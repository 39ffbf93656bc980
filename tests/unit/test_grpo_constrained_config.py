"""What the config of constrained rollouts refuses, and where it says so."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from posttrain.trainers.grpo import GRPOStage

BASE: dict[str, Any] = {"name": "rl", "steps": 1, "group": 4, "batch": {"rows": 8}, "data": {"max_length": 64}}
DIGITS = {"constraint": {"regex": "[0-9]+"}, "max_tokens": 8}


@pytest.mark.parametrize(("rollout", "words"), [
    ({"max_tokens": 8, "weighting": "sequence"}, "`weighting` goes with `constraint`"),
    ({"max_tokens": 8, "free_share": 0.5}, "`free_share` goes with `constraint`"),
    ({**DIGITS, "engine": "trl"}, "needs engine: hf"),
    ({**DIGITS, "sampler": {"particles": 4}}, "depend on one another"),
    ({**DIGITS, "top_p": 0.9}, "does not go with top_p or top_k"),
    ({**DIGITS, "weighting": "sequence", "sampler": {"method": "local"}}, "local has none"),
    ({**DIGITS, "weighting": "sequence"}, "leaves 1 free completion"),
    ({**DIGITS, "free_share": 0.1}, "of a group of 4 is none"),
    ({**DIGITS, "free_share": 0.75}, "at least 2 are compared"),
    ({**DIGITS, "weight_clip": 0.5}, "greater than or equal to 1"),
    ({**DIGITS, "free_share": 1.0}, "less than 1"),
])  # fmt: skip
def test_refused(rollout: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        GRPOStage.model_validate({**BASE, "rollout": rollout})


def test_a_config_written_out_whole_is_valid() -> None:
    for rollout in ({"max_tokens": 8}, DIGITS, {**DIGITS, "weighting": "sequence", "free_share": 0.0}):
        whole = GRPOStage.model_validate({**BASE, "rollout": rollout}).dump()
        assert GRPOStage.model_validate(whole).dump() == whole
