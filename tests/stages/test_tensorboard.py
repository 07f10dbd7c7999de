"""What TensorBoard is told, read by its own reader."""

import io
import math

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import alter
from alter import pictures
from alter.cli import main
from alter.inside import gates_by_task
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.test_cli import project  # noqa: F401 (a fixture)


def test_losses_rates_norms_gates_loads_heatmaps_and_answers_are_there(project):  # noqa: F811
    main(["fit", "--config", "recipe.yaml", "--trainer.val_check_interval", "0.5"])
    for stage, kinds in (("stage1", ["experts"]), ("stage2", ["experts", "shared"])):
        events = EventAccumulator(str(project / "run" / stage), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
        events.Reload()
        scalars = events.Tags()["scalars"]
        expected = {"train/loss", "train/loss/echo", "train/loss/sort", "val/loss", "train/gradient_norm"}
        expected |= {f"gates/{kind}/entropy" for kind in kinds}
        assert expected <= set(scalars)
        assert [name for name in scalars if name.startswith("lr/")]
        assert all(event.value > 0 for event in events.Scalars("train/gradient_norm"))
        for kind in kinds:
            loads = [name for name in scalars if name.startswith(f"gates/{kind}/load/")]
            for step in range(len(events.Scalars(loads[0]))):
                assert sum(events.Scalars(name)[step].value for name in loads) == pytest.approx(1, abs=1e-5)
            assert 0 <= events.Scalars(f"gates/{kind}/entropy")[0].value <= math.log(len(loads)) + 1e-6
            image = events.Images(f"gates/{kind}")[0]
            assert (image.width > 50, image.height > 50) == (True, True)
        text = events.Tensors("answers/sort/text_summary")[0].tensor_proto.string_val[0].decode()
        assert "**prompt**" in text
        assert "**answer**" in text


def test_gates_loads_picture_and_answer_are_the_models(project):  # noqa: F811
    main(["fit", "--config", "recipe.yaml", "--stages", "[stage1]", "--test", "false", "--trainer.max_epochs", "1"])
    from alter.data import MultiTaskDataModule

    events = EventAccumulator(str(project / "run" / "stage1"))
    events.Reload()
    model = alter.load("run")
    tasks = [model.task(name) for name in model.tasks]
    data = MultiTaskDataModule(tasks, str(project / "backbone"), cache_dir="cache")
    data.prepare_data()
    data.setup()
    mean = np.mean(list(gates_by_task(model, data, 2)["experts"].values()), axis=0)
    expected = float(np.mean(-(mean * np.log(mean)).sum(1)))
    assert events.Scalars("gates/experts/entropy")[-1].value == pytest.approx(expected, abs=1e-4)
    for name, load in zip(model.tasks, mean.mean(0), strict=True):
        assert events.Scalars(f"gates/experts/load/{name}")[-1].value == pytest.approx(load, abs=1e-4)
    expected = pictures.pixels(pictures.heatmaps({"mean over layers": mean.tolist()}, model.tasks, model.tasks))
    drawn = np.asarray(Image.open(io.BytesIO(events.Images("gates/experts")[-1].encoded_image_string)), dtype=int)
    assert np.abs(drawn - expected).mean() < 1
    row = data.examples("sort", "validation")[0]
    (answer,) = model.answer("sort", [row["prompt_ids"]], probabilities=False)
    text = events.Tensors("answers/sort/text_summary")[-1].tensor_proto.string_val[0].decode()
    for part in (row["prompt"], row["target"], answer.text):
        assert all(f"    {line}" in text.splitlines() for line in part.splitlines())
