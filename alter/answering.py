"""Answers to tokenised prompts of several tasks, in shared batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alter.data import Collator, Task, encode_choices
from alter.data.encode import target_ids
from alter.data.sampler import eval_batches
from alter.errors import AlterError, did_you_mean
from alter.nn.choices import SCORED_FIRST, at_once, best_choices, choice_log_likelihoods, own_choice_log_likelihoods
from alter.nn.decoding import Generation, Watch, generate
from alter.nn.gates import expert_names, mean_gates
from alter.nn.model import MTAModel
from alter.nn.stepping import StepDecoder

LINE_ENDS = ("\n", "Ċ", "<0x0A>")  # how vocabularies write one: of text, of bytes, and of SentencePiece's bytes
MAX_BATCH_TOKENS = 2048  # of a CPU


class Answer(NamedTuple):
    """What the model says to one input.

    Attributes:
        text: the generated answer, or the likeliest choice.
        probabilities: of each choice, for a classification task; None for a generation task, and where they were not asked for
            and many choices were not scored.
    """

    text: str
    probabilities: dict[str, float] | None


class Answerer:
    """A model that answers tokenised prompts of its tasks: choices by their likelihood, else by decoding one line.

    Attributes:
        temperatures: of each calibrated classification task; the log-likelihoods of its choices are divided by it.

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
        self.temperatures: dict[str, float] = {}
        self._tasks = {task.name: task for task in tasks}
        self._choices: dict[str, list[list[int]]] = {}

    @property
    def tasks(self) -> list[str]:
        """The tasks' names."""
        return list(self._tasks)

    @property
    def max_batch_tokens(self) -> int:
        """How many tokens, answers included, are answered together."""
        return at_once(MAX_BATCH_TOKENS, self._device())

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
        """Answers prompts of one task, longest batches first, in the order given.

        Args:
            name: of the task.
            prompts: token ids.
            probabilities: whether to tell those of a classification; without them not every choice has to be scored.
        """
        return self.answer_mixed([name] * len(prompts), prompts, [probabilities] * len(prompts))

    def answer_mixed(
        self,
        names: Sequence[str],
        prompts: Sequence[Sequence[int]],
        probabilities: Sequence[bool],
        limits: Sequence[int] | None = None,
        watch: Watch | None = None,
    ) -> list[Answer]:
        """Answers prompts of several tasks in shared batches, in the order given.

        Args:
            names: of each prompt's task.
            prompts: token ids.
            probabilities: whether to tell those of each classification.
            limits: the most tokens of each generated answer; by default its task's ``max_target_tokens``.
            watch: see `alter.nn.decoding.generate`; rows are counted as given here. It is not called for a classification, nor
                where beams are searched.
        """
        tasks = [self.task(name) for name in names]
        limits = limits or [task.max_target_tokens for task in tasks]
        groups: dict[tuple[str, int | None], list[int]] = {}
        for row, task in enumerate(tasks):
            groups.setdefault(_together(task, probabilities[row]), []).append(row)
        answers: dict[int, Answer] = {}
        short_work_first = sorted(groups.items(), key=lambda group: group[0][0] == "generate")
        for (how, _), rows in short_work_first:
            own, given = [tasks[row] for row in rows], [prompts[row] for row in rows]
            if how == "generate":
                found = self._generated(own, given, [limits[row] for row in rows], watch and _renumbered(watch, rows))
            elif how == "score":
                found = self._scored(own, given)
            else:
                found = self._chosen(own, given)
            answers |= {rows[place]: answer for place, answer in found}
        return [answers[row] for row in range(len(prompts))]

    def choice_scores(self, name: str, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The log-likelihood of every choice of a task, [prompts, choices], before calibration."""
        task = self.task(name)
        scores = torch.empty(len(prompts), len(task.choices or ()))
        for rows, batch in self._batches([task] * len(prompts), prompts, [0] * len(prompts)):
            with self._announced():
                scores[rows] = choice_log_likelihoods(self.model, batch, self._encoded_choices(task)).float().cpu()
        return scores

    def gates(self, name: str, prompt: Sequence[int], answer: str) -> dict[str, dict[str, dict[str, float]]]:
        """Who was used for a prompt and its answer; see ``Predictor.routing``.

        Args:
            name: of the task.
            prompt: token ids.
            answer: to it, read up to the task's ``max_target_tokens``.
        """
        limit = self.task(name).max_target_tokens
        target = target_ids([answer], self.tokenizer, self.model.is_seq2seq)[0][:limit]
        example = {"prompt_ids": prompt, "target_ids": target, "task_id": self._id(name)}
        with self._announced():
            found = mean_gates(self.model, self._placed(self.collator([example])))
        shared = ["task experts", *(f"shared {k + 1}" for k in range(self.model.num_shared))]
        names = {"experts": expert_names(self.model), "shared": shared}
        return {
            kind: {layer: dict(zip(names[kind], row.tolist(), strict=True)) for layer, row in layers.items()}
            for kind, layers in found.items()
        }

    def step_decoder(self, watch: Callable[[Any, list[int], bool], bool]) -> StepDecoder | None:
        """Decodes rows that come and go, with answers as ``generate`` has them; None where the model or beams need all at once.

        Args:
            watch: see `alter.nn.stepping.StepDecoder`.
        """
        if self.generation.num_beams > 1 or not StepDecoder.fits(self.model):
            return None
        return StepDecoder(self.model, answer_ends(self.tokenizer), watch)

    def join(
        self,
        decoder: StepDecoder,
        keys: Sequence[Any],
        names: Sequence[str],
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
    ) -> None:
        """Lets prompts of generation tasks, each with its key and limit, join a ``step_decoder``."""
        batch = self._batch([self.task(name) for name in names], prompts)
        with self._announced():
            decoder.join(keys, batch, limits)

    def decode(self, tokens: Sequence[int]) -> str:
        """The answer that tokens spell."""
        return answer_text(self.tokenizer, tokens)

    def _generated(
        self,
        tasks: Sequence[Task],
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        watch: Watch | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        beams = self.generation.num_beams > 1
        # A greedy answer cut short is the short greedy answer, so tasks of different limits share batches; beams differ.
        for limit in set(limits) if beams else (None,):
            part = [row for row, own in enumerate(limits) if limit in (None, own)]
            given = [tasks[row] for row in part], [prompts[row] for row in part], [limits[row] for row in part]
            for places, batch in self._batches(*given):
                rows = [part[place] for place in places]
                see = None if beams or watch is None else _renumbered(watch, rows)
                with self._announced():
                    answers = generate(
                        self.model,
                        batch,
                        [limits[row] for row in rows],
                        answer_ends(self.tokenizer),
                        see,
                        **self.generation.options(),
                    )
                yield from ((row, Answer(self.decode(tokens), None)) for row, tokens in zip(rows, answers, strict=True))

    def _scored(self, tasks: Sequence[Task], prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Answer]]:
        for rows, batch in self._batches(tasks, prompts, [0] * len(prompts)):
            with self._announced():
                scores = own_choice_log_likelihoods(
                    self.model, batch, [self._encoded_choices(tasks[row]) for row in rows]
                )
            for row, own in zip(rows, scores, strict=True):
                task = tasks[row]
                shares = (own.float() / self.temperatures.get(task.name, 1.0)).softmax(-1).tolist()
                probabilities = dict(zip(task.choices or [], shares, strict=True))
                yield row, Answer(max(probabilities, key=probabilities.__getitem__), probabilities)

    def _chosen(self, tasks: Sequence[Task], prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Answer]]:
        """Answers classifications without probabilities, for which not every choice has to be scored."""
        for rows, batch in self._batches(tasks, prompts, [0] * len(prompts)):
            with self._announced():
                best = best_choices(self.model, batch, [self._encoded_choices(tasks[row]) for row in rows])
            yield from ((row, Answer((tasks[row].choices or [])[n], None)) for row, n in zip(rows, best, strict=True))

    def _batches(
        self, tasks: Sequence[Task], prompts: Sequence[Sequence[int]], limits: Sequence[int]
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Rows and their batch of prompts, those of like length together, within a budget of tokens."""
        for rows in eval_batches([len(p) + n for p, n in zip(prompts, limits, strict=True)], self.max_batch_tokens):
            yield rows, self._batch([tasks[row] for row in rows], [prompts[row] for row in rows])

    def _batch(self, tasks: Sequence[Task], prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        return self._placed(self.collator.prompts(prompts, [self._id(task.name) for task in tasks]))

    def _placed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        device = self._device()
        return {key: value.to(device) for key, value in batch.items()}

    def _encoded_choices(self, task: Task) -> list[list[int]]:
        if task.name not in self._choices:
            self._choices[task.name] = encode_choices(task, self.tokenizer, self.model.is_seq2seq)
        return self._choices[task.name]

    @contextmanager
    def _announced(self) -> Iterator[None]:
        """Within it, calls are about the examples they bring, whatever ``hf`` was told to answer."""
        before, self.model.standing = self.model.standing, None
        try:
            yield
        finally:
            self.model.standing = before

    def _id(self, name: str) -> int:
        return self.model.tasks.index(name)

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


@lru_cache(maxsize=1)  # it looks at the whole vocabulary, and is asked for every batch
def answer_ends(tokenizer: Any) -> list[int]:
    """Tokens at which an answer ends: the one that every target ends with, which a backbone's configuration may not name, and
    those that begin with a line's end, since the untouched backbone often does not end by itself.
    """
    marked = sorted(i for token, i in tokenizer.get_vocab().items() if any(mark in token for mark in LINE_ENDS))
    return [tokenizer.eos_token_id, *(i for i in marked if _begins_with_line_end(tokenizer.decode([i])))]


def answer_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The answer that tokens spell: one line, also where a token holds a line's end behind other signs."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return text.partition("\n")[0].rstrip()


def _begins_with_line_end(text: str) -> bool:
    line, end, _ = text.partition("\n")
    return bool(end) and not line.strip()


def _renumbered(watch: Watch, rows: Sequence[int]) -> Watch:
    """The same for a part of the rows."""
    return lambda row, tokens, ended: watch(rows[row], tokens, ended)


def _together(task: Task, probabilities: bool) -> tuple[str, int | None]:
    """What rows must have in common to be answered in one batch."""
    if not task.choices:
        return "generate", None
    if not probabilities and len(task.choices) > SCORED_FIRST:
        return "choose", None
    # all are scored, and rows filled up to the most choices: to twice their own at most
    return "score", (len(task.choices) - 1).bit_length()
