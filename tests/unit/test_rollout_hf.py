"""The transformers engine: log-probabilities, independence of the batch, stop strings, end tokens, weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from posttrain.errors import NumericsError, RolloutError  # noqa: E402
from posttrain.rollout.base import Request, RolloutEngine, Sampling, request_seed  # noqa: E402
from posttrain.rollout.hf import HFEngine  # noqa: E402

PROMPTS = ["The quick", "What is 12 + 34?", "def add(", "A model reads a prompt, writes", "x"]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    """The tiny model, sharpened so that its samples are neither uniform nor constant."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(4)
    return model


def requests(tokenizer, sampling, samples=2, prompts=PROMPTS):
    """`samples` requests for each prompt."""
    return [
        Request(tokenizer.encode(prompt), request_seed(7, prompt, k), sampling, f"{prompt}/{k}")
        for prompt in prompts
        for k in range(samples)
    ]


def recomputed(model, completion, temperature):
    """Log-probabilities of a completion from one unpadded forward pass."""
    ids = torch.tensor([completion.prompt_ids + completion.token_ids])
    with torch.no_grad():
        logps = torch.log_softmax(model(input_ids=ids).logits[0].float() / temperature, -1)
    start = len(completion.prompt_ids) - 1
    return logps[start:-1].gather(1, ids[0, start + 1 :, None])[:, 0]


@pytest.mark.parametrize("temperature", [0.3, 0.6, 1.0, 1.7])
def test_logprobs_are_those_of_the_sampling_distribution(model, tiny_tokenizer, temperature):
    engine = HFEngine(model, tiny_tokenizer, max_batch=7)
    assert isinstance(engine, RolloutEngine)
    for completion in engine.generate(requests(tiny_tokenizer, Sampling(max_tokens=12, temperature=temperature))):
        assert len(completion.token_ids) == len(completion.logprobs) > 0
        ratio = (torch.tensor(completion.logprobs) - recomputed(model, completion, temperature)).exp()
        assert (ratio - 1).abs().max() < 1e-4


def test_a_request_does_not_depend_on_its_batch(model, tiny_tokenizer):
    wanted = requests(tiny_tokenizer, Sampling(max_tokens=10))
    together = HFEngine(model, tiny_tokenizer).generate(wanted)
    alone = [HFEngine(model, tiny_tokenizer, max_batch=1).generate([request])[0] for request in wanted]
    turned = HFEngine(model, tiny_tokenizer, max_batch=3).generate(wanted[::-1])[::-1]
    ids = [completion.token_ids for completion in together]
    assert ids == [completion.token_ids for completion in alone] == [completion.token_ids for completion in turned]
    assert [completion.id for completion in turned] == [request.id for request in wanted]
    assert len({tuple(item) for item in ids}) == len(ids)


def test_tokens_of_many_requests_follow_the_model(model, tiny_tokenizer):
    ids, count = tiny_tokenizer.encode("The quick"), 6000
    wanted = [Request(ids, request_seed(11, "row", i), Sampling(1, 0.8)) for i in range(count)]
    found = HFEngine(model, tiny_tokenizer, max_batch=count).generate(wanted)
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([ids])).logits[0, -1].double() / 0.8, -1).numpy()
    seen = np.bincount([item.token_ids[0] for item in found], minlength=len(p)) / count
    often = p * count >= 20
    p, seen = (np.append(x[often], x[~often].sum()) for x in (p, seen))
    chi2, freedom = count * ((seen - p) ** 2 / p).sum(), len(p) - 1
    assert freedom > 10
    assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)


def test_a_longer_limit_only_adds_tokens(model, tiny_tokenizer):
    short = HFEngine(model, tiny_tokenizer).generate(requests(tiny_tokenizer, Sampling(max_tokens=4)))
    long = HFEngine(model, tiny_tokenizer).generate(requests(tiny_tokenizer, Sampling(max_tokens=9)))
    assert [item.token_ids[:4] for item in long] == [item.token_ids for item in short]


