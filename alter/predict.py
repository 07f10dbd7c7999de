"""A trained model as its user has it: texts in, answers out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from alter.answering import Answer, Answerer
from alter.data import Task, encode_prompt
from alter.data.encode import batched, prompt_ids
from alter.errors import AlterError
from alter.guess import Guess, guess
from alter.nn.task_predictor import TaskPredictor

Text = str | Mapping[str, Any]


class Predictor(Answerer):
    """A trained model with its tasks.

    An input is a mapping with the fields that its task's prompt names; where that is one field, its text alone will do.
    Lists of inputs may be of one task or, with a list of tasks, of several: they then share batches.

    Attributes:
        folder: the run, or the folder of ``save_pretrained``, that it was loaded from; None for a model made in memory.
        stage: whose model it is, where not the last one's.
        task_predictor: says which task an input is for that comes without its name; None for a model of one task, or one that
            has not been tested.
    """

    folder: Path | None = None
    stage: str | None = None
    task_predictor: TaskPredictor | None = None

    def generate(
        self, texts: Text | Sequence[Text], task: str | Sequence[str] | None = None, max_new_tokens: int | None = None
    ) -> list[str]:
        """Writes an answer to every input, of one line.

        Args:
            texts: the inputs.
            task: of all, or of each; where it is left out, each input's is guessed.
            max_new_tokens: the longest answer; by default each task's ``max_target_tokens``.

        Raises:
            AlterError: a task is unknown, an input does not fit its task, or which task it is for is not clear.
        """
        tasks, prompts = self._read(texts, task)
        limits = [max_new_tokens or found.max_target_tokens for found in tasks]
        answers = dict(self._generated(tasks, prompts, limits))
        return [answers[row].text for row in range(len(prompts))]

    def classify(
        self, texts: Text | Sequence[Text], task: str | Sequence[str] | None = None, return_probs: bool = False
    ) -> list[str] | list[Answer]:
        """Chooses among its task's choices for every input.

        Args:
            texts: the inputs.
            task: of all, or of each; where it is left out, each input's is guessed.
            return_probs: whether to tell the calibrated probability of every choice too.

        Returns:
            the likeliest choices; with ``return_probs`` each with the probabilities.

        Raises:
            AlterError: a task is unknown or has no choices, an input does not fit its task, or which task it is for is not
                clear.
        """
        tasks, prompts = self._read(texts, task)
        for found in tasks:
            if not found.choices:
                raise AlterError(f"classify: task '{found.name}' has no choices; call generate instead.")
        answers = self.answer_mixed([found.name for found in tasks], prompts, [return_probs] * len(prompts))
        return answers if return_probs else [answer.text for answer in answers]

    def guess(self, texts: Text | Sequence[Text]) -> list[Guess]:
        """Says which task each input is for, or that it is not clear.

        A text may be a whole prompt, in whatever words are like those of a task's template, or the value of the one field of a
        task; a mapping is for a task that reads its fields.

        Args:
            texts: the inputs.

        Raises:
            AlterError: the model has no task predictor.
        """
        return guess(self, [texts] if isinstance(texts, (str, Mapping)) else list(texts))

    def routing(
        self,
        texts: Text | Sequence[Text],
        task: str | Sequence[str] | None = None,
        answers: Sequence[str] | None = None,
    ) -> list[dict[str, dict[str, dict[str, float]]]]:
        """Who was used for every input: the gates, averaged over the tokens of prompt and answer.

        In the last block of a decoder-only model they are those of the answer's tokens alone.

        Args:
            texts: the inputs.
            task: of all, or of each; where it is left out, each input's is guessed.
            answers: to each input, where they are known, up to ``max_target_tokens`` of each; by default the model's own.

        Returns:
            for each input ``{"experts": {layer: {expert: gate}}}``; with stage 2 also ``"shared"``, whose first is the share of
            the task experts' mixture.

        Raises:
            AlterError: as ``generate``; or there are more or fewer answers than inputs.
        """
        tasks, prompts = self._read(texts, task)
        names = [own.name for own in tasks]
        if answers is not None and len(answers) != len(prompts):
            raise AlterError(f"answers: {len(answers)} answers to {len(prompts)} inputs; give one for each, or none.")
        if answers is None:
            answers = [answer.text for answer in self.answer_mixed(names, prompts, [False] * len(prompts))]
        return [self.gates(*one) for one in zip(names, prompts, answers, strict=True)]

    # -- as a transformers model ------------------------------------------------------------------------------------

    @property
    def hf(self) -> PreTrainedModel:
        """The backbone with its adapters, for ``transformers.pipeline`` and ``generate``; ``use`` says for which task.

        A model of one task, or whose routers do not read the task, such as ``Description``, answers without. Prompts are as the
        task's template makes them: ``model.prompt(text, task)``. It is not for writing: transformers would read the backbone's
        weights without its adapters.
        """
        if self.model.standing is None:
            self.use(self._only_task("model.use") if self.model.reads_task else next(iter(self._tasks)))
        for name in ("save_pretrained", "push_to_hub"):
            setattr(self.model.backbone, name, _refuse_to_write)
        return self.model.backbone

    def use(self, task: str | Sequence[str]) -> None:
        """Chooses what ``hf`` answers from now on.

        Args:
            task: a task, or one for each row of the coming batches.

        Raises:
            AlterError: there is no such task.
        """
        names = [task] if isinstance(task, str) else list(task)
        ids = [self._id(self.task(name).name) for name in names]
        self.model.standing = torch.tensor(ids, device=self._device())

    def prompt(self, text: Text, task: str | None = None) -> str:
        """The prompt that a task's template makes of an input."""
        found = self.task(task if task is not None else self._only_task("prompt"))
        return found.render_prompt(found.as_row(text, "prompt"))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the model with its tasks, calibration and model card, as one folder for the Hugging Face hub.

        ``alter.load`` reads it as it reads a run. The backbone stays where it is, and is named.

        Raises:
            AlterError: the model does not come from a run, or the folder is not empty.
        """
        from alter.publish import publish

        if self.folder is None:
            raise AlterError("save_pretrained: the model does not come from a run; load it with alter.load first.")
        publish(self.folder, Path(folder), self.stage)

    # -- for the program --------------------------------------------------------------------------------------------

    def encode(self, text: Text, task: str, place: str = "the input") -> list[int]:
        """Token ids of a task's prompt for an input, shortened where it is too long.

        Raises:
            AlterError: there is no such task, or the input does not fit it.
        """
        found = self.task(task)
        return encode_prompt(found, found.as_row(text, place), self.tokenizer, self.model.is_seq2seq, place)

    def stream(
        self, name: str, rows: Iterable[Mapping[str, Any]], size: int = 32, place: str = "input"
    ) -> Iterator[Answer]:
        """Answers rows of a task's fields, ``size`` at a time, in order.

        Args:
            name: of the task.
            rows: mappings of its fields.
            size: rows of a batch at most.
            place: what messages call a row, before its number.
        """
        task = self.task(name)
        numbered = ((f"{place} {n}", row) for n, row in enumerate(rows, 1))
        prompts = (encode_prompt(task, row, self.tokenizer, self.model.is_seq2seq, where) for where, row in numbered)
        for chunk in batched(prompts, size):
            yield from self.answer(name, chunk)

    def stream_unnamed(self, rows: Iterable[Text], size: int = 32) -> Iterator[tuple[Guess, Answer | None]]:
        """Answers inputs without a task's name, ``size`` at a time, in order; None where their task is not clear."""
        for chunk in batched(enumerate(rows, 1), size):
            guesses = self.guess([text for _, text in chunk])
            clear = [
                (n, text, found) for (n, text), found in zip(chunk, guesses, strict=True) if found.task is not None
            ]
            prompts = [self.guessed_prompt(text, found, f"input {n}") for n, text, found in clear]
            answers = iter(self.answer_mixed([str(found.task) for *_, found in clear], prompts, [True] * len(prompts)))
            yield from ((found, None if found.task is None else next(answers)) for found in guesses)

    def guessed_prompt(self, text: Text, found: Guess, place: str) -> list[int]:
        """Token ids of the prompt of an input whose task was guessed; a whole prompt stays as it is.

        Raises:
            AlterError: it does not fit its task.
        """
        task = self.task(str(found.task))
        if isinstance(text, str) and found.is_prompt:
            ids = prompt_ids([text.rstrip()], self.tokenizer, self.model.is_seq2seq)[0]
            if len(ids) > task.max_prompt_tokens:
                raise AlterError(
                    f"{place}: the prompt has {len(ids)} tokens, more than max_prompt_tokens {task.max_prompt_tokens} of task "
                    f"'{task.name}'; shorten it."
                )
            return ids
        return encode_prompt(task, task.as_row(text, place), self.tokenizer, self.model.is_seq2seq, place)

    def _read(
        self, texts: Text | Sequence[Text], task: str | Sequence[str] | None
    ) -> tuple[list[Task], list[list[int]]]:
        """The task and the tokenised prompt of every input."""
        texts = [texts] if isinstance(texts, (str, Mapping)) else list(texts)
        if task is None and len(self._tasks) > 1:
            return self._read_guessed(texts)
        task = next(iter(self._tasks)) if task is None else task
        names = [task] * len(texts) if isinstance(task, str) else list(task)
        if len(names) != len(texts):
            raise AlterError(f"task: {len(names)} tasks for {len(texts)} inputs; give one for all, or one for each.")
        tasks = [self.task(name) for name in names]
        inputs = enumerate(zip(texts, names, strict=True), 1)
        return tasks, [self.encode(text, name, f"input {number}") for number, (text, name) in inputs]

    def _read_guessed(self, texts: Sequence[Text]) -> tuple[list[Task], list[list[int]]]:
        guesses = self.guess(texts)
        if unclear := [f"input {n}: {found}" for n, found in enumerate(guesses, 1) if found.task is None]:
            raise AlterError(
                f"task: which task they are for is not clear ({'; '.join(unclear[:5])}{' and more' if len(unclear) > 5 else ''}); "
                f"name one of {', '.join(self._tasks)}."
            )
        tasks = [self.task(str(found.task)) for found in guesses]
        prompts = [
            self.guessed_prompt(text, found, f"input {n}")
            for n, (text, found) in enumerate(zip(texts, guesses, strict=True), 1)
        ]
        return tasks, prompts

    def _only_task(self, key: str) -> str:
        if len(self._tasks) > 1:
            raise AlterError(f"{key}: the model has several tasks; name one of {', '.join(self._tasks)}.")
        return next(iter(self._tasks))


def _refuse_to_write(*args: Any, **kwargs: Any) -> None:
    """In place of what would write a checkpoint that holds the adapters under names that transformers does not know."""
    raise AlterError(
        "hf: transformers cannot read what it would write of a backbone with adapters; call save_pretrained of the model "
        "that alter.load returned, or write a plain checkpoint of one task by alter export."
    )
