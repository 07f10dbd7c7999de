"""Inputs without a task's name: which task each is for, and when to say that it is not clear."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from alter.data import Task
from alter.data.draw import drawn
from alter.data.files import writable
from alter.errors import AlterError
from alter.nn.task_predictor import Features, Kind, TaskPredictor, text_features

if TYPE_CHECKING:
    from alter.data import MultiTaskDataModule
    from alter.predict import Predictor

TASK_PREDICTOR_FILE = "task_predictor.safetensors"
LEAST_PROBABILITY = 0.7  # below either, an input's task is not clear
LEAST_TYPICAL = 0.01
ROWS = {"train": 1000, "validation": 256}  # of a task, drawn from its split, to fit on


class Guess(NamedTuple):
    """Which task an input is for.

    Attributes:
        task: its name; None where that is not clear.
        likeliest: the likeliest task, clear or not; None where no task reads such fields.
        probability: of the likeliest task.
        typical: how typical the input is of it: the share of its own inputs that lie further out.
        is_prompt: whether the input looks like a whole prompt rather than the value of its field.
    """

    task: str | None
    likeliest: str | None
    probability: float
    typical: float
    is_prompt: bool

    def __str__(self) -> str:
        if self.likeliest is None:
            return "its fields fit no task"
        return f"most like {self.likeliest}, probability {self.probability:.2f}, typical {self.typical:.3f}"


def guess(predictor: Predictor, texts: Sequence[str | Mapping[str, Any]]) -> list[Guess]:
    """Guesses the task of every input; see ``Predictor.guess``."""
    known = predictor.task_predictor
    if known is None:
        raise AlterError(
            f"task: this model has no task predictor, so name one of {', '.join(predictor.tasks)}; `alter test` of its run makes "
            "one."
        )
    if not texts:
        return []
    possible = [_possible(predictor, known, text) for text in texts]
    plain = [_plain(predictor, known, text, places) for text, places in zip(texts, possible, strict=True)]
    logits, typical = known(_features(predictor, plain))
    return [_decided(known, own, far, places) for own, far, places in zip(logits, typical, possible, strict=True)]


def _possible(predictor: Predictor, known: TaskPredictor, text: str | Mapping[str, Any]) -> list[int]:
    """The kinds that an input of this form can be of."""
    tasks = {name: predictor.task(name) for name in predictor.tasks}
    kinds = [(place, kind) for place, kind in enumerate(known.kinds) if kind.task in tasks]
    if isinstance(text, str):
        return [place for place, (name, view) in kinds if view == "prompt" or len(tasks[name].fields) == 1]
    fits = {name: len(task.fields) for name, task in tasks.items() if set(task.fields) <= text.keys()}
    most = max(fits.values(), default=0)
    return [place for place, (name, view) in kinds if view == "input" and fits.get(name) == most]


def _plain(predictor: Predictor, known: TaskPredictor, text: str | Mapping[str, Any], places: Sequence[int]) -> str:
    if isinstance(text, str):
        return text
    return joined(predictor.task(known.kinds[places[0]].task), text) if places else ""


def joined(task: Task, row: Mapping[str, Any]) -> str:
    """The values of the fields that a task's prompt names."""
    return "\n".join(str(value) for value in task.inputs(row).values())


def _features(predictor: Predictor, texts: Sequence[str]) -> Features:
    ids = predictor.tokenizer([writable(text) for text in texts], add_special_tokens=False).input_ids
    return text_features(predictor.model, ids)


def _decided(known: TaskPredictor, logits: Tensor, typical: Tensor, places: Sequence[int]) -> Guess:
    if not places:
        return Guess(None, None, 0.0, 0.0, False)
    shares = logits[list(places)].softmax(-1)
    by_task: dict[str, float] = {}
    for place, share in zip(places, shares.tolist(), strict=True):
        by_task[known.kinds[place].task] = by_task.get(known.kinds[place].task, 0.0) + share
    task = max(by_task, key=by_task.__getitem__)
    own = [place for place in places if known.kinds[place].task == task]
    best = max(own, key=lambda place: float(logits[place]))
    found = Guess(None, task, by_task[task], float(typical[best]), known.kinds[best].view == "prompt")
    clear = found.probability >= LEAST_PROBABILITY and found.typical >= LEAST_TYPICAL
    return found._replace(task=task) if clear else found


# -- fitting ----------------------------------------------------------------------------------------------------------


def texts_of(predictor: Predictor, data: MultiTaskDataModule, name: str, split: str, view: str, most: int) -> list[str]:
    """Texts of a task as somebody would give them without its name: whole prompts, or the values of their fields."""
    rows = drawn(data.examples(name, split), most)
    if view == "prompt":
        return rows["prompt"][:]
    return [joined(predictor.task(name), json.loads(text)) for text in rows["input"]]


def fit_kinds(
    predictor: Predictor, data: MultiTaskDataModule, tasks: Sequence[str]
) -> tuple[dict[Kind, Features], dict[Kind, Features]]:
    """The features of some tasks' training and validation texts, by kind."""
    found: dict[str, dict[Kind, Features]] = {"train": {}, "validation": {}}
    for split, most in ROWS.items():
        for name in tasks:
            for view in ("prompt", "input"):
                texts = texts_of(predictor, data, name, split, view, most)
                found[split][Kind(name, view)] = _features(predictor, texts)
    return found["train"], found["validation"]


def fit_task_predictor(predictor: Predictor, data: MultiTaskDataModule) -> TaskPredictor:
    """Fits a model's task predictor on its tasks' training and validation texts, and hands it to the model."""
    predictor.task_predictor = TaskPredictor.fit(*fit_kinds(predictor, data, predictor.tasks))
    return predictor.task_predictor


def fit_run(run: Path, predictor: Predictor, data: MultiTaskDataModule) -> None:
    """Fits it for a run and writes it beside the adapters, unless that has been done or there is one task alone."""
    file = run / "model" / TASK_PREDICTOR_FILE
    if not file.is_file() and len(predictor.tasks) > 1:
        fit_task_predictor(predictor, data).save(file)


def add_to_run(run: Path, predictor: Predictor, data: MultiTaskDataModule, task: str) -> None:
    """Lets a task that was added later join the run's task predictor; needs the data of that task alone."""
    if predictor.task_predictor is not None:
        others = predictor.task_predictor.without(task)  # where an addition that was stopped had got as far as this
        predictor.task_predictor = others.joined_by(*fit_kinds(predictor, data, [task]))
        predictor.task_predictor.save(run / "model" / TASK_PREDICTOR_FILE)


def read_task_predictor(folder: Path) -> TaskPredictor | None:
    """The task predictor of a model folder; None where it has none.

    Raises:
        AlterError: the file is damaged.
    """
    file = folder / TASK_PREDICTOR_FILE
    return TaskPredictor.load(file) if file.is_file() else None


def shares(guesses: Sequence[Guess], name: str) -> dict[str, float]:
    """How a task's inputs were guessed: the shares ``right``, ``wrong`` and ``unclear``."""
    right = sum(found.task == name for found in guesses)
    unclear = sum(found.task is None for found in guesses)
    parts = {"right": right, "wrong": len(guesses) - right - unclear, "unclear": unclear}
    return {part: count / len(guesses) for part, count in parts.items()}
