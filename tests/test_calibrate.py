"""Temperatures of probabilities."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import alter
from alter.calibrate import BOUNDS, fit_temperature, mean_surprise
from alter.errors import AlterError
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.test_predict import TEXTS, model  # noqa: F401 (a fixture)


@given(seed=st.integers(0, 2**31), temperature=st.floats(0.2, 8.0), choices=st.integers(2, 6))
def test_temperature_scaling_finds_the_temperature_that_labels_were_drawn_with(seed, temperature, choices):
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * temperature * torch.randn(4000, choices, generator=generator)
    labels = torch.multinomial((scores / temperature).softmax(-1), 1, generator=generator).squeeze(1)
    found = fit_temperature(scores, labels)
    assert found == pytest.approx(temperature, rel=0.15)
    for other in (found * 0.9, found * 1.1, 1.0):
        assert mean_surprise(scores, labels, found) <= mean_surprise(scores, labels, other) + 1e-9


def test_labels_that_are_all_right_or_all_wrong_leave_a_finite_temperature():
    scores = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    assert BOUNDS[0] <= fit_temperature(scores, torch.tensor([0, 1])) < 0.1
    assert 10 < fit_temperature(scores, torch.tensor([1, 0])) <= BOUNDS[1]


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_testing_a_run_calibrates_it_once_and_loading_reads_it(model, tmp_path, capsys, monkeypatch):  # noqa: F811
    from alter.cli import main

    run = tmp_path / "run"
    assert model.temperatures == {}
    monkeypatch.setenv("ALTER_HOME", str(tmp_path / "home"))
    main(["test", "--run", str(run)])
    kept = json.loads((run / "model" / "calibration.json").read_text())
    assert set(kept) == {"sort", "pick"}
    assert "calibrated: sort, temperature " in capsys.readouterr().out
    loaded = alter.load(run)
    assert loaded.temperatures == {name: entry["temperature"] for name, entry in kept.items()}
    for entry in kept.values():
        assert entry["rows"] == 6
        assert entry["nll_after"] <= entry["nll_before"]
    raw = model.classify(TEXTS[0], task="sort", return_probs=True)[0].probabilities["yes"]
    logit = math.log(raw / (1 - raw)) / kept["sort"]["temperature"]
    calibrated = loaded.classify(TEXTS[0], task="sort", return_probs=True)[0].probabilities["yes"]
    assert calibrated == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-4)
    before = (run / "model" / "calibration.json").stat().st_mtime_ns
    main(["test", "--run", str(run)])
    assert (run / "model" / "calibration.json").stat().st_mtime_ns == before
    (run / "model" / "calibration.json").write_text(json.dumps({"pick": {**kept["pick"], "rows": 5}}))
    main(["test", "--run", str(run)])  # as after add-task in a run that was not tested before
    assert json.loads((run / "model" / "calibration.json").read_text()) == {
        "pick": {**kept["pick"], "rows": 5},
        "sort": pytest.approx(kept["sort"]),
    }
    (run / "model" / "calibration.json").write_text("[]")
    with pytest.raises(AlterError, match=r"calibration\.json: not a readable calibration"):
        alter.load(run)
