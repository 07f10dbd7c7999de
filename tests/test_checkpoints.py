"""Checkpoints that are damaged, cut off, or have no room."""

import errno
import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alter.checkpoints import LAST, PREVIOUS, CheckedCheckpoints, is_whole, last_whole
from alter.cli import main
from alter.errors import AlterError
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.test_cli import change, fit, project, refused  # noqa: F401 (a fixture)

HARM = {
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "one bit": lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
    "longer": lambda content: content + b"x",
}


def write(folder, number):
    CheckedCheckpoints().save_checkpoint(
        {"global_step": number, "optimizer_states": [], "state_dict": {"a": torch.full((300,), number)}},
        folder / LAST,
    )


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_taken(tmp_path, harm):
    for number in range(3):
        write(tmp_path, number)
    assert last_whole(tmp_path, pytest.fail) == tmp_path / LAST
    for file, left in ((LAST, PREVIOUS), (PREVIOUS, None)):
        (tmp_path / file).write_bytes(HARM[harm]((tmp_path / file).read_bytes()))
        told = []
        if left is None:
            with pytest.raises(AlterError, match="every checkpoint is damaged; remove"):
                last_whole(tmp_path, told.append)
        else:
            found = last_whole(tmp_path, told.append)
            assert found == tmp_path / left
            assert torch.load(found, weights_only=True)["global_step"] == 1
        assert any(line.startswith(f"{tmp_path / LAST}: damaged") for line in told)


def test_killed_between_its_renames_the_one_before_is_there(tmp_path, monkeypatch):
    write(tmp_path, 0)
    replace, calls = Path.replace, []

    def killed(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 1)
    monkeypatch.undo()
    found = last_whole(tmp_path, pytest.fail)
    assert torch.load(found, weights_only=True)["global_step"] == 0
    write(tmp_path, 2)
    assert torch.load(last_whole(tmp_path, pytest.fail), weights_only=True)["global_step"] == 2


def test_checkpoints_of_before_there_were_sums_are_judged_by_reading(tmp_path):
    torch.save({"global_step": 1}, tmp_path / LAST)
    assert is_whole(tmp_path / LAST)
    (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:-30])
    assert not is_whole(tmp_path / LAST)
    assert last_whole(tmp_path / "none", pytest.fail) is None
    assert not is_whole(tmp_path / "none.ckpt")


def test_the_newest_is_taken_of_those_that_have_more_than_weights(tmp_path):
    """As callbacks of a user's own may name them."""
    for age, (name, content) in enumerate(
        {"a.ckpt": {"optimizer_states": []}, "b.ckpt": {"optimizer_states": []}, "c.ckpt": {"state_dict": {}}}.items()
    ):
        CheckedCheckpoints().save_checkpoint(content, tmp_path / name)
        os.utime(tmp_path / name, ns=(age, age))
    assert last_whole(tmp_path, pytest.fail) == tmp_path / "b.ckpt"
    for name in "ab":
        (tmp_path / f"{name}.ckpt").unlink()
    assert last_whole(tmp_path, pytest.fail) is None


def test_of_a_copied_folder_the_furthest_is_taken(tmp_path):
    """A copy gives every file its own time."""
    for age, (name, step) in enumerate({"last.ckpt": 20, "best.ckpt": 10}.items()):
        CheckedCheckpoints().save_checkpoint({"optimizer_states": [], "global_step": step}, tmp_path / name)
        os.utime(tmp_path / name, ns=(age, age))
    assert last_whole(tmp_path, pytest.fail) == tmp_path / "last.ckpt"


def test_one_whose_name_holds_a_metric_is_found_in_the_folder_that_its_slash_makes(tmp_path):
    CheckedCheckpoints().save_checkpoint({"optimizer_states": [], "global_step": 5}, tmp_path / "val" / "loss=6.2.ckpt")
    assert last_whole(tmp_path, pytest.fail) == tmp_path / "val" / "loss=6.2.ckpt"


@pytest.fixture
def small_disk(tmp_path):
    """A real disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root alone")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_on_a_full_disk_the_last_checkpoint_stays_and_its_place_is_told(small_disk):
    save = CheckedCheckpoints().save_checkpoint
    save({"global_step": 1, "optimizer_states": [], "state_dict": {"a": torch.zeros(50_000)}}, small_disk / LAST)
    with pytest.raises(AlterError, match=r"the disk is full .* MB free\); free some space and run the same command"):
        save({"global_step": 2, "state_dict": {"a": torch.zeros(300_000)}}, small_disk / LAST)
    assert torch.load(last_whole(small_disk, pytest.fail), weights_only=True)["global_step"] == 1
    assert not list(small_disk.glob(".*.part"))  # room for what is saved next


def test_a_run_on_a_disk_that_fills_stops_and_goes_on_once_there_is_room(project, small_disk, capsys):  # noqa: F811
    change(project, run=str(small_disk / "run"))
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 1_000_000)
    sentences = refused(capsys)
    assert "disk is full" in sentences[0]
    filler.unlink()
    change(project, run="reference")
    main(["fit", "--config", "recipe.yaml"])
    shutil.rmtree(small_disk / "run", ignore_errors=True)
    assert (project / "reference" / "results.json").is_file()


def test_a_run_whose_last_checkpoint_is_damaged_says_so_and_ends_as_if_it_were_not(project, capsys, monkeypatch):  # noqa: F811
    change(project, run="reference")
    flags = ["--stages", "[stage1]", "--test", "false", "--trainer.val_check_interval", "2"]
    main(["fit", "--config", "recipe.yaml", *flags])
    from alter.stages import Stage1Module

    step, stop = Stage1Module.training_step, random.Random(13).randint(6, 9)

    def stopped(self, batch, index):
        if self.global_step == stop:
            raise KeyboardInterrupt
        return step(self, batch, index)

    monkeypatch.setattr(Stage1Module, "training_step", stopped)
    change(project, run="run")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "recipe.yaml", *flags])
    monkeypatch.setattr(Stage1Module, "training_step", step)
    last = project / "run" / "stage1" / "checkpoints" / LAST
    last.write_bytes(last.read_bytes()[:-100])
    capsys.readouterr()
    main(["fit", "--config", "recipe.yaml", *flags])
    out = capsys.readouterr().out
    assert f"run/stage1/checkpoints/{LAST}: damaged" in out
    assert re.search(r"goes on from run/stage1/checkpoints/(previous|best)\.ckpt", out)
    one, other = (load_file(f"{run}/model/adapters.safetensors") for run in ("run", "reference"))
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_another_error_while_writing_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="Input/output"):
        write(tmp_path, 0)


def test_the_seconds_of_a_stage_are_those_of_all_its_starts(project):  # noqa: F811
    flags = ("--test", "false", "--stages", "[stage1]")
    fit(*flags)
    stage = project / "run" / "stage1"
    last = torch.load(stage / "checkpoints" / LAST, weights_only=True)
    assert 0 < last["callbacks"]["Throughput"]["elapsed"] < 500
    last["callbacks"]["Throughput"]["elapsed"] = 5000.0
    CheckedCheckpoints().save_checkpoint(last, stage / "checkpoints" / LAST)
    (project / "run" / "progress.json").unlink()
    shutil.rmtree(stage / "model")
    fit(*flags)
    assert 5000 < json.loads((project / "run" / "progress.json").read_text())["stage1"]["seconds"] < 5500
