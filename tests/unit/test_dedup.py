"""Deduplication end to end: against references, survivors, decontamination, hostile rows, invariance, restarts."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_dedup_clusters import slow_resolve
from test_dedup_minhash import grams_of

from data_pipelines import dedup_passes, marks, minhash
from data_pipelines.dedup import dedup
from posttrain.core.events import Events
from posttrain.errors import ConfigError, DataError

WORDS = [f"w{i}" for i in range(400)]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shards(folder: Path, rows: list[dict], count: int) -> Path:
    for i in range(count):
        write(folder / f"s{i}.jsonl", rows[i::count])
    return folder


def edited(text: str, draw: random.Random, times: int) -> str:
    words = text.split()
    for _ in range(times):
        words[draw.randrange(len(words))] = "edit"
    return " ".join(words)


def corpus(documents: int = 40, seed: int = 0) -> list[dict]:
    """Random texts with exact, normalised and near copies, short and empty ones; ids are shuffled so that none is in order."""
    draw = random.Random(seed)
    texts = ["", "", "a b", "A  b", "one two three", "one two three!", "word"]
    for _ in range(documents):
        text = " ".join(draw.choices(WORDS, k=draw.randint(8, 60)))
        texts.append(text)
        for _ in range(draw.choice([0, 0, 1, 2, 4])):
            texts.append(
                draw.choice([text, text.upper(), f" {text}\n", edited(text, draw, 1), edited(text, draw, 1), edited(text, draw, 4)])
            )
    names = draw.sample(range(1000, 9999), len(texts))
    rows = [{"text": text, "id": f"r{name}", "n": i, "meta": {"tag": [i]}} for i, (text, name) in enumerate(zip(texts, names, strict=True))]
    draw.shuffle(rows)
    return rows


def kept_rows(out: Path) -> list[dict]:
    from posttrain.data.shards import read_shard

    return [row for file in sorted(out.glob("rows-*")) for _, row in read_shard(file)]


def gone(out: Path) -> dict[str, dict]:
    import pyarrow.parquet as pq

    rows = [row for file in sorted(out.glob("duplicates-*.parquet")) for row in pq.read_table(file).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def normal(text: str) -> str:
    return re.sub(r"\s+", " ", minhash.fold(text)).strip()


def similarity(one: str, two: str, n: int = 5) -> float:
    a, b = set(grams_of(one, n)), set(grams_of(two, n))
    return len(a & b) / len(a | b) if a and b else 0.0


def slow_dedup(
    rows: list[dict], known: list[dict], least: float = 0.7, most: int = 10_000, bands: int = 14, width: int = 8
) -> dict[str, str]:
    """id -> id of the row that stands for it, by all pairs; rows of one source, no n-gram rule."""
    ranked = sorted(rows, key=lambda row: (-len(row["text"]), row["id"], row["text"]))
    known = sorted(known, key=lambda row: (-len(row["text"]), row["id"], row["text"]))
    fate: dict[str, str] = {}
    first: dict[str, dict] = {}
    for row in [*known, *ranked]:
        first.setdefault(normal(row["text"]), row)
    every = list(first.values())
    signature = minhash.MinHash(bands * width).sign(minhash.grams(minhash.Blob([row["text"] for row in every]).words(), 5))
    keys = minhash.band_keys(signature, bands, width).tolist()
    sets = [set(grams_of(row["text"], 5)) for row in every]
    count = sum(any(row is one for one in known) for row in every)
    for group in _candidates(sets, keys):
        kept, _ = slow_resolve(
            [sets[i] for i in group], [[line[i] for i in group] for line in keys], sum(i < count for i in group), least, most
        )
        fate.update({every[group[a]]["id"]: every[group[b]]["id"] for a, b in kept.items() if a != b})
    for row in rows:
        best = first[normal(row["text"])]
        if best is not row:
            fate[row["id"]] = fate.get(best["id"], best["id"])
    return fate


def _candidates(sets: list[set], keys: list[list[int]]) -> list[list[int]]:
    label = list(range(len(sets)))
    for _ in range(len(sets)):
        before = list(label)
        for line in keys:
            low: dict[int, int] = {}
            for i, key in enumerate(line):
                if sets[i]:
                    low[key] = min(low.get(key, label[i]), label[i])
            label = [min(label[i], low[key]) if sets[i] else i for i, key in enumerate(line)]
        if label == before:
            break
    return [group for one in sorted(set(label)) if len(group := [i for i, own in enumerate(label) if own == one]) > 1]


@pytest.mark.parametrize("most", [1, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_fates_equal_those_of_all_pairs(tmp_path, seed, most):
    rows = corpus(seed=seed)
    known = [{"text": row["text"], "id": f"k{i}"} for i, row in enumerate(random.Random(seed).sample(rows, 4))]
    known.append({"text": edited(max(rows, key=lambda row: len(row["text"]))["text"], random.Random(1), 1), "id": "k9"})
    rule = {"minhash": {"max_cluster": most}, "contamination": "off"}
    summary = dedup(shards(tmp_path / "in", rows, 3), tmp_path / "o", write(tmp_path / "known.jsonl", known), **rule)
    found, expected = gone(tmp_path / "o"), slow_dedup(rows, known, most=most)
    assert {name: row["kept"] for name, row in found.items()} == expected
    text = {row["id"]: row["text"] for row in [*rows, *known]}
    for name, row in found.items():
        assert row["why"].startswith("contaminated") == (row["kept"] in {one["id"] for one in known})
        exact = normal(text[name]) == normal(text[row["kept"]])
        assert exact if row["why"].endswith("exact") else row["why"].endswith("near")
        assert row["similarity"] == (1.0 if exact else similarity(text[name], text[row["kept"]])) or not exact
        assert most != 1 or row["similarity"] >= 0.7
    stay = kept_rows(tmp_path / "o")
    assert {row["id"] for row in stay} == {row["id"] for row in rows} - set(found)
    assert {row["kept"] for row in found.values()} <= {row["id"] for row in [*stay, *known]}
    assert summary["rows_out"] == len(stay) and sum(summary["removed"].values()) == len(found) and summary["rows_in"] == len(rows)


def test_no_pair_of_all_that_is_alike_is_left(tmp_path):
    """Copies so near that bands cannot miss them: the rows that stay are those of a search over all pairs."""
    draw = random.Random(5)
    base = [" ".join(draw.choices(WORDS, k=120)) for _ in range(25)]
    rows = [{"text": edited(text, draw, draw.randint(0, 1)), "id": f"{i}-{k}"} for i, text in enumerate(base) for k in range(4)]
    dedup(write(tmp_path / "in.jsonl", rows), tmp_path / "o", exact="off")
    stay = kept_rows(tmp_path / "o")
    assert all(similarity(a["text"], b["text"]) < 0.7 for i, a in enumerate(stay) for b in stay[:i])
    best = {
        i: min((row for row in rows if row["id"].startswith(f"{i}-")), key=lambda row: (-len(row["text"]), row["id"])) for i in range(25)
    }
    assert {row["id"] for row in stay} == {row["id"] for row in best.values()}


def test_rows_keep_order_and_columns(tmp_path):
    rows = corpus(20)
    dedup(shards(tmp_path / "in", rows, 2), tmp_path / "o")
    stay, original = kept_rows(tmp_path / "o"), {row["n"]: row for row in rows}
    order = [row["n"] for row in [*rows[0::2], *rows[1::2]]]
    assert [row["n"] for row in stay] == [n for n in order if n in {row["n"] for row in stay}]
    assert all(row == {**original[row["n"]], "source": "data"} for row in stay)


def test_the_source_listed_first_stays_then_the_longest_then_the_smallest_id(tmp_path):
    text = " ".join(WORDS[:40])
    one = [{"text": text, "id": "z"}]
    two = [{"text": text + " more", "id": "y"}, {"text": text, "id": "a"}]
    for name, listed in (("ab", {"one": one, "two": two}), ("ba", {"two": two, "one": one})):
        files = {key: write(tmp_path / name / f"{key}.jsonl", rows) for key, rows in listed.items()}
        dedup(files, tmp_path / f"o{name}")
    assert [row["id"] for row in kept_rows(tmp_path / "oab")] == ["z"]
    assert [row["id"] for row in kept_rows(tmp_path / "oba")] == ["y"]
    same = [{"text": "same words", "id": name} for name in ("b10", "b9", "é", "a")]
    dedup(write(tmp_path / "same.jsonl", same), tmp_path / "same")
    assert [row["id"] for row in kept_rows(tmp_path / "same")] == ["a"]
    assert {row["kept_source"] for row in gone(tmp_path / "oab").values()} == {"one"}


def test_the_fate_of_copies_is_that_of_the_best_of_them(tmp_path):
    text = " ".join(WORDS[:60])
    near = text.replace("w30 ", "other ")
    rows = [{"text": near, "id": "long"}, {"text": text, "id": "b"}, {"text": text.upper(), "id": "a"}, {"text": text, "id": "c"}]
    dedup(write(tmp_path / "in.jsonl", rows), tmp_path / "o")
    found = gone(tmp_path / "o")
    assert {name: row["kept"] for name, row in found.items()} == {"a": "long", "b": "long", "c": "long"}
    assert {row["why"] for row in found.values()} == {"near"} and len({row["cluster"] for row in found.values()}) == 1


@pytest.mark.parametrize(("exact", "stay"), [("raw", "acde"), ("normalised", "acd"), ("off", "acdf")])
def test_exact_rules(tmp_path, exact, stay):
    texts = {"a": "Some  text", "b": "Some  text", "c": "some text here", "d": "", "e": "some\ttext ", "f": "", "g": "Some  text"}
    rows = [{"text": text, "id": name} for name, text in texts.items()]
    near = {"ngram": 30, "verify": 1.0} if exact == "off" else "off"
    dedup(write(tmp_path / "in.jsonl", rows), tmp_path / "o", exact=exact, minhash=near)
    assert "".join(row["id"] for row in kept_rows(tmp_path / "o")) == stay


def test_rows_without_words_are_exact_copies_and_never_near_ones(tmp_path):
    rows = [{"text": text, "id": f"{i}"} for i, text in enumerate(["", "", " ", "\n", "x", "X"])]
    assert dedup(write(tmp_path / "in.jsonl", rows), tmp_path / "a")["removed"]["exact"] == 4
    summary = dedup(tmp_path / "in.jsonl", tmp_path / "b", exact="raw")
    assert summary["removed"] == {"exact": 1, "near": 1} | {name: 0 for name in summary["removed"] if name.startswith("contaminated")}


def test_evaluation_rows_inside_longer_ones_are_found(tmp_path):
    draw = random.Random(0)
    question = " ".join(draw.choices(WORDS, k=30))
    filler = [" ".join(draw.choices(WORDS, k=200)) for _ in range(4)]
    rows = [
        {"text": f"{filler[0]}. {question.upper()}? {filler[1]}", "id": "whole"},
        {"text": f"{filler[2]} {' '.join(question.split()[:20])} {filler[3]}", "id": "part"},
        {"text": f"{filler[1]} {' '.join(question.split()[:12])} {filler[0]}", "id": "twelve"},
        {"text": "short one", "id": "short"},
    ]
    known = write(tmp_path / "known.jsonl", [{"text": question, "id": "q"}, {"text": "short one", "id": "s"}])
    data = write(tmp_path / "in.jsonl", rows)
    for share, expected in ((0.5, {"whole"}), (0, {"whole", "part"}), (8 / 18, {"whole", "part"}), (0.45, {"whole"})):
        log = []
        events = Events(None)
        events.sinks.append(lambda event, log=log: log.append(event.get("message", "")))
        out = tmp_path / f"o{share}"
        summary = dedup(data, out, known, contamination={"share": share}, events=events)
        found = gone(out)
        assert {name for name, row in found.items() if row["why"] == "contaminated: n-grams"} == expected
        assert found["short"]["why"] == "contaminated: exact" and summary["against_below_ngram"] == 1
        assert found["whole"]["similarity"] == 1.0 and found["whole"]["kept"] == "q"
        assert "part" not in found or found["part"]["similarity"] == 8 / 18
        assert any("fewer than 13 words" in line for line in log)
    assert dedup(data, tmp_path / "off", known, contamination="off")["removed"]["contaminated: n-grams"] == 0


def test_copies_of_a_leaked_row_go_with_it_but_rows_like_it_stay(tmp_path):
    draw = random.Random(2)
    known = " ".join(draw.choices(WORDS, k=100))
    leaked = edited(known, draw, 3)
    while not 0.72 < similarity(leaked, known) < 0.9:
        leaked = edited(known, draw, 3)
    far = edited(leaked, draw, 3)
    while similarity(far, known) >= 0.65 or similarity(far, leaked) < 0.75:
        far = edited(leaked, draw, 3)
    rows = [{"text": far, "id": "far"}, {"text": leaked, "id": "leaked"}, {"text": leaked.upper(), "id": "twin"}]
    held = write(tmp_path / "known.jsonl", [{"text": known, "id": "k"}])
    dedup(write(tmp_path / "in.jsonl", rows), tmp_path / "o", held, contamination="off")
    found = gone(tmp_path / "o")
    assert set(found) == {"leaked", "twin"} and {row["why"] for row in found.values()} == {"contaminated: near"}
    assert {row["kept"] for row in found.values()} == {"k"}


def test_chat_and_preference_rows(tmp_path):
    def chat(answer: str, name: str) -> dict:
        return {"messages": [{"role": "user", "content": "tell me"}, {"role": "assistant", "content": answer}], "id": name}

    rows = [chat(" ".join(WORDS[:30]), "a"), chat(" ".join(WORDS[:30]), "b"), chat("no", "c")]
    known = write(tmp_path / "known.jsonl", [{"text": "tell me\nno", "id": "k"}])
    dedup(write(tmp_path / "chat.jsonl", rows), tmp_path / "o", known)
    assert [row["id"] for row in kept_rows(tmp_path / "o")] == ["a"]
    pairs = [{"prompt": "p", "chosen": "yes", "rejected": other, "id": other} for other in ("no", "never", "NO")]
    dedup(write(tmp_path / "pairs.jsonl", pairs), tmp_path / "p")
    assert [row["id"] for row in kept_rows(tmp_path / "p")] == ["never", "NO"] and marks.compared_text(pairs[0]) == "p\nyes\nno"


def test_text_without_spaces_by_characters(tmp_path):
    draw = random.Random(0)
    one = "".join(draw.choices("春夏秋冬山川海空花鳥風月", k=200))
    rows = [{"text": one, "id": "a"}, {"text": one[:100] + "雪" + one[101:], "id": "b"}, {"text": one[::-1], "id": "c"}]
    log: list[str] = []
    events = Events(None)
    events.sinks.append(lambda event: log.append(event.get("message", "")))
    dedup(write(tmp_path / "in.jsonl", rows), tmp_path / "words", events=events)
    assert len(kept_rows(tmp_path / "words")) == 3 and any("minhash.unit: chars" in line for line in log)
    dedup(tmp_path / "in.jsonl", tmp_path / "chars", minhash={"unit": "chars"})
    assert {name: row["kept"] for name, row in gone(tmp_path / "chars").items()} == {"b": "a"}


def test_many_licences_are_one_cluster_and_false_clusters_are_not(tmp_path):
    draw = random.Random(0)
    licence = " ".join(draw.choices(WORDS, k=300))
    rows = [{"text": f"copyright {2000 + i} {licence}", "id": f"l{i:03d}"} for i in range(150)]
    chain = [draw.choice(WORDS) + str(i) for i in range(600)]
    rows += [{"text": " ".join(chain[4 * i : 4 * i + 100]), "id": f"c{i:03d}"} for i in range(120)]
    data = write(tmp_path / "in.jsonl", rows)
    summary = dedup(data, tmp_path / "o")
    stay = [row["id"] for row in kept_rows(tmp_path / "o")]
    assert sum(name.startswith("l") for name in stay) == 1 and summary["largest_cluster"] == 150
    large = dedup(data, tmp_path / "large", minhash={"max_cluster": 50})
    assert large["large_clusters"] == 2 and large["largest_candidate_cluster"] == 150
    found = gone(tmp_path / "large")
    assert min(row["similarity"] for row in found.values()) >= 0.7
    left = [row["id"] for row in kept_rows(tmp_path / "large")]
    assert sum(name.startswith("l") for name in left) == 1 and len(left) > len(stay)


def test_verification_can_be_off(tmp_path):
    rows = corpus(30, seed=4)
    data = write(tmp_path / "in.jsonl", rows)
    with_it, without = dedup(data, tmp_path / "a"), dedup(data, tmp_path / "b", minhash={"verify": None})
    assert without["removed"]["near"] >= with_it["removed"]["near"]
    assert {row["similarity"] for row in gone(tmp_path / "b").values()} <= {None, 1.0}
    assert without["pairs_verified"] == 0 < with_it["pairs_verified"]


def fates(out: Path) -> dict[str, tuple]:
    return {name: tuple(row[key] for key in ("kept", "cluster", "similarity", "why")) for name, row in gone(out).items()}


def test_shards_and_their_order_change_nothing(tmp_path):
    rows, found = corpus(seed=7), []
    known = [{"text": row["text"], "id": f"k{i}"} for i, row in enumerate(rows[:5])]
    for count in (1, 3, 8):
        random.Random(count).shuffle(rows)
        random.Random(count).shuffle(known)
        out = tmp_path / f"o{count}"
        summary = dedup(shards(tmp_path / f"in{count}", rows, count), out, shards(tmp_path / f"k{count}", known, min(2, count)))
        found.append((fates(out), sorted(row["id"] for row in kept_rows(out)), summary))
    assert found[0] == found[1] == found[2] and len(found[0][0]) > 30


def test_memory_does_not_change_the_result(tmp_path, monkeypatch):
    from data_pipelines import dedup_fates

    data = shards(tmp_path / "in", corpus(seed=7), 3)
    dedup(data, tmp_path / "a", minhash={"max_cluster": 4})
    monkeypatch.setattr(dedup_fates, "MIB", 40)
    monkeypatch.setattr(marks, "BATCH_ROWS", 3)
    dedup(data, tmp_path / "b", memory=9, minhash={"max_cluster": 4})
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.multiproc
def test_workers_and_hash_seeds_do_not_change_a_byte(tmp_path):
    data = shards(tmp_path / "in", corpus(seed=7), 4)
    known = write(tmp_path / "known.jsonl", corpus(3, seed=7))
    dedup(data, tmp_path / "one", known)
    code = "import sys; from data_pipelines.dedup import dedup\nif __name__ == '__main__': dedup(*sys.argv[1:4], workers=2)"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": "123"}
    script = tmp_path / "run.py"
    script.write_text(code)
    subprocess.run([sys.executable, script, data, tmp_path / "two", known], env=env, check=True)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.multiproc
def test_kill_9_costs_one_shard(tmp_path):
    data = shards(tmp_path / "in", corpus(60, seed=3), 10)
    known = write(tmp_path / "known.jsonl", corpus(3, seed=3))
    dedup(data, tmp_path / "whole", known)
    code = """import sys, time
