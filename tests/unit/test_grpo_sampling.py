"""Dynamic sampling by itself: which groups are kept, in which order they are used, and what recovery is expected to save."""

from __future__ import annotations

import math
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from posttrain.errors import ConfigError, RolloutError
from posttrain.trainers._grpo_saving import expected_rounds, expected_saving

torch = pytest.importorskip("torch")


def simulate(n: int, m: int, a: float, steps: int, rule: str, seed: int = 0) -> float:
    """Groups sampled a step, drawn one by one. Rules: `discard`, `published` (a round in every step), `guarded`."""
    draw, held, sampled = random.Random(seed), 0, 0
    for _ in range(steps):
        first = rule == "published"
        while held < n or first:
            first = False
            sampled += m
            held += sum(draw.random() < a for _ in range(m))
        held = 0 if rule == "discard" else held - n
    return sampled / steps


@pytest.mark.parametrize(("n", "m", "a"), [(8, 8, 0.5), (8, 2, 0.6), (8, 12, 0.45), (8, 24, 0.55), (4, 3, 0.9), (6, 6, 1.0)])
def test_expected_saving_is_what_a_simulation_saves(n: int, m: int, a: float) -> None:
    steps = 4000
    discard = simulate(n, m, a, steps, "discard")
    assert expected_rounds(n, m, a) * m == pytest.approx(discard, rel=0.02)
    assert expected_saving(n, m, a) == pytest.approx(1 - simulate(n, m, a, steps, "guarded", 1) / discard, abs=0.02)
    assert expected_saving(n, m, a, published=True) == pytest.approx(1 - simulate(n, m, a, steps, "published", 2) / discard, abs=0.02)


def test_expected_saving_by_hand() -> None:
    """k is 1 with probability a * a, else one or two more rounds: N = 2, M = 2."""
    a = 0.5
    below = sum(math.comb(4, j) for j in (0, 1)) / 16
    rounds = 1 + (1 - a * a) + below + sum((6 + 2 * i + 1) / 2 ** (6 + 2 * i) for i in range(40))
    assert expected_rounds(2, 2, a) == pytest.approx(rounds, rel=1e-9)
    assert expected_saving(2, 2, a) == pytest.approx(1 - (2 / a) / (2 * rounds), rel=1e-9)
    assert expected_saving(7, 1, 0.3) == pytest.approx(0, abs=1e-9)
    assert expected_saving(32, 96, 0.58, published=True) == pytest.approx(0, abs=1e-5)
    assert expected_saving(4096, 4096, 0.4) == pytest.approx(1 - 2.5 / 3, abs=1e-3)
    for wrong in ((0, 1, 0.5), (1, 0, 0.5), (1, 1, 0.0), (1, 1, 1.5)):
        with pytest.raises(ValueError, match="at least 1"):
            expected_saving(*wrong)


def test_plan_tells_the_saving() -> None:
    from posttrain.core.estimate import describe
    from posttrain.trainers.grpo import GRPOStage, estimate

    def planned(**dynamic: Any) -> dict[str, float]:
        fields = {"name": "rl", "method": "grpo", "steps": 10, "group": 4, "batch": {"rows": 32}, "rollout": {"max_tokens": 5}}
        return estimate(GRPOStage.model_validate({**fields, "data": {"max_length": 64}, **({"dynamic": dynamic} if dynamic else {})}))

    assert planned() == {"tokens": 10 * 32 * 5}
    assert planned(recover=False, max_rounds=3) == {"tokens": 10 * 3 * 32 * 5}
    found = planned(round=24, max_rounds=2)
    assert found["tokens"] == 10 * 2 * 24 * 4 * 5
    assert found["saved_at_accept_rate_0.5"] == expected_saving(8, 24, 0.5)
    shown = describe(found)
    assert f"sample recovery saves {expected_saving(8, 24, 0.15):.0%} at accept rate 0.15" in shown
    assert f"{expected_saving(8, 24, 0.7):.0%} at accept rate 0.7" in shown


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"scale_rewards": "batch"}, "scale_rewards: batch"),
        ({"num_iterations": 2}, "use recompute"),
        ({"beta": 0.1, "trl": {"sync_ref_model": True}}, "sync_ref_model"),
        ({"trl": {"multi_objective_aggregation": "normalize_then_sum"}}, "normalize_then_sum"),
    ],
)
def test_what_does_not_go_together(fields: dict[str, Any], said: str) -> None:
    from posttrain.trainers.grpo import GRPOStage

    base = {"name": "rl", "method": "grpo", "steps": 1, "group": 4, "batch": {"rows": 8}, "data": {"max_length": 300}}
    GRPOStage.model_validate({**base, **fields})
    with pytest.raises(ValidationError, match=said):
        GRPOStage.model_validate({**base, **fields, "dynamic": {}})
    if "num_iterations" in fields:
        GRPOStage.model_validate({**base, **fields, "dynamic": {"old_logps": "recompute"}})


