"""K-shot splits: counts by class, disjointness, seeds, classes with few rows, and one clear sentence where there are none."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alter.data import MultiTaskDataModule, Task
from alter.data.draw import _divided, draw_shots
from alter.data.encode import encode_task
from alter.data.sources import Function
from alter.errors import AlterError
from tests.data.conftest import task_dict, write_jsonl
from tests.data.test_module import make

CHOICES = ["a", "b", "c"]


def task_of(labels, repeats=1, choices=CHOICES):
    rows = [{"text": f"row {i // repeats}", "label": label} for i, label in enumerate(labels)]
    task = Task("t", {}, "{{ text }}", "{{ label }}", choices=choices)
    task.__dict__["opened"] = Function(lambda split: iter(rows))
    return task, rows


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    extra=st.lists(st.sampled_from(CHOICES), max_size=60),
    shots=st.integers(1, 6),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_k_of_each_class_and_k_others_to_validate(extra, shots, seed, data):
    labels = data.draw(st.permutations([*CHOICES * (2 * shots), *extra]))
    task, rows = task_of(labels)
    drawn = draw_shots(task, shots, seed)
    assert not drawn.train & drawn.validation
    assert not drawn.scarce
    for numbers in (drawn.train, drawn.validation):
        assert Counter(rows[n - 1]["label"] for n in numbers) == dict.fromkeys(CHOICES, shots)
    assert draw_shots(task, shots, seed) == drawn


@given(count=st.integers(12, 40), shots=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_task_without_choices_is_one_class(count, shots, seed):
    task, _ = task_of([f"text {i}" for i in range(count)], choices=None)
    drawn = draw_shots(task, shots, seed)
    assert len(drawn.train) == len(drawn.validation) == shots
    assert not drawn.train & drawn.validation


@given(seed=st.integers(0, 99))
def test_equal_rows_are_drawn_once(seed):
    labels = [label for label in CHOICES * 8 for _ in range(5)]
    task, rows = task_of(labels, repeats=5)
    drawn = draw_shots(task, 4, seed)
    texts = [{rows[n - 1]["text"] for n in numbers} for numbers in (drawn.train, drawn.validation)]
    assert len(texts[0]) == len(texts[1]) == 12
    assert not texts[0] & texts[1]


def test_the_papers_seeds_draw_different_rows_and_all_rows_come_up():
    task, _ = task_of(CHOICES * 200)
    draws = [frozenset(draw_shots(task, 16, seed).train) for seed in (13, 21, 42, 87, 100)]
    assert len(set(draws)) == 5
    seen = Counter(n for seed in range(200) for n in draw_shots(task, 16, seed).train)
    assert len(seen) > 590  # of 600, each with a chance of 16 in 200 a seed
    assert max(seen.values()) < 45


@given(counts=st.lists(st.integers(2, 20), min_size=3, max_size=3), shots=st.integers(1, 8), seed=st.integers(0, 9))
def test_a_class_with_few_rows_gives_what_it_has_and_keeps_one_to_validate_on(counts, shots, seed):
    task, rows = task_of([label for label, count in zip(CHOICES, counts, strict=True) for _ in range(count)])
    drawn = draw_shots(task, shots, seed)
    for label, count in zip(CHOICES, counts, strict=True):
        learned, checked = (
            sum(rows[n - 1]["label"] == label for n in part) for part in (drawn.train, drawn.validation)
        )
        assert learned == (shots if count > shots else count - 1)
        assert checked == min(shots, count - learned)
        assert checked
        assert (label in drawn.scarce) == (count < 2 * shots)
    assert not drawn.train & drawn.validation


@pytest.mark.parametrize("choices", [CHOICES, None])
def test_one_row_cannot_be_on_both_sides(choices):
    task, _ = task_of([*"aaaaabbbbb", "c"] if choices else ["a"], choices=choices)
    with pytest.raises(AlterError) as error:
        draw_shots(task, 4, 13)
    (sentence,) = error.value.messages
    where = "task 't', class 'c': data.shots needs 2" if choices else "task 't': data.shots needs 2"
    assert where in sentence
    assert sentence.endswith("there are 1; add rows or leave the task out.")


def test_a_class_without_any_row_is_told_too():
    task, _ = task_of(["a", "b"] * 8)
    with pytest.raises(AlterError, match=r"class 'c'.* there are 0; add rows"):
        draw_shots(task, 2, 13)


def test_the_summary_says_where_rows_are_scarce(tmp_path, words):
    assert "scarce" not in make(tmp_path, words, shots=2).summary()
    data = make(tmp_path, words, shots=16)
    assert (
        "scarce: classes that cannot give 2 x 16 different rows, by number or by group, give what they have: "
        in data.summary()
    )
    task = next(task for task in data.tasks if task.choices)
    assert f"{task.name} ({data.statistics(task.name)['train']['scarce']})" in data.summary()


def test_the_module_learns_from_few_rows_and_tests_on_all(tmp_path, words):
    whole, few = make(tmp_path, words), make(tmp_path, words, shots=5, seed=21)
    assert few.sizes == [10, 5]
    for name, size in (("small", 10), ("large", 5)):
        parts = {s: few.examples(name, s)["prompt"][:] for s in ("train", "validation", "test")}
        assert [len(parts[s]) for s in ("train", "validation")] == [size, size]
        assert parts["test"] == whole.examples(name, "test")["prompt"][:]
        known = whole.examples(name, "train")["prompt"][:]
        assert set(parts["train"]) | set(parts["validation"]) <= set(known)
        assert not set(parts["train"]) & set(parts["validation"])
    assert Counter(few.examples("small", "train")["target"]) == {"yes": 5, "no": 5}
    assert (
        make(tmp_path, words, shots=5, seed=21).examples("small", "train")["prompt"][:]
        == few.examples("small", "train")["prompt"][:]
    )


def test_tokens_are_kept_apart_by_shots_and_a_limit_gives_way(tmp_path, tokenizer):
    task = Task.from_dict(task_dict(tmp_path, limit={"train": 3, "test": 2}), "t.yaml")
    folders = [encode_task(task, tokenizer, False, tmp_path / "cache", 13, shots) for shots in (None, 2, 3)]
    assert len(set(folders)) == 3
    import json

    counts = [
        [json.loads((f / "stats.json").read_text())[s]["rows"] for s in ("train", "validation", "test")]
        for f in folders
    ]
    assert counts == [[3, 6, 2], [4, 4, 2], [6, 6, 2]]


def test_a_bad_row_is_told_by_its_number_in_the_training_split(tmp_path, tokenizer):
    content = task_dict(tmp_path, choices=["yes", "no"])
    write_jsonl(tmp_path / "t.train.jsonl", [{"text": "w1", "label": "yes"}, {"text": "w2", "label": "maybe"}])
    with pytest.raises(AlterError, match="train row 2: the label 'maybe' is not one of the choices"):
        encode_task(Task.from_dict(content, "t.yaml"), tokenizer, False, tmp_path / "cache", 13, 1)


def test_shots_below_one_are_refused():
    with pytest.raises(AlterError, match=r"data\.shots: 0 is below 1"):
        MultiTaskDataModule(shots=0)


@settings(deadline=None)
@given(patients=st.integers(8, 40), shots=st.integers(1, 4), seed=st.integers(0, 20))
def test_rows_of_one_group_are_on_one_side(tmp_path_factory, patients, shots, seed):
    visits = [(patient, visit) for patient in range(patients) for visit in range(3)]
    rows = [{"text": f"row {p} {v}", "label": CHOICES[v], "patient": p} for p, v in visits]
    rows.append({**rows[0], "patient": patients - 1})  # equal but for the patient
    file = str(write_jsonl(tmp_path_factory.mktemp("groups") / "x.jsonl", rows))
    arguments = {"train": file, "validation": file, "test": file, "group": "patient"}
    source = {"class_path": "Files", "init_args": arguments}
    task = Task("t", source, "{{ text }}", "{{ label }}", choices=CHOICES)
    try:
        drawn = draw_shots(task, shots, seed)
    except AlterError as error:
        assert all(f"by data.seed {seed} all are on one side" in message for message in error.messages)  # noqa: PT017
        assert patients < 20
        return
    sides = [[rows[number - 1] for number in numbers] for numbers in (drawn.train, drawn.validation)]
    for key in ("patient", "text"):
        learned, checked = ({row[key] for row in side} for side in sides)
        assert not learned & checked
    for side in sides:
        assert all(1 <= Counter(row["label"] for row in side)[label] <= shots for label in CHOICES)


@given(
    both=st.integers(0, 8),
    train=st.integers(0, 5),
    validation=st.integers(0, 5),
    shots=st.integers(1, 5),
    data=st.data(),
)
def test_rows_without_a_group_go_where_they_are_missed(both, train, validation, shots, data):
    """Against all ways to divide them: as many to learn from as can be, if one is left to validate on."""
    keys = iter(data.draw(st.permutations(range(both + train + validation))))
    either, left, right = ({float(key): key for key in islice(keys, n)} for n in (both, train, validation))
    learned, validated = _divided({**either, **left}, {**either, **right}, shots)
    assert not learned.keys() & validated.keys()
    assert learned.items() <= {**either, **left}.items()
    assert validated.items() <= {**either, **right}.items()
    ways = [(min(shots, train + n), min(shots, validation + both - n)) for n in range(both + 1)]
    possible = [way for way in ways if min(way) > 0]
    found = len(learned), len(validated)
    assert found == max(possible) if possible else min(found) == 0


def test_groups_are_halved_though_the_sources_shares_are_drawn_by_the_same_seed(tmp_path):
    rows = [{"text": f"row {n}", "label": CHOICES[n % 3], "patient": n // 3} for n in range(600)]
    file = str(write_jsonl(tmp_path / "x.jsonl", rows))
    arguments = {"train": file, "validation": 0.3, "test": 0.3, "group": "patient", "seed": 13}
    source = {"class_path": "Files", "init_args": arguments}
    drawn = draw_shots(Task("t", source, "{{ text }}", "{{ label }}", choices=CHOICES), 20, 13)
    assert len(drawn.train) == len(drawn.validation) == 60


@pytest.mark.parametrize("seed", range(20))
def test_an_equal_row_without_a_group_does_not_take_one_apart(tmp_path, seed):
    rows = [{"text": "same", "patient": None}, {"text": "same", "patient": "d"}, {"text": "other", "patient": "d"}]
    file = str(write_jsonl(tmp_path / "x.jsonl", rows))
    source = {
        "class_path": "Files",
        "init_args": dict.fromkeys(("train", "validation", "test"), file) | {"group": "patient"},
    }
    drawn = draw_shots(Task("t", source, "{{ text }}", "{{ text }}", metrics=["rougeL"]), 2, seed)
    assert {"train": {1}, "validation": {3}}.items() <= drawn._asdict().items() or drawn.train == {3}
