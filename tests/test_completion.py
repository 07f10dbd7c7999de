"""The completion scripts in the shells they are for."""

import shutil
import subprocess
import sys

import pytest

from alter.cli import main
from alter.completion import FOLDER, SHELLS, script

LINES = {  # what is typed, and some of what is offered
    "alter c": {"cp", "compare", "completion"},
    "alter cp m": {"medical"},
    "alter fit --data.temp": {"--data.temperature"},
    "alter doctor --stage2.model.router.hid": {"--stage2.model.router.hidden"},
    "alter fit --stage1.model.schedule ": {"constant", "linear", "cosine"},
}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_that_ships_is_what_the_parsers_give_and_small(shell):
    pytest.importorskip("shtab", reason='needs pip install "alter-mta[dev]"')
    # In a process of its own: classes that other tests define have flags too.
    code = f"from alter.completion import generate; print(generate({shell!r}), end='')"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert made == script(shell), "the flags have changed: run python -m alter.completion"
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 1_000_000


def test_the_verb_prints_it(capsys):
    main(["completion", "zsh"])
    assert capsys.readouterr().out == script("zsh") + "\n"


BASH = """source "$1"
line="$2"; read -ra COMP_WORDS <<< "$line"; [[ $line == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _shtab_alter; printf '%s\\n' "${COMPREPLY[@]}" """


@pytest.mark.parametrize("line", LINES)
def test_bash_offers_verbs_flags_and_choices(line):
    done = subprocess.run(
        ["bash", "-c", BASH, "bash", FOLDER / "alter.bash", line], capture_output=True, text=True, check=True
    )
    assert LINES[line] <= set(done.stdout.split())


@pytest.mark.parametrize("line", LINES)
@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish")
def test_fish_offers_verbs_flags_and_choices(line):
    code = f"source {FOLDER / 'alter.fish'}; complete -C '{line}'"
    done = subprocess.run(["fish", "-c", code], capture_output=True, text=True, check=True)
    assert LINES[line] <= {offered.split("\t")[0] for offered in done.stdout.splitlines()}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_zsh_takes_the_script():
    done = subprocess.run(["zsh", "-n", FOLDER / "alter.zsh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    start = subprocess.run(
        [
            "zsh",
            "-fc",
            f'autoload -U compinit; compinit -D; eval "$(cat {FOLDER / "alter.zsh"})"; print $_comps[alter]',
        ],
        capture_output=True,
        text=True,
    )
    assert start.stdout.strip() == "_shtab_alter", start.stderr
