"""The vLLM engine against the transformers engine and the model itself, on the CPU build."""

from __future__ import annotations

import contextlib
import json
import math

import jsonschema
import numpy as np
import pytest

from tests.constraint_kit import JSON, SCHEMA, WORDS, bound_requests, sharpened

torch = pytest.importorskip("torch")

from posttrain.config.engine import VllmConfig  # noqa: E402
from posttrain.errors import ConfigError, RolloutError  # noqa: E402
from posttrain.rollout.base import Request, RolloutEngine, Sampling, request_seed  # noqa: E402
from posttrain.rollout.constraints import predicate  # noqa: E402
from posttrain.rollout.hf import HFEngine  # noqa: E402
from posttrain.rollout.sampling import SamplingRows, sampling_logprobs  # noqa: E402

pytestmark = pytest.mark.vllm

PROMPTS = ("The quick brown", "What is 12 + 34?", "def add(left")


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return sharpened(tiny_model_dir)


@pytest.fixture(scope="module")
def engine(model, tiny_tokenizer):
    with contextlib.suppress(ImportError):
        import llvmlite.binding.ffi  # noqa: F401  vLLM stumbles over it while it starts, where nothing hides it
    from posttrain.rollout.vllm import VLLMEngine

    made = VLLMEngine.of_model(model, tiny_tokenizer, VllmConfig(segment=16), max_batch=24)
    yield made
    made.close()


@pytest.fixture
def segment(engine):
    """Sets the engine's segment for one test."""
    before = engine.options

    def set_to(tokens):
        engine.options = before.model_copy(update={"segment": tokens})

    yield set_to
    engine.options = before


def free(tokenizer, sampling, count=1):
    return [Request(tokenizer.encode(p), request_seed(1, p, k), sampling, f"{p}/{k}") for p in PROMPTS for k in range(count)]


def constrained(tokenizer, count, constraint, *settings, **sampler):
    return bound_requests(tokenizer, PROMPTS, count, constraint, *settings, **sampler)


def test_it_is_an_engine(engine):
    assert isinstance(engine, RolloutEngine) and engine.dtype == torch.float32 and engine.max_model_len == 512


def test_the_process_keeps_its_threads(engine):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("sampling", [
    Sampling(12), Sampling(12, 0.6), Sampling(12, 1.4), Sampling(12, 0.8, 0.7), Sampling(12, 1.2, 1.0, 5),
], ids=str)  # fmt: skip
def test_logprobs_are_those_of_the_sampling_distribution(engine, model, tiny_tokenizer, sampling):
    for found in engine.generate(free(tiny_tokenizer, sampling, 2)):
        whole = torch.tensor([found.prompt_ids + found.token_ids])
        with torch.no_grad():
            logits = model(whole).logits[0, len(found.prompt_ids) - 1 : -1]
        want = (
            sampling_logprobs(logits, SamplingRows.of([sampling] * len(logits)))
            .gather(1, whole[0, len(found.prompt_ids) :, None])
            .squeeze(1)
        )
        assert torch.allclose(want, torch.tensor(found.logprobs), atol=1e-4)


def test_greedy_and_stops_as_the_transformers_engine(engine, model, tiny_tokenizer):
    ours = HFEngine(model, tiny_tokenizer)
    plain = free(tiny_tokenizer, Sampling(30, 0.0))
    texts = [c.text for c in ours.generate(plain)]
    stop = tuple(text[5:7] for text in texts)
    for requests in (plain, free(tiny_tokenizer, Sampling(30, 0.0, stop=stop))):
        for a, b in zip(ours.generate(requests), engine.generate(requests), strict=True):
            assert (a.token_ids, a.text, a.finish_reason, a.id) == (b.token_ids, b.text, b.finish_reason, b.id)
            assert b.logprobs == [0.0] * len(b.token_ids)


