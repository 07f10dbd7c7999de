from __future__ import annotations

import json
import os
import re
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alter.metrics import bootstrap_interval, metric
from alter.results import (
    render_table,
    run_results,
    task_results,
    verdict,
)

TARGETS = ["a", "b"] * 50
GOOD = TARGETS[:90] + ["c"] * 10
FLIPPED = ["b", "a"] * 50


def classification(predictions=GOOD, **references):
    references = {"majority": ["a"] * 100, "backbone": FLIPPED, "tfidf": TARGETS, **references}
    return task_results(["accuracy", "macro_f1"], TARGETS, predictions, references, ["a", "b", "c"])


def generation():
    targets = ["an abnormal left heart", "a very short finger"] * 10
    references = {"majority": None, "backbone": ["a heart", "hand"] * 10, "tfidf": None}
    return task_results(["rougeL", "bleu"], targets, targets, references, None)


def run(**tasks):
    seconds = {"data": 12.34, "stage1": 300, "stage2": 200.5, "test": 61}
    return run_results(tasks, seconds, 3 * 2**30, 4_300_000)


def test_schema_is_the_one_that_readers_rely_on():
    found = run(system=classification(), definition=generation())
    assert list(found) == ["tasks", "seconds", "peak_memory_bytes", "trainable_parameters"]
    assert list(found["seconds"]) == ["data", "stage1", "stage2", "test"]
    for task in found["tasks"].values():
        for entry in task.values():
            assert list(entry) == ["value", "low", "high", "n", "references"]
            assert list(entry["references"]) == ["majority", "backbone", "tfidf"]
            for reference in entry["references"].values():
                assert reference is None or list(reference) == ["value", "low", "high"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_values_and_intervals_are_the_metrics():
    entry = classification()["accuracy"]
    low, high = bootstrap_interval(metric("accuracy", GOOD, TARGETS))
    assert (entry["value"], entry["n"]) == (0.9, 100)
    assert (entry["low"], entry["high"]) == pytest.approx((low, high), abs=1e-6)
    assert [entry["references"][r]["value"] for r in ("majority", "backbone", "tfidf")] == [0.5, 0, 1]


def test_a_reference_that_makes_no_sense_is_null():
    for entry in generation().values():
        assert entry["references"]["majority"] is None
        assert entry["references"]["tfidf"] is None
        assert entry["references"]["backbone"]["value"] < entry["value"]


def test_a_step_that_did_not_run_is_null_and_cuda_adds_a_key():
    found = run_results({}, {"test": 3.0}, 1, 2, peak_device_memory=2**30)
    assert found["seconds"] == {"data": None, "stage1": None, "stage2": None, "test": 3.0}
    assert found["peak_device_memory_bytes"] == 2**30
    assert "test 3 s" in render_table(found)
    assert "device memory 1.00 GiB" in render_table(found)


@pytest.mark.parametrize(
    ("reference", "above", "overlap", "mark"),
    [
        ((0.5, 0.4, 0.6), False, False, ""),
        ((0.75, 0.65, 0.85), False, True, "~"),
        ((0.8, 0.7, 0.9), False, True, "~"),
        ((0.85, 0.75, 0.95), True, True, "*~"),
        ((0.97, 0.95, 0.99), True, False, "*"),
    ],
)
def test_verdict(reference, above, overlap, mark):
    model = {"value": 0.8, "low": 0.7, "high": 0.9}
    found = verdict(model, dict(zip(("value", "low", "high"), reference, strict=True)))
    assert found == (above, overlap)
    assert found.mark == mark


def test_table_says_in_words_where_a_reference_wins():
    table = render_table(run(system=classification(), definition=generation()))
    assert "system  (n = 100)" in table
    assert "0.900 [" in table
    assert "* TF-IDF is above the model on: system accuracy, system macro_f1." in table
    assert "The untouched backbone" not in table
    assert "data 12 s; stage1 300 s" in table
    assert "peak memory 3.00 GiB; 4,300,000 parameters trained" in table
    rouge = next(line for line in table.splitlines() if line.startswith("  rougeL"))
    assert rouge.split()[4] == rouge.split()[-1] == "-"


def test_table_says_where_intervals_overlap_and_where_nothing_comes_near():
    near = render_table(run(system=classification(backbone=GOOD)))
    assert "~ The untouched backbone has an interval that overlaps the model's on: system accuracy" in near
    clear = render_table(run(system=classification(predictions=TARGETS, tfidf=None)))
    assert "The model is above every reference, intervals apart." in clear
    alone = run(system=classification(majority=None, backbone=None, tfidf=None))
    assert "every reference" not in render_table(alone)


@given(
    st.lists(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=130), max_size=6),
    st.integers(80, 140),
)
def test_table_fits_the_terminal(names, columns):
    entry = {"value": 1.0, "low": 1.0, "high": 1.0, "n": 123_456}
    entry["references"] = {r: {"value": 1.0, "low": 1.0, "high": 1.0} for r in ("majority", "backbone", "tfidf")}
    entry["references"]["tfidf"] = {"value": 1.1, "low": 1.0, "high": 1.2}
    with mock.patch.dict(os.environ, COLUMNS=str(columns)):
        table = render_table(run_results({name: {"exact_match": entry} for name in names}, {}, 1, 2))
    assert max(len(line) for line in table.splitlines()) == min(columns, 110)
    assert table.count("1.100 [1.000, 1.200] *~") == (len(set(names)) if columns >= 110 else 0)
    assert len(re.findall(r"1\.100 (?:\[1.000, 1.200\] )?\*~", table)) == len(set(names))


def test_a_long_metric_name_stands_above_its_numbers():
    results = run(system=task_results(["recall[skin and hair]"], TARGETS, GOOD, {}, None))
    lines = render_table(results).splitlines()
    above = lines.index("  recall[skin and hair]")
    assert re.match(r" {14}\d\.\d{3} \[", lines[above + 1])
