"""What the machine is asked, on machines of other kinds."""

import pytest

from alter import hardware
from alter.doctor import checks

FLAGS = {
    "flags\t\t: fpu sse4_2 avx2 avx512f\n": False,
    "flags\t\t: fpu avx512f avx512_bf16 amx_tile\n": True,
    "flags\t\t: fpu amx_bf16\n": True,
    "Features\t: fp asimd i8mm bf16 dgh\n": True,  # ARM
}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "CPU", tmp_path / "cpuinfo")
    monkeypatch.setattr(hardware, "NVIDIA", tmp_path / "nvidia")
    return tmp_path


@pytest.mark.parametrize("flags", FLAGS)
def test_bf16_is_told_from_the_processor_or_its_card(flags, machine):
    assert hardware.computes_bf16() is None
    (machine / "cpuinfo").write_text(flags)
    assert hardware.computes_bf16() is FLAGS[flags]
    (machine / "nvidia").write_text("")
    assert hardware.computes_bf16() is True


def test_the_doctor_has_a_cross_where_bf16_would_crawl(machine):
    def crosses(precision):
        return [line.topic for line in checks.machine(precision) if line.good is False]

    assert crosses("bf16") == []
    (machine / "cpuinfo").write_text("flags : fpu avx2\n")
    assert crosses("bf16") == ["precision"]
    assert crosses("fp32") == []