@pytest.mark.parametrize("sampler", [{}, {"method": "mask"}, {"method": "local"}, {"awrs": {"probes": 1, "max_calls": 2}}], ids=str)
def test_constrained_completions_are_those_of_the_transformers_engine(engine, model, tiny_tokenizer, sampler):
    requests = constrained(tiny_tokenizer, 12, JSON, **sampler)
    want, found = HFEngine(model, tiny_tokenizer).generate(requests), engine.generate(requests)
    for a, b in zip(want, found, strict=True):
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
        assert np.allclose(a.logprobs, b.logprobs, atol=1e-4) and a.extra.keys() == b.extra.keys()
        assert all(a.extra[name] == pytest.approx(b.extra[name], abs=2e-3) for name in a.extra)
        jsonschema.validate(json.loads(b.text), SCHEMA)


def test_particles_looked_at_every_token_are_those_of_the_transformers_engine(engine, model, tiny_tokenizer, segment):
    segment(1)
    requests = constrained(tiny_tokenizer, 2, JSON, particles=4)
    want, found = HFEngine(model, tiny_tokenizer).generate(requests), engine.generate(requests)
    assert any(c.extra["resamplings"] for c in want)
    for a, b in zip(want, found, strict=True):
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
        assert np.allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert all(a.extra[name] == pytest.approx(b.extra[name], abs=2e-3) for name in a.extra)


@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_particles_estimate_the_same_chance_whatever_the_segment(engine, model, tiny_tokenizer, segment, tokens):
    """log Z by particles agrees with single weighted samples of the other engine."""
    segment(tokens)
    single = HFEngine(model, tiny_tokenizer, max_batch=256).generate(constrained(tiny_tokenizer, 400, WORDS, max_tokens=5, method="mask"))
    found = engine.generate(constrained(tiny_tokenizer, 60, WORDS, max_tokens=5, method="mask", particles=4, ess_threshold=0.9))
    for prompt in PROMPTS:
        a = np.array([math.exp(c.extra["log_z"]) for c in single if c.id.startswith(prompt)])
        b = np.array([math.exp(c.extra["log_z"]) for c in found if c.id.startswith(prompt)])
        assert abs(a.mean() - b.mean()) < 4.5 * math.hypot(a.std() / math.sqrt(len(a)), b.std() / math.sqrt(len(b)))
    assert tokens == 16 or any(c.extra["resamplings"] for c in found)


def test_a_request_does_not_depend_on_what_shares_the_batch(engine, tiny_tokenizer):
    mixed = [
        *constrained(tiny_tokenizer, 12, JSON, 0.8),
        *free(tiny_tokenizer, Sampling(9, 0.9), 4),
        *constrained(tiny_tokenizer, 1, JSON, 0.0),
    ]
    together = engine.generate(mixed)
    assert [c.id for c in together] == [request.id for request in mixed]
    alone = [engine.generate([request])[0] for request in mixed[::5]]
    assert [c.token_ids for c in together[::5]] == [c.token_ids for c in alone]
    assert all(("log_z" in c.extra) == (request.constraint is not None) for c, request in zip(together, mixed, strict=True))


def test_dead_ends_and_failing_checkers_end_their_own_completion(engine, model, tiny_tokenizer):
    @predicate("stuck_vllm")
    def stuck(text: bytes, ends: bool) -> bool:
        return len(text) < 4 and not ends

    @predicate("breaks_vllm")
    def breaks(text: bytes, ends: bool) -> bool:
        if len(text) > 3:
            raise KeyError("no such thing")
        return True

    requests = [
        *constrained(tiny_tokenizer, 3, {"plugin": "stuck_vllm"}, max_tokens=9),
        *constrained(tiny_tokenizer, 3, {"plugin": "breaks_vllm"}, max_tokens=9),
        *constrained(tiny_tokenizer, 3, JSON),
    ]
    want, found = HFEngine(model, tiny_tokenizer).generate(requests), engine.generate(requests)
    assert {c.finish_reason for c in found} == {"dead_end", "checker_error", "stop"}
    for a, b in zip(want, found, strict=True):
        assert (a.token_ids, a.finish_reason, a.extra.get("error")) == (b.token_ids, b.finish_reason, b.extra.get("error"))
        assert a.extra["log_weight"] == pytest.approx(b.extra["log_weight"], abs=2e-3)


