"""The logits processor by itself: both interfaces of vLLM, rows that move, come back or are set back, and hostile requests."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from vllm import SamplingParams  # noqa: E402
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality  # noqa: E402

from posttrain.rollout import vllm_plugin as plugin  # noqa: E402
from posttrain.rollout.constraints import Vocabulary  # noqa: E402

pytestmark = pytest.mark.vllm

SIZE = 12
ENDS = frozenset({11})
CONSTRAINT = {"regex": "[a-e]{3,5}"}


@pytest.fixture(autouse=True)
def vocabulary(monkeypatch):
    """Letters a to k and an end token."""
    monkeypatch.setattr(plugin, "STORE", type(plugin.STORE)())
    monkeypatch.setitem(plugin.Shared.vocabularies, "toy", Vocabulary([bytes([97 + i]) for i in range(11)] + [b""], ENDS))


def config(**changes: Any) -> Any:
    parallel = SimpleNamespace(enable_batch_sharded_sampling=changes.pop("sharded", False))
    return SimpleNamespace(
        speculative_config=changes.pop("speculative", None), parallel_config=parallel, model_config=SimpleNamespace(tokenizer="toy")
    )


def params(uid: str, seed: int, **changes: Any) -> SamplingParams:
    return SamplingParams(
        temperature=0.0, extra_args={"awrs": {"constraint": CONSTRAINT, "temperature": 0.9, "uid": uid, "seed": seed, **changes}}
    )


def logits_of(uid: str, position: int) -> torch.Tensor:
    """What a model would say: a function of the request and the position."""
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(1000 * ord(uid[0]) + position)) * 2


def alone(uid: str, seed: int, count: int) -> list[int]:
    """Tokens of a request by itself."""
    processor, outputs = plugin.AWRS(config(), torch.device("cpu"), False), []
    processor.update_state(BatchUpdate(1, [], [(0, params("alone" + uid, seed), [1], outputs)], []))
    for position in range(count):
        outputs.append(int(processor.apply(logits_of(uid, position)[None].clone()).argmax()))
        processor.update_state(None)
    plugin.STORE.pop(("alone" + uid, seed))
    return outputs


class Batch:
    """A small stand-in for vLLM's persistent batch, with the changes that a test orders."""

    def __init__(self) -> None:
        self.processor = plugin.AWRS(config(), torch.device("cpu"), False)
        self.rows: list[tuple[str, list[int]] | None] = []

    def change(self, removed=(), added=(), moved=()):
        for index in removed:
            self.rows[index] = None
        for index, (uid, _, outputs) in added:
            self.rows += [None] * (index + 1 - len(self.rows))
            self.rows[index] = (uid, outputs)
        for one, two, way in moved:
            if way == MoveDirectionality.SWAP:
                self.rows[one], self.rows[two] = self.rows[two], self.rows[one]
            else:
                self.rows[two], self.rows[one] = self.rows[one], None
        while self.rows and self.rows[-1] is None:
            self.rows.pop()
        given = [(index, params(uid, seed) if seed else SamplingParams(), [1], outputs) for index, (uid, seed, outputs) in added]
        self.processor.update_state(BatchUpdate(len(self.rows), list(removed), given, list(moved)))

    def step(self, discard=()):
        logits = torch.stack([logits_of(row[0], len(row[1])) if row else torch.zeros(SIZE) for row in self.rows])
        found = self.processor.apply(logits.clone())
        for i, row in enumerate(self.rows):
            if row and row[0] != "free" and row[0] not in discard:
                assert int((found[i] > -torch.inf).sum()) == 1
                row[1].append(int(found[i].argmax()))
            elif row and row[0] == "free":
                assert torch.equal(found[i], logits[i])
        return found


