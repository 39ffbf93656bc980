"""The small policy and loop of the reinforcement benchmarks, on an untaught policy."""

from __future__ import annotations

from typing import Any

import pytest
from benchmark_kit import load

torch = pytest.importorskip("torch")
for part in ("_harness", "_corpus", "_lm", "_judges"):
    load(part)
toy, rl_recovery = load("_rl_toy"), load("rl_recovery")


@pytest.fixture
def untaught(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An untaught policy in place of the taught one, which often ends at once, so that groups differ."""
    torch.manual_seed(0)
    policy = toy.Policy()
    monkeypatch.setattr(toy, "start", lambda seed: policy)
    return policy


def test_tasks_are_right_and_their_parts_disjoint() -> None:
    parts = toy.tasks()
    assert not {r["prompt"] for r in parts["train"]} & {r["prompt"] for r in parts["test"] + parts["validation"]}
    for row in parts["test"]:
        prompt, answer = row["prompt"].rstrip("="), row["answer"]
        wanted = str(sum(map(int, prompt.split("+")))) if "+" in prompt else prompt[:0:-1] if prompt[0] == "R" else str(prompt.count("a"))
        assert answer == wanted
        assert len(answer) < toy.ANSWER
        assert len(row["prompt"]) <= toy.PROMPT


def test_padding_changes_nothing(untaught: Any) -> None:
    ids = toy.encode(["1+2="], 4, True)
    wide = toy.encode(["1+2="], toy.PROMPT, True)
    assert torch.allclose(untaught(ids)[0, -1], untaught(wide)[0, -1], atol=1e-6)


def test_exact_accuracy_is_the_product_of_the_answers_probabilities(untaught: Any) -> None:
    rows = toy.tasks()["test"][:3]
    found = toy.exact(untaught, rows)
    for row, p in zip(rows, found["p"].tolist(), strict=True):
        text, chance = row["prompt"], 1.0
        for token in row["answer"] + ".":
            chance *= untaught(toy.encode([text], toy.PROMPT + toy.ANSWER, True))[0, -1].softmax(-1)[toy.CHARACTERS.index(token)].item()
            text += token
        assert p == pytest.approx(chance, rel=1e-4)


def test_samples_have_the_probabilities_of_the_policy(untaught: Any) -> None:
    prompts = toy.encode(["1+2="] * 4000, toy.PROMPT, True)
    answers = toy.drawn(untaught, prompts, torch.Generator().manual_seed(0))
    first = torch.bincount(answers[:, 0], minlength=toy.PAD).double() / len(answers)
    assert torch.allclose(first, untaught(prompts[:1])[0, -1].softmax(-1).double(), atol=0.03)
    for row in answers.tolist():
        end = row.index(toy.END) if toy.END in row else toy.ANSWER
        assert all(token == toy.PAD for token in row[end + 1 :])
        assert toy.PAD not in row[:end]


def reward_some(loop: Any) -> None:
    """Rewards by the first token in place of the answer, so that an untaught policy has groups that differ."""
    inner = loop.score

    def score(rows: Any) -> Any:
        for row in rows:
            row["answer"] = "1"
        return inner(rows)

    loop.score = score


@pytest.mark.parametrize("share", [0.25, 1.0, 3.0])
def test_a_step_of_dynamic_sampling_is_full_of_groups_that_differ(untaught: Any, share: float) -> None:
    dynamic = {"round": int(share * toy.GROUPS), "max_rounds": 400}
    loop = toy.Reinforcement(0, toy.Setting(dynamic=dynamic))
    reward_some(loop)
    for _ in range(2):
        groups = loop.batch()["advantages"].view(-1, toy.GROUP)
        assert len(groups) == toy.GROUPS
        assert (groups.amax(1) - groups.amin(1) == 2).all()


def test_the_loss_is_the_plain_double_sum_with_its_terms(untaught: Any) -> None:
    found = {}
    for name, setting in {
        "plain": toy.Setting(),
        "ours": toy.Setting(entropy=("both", 2.0, 1.0)),
        "pushed": toy.Setting(push=0.5),
        "below": toy.Setting(entropy=("below", 0.0, 100.0)),
    }.items():
        loop = toy.Reinforcement(0, setting)
        reward_some(loop)
        batch = loop.batch()
        found[name] = loop.loss(batch).item(), loop.seen["entropy"], loop
    (plain, entropy, loop) = found["plain"]
    reward_some(loop)
    assert found["ours"][0] == pytest.approx(plain + 2 * abs(entropy - 1.0), abs=1e-4)
    assert found["pushed"][0] == pytest.approx(plain - 0.5 * entropy, abs=1e-4)
    assert found["below"][0] == pytest.approx(plain, abs=1e-6)
    assert found["below"][2].coefficient == toy.DELTA
    again = toy.Reinforcement(0, toy.Setting())
    reward_some(again)
    batch = again.batch()
    logps, _ = toy.answered(again.policy, batch["prompt_ids"], batch["completion_ids"])
    wanted = -(batch["advantages"][:, None] * batch["completion_mask"]).sum() / len(logps)
    assert plain == pytest.approx(wanted.item(), abs=1e-5)


def test_predicted_saving_is_the_plans_at_a_constant_rate() -> None:
    from posttrain.trainers._grpo_saving import expected_saving

    cells = {"steps": {"accept_rate": [0.4] * 25}}
    assert rl_recovery.predicted(cells, 2.0) == pytest.approx(expected_saving(toy.GROUPS, 2 * toy.GROUPS, 0.4))
