"""Constrained completions of the transformers engine: valid, exact by enumeration, independent of the batch, and what can go wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator

import jsonschema
import numpy as np
import pytest
from scipy.stats import chi2

from tests.constraint_kit import JSON, SCHEMA, WORDS, bound_requests, sharpened

torch = pytest.importorskip("torch")

from posttrain.config.constraint import ConstraintConfig, SamplerConfig  # noqa: E402
from posttrain.errors import ConfigError  # noqa: E402
from posttrain.rollout import orders  # noqa: E402
from posttrain.rollout._build import build_constraint  # noqa: E402
from posttrain.rollout.base import Request, Sampling  # noqa: E402
from posttrain.rollout.constraints import Vocabulary, predicate  # noqa: E402
from posttrain.rollout.hf import HFEngine  # noqa: E402

PROMPT = "The quick"


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return sharpened(tiny_model_dir)


@pytest.fixture(scope="module")
def vocabulary(tiny_tokenizer, model):
    return Vocabulary.of(tiny_tokenizer, HFEngine(model, tiny_tokenizer).eos_ids)


def requests(tokenizer, count, constraint, prompts=(PROMPT,), **settings):
    return bound_requests(tokenizer, prompts, count, constraint, **settings)


@pytest.fixture(scope="module")
def exact(model, vocabulary, tiny_tokenizer) -> dict[str, float]:
    """P(the model writes a short word and ends), and a long one, over all ways to cut the words into tokens."""
    start = tiny_tokenizer.encode(PROMPT)

    def ways(done: list[int], rest: bytes) -> Iterator[float]:
        with torch.no_grad():
            p = torch.softmax(model(input_ids=torch.tensor([start + done])).logits[0, -1].double(), -1).numpy()
        if not rest:
            yield sum(p[end] for end in vocabulary.ends)
        for token, piece in enumerate(vocabulary.pieces):
            if piece and rest.startswith(piece):
                yield from (p[token] * other for other in ways([*done, token], rest[len(piece) :]))

    long = [a + b for a in "stuvwxyz" for b in "stuvwxyz"]
    return {
        kind: float(sum(sum(ways([], word.encode())) for word in words)) for kind, words in (("short", list("abcdefgh")), ("long", long))
    }


def kind_of(text: str) -> str:
    return "short" if len(text) == 1 else "long"


@pytest.mark.parametrize("sampler", [{}, {"method": "mask"}, {"method": "local"}, {"particles": 3}, {"awrs": {"max_calls": 2}}], ids=str)
def test_texts_are_valid_and_logprobs_are_the_models_own(model, tiny_tokenizer, sampler):
    engine = HFEngine(model, tiny_tokenizer, max_batch=9)
    found = engine.generate(requests(tiny_tokenizer, 4, JSON, ("The quick", "What is 12 + 34?", "x"), **sampler))
    for completion in found:
        assert completion.finish_reason == "stop" and completion.extra["complete"]
        assert jsonschema.Draft202012Validator(SCHEMA).is_valid(json.loads(completion.text))
        ids = torch.tensor([completion.prompt_ids + completion.token_ids])
        with torch.no_grad():
            logps = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
        begin = len(completion.prompt_ids) - 1
        want = logps[begin:-1].gather(1, ids[0, begin + 1 :, None])[:, 0].numpy()
        assert np.abs(np.array(completion.logprobs) - want).max() < 1e-4
        assert completion.extra["calls"] > 0 or sampler.get("method") == "mask"
        assert (completion.extra["log_weight"] == 0.0) == (sampler.get("method") == "local")


@pytest.mark.parametrize("sampler", [{}, {"particles": 3, "ess_threshold": 0.9}], ids=["one", "three"])
def test_a_request_does_not_depend_on_its_batch(model, tiny_tokenizer, sampler):
    wanted = requests(tiny_tokenizer, 3, JSON, ("The quick", "What is 12 + 34?"), **sampler)
    free = [Request(tiny_tokenizer.encode("x"), 5, Sampling(12))]
    together = HFEngine(model, tiny_tokenizer).generate([*wanted, *free])
    alone = [HFEngine(model, tiny_tokenizer, max_batch=3).generate([request])[0] for request in [*wanted, *free]]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert together[-1].extra == {} and all(
        a.extra["log_z"] == pytest.approx(b.extra["log_z"], abs=1e-4) for a, b in zip(together[:-1], alone[:-1], strict=True)
    )


@pytest.mark.parametrize("sampler", [{"awrs": {"probes": 1}}, {}, {"method": "mask"}, {"particles": 4}], ids=str)
@pytest.mark.parametrize("device", ["host", "keys"])
def test_weights_estimate_the_chance_of_the_constraint(model, tiny_tokenizer, exact, monkeypatch, sampler, device):
    monkeypatch.setattr(orders, "on_host", lambda _: device == "host")
    count = 500 if sampler.get("particles") else 1500
    found = HFEngine(model, tiny_tokenizer, max_batch=256).generate(requests(tiny_tokenizer, count, WORDS, max_tokens=5, **sampler))
    weights = np.array([math.exp(c.extra["log_z"]) for c in found])
    total = sum(exact.values())
    assert abs(weights.mean() - total) < 4.5 * weights.std() / math.sqrt(len(weights))
    if not sampler.get("particles"):
        for kind, chance in exact.items():
            part = weights * np.array([kind_of(c.text) == kind for c in found])
            assert abs(part.mean() - chance) < 4.5 * part.std() / math.sqrt(len(weights))


def test_particles_bring_the_distribution_near_the_exact_one_and_local_sampling_does_not(model, tiny_tokenizer, exact):
    total = sum(exact.values())
    distance = {}
    for name, sampler in {"local": {"method": "local"}, "particles": {"particles": 16}}.items():
        wanted = requests(tiny_tokenizer, 250, WORDS, max_tokens=5, **sampler)
        kinds = [kind_of(c.text) for c in HFEngine(model, tiny_tokenizer, max_batch=512).generate(wanted)]
        distance[name] = 0.5 * sum(abs(kinds.count(kind) / len(kinds) - chance / total) for kind, chance in exact.items())
    assert distance["particles"] < 0.08 < 2 * 0.08 < distance["local"]


def test_temperature_zero_takes_the_best_that_is_allowed(model, tiny_tokenizer, vocabulary):
    engine = HFEngine(model, tiny_tokenizer)
    found = engine.generate(requests(tiny_tokenizer, 1, {"regex": "[0-9]{3}"}, temperature=0.0))[0]
    ids = tiny_tokenizer.encode(PROMPT)
    text = b""
    for token in found.token_ids[:-1]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        allowed = [i for i, piece in enumerate(vocabulary.pieces) if piece and piece.isdigit() and len(text + piece) <= 3]
        assert token == max(allowed, key=lambda i: float(logits[i]))
        ids, text = [*ids, token], text + vocabulary.pieces[token]
    assert found.text == text.decode() and found.token_ids[-1] in vocabulary.ends


def test_dead_ends_and_faults_of_a_checker_stay_with_their_request(model, tiny_tokenizer):
    @predicate("test-dead")
    def dead(text: bytes, ends: bool) -> bool:
        return len(text) < 3 and not ends

    @predicate("test-broken")
    def broken(text: bytes, ends: bool) -> bool:
        if len(text) > 2:
            raise ZeroDivisionError("inside")
        return not ends

    asked = [
        *requests(tiny_tokenizer, 1, {"plugin": "test-dead"}),
        *requests(tiny_tokenizer, 1, {"plugin": "test-broken"}),
        *requests(tiny_tokenizer, 1, WORDS),
    ]
    end, error, good = HFEngine(model, tiny_tokenizer).generate(asked)
    assert end.finish_reason == "dead_end" and end.extra["log_weight"] == -math.inf and len(end.token_ids) < 3
    assert error.finish_reason == "checker_error" and "ZeroDivisionError: inside" in error.extra["error"]
    assert re.fullmatch(WORDS["regex"], good.text) and good.finish_reason == "stop"


def test_a_text_that_is_cut_says_so(model, tiny_tokenizer):
    found = HFEngine(model, tiny_tokenizer).generate(requests(tiny_tokenizer, 3, {"regex": "a{40}"}, max_tokens=4))
    assert all(c.finish_reason == "length" and not c.extra["complete"] and len(c.token_ids) == 4 for c in found)


@pytest.mark.parametrize(("sampling", "sampler", "words"), [
    (Sampling(4, top_p=0.9), {}, "does not go with top_p"), (Sampling(4, top_k=5), {}, "does not go with top_p or top_k"),
    (Sampling(4, stop=("x",)), {}, "stop strings"), (Sampling(4, temperature=0), {"particles": 2}, "would all be equal"),
])  # fmt: skip
def test_what_cannot_be_combined_is_refused(model, tiny_tokenizer, sampling, sampler, words):
    request = Request(tiny_tokenizer.encode("x"), 1, sampling, "", build_constraint(ConstraintConfig(boxed=True)), SamplerConfig(**sampler))
    with pytest.raises(ConfigError, match=words):
        HFEngine(model, tiny_tokenizer).generate([request])


def test_keys_of_the_device_draw_without_replacement_and_by_their_place():
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
    runs = 20_000
    tokens, sizes = orders.top_keys(p.log().expand(runs, 5), range(runs), [3] * runs, 2)
    assert np.allclose(sizes, p.numpy()[tokens])
    seen = np.zeros((5, 5))
    np.add.at(seen, (tokens[:, 0], tokens[:, 1]), 1)
    want = np.array([[runs * p[a] * p[b] / (1 - p[a]) if a != b else 0.0 for b in range(5)] for a in range(5)])
    off = ~np.eye(5, dtype=bool)
    assert not seen[~off].any() and ((seen - want)[off] ** 2 / want[off]).sum() < chi2.ppf(0.9999, 19)
    alone = orders.top_keys(p.log()[None], [77], [3], 5)[0]
    assert (alone[0, :2] == tokens[77]).all()
    u = orders.keyed_uniforms([1, 2], [0, 0], 50_000)
    assert float(u.min()) > 0 and float(u.max()) < 1 and abs(float(u.mean()) - 0.5) < 0.01
    assert abs(float(torch.corrcoef(u)[0, 1])) < 0.02
