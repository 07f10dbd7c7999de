from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alter.errors import AlterError
from alter.references import majority, tfidf

CHAPTERS = {
    "Neoplasms": ["malignant neoplasm of", "benign tumour of", "carcinoma in situ of"],
    "Injury": ["fracture of", "sprain of", "open wound of"],
    "Infections": ["viral infection of", "tuberculosis of", "bacterial infection of"],
}
SITES = ["hand", "foot", "lung", "skin", "breast", "liver", "neck", "eye"]


def prompt(text):
    return f"ICD-10-CM code description: {text}\nChapter:"


def examples():
    return [
        (prompt(f"{start} {site}"), label) for label, starts in CHAPTERS.items() for start in starts for site in SITES
    ]


@given(st.lists(st.sampled_from("abc"), min_size=1), st.integers(0, 5))
def test_majority_is_the_most_frequent_label(labels, n):
    answers = majority(labels, n)
    assert len(answers) == n
    assert all(labels.count(answer) == max(Counter(labels).values()) for answer in answers)
    assert answers == majority(sorted(labels), n)


def test_majority_needs_labels():
    with pytest.raises(AlterError, match="at least one row"):
        majority([], 3)


def test_tfidf_learns_the_words():
    train, test = examples()[::2], examples()[1::2]
    answers = tfidf(*zip(*train, strict=True), [p for p, _ in test])
    assert np.mean([a == label for a, (_, label) in zip(answers, test, strict=True)]) > 0.95
    assert all(type(a) is str for a in answers)


def test_tfidf_reads_single_letters_and_parts_of_words():
    train = [prompt(f"hepatitis {letter}") for letter in "ABC"] * 3
    assert tfidf(train, list("abc") * 3, [prompt("hepatitis B")]) == ["b"]
    bones = [prompt(w) for w in ("osteoarthritis", "osteoporosis", "dermatitis", "dermatosis")]
    assert tfidf(bones, ["bone", "bone", "skin", "skin"], [prompt("osteoma"), prompt("dermatoma")]) == ["bone", "skin"]


def test_tfidf_reads_script_without_spaces_where_no_word_recurs():
    train = [f"{'心脏' if i % 2 else '皮肤'}病例{chr(0x4E00 + i)}{chr(0x5E00 + i)}" for i in range(1200)]
    labels = ["heart" if i % 2 else "skin" for i in range(1200)]
    assert tfidf(train, labels, ["心脏新词", "皮肤新词"]) == ["heart", "skin"]


def test_tfidf_falls_back_to_the_majority_when_there_is_nothing_to_learn():
    assert tfidf(["x y", "z"], ["a", "a"], ["z", "q"]) == ["a", "a"]
    assert tfidf(["same"] * 3, ["b", "b", "a"], ["same", "new"]) == ["b", "b"]
    assert tfidf(["?", "!", "."], ["b", "b", "a"], ["?"]) == ["b"]
    assert tfidf(["x", "y"], ["a", "b"], []) == []


def test_tfidf_draws_rows_by_seed():
    prompts = [prompt(str(i)) for i in range(40)]
    labels = ["a"] * 20 + ["b"] * 20
    same = [tfidf(prompts, labels, prompts, max_rows=10, seed=1) for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != tfidf(prompts, labels, prompts, max_rows=10, seed=2)


def test_tfidf_takes_columns_of_a_data_set():
    from datasets import Dataset

    prompts, labels = zip(*examples(), strict=True)
    data = Dataset.from_dict({"prompt": prompts, "target": labels})
    for rows in (20, 1000):
        from_columns = tfidf(data["prompt"], data["target"], data["prompt"], max_rows=rows)
        assert from_columns == tfidf(prompts, labels, prompts, max_rows=rows)
    assert majority(data["target"], 1) == ["Infections"]


def test_tfidf_refuses_lists_of_different_length():
    with pytest.raises(ValueError, match="2 prompts for 1 labels"):
        tfidf(["x", "y"], ["a"], ["z"])


@pytest.mark.slow
def test_tfidf_takes_twenty_thousand_rows():
    generator = np.random.default_rng(0)
    words = np.array(["".join(generator.choice(list("abcdefghijklmnop"), 7)) for _ in range(12_000)])
    labels = generator.integers(0, 22, 20_000)
    drawn = (generator.zipf(1.3, (20_000, 8)) + labels[:, None] * 31) % len(words)
    prompts = [prompt(" ".join(words[row])) for row in drawn]
    answers = tfidf(prompts, [f"chapter {label}" for label in labels], prompts[:300])
    assert np.mean([a == f"chapter {label}" for a, label in zip(answers, labels, strict=False)]) > 0.9
