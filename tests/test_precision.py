import pytest
import torch
import yaml

import alter
from alter import precision
from alter.cli import main
from alter.doctor import checks
from alter.precision import answering_precision, check_precision, choose_precision, computes_bf16, slow_precision
from tests.data.conftest import words  # noqa: F401
from tests.runs import make_run
from tests.test_cli import project  # noqa: F401


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Makes this machine one with or without a GPU, and with these flags of its processor."""

    def make(flags, gpu=None):
        file = tmp_path / "cpuinfo"
        if flags is not None:
            file.write_text(f"processor : 0\nmodel name : Some One\nflags\t\t: {flags}\n")
        monkeypatch.setattr(precision, "Path", lambda path: file if path == "/proc/cpuinfo" else type(file)(path))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu or including_emulation)

    return make


def recipe(run="run", accelerator="auto", **stage1):
    return {
        "precision": "auto",
        "run": str(run),
        "trainer": {"accelerator": accelerator},
        "stage1": {"model": {"init_args": stage1}},
        "stage2": {"model": {}},
    }


@pytest.mark.parametrize(
    ("flags", "gpu", "accelerator", "fast"),
    [
        ("fma avx2", None, "auto", False),
        ("avx512f avx512_bf16", None, "auto", True),
        ("amx_bf16 amx_tile", None, "cpu", True),
        ("asimd bf16 i8mm", None, "auto", True),
        ("fma avx2", True, "auto", True),
        ("fma avx2", True, "cpu", False),  # the GPU is there, and not used
        ("avx512_bf16", False, "auto", False),  # a GPU that only emulates it
    ],
)
def test_the_machine_decides_what_auto_is(machine, tmp_path, flags, gpu, accelerator, fast):
    machine(flags, gpu)
    assert computes_bf16(accelerator) is fast
    assert choose_precision(recipe(tmp_path / "new", accelerator)) == ("bf16" if fast else "fp32")
    assert (slow_precision("bf16", accelerator) is None) is fast
    assert slow_precision("fp32", accelerator) is None


def test_where_the_system_does_not_say_auto_is_fp32_and_bf16_is_left_alone(machine, tmp_path):
    machine(None)
    assert choose_precision(recipe(tmp_path / "new")) == "fp32"
    assert slow_precision("bf16") is None
    assert answering_precision("bf16") == "bf16"


def test_the_doctor_has_a_cross_where_bf16_would_crawl(machine, monkeypatch):
    def crosses(asked, accelerator="auto"):
        return [line.topic for line in checks.machine(asked, accelerator) if line.good is False]

    machine("avx2")
    assert crosses("bf16") == ["precision"]
    assert crosses("fp32") == []
    machine("avx512_bf16")
    assert crosses("bf16") == []
    machine("avx2", gpu=True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))
    assert crosses("bf16") == []
    assert crosses("bf16", "cpu") == ["precision"]  # the recipe leaves the GPU out


def test_a_backbone_that_trains_takes_fp32(machine, tmp_path):
    machine("avx512_bf16")
    assert choose_precision(recipe(tmp_path / "new", backbone_lr=1.0)) == "fp32"


def test_what_is_named_stays_and_what_was_begun_goes_on(machine, tmp_path):
    machine("avx512_bf16")
    assert choose_precision({**recipe(tmp_path), "precision": "int8"}) == "int8"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"precision": "fp32"}))
    assert choose_precision(recipe(tmp_path)) == "bf16"  # a start that ended before a checkpoint
    (tmp_path / "stage1" / "checkpoints").mkdir(parents=True)
    assert choose_precision(recipe(tmp_path)) == "fp32"
    (tmp_path / "recipe.yaml").write_text("[no, recipe]")
    assert choose_precision(recipe(tmp_path)) == "bf16"


def test_for_another_machine_auto_stays_open_until_the_run_has_begun_there(machine, tmp_path):
    machine("avx2")
    assert choose_precision(recipe(tmp_path), here=False) == "auto"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"precision": "bf16"}))
    assert choose_precision(recipe(tmp_path), here=False) == "auto"
    (tmp_path / "stage1" / "checkpoints").mkdir(parents=True)
    assert choose_precision(recipe(tmp_path), here=False) == "bf16"


def test_a_name_that_is_none_is_told_with_the_nearest():
    assert check_precision("auto") == check_precision("nf4") == []
    assert check_precision("atuo") == [
        "precision: 'atuo' is not one of auto, fp32, bf16, int8, nf4. Did you mean 'auto'?"
    ]


@pytest.mark.parametrize(("flags", "dtype"), [("avx2", torch.float32), ("avx512_bf16", torch.bfloat16)])
def test_a_run_in_bf16_answers_in_what_is_fast_here(machine, tmp_path, words, flags, dtype):  # noqa: F811
    run = make_run(tmp_path, words)
    file = run / "recipe.yaml"
    file.write_text(file.read_text().replace("precision: fp32", "precision: bf16"))
    machine(flags)
    assert alter.load(run).model.backbone.dtype == dtype
    assert answering_precision("nf4") == "nf4"


@pytest.mark.parametrize("project", ["llama"], indirect=True)
def test_fit_says_what_auto_became_and_goes_on_with_it(machine, project, capsys):  # noqa: F811
    machine("avx2")
    arguments = ["fit", "--config", "recipe.yaml", "--precision", "auto", "--stages", "[stage1]", "--test", "false"]
    main(arguments)
    assert ", fp32\n" in capsys.readouterr().out
    assert yaml.safe_load((project / "run" / "recipe.yaml").read_text())["precision"] == "fp32"
    machine("avx512_bf16")
    main(arguments)  # another machine: the run stays what it was
    assert "stage1: finished before" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*arguments, "--precision", "bf16"])
    assert "differs in precision" in capsys.readouterr().err
