import pytest
from hypothesis import given
from hypothesis import strategies as st

from alter.data import Files, Task
from alter.data.sources import Function
from alter.errors import AlterError
from tests.data.conftest import write_jsonl
from tests.data.test_files import ROWS, write


def test_a_subclass_that_gives_other_rows_is_asked_for_them(tmp_path):
    class Shouted(Files):
        def rows(self, split):
            return ({"text": row["text"].upper()} for row in super().rows(split))

    file = write(tmp_path / "x.csv", [{"text": "a"}, {"text": "b"}])
    source = Shouted(train=str(file), validation=str(file), test=str(file))
    assert list(source.numbered("train")) == [(1, {"text": "A"}), (2, {"text": "B"})]

    class Numbered(Files):
        def numbered(self, split):
            return ((10 * n, row) for n, row in super().numbered(split))

    source = Numbered(train=str(file), validation=str(file), test=str(file))
    assert list(source.numbered("train")) == [(10, {"text": "a"}), (20, {"text": "b"})]
    assert list(source.rows("train")) == [{"text": "a"}, {"text": "b"}]


def test_shares_are_carved_out_by_group_and_never_mixed(tmp_path):
    rows = [{"text": f"w{i}", "patient": str(i % 50)} for i in range(1000)]
    file = write(tmp_path / "x.jsonl", rows)
    source = Files(str(file), 0.2, 0.2, group="patient")
    parts = {split: list(source.rows(split)) for split in ("train", "validation", "test")}
    assert sorted(r["text"] for part in parts.values() for r in part) == sorted(r["text"] for r in rows)
    groups = {split: {r["patient"] for r in part} for split, part in parts.items()}
    assert all(groups.values())
    assert not groups["train"] & groups["validation"]
    assert not groups["train"] & groups["test"]
    assert not groups["validation"] & groups["test"]


def test_a_group_of_several_columns_keeps_rows_together_that_are_equal_in_all(tmp_path):
    rows = [{"id": i, "text": f"w{i % 7}", "other": f"v{i % 9}"} for i in range(630)]
    source = Files(str(write(tmp_path / "x.jsonl", rows)), 0.2, 0.2, group=["text", "other"])
    pairs = [{(r["text"], r["other"]) for r in source.rows(split)} for split in ("train", "validation", "test")]
    assert [sum(map(len, pairs)), len(set.union(*pairs))] == [63, 63]  # each in one split
    for column in (0, 1):  # one of the two alone does not keep rows together
        assert {pair[column] for pair in pairs[0]} & {pair[column] for pair in pairs[2]}


@given(st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), max_size=40), st.integers(0, 20))
def test_equal_rows_stay_on_one_side(tmp_path_factory, texts, seed):
    file = write_jsonl(tmp_path_factory.mktemp("x") / "x.jsonl", [{"text": t} for t in texts])
    source = Files(str(file), 0.3, 0.3, seed=seed)
    parts = [{r["text"] for r in source.rows(split)} for split in ("train", "validation", "test")]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_shares_come_close_to_what_was_asked(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"text": str(i)} for i in range(4000)])
    source = Files(str(file), 0.1, 0.25)
    assert len(list(source.rows("validation"))) == pytest.approx(400, rel=0.15)
    assert len(list(source.rows("test"))) == pytest.approx(1000, rel=0.1)


def test_a_fingerprint_changes_with_the_file_and_the_settings(tmp_path):
    file = write(tmp_path / "x.jsonl", ROWS)
    first = Files(str(file)).fingerprint()
    assert Files(str(file)).fingerprint() == first
    assert Files(str(file), seed=14).fingerprint() != first
    write(file, [*ROWS, ROWS[0]])
    assert Files(str(file)).fingerprint() != first


def numbers(split, count=2):
    yield from ({"n": i, "split": split} for i in range(count))


def test_a_function_is_given_the_split_and_its_arguments():
    assert list(Function(numbers, count=1).rows("test")) == [{"n": 0, "split": "test"}]
    assert Function(numbers).fingerprint() != Function(numbers, count=3).fingerprint()


@pytest.mark.parametrize(
    "shares", [(40, 0.1), (0.1, 1.5), (0.9, 0.9), (0.5, 0.5), (0.0, 0.1), (-0.1, 0.1), (True, 0.1), (float("nan"), 0.1)]
)
def test_shares_that_leave_a_split_nothing_are_refused(tmp_path, shares):
    with pytest.raises(
        AlterError,
        match=r"the source sets aside validation .* and test .* of the rows of x\.csv.*; give shares such as 0\.1",
    ):
        Files("x.csv", *shares)


