"""What `nox -s bench` keeps and what it measures anew."""

import json

import pytest


@pytest.fixture
def run(program, monkeypatch, tmp_path):
    module = program("run")
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "PAGE", tmp_path / "performance.md")
    module.PAGE.write_text("<!-- results cpu -->\nbefore\n<!-- end -->\n<!-- machine cpu -->\nbefore\n<!-- end -->\n")
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    return module


def test_rows_are_replaced_by_benchmark_and_machines_by_hardware(run, monkeypatch, tmp_path):
    hardware, calls = ["one"], []

    def measured(program, arguments):
        calls.append([program, *arguments])
        if program == "machine":
            return {"hardware": hardware[0], "copy, GB/s": len(calls)}
        row = {
            "name": " ".join([program, *arguments]),
            "ratio": 1.0,
            "low": 1.0,
            "high": 1.0,
            "target": 1.0,
            "bound": "at most",
        }
        return [{**row, "holds": "bf16" in arguments, "hardware": hardware[0]}]

    monkeypatch.setattr(run, "measured", measured)
    monkeypatch.setattr(
        run.sys, "argv", ["run.py", "--only", "mixed_generation bf16", "mixed_generation", "--rounds", "5"]
    )
    run.main()
    assert ["mixed_generation", "--precision", "bf16", "--rounds", "5"] in calls
    hardware[0] = "other"
    monkeypatch.setattr(run.sys, "argv", ["run.py", "--only", "mixed_generation"])
    run.main()
    rows = json.loads((tmp_path / "results" / "cpu.json").read_text())
    assert [(row["benchmark"], row["hardware"]) for row in rows] == [
        ("mixed_generation", "other"),
        ("mixed_generation bf16", "one"),
    ]
    page = run.PAGE.read_text()
    assert "1 of 2 rows with a target hold it. Measured on other and one" in page
    assert page.count("copy, GB/s") == 2
    assert "before" not in page


def test_what_needs_the_data_is_left_out_without_it(run, monkeypatch):
    monkeypatch.delenv("ALTER_TEST_DATA", raising=False)
    programs = []

    def measured(program, arguments):
        programs.append([program, *arguments])
        return {"hardware": "one"} if program == "machine" else []

    monkeypatch.setattr(run, "measured", measured)
    monkeypatch.setattr(run.subprocess, "run", lambda *args, **kwargs: None)  # the curves of growth
    monkeypatch.setattr(run.sys, "argv", ["run.py"])
    run.main()
    assert ["peers"] in programs
    assert not any("biomedical" in given for given in programs)
