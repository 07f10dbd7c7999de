"""What the benchmarks' rows say of how they were measured."""

import pytest


@pytest.fixture
def common(program, monkeypatch):
    for variable in ("ALTER_BENCH_T5", "ALTER_TEST_DATA"):
        monkeypatch.delenv(variable, raising=False)
    return program("common")


def test_a_row_tells_its_arguments_without_the_places_of_this_machine(common, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    given = [
        "/x/benchmarks/peers.py",
        "--rounds",
        "2",
        "--data=data",
        "--t5",
        "/y/t5",
        "--layers",
        "last:2",
        "--out",
        "a.json",
    ]
    monkeypatch.setattr(common.sys, "argv", given)
    found = common.row("x", [1.0], None)["command"]
    assert found == "python benchmarks/peers.py --rounds 2 --data FOLDER --t5 FOLDER --layers last:2"


def test_a_row_tells_what_the_environment_adds(common, monkeypatch):
    monkeypatch.setenv("ALTER_TEST_DATA", "/x/data")
    assert common.command(["serve.py", "--minutes", "0"]) == "python benchmarks/serve.py --minutes 0 --data FOLDER"
    assert common.command(["x.py", "--smollm2", "owner/model", "--data=a=b"]).endswith(
        "x.py --smollm2 owner/model --data a=b"
    )
    assert common.command(["serve.py", "--data", "/z"]) == "python benchmarks/serve.py --data FOLDER"
