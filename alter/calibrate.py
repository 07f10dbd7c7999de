"""Probabilities that mean what they say: one temperature a task, fitted on validation."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from alter.data import MultiTaskDataModule
from alter.data.draw import drawn
from alter.loading import CALIBRATION_FILE
from alter.predict import Predictor
from alter.writing import write_json

BOUNDS = (0.05, 20.0)  # validation that is all right would drive the temperature to zero
ROWS = 256  # of validation, drawn from it: enough for one number, since every choice of each is scored


def mean_surprise(scores: Tensor, labels: Tensor, temperature: float) -> float:
    """The mean negative log-likelihood of the labels, in nats, of ``softmax(scores / temperature)``."""
    return float(F.cross_entropy(scores.double() / temperature, labels))


def fit_temperature(scores: Tensor, labels: Tensor) -> float:
    """Finds the temperature under which the labels are likeliest; the likeliest choice stays what it is.

    Source: temperature scaling, Guo et al., arXiv 1706.04599.

    Args:
        scores: [rows, choices], log-likelihoods.
        labels: [rows], which choice is right.
    """
    low, high = map(math.log, BOUNDS)
    found = minimize_scalar(
        lambda log: mean_surprise(scores, labels, math.exp(log)), bounds=(low, high), method="bounded"
    )
    return math.exp(found.x)


def calibrate(
    predictor: Predictor, data: MultiTaskDataModule, tasks: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Fits the temperature of every classification task on its validation rows, and hands them to the predictor.

    Args:
        predictor: the trained model.
        data: set up.
        tasks: which; by default all.

    Returns:
        for each task its ``temperature``, the ``rows`` it was fitted on, and the mean negative log-likelihood of their labels
        ``nll_before`` and ``nll_after``.
    """
    found = {}
    for name in tasks or predictor.tasks:
        if not predictor.task(name).choices:
            continue
        rows = drawn(data.examples(name, "validation"), ROWS)
        scores, labels = predictor.choice_scores(name, rows["prompt_ids"][:]), torch.tensor(rows["choice"][:])
        temperature = fit_temperature(scores, labels)
        found[name] = {
            "temperature": temperature,
            "rows": len(rows),
            "nll_before": mean_surprise(scores, labels, 1.0),
            "nll_after": mean_surprise(scores, labels, temperature),
        }
        predictor.temperatures[name] = temperature
    return found


def calibrate_run(run: Path, predictor: Predictor, data: MultiTaskDataModule) -> None:
    """Calibrates the tasks of a run's model for which that has not been done, and writes it beside the adapters."""
    file = run / "model" / CALIBRATION_FILE
    known = json.loads(file.read_text()) if file.is_file() else {}
    missing = [name for name in predictor.tasks if predictor.task(name).choices and name not in known]
    if not missing:
        return
    print("\ncalibration: the probabilities of choices, by a temperature a task on validation rows")
    found = calibrate(predictor, data, missing)
    write_json(file, {**known, **found})
    for name, task in found.items():
        print(
            f"calibrated: {name}, temperature {task['temperature']:.2f}, "
            f"mean -log p of {task['rows']} labels {task['nll_before']:.3f} -> {task['nll_after']:.3f}"
        )
