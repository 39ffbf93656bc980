"""Continuous batching: rows enter and leave a running batch, and no request notices."""

from __future__ import annotations

import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from posttrain.config.constraint import ConstraintConfig, SamplerConfig  # noqa: E402
from posttrain.errors import ConfigError, NumericsError, RolloutError  # noqa: E402
from posttrain.rollout._build import build_constraint  # noqa: E402
from posttrain.rollout.base import Request, Sampling, request_seed  # noqa: E402
from posttrain.rollout.hf import HFEngine  # noqa: E402

PROMPTS = ["x", "The quick", "What is 12 + 34?", "A model reads a prompt, writes", "def add("]
WORDS = build_constraint(ConstraintConfig(regex="[a-z]{3,9}"))


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    """The tiny model, sharpened so that its samples are neither uniform nor constant."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    return model.eval()


@pytest.fixture
def passes(model, monkeypatch):
    """Shapes of the input ids of every forward pass."""
    seen: list[tuple[int, int]] = []
    original = type(model).forward

    def spy(self, *args, **kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", spy)
    return seen


def request(tokenizer, number, limit, prompt=None, **more):
    ids = tokenizer.encode(PROMPTS[number % len(PROMPTS)] if prompt is None else prompt)
    return Request(ids, request_seed(5, number), Sampling(limit, 0.9), str(number), **more)


def mixed(tokenizer, count, rng):
    """Free requests of very different limits, and constrained ones of one and several particles."""
    found = []
    for number in range(count):
        kind = number % 4
        more = {} if kind < 2 else {"constraint": WORDS, "sampler": SamplerConfig(particles=1 if kind == 2 else 3, ess_threshold=0.9)}
        found.append(request(tokenizer, number, rng.choice([1, 2, 5, 9, 30]), **more))
    return found


def run(batch, arrivals, aborted=()):
    """Steps until all have ended; `arrivals` are (step, request), `aborted` {request id: step}. Tokens and completions by request id."""
    names, tokens, found, step, waiting = {}, {}, {}, 0, list(arrivals)
    while batch.busy or waiting:
        while waiting and waiting[0][0] <= step:
            wanted = waiting.pop(0)[1]
            names[batch.add(wanted)] = wanted.id
        for handle, name in names.items():
            if dict(aborted).get(name) == step and name not in found:
                batch.abort(handle)
        brought = batch.step()
        assert batch.rows <= batch.max_batch or batch.rows == 3
        for token in brought.tokens:
            tokens.setdefault(names[token.handle], []).append((token.token, token.logprob))
        for handle, completion in brought.finished:
            assert completion.id == names[handle] and completion.id not in found
            found[completion.id] = completion
        step += 1
    return tokens, found


def same(one, other):
    assert one.token_ids == other.token_ids and one.text == other.text and one.finish_reason == other.finish_reason
    assert np.abs(np.array(one.logprobs) - np.array(other.logprobs)).max(initial=0) < 1e-5


@pytest.mark.parametrize("seed", range(6))
def test_a_request_draws_the_same_whenever_it_comes(model, tiny_tokenizer, seed):
    rng = random.Random(seed)
    wanted = mixed(tiny_tokenizer, 24, rng)
    rng.shuffle(wanted)
    arrivals = sorted(((rng.randrange(40), item) for item in wanted), key=lambda pair: pair[0])
    tokens, found = run(HFEngine(model, tiny_tokenizer, max_batch=rng.choice([1, 2, 5, 8, 64])).batch(), arrivals)
    assert len(found) == len(wanted)
    for item in wanted:
        alone = HFEngine(model, tiny_tokenizer).generate([item])[0]
        same(found[item.id], alone)
        if item.sampler.particles == 1:
            assert tokens.get(item.id, []) == list(zip(found[item.id].token_ids, found[item.id].logprobs, strict=True))
        else:
            assert item.id not in tokens and found[item.id].extra["log_z"] == pytest.approx(alone.extra["log_z"], abs=1e-4)


def test_log_probabilities_are_those_of_one_pass_over_the_text(model, tiny_tokenizer):
    """Also after rows of other widths came and went."""
    wanted = [request(tiny_tokenizer, i, 1 + 7 * (i % 5)) for i in range(20)]
    for completion in HFEngine(model, tiny_tokenizer, max_batch=4).generate(wanted):
        ids = torch.tensor([completion.prompt_ids + completion.token_ids])
        with torch.no_grad():
            logps = torch.log_softmax(model(input_ids=ids).logits[0].float() / 0.9, -1)
        start = len(completion.prompt_ids) - 1
        want = logps[start:-1].gather(1, ids[0, start + 1 :, None])[:, 0].numpy()
        assert np.abs(want - np.array(completion.logprobs)).max() < 1e-5


def test_requests_enter_while_others_run(model, tiny_tokenizer, passes):
    """One long request beside short ones in a batch of two: as many passes over rows as the long one has tokens, not one batch after
    the other."""
    wanted = [request(tiny_tokenizer, 0, 24, "x"), *(request(tiny_tokenizer, i, 3, "x") for i in range(1, 8))]
    found = HFEngine(model, tiny_tokenizer, max_batch=2).generate(wanted)
    assert all(item.finish_reason == "length" for item in found)
    decoding = [shape for shape in passes if shape[1] == 1]
    assert max(shape[0] for shape in decoding) == 2 and len(decoding) <= 23 + 1
    batchwise = [len(HFEngine(model, tiny_tokenizer).generate(wanted[i : i + 2])[0].token_ids) for i in range(0, 8, 2)]
    assert sum(batchwise) > 24


def test_free_and_constrained_requests_share_passes(model, tiny_tokenizer, passes):
    wanted = [
        request(tiny_tokenizer, 0, 12, "x"),
        request(tiny_tokenizer, 1, 12, "x", constraint=WORDS, sampler=SamplerConfig(particles=3)),
    ]
    HFEngine(model, tiny_tokenizer).generate(wanted)
    assert passes[0] == (1, len(wanted[0].prompt_ids)) and passes[1] == (4, 1)
    assert len(passes) <= 12


def test_a_prompt_is_computed_once_for_a_group_larger_than_the_batch(model, tiny_tokenizer, passes):
    ids = tiny_tokenizer.encode("What is 12 + 34?")
    wanted = [Request(ids, request_seed(1, i), Sampling(2 + i % 3), str(i)) for i in range(10)]
    engine = HFEngine(model, tiny_tokenizer, max_batch=3)
    found = engine.generate(wanted)
    assert [shape for shape in passes if shape[1] > 1] == [(1, len(ids))]
    for item, completion in zip(wanted, found, strict=True):
        same(completion, HFEngine(model, tiny_tokenizer).generate([item])[0])


def test_nothing_is_kept_of_rows_that_left(model, tiny_tokenizer):
    """The cache is as wide as its longest row at every step, and gone at the end; so are stored prompts and slots."""
    batch = HFEngine(model, tiny_tokenizer, max_batch=4).batch()
    for i in range(40):
        batch.add(request(tiny_tokenizer, i, 1 + 5 * (i % 7)))
    widest = max(len(tiny_tokenizer.encode(prompt)) for prompt in PROMPTS) + 31
    while batch.busy:
        batch.step()
        if batch.rows:
            keys = batch.cache.cache.layers[0].keys
            assert keys.shape[0] == batch.rows == len(batch.cache) <= 4
            assert keys.shape[2] == batch.cache.width == batch.cache.lengths.max() <= widest
    assert batch.cache.cache is None and not batch.cache._stored and not batch._awaited
    assert len(batch.table.spare) == len(batch.table.requests) <= 8 and not any(batch.table.requests)
    assert batch.step().drawn == 0


def test_aborted_requests_leave_and_the_others_go_on(model, tiny_tokenizer):
    wanted = [request(tiny_tokenizer, i, 12) for i in range(6)]
    wanted += [request(tiny_tokenizer, 10 + i, 12, constraint=WORDS, sampler=SamplerConfig(particles=2)) for i in range(3)]
    plan = {"0": 4, "3": 1, "10": 2, "12": 0}
    tokens, found = run(HFEngine(model, tiny_tokenizer, max_batch=6).batch(), [(0, item) for item in wanted], plan)
    assert set(plan).isdisjoint(found) and set(found) | set(plan) == {item.id for item in wanted}
    assert len(tokens["0"]) == 4
    for item in wanted:
        if item.id in found:
            same(found[item.id], HFEngine(model, tiny_tokenizer).generate([item])[0])


def test_abort_of_what_is_not_there(model, tiny_tokenizer):
    batch = HFEngine(model, tiny_tokenizer).batch()
    handle = batch.add(request(tiny_tokenizer, 0, 1))
    assert not batch.abort(handle + 1)
    batch.step()
    assert not batch.abort(handle) and not batch.busy
    waiting = batch.add(request(tiny_tokenizer, 0, 3))
    assert batch.abort(waiting) and not batch.busy and not batch.abort(waiting)


def test_refused_when_added(model, tiny_tokenizer):
    batch = HFEngine(model, tiny_tokenizer).batch()
    with pytest.raises(RolloutError, match="600 exceeds"):
        batch.add(request(tiny_tokenizer, 0, 600))
    with pytest.raises(ConfigError, match="stop strings"):
        batch.add(Request([5], 0, Sampling(4, stop=("a",)), constraint=WORDS))
    assert not batch.busy


def test_logits_that_are_not_finite_stop_a_mixed_batch(model, tiny_tokenizer, monkeypatch):
    engine = HFEngine(model, tiny_tokenizer)
    for more in ({}, {"constraint": WORDS}):
        batch = engine.batch()
        batch.add(request(tiny_tokenizer, 0, 4, **more))
        batch.step()
        batch.cache.advance = lambda tokens, batch=batch: setattr(batch.cache, "logits", torch.full_like(batch.cache.logits, torch.nan))
        with pytest.raises(NumericsError, match="not finite"):
            batch.step()


def sliding(window):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, sliding_window=window, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return MistralForCausalLM(config).eval()


def test_a_sliding_window_runs_batch_after_batch(tiny_tokenizer):
    """Its cache forgets tokens, so no row can enter beside others; what is drawn is that of passes over the whole text."""
    model = sliding(8)
    engine = HFEngine(model, tiny_tokenizer, max_batch=3)
    batch = engine.batch()
    assert not batch.cache.insertable and HFEngine(sliding(None), tiny_tokenizer).batch().cache.insertable
    wanted = [Request([5 + i] * (2 + 3 * (i % 2)), request_seed(2, i), Sampling(4 + 8 * (i % 2)), str(i)) for i in range(7)]
    _, found = run(batch, [(0, item) for item in wanted])
    batch.add(wanted[0])
    batch.step()
    with pytest.raises(ValueError, match="takes no rows"):
        batch.cache.insert([(5,)], lambda prompt: False)
    for item in wanted:
        completion = found[item.id]
        same(completion, HFEngine(model, tiny_tokenizer).generate([item])[0])
        ids = torch.tensor([completion.prompt_ids + completion.token_ids])
        with torch.no_grad():
            logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].float(), -1)
        want = logps[len(completion.prompt_ids) - 1 : -1].gather(1, ids[0, len(completion.prompt_ids) :, None])[:, 0]
        assert np.abs(want.numpy() - np.array(completion.logprobs)).max() < 1e-5


class _Broken:
    """A constraint whose checker raises before the first token."""

    def start(self):
        raise RolloutError("the checker `broken` raised ValueError: no", where="rollout.constraint")


@pytest.mark.parametrize("particles", [1, 3])
def test_a_checker_that_raises_at_once_ends_its_own_request_only(model, tiny_tokenizer, particles):
    alone = {c.id: c for c in HFEngine(model, tiny_tokenizer, max_batch=6).generate([request(tiny_tokenizer, i, 9) for i in range(4)])}
    wanted = [request(tiny_tokenizer, i, 9) for i in range(4)]
    wanted.insert(1, request(tiny_tokenizer, 9, 9, constraint=_Broken(), sampler=SamplerConfig(particles=particles)))
    found = HFEngine(model, tiny_tokenizer, max_batch=6).generate(wanted)
    broken = found.pop(1)
    assert broken.finish_reason == "checker_error" and "no" in broken.extra["error"] and not broken.token_ids
    assert broken.extra["log_z"] == -np.inf and not broken.extra["complete"]
    assert all(c.token_ids == alone[c.id].token_ids for c in found)
    only = HFEngine(model, tiny_tokenizer).generate([request(tiny_tokenizer, 9, 9, constraint=_Broken())])
    assert only[0].finish_reason == "checker_error"
