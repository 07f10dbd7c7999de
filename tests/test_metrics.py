from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from alter.errors import AlterError
from alter.metrics import (
    KNOWN,
    Metric,
    bootstrap,
    bootstrap_interval,
    interval_and_p,
    metric,
)

WORDS = ("heart", "Heart", "of", "the", "skin", "abnormal", "A", "")
texts = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
rows = st.lists(st.tuples(texts, texts), min_size=1, max_size=12)
METRICS = [*KNOWN, "recall[heart]"]
labelled_rows = st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from("abcde")), min_size=1, max_size=40)


def value(name, predictions, targets, choices=None):
    return metric(name, predictions, targets, choices).value()


def test_the_known_names():
    assert set(KNOWN) == {
        "accuracy", "macro_f1", "exact_match", "token_f1", "rouge1", "rouge2", "rougeL", "bleu", "span_f1"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "prediction", "target", "expected"),
    [
        ("accuracy", "Neoplasms ", "Neoplasms", 1),
        ("accuracy", "neoplasms", "Neoplasms", 0),
        ("exact_match", "  Heart\tattack", "heart attack\n", 1),
        ("exact_match", "STRASSE", "straße", 1),
        ("exact_match", "heart", "heart attack", 0),
        ("exact_match", "Sjo\u0308gren", "Sjögren", 1),
        ("span_f1", "Disease: Sjo\u0308gren", "Disease: Sjögren", 1),
        ("rouge1", "+", "+", 1),
        ("rougeL", "+", "-", 0),
        ("rouge1", "", "heart", 0),
        ("token_f1", "acute heart failure", "heart failure", 2 * 2 / 5),
        ("token_f1", "Heart, failure.", "heart failure", 1),
        ("token_f1", "hepatitis A", "hepatitis", 2 / 3),
        ("token_f1", "heart heart", "heart", 2 / 3),
        ("token_f1", "", "heart", 0),
        ("token_f1", "", "", 1),
        ("token_f1", "dose 3.5 mg.", "dose 3.5 mg", 1),
        ("token_f1", "dose 3.5 mg", "dose 35 mg", 2 / 3),
        ("token_f1", "1,5, 2.", "1,5 2", 1),
        ("token_f1", "+", "-", 0),
        ("token_f1", "?", "", 0),
        ("token_f1", "कि", "का", 0),
        ("token_f1", "हिन्दी में", "हिन्दी, में।", 1),
        ("token_f1", "Sjo\u0308gren", "Sjögren", 1),
        ("rouge1", "हिन्दी में", "हिन्दी का", 0.5),
        ("rouge1", "ยาแก้ปวด", "ยาแกปวด", 0),
        ("rougeL", "Sjo\u0308gren's disease", "Sjögren's disease", 1),
        ("rouge1", "My name is John", "Is your name John", 0.75),
        ("rouge2", "a b c d", "a b x d", 1 / 3),
        ("rougeL", "My name is John", "Is your name John", 0.5),
        ("rougeL", "", "heart", 0),
        ("rouge1", "Sjögren", "Sjogren", 0),
        ("rougeL", "先天性 心脏病", "先天性 心脏病", 1),
        ("bleu", "the cat is on the mat", "the cat is on the mat", 1),
        ("bleu", "a b c", "a b c", 0),
        ("bleu", "", "a b c d", 0),
        ("macro_f1", "a", "a", 1),
        ("macro_f1", "a", "b", 0),
        ("recall[out of scope]", " out of scope", "out of scope", 1),
        ("recall[out of scope]", "refund", "out of scope", 0),
        ("recall[out of scope]", "out of scope", "refund", 1),
        ("span_f1", "Drug: aspirin; Disease: colon  cancer", "disease: Colon cancer; drug: Aspirin", 1),
        ("span_f1", "Disease: cancer; Disease: cancer", "Disease: cancer", 2 / 3),
        ("span_f1", "Disease: cancer; Drug: cancer; cancer", "Disease: cancer", 2 / 4),
        ("span_f1", "time: 7:30 pm; date: today", "time: 7:30 pm; date: 7:30 pm", 2 / 4),
        ("span_f1", "none", "None ", 1),
        ("span_f1", "", "none", 1),
        ("span_f1", "none", "Disease: cancer", 0),
        ("span_f1", "Disease: none", "none", 0),
        ("span_f1", "; ;", "none", 1),
    ],
)
def test_one_row_by_hand(name, prediction, target, expected):
    assert value(name, [prediction], [target]) == pytest.approx(expected, abs=1e-6)


def test_bleu_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples and 1 of 3 fours match; 6 words for a target of 7.
    found = value("bleu", ["the cat sat on a mat"], ["the cat sat on the big mat"])
    assert found == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25 * np.exp(1 - 7 / 6))


