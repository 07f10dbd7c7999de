"""Validation by the tasks' own metrics, so that a checkpoint can be chosen by them instead of by the loss."""

from __future__ import annotations

from statistics import fmean
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from alter.data.draw import drawn
from alter.metrics import metric
from alter.nn.backbone import load_tokenizer
from alter.nn.decoding import Generation
from alter.nn.model import MTAModel
from alter.predict import Predictor


class TaskMetrics(Callback):
    """Answers the validation rows and logs ``val/score``, the mean over the tasks of each task's first metric.

    Costs as much as testing on as many rows. To choose the checkpoint by it, put it in ``trainer.callbacks`` before a
    ``ModelCheckpoint`` with ``monitor: val/score``, ``mode: max``, ``filename: best`` and ``save_last: true``.

    Args:
        rows: most rows of a task, drawn from its validation rows; None for all.
        num_beams: of the answers.
        length_penalty: of the beams.
    """

    def __init__(self, rows: int | None = None, num_beams: int = 1, length_penalty: float = 1.0) -> None:
        self.rows = rows
        self.generation = Generation(num_beams, length_penalty)

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answers on every process alike, so that all choose the same checkpoint, and logs the scores."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        predictor = Predictor(
            cast(MTAModel, pl_module.model), load_tokenizer(data.tokenizer), data.tasks, self.generation
        )
        scores = {}
        for task in data.tasks:
            rows = drawn(data.examples(task.name, "validation"), self.rows)[:]
            answers = [answer.text for answer in predictor.answer(task.name, rows["prompt_ids"], probabilities=False)]
            name = task.metrics[0]
            scores[f"val/{name}/{task.name}"] = metric(name, answers, rows["target"], task.choices).value()
        pl_module.log_dict(scores)
        pl_module.log("val/score", fmean(scores.values()), prog_bar=True)
