"""`alter runs` and `alter diff` over run folders as `alter fit` leaves them."""

import json
import re

import pytest
import yaml

from alter.cli import main


def write_run(folder, rank=16, scores=None, tasks=("a", "b"), stages=("stage1", "stage2"), **task):
    """A run folder; scores is {task: value of its first metric}, None for a run without results."""
    folder.mkdir(parents=True)
    recipe = {
        "run": str(folder),
        "data": {"tasks": [{"name": name, "prompt": "x", "where": str(folder), **task} for name in tasks]},
        "stage1": {"model": {"init_args": {"expert": {"init_args": {"rank": rank}}}}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "env.txt").write_text("")
    record = {"seconds": 60, "trainable_parameters": 1234, "peak_memory_bytes": 2**31}
    (folder / "progress.json").write_text(json.dumps(dict.fromkeys(stages, record)))
    if scores is not None:
        measured = {
            name: {
                "accuracy": {"value": v, "low": v - 0.05, "high": v + 0.05},
                "macro_f1": {"value": 0.1, "low": 0.0, "high": 0.2},
            }
            for name, v in scores.items()
        }
        results = {"tasks": measured, "seconds": {"test": 60}, "peak_memory_bytes": 3 * 2**30}
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_runs_are_told_best_first_and_the_unfinished_last(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "low", scores={"a": 0.2, "b": 0.4})
    write_run(tmp_path / "begun", stages=["stage1"])
    write_run(tmp_path / "deep" / "high", scores={"a": 0.6, "b": 0.8})
    main(["runs", "."])
    head, *lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert head.split() == ["run", "state", "mean", "tasks", "minutes", "trained", "memory", "when"]
    cells = [line.split() for line in lines]
    assert [line[0] for line in cells] == ["deep/high", "low", "begun"]
    assert cells[0][1:8] == ["tested", "0.700", "2", "3.0", "1,234", "3.0", "GiB"]
    assert cells[1][2] == "0.300"
    assert cells[2][1:4] == ["stage1", "done", "-"]
    monkeypatch.setenv("COLUMNS", "60")
    main(["runs", "."])
    narrow = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert narrow[0].split() == ["run", "state", "mean", "tasks", "minutes", "trained"]
    assert max(map(len, narrow)) <= 60


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "{}",
        "[1]",
        '{"tasks": {"a": {}}}',
        '{"tasks": {"a": {"accuracy": {}}}}',
        '{"tasks": {}, "seconds": {}}',
        '{"tasks": {"a": {"accuracy": {"value": 0.5}}}, "seconds": {"test": 1.0}}',
    ],
)
def test_a_damaged_run_is_left_out_with_a_line(damage, tmp_path, capsys):
    write_run(tmp_path / "whole", scores={"a": 0.2, "b": 0.4})
    bad = write_run(tmp_path / "bad", scores={"a": 0.6, "b": 0.8})
    (bad / "results.json").write_text(damage)
    main(["runs", str(tmp_path)])
    table, below = capsys.readouterr().out.split("\n\n")
    assert "whole" in table
    assert "bad" not in table
    (line,) = [line for line in below.splitlines() if line.startswith("left out: ")]
    assert line.startswith(f"left out: {bad}: a file of this run is damaged (")
    (tmp_path / "whole" / "results.json").write_text(damage)
    with pytest.raises(SystemExit):
        main(["runs", str(tmp_path)])
    assert capsys.readouterr().err.count("a file of this run is damaged") == 2


@pytest.mark.parametrize("record", [{"peak_memory_bytes": None}, {"trainable_parameters": "many"}])
def test_a_run_with_a_damaged_record_is_left_out_with_a_line(record, tmp_path, capsys):
    write_run(tmp_path / "whole", scores={"a": 0.2, "b": 0.4})
    bad = write_run(tmp_path / "bad", scores={"a": 0.6, "b": 0.8})
    (bad / "progress.json").write_text(json.dumps({"stage1": {"seconds": 1.0, **record}}))
    main(["runs", str(tmp_path)])
    assert f"left out: {bad}: a file of this run is damaged (" in capsys.readouterr().out