def test_rows_come_by_position_alone() -> None:
    from posttrain.trainers._grpo_sampling import RowStream
    from posttrain.trainers._train import epoch_order

    rows = [{"prompt": str(i)} for i in range(5)]
    stream = RowStream(rows, 3)
    whole = [row for size in (1, 4, 7, 2) for row in stream.take(size)]
    assert [int(row["prompt"]) for row in whole] == epoch_order(5, 14, 3)
    assert [row["row_pass"] for row in whole] == [0] * 5 + [1] * 5 + [2] * 4
    assert all(row["row_id"] == row["prompt"] for row in whole)
    later = RowStream(rows, 3)
    later.position = 8
    assert later.take(6) == whole[8:]
    later.position = 2
    assert later.take(3) == whole[2:5]
    assert [row["prompt"] for row in RowStream(rows, 4).take(14)] != [row["prompt"] for row in whole]
    assert RowStream([{"row_id": "mine"}], 0).take(1)[0]["row_id"] == "mine"


def test_which_groups_are_kept() -> None:
    """By tolerance, not by == 0; groups without any reward are no wrong ones; one reward alone cannot differ."""
    from posttrain.trainers._grpo_sampling import judge

    none = float("nan")
    rewards = torch.tensor(
        [[0, 1, 0], [1, 1, 1], [0, 0, 0], [none, none, none], [none, 1, none], [0, none, 1], [0.3, 0.3 + 1e-7, 0.3], [0.3, 0.30001, 0.3]]
    )
    correct = torch.where(rewards.isnan(), rewards, torch.where(rewards >= 1, 1.0, -1.0))
    found = judge(rewards.flatten(), correct.flatten(), 3, 1e-6)
    assert found.keep.tolist() == [True, False, False, False, False, True, False, True]
    assert found.right.nonzero().flatten().tolist() == [1, 4]
    assert found.wrong.nonzero().flatten().tolist() == [2, 6]
    assert found.unscored.nonzero().flatten().tolist() == [3]
    assert not judge(rewards.flatten(), correct.flatten(), 3, 1e-4).keep[7]
    assert judge(rewards.flatten(), correct.flatten(), 3, 0.0).keep[6]
    gated = judge(torch.tensor([-1.0, 0.5]), torch.tensor([none, none]), 2, 0.0)
    assert gated.keep.tolist() == [True]


def batch_of(prompts: list[int], lengths: list[int], width: int, start: int = 1) -> dict[str, Any]:
    """Rows whose tokens count up from `start`; prompts end and completions begin at the middle, padded with 0."""
    left, rows = max(prompts) + 1, len(prompts)
    out = {
        "prompt_ids": torch.zeros(rows, left, dtype=torch.long),
        "prompt_mask": torch.zeros(rows, left, dtype=torch.long),
        "completion_ids": torch.zeros(rows, width, dtype=torch.long),
        "completion_mask": torch.zeros(rows, width, dtype=torch.long),
        "ref_per_token_logps": torch.randn(rows, width),
        "advantages": torch.arange(rows) * 1.0,
    }
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        out["prompt_ids"][i, left - prompt :] = torch.arange(start, start + prompt)
        out["prompt_mask"][i, left - prompt :] = 1
        out["completion_ids"][i, :length] = torch.arange(start, start + length) + 100 * i
        out["completion_mask"][i, :length] = 1
    return out


