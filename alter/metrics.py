"""What a task is measured by, and how sure the number is: a 95% percentile bootstrap over the test rows.

Every metric here is a function of sums over rows: accuracy of (hits, rows), macro F1 of (true positives, predicted,
labelled) per class, span F1 of the same three over all spans, corpus BLEU of its n-gram counts. So a metric is a table
of per-row statistics and a function that finishes their sums, and a bootstrap of 1,000 resamples is one matrix product
instead of 1,000 evaluations.

torchmetrics and scipy are imported where they are used, so that the command line starts fast.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from alter.errors import AlterError, did_you_mean

RESAMPLES = 1000
LEVEL = 0.95
SEED = 13
_WEIGHTS_AT_ONCE = 4_000_000  # entries of the resampling matrix in memory at a time: 32 MB


@dataclass(frozen=True)
class Metric:
    """One metric on one list of predictions.

    Args:
        name: a name in `KNOWN`.
        statistics: what each row adds, [rows, columns]; a NumPy array or a SciPy sparse one.
        finish: turns sums of the columns, [..., columns], into values between 0 and 1, [...].
    """

    name: str
    statistics: Any
    finish: Callable[[np.ndarray], np.ndarray]

    @property
    def n(self) -> int:
        """The number of rows."""
        return self.statistics.shape[0]

    def value(self, indices: np.ndarray | None = None) -> float:
        """Returns the metric on all rows, or on the rows of `indices`, each as often as it stands there."""
        counts = np.ones(self.n) if indices is None else np.bincount(indices, minlength=self.n)
        return float(self.weighted(counts[None, :])[0])

    def weighted(self, counts: np.ndarray) -> np.ndarray:
        """Returns one value a resample; `counts` [resamples, rows] says how often each row was drawn."""
        # Sums of floats can end a hair above 1.
        return np.clip(self.finish(np.asarray(counts, dtype=np.float64) @ self.statistics), 0.0, 1.0)


def metric(
    name: str, predictions: Sequence[str], targets: Sequence[str], choices: Sequence[str] | None = None
) -> Metric:
    """Makes a metric from predictions and targets, row beside row.

    Args:
        name: a name in `KNOWN`, or `recall[CHOICE]`.
        predictions: what the model answered.
        targets: what is right.
        choices: the classes `macro_f1` averages over, where given: an answer outside them is a miss but no class of its
            own. Without it, each text among the predictions and targets is a class. No other metric looks at it.

    Raises:
        AlterError: for an unknown name or no rows.
    """
    if name not in KNOWN and recalled_choice(name) is None:
        raise AlterError(
            f"There is no metric '{name}'.{did_you_mean(name, KNOWN)} Known: {', '.join(KNOWN)}, recall[CHOICE]."
        )
    if len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} predictions for {len(targets)} targets")
    if not targets:
        raise AlterError(f"{name} has no rows to measure: give the split at least one row.")
    make: Callable[..., Metric] = KNOWN.get(name, _recall)
    return make(name, predictions, targets, choices)


def recalled_choice(name: str) -> str | None:
    """Returns the choice that a metric `recall[CHOICE]` is of; None for any other name."""
    found = re.fullmatch(r"recall\[(.+)\]", name)
    return found and found[1]


def bootstrap(of: Metric, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Returns the metric's value on each of `resamples` draws of its rows with replacement.

    The draws depend on the number of rows and the seed alone: two metrics on the same rows get the same draws, so that
    their differences are paired.
    """
    generator = np.random.default_rng(seed)
    even = np.full(of.n, 1 / of.n)
    step = max(1, _WEIGHTS_AT_ONCE // of.n)
    sizes = [min(step, resamples - start) for start in range(0, resamples, step)]
    return np.concatenate([of.weighted(generator.multinomial(of.n, even, size=size)) for size in sizes])


def bootstrap_interval(
    of: Metric, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = SEED
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of a metric as (low, high).

    Where all rows score alike (one row, or every answer right) no draw differs and the interval is a point: read it
    together with the number of rows.
    """
    return _percentiles(bootstrap(of, resamples, seed), level)


def interval_and_p(differences: np.ndarray, level: float = LEVEL) -> tuple[float, float, float]:
    """The percentile interval of paired bootstrap draws of a difference, and the two-sided p-value of none.

    Args:
        differences: [resamples].
        level: of the interval.

    Returns:
        low, high, p.
    """
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    # One added on both sides: a finite number of draws can't show a probability of zero.
    return *_percentiles(differences, level), float(min(1.0, 2 * (tail + 1) / (len(differences) + 1)))


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# Metrics that are the mean of a score for each row.


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _mean_of(
    row_score: Callable[[str, str], float], name: str, predictions: Sequence[str], targets: Sequence[str], _choices: Any
) -> Metric:
    scores = np.array([row_score(p, t) for p, t in zip(predictions, targets, strict=True)], dtype=np.float64)
    return Metric(name, np.stack([scores, np.ones_like(scores)], axis=1), _ratio)


def _same(prediction: str, target: str) -> float:
    return float(prediction.strip() == target.strip())


def _same_but_for_form(prediction: str, target: str) -> float:
    """1 when the texts agree but for case and whitespace."""
    return float(_plain_words(prediction) == _plain_words(target))


def _plain_words(text: str) -> list[str]:
    """Words in lower case, an accented letter always one sign."""
    return unicodedata.normalize("NFC", text.casefold()).split()


def _bare_tokens(text: str) -> list[str]:
    """Words without punctuation, but for what stands between digits: 3.5 mg is not 35 mg."""
    return _cleaned(r"(?<!\d)[.,]|[.,](?!\d)|[^\w\s.,]|_", "", text.casefold()).split()


def _cleaned(signs: str, instead: str, text: str) -> str:
    """A text without signs; the vowels and accents of many scripts are marks, which Python does not count to their words."""
    return re.sub(
        signs,
        lambda found: found[0] if unicodedata.category(found[0]).startswith("M") else instead,
        unicodedata.normalize("NFC", text),
    )


def _token_f1(prediction: str, target: str) -> float:
    """F1 of the two bags of words, as SQuAD counts it, but with articles and decimals kept: "hepatitis A" is not "hepatitis"."""
    predicted, wanted = _bare_tokens(prediction), _bare_tokens(target)
    if not predicted or not wanted:  # of signs alone, + is not -
        return _same_but_for_form(prediction, target)
    shared = (Counter(predicted) & Counter(wanted)).total()
    return 2 * shared / (len(predicted) + len(wanted))


def _words_for_rouge(text: str) -> str:
    """The standard normalisation, for all alphabets: the original deletes every letter outside a-z."""
    return _cleaned(r"[\W_]", " ", text.lower())


def _rouge(name: str, predictions: Sequence[str], targets: Sequence[str], choices: Any) -> Metric:
    from torchmetrics.functional.text import rouge_score

    def row_score(prediction: str, target: str) -> float:
        worded = all(_words_for_rouge(text).split() for text in (prediction, target))
        if name != "rouge2" and not worded:  # of signs alone, + is not -
            return _same_but_for_form(prediction, target)
        scores = rouge_score(prediction, target, normalizer=_words_for_rouge, rouge_keys=name)
        return float(scores[f"{name}_fmeasure"])

    return _mean_of(row_score, name, predictions, targets, choices)


# Metrics of the whole list.


def _recall(name: str, predictions: Sequence[str], targets: Sequence[str], _choices: Any) -> Metric:
    """The share of one choice's rows that were answered with it; 1 where no row has it, since none was missed."""
    choice = recalled_choice(name)
    wanted = np.array([t.strip() == choice for t in targets])
    found = wanted & np.array([p.strip() == choice for p in predictions])
    return Metric(name, np.stack([found, wanted], axis=1).astype(np.float64), _share_or_one)


def _share_or_one(sums: np.ndarray) -> np.ndarray:
    part, whole = sums[..., 0], sums[..., 1]
    return np.where(whole > 0, part / np.maximum(whole, 1), 1.0)


def _span_f1(name: str, predictions: Sequence[str], targets: Sequence[str], _choices: Any) -> Metric:
    """Micro F1 of the (type, text) pairs in lists such as `Disease: colon cancer; Drug: aspirin`, or `none`.

    A span is right when its own row's target has it, as often as it has it. Order, case and whitespace do not
    count, nor where in the text a span stands. 1 where neither side has a span.
    """
    rows = []
    for prediction, target in zip(predictions, targets, strict=True):
        ours, theirs = Counter(spans(prediction)), Counter(spans(target))
        rows.append([2 * (ours & theirs).total(), ours.total() + theirs.total()])
    return Metric(name, np.array(rows, dtype=np.float64), _share_or_one)


def spans(text: str) -> list[tuple[str, str]]:
    """Returns the (type, text) pairs of a list, as many as `;` parts; a text may hold `:`, one with `;` counts as two."""
    if text.casefold().split() in ([], ["none"]):
        return []
    pieces = [piece.partition(":") for piece in text.split(";")]
    plain = [(" ".join(_plain_words(kind)), " ".join(_plain_words(span))) for kind, _, span in pieces]
    return [pair for pair in plain if any(pair)]


def _macro_f1(
    name: str, predictions: Sequence[str], targets: Sequence[str], choices: Sequence[str] | None = None
) -> Metric:
    """The mean F1 of the classes that occur, in this draw of the rows, among the predictions or the targets."""
    from scipy.sparse import csr_array, hstack

    predictions, targets = [p.strip() for p in predictions], [t.strip() for t in targets]
    occurring = {*predictions, *targets}
    classes = sorted(occurring & {c.strip() for c in choices} if choices else occurring)
    column = {label: i for i, label in enumerate(classes)}

    def one_hot(labels: Sequence[str | None]) -> csr_array:
        places = [(i, column[label]) for i, label in enumerate(labels) if label is not None and label in column]
        rows, columns = zip(*places, strict=True) if places else ((), ())
        return csr_array((np.ones(len(places)), (rows, columns)), shape=(len(labels), len(classes)))

    hits = [p if p == t else None for p, t in zip(predictions, targets, strict=True)]
    return Metric(name, hstack([one_hot(hits), one_hot(predictions), one_hot(targets)], format="csr"), _mean_f1)


def _mean_f1(sums: np.ndarray) -> np.ndarray:
    hits, predicted, labelled = np.split(sums, 3, axis=-1)
    either = predicted + labelled
    f1 = 2 * hits / np.maximum(either, 1)  # a class with neither has no hits: 0
    return f1.sum(-1) / np.maximum((either > 0).sum(-1), 1)


_BLEU_ORDER = 4


def _bleu(name: str, predictions: Sequence[str], targets: Sequence[str], _choices: Any) -> Metric:
    """Corpus BLEU-4, unsmoothed, words split at whitespace; the same as torchmetrics' `bleu_score`."""
    rows = [_bleu_counts(p.split(), t.split()) for p, t in zip(predictions, targets, strict=True)]
    return Metric(name, np.array(rows, dtype=np.float64), _bleu_of_sums)


def _bleu_counts(predicted: list[str], wanted: list[str]) -> list[int]:
    """Returns matches for each order, n-grams for each order, and both lengths."""
    matches, totals = [], []
    for order in range(1, _BLEU_ORDER + 1):
        ours, theirs = (Counter(zip(*(words[i:] for i in range(order)), strict=False)) for words in (predicted, wanted))
        matches.append((ours & theirs).total())
        totals.append(ours.total())
    return [*matches, *totals, len(predicted), len(wanted)]


def _bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    matches, totals = sums[..., :_BLEU_ORDER], sums[..., _BLEU_ORDER : 2 * _BLEU_ORDER]
    predicted, wanted = sums[..., -2], sums[..., -1]
    some = np.asarray((matches > 0).all(-1))  # an order without a match makes the geometric mean zero
    precisions = np.where(some[..., None], matches, 1) / np.maximum(totals, 1)
    brevity = np.exp(np.minimum(0, 1 - wanted / np.maximum(predicted, 1)))
    return np.where(some, brevity * np.exp(np.log(precisions).mean(-1)), 0.0)


KNOWN: dict[str, Callable[..., Metric]] = {
    "accuracy": partial(_mean_of, _same),
    "macro_f1": _macro_f1,
    "exact_match": partial(_mean_of, _same_but_for_form),
    "token_f1": partial(_mean_of, _token_f1),
    "rouge1": _rouge,
    "rouge2": _rouge,
    "rougeL": _rouge,
    "bleu": _bleu,
    "span_f1": _span_f1,
}
