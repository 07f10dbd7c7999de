import csv
import json
import zipfile

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alter.data import Files
from alter.data.sources import Function, read_file
from alter.errors import AlterError
from tests.data.conftest import write_jsonl

ROWS = [{"text": 'a "quoted", text', "label": "1"}, {"text": "zwei\nZeilen", "label": "ü"}]


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".xlsx":
        sheet = (book := openpyxl.Workbook()).active
        for line in (list(rows[0]), *(list(row.values()) for row in rows)):
            sheet.append(line)
        book.save(path)
    elif path.suffix == ".jsonl":
        write_jsonl(path, rows)
    else:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet", "xlsx"])
def test_every_format_gives_the_same_rows(tmp_path, ending):
    assert list(read_file(write(tmp_path / f"x.{ending}", ROWS))) == ROWS


def test_a_sheet_keeps_numbers_and_skips_what_is_empty(tmp_path):
    rows = [{"text": "a", "stars": 5, "": None}, {"text": None, "stars": None}, {"text": "b", "stars": None}]
    file = write(tmp_path / "x.xlsx", rows)
    assert list(read_file(file)) == [{"text": "a", "stars": 5}, {"text": "b", "stars": ""}]


@pytest.mark.parametrize("name", ["x.csv", "x.xlsx"])
def test_empty_lines_before_the_names_are_passed_over(tmp_path, name):
    rows = [{"text": "a; b", "label": "x"}, {"text": "c", "label": "y"}]
    if name == "x.csv":
        (tmp_path / name).write_text('\n\ntext;label\n"a; b";x\nc;y\n')
    else:
        (book := openpyxl.Workbook()).active.append([None, None])
        for line in (["text", "label"], ["a; b", "x"], ["c", "y"]):
            book.active.append(line)
        book.save(tmp_path / name)
    assert list(read_file(tmp_path / name)) == rows


def test_parquet_bytes_are_texts_where_they_can_be(tmp_path):
    rows = [{"text": "ä".encode(), "picture": b"\xff\x00", "label": "x"}, {"text": None, "picture": b"a", "label": "y"}]
    found = list(read_file(write(tmp_path / "x.parquet", rows)))
    assert found == [
        {**rows[0], "text": "ä"},
        {**rows[1], "picture": "a"},
    ]  # each by itself, whatever else is in the file


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


def test_a_sheet_is_read_whole_whatever_size_the_file_tells(tmp_path):
    """Some programs write that it is one cell."""
    file = write(tmp_path / "x.xlsx", [{"text": f"w{i}", "label": "a"} for i in range(30)])
    with zipfile.ZipFile(file) as book:
        parts = {name: book.read(name) for name in book.namelist()}
    sheet = "xl/worksheets/sheet1.xml"
    assert b'<dimension ref="A1:B31"' in parts[sheet]
    parts[sheet] = parts[sheet].replace(b'<dimension ref="A1:B31"', b'<dimension ref="A1"')
    with zipfile.ZipFile(file, "w") as book:
        for name, content in parts.items():
            book.writestr(name, content)
    assert [row["text"] for row in read_file(file)] == [f"w{i}" for i in range(30)]


def test_a_sheet_without_names_or_a_file_that_is_none_is_refused(tmp_path):
    twice = tmp_path / "x.xlsx"
    (book := openpyxl.Workbook()).active.append(["a", "a"])
    book.save(twice)
    with pytest.raises(AlterError, match="name of its own"):
        list(read_file(twice))
    twice.write_text("a,b")
    with pytest.raises(AlterError, match="not readable as Excel"):
        list(read_file(twice))


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


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_table_says_itself_what_stands_between_its_columns(tmp_path, separator, mark):
    lines = [["text", '"a, b; c"', "label"], ['"one, two; three"', "x", "ja"]]
    text = mark + "".join(f"{separator.join(cells)}\n" for cells in lines)
    (tmp_path / "x.csv").write_text(text, encoding="utf-8")
    assert list(read_file(tmp_path / "x.csv")) == [{"text": "one, two; three", "a, b; c": "x", "label": "ja"}]


def test_a_comma_in_a_name_does_not_outvote_a_semicolon(tmp_path):
    (tmp_path / "x.csv").write_text("text;label, coarse\na, b;yes\n")
    assert list(read_file(tmp_path / "x.csv")) == [{"text": "a, b", "label, coarse": "yes"}]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_name_may_have_several_lines(tmp_path, separator):
    (tmp_path / "x.csv").write_text(f'"a long\nname"{separator}label\nx{separator}y\n')
    assert list(read_file(tmp_path / "x.csv")) == [{"a long\nname": "x", "label": "y"}]