@given(rows)
@settings(deadline=None, max_examples=60)
def test_bleu_is_torchmetrics_bleu(rows):
    from torchmetrics.functional.text import bleu_score

    predictions, targets = zip(*rows, strict=True)
    expected = float(bleu_score(predictions, [[t] for t in targets]))
    assert value("bleu", predictions, targets) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
@given(rows=rows)
@settings(deadline=None, max_examples=40)
def test_rouge_is_torchmetrics_rouge_on_plain_text(name, rows):
    from torchmetrics.functional.text import rouge_score

    rows = [pair for pair in rows if "".join(pair).strip()]  # of two empty texts it thinks otherwise
    assume(rows)
    predictions, targets = map(list, zip(*rows, strict=True))
    expected = float(rouge_score(predictions, targets, rouge_keys=name)[f"{name}_fmeasure"])
    assert value(name, predictions, targets) == pytest.approx(expected, abs=1e-5)


@given(labelled_rows, st.integers(0, 1000))
@settings(deadline=None, max_examples=80)
def test_macro_f1_is_scikit_learns_on_any_draw_of_the_rows(rows, seed):
    from sklearn.metrics import f1_score

    predictions, targets = map(np.array, zip(*rows, strict=True))
    drawn = np.random.default_rng(seed).integers(0, len(rows), len(rows))
    measured = metric("macro_f1", list(predictions), list(targets))
    expected = [
        f1_score(targets[index], predictions[index], average="macro", zero_division=0)
        for index in (np.arange(len(rows)), drawn)
    ]
    assert [measured.value(), measured.value(drawn)] == pytest.approx(expected)


def plain_recall(rows, choice):
    answers = [prediction for prediction, target in rows if target == choice]
    return answers.count(choice) / len(answers) if answers else 1.0


@given(labelled_rows, st.integers(0, 1000))
@settings(deadline=None, max_examples=80)
def test_recall_of_a_choice_is_plain_counting_on_any_draw_of_the_rows(rows, seed):
    predictions, targets = zip(*rows, strict=True)
    drawn = np.random.default_rng(seed).integers(0, len(rows), len(rows))
    measured = metric("recall[a]", predictions, targets)
    expected = [plain_recall(rows, "a"), plain_recall([rows[i] for i in drawn], "a")]
    assert [measured.value(), measured.value(drawn)] == pytest.approx(expected)


span_lists = st.lists(st.tuples(st.sampled_from(["Drug", "drug", "Gene"]), st.sampled_from(["a", "A  b", "a B"])))
span_rows = st.lists(st.tuples(span_lists, span_lists), min_size=1, max_size=8)


def written(spans):
    return "; ".join(f"{kind}: {text}" for kind, text in spans) or "none"


def plain_span_f1(rows):
    """Each predicted span takes one equal span, not yet taken, of its own row's target."""
    right = predicted = wanted = 0
    for ours, theirs in rows:
        left = [(kind.lower(), text.lower().split()) for kind, text in theirs]
        predicted, wanted = predicted + len(ours), wanted + len(left)
        for kind, text in ours:
            if (kind.lower(), text.lower().split()) in left:
                left.remove((kind.lower(), text.lower().split()))
                right += 1
    if not predicted + wanted:
        return 1.0
    precision, recall = right / max(predicted, 1), right / max(wanted, 1)
    return 2 * precision * recall / (precision + recall) if right else 0.0


@given(span_rows, st.integers(0, 1000))
@settings(deadline=None, max_examples=80)
def test_span_f1_is_plain_counting_on_any_draw_of_the_rows(rows, seed):
    drawn = np.random.default_rng(seed).integers(0, len(rows), len(rows))
    measured = metric("span_f1", [written(ours) for ours, _ in rows], [written(theirs) for _, theirs in rows])
    expected = [plain_span_f1(rows), plain_span_f1([rows[i] for i in drawn])]
    assert [measured.value(), measured.value(drawn)] == pytest.approx(expected)


def test_a_span_counts_in_its_own_row_alone():
    assert value("span_f1", ["Drug: a", "Drug: b"], ["Drug: b", "Drug: a"]) == 0


def test_macro_f1_over_choices_makes_no_class_of_other_answers():
    predictions, targets = ["a", "b", "nonsense"], ["a", "b", "b"]
    assert value("macro_f1", predictions, targets) == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert value("macro_f1", predictions, targets, ["a", "b", "c"]) == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("name", METRICS)
@given(rows=rows, seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=15)
def test_a_draw_is_the_metric_on_the_drawn_rows(name, rows, seed):
    predictions, targets = map(np.array, zip(*rows, strict=True))
    drawn = np.random.default_rng(seed).integers(0, len(rows), len(rows))
    again = value(name, list(predictions[drawn]), list(targets[drawn]))
    assert value_of_draw(name, predictions, targets, drawn) == pytest.approx(again)