from data_pipelines import marks
save = marks.mark
marks.mark = lambda *a: (time.sleep(0.05), save(*a))[1]
from data_pipelines.dedup import dedup
dedup(*sys.argv[1:4])"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.Popen([sys.executable, "-c", code, data, tmp_path / "cut", known], env=env)
    while child.poll() is None and len(list(tmp_path.glob("cut.work/*/data/*.safetensors"))) < 3:
        time.sleep(0.01)
    child.kill()
    child.wait()
    done = list(tmp_path.glob("cut.work/*/data/*.safetensors"))
    assert 3 <= len(done) < 10 and not (tmp_path / "cut").exists()
    log: list[str] = []
    events = Events(None)
    events.sinks.append(lambda event: log.append(event.get("message", "")))
    dedup(data, tmp_path / "cut", known, events=events)
    assert f"data: {len(done)} of 10 shards were done before" in log
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole") and not (tmp_path / "cut.work").exists()


@pytest.mark.parametrize("step", ["_count_rows", "_summarise", "_finish"])
def test_a_stop_between_the_passes_loses_nothing(tmp_path, monkeypatch, step):
    data = shards(tmp_path / "in", corpus(seed=3), 3)
    dedup(data, tmp_path / "whole")

    def dies(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dedup_passes, step, dies)
        with pytest.raises(KeyboardInterrupt):
            dedup(data, tmp_path / "cut")
    for path in random.Random(0).sample(parts := sorted(p for p in (tmp_path / "cut.work").rglob("*") if p.is_file()), len(parts) // 2):
        path.unlink()
    dedup(data, tmp_path / "cut")
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_bad_rows_and_held_out_parts_are_counted(tmp_path):
    rows = corpus(10)
    data = write(tmp_path / "in.jsonl", rows)
    data.write_text(data.read_text() + '{"text": 5}\nnot json\n{"text": "half \\ud83d"}\n')
    with pytest.raises(DataError, match=rf"in\.jsonl:{len(rows) + 1}"):
        dedup(data, tmp_path / "a")
    summary = dedup(data, tmp_path / "b", on_bad="skip")
    assert summary["skipped"] == 3 and summary["rows_in"] == len(rows) == summary["rows_out"] + sum(summary["removed"].values())


def test_hostile_texts(tmp_path):
    texts = [
        "nul\x00in text",
        "nul\x00in text",
        "\u2028\u2029",
        "e\u0301 \u00e9",
        "\u00e9 e\u0301",
        "🏳️ flag",
        "x" * 200_000,
        "x" * 200_000 + "y",
    ]
    rows = [{"text": text, "id": f"{i}"} for i, text in enumerate(texts)]
    summary = dedup(write(tmp_path / "in.jsonl", rows), tmp_path / "o")
    assert [row["id"] for row in kept_rows(tmp_path / "o")] == ["0", "2", "3", "5", "6", "7"] and summary["removed"]["exact"] == 2


def test_a_row_of_megabytes_between_small_ones(tmp_path):
    long = " ".join(f"t{i % 9973}" for i in range(400_000))
    rows = [
        {"text": "first row here", "id": "a"},
        {"text": long, "id": "b"},
        {"text": long + " end", "id": "c"},
        {"text": "last", "id": "d"},
    ]
    dedup(write(tmp_path / "in.jsonl", rows), tmp_path / "o")
    assert {name: row["kept"] for name, row in gone(tmp_path / "o").items()} == {"b": "c"}


def test_refusals(tmp_path):
    data = write(tmp_path / "in.jsonl", corpus(4))
    with pytest.raises(DataError, match="all .* rows are duplicates"):
        dedup(data, tmp_path / "a", data)
    with pytest.raises(ConfigError, match="all off"):
        dedup(data, tmp_path / "b", exact="off", minhash="off", contamination="off")
    with pytest.raises(ConfigError, match="verify"):
        dedup(data, tmp_path / "c", minhash={"verify": 0.0})
    chat = write(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    with pytest.raises(ConfigError, match="several row types"):
        dedup({"a": data, "b": chat}, tmp_path / "d")
    write(tmp_path / "full" / "x.jsonl", [])
    with pytest.raises(ConfigError, match="not empty"):
        dedup(data, tmp_path / "full")
    with pytest.raises(DataError, match="no rows"):
        dedup(write(tmp_path / "none.jsonl", []), tmp_path / "e", kind="text")


def test_parquet_out_and_the_verb(tmp_path):
    from posttrain.cli import main

    data, known = shards(tmp_path / "in", corpus(12), 2), write(tmp_path / "known.jsonl", corpus(2))
    dedup(data, tmp_path / "o", known, suffix=".parquet")
    runs = ["--runs", str(tmp_path / "runs")]
    assert main(["select", "dedup", f"data={data}", f"against={known}", f"out={tmp_path / 'v'}", "suffix=.parquet", *runs]) == 0
    assert fates(tmp_path / "v") == fates(tmp_path / "o")
    assert [row["id"] for row in kept_rows(tmp_path / "v")] == [row["id"] for row in kept_rows(tmp_path / "o")]
