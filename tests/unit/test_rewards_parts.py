"""Parts of a reward that are reported beside its value."""

from __future__ import annotations

import threading

import pytest

from posttrain.errors import RewardError
from posttrain.rewards import collecting, get_reward, known_rewards, record, registry, score


@pytest.fixture
def temporary(monkeypatch):
    """Registers rewards for one test."""
    known_rewards()
    monkeypatch.setattr(registry, "_REWARDS", dict(registry._REWARDS))
    return lambda name, function: registry.reward(name)(function)


def counted(completions, **columns):
    """Records lengths; fails where a completion is `bad`."""
    record("chars", [len(text) for text in completions])
    record("vowels", [None if not text else sum(letter in "aeiou" for letter in text) for text in completions])
    if "bad" in completions:
        raise ValueError("bad")
    return [1.0] * len(completions)


def test_score_returns_them_by_reward(temporary):
    temporary("counted", counted)
    found = score(["counted", "length"], ["abc", ""])
    assert found.recorded == {"counted/chars": [3.0, 0.0], "counted/vowels": [1.0, None]}
    assert found.parts["counted"] == [1.0, 1.0]


def test_a_row_that_fails_has_none_of_them_and_keeps_the_others(temporary):
    temporary("counted", counted)
    found = score("counted", ["abc", "bad", "o"])
    assert found.parts["counted"] == [1.0, None, 1.0]
    assert found.recorded == {"counted/chars": [3.0, None, 1.0], "counted/vowels": [1.0, None, 1.0]}


def test_nobody_collects(temporary):
    temporary("counted", counted)
    assert get_reward("counted")(["abc"]) == [1.0]


def test_a_wrong_number_of_them_is_an_error(temporary):
    def short(completions, **columns):
        record("chars", [1.0])
        return [1.0] * len(completions)

    temporary("short", short)
    with pytest.raises(RewardError, match="`short` recorded 1 values of `chars`, expected 2"):
        get_reward("short")(["a", "b"])


def test_threads_do_not_mix(temporary):
    temporary("counted", counted)
    ready, seen = threading.Barrier(8), {}

    def work(size):
        with collecting() as parts:
            ready.wait()
            get_reward("counted")(["a" * size] * 3)
        seen[size] = parts["chars"]

    threads = [threading.Thread(target=work, args=(size,)) for size in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {size: [float(size)] * 3 for size in range(1, 9)}