def test_a_cut_text_says_whether_it_is_whole(engine, model, tiny_tokenizer):
    requests = constrained(tiny_tokenizer, 6, {"regex": "[a-z ]*[aeiou]"}, max_tokens=3)
    want, found = HFEngine(model, tiny_tokenizer).generate(requests), engine.generate(requests)
    assert [c.extra["complete"] for c in found] == [c.extra["complete"] for c in want]
    assert {c.extra["complete"] for c in found if c.finish_reason == "length"} == {True, False}


def test_nothing_is_kept_after_the_results_are_fetched(engine, tiny_tokenizer):
    from posttrain.rollout.vllm_plugin import STORE, Shared

    engine.generate(constrained(tiny_tokenizer, 2, JSON, particles=3))
    assert not STORE and not Shared.constraints


def test_requests_that_do_not_fit_are_refused_before_anything_runs(engine, tiny_tokenizer):
    with pytest.raises(RolloutError, match="do not fit the engine's 512"):
        engine.generate([*free(tiny_tokenizer, Sampling(5)), Request([1, 2, 3], 1, Sampling(510))])
    with pytest.raises(RolloutError, match="a prompt of 0 tokens"):
        engine.generate([Request([], 1, Sampling(5))])
    wrong = constrained(tiny_tokenizer, 1, JSON)[0]
    with pytest.raises(ConfigError, match="does not go with top_p"):
        engine.generate([Request(wrong.prompt_ids, 1, Sampling(4, top_p=0.9), "", wrong.constraint)])
    assert engine.generate(free(tiny_tokenizer, Sampling(2)))


def test_progress_counts_to_the_end(engine, tiny_tokenizer):
    seen = []
    engine.progress, before = lambda *values: seen.append(values), engine.tokens
    try:
        found = engine.generate([*free(tiny_tokenizer, Sampling(4), 2), *constrained(tiny_tokenizer, 1, JSON)])
    finally:
        engine.progress = None
    assert [done for done, _, _ in seen] == list(range(1, 10)) and {total for _, total, _ in seen} == {9}
    assert seen[-1][2] - before == sum(len(c.token_ids) for c in found) and engine.tokens_per_s > 0


class TestWeights:
    """Runs last: the engine's weights change."""

    @pytest.fixture
    def other(self, model):
        import copy

        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
        return other

    def _same(self, engine, model, tokenizer):
        requests = free(tokenizer, Sampling(20, 0.0))
        want, found = HFEngine(model, tokenizer).generate(requests), engine.generate(requests)
        assert [c.token_ids for c in found] == [c.token_ids for c in want]
        return found

    def test_of_a_live_model(self, engine, other, model, tiny_tokenizer):
        old = self._same(engine, model, tiny_tokenizer)
        engine.load_weights(other, 3)
        new = self._same(engine, other, tiny_tokenizer)
        assert {c.version for c in new} == {3} and [c.token_ids for c in old] != [c.token_ids for c in new]

    def test_of_a_folder(self, engine, model, tmp_path, tiny_tokenizer):
        model.save_pretrained(tmp_path)
        engine.load_weights(tmp_path, 4)
        assert {c.version for c in self._same(engine, model, tiny_tokenizer)} == {4}

    def test_of_a_live_adapter_which_stays_attached(self, engine, other, tiny_tokenizer):
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(other, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        before = {name: value.clone() for name, value in adapted.state_dict().items()}
        engine.load_weights(adapted, 5)
        self._same(engine, adapted, tiny_tokenizer)
        assert all(torch.allclose(value, before[name], atol=1e-6) for name, value in adapted.state_dict().items())

    def test_that_are_not_the_models_are_noticed(self, engine, other, model, tiny_tokenizer, monkeypatch):
        engine.load_weights(model, 6)
        monkeypatch.setattr(engine, "_reload", lambda **_: None)
        with pytest.raises(RolloutError, match="log-probabilities of the engine and of the model differ by"):
            engine.load_weights(other, 7)

    def test_of_another_shape_are_refused(self, engine, tmp_path):
        from safetensors.torch import save_file

        save_file({"model.embed_tokens.weight": torch.zeros(3, 5)}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(RolloutError, match="vLLM refuses the weights"):
            engine.load_weights(tmp_path, 8)