def test_groups_are_cut_and_joined_without_losing_a_token() -> None:
    from posttrain.trainers._grpo_sampling import cut_group, join_groups

    batch = batch_of([3, 3, 5, 5], [2, 4, 1, 6], 9)
    groups = [cut_group(batch, slice(2 * i, 2 * i + 2), 0, i) for i in range(2)]
    assert groups[0].tensors["prompt_ids"].shape == (2, 3)
    assert groups[0].tensors["completion_ids"].shape == (2, 4)
    for order in ((0, 1), (1, 0)):
        joined = join_groups([groups[i] for i in order], slice(0, 4), pad_id=7)
        rows = [r for i in order for r in (2 * i, 2 * i + 1)]
        for part, side in (("prompt", slice(-5, None)), ("completion", slice(0, 6))):
            mask = batch[f"{part}_mask"][rows][:, side]
            assert torch.equal(joined[f"{part}_mask"], mask)
            assert torch.equal(joined[f"{part}_ids"], torch.where(mask.bool(), batch[f"{part}_ids"][rows][:, side], joined[f"{part}_ids"]))
        assert joined["prompt_ids"][joined["prompt_mask"] == 0].tolist() == [7] * 4
        assert torch.equal(joined["advantages"], batch["advantages"][rows])
        assert joined["ref_per_token_logps"][0, 0] == batch["ref_per_token_logps"][rows[0], 0]
    inner = join_groups(groups, slice(1, 3), pad_id=7, multiple=4)
    assert inner["advantages"].tolist() == [1, 2]
    assert (inner["prompt_ids"].size(1), inner["completion_ids"].size(1)) == (8, 8)
    assert join_groups(groups, slice(0, 2), pad_id=7)["completion_ids"].size(1) == 4


def test_a_group_that_is_all_masked_keeps_one_column() -> None:
    from posttrain.trainers._grpo_sampling import cut_group

    batch = batch_of([2, 2], [3, 3], 4)
    batch["completion_mask"].zero_()
    assert cut_group(batch, slice(0, 2), 0, 0).tensors["completion_ids"].shape == (2, 1)


