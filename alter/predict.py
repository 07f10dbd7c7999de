"""Answers from a finished run: ``alter.load(run)``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alter.data import Collator, Task, encode_choices, encode_prompt
from alter.data.encode import prompt_ids, target_ids
from alter.data.sampler import eval_batches
from alter.errors import AlterError, did_you_mean
from alter.guess import Guess, guess, read_task_predictor
from alter.nn.backbone import load_tokenizer, resolve_backbone
from alter.nn.decoding import (
    SCORED_FIRST,
    Generation,
    Watch,
    best_choices,
    choice_log_likelihoods,
    generate,
    own_choice_log_likelihoods,
)
from alter.nn.gates import mean_gates
from alter.nn.model import CONFIG_FILE, MTAModel, read_config
from alter.nn.stepping import StepDecoder
from alter.nn.task_predictor import TaskPredictor
from alter.precision import answering_precision
from alter.yaml_file import read_yaml

MAX_BATCH_TOKENS = 2048
CALIBRATION_FILE = "calibration.json"
Text = str | Mapping[str, Any]
Item = TypeVar("Item")


class Answer(NamedTuple):
    """What the model says to one input.

    Attributes:
        text: the generated answer, or the likeliest choice.
        probabilities: of each choice, for a classification task; None for a generation task, and where they were not asked for
            and many choices were not scored.
    """

    text: str
    probabilities: dict[str, float] | None


class Predictor:
    """A trained model with its tasks.

    An input is a mapping with the fields that its task's prompt names; where that is one field, its text alone will do.
    Lists of inputs may be of one task or, with a list of tasks, of several: they then share batches.

    Attributes:
        temperatures: of each calibrated classification task; the log-likelihoods of its choices are divided by it.
        folder: the model folder that it was loaded from; None for a model made in memory.
        task_predictor: says which task an input is for that comes without its name; None for a model of one task, or one that
            has not been tested.

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
        self.folder: Path | None = None
        self.task_predictor: TaskPredictor | None = None
        self._tasks = {task.name: task for task in tasks}
        self._choices: dict[str, list[list[int]]] = {}

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

    def _id(self, name: str) -> int:
        return self.model.tasks.index(name)

    # -- for users --------------------------------------------------------------------------------------------------

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
        return [answer.text for answer in self._generated(tasks, prompts, limits)]

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
        answers = self._answered(tasks, prompts, return_probs)
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
            AlterError: as ``generate``.
        """
        tasks, prompts = self._read(texts, task)
        if answers is None:
            answers = [answer.text for answer in self._answered(tasks, prompts, False)]
        device = self._device()
        names = {
            "experts": expert_names(self.model),
            "shared": ["task experts", *(f"shared {k + 1}" for k in range(self.model.num_shared))],
        }
        found = []
        for own, prompt, answer in zip(tasks, prompts, answers, strict=True):
            target = target_ids([answer], self.tokenizer, self.model.is_seq2seq)[0][: own.max_target_tokens]
            example = {"prompt_ids": prompt, "target_ids": target, "task_id": self._id(own.name)}
            batch = {key: value.to(device) for key, value in self.collator([example]).items()}
            with self._announced():
                gates = mean_gates(self.model, batch)
            found.append(
                {
                    kind: {layer: dict(zip(names[kind], row.tolist(), strict=True)) for layer, row in layers.items()}
                    for kind, layers in gates.items()
                }
            )
        return found

    # -- as a transformers model ------------------------------------------------------------------------------------

    @property
    def hf(self) -> PreTrainedModel:
        """The backbone with its adapters, for ``transformers.pipeline`` and ``generate``; ``use`` says for which task.

        Prompts are as the task's template makes them: ``model.prompt(text, task)``.
        """
        if self.model.standing is None:
            self.use(self._only_task("model.use"))
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
        publish(self.folder, Path(folder))

    # -- for the program --------------------------------------------------------------------------------------------

    def answer(self, name: str, prompts: Sequence[Sequence[int]], probabilities: bool = True) -> list[Answer]:
        """Answers tokenised prompts of one task, longest batches first, in the order given.

        Classification scores choices by their likelihood; generation decodes and stops at a line's end.

        Args:
            name: of the task.
            prompts: token ids.
            probabilities: whether to tell those of a classification; without them not every choice has to be scored.
        """
        return self._answered([self.task(name)] * len(prompts), prompts, probabilities)

    def answer_mixed(
        self,
        names: Sequence[str],
        prompts: Sequence[Sequence[int]],
        probabilities: Sequence[bool],
        limits: Sequence[int],
        watch: Watch | None = None,
    ) -> list[Answer]:
        """Answers tokenised prompts of several tasks in shared batches, in the order given.

        Args:
            names: of each prompt's task.
            prompts: token ids.
            probabilities: whether to tell those of each classification.
            limits: the most tokens of each generated answer.
            watch: see `alter.nn.decoding.generate`; rows are counted as given here. It is not called for a classification, nor
                where beams are searched.
        """
        return self._answered([self.task(name) for name in names], prompts, probabilities, limits, watch)

    def step_decoder(self, watch: Callable[[Any, list[int], bool], bool]) -> StepDecoder | None:
        """Decodes rows that come and go, with answers as ``generate`` has them; None where the model or beams need all at once.

        Args:
            watch: see `alter.nn.stepping.StepDecoder`.
        """
        if self.generation.num_beams > 1 or not StepDecoder.fits(self.model):
            return None
        return StepDecoder(self.model, line_ends(self.tokenizer), watch)

    def join(
        self,
        decoder: StepDecoder,
        keys: Sequence[Any],
        names: Sequence[str],
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
    ) -> None:
        """Lets tokenised prompts of generation tasks, each with its key and limit, join a ``step_decoder``."""
        batch = self.collator.prompts(prompts, [self._id(name) for name in names])
        device = self._device()
        with self._announced():
            decoder.join(keys, {key: value.to(device) for key, value in batch.items()}, limits)

    def encode(self, text: Text, task: str, place: str = "the input") -> list[int]:
        """Token ids of a task's prompt for an input, shortened where it is too long.

        Raises:
            AlterError: there is no such task, or the input does not fit it.
        """
        found = self.task(task)
        return encode_prompt(found, found.as_row(text, place), self.tokenizer, self.model.is_seq2seq, place)

    def decode(self, tokens: Sequence[int]) -> str:
        """The answer that tokens spell."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def choice_scores(self, name: str, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The log-likelihood of every choice of a task, [prompts, choices], before calibration."""
        task = self.task(name)
        scores = torch.empty(len(prompts), len(task.choices or ()))
        for rows, batch in self._batches([task] * len(prompts), prompts, [0] * len(prompts)):
            with self._announced():
                scores[rows] = choice_log_likelihoods(self.model, batch, self._encoded_choices(task)).float().cpu()
        return scores

    def stream(self, name: str, rows: Iterable[Mapping[str, Any]], size: int = 32) -> Iterator[Answer]:
        """Answers rows of a task's fields, ``size`` at a time, in order."""
        task = self.task(name)
        prompts = (encode_prompt(task, row, self.tokenizer, self.model.is_seq2seq) for row in rows)
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
            answers = iter(self._answered([self.task(str(found.task)) for *_, found in clear], prompts, True))
            yield from ((found, None if found.task is None else next(answers)) for found in guesses)

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

    def _only_task(self, key: str) -> str:
        if len(self._tasks) > 1:
            raise AlterError(f"{key}: the model has several tasks; name one of {', '.join(self._tasks)}.")
        return next(iter(self._tasks))

    def _answered(
        self,
        tasks: Sequence[Task],
        prompts: Sequence[Sequence[int]],
        probabilities: bool | Sequence[bool],
        limits: Sequence[int] | None = None,
        watch: Watch | None = None,
    ) -> list[Answer]:
        answers: list[Answer | None] = [None] * len(prompts)
        wanted = [probabilities] * len(prompts) if isinstance(probabilities, bool) else probabilities
        groups: dict[tuple[str, int | None], list[int]] = {}
        for row, task in enumerate(tasks):
            groups.setdefault(_together(task, wanted[row]), []).append(row)
        for (how, _), rows in sorted(
            groups.items(), key=lambda group: group[0][0] == "generate"
        ):  # the short work first
            own, given = [tasks[row] for row in rows], [prompts[row] for row in rows]
            if how == "generate":
                longest = [limits[row] for row in rows] if limits else [task.max_target_tokens for task in own]
                found = self._generated(own, given, longest, watch and _renumbered(watch, rows))
            elif how == "score":
                found = self._scored(own, given)
            else:
                found = self._chosen(own, given)
            for row, answer in zip(rows, found, strict=True):
                answers[row] = answer
        return answers  # type: ignore[return-value]

    def _generated(
        self,
        tasks: Sequence[Task],
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        watch: Watch | None = None,
    ) -> list[Answer]:
        answers: list[Answer | None] = [None] * len(prompts)
        beams = self.generation.num_beams > 1
        # A greedy answer cut short is the short greedy answer, so tasks of different limits share batches; beams differ.
        for limit in set(limits) if beams else (None,):
            rows = [row for row, own in enumerate(limits) if limit in (None, own)]
            part = [tasks[r] for r in rows], [prompts[r] for r in rows], [limits[r] for r in rows]
            for places, batch in self._batches(*part):
                own = [limits[rows[place]] for place in places]
                see = None if beams or watch is None else _renumbered(watch, [rows[place] for place in places])
                with self._announced():
                    tokens = generate(
                        self.model, batch, own, line_ends(self.tokenizer), see, **self.generation.options()
                    )
                for place, text in zip(
                    places, self.tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True
                ):
                    answers[rows[place]] = Answer(text.strip(), None)
        return answers  # type: ignore[return-value]

    def _scored(self, tasks: Sequence[Task], prompts: Sequence[Sequence[int]]) -> list[Answer]:
        answers: list[Answer | None] = [None] * len(prompts)
        for rows, batch in self._batches(tasks, prompts, [0] * len(prompts)):
            encoded = [self._encoded_choices(tasks[row]) for row in rows]
            with self._announced():
                scores = own_choice_log_likelihoods(self.model, batch, encoded)
            for row, own in zip(rows, scores, strict=True):
                task = tasks[row]
                shares = (own.float() / self.temperatures.get(task.name, 1.0)).softmax(-1).tolist()
                choices = task.choices or []
                text = choices[max(range(len(shares)), key=shares.__getitem__)]
                answers[row] = Answer(text, dict(zip(choices, shares, strict=True)))
        return answers  # type: ignore[return-value]

    def _chosen(self, tasks: Sequence[Task], prompts: Sequence[Sequence[int]]) -> list[Answer]:
        """Answers classifications without probabilities, for which not every choice has to be scored."""
        answers: list[Answer | None] = [None] * len(prompts)
        for rows, batch in self._batches(tasks, prompts, [0] * len(prompts)):
            with self._announced():
                best = best_choices(self.model, batch, [self._encoded_choices(tasks[row]) for row in rows])
            for row, choice in zip(rows, best, strict=True):
                answers[row] = Answer((tasks[row].choices or [])[choice], None)
        return answers  # type: ignore[return-value]

    def _batches(
        self, tasks: Sequence[Task], prompts: Sequence[Sequence[int]], limits: Sequence[int]
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Rows and their batch of prompts, those of like length together, within a budget of tokens."""
        device = self._device()
        for rows in eval_batches([len(p) + n for p, n in zip(prompts, limits, strict=True)], MAX_BATCH_TOKENS):
            batch = self.collator.prompts([prompts[i] for i in rows], [self._id(tasks[i].name) for i in rows])
            yield rows, {key: value.to(device) for key, value in batch.items()}

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

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def expert_names(model: MTAModel) -> list[str]:
    """What to call the task experts: by their tasks, where each has its own."""
    base, added = model.tasks[: model.base_tasks], model.tasks[model.base_tasks :]
    own = base if model.num_experts == len(base) else [f"expert {k + 1}" for k in range(model.num_experts)]
    return [*own, *added]


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of up to ``size`` items."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


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


def line_ends(tokenizer: Any) -> list[int]:
    """Tokens at which an answer of one line ends; the untouched backbone often does not end by itself."""
    pieces = (tokenizer(text, add_special_tokens=False).input_ids for text in ("\n", "\n\n"))
    # SentencePiece makes of a line's end the piece of a space, which stands within lines
    return [piece[0] for piece in pieces if len(piece) == 1 and "\n" in tokenizer.decode(piece)]


def load(
    run: str | Path, backbone: str | None = None, kind: type[MTAModel] = MTAModel, stage: str | None = None
) -> Predictor:
    """Loads a finished run, or what ``save_pretrained`` wrote.

    Args:
        run: the folder.
        backbone: where the backbone is, when not where it was.
        kind: of the model, for one that is not an `MTAModel` itself.
        stage: whose model, of a run folder; by default that of the last.

    Raises:
        AlterError: the folder holds no finished run, or it is damaged.
    """
    content = read_recipe(Path(run))
    folder = Path(run) / stage / "model" if stage else model_folder(Path(run))
    tasks = [Task.from_run(entry, str(Path(run) / "recipe.yaml")) for entry in content["data"]["tasks"]]
    where = resolve_backbone(backbone or read_config(folder)["backbone"]["name"])
    model = kind.from_pretrained(folder, str(where), answering_precision(content["precision"]))
    by_name = {task.name: task for task in tasks}
    generation = Generation(**content.get("generation", {}))
    # an earlier stage's model still has the tasks that were removed from the run
    known = [by_name[name] for name in model.tasks if name not in model.retired and (name in by_name or not stage)]
    found = Predictor(model, load_tokenizer(where), known, generation)
    found.folder = Path(run)
    found.temperatures = read_temperatures(folder)
    found.task_predictor = read_task_predictor(folder)
    return found


def model_folder(run: Path) -> Path:
    """Where the model of a run is, or of a folder that ``save_pretrained`` wrote: the folder itself."""
    return run if (run / CONFIG_FILE).is_file() else run / "model"


def read_recipe(run: Path) -> dict[str, Any]:
    """Reads the recipe of a run.

    Raises:
        AlterError: there is none.
    """
    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        raise AlterError(f"{run}: no run here, recipe.yaml is missing; name a folder that `alter fit` has written.")
    content = read_yaml(recipe)
    if not (isinstance(content, dict) and isinstance(content.get("data"), dict) and "precision" in content):
        raise AlterError(f"{recipe}: not the recipe of a run; copy or train it again.")
    return content


def read_temperatures(folder: Path) -> dict[str, float]:
    """The temperatures of a model folder; none where it is not calibrated.

    Raises:
        AlterError: the file is damaged.
    """
    file = folder / CALIBRATION_FILE
    if not file.is_file():
        return {}
    try:
        return {name: float(task["temperature"]) for name, task in json.loads(file.read_text()).items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AlterError(
            f"{file}: not a readable calibration ({error}); remove it, `alter test` makes it again."
        ) from error
