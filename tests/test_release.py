"""The recipe of the released variant, as it ships, on a tiny T5."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

import alter
from alter import answering
from alter.cli import main
from alter.recipe import read_recipe
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.nn.test_release import make as checked
from tests.test_cli import change, project, refused  # noqa: F401 (a fixture)

RECIPE = ["--config", "alter_release", "--backbone", "backbone", "--run", "run"]
BEAMS = {"num_beams": 4, "length_penalty": 0.6}
TINY = [
    "--data.tasks",
    "[tasks/sort.yaml,tasks/echo.yaml]",
    "--data.cache_dir",
    "cache",
    "--trainer.accelerator",
    "cpu",
]
TINY += ["--trainer.max_epochs", "2", "--trainer.enable_progress_bar", "false"]


def test_the_recipe_has_the_authors_settings():
    config = read_recipe(["--config", "alter_release"]).config
    first, second = (config[stage]["model"]["init_args"] for stage in ("stage1", "stage2"))
    copies = {"class_path": "alter.nn.FFNCopy"}
    assert (first["expert"], first["num_experts"], first["layers"]) == (copies, 5, "last:1")
    assert first["router"] == {
        "class_path": "alter.nn.AdjacentSelector",
        "init_args": {"temperature": 0.1, "pair": 0.22, "others": 0.2},
    }
    assert (second["expert"], second["num_shared"]) == (copies, 3)
    assert second["router"] == {"class_path": "alter.nn.FirstPositionGate", "init_args": {"hidden": None}}
    for stage in ("stage1", "stage2"):
        arguments = config[stage]["model"]["init_args"]
        adam = arguments["optimizer"]
        assert (adam["class_path"], adam["init_args"]["lr"]) == ("torch.optim.Adam", 3e-5)
        assert adam["init_args"].get("weight_decay", 0) == 0
        assert (arguments["schedule"], arguments["warmup"], arguments["backbone_lr"]) == ("constant", 0, 1)
        trainer = {**config["trainer"], **config[stage]["trainer"]}
        assert trainer["max_epochs"] == 10
        assert trainer.get("accumulate_grad_batches", 1) == 1
        chosen = {callback["class_path"].rpartition(".")[2]: callback["init_args"] for callback in trainer["callbacks"]}
        assert (chosen["ModelCheckpoint"]["monitor"], chosen["ModelCheckpoint"]["mode"]) == ("val/score", "max")
        assert chosen["TaskMetrics"].items() >= BEAMS.items()
    assert second["task_expert_lr"] == 1
    assert config["generation"] == BEAMS
    assert (config["data"]["max_tokens"], config["data"]["temperature"], config["precision"]) == (1, 1, "fp32")


@pytest.mark.parametrize("project", ["t5"], indirect=True)
def test_the_recipe_trains_all_parameters_chooses_by_metrics_and_answers_with_beams(project, capsys, monkeypatch):  # noqa: F811
    asked = []
    kept = answering.generate

    def generate(*args, **options):
        asked.append(options)
        return kept(*args, **options)

    monkeypatch.setattr(answering, "generate", generate)
    main(["fit", *RECIPE, *TINY])
    out = capsys.readouterr().out
    assert out.count("trunk cache: off (the backbone trains") == 2
    assert asked
    assert all(options == BEAMS for options in asked)

    for stage in ("stage1", "stage2"):
        with (project / "run" / stage / "metrics.csv").open() as stream:
            rows = list(csv.DictReader(stream))
        scores = {int(row["step"]): float(row["value"]) for row in rows if row["metric"] == "val/score"}
        assert list(scores) == [89, 179]  # 90 examples an epoch, one a step
        parts = [float(r["value"]) for r in rows if r["metric"] in ("val/accuracy/sort", "val/rougeL/echo")]
        assert scores[89] == pytest.approx(sum(parts[:2]) / 2, abs=1e-6)
        best = torch.load(project / "run" / stage / "checkpoints" / "best.ckpt", weights_only=True)
        assert best["global_step"] == (90 if scores[89] >= scores[179] else 180)
        saved = load_file(project / "run" / stage / "model" / "adapters.safetensors")
        assert all(torch.equal(saved[key], value) for key, value in best["state_dict"].items())

    config = json.loads((project / "run" / "model" / "alter.json").read_text())
    assert (config["num_experts"], config["num_shared"], config["own_backbone"]) == (5, 3, True)
    of_equations = checked()  # whose losses and gradients are those of the equations
    templates = next(iter(of_equations.layers.values())).templates()
    assert config["parts"] == {name: part.describe() for name, part in templates.items()}
    assert (config["num_experts"], config["num_shared"]) == (of_equations.num_experts, of_equations.num_shared)
    assert (config["layers"], config["ffn"]) == of_equations.placement
    model = alter.load(project / "run").model
    assert model.layers.keys() == of_equations.layers.keys()
    assert sorted(model.layers) == ["decoder.block.2.layer.2.DenseReluDense", "encoder.block.2.layer.1.DenseReluDense"]

    results = json.loads((project / "run" / "results.json").read_text())
    main(["test", "--run", "run"])
    assert json.loads((project / "run" / "results.json").read_text())["tasks"] == results["tasks"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation__num_beams": 0}, "generation.num_beams: 0 is below 1"),
        ({"generation__num_beems": 4}, "generation: unknown key 'num_beems'; .* Did you mean 'num_beams'?"),
        ({"stage1__model__init_args__num_experts": 0}, "num_experts: 0 is below 1"),
        (
            {"stage1__model__init_args__backbone_lr": 1.0, "precision": "bf16"},
            "precision: the backbone trains .* needs fp32, not bf16",
        ),
    ],
)
def test_bad_settings_are_one_sentence(project, capsys, changes, message):  # noqa: F811
    import re

    change(project, **changes)
    text = "\n".join(refused(capsys))
    assert re.search(message, text), text
