"""What TensorBoard shows beside curves: who answers what, how evenly, and what is answered."""

from __future__ import annotations

import time
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from alter.inside import gates_by_task
from alter.nn.backbone import load_tokenizer
from alter.nn.decoding import Generation
from alter.nn.gates import expert_names
from alter.predict import Predictor
from alter.stages.base import StageModule

ROWS = 2  # validation examples of a task
SECONDS = 60.0  # at least, between two looks, which cost some seconds themselves


class Inside(Callback):
    """After a validation: the gates' entropy, the experts' load, routing heatmaps, sample answers.

    At most once a minute, on the first process. Entropies are in nats, of a task's gates averaged over its tokens and the
    layers; 0 is one expert alone. The load of an expert is its mean gate over the tasks; all loads of a kind sum to one.
    Models that are cut over processes show none, since one process cannot run them by itself.

    Args:
        generation: how the sample answers are decoded; greedily by default.
    """

    def __init__(self, generation: Generation | None = None) -> None:
        self.generation = generation
        self._last: float | None = None

    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes them."""
        module, data = cast(StageModule, pl_module), trainer.datamodule  # type: ignore[attr-defined]
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.sanity_checking or not trainer.is_global_zero or module.device_mesh is not None or not boards:
            return
        if self._last is not None and time.monotonic() - self._last < SECONDS:
            return
        self._last = time.monotonic()
        training = module.model.training
        module.model.eval()
        try:
            self._write(boards[0].experiment, module, data, trainer.global_step)
        finally:
            module.model.train(training)

    def _write(self, board: Any, module: StageModule, data: Any, step: int) -> None:
        from alter import pictures

        model = module.model
        predictor = Predictor(model, load_tokenizer(data.tokenizer), data.tasks, self.generation)
        names = {
            "experts": expert_names(model),
            "shared": ["e", *(f"S{k + 1}" for k in range(model.num_shared))],
        }
        for kind, layers in gates_by_task(predictor, data, ROWS).items():
            mean = torch.tensor(list(layers.values())).mean(0)  # [tasks, experts]
            board.add_scalar(f"gates/{kind}/entropy", torch.special.entr(mean).sum(-1).mean(), step)
            for name, load in zip(names[kind], mean.mean(0).tolist(), strict=True):
                board.add_scalar(f"gates/{kind}/load/{name}", load, step)
            figure = pictures.heatmaps({"mean over layers": mean.tolist()}, predictor.tasks, names[kind])
            board.add_image(f"gates/{kind}", pictures.pixels(figure), step, dataformats="HWC")
        rows = [data.examples(task.name, "validation")[0] for task in data.tasks]
        prompts = [row["prompt_ids"] for row in rows]
        answers = predictor.answer_mixed(predictor.tasks, prompts, [False] * len(rows))  # in shared batches
        for task, row, answer in zip(data.tasks, rows, answers, strict=True):
            parts = ("prompt", row["prompt"]), ("target", row["target"]), ("answer", answer.text)
            text = "\n\n".join(f"**{name}**\n\n" + _quoted(part) for name, part in parts)
            board.add_text(f"answers/{task.name}", text, step)


def _quoted(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
