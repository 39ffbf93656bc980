"""Blocks of `method: grpo`."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from posttrain.trainers._grpo_config import EntropyConfig


def test_the_published_entropy_is_a_preset_and_fields_written_out_win() -> None:
    published = EntropyConfig.model_validate({"preset": "confucius3"})
    assert (published.target, published.coeff, published.level) == (0.55, 0.001, "micro")
    assert EntropyConfig.model_validate({"preset": "confucius3", "coeff": 2.0}).coeff == 2.0
    ours = EntropyConfig.model_validate({"target": 0.3})
    assert (ours.coeff, ours.level) == (1.0, "batch")
    with pytest.raises(ValidationError, match="target"):
        EntropyConfig.model_validate({})