@pytest.mark.parametrize(
    ("name", "content", "row"),
    [
        ("x.csv", "text\nhello; world\n", {"text": "hello; world"}),
        ("x.tsv", "text\na; b, c\n", {"text": "a; b, c"}),
        ("x.tsv", "name, first, last\tlabel\nx\ty\n", {"name, first, last": "x", "label": "y"}),
        ("x.tsv", "text,label\nx,y\n", {"text": "x", "label": "y"}),  # not a TSV, but for its name
    ],
)
def test_the_ending_says_what_the_header_does_not(tmp_path, name, content, row):
    (tmp_path / name).write_text(content)
    assert list(read_file(tmp_path / name)) == [row]


def test_the_line_that_is_not_utf8_is_named_in_a_large_file_too(tmp_path):
    lines = [f"text {n},a" for n in range(20_000)]
    lines[12_345] = "Ärger,b"
    (tmp_path / "x.csv").write_bytes("\n".join(["text,label", *lines]).encode("latin-1"))
    with pytest.raises(AlterError, match=r"x\.csv, line 12347: not UTF-8; save"):
        list(read_file(tmp_path / "x.csv"))


@pytest.mark.parametrize(
    "shares", [(40, 0.1), (0.1, 1.5), (0.9, 0.9), (0.5, 0.5), (0.0, 0.1), (-0.1, 0.1), (True, 0.1), (float("nan"), 0.1)]
)
def test_shares_that_leave_a_split_nothing_are_refused(tmp_path, shares):
    with pytest.raises(
        AlterError, match=r"x\.csv: the source sets aside validation .* and test .*; give shares such as 0\.1"
    ):
        Files("x.csv", *shares)


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


def test_json_lines_may_start_with_a_byte_order_mark_and_a_text_may_be_long(tmp_path):
    (tmp_path / "x.jsonl").write_text('\ufeff{"text": "a"}\n', encoding="utf-8")
    assert list(read_file(tmp_path / "x.jsonl")) == [{"text": "a"}]
    (tmp_path / "x.csv").write_text(f"text,label\n{'a ' * 100_000},b\n")
    assert [len(row["text"]) for row in read_file(tmp_path / "x.csv")] == [200_000]


def test_half_a_character_in_json_is_a_question_mark(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a\\ud83d": ["b\\uD83D", "\\ud83d\\ude00", "\\\\ud83d"]}\n')
    assert list(read_file(tmp_path / "x.jsonl")) == [{"a?": ["b?", "\U0001f600", "\\ud83d"]}]


def test_rows_of_a_drawn_split_keep_their_numbers_in_the_file(tmp_path):
    rows = [{"n": str(n)} for n in range(1, 41)]
    source = Files(str(write(tmp_path / "x.jsonl", rows)), validation=0.3, test=0.3)
    for split in ("train", "validation", "test"):
        numbered = list(source.numbered(split))
        assert [row for _, row in numbered] == list(source.rows(split))
        assert all(row == rows[number - 1] for number, row in numbered)
        assert len(numbered) > 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, r"no such file.*Did you mean 'missin.csv'"),
        ("x.ods", b"", r"ending is not one of \.jsonl, \.json, \.csv"),
        ("x.jsonl", b'{"a": 1}\n{"a": \n', r"x.jsonl, line 2: not JSON"),
        ("x.jsonl", b'{"a": 1}\n[1]\n', r"line 2: not an object"),
        ("x.csv", b"a,b\n1,2\n1\n", r"line 3: not as many fields"),
        ("x", None, r"/x: no such file"),
        (".", None, r"a folder; name the files in it"),
        ("x.csv", b'a,b\n1,"2\n', r"x.csv, line 2: not valid CSV"),
        ("x.csv", b'a,b\n1,2\n3,"4"5\n', r"x.csv, line 3: not valid CSV"),
        ("x.csv", b"a,b,a\n1,2,3\n", r"x.csv, line 1: every column needs a name of its own"),
        ("x.csv", b"a,,b\n1,2,3\n", r"x.csv, line 1: every column needs a name of its own"),
        ("x.parquet", b"PAR1 is not enough", r"not readable as Parquet"),
        ("x.jsonl", b'{"a": "\xff"}\n', r"not UTF-8"),
    ],
)
def test_a_bad_file_is_one_sentence_with_the_place_and_the_remedy(tmp_path, name, content, message):
    (tmp_path / "missin.csv").write_text("a\n")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(AlterError, match=message):
        list(read_file(tmp_path / name))


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


def test_json_is_streamed(tmp_path):
    file = tmp_path / "x.jsonl"
    with file.open("w") as stream:
        stream.write(json.dumps({"a": 1}) + "\n")
        stream.write("broken")
    assert next(read_file(file)) == {"a": 1}  # the first row comes before the last is read
