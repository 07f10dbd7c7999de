"""Files and folders that are whole or not there."""

import copy
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alter import writing
from alter.errors import AlterError
from alter.writing import made_whole, write_json


def test_write_json_round_trips_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "runs" / "results.json"
    write_json(path, {"a": 1})
    write_json(path, {"π": np.float32(0.5), "n": np.int64(3), "xs": (np.nan, float("inf"), [None]), "r": np.arange(2)})
    assert json.loads(path.read_text(encoding="utf-8")) == {"π": 0.5, "n": 3, "xs": [None, None, [None]], "r": [0, 1]}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_write_json_is_always_strict_json(tmp_path_factory, obj):
    path = tmp_path_factory.getbasetemp() / "any.json"
    before = copy.deepcopy(obj)
    write_json(path, obj)

    def refuse(name):
        raise AssertionError(name)

    json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert repr(obj) == repr(before)


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"old": True})

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(AlterError, match=r"results\.json: No space left"):
        write_json(path, {"new": True})
    assert json.loads(path.read_text()) == {"old": True}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_the_place_of_the_folder_is_said(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(AlterError, match=r"Could not write .*results\.json"):
        write_json(tmp_path / "runs" / "results.json", {})


def test_a_folder_is_there_once_it_is_complete_or_not_at_all(tmp_path):
    folder = tmp_path / "new" / "out" / "made"
    with pytest.raises(ValueError, match="stopped"), made_whole(folder) as beside:  # noqa: PT012 (it fails half way)
        (beside / "half").write_text("x")
        raise ValueError("stopped")
    assert not list(tmp_path.iterdir())
    with made_whole(folder) as beside:
        (beside / "whole").write_text("x")
        assert not folder.exists()
    assert [file.name for file in folder.iterdir()] == ["whole"]
    with pytest.raises(AlterError, match="already there and not empty"), made_whole(folder):
        pass
    assert [file.name for file in folder.parent.iterdir()] == ["made"]


def test_the_folder_one_is_in_may_be_written_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(AlterError, match="already there and not empty"), made_whole(Path(".")):
        pass
    (tmp_path / "file").unlink()
    with made_whole(Path(".")) as beside:
        (beside / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
