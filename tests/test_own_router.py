"""The example of docs/own_router.md, with just its files, in a folder outside the package."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import alter
from alter.cli import main
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.test_cli import project, refused  # noqa: F401 (a fixture)

DOCS = Path(__file__).parents[1] / "docs"
EXPERT = [DOCS / "examples" / name for name in ("my_expert.py", "own_expert.yaml")]
FILES = [DOCS / "examples" / name for name in ("my_router.py", "own_router.yaml")]


def test_the_example_is_short_and_its_page_names_its_files():
    assert all(len(file.read_text().splitlines()) <= 40 for file in (*FILES, *EXPERT))
    page = (DOCS / "own_router.md").read_text()
    assert all(f"examples/{file.name}" in page for file in (*FILES, *EXPERT))
    assert set(re.findall(r"--import (\w+)", page)) == {"my_router", "my_expert"}


@pytest.mark.parametrize("project", ["llama", "t5"], indirect=True)
def test_the_example_trains_tests_and_predicts(project, capsys, monkeypatch):  # noqa: F811
    for file in FILES:
        shutil.copy(file, project)
    main(["fit", "--config", "recipe.yaml", "--config", "own_router.yaml", "--test", "false"])
    described = json.loads((project / "run" / "model" / "alter.json").read_text())["parts"]["router"]
    assert described == {"class_path": "my_router.CosineRouter", "init_args": {"temperature": 0.5}}

    checkpoint = torch.load(project / "run" / "stage1" / "checkpoints" / "last.ckpt", weights_only=True)
    prior = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
    biases = [value for key, value in checkpoint["state_dict"].items() if key.endswith("router.bias")]
    assert biases
    assert not any(torch.allclose(bias, prior, atol=1e-4) for bias in biases)
    keys = [value for key, value in checkpoint["state_dict"].items() if key.endswith("router.keys")]
    optimizer = checkpoint["optimizer_states"][0]
    moved = {tuple(state["exp_avg_sq"].shape) for state in optimizer["state"].values() if state["exp_avg_sq"].any()}
    assert {tuple(key.shape) for key in keys} <= moved

    monkeypatch.delitem(sys.modules, "my_router")  # as in a new process
    (project / "rows.jsonl").write_text('{"text": "w1 w2"}\n')
    predict = ["predict", "--run", "run", "--task", "sort", "--input", "rows.jsonl"]
    assert "'my_router.CosineRouter' is not part of ALTER; import its module" in refused(capsys, *predict)[0]
    main([*predict, "--import", "my_router"])
    assert json.loads(capsys.readouterr().out)["answer"] in ("yes", "no")
    main(["test", "--run", "run", "--import", "my_router"])
    assert json.loads((project / "run" / "results.json").read_text())["tasks"]["sort"]["accuracy"]["n"] == 6


def test_its_setting_is_a_flag(project):  # noqa: F811
    for file in FILES:
        shutil.copy(file, project)
    fit = ["fit", "--config", "recipe.yaml", "--config", "own_router.yaml", "--test", "false", "--stages", "[stage1]"]
    main([*fit, "--stage1.model.router.temperature", "0.1", "--trainer.max_epochs", "1"])
    described = json.loads((project / "run" / "model" / "alter.json").read_text())["parts"]["router"]
    assert described["init_args"] == {"temperature": 0.1}


@pytest.mark.parametrize("project", ["llama", "t5"], indirect=True)
def test_the_example_of_an_expert_computes_its_equation_and_is_tested(project, monkeypatch):  # noqa: F811
    for file in EXPERT:
        shutil.copy(file, project)
    main(["fit", "--config", "recipe.yaml", "--config", "own_expert.yaml", "--test", "false"])
    model = alter.load("run").model
    layer = next(iter(model.layers.values()))
    states, gates = torch.randn(2, 3, layer.frozen.hidden_size), torch.rand(2, 1, 2)
    scales = layer.experts.scale.detach()
    assert scales.any()
    expected = sum(gates[..., k : k + 1] * states * scales[k] for k in range(2))
    mixed = layer.experts.mix(states, gates, layer.frozen, None, model.routing)
    torch.testing.assert_close(mixed, expected)
    each = layer.experts.each(states, layer.frozen, model.routing)
    torch.testing.assert_close((gates.unsqueeze(-1) * each).sum(-2), expected)

    monkeypatch.delitem(sys.modules, "my_expert")  # as in a new process
    main(["test", "--run", "run", "--import", "my_expert"])
    assert json.loads((project / "run" / "results.json").read_text())["tasks"]["sort"]["accuracy"]["n"] == 6
