"""Parts of the server on transformers that a whole one hardly shows: faults of the engine, and texts that grow token by token."""

from __future__ import annotations

import queue
import random

import pytest

torch = pytest.importorskip("torch")

from posttrain.errors import NumericsError, PosttrainError, RolloutError  # noqa: E402
from posttrain.rollout.base import Completion, Request, Sampling  # noqa: E402
from posttrain.rollout.hf import HFEngine  # noqa: E402
from posttrain.rollout.running import NewToken  # noqa: E402
from posttrain.rollout.server.answers import Text  # noqa: E402
from posttrain.rollout.server.runner import Full, Runner  # noqa: E402
from posttrain.rollout.stopping import StopRule  # noqa: E402


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture
def runner(model, tiny_tokenizer):
    made = Runner(HFEngine(model, tiny_tokenizer, max_batch=4), max_waiting=6)
    made.start()
    yield made
    if made.alive:
        made.stop()


def asked(tokenizer, count, limit=8):
    return [Request(tokenizer.encode("The quick"), i, Sampling(limit)) for i in range(count)]


def collect(events, count):
    """Ends by place."""
    found = {}
    while len(found) < count:
        place, event = events.get(timeout=60)
        if not isinstance(event, NewToken):
            found[place] = event
    return found


def test_a_fault_ends_what_runs_and_the_next_requests_are_served(runner, model, tiny_tokenizer, monkeypatch):
    events: queue.Queue = queue.Queue()
    whole = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, *a, **k: (_ for _ in ()).throw(ValueError("out of order")))
    runner.submit(asked(tiny_tokenizer, 3), lambda place, event: events.put((place, event)))
    assert all(isinstance(e, RolloutError) and "out of order" in e.message for e in collect(events, 3).values())

    def spoiled(self, *args, **kwargs):
        out = whole(self, *args, **kwargs)
        out.logits[:] = float("nan")
        return out

    monkeypatch.setattr(type(model), "forward", spoiled)
    runner.submit(asked(tiny_tokenizer, 2), lambda place, event: events.put((place, event)))
    assert all(isinstance(e, NumericsError) for e in collect(events, 2).values())
    monkeypatch.setattr(type(model), "forward", whole)
    runner.submit(asked(tiny_tokenizer, 3), lambda place, event: events.put((place, event)))
    alone = HFEngine(model, tiny_tokenizer).generate(asked(tiny_tokenizer, 3))
    assert [collect_one.token_ids for _, collect_one in sorted(collect(events, 3).items())] == [c.token_ids for c in alone]


def test_what_does_not_fit_is_refused_alone(runner, tiny_tokenizer):
    events: queue.Queue = queue.Queue()
    wanted = [*asked(tiny_tokenizer, 1), Request([], 0, Sampling(4)), *asked(tiny_tokenizer, 1)]
    runner.submit(wanted, lambda place, event: events.put((place, event)))
    found = collect(events, 3)
    assert isinstance(found[1], RolloutError) and isinstance(found[0], Completion) and found[0].token_ids == found[2].token_ids


def test_a_full_queue_and_the_end(runner, tiny_tokenizer):
    events: queue.Queue = queue.Queue()
    with pytest.raises(Full):
        runner.submit(asked(tiny_tokenizer, 7), lambda place, event: None)
    numbers = runner.submit(asked(tiny_tokenizer, 2, 400), lambda place, event: events.put((place, event)))
    runner.cancel([numbers[0], numbers[0], 10**6])
    runner.stop()
    ends = [(place, event) for place, event in list(events.queue) if not isinstance(event, NewToken)]
    assert [place for place, _ in ends] == [1] and isinstance(ends[0][1], PosttrainError) and "stopping" in ends[0][1].message
    with pytest.raises(RolloutError, match="stopped"):
        runner.submit(asked(tiny_tokenizer, 1), lambda place, event: None)


def test_pieces_of_a_stream_make_the_text(tiny_tokenizer):
    """Split characters, stop strings over several tokens and their beginnings: never more than the text, and all of it at the end."""
    rng, ends = random.Random(0), frozenset({tiny_tokenizer.eos_token_id})
    samples = ["naïve 😀 text ", "a stop STOP stopp", "\n\nST", "x y z", "日本語 "]
    for _ in range(300):
        ids = tiny_tokenizer.encode("".join(rng.choice(samples) for _ in range(4)), add_special_tokens=False)
        stop = tuple(rng.sample(["STOP", "TOP", "😀 t", "本語 日", "zz"], rng.randint(0, 2)))
        rule, grown, taken = StopRule(tiny_tokenizer, stop, ends), Text(tiny_tokenizer, stop, ends), []
        pieces = []
        for token in [*ids, *ends]:
            taken.append(token)
            pieces.append(grown.add(token))
            if rule.ends(taken):
                break
        text = rule.text(taken)
        assert text.startswith("".join(pieces))
        assert "".join(pieces) + grown.rest(Completion("", [], taken, [], text, "stop")) == text