def test_rows_that_enter_leave_and_move_keep_their_own_tokens():
    want = {uid: alone(uid, seed, 5) for uid, seed in (("a", 5), ("b", 6), ("c", 7), ("d", 8))}
    batch, out = Batch(), {uid: [] for uid in "abcd"}
    batch.change(added=[(0, ("a", 5, out["a"])), (1, ("free", 0, [])), (2, ("b", 6, out["b"]))])
    batch.step()
    batch.change(moved=[(0, 2, MoveDirectionality.SWAP)])
    batch.step(discard=("b",))
    batch.change(added=[(3, ("c", 7, out["c"]))])
    batch.step()
    batch.change(removed=[1], moved=[(3, 1, MoveDirectionality.UNIDIRECTIONAL)])
    batch.step()
    batch.change(removed=[0], added=[(0, ("d", 8, out["d"]))])
    batch.step()
    assert [len(out[uid]) for uid in "abcd"] == [5, 3, 3, 1]
    for uid in "abcd":
        assert out[uid] == want[uid][: len(out[uid])]
    results = plugin.Worker().awrs_pop([("a", 5, 5), ("b", 6, 3), ("x", 1, 1)])
    assert results[0]["tokens"] == want["a"] and results[1]["tokens"] == want["b"][:3] and results[2] is None
    assert ("a", 5) not in plugin.STORE and ("c", 7) in plugin.STORE


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_preempted_row_goes_on_where_it_was(forgotten):
    want, out = alone("a", 5, 5), []
    batch = Batch()
    batch.change(added=[(0, ("a", 5, out))])
    batch.step()
    batch.step()
    batch.change(removed=[0])
    if forgotten:
        plugin.STORE.clear()
    again = list(out)
    batch.change(added=[(0, ("a", 5, again))])
    for _ in range(3):
        batch.step()
    assert again == want


def test_a_request_whose_result_nobody_fetches_is_forgotten_when_it_leaves():
    """A server's: it has no uid of its own, but the name given at admission."""
    given = SamplingParams(temperature=0.9, extra_args={"awrs": {"constraint": CONSTRAINT}})
    plugin.AWRS.validate_params(given)
    processor, outputs = plugin.AWRS(config(), torch.device("cpu"), False), []
    processor.update_state(BatchUpdate(1, [], [(0, given, [1], outputs)], []))
    tokens = []
    for _ in range(2):
        outputs.append(int(processor.apply(logits_of("a", len(outputs))[None].clone()).argmax()))
    assert len(plugin.STORE) == 1
    processor.update_state(BatchUpdate(0, [0], [], []))
    assert not plugin.STORE
    processor.update_state(BatchUpdate(1, [], [(0, given, [1], outputs)], []))
    tokens = [*outputs, int(processor.apply(logits_of("a", 2)[None].clone()).argmax())]
    fresh, again = plugin.AWRS(config(), torch.device("cpu"), False), []
    plugin.STORE.clear()
    fresh.update_state(BatchUpdate(1, [], [(0, given, [1], again)], []))
    for position in range(3):
        again.append(int(fresh.apply(logits_of("a", position)[None].clone()).argmax()))
    assert tokens == again, "after preemption it goes on as if it had never left"


def test_results_leave_out_what_was_drawn_beyond_the_end():
    batch, out = Batch(), []
    batch.change(added=[(0, ("a", 5, out))])
    for _ in range(4):
        batch.step()
    row = plugin.STORE[("a", 5)]
    weights = [draw.log_weight for draw in row.draws]
    result = plugin.Worker().awrs_pop([("a", 5, 3)])[0]
    assert result["tokens"] == out[:3] and result["drawn"] == 3 and result["log_weight"] == pytest.approx(sum(weights[:3]))
    assert result["whole"] and json.loads(json.dumps(result)) == result


def test_a_dead_end_gives_end_tokens_and_says_so(monkeypatch):
    monkeypatch.setitem(plugin.Shared.vocabularies, "toy", Vocabulary([b"a", b"z"] + [b"y"] * 9 + [b""], ENDS))
    batch, out = Batch(), []
    batch.change(added=[(0, ("a", 5, out))])
    plugin.STORE[("a", 5)].checker.state = _Stuck()
    for _ in range(3):
        batch.step()
    assert out == [0, 11, 11]
    for count in (3, 2):
        row = plugin.STORE[("a", 5)]
        result = row.result(count)
        assert (result["tokens"], result["reason"], result["drawn"]) == ([0], "dead_end", 2)


class _Stuck:
    """Allows one `a`, then nothing."""

    def __init__(self) -> None:
        self.text = b""

    def allows(self, piece: bytes) -> bool:
        return self.text + piece == b"a"

    def advance(self, piece: bytes) -> None:
        self.text += piece

    def complete(self) -> bool:
        return False


