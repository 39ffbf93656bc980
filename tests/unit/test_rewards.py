"""Registry and simple rewards: discovery, length checks, failures that are never 0.0, mixtures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import ValidationError

from posttrain.config.common import EvalSet, RewardUse
from posttrain.errors import ConfigError, NumericsError, RewardError
from posttrain.rewards import failures, find_reward, get_reward, known_rewards, registry, score


@pytest.fixture
def temporary(monkeypatch):
    """Registers rewards for one test."""
    known_rewards()
    monkeypatch.setattr(registry, "_REWARDS", dict(registry._REWARDS))
    failures(reset=True)
    return lambda name, function, **kw: registry.reward(name, **kw)(function)


def test_shipped_rewards_are_found_and_documented():
    found = known_rewards()
    assert {"exact", "math_exact", "boxed_format", "length"} <= set(found)
    assert all(item.doc for item in found.values())
    assert find_reward("exact").columns == ("answer",)


def test_unknown_reward_names_the_nearest():
    with pytest.raises(ConfigError, match="math_exact"):
        get_reward("math_exac")


def test_importing_rewards_is_light():
    code = "import sys; from posttrain.rewards import known_rewards; known_rewards(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "posttrain.rewards.math_exact" in loaded
    assert not {"torch", "sympy", "trl", "transformers", "numpy"} & set(loaded)


def test_exact_strips_and_accepts_messages():
    chat = [{"role": "assistant", "content": " 42\n"}]
    assert get_reward("exact")(["42 ", "41", chat, "7"], answer=["42", "42", 42, None]) == [1.0, 0.0, 1.0, None]


def test_boxed_format_wants_one_box():
    texts = [r"so \boxed{7}", r"\boxed{1} \boxed{2}", "7", r"\boxed{ }", r"\boxed{\frac{1}{2}}", r"\boxed{7"]
    assert get_reward("boxed_format")(texts) == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


def test_length_is_capped():
    assert get_reward("length")(["a " * 50, "a " * 500, ""]) == [0.5, 1.0, 0.0]


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0, 3.0], None, 0.5])
def test_wrong_number_of_values_names_reward_expected_and_got(temporary, values):
    temporary("bad", lambda completions, **columns: values)
    with pytest.raises(RewardError, match="`bad`.*expected 2, got"):
        get_reward("bad")(["a", "b"])


def test_a_value_that_is_no_number_is_an_error(temporary):
    temporary("bad", lambda completions, **columns: ["x"])
    with pytest.raises(RewardError, match="'x' for completion 0"):
        get_reward("bad")(["a"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_stop_the_run(temporary, value):
    temporary("bad", lambda completions, **columns: [1.0, value])
    with pytest.raises(NumericsError, match="`bad`.*completion 1"):
        get_reward("bad")(["a", "b"])


def test_a_row_that_raises_is_none_and_counted(temporary):
    def picky(completions, answer, **columns):
        return [1.0 / (len(text) - gold) for text, gold in zip(completions, answer, strict=True)]

    temporary("picky", picky, columns=("answer",))
    found = score("picky", ["aa", "bb"], {"answer": [1, 2]})
    assert found.parts == {"picky": [1.0, None]}
    assert found.failures == {"picky.error": 1}


def test_a_reward_that_always_raises_is_an_error(temporary):
    temporary("broken", lambda completions, **columns: 1 / 0)
    with pytest.raises(RewardError, match="`broken` failed on all 2.*ZeroDivisionError"):
        get_reward("broken")(["a", "b"])


def test_missing_column_is_named_before_scoring():
    with pytest.raises(RewardError, match="`exact` needs the column `answer`; the rows have: final"):
        get_reward("exact")(["a"], final=["a"])


def test_mixture_skips_none_and_is_none_only_where_all_are(temporary):
    temporary("a", lambda completions, **columns: [1.0, None, 0.5, None])
    temporary("b", lambda completions, **columns: [2.0, 3.0, None, None])
    total = score({"a": 1.0, "b": 0.1}, list("wxyz")).total
    assert total[:3] == pytest.approx([1.2, 0.3, 0.5])
    assert total[3] is None


def with_options(
    completions, gold, *, steps: int, power: float = 1.0, folder: Path | None = None, mode: Literal["a", "b"] = "a", **columns
):
    """Keyword-only parameters of all kinds."""
    return [steps * power + (folder is not None) + (mode == "b")] * len(completions)


def test_options_are_the_keyword_only_parameters(temporary, tmp_path):
    temporary("tuned", with_options, columns=("gold",))
    assert list(find_reward("tuned").options) == ["steps", "power", "folder", "mode"]
    options = {"steps": 2, "power": 3, "folder": str(tmp_path), "mode": "b"}
    assert get_reward("tuned", options)(["a"], gold=["g"], power=["a column of that name"]) == [8.0]
    assert score("tuned", ["a"], {"gold": ["g"]}, options={"tuned": {"steps": 5}}).total == [5.0]


@pytest.mark.parametrize(("options", "says"), [
    ({"steps": 1, "powr": 2.0}, "no option `powr`.*fix: did you mean `power`"),
    ({"power": 2.0}, "needs the option `steps`"),
    ({"steps": "3"}, "option `steps` of reward `tuned`: got '3'.*valid integer"),
    ({"steps": 1, "mode": "c"}, "option `mode`.*'a' or 'b'"),
    ({"steps": 1, "folder": "${NOT_SET_ANYWHERE}"}, "option `folder`.*not set"),
    ({"steps": 1, "completions": []}, "no option `completions`"),
])  # fmt: skip
def test_wrong_options_are_config_errors(temporary, options, says):
    temporary("tuned", with_options, columns=("gold",))
    with pytest.raises(ConfigError, match=re.compile(says, re.DOTALL)):
        get_reward("tuned", options)


def test_options_are_checked_where_a_config_is_read(temporary, tmp_path):
    temporary("tuned", with_options, columns=("gold",))
    use = RewardUse.model_validate({"use": "tuned", "options": {"steps": 1, "folder": "here"}}, context={"base": tmp_path})
    assert use.dump()["options"] == {"steps": 1, "folder": str(tmp_path / "here")}
    with pytest.raises(ValidationError, match="did you mean `timeout_s`"):
        RewardUse(use="math_exact", options={"timeout": 2.0})
    with pytest.raises(ValidationError, match="it takes no options"):
        EvalSet.model_validate({"from": "tasks:test", "reward": "exact", "reward_options": {"strip": True}})


def test_no_completions_no_values():
    assert score(["exact", "length"], []).total == []


def test_same_name_in_two_modules_is_refused(temporary):
    def other(completions, **columns):
        return [0.0] * len(completions)

    other.__module__ = "somewhere.other"
    with pytest.raises(ConfigError, match="declared twice"):
        temporary("exact", other)