def value_of_draw(name, predictions, targets, drawn):
    return metric(name, list(predictions), list(targets)).value(drawn)


@pytest.mark.parametrize("name", METRICS)
@given(rows=rows)
@settings(deadline=None, max_examples=15)
def test_value_and_interval_lie_between_0_and_1_and_do_not_depend_on_row_order(name, rows):
    predictions, targets = zip(*rows, strict=True)
    measured = metric(name, predictions, targets)
    low, high = bootstrap_interval(measured, resamples=50)
    assert 0 <= low <= high <= 1
    assert 0 <= measured.value() <= 1
    assert value(name, predictions[::-1], targets[::-1]) == pytest.approx(measured.value())


def hits(right, wrong):
    return metric("accuracy", ["a"] * (right + wrong), ["a"] * right + ["b"] * wrong)


def test_interval_of_a_proportion_is_the_binomials():
    from scipy.stats import binom

    low, high = bootstrap_interval(hits(210, 90), resamples=20_000)
    assert (low, high) == pytest.approx(tuple(binom.ppf([0.025, 0.975], 300, 0.7) / 300), abs=0.005)


def test_interval_is_scipys_percentile_bootstrap():
    from scipy.stats import bootstrap as scipy_bootstrap

    scores = np.random.default_rng(0).beta(2, 5, 200)
    ours = Metric("scores", np.stack([scores, np.ones(200)], 1), lambda sums: sums[..., 0] / sums[..., 1])
    theirs = scipy_bootstrap((scores,), np.mean, method="percentile", n_resamples=9999, rng=1).confidence_interval
    assert bootstrap_interval(ours, resamples=9999) == pytest.approx((theirs.low, theirs.high), abs=0.003)


def test_interval_holds_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    right = generator.binomial(200, 0.7, size=300)
    held = [low <= 0.7 <= high for low, high in (bootstrap_interval(hits(r, 200 - r), 400) for r in right)]
    assert 0.9 <= np.mean(held) <= 0.99


def test_same_seed_same_interval():
    assert bootstrap_interval(hits(30, 10)) == bootstrap_interval(hits(30, 10))
    assert bootstrap_interval(hits(30, 10), seed=1) != bootstrap_interval(hits(30, 10), seed=2)
    low, high = bootstrap_interval(hits(30, 10))
    wider = bootstrap_interval(hits(30, 10), level=0.99)
    assert wider[0] < low < high < wider[1]


def test_many_rows_are_drawn_in_parts(monkeypatch):
    monkeypatch.setattr("alter.metrics._WEIGHTS_AT_ONCE", 70)
    values = bootstrap(hits(15, 5), resamples=100)
    assert values.shape == (100,)
    assert len(set(values)) > 3


@pytest.mark.parametrize(("right", "wrong", "point"), [(1, 0, 1.0), (0, 1, 0.0), (50, 0, 1.0), (0, 50, 0.0)])
def test_rows_that_score_alike_give_a_point(right, wrong, point):
    assert bootstrap_interval(hits(right, wrong)) == (point, point)


def test_paired_difference_sees_what_two_intervals_hide():
    better = metric("accuracy", ["a"] * 100, ["a"] * 70 + ["b"] * 30)
    worse = metric("accuracy", ["b"] * 10 + ["a"] * 90, ["a"] * 70 + ["b"] * 30)
    assert bootstrap_interval(worse)[1] > bootstrap_interval(better)[0]
    low, high, p = interval_and_p(bootstrap(better) - bootstrap(worse))
    assert 0 < low < 0.1 < high
    assert p < 0.01
    backwards = interval_and_p(bootstrap(worse) - bootstrap(better))
    assert backwards == pytest.approx((-high, -low, p))


def test_paired_difference_of_a_metric_with_itself_is_nothing():
    draws = bootstrap(hits(30, 10))
    assert interval_and_p(draws - draws) == (0, 0, 1)


def test_bad_input():
    with pytest.raises(AlterError, match=r"no metric 'acuracy'.*Did you mean 'accuracy'"):
        metric("acuracy", ["a"], ["a"])
    with pytest.raises(AlterError, match="no rows"):
        metric("accuracy", [], [])
    with pytest.raises(ValueError, match="1 predictions for 2 targets"):
        metric("accuracy", ["a"], ["a", "b"])
    with pytest.raises(AlterError, match=r"no metric 'zzz'\. Known: "):
        metric("zzz", ["a"], ["a"])
    for name in ("recall", "recall[]", "recall[a"):
        with pytest.raises(AlterError, match="no metric"):
            metric(name, ["a"], ["a"])
