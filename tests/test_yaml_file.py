"""A file's values as its author meant them."""

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from alter.data import Task
from alter.errors import AlterError
from alter.yaml_file import read_yaml

LABELS = st.from_regex(re.compile(r"[A-Za-z0-9+~][A-Za-z0-9.:_+-]{0,9}[A-Za-z0-9]"), fullmatch=True)


@given(labels=st.lists(st.one_of(LABELS, st.sampled_from(["true", "yes", "Off", "007", "1.0", "null", "2024-01-02"]))))
def test_choices_are_the_text_that_is_written(tmp_path_factory, labels):
    file = tmp_path_factory.mktemp("yaml") / "t.yaml"
    file.write_text("weight: 1\nflag: yes\nchoices:" + ("".join(f"\n  - {label}" for label in labels) or " []") + "\n")
    assert read_yaml(file) == {"weight": 1, "flag": True, "choices": labels}


def test_a_label_true_finds_its_rows(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\nw1,true\nw2,false\n")
    (tmp_path / "t.yaml").write_text(
        "name: t\nsource: {class_path: alter.data.Files, init_args: {train: rows.csv}}\n"
        "prompt: '{{ text }}'\ntarget: '{{ label }}'\nchoices: [true, false]\n"
    )
    task = Task.from_file(tmp_path / "t.yaml")
    assert task.choices == ["true", "false"]
    assert task.render_target({"label": "true"}) == "true"


def test_a_label_that_is_missing_is_no_text(tmp_path):
    (tmp_path / "t.yaml").write_text("choices:\n  - yes\n  -\n")
    assert read_yaml(tmp_path / "t.yaml") == {"choices": ["yes", None]}


def test_what_is_quoted_stays(tmp_path):
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({"choices": ["yes", "true", "a: b"]}))
    assert read_yaml(tmp_path / "t.yaml") == {"choices": ["yes", "true", "a: b"]}


def test_what_is_not_yaml_is_told_with_its_line(tmp_path):
    (tmp_path / "t.yaml").write_text("a: 1\nb: [\n")
    with pytest.raises(AlterError, match=r"t.yaml, line 3: not valid YAML"):
        read_yaml(tmp_path / "t.yaml")