def test_a_run_with_a_damaged_recipe_is_left_out_with_a_line(tmp_path, capsys):
    write_run(tmp_path / "whole", scores={"a": 0.2, "b": 0.4})
    (write_run(tmp_path / "bad") / "recipe.yaml").write_text("run: bad\n")
    main(["runs", str(tmp_path)])
    assert f"left out: {tmp_path / 'bad'}: a file of this run is damaged (" in capsys.readouterr().out


def test_means_over_different_tasks_are_said_not_to_compare(tmp_path, capsys):
    write_run(tmp_path / "one", scores={"a": 0.2})
    write_run(tmp_path / "other", scores={"a": 0.2})
    main(["runs", str(tmp_path)])
    assert "do not compare" not in capsys.readouterr().out
    write_run(tmp_path / "third", scores={"b": 0.4})
    main(["runs", str(tmp_path)])
    assert "do not compare" in capsys.readouterr().out


def test_diff_tells_the_lines_and_metrics_that_change_and_no_others(tmp_path, capsys):
    one = write_run(tmp_path / "one", scores={"a": 0.2, "b": 0.4})
    other = write_run(tmp_path / "other", rank=4, scores={"a": 0.6, "c": 0.41}, tasks=("a", "c"), prompt="y\n" * 90)
    main(["diff", str(one), str(other)])
    recipe, metrics = capsys.readouterr().out.split("\n\n")
    lines = {line.split()[0]: line.split()[1:] for line in recipe.splitlines()[1:]}
    assert lines["stage1.model.init_args.expert.init_args.rank"] == ["16", "4"]
    assert lines["data.tasks.b.prompt"] == ["x", "-"]
    assert lines["data.tasks.a.prompt"][-1].endswith("...")
    assert max(map(len, recipe.splitlines())) <= 110
    assert set(lines) == {"stage1.model.init_args.expert.init_args.rank", *(f"data.tasks.{t}.prompt" for t in "abc")}
    changes = {line[:10].strip(): line for line in metrics.splitlines()}
    assert changes["a accuracy"].endswith("+0.400  intervals apart")
    assert changes["a macro_f1"].rstrip().endswith("+0.000")
    assert changes["b accuracy"].rstrip().endswith("-")


def test_diff_shows_where_two_long_values_part_in_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    same = "a long beginning that both prompts have " * 5
    one = write_run(tmp_path / "one", scores={"a": 0.2}, tasks=["a"], prompt=f"{same}this")
    other = write_run(tmp_path / "other", scores={"a": 0.6}, tasks=["a"], prompt=f"{same}that and {same}")
    main(["diff", str(one), str(other)])
    recipe, metrics = capsys.readouterr().out.split("\n\n")
    (line,) = recipe.splitlines()[1:]
    assert re.fullmatch(r"data.tasks.a.prompt +\.\.\..*this +\.\.\..*that and .*\.\.\.", line)
    assert max(map(len, [line, *metrics.splitlines()])) <= 80
    assert "+0.400" in metrics


def test_runs_without_results_and_folders_without_runs_are_told(tmp_path, capsys):
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", scores={"a": 0.5})
    main(["diff", str(one), str(other)])
    out = capsys.readouterr().out
    assert "The recipes are the same" in out
    assert f"{one}: no results yet" in out
    (tmp_path / "empty").mkdir()
    (one / "progress.json").write_text("{")
    for arguments, sentence in (
        (["runs", str(tmp_path / "empty")], "no run here or below"),
        (["diff", str(tmp_path), str(one)], "no run here, recipe.yaml is missing"),
        (["diff", str(one), str(other)], "a file of this run is damaged"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert sentence in capsys.readouterr().err