def test_greedy_equals_transformers_generate(model, tiny_tokenizer):
    for completion in HFEngine(model, tiny_tokenizer).generate(requests(tiny_tokenizer, Sampling(8, temperature=0), samples=1)):
        ids = torch.tensor([completion.prompt_ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        assert completion.token_ids == out[0, ids.shape[1] :].tolist()
        assert set(completion.logprobs) == {0.0}


def test_mixed_settings_in_one_batch(model, tiny_tokenizer):
    prompt = tiny_tokenizer.encode("The quick")
    kinds = [
        Sampling(6, 0.0),
        Sampling(3, 1.7),
        Sampling(9, 1.0, top_k=1),
        Sampling(9, 1.0, top_p=1e-6),
        Sampling(5, 0.3, top_k=20, top_p=0.9),
    ]
    wanted = [Request(prompt, 5, kind, str(i)) for i, kind in enumerate(kinds)]
    found = HFEngine(model, tiny_tokenizer).generate(wanted)
    assert all(len(item.token_ids) <= kind.max_tokens for item, kind in zip(found, kinds, strict=True))
    assert found[2].token_ids == found[3].token_ids
    assert found[2].token_ids[:6] == found[0].token_ids[: len(found[2].token_ids)]
    assert found[4].token_ids == HFEngine(model, tiny_tokenizer).generate([wanted[4]])[0].token_ids


def with_eos(model, ids):
    """A copy of the model whose generation config names these end tokens."""
    import copy

    other = copy.copy(model)
    other.generation_config = copy.deepcopy(model.generation_config)
    other.generation_config.eos_token_id = ids
    return other


def test_every_end_token_ends(model, tiny_tokenizer):
    plain = HFEngine(model, tiny_tokenizer).generate(requests(tiny_tokenizer, Sampling(20), samples=4))
    first, second = plain[0].token_ids[3], plain[5].token_ids[4]
    engine = HFEngine(with_eos(model, [first, second]), tiny_tokenizer)
    assert engine.eos_ids == {first, second, tiny_tokenizer.eos_token_id}
    stopped = engine.generate(requests(tiny_tokenizer, Sampling(20), samples=4))
    for before, after in zip(plain, stopped, strict=True):
        ends = [i for i, token in enumerate(before.token_ids) if token in engine.eos_ids]
        expected = before.token_ids[: ends[0] + 1] if ends else before.token_ids
        assert after.token_ids == expected
        assert after.finish_reason == ("stop" if ends else "length")
        if ends:
            assert after.text == tiny_tokenizer.decode(expected[:-1], skip_special_tokens=True)


def test_stop_strings_cut_the_text_and_keep_the_ids(model, tiny_tokenizer):
    plain = HFEngine(model, tiny_tokenizer).generate(requests(tiny_tokenizer, Sampling(24), samples=3))
    checked = 0
    for source in plain:
        pieces = [tiny_tokenizer.decode([token]) for token in source.token_ids]
        at = next((i for i in range(3, 20) if len(pieces[i]) > 1 and (pieces[i - 1] + pieces[i]).isascii()), None)
        if at is None:
            continue
        for stop in (pieces[at - 1] + pieces[at], pieces[at - 1][-1] + pieces[at][:1]):
            request = replace(next(r for r in requests(tiny_tokenizer, Sampling(24, stop=(stop,)), 3) if r.id == source.id))
            found = HFEngine(model, tiny_tokenizer).generate([request])[0]
            full = tiny_tokenizer.decode(source.token_ids, skip_special_tokens=True)
            assert found.finish_reason == "stop"
            assert found.token_ids == source.token_ids[: len(found.token_ids)]
            assert len(found.token_ids) == len(found.logprobs) <= at + 1
            assert found.text == full[: full.index(stop)]
            assert stop in tiny_tokenizer.decode(found.token_ids, skip_special_tokens=True)
            checked += 1
    assert checked >= 4


def test_a_special_token_as_stop_string_is_an_end_token(model, tiny_tokenizer):
    from posttrain.rollout.stopping import StopRule

    rule = StopRule(tiny_tokenizer, ("<|im_start|>", "zz"), {tiny_tokenizer.eos_token_id})
    ids = tiny_tokenizer.encode("ab<|im_start|>")
    assert rule.ends(ids)
    assert rule.text(ids) == "ab"
    assert rule.stop == ("zz",)


def test_shared_prompts_are_computed_once(model, tiny_tokenizer, monkeypatch):
    rows = []
    original = type(model).forward

    def spy(self, *args, **kwargs):
        rows.append(tuple(kwargs["input_ids"].shape))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", spy)
    HFEngine(model, tiny_tokenizer).generate(requests(tiny_tokenizer, Sampling(2), samples=8, prompts=PROMPTS[:2]))
    assert rows[0][0] == 2
    assert rows[1] == (16, 1)


def test_modes_and_gradients_are_left_alone(model, tiny_tokenizer):
    model.train()
    model.model.norm.eval()
    HFEngine(model, tiny_tokenizer).generate(requests(tiny_tokenizer, Sampling(2), samples=1))
    assert model.training
    assert model.lm_head.training
    assert not model.model.norm.training
    loss = model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss
    loss.backward()
    assert model.model.norm.weight.grad is not None
    model.zero_grad()
    model.eval()


def test_peft_model_samples_with_its_adapter(tiny_model_dir, tiny_tokenizer):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    for completion in HFEngine(model, tiny_tokenizer).generate(requests(tiny_tokenizer, Sampling(6), samples=2)):
        ratio = (torch.tensor(completion.logprobs) - recomputed(model.eval(), completion, 1.0)).exp()
        assert (ratio - 1).abs().max() < 1e-4


def test_load_weights(model, tiny_model_dir, tiny_tokenizer):
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    engine, wanted = HFEngine(own, tiny_tokenizer), requests(tiny_tokenizer, Sampling(6), samples=1)
    before = engine.generate(wanted)
    engine.load_weights(model, 3)
    after = engine.generate(wanted)
    assert [item.token_ids for item in after] == [item.token_ids for item in HFEngine(model, tiny_tokenizer).generate(wanted)]
    assert {item.version for item in after} == {3}
    engine.load_weights(tiny_model_dir, 4)
    assert [item.token_ids for item in engine.generate(wanted)] == [item.token_ids for item in before]
    with pytest.raises(RolloutError, match="do not fit"):
        engine.load_weights(torch.nn.Linear(2, 2), 5)
    assert engine.version == 4


def test_refusals(model, tiny_tokenizer):
    engine = HFEngine(model, tiny_tokenizer)
    with pytest.raises(RolloutError, match="600 exceeds the model's 512"):
        engine.generate([Request([1, 2], 0, Sampling(600), "r1")])
    with pytest.raises(RolloutError, match="no tokens"):
        engine.generate([Request([], 0, Sampling(5), "r1")])
    assert engine.generate([]) == []
    engine.close()
    with pytest.raises(RolloutError, match="closed"):
        engine.generate([Request([1], 0)])


def test_non_finite_logits_are_an_error(tiny_model_dir, tiny_tokenizer):
    from transformers import AutoModelForCausalLM

    broken = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(NumericsError, match="not finite"):
            HFEngine(broken, tiny_tokenizer).generate([Request([5, 6], 0, Sampling(3, temperature))])


def test_progress_and_counts(model, tiny_tokenizer):
    seen = []
    engine = HFEngine(model, tiny_tokenizer, max_batch=4, progress=lambda *args: seen.append(args))
    found = engine.generate(requests(tiny_tokenizer, Sampling(5)))
    assert seen[-1] == (len(found), len(found), engine.tokens)
    assert engine.tokens == sum(len(item.token_ids) for item in found)
    assert engine.tokens_per_s > 0
    assert np.all(np.diff([item[0] for item in seen]) >= 0)
