"""What a stage tells while it runs, in a terminal and elsewhere."""

import io
import re

import pytest
from rich.console import Console
from rich.text import Text

from alter.callbacks import progress
from alter.cli import main
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.test_cli import change, project  # noqa: F401 (a fixture)

FLAGS = [
    "--stages",
    "[stage1]",
    "--test",
    "false",
    "--trainer.max_epochs",
    "1",
    "--trainer.enable_progress_bar",
    "true",
]
LINE = (
    r"stage1: step (\d+) of (\d+) \((\d+)%\), \d+\.\d min left, loss \d+\.\d{3} \((.*)\), [\d,]+ tokens/s, \d+\.\d GiB"
)


def test_elsewhere_it_is_plain_lines(project, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    main(["fit", "--config", "recipe.yaml", *FLAGS])
    error = capsys.readouterr().err
    lines = re.findall(LINE, error)
    steps = [int(line[0]) for line in lines]
    assert steps == sorted(steps)
    assert lines[-1][0] == lines[-1][1]
    assert lines[-1][2] == "100"
    assert re.search(r"(echo|sort) \d+\.\d{3}", lines[0][3])
    assert re.search(r"stage1: step \d+, validation loss \d\.\d{3} \(echo \d\.\d{3}, sort \d\.\d{3}\)", error)
    assert "\x1b" not in error  # no control characters


def test_in_a_terminal_it_is_a_bar(project, monkeypatch):  # noqa: F811
    stream = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=stream, force_terminal=True, width=200))
    main(["fit", "--config", "recipe.yaml", *FLAGS])
    text = stream.getvalue()
    assert "━" in text
    assert "stage1" in text
    assert re.search(r"\b(\d+)/\1\b", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text))  # the last step of all
    assert "tokens/s" in text
    assert "left" in text
    assert re.search(r"loss \d+\.\d{3} \(.*echo \d", text)


def test_the_bar_fits_a_terminal_of_80_columns():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80)
    bar = progress.Bar(console)
    losses = f"loss 8.446 ({', '.join(f'a_task_of_long_name_{i} 12.003' for i in range(4))})"
    bar.add_task("stage1", total=12_345, completed=1_234, facts="12,345 tokens/s, 12.3 GiB", losses=losses)
    console.print(bar.get_renderable())
    shown, *below = Text.from_ansi(stream.getvalue()).plain.splitlines()
    assert "stage1" in shown
    assert "━" * 8 in shown
    assert "1234/12345" in shown
    assert "left -:--:--" in shown
    assert "12,345 tokens/s, 12.3 GiB" in shown
    assert all(len(line) <= 80 for line in below)
    assert " ".join(line.strip() for line in below) == losses  # of every task, over as many lines as they need


def test_it_can_be_left_out(project, capsys):  # noqa: F811
    change(project, trainer__enable_progress_bar=False)
    main(["fit", "--config", "recipe.yaml", "--stages", "[stage1]", "--test", "false"])
    assert "tokens/s" not in capsys.readouterr().err


def test_the_bar_ends_where_training_is_stopped(project, capsys, monkeypatch):  # noqa: F811
    from alter.stages import Stage1Module

    def stopped(self, batch, index):
        raise KeyboardInterrupt

    stream = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=stream, force_terminal=True, width=200))
    monkeypatch.setattr(Stage1Module, "training_step", stopped)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "recipe.yaml", *FLAGS])
    assert "stopped; the same command goes on" in capsys.readouterr().err
    hidden, shown = (stream.getvalue().rfind(code) for code in ("\x1b[?25l", "\x1b[?25h"))
    assert shown > hidden >= 0  # the bar hides the cursor while it lives
