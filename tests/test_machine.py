"""How much memory was taken."""

import subprocess
import sys

import pytest

from alter import machine
from alter.machine import RANKS, is_first, peak_device_memory_bytes, peak_memory_bytes


def peak_of(code):
    code = f"from alter.machine import peak_memory_bytes\n{code}\nprint(peak_memory_bytes())"
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def test_peak_memory_is_a_mark_that_stays():
    small = peak_of("")
    large = peak_of("x = b'1' * 300_000_000; del x")
    assert 5_000_000 < small < 1_000_000_000
    assert 250_000_000 < large - small < 400_000_000
    assert peak_memory_bytes() > 5_000_000


def test_peak_memory_without_proc(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(machine.Path, "read_text", missing)
    assert 5_000_000 < peak_memory_bytes() < 100_000_000_000


def test_no_device_memory_without_cuda(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert peak_device_memory_bytes() is None


@pytest.mark.parametrize(
    ("set_by_its_starter", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, True),
        ({"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, True),
        ({"RANK": "1", "LOCAL_RANK": "1", "GROUP_RANK": "0"}, False),
        ({"RANK": "2", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),  # of a node whose other processes Lightning has yet to start
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, False),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, True),
        ({"SLURM_PROCID": "1", "SLURM_LOCALID": "0"}, False),
        ({"OMPI_COMM_WORLD_RANK": "3"}, False),
        ({"JSM_NAMESPACE_RANK": "1"}, False),  # LSF's
    ],
)
def test_the_first_of_several_processes_is_one_over_all_nodes(set_by_its_starter, first, monkeypatch):
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in set_by_its_starter.items():
        monkeypatch.setenv(name, value)
    assert is_first() is first


def test_importing_these_modules_brings_in_nothing_slow():
    code = (
        "import sys, alter.metrics, alter.references, alter.results\n"
        "assert not {'torch', 'sklearn', 'scipy', 'torchmetrics'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("named", "count", "gpus"),
    [(None, 2, ["0", "1"]), ("", 0, []), ("3,1", 2, ["3", "1"]), ("GPU-a", 1, ["GPU-a"]), ("0,9", 1, ["0"])],
)
def test_gpus_are_called_as_their_variable_calls_them(monkeypatch, named, count, gpus):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    if named is None:
        monkeypatch.delenv(machine.GPUS, raising=False)
    else:
        monkeypatch.setenv(machine.GPUS, named)
    assert machine.visible_gpus() == gpus
