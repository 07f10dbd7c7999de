import csv
import json
import zipfile

import numpy as np
import openpyxl
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from alter.data.files import is_missing, read_file
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
def test_empty_rows_between_others_keep_their_places_where_asked(tmp_path, name):
    nothing = {"text": "", "label": ""}
    rows = [nothing, {"text": "a", "label": "1"}, nothing, nothing, {"text": "b", "label": "2"}, nothing]
    file = write(tmp_path / name, rows)
    assert list(read_file(file, holes=True)) == rows[:-1]
    assert list(read_file(file)) == [rows[1], rows[4]]


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


@pytest.mark.parametrize("name", ["x.csv", "x.xlsx"])
def test_a_text_beside_the_named_columns_is_told(tmp_path, name):
    file = write(tmp_path / name, [{"text": "a", "label": "b", "": None}, {"text": "c", "label": "d", "": "lost?"}])
    with pytest.raises(
        AlterError, match=rf"{name}, (row|line) 3: a text in a column without a name; write one into the"
    ):
        list(read_file(file))


def test_parquet_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.Table.from_arrays([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(AlterError, match=r"x\.parquet: every column needs a name of its own"):
        list(read_file(tmp_path / "x.parquet"))


@pytest.mark.parametrize("compression", ["snappy", "zstd", "gzip"])
def test_a_parquet_page_that_cannot_be_unpacked_is_told(tmp_path, compression):
    file, texts = tmp_path / "x.parquet", [f"text {n * n % 977}" for n in range(3000)]
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, file, compression=compression, use_dictionary=False)
    content = bytearray(file.read_bytes())
    content[60:1000] = bytes(940)
    file.write_bytes(content)
    with pytest.raises(AlterError, match=r"x\.parquet: not readable as Parquet \(.+\); write the file again"):
        list(read_file(file))


def test_a_sheet_that_is_cut_short_is_told(tmp_path):
    file = write(tmp_path / "x.xlsx", [{"text": f"w{i}", "label": "a"} for i in range(300)])
    with zipfile.ZipFile(file) as book:
        parts = {name: book.read(name) for name in book.namelist()}
    with zipfile.ZipFile(file, "w") as book:
        for name, content in parts.items():
            book.writestr(name, content[: len(content) // 2] if "sheet1" in name else content)
    with pytest.raises(AlterError, match=r"x\.xlsx: not readable as Excel \(.+\); save it again"):
        list(read_file(file))


def test_a_sheet_without_names_or_a_file_that_is_none_is_refused(tmp_path):
    twice = tmp_path / "x.xlsx"
    (book := openpyxl.Workbook()).active.append(["a", "a"])
    book.save(twice)
    with pytest.raises(AlterError, match="name of its own"):
        list(read_file(twice))
    twice.write_text("a,b")
    with pytest.raises(AlterError, match="not readable as Excel"):
        list(read_file(twice))


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


@pytest.mark.parametrize(
    "content",
    [
        "sep=;\ntext;label\na, b;yes\n",  # as Excel is told
        "SEP=|\r\ntext|label\r\na, b|yes\r\n",
        "text;label;\na, b;yes;\n",  # a separator behind each line
        "text;label;;\na, b;yes\n;;;\n\n;\n",  # and lines of separators
    ],
)
def test_what_programs_write_around_a_table_is_no_part_of_it(tmp_path, content):
    (tmp_path / "x.csv").write_text(content, newline="")
    assert list(read_file(tmp_path / "x.csv")) == [{"text": "a, b", "label": "yes"}]


def test_an_empty_text_of_a_single_column_is_a_row(tmp_path):
    """As pandas writes it; ``alter predict`` answers by place."""
    (tmp_path / "x.csv").write_text('text\nx\n""\ny\n')
    assert [row["text"] for row in read_file(tmp_path / "x.csv")] == ["x", "", "y"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(("name", "content"), [("x.csv", "text,label\na,b\n"), ("x.jsonl", '{"text": "a"}\n')])
def test_utf_16_without_its_mark_is_told_as_what_it_is(tmp_path, name, content, encoding):
    (tmp_path / name).write_bytes(content.encode(encoding))
    with pytest.raises(
        AlterError, match=rf"{name}, line 1: it has NUL characters, as UTF-16 has; save the file as UTF-8"
    ):
        list(read_file(tmp_path / name))


def test_the_line_that_is_not_utf8_is_named_in_a_large_file_too(tmp_path):
    lines = [f"text {n},a" for n in range(20_000)]
    lines[12_345] = "Ärger,b"
    (tmp_path / "x.csv").write_bytes("\n".join(["text,label", *lines]).encode("latin-1"))
    with pytest.raises(AlterError, match=r"x\.csv, line 12347: not UTF-8; save"):
        list(read_file(tmp_path / "x.csv"))


def test_json_lines_may_start_with_a_byte_order_mark_and_a_text_may_be_long(tmp_path):
    (tmp_path / "x.jsonl").write_text('\ufeff{"text": "a"}\n', encoding="utf-8")
    assert list(read_file(tmp_path / "x.jsonl")) == [{"text": "a"}]
    (tmp_path / "x.csv").write_text(f"text,label\n{'a ' * 100_000},b\n")
    assert [len(row["text"]) for row in read_file(tmp_path / "x.csv")] == [200_000]


def test_half_a_character_in_json_is_a_question_mark(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a\\ud83d": ["b\\uD83D", "\\ud83d\\ude00", "\\\\ud83d"]}\n')
    assert list(read_file(tmp_path / "x.jsonl")) == [{"a?": ["b?", "\U0001f600", "\\ud83d"]}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, r"no such file.*Did you mean 'missin.csv'"),
        ("x.ods", b"", r"ending is not one of \.jsonl, \.json, \.csv"),
        ("x.jsonl", b'{"a": 1}\n{"a": \n', r"x.jsonl, line 2: not JSON"),
        ("x.jsonl", b'{"a": 1}\n[1]\n', r"line 2: not an object"),
        ("x.csv", b"a,b\n1,2\n1\n", r"line 3: not as many fields"),
        ("x.csv", b"a,b,\n1,2,\n1,2,3\n", r"line 3: a text in a column without a name"),
        ("x", None, r"/x: no such file"),
        (".", None, r"a folder; name the files in it"),
        ("x.csv", b'a,b\n1,"2\n', r"x.csv, line 2: not valid CSV"),
        ("x.csv", b'a,b\n1,2\n3,"4"5\n', r"x.csv, line 3: not valid CSV"),
        ("x.csv", b'a,b\n1,2\n,\n,\n3,"4"5\n', r"x.csv, line 5: not valid CSV"),
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


def test_json_is_streamed(tmp_path):
    file = tmp_path / "x.jsonl"
    with file.open("w") as stream:
        stream.write(json.dumps({"a": 1}) + "\n")
        stream.write("broken")
    assert next(read_file(file)) == {"a": 1}  # the first row comes before the last is read


@pytest.mark.parametrize("value", [None, float("nan"), np.float32("nan"), pandas.NA, pandas.NaT])
def test_there_is_no_value(value):
    assert is_missing(value)


@pytest.mark.parametrize("value", [0, 0.0, False, "", "nan", 10**400, np.float32(1), [None], {}, b""])
def test_there_is_a_value(value):
    assert not is_missing(value)