@pytest.mark.parametrize("share", ["20%", "0.2", "0,2", "20 %"])
def test_a_share_that_is_a_text_is_told_as_one_with_task_and_file(tmp_path, share):
    source = {"class_path": "Files", "init_args": {"train": "x.csv", "validation": share}}
    task = Task("t", source, "{{ text }}", "{{ label }}", where="tasks/t.yaml")
    with pytest.raises(
        AlterError, match=r"^tasks/t\.yaml: task 't', key 'source': .* write a share as a number such as 0\.2"
    ):
        _ = task.opened


@pytest.mark.parametrize("nothing", [None, "", float("nan")])
def test_rows_without_a_group_are_not_one_group(tmp_path, nothing):
    rows = [{"text": f"w{i}", "patient": nothing if i % 2 else i // 20, "ward": nothing} for i in range(800)]
    file = str(write(tmp_path / "x.jsonl", rows))
    for group in ("patient", ["patient", "ward"]):
        splits = {
            split: list(Files(file, 0.2, 0.2, group=group).rows(split)) for split in ("train", "validation", "test")
        }
        nobodys = {split: sum(int(row["text"][1:]) % 2 for row in own) for split, own in splits.items()}
        assert nobodys["train"] == pytest.approx(240, abs=45)
        assert nobodys["test"] == pytest.approx(80, abs=35)
        patients = [{row["patient"] for row in own if int(row["text"][1:]) % 2 == 0} for own in splits.values()]
        assert sum(map(len, patients)) == len(set.union(*patients)) == 40


def test_rows_of_a_drawn_split_keep_their_numbers_in_the_file(tmp_path):
    rows = [{"n": str(n)} for n in range(1, 41)]
    source = Files(str(write(tmp_path / "x.jsonl", rows)), validation=0.3, test=0.3)
    for split in ("train", "validation", "test"):
        numbered = list(source.numbered(split))
        assert [row for _, row in numbered] == list(source.rows(split))
        assert all(row == rows[number - 1] for number, row in numbered)
        assert len(numbered) > 4


def test_a_group_of_one_column_is_that_column_and_one_of_none_is_refused(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"text": f"w{i % 40}"} for i in range(300)])
    one, same = (list(Files(str(file), 0.2, 0.2, group=group).rows("test")) for group in ("text", ["text"]))
    assert one == same
    with pytest.raises(AlterError, match="group names no column"):
        Files(str(file), group=[])


def test_json_rows_may_lack_the_group(tmp_path):
    rows = [{"text": f"w{i}"} | ({"patient": i % 9} if i % 10 else {}) for i in range(300)]
    lacking = write(tmp_path / "lacking.jsonl", rows)
    for group in ("patient", ["patient"]):
        found = {split: list(Files(str(lacking), 0.2, 0.2, group=group).rows(split)) for split in ("train", "test")}
        assert sum("patient" not in row for row in found["train"]) > 3
        assert not {row.get("patient", "") for row in found["train"]} & {row.get("patient") for row in found["test"]}


def test_a_misspelt_group_names_the_columns(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"text": "a", "patient": 1}])
    with pytest.raises(AlterError, match=r"no column 'patiant'.*Did you mean 'patient'"):
        list(Files(str(file), group="patiant").rows("train"))
    with pytest.raises(AlterError, match=r"no column 'patiant'.*Did you mean 'patient'"):
        list(Files(str(file), group=["text", "patiant"]).rows("train"))
    with pytest.raises(AlterError, match=r"no column 'patiant'"):  # by which a K-shot split is drawn
        list(Files(*[str(file)] * 3, group="patiant").rows("train"))


def test_of_a_subclass_the_remedy_is_its_own_argument(tmp_path):
    class Mine(Files):
        pass

    told = r"no such file; name the folder that holds x\.csv by "
    with pytest.raises(AlterError, match=f"{told}the source's argument folder"):
        list(Mine("x.csv", folder=str(tmp_path)).rows("train"))
    with pytest.raises(AlterError, match=f"{told}the recipe's key data.root"):
        list(Files("x.csv", folder=str(tmp_path)).rows("train"))