class Scripted:
    """A trainer on one process whose rewards follow a script: row i of the stream is informative iff `script(i)`."""

    def __init__(self, script: Any, *, wanted: int, seen: list[int] | None = None, masked: Any = None, **dynamic: Any) -> None:
        from posttrain.trainers._grpo_config import DynamicConfig
        from posttrain.trainers._grpo_sampling import DynamicSampler
        from posttrain.trainers._grpo_terms import Terms

        self.script, self.masked, self.metrics = script, masked or (lambda i: False), Counter[str]()
        self.num_generations, self.num_iterations, self.scale_rewards = 2, 1, "group"
        self.args = SimpleNamespace(generation_batch_size=2 * wanted, steps_per_generation=1, gradient_accumulation_steps=1)
        same = lambda tensor, **_: tensor  # noqa: E731
        self.accelerator = SimpleNamespace(
            num_processes=1, process_index=0, device=torch.device("cpu"), gather=same, pad_across_processes=same
        )
        self.reward_weights, self.terms, self.reward_matrix = torch.ones(1), Terms(), torch.zeros(0)
        self.processing_class, self.pad_to_multiple_of = SimpleNamespace(pad_token_id=0), None
        self.state, self._metrics, self.sampled = SimpleNamespace(global_step=0), {"train": {}}, 0
        self.dynamic = DynamicSampler(self, DynamicConfig(**dynamic), [{"n": i} for i in range(7)], 0)

    def measure(self, name: str, value: float) -> None:
        self.metrics[name] = value  # type: ignore[assignment]

    def finish_step(self, batch: Any) -> None:
        batch["finished"] = batch["advantages"]

    def score(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Completion tokens name the place of their row in the stream."""
        places = [self.sampled + i // 2 for i in range(len(inputs))]
        assert all(inputs[i]["n"] == inputs[i + 1]["n"] for i in range(0, len(inputs), 2))
        self.sampled += len(inputs) // 2
        self.reward_matrix = torch.tensor([[float(i % 2 if self.script(place) else place % 3 == 0)] for i, place in enumerate(places)])
        ids = torch.tensor([[place] * (1 + place % 3) + [0] * (2 - place % 3) for place in places])
        mask = (torch.arange(3) < torch.tensor([1 + place % 3 for place in places])[:, None]).long()
        mask *= torch.tensor([not self.masked(place) for place in places])[:, None]
        ones = torch.ones(len(places), 1, dtype=torch.long)
        return {
            "prompt_ids": ones,
            "prompt_mask": ones,
            "completion_ids": ids,
            "completion_mask": mask,
            "advantages": torch.ones(len(places)),
            "sampling_per_token_logps": -ids.float(),
            "num_items_in_batch": mask.sum(),
            "old_per_token_logps": -ids.float(),
        }

    def step(self) -> list[int]:
        """Places of the stream whose groups the next step is made of."""
        batch = self.dynamic.fill(self.score)
        self.state.global_step += 1
        assert "old_per_token_logps" not in batch
        assert "finished" in batch
        assert next(iter(batch)) == "prompt_ids"
        assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
        places = batch["completion_ids"][::2, 0].tolist()
        logps = batch["sampling_per_token_logps"][::2, 0]
        share = sum(map(math.isnan, logps.tolist())) / len(places)
        assert share == self.metrics["dynamic/recovered_share"]
        assert all(math.isnan(v) or v == -place for v, place in zip(logps.tolist(), places, strict=True))
        return places


def reference(script: Any, steps: int, n: int, m: int, recover: bool, max_age: int) -> list[list[int]]:
    """The loop in words, one place of the stream at a time."""
    buffer: list[tuple[int, int]] = []
    next_place, made = 0, []
    for step in range(steps):
        buffer = [(place, born) for place, born in buffer if step - born <= max_age]
        while len(buffer) < n:
            for place in range(next_place, next_place + m):
                if script(place):
                    buffer.append((place, step))
            next_place += m
        made.append([place for place, _ in buffer[:n]])
        buffer = buffer[n:] if recover else []
    return made


def hashed(share: float) -> Any:
    """A script that accepts about this share of places."""
    return lambda place: random.Random(place * 7919 + 5).random() < share


@pytest.mark.parametrize("recover", [True, False])
@pytest.mark.parametrize(("n", "m", "share", "max_age"), [(4, 4, 0.5, 2), (4, 1, 0.4, 2), (4, 3, 0.6, 9), (3, 11, 0.7, 1), (3, 11, 0.7, 0)])
def test_steps_are_filled_as_the_loop_says(n: int, m: int, share: float, max_age: int, recover: bool) -> None:
    """Kept groups first, in the order of the stream, each once; also with rounds of several steps and with an age of 0."""
    script = hashed(share)
    trainer = Scripted(script, wanted=n, round=m, recover=recover, max_age=max_age, max_rounds=99)
    steps = [trainer.step() for _ in range(30)]
    assert steps == reference(script, 30, n, m, recover, max_age)
    used = [place for step in steps for place in step]
    assert len(set(used)) == len(used) == 30 * n
    assert all(map(script, used))
    counts, held = trainer.dynamic.counts, len(trainer.dynamic.held)
    assert counts["accepted"] == len(used) + counts["overflow"] + counts["expired"] + held
    assert counts["sampled"] == trainer.sampled == counts["accepted"] + counts["right"] + counts["wrong"]
    assert (counts["overflow"] == 0) == recover or m == 1
    assert trainer.dynamic.summary()["prompts"] == trainer.sampled


@pytest.mark.parametrize("ratio", [2, 3, 6])
def test_rounds_larger_than_a_step_do_not_let_the_buffer_grow(ratio: int) -> None:
    """a M > N: nothing is sampled while a step is held, so the buffer stays below a round and groups stay young."""
    n, script = 4, hashed(0.8)
    trainer = Scripted(script, wanted=n, round=ratio * n, max_age=99)
    sizes, ages, rounds = [], [], []
    for _ in range(60):
        held = len(trainer.dynamic.held)
        trainer.step()
        rounds.append(trainer.metrics["dynamic/rounds"])
        assert (rounds[-1] == 0) == (held >= n)
        assert ("dynamic/accept_rate" in trainer.metrics) or not rounds[-1]
        sizes.append(trainer.metrics["dynamic/buffer"])
        ages.append(trainer.metrics["dynamic/age_max"])
    assert max(sizes) < ratio * n
    assert 1 <= max(ages) <= ratio
    assert 0 in rounds
    saved = 1 - trainer.sampled / (60 * ratio * n * expected_rounds(n, ratio * n, 0.8))
    assert saved == pytest.approx(expected_saving(n, ratio * n, 0.8), abs=0.08)
    literal = buffer = 0
    for _ in range(60):
        buffer += sum(map(script, range(literal, literal + ratio * n))) - n
        literal += ratio * n
    assert buffer > 5 * max(sizes)


def test_old_groups_are_discarded_and_counted() -> None:
    trainer = Scripted(lambda place: True, wanted=2, round=12, max_age=2)
    assert [trainer.step() for _ in range(4)] == [[0, 1], [2, 3], [4, 5], [12, 13]]
    assert trainer.dynamic.counts["expired"] == 6
    assert trainer.metrics["dynamic/expired"] == 6


def test_a_group_without_a_token_to_learn_from_is_left_out() -> None:
    trainer = Scripted(lambda place: True, wanted=2, round=2, masked=lambda place: place < 3)
    assert trainer.step() == [3, 4]
    assert trainer.dynamic.counts["masked"] == 3


def test_a_step_that_is_not_filled() -> None:
    """Stops with counts and advice, or goes on with what can be shared out, and keeps the rest."""
    few = lambda place: place % 5 == 1  # noqa: E731
    trainer = Scripted(few, wanted=4, round=5, max_rounds=2)
    with pytest.raises(RolloutError, match="2 rounds of 5 groups left 2 of the 4 groups") as error:
        trainer.step()
    for part in ("3 all right", "5 not right", "easier rows", "dynamic.on_short: smaller", "step 1"):
        assert part in str(error.value)
    trainer = Scripted(few, wanted=4, round=5, max_rounds=2, on_short="smaller")
    assert trainer.step() == [1, 6]
    assert trainer.metrics["dynamic/short"] == 1
    trainer = Scripted(few, wanted=4, round=5, max_rounds=3, on_short="smaller")
    trainer.args.steps_per_generation = 4
    assert trainer.step() == [1, 6]
    assert len(trainer.dynamic.held) == 1
    assert trainer.step() == [11, 16, 21, 26]
    none = Scripted(lambda place: False, wanted=4, round=5, max_rounds=2, on_short="smaller")
    with pytest.raises(RolloutError, match="left 0 of the 4 groups"):
        none.step()


def test_state_goes_on_where_it_was() -> None:
    script = hashed(0.6)
    whole = Scripted(script, wanted=3, round=7)
    expected = [whole.step() for _ in range(12)]
    first = Scripted(script, wanted=3, round=7)
    for i in range(5):
        assert first.step() == expected[i]
    values, tensors = first.dynamic.state()
    assert first.dynamic.held
    later = Scripted(script, wanted=3, round=7)
    later.dynamic.restore(values, {name: tensor.clone() for name, tensor in tensors.items()})
    later.sampled = first.sampled
    assert [later.step() for _ in range(7)] == expected[5:]
    assert later.dynamic.summary() == whole.dynamic.summary()
    assert later.dynamic.state()[0] == whole.dynamic.state()[0]


def test_what_cannot_be_sampled() -> None:
    trainer = Scripted(hashed(1), wanted=2)
    trainer.score = lambda inputs: {"pixel_values": torch.zeros(1)}  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="pixel_values"):
        trainer.step()
    trainer = Scripted(hashed(1), wanted=2)
    trainer.args.gradient_accumulation_steps, trainer.args.steps_per_generation = 1, 2
    with pytest.raises(ConfigError, match="one update for each batch"):
        trainer.dynamic._check()
    trainer.args.steps_per_generation, trainer.accelerator.num_processes = 1, 2
    trainer.dynamic.round = 3
    with pytest.raises(ConfigError, match="3 groups a round cannot be shared equally by 2 processes"):
        trainer.dynamic._check()
