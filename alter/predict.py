"""Answers from a finished run: ``alter.load(run)``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from alter.data import Collator, Task, encode_choices, encode_prompt
from alter.data.sampler import eval_batches
from alter.errors import AlterError, did_you_mean
from alter.nn.backbone import load_tokenizer, resolve_backbone
from alter.nn.decoding import Generation, best_choices, choice_log_likelihoods, generate
from alter.nn.model import MTAModel, read_config

MAX_BATCH_TOKENS = 2048


class Answer(NamedTuple):
    """What the model says to one input.

    Attributes:
        text: the generated answer, or the likeliest choice.
        probabilities: of each choice, for a classification task; None for a generation task.
    """

    text: str
    probabilities: dict[str, float] | None


class Predictor:
    """A trained model with its tasks.

    Args:
        model: the MTA model.
        tokenizer: of its backbone.
        tasks: in the order of their ids.
        generation: how answers are decoded; greedily by default.
    """

    def __init__(
        self, model: MTAModel, tokenizer: Any, tasks: Sequence[Task], generation: Generation | None = None
    ) -> None:
        self.model = model
        self.generation = generation or Generation()
        self.tokenizer = tokenizer
        self.collator = Collator(tokenizer.pad_token_id, model.is_seq2seq)
        self._tasks = {task.name: task for task in tasks}

    @property
    def tasks(self) -> list[str]:
        """The tasks' names."""
        return list(self._tasks)

    def task(self, name: str) -> Task:
        """Returns a task by name.

        Raises:
            AlterError: there is no such task.
        """
        if name not in self._tasks:
            raise AlterError(
                f"--task: there is no task '{name}'; it is one of {', '.join(self._tasks)}.{did_you_mean(name, self._tasks)}"
            )
        return self._tasks[name]

    def answer(self, name: str, prompts: Sequence[Sequence[int]], probabilities: bool = True) -> list[Answer]:
        """Answers tokenised prompts of one task, longest batches first, in the order given.

        Classification scores choices by their likelihood; generation decodes and stops at a line's end.

        Args:
            name: of the task.
            prompts: token ids.
            probabilities: whether to tell those of a classification; without them not every choice has to be scored.
        """
        task = self.task(name)
        task_id = self.tasks.index(name)
        device = next(self.model.parameters()).device
        answers: list[Answer | None] = [None] * len(prompts)
        choices = encode_choices(task, self.tokenizer, self.model.is_seq2seq) if task.choices else None
        budget = MAX_BATCH_TOKENS
        longest = 0 if choices else task.max_target_tokens
        for rows in eval_batches([len(p) + longest for p in prompts], budget):
            batch = self.collator.prompts([prompts[i] for i in rows], [task_id] * len(rows))
            batch = {key: value.to(device) for key, value in batch.items()}
            if choices is None:
                found = self._generate(task, batch)
            elif probabilities:
                found = self._classify(task, batch, choices)
            else:
                found = [Answer(task.choices[i], None) for i in best_choices(self.model, batch, choices).tolist()]
            for row, answer in zip(rows, found, strict=True):
                answers[row] = answer
        return answers  # type: ignore[return-value]

    def _generate(self, task: Task, batch: Mapping[str, torch.Tensor]) -> list[Answer]:
        options = self.generation.options()
        tokens = generate(self.model, batch, task.max_target_tokens, line_ends(self.tokenizer), **options)
        return [Answer(text.strip(), None) for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def _classify(self, task: Task, batch: Mapping[str, torch.Tensor], choices: list[list[int]]) -> list[Answer]:
        probabilities = choice_log_likelihoods(self.model, batch, choices).softmax(-1).tolist()
        return [
            Answer(task.choices[max(range(len(row)), key=row.__getitem__)], dict(zip(task.choices, row, strict=True)))
            for row in probabilities
        ]

    def stream(self, name: str, rows: Iterable[Mapping[str, Any]], size: int = 32) -> Iterator[Answer]:
        """Answers rows of a task's fields, ``size`` at a time, in order."""
        task = self.task(name)
        chunk: list[list[int]] = []
        for row in rows:
            chunk.append(encode_prompt(task, row, self.tokenizer, self.model.is_seq2seq))
            if len(chunk) == size:
                yield from self.answer(name, chunk)
                chunk = []
        if chunk:
            yield from self.answer(name, chunk)


def line_ends(tokenizer: Any) -> list[int]:
    """Tokens at which an answer of one line ends; the untouched backbone often does not end by itself."""
    pieces = (tokenizer(text, add_special_tokens=False).input_ids for text in ("\n", "\n\n"))
    unknown = tokenizer.unk_token_id
    return [piece[0] for piece in pieces if len(piece) == 1 and piece[0] != unknown]


def load(run: str | Path, backbone: str | None = None, kind: type[MTAModel] = MTAModel) -> Predictor:
    """Loads a finished run.

    Args:
        run: the run folder.
        backbone: where the backbone is, when not where it was.
        kind: of the model, for one that is not an `MTAModel` itself.

    Raises:
        AlterError: the folder holds no finished run, or it is damaged.
    """
    run = Path(run)
    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        raise AlterError(f"{run}: no run here, recipe.yaml is missing; name a folder that `alter fit` has written.")
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    tasks = [Task.from_dict(entry, str(recipe)) for entry in content["data"]["tasks"]]
    where = resolve_backbone(backbone or read_config(run / "model")["backbone"]["name"])
    model = kind.from_pretrained(run / "model", str(where), content["precision"])
    by_name = {task.name: task for task in tasks}
    generation = Generation(**content.get("generation", {}))
    return Predictor(model, load_tokenizer(where), [by_name[name] for name in model.tasks], generation)