def test_the_second_interface_draws_the_same_tokens():
    """Slots instead of rows, rows in another order each step, a prompt in two parts, a slot used again."""
    seeds = {"a": 5, "b": 6, "c": 7}
    want = {uid: alone(uid, seed, 4) for uid, seed in seeds.items()}
    slots = 4
    prompt_len, prefill_len = (SimpleNamespace(np=np.full(slots, 3)) for _ in range(2))
    tokens = SimpleNamespace(gpu=torch.zeros(slots, 16, dtype=torch.long))
    processor = plugin.AWRS(config(), SimpleNamespace(prompt_len=prompt_len, prefill_len=prefill_len, all_token_ids=tokens))
    out = {uid: [] for uid in seeds}
    assert (
        processor.add_request(2, params("a", 5))
        and not processor.add_request(1, SamplingParams())
        and processor.add_request(0, params("b", 6))
    )

    def step(order, partial=()):
        owner = {2: "a", 1: None, 0: "b", 3: "c"} | changed
        ids = [owner[slot] for slot in order]
        logits = torch.stack([torch.zeros(SIZE) if uid is None else logits_of(uid, len(out[uid])) for uid in ids])
        lengths = [2 if uid in partial else 3 + len(out.get(uid, ())) for uid in ids]
        context = SimpleNamespace(idx_mapping_np=np.array(order), seq_lens_upper_bound_np=np.array(lengths))
        found = processor.apply(logits.clone(), context)
        for i, uid in enumerate(ids):
            if uid is None or uid in partial:
                assert torch.equal(found[i], logits[i])
            else:
                out[uid].append(int(found[i].argmax()))
                tokens.gpu[order[i], 2 + len(out[uid])] = out[uid][-1]

    changed: dict[int, Any] = {}
    step([2, 1, 0], partial=("b",))
    step([0, 2, 1])
    plugin.STORE.clear()
    assert processor.add_request(2, params("a", 5))
    step([1, 0, 2])
    assert processor.add_request(1, params("c", 7))
    changed[1] = "c"
    step([1, 2, 0])
    assert out == {"a": want["a"][:4], "b": want["b"][:3], "c": want["c"][:1]}


def test_what_cannot_go_together_is_refused_when_the_engine_starts():
    with pytest.raises(ValueError, match="speculative"):
        plugin.AWRS(config(speculative=object()), torch.device("cpu"), False)
    with pytest.raises(ValueError, match="every rank"):
        plugin.AWRS(config(sharded=True), torch.device("cpu"), False)


def test_admission_names_a_request_and_gives_it_noise():
    given = SamplingParams(extra_args={"awrs": json.dumps({"constraint": CONSTRAINT})})
    plugin.AWRS.validate_params(given)
    assert given.extra_args["awrs_uid"] and given.seed is not None
    other = SamplingParams(seed=3, extra_args={"awrs": json.dumps({"constraint": CONSTRAINT})})
    plugin.AWRS.validate_params(other)
    assert other.seed == 3 and other.extra_args["awrs_uid"] != given.extra_args["awrs_uid"]
    free = SamplingParams(top_p=0.5)
    plugin.AWRS.validate_params(free)
    assert free.seed is None and free.extra_args is None


@pytest.mark.parametrize("spec", [
    "", "{", "null", "[]", "3", '"x"', {}, [], 7, {"constraint": None}, {"constraint": {}}, {"constraint": {"regex": "["}},
    {"constraint": {"regex": "a", "choices": ["b"]}}, {"constraint": {"regex": "a" * 5000}},
    {"constraint": {"json_schema": {"type": "objekt"}}},
    {"constraint": {"json_schema": "/etc/hostname"}}, {"constraint": {"uncited": {"path": "/etc/hostname"}}},
    {"constraint": {"all": [{"uncited": {"path": "/etc/hostname"}}]}}, {"constraint": {"plugin": "os.system"}},
    {"constraint": {"lark": "start: start"}}, {"key": "nowhere"}, {"constraint": CONSTRAINT, "sampler": {"particles": 2}},
    {"constraint": CONSTRAINT, "sampler": {"method": "guess"}}, {"constraint": CONSTRAINT, "temperature": -1},
    {"constraint": CONSTRAINT, "temperature": "nan"}, {"constraint": CONSTRAINT, "before": ["x"]}, {"constraint": CONSTRAINT, "seed": -1},
    {"constraint": CONSTRAINT, "surprise": 1}, {"constraint": {"json_schema": {"x-guidance": {}}}},
])  # fmt: skip
def test_hostile_requests_are_refused_at_admission(spec):
    for form in (spec, json.dumps(spec)) if not isinstance(spec, str) else (spec,):
        with pytest.raises(ValueError):
            plugin.AWRS.validate_params(SamplingParams(extra_args={"awrs": form}))


@pytest.mark.parametrize("changes", [
    {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"presence_penalty": 1.0}, {"frequency_penalty": 1.0}, {"repetition_penalty": 1.1},
    {"logit_bias": {3: 1.0}}, {"min_tokens": 2}, {"allowed_token_ids": [1, 2]},
], ids=str)  # fmt: skip
def test_parameters_that_change_the_distribution_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        plugin.AWRS.validate_params(SamplingParams(**changes, max_tokens=9, extra_args={"awrs": {"constraint": CONSTRAINT}}))
