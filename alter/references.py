"""Answers that cost nothing to learn, for the model to be measured against: majority class and TF-IDF.

Both are for classification. scikit-learn is imported where it is used, so that the command line starts fast.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from alter.errors import AlterError

_MANY_ROWS = 1000


def majority(train_labels: Sequence[str], n: int) -> list[str]:
    """Answers the most frequent training label (of equals, the first by alphabet) for each of `n` rows."""
    if not len(train_labels):
        raise AlterError("The majority reference has no training labels: give the train split at least one row.")
    counts = Counter(train_labels)
    return [min(counts, key=lambda label: (-counts[label], label))] * n


def tfidf(
    train_prompts: Sequence[str],
    train_labels: Sequence[str],
    test_prompts: Sequence[str],
    max_rows: int = 20_000,
    seed: int = 0,
) -> list[str]:
    """Learns the label from the prompt's words and letters: TF-IDF and a logistic regression.

    It reads the prompt as one bag of word 1-2-grams and in-word letter 2-4-grams. Words that nearly every prompt has,
    such as the instruction's, are left out. In a task about a pair of texts both are in the one bag: the reference
    can't see which word came from which side.

    Args:
        train_prompts: the training prompts, as the model sees them.
        train_labels: their labels.
        test_prompts: the prompts to answer.
        max_rows: learn from at most so many rows, drawn at random; about 5 seconds for 20,000 short ones on two cores.
        seed: of that draw.

    Returns:
        One label a test prompt. Where there is nothing to learn, a single label or prompts without any telling word,
        the majority's.
    """
    prompts, labels = _draw(train_prompts, train_labels, max_rows, seed)
    if len(set(labels)) < 2 or not len(test_prompts):
        return majority(labels, len(test_prompts))
    train, test = _features(prompts, list(test_prompts))
    if train is None:
        return majority(labels, len(test_prompts))
    return _regression(train, labels, test)


def _draw(prompts: Sequence[str], labels: Sequence[str], max_rows: int, seed: int) -> tuple[list[str], list[str]]:
    if len(prompts) != len(labels):
        raise ValueError(f"{len(prompts)} prompts for {len(labels)} labels")
    if len(prompts) <= max_rows:
        return list(prompts), list(labels)
    # Sorted plain integers: a column of a file on disk is read row by row, in its order, and never whole.
    chosen = sorted(np.random.default_rng(seed).choice(len(prompts), max_rows, replace=False).tolist())
    return [prompts[i] for i in chosen], [labels[i] for i in chosen]


def _features(train_prompts: Sequence[str], test_prompts: Sequence[str]) -> tuple[Any, Any]:
    """Returns the TF-IDF matrices of both lists, or two None where the training prompts share all their words."""
    from scipy.sparse import hstack

    pairs = []
    for vectorizer in _vectorizers(len(train_prompts)):
        try:
            train = vectorizer.fit_transform(train_prompts)
        except ValueError:  # no term is left; the other vectorizer may have some (few words recur in unspaced scripts)
            continue
        pairs.append((train, vectorizer.transform(test_prompts)))
    if not pairs:
        return None, None
    train, test = zip(*pairs, strict=True)
    return hstack(train, format="csr"), hstack(test, format="csr")


def _vectorizers(rows: int) -> list[Any]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    common = {
        "sublinear_tf": True,
        "min_df": 2 if rows >= _MANY_ROWS else 1,  # among many rows, what occurs once teaches nothing
        "max_df": 0.95,  # the constant instruction
        "dtype": np.float32,
    }
    # The usual pattern drops words of one letter: the A of "hepatitis A".
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", **common)
    return [words, TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), **common)]


def _regression(train: Any, labels: Sequence[str], test: Any) -> list[str]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    # Loosely regularised and stopped early: on 20,000 ICD titles more accurate than C=1 and done in half the time.
    model = LogisticRegression(C=10.0, max_iter=100, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train, labels)
    return [str(label) for label in model.predict(test)]
