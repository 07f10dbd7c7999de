"""The completion scripts in the shells they are for."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios

import pytest

from alter.cli import main
from alter.completion import FOLDER, SHELLS, script

LINES = {  # what is typed, and some of what is offered
    "alter c": {"cp", "compare", "completion"},
    "alter cp m": {"medical"},
    "alter fit --data.temp": {"--data.temperature"},
    "alter doctor --stage2.model.router.hid": {"--stage2.model.router.hidden"},
    "alter fit --stage1.model.schedule ": {"constant", "linear", "cosine"},
    "alter doctor --precision ": {"auto", "fp32", "bf16", "int8", "nf4"},
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


ZSH = """autoload -U compinit; compinit -D; eval "$(cat {script})"
LISTMAX=0; setopt no_list_beep no_beep; bindkey '^I' list-choices; PS1='rea''dy> '
"""


def typed_in_zsh(line, folder):
    """What an interactive zsh shows at a tab behind the line."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(ours, (500, 200))  # else it asks whether to show so many
    env = {"TERM": "xterm", "HOME": str(folder), "PATH": os.environ["PATH"]}
    zsh = subprocess.Popen(["zsh", "-fi"], stdin=its, stdout=its, stderr=its, env=env, start_new_session=True)
    os.close(its)

    def until(told):
        seen = ""
        while told not in seen:
            assert select.select([ours], [], [], 60)[0], seen  # a minute of silence
            seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", os.read(ours, 65536).decode())
        return seen

    try:
        os.write(ours, ZSH.format(script=FOLDER / "alter.zsh").encode())
        until("ready>")  # its editor listens
        os.write(ours, f"{line}\t".encode())
        os.write(ours, b"\x15print do''ne\n")  # the line is forgotten, and the next says that the list is complete
        return until("done")
    finally:
        zsh.kill()
        zsh.wait()
        os.close(ours)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
@pytest.mark.parametrize("line", LINES)
def test_zsh_offers_verbs_flags_and_choices(line, tmp_path):
    assert LINES[line] <= set(typed_in_zsh(line, tmp_path).split())
