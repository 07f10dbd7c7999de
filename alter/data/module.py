"""The mixture of tasks as a LightningDataModule."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from alter.data.collate import Collator
from alter.data.encode import encode_task
from alter.data.loader import make_loader
from alter.data.mixture import mixture_rates, rate_problems
from alter.data.sampler import MixtureBatchSampler, Pair, eval_batches, in_turn, share_out
from alter.data.sources import SPLITS
from alter.data.task import Task, limit_problems, load_tasks
from alter.errors import AlterError
from alter.home import alter_home
from alter.terminal import columns


class MultiTaskDataModule(LightningDataModule):
    """Merges tasks, drawn at rates ``weight * min(n, K) ** (1 / T)``, into batches of a token budget.

    Attributes:
        first_epoch: epochs that an earlier stage has drawn; training goes on with draws of its own after them.

    Args:
        tasks: paths of task files, relative to the recipe, or tasks written out.
        tokenizer: folder of the backbone's tokenizer, set by the run.
        seq2seq: whether the backbone has an encoder, set by the run.
        temperature: T of the rates; 1 draws in proportion to size, large draws all tasks alike.
        cap: K of the rates, the size above which a task counts as no larger.
        examples_per_epoch: draws an epoch; by default as many as there are training rows, each capped at K.
        max_tokens: of a training batch, padding counted.
        eval_max_tokens: of a validation batch.
        mixed_batches: whether a batch mixes tasks.
        num_workers: processes that load batches.
        seed: of the mixture, of the training rows that limits draw, and of shots.
        shots: K, to learn from K training rows of each class (of a task without choices: K rows), and to validate on K
            others, as LM-BFF does; the test split stays as it is. By default all rows.
        limit: most rows of a split of every task, drawn by the seed, where the task's own limit is not lower:
            ``{validation: 100, test: 200}`` for a quick trial.
        cache_dir: for encoded tasks; by default ``tokens`` in ALTER's cache folder.
        root: folder that the paths of data files start from, for recipes that leave it to the user; by default each
            task file's own.
    """

    def __init__(
        self,
        tasks: list[Any] | None = None,
        tokenizer: str = "",
        seq2seq: bool = False,
        temperature: float = 2.0,
        cap: int | None = None,
        examples_per_epoch: int | None = None,
        max_tokens: int = 4096,
        eval_max_tokens: int = 2048,
        mixed_batches: bool = True,
        num_workers: int = 0,
        seed: int = 13,
        cache_dir: str | None = None,
        root: str | None = None,
        shots: int | None = None,
        limit: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.seq2seq = seq2seq
        self.temperature = temperature
        self.cap = cap
        self.examples_per_epoch = examples_per_epoch
        self.max_tokens = max_tokens
        self.eval_max_tokens = eval_max_tokens
        self.mixed_batches = mixed_batches
        self.num_workers = num_workers
        self.seed = seed
        self.shots = shots
        self.limit = limit
        if problems := list(data_problems(vars(self))):
            raise AlterError(*problems)
        self.tasks: list[Task] = [
            _limited(task, limit or {}) for task in load_tasks(tasks or [], Path(root or "."), root)
        ]
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else alter_home() / "tokens"
        self.first_epoch = 0
        self._resumed = (0, 0)  # epoch, batches taken of it
        self._folders: dict[str, Path] = {}
        self._splits: dict[tuple[str, str], Any] = {}

    # -- preparing --------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Encodes what is not encoded yet.

        Raises:
            AlterError: with the mistakes found in the rows of all tasks.
        """
        if len(self._folders) == len(self.tasks):
            return
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        problems: list[str] = []
        for task in self.tasks:
            try:
                self._folders[task.name] = encode_task(
                    task, tokenizer, self.seq2seq, self.cache_dir, self.seed, task.shots or self.shots
                )
            except AlterError as error:
                problems += error.messages
        if problems:
            self._folders.clear()
            raise AlterError(*problems)

    def setup(self, stage: str | None = None) -> None:
        """Opens the encoded tasks; on a process that did not prepare them, finds them first."""
        import datasets

        self._resumed = (0, 0)
        self.prepare_data()
        if self._splits:
            return
        for task in self.tasks:
            for split in SPLITS:
                file = self._folders[task.name] / split / "data.arrow"
                self._splits[task.name, split] = datasets.Dataset.from_file(str(file))

    # -- facts ------------------------------------------------------------------------------------------------------

    def examples(self, task: str, split: str) -> Any:
        """The encoded examples of a task's split, a memory-mapped ``datasets.Dataset``."""
        return self._splits[task, split]

    def digest(self) -> str:
        """Tells whether two mixtures have the same examples, wherever their files lie: a SHA-256 in hexadecimal."""
        import pyarrow.compute

        found = hashlib.sha256()
        for task, split in itertools.product(self.tasks, SPLITS):
            for column in ("prompt_ids", "target_ids"):
                ids = self.examples(task.name, split).data[column]
                for numbers in (pyarrow.compute.list_value_length(ids), pyarrow.compute.list_flatten(ids)):
                    found.update(numbers.to_numpy().tobytes())
        return found.hexdigest()

    @property
    def sizes(self) -> list[int]:
        """Training rows of each task."""
        return [len(self.examples(task.name, "train")) for task in self.tasks]

    @property
    def rates(self) -> np.ndarray:
        """Each task's share of the draws."""
        return mixture_rates(self.sizes, self.temperature, self.cap, [task.weight for task in self.tasks])

    def statistics(self, task: str) -> dict[str, dict[str, int]]:
        """Rows, truncated prompts, targets of several lines, tokens and the longest example of each split."""
        return json.loads((self._folders[task] / "stats.json").read_text())

    def drawn_tokens(self, epochs: int) -> tuple[int, int]:
        """Tokens of the prompts and of the targets that training for some epochs and validation read, each once, about."""
        draws = self.rates * self.draws * max(epochs, 1)
        total = np.zeros(2)
        for task, drawn in zip(self.tasks, draws, strict=True):
            train, validation = (
                example_lengths(self.examples(task.name, split), True) for split in ("train", "validation")
            )
            total += min(1.0, drawn / len(train)) * train.sum(0) + validation.sum(0)
        prompts, targets = total.round().astype(int).tolist()
        return prompts, targets

    @property
    def draws(self) -> int:
        """Training examples drawn an epoch."""
        return self.examples_per_epoch or int(sum(min(size, self.cap or size) for size in self.sizes))

    def mixture(self) -> dict[str, Any]:
        """What is drawn from, for a run's notes: each task's kind, share of the draws and rows, and the draws an epoch."""
        tasks = {
            task.name: {
                "kind": task.kind,
                "rate": rate,
                **{split: facts["rows"] for split, facts in self.statistics(task.name).items()},
            }
            for task, rate in zip(self.tasks, self.rates.tolist(), strict=True)
        }
        return {"mixture": tasks, "draws": self.draws}

    def summary(self) -> str:
        """A table of the tasks: sizes, rate, tokens, shortened prompts; below it, what an epoch and a batch are."""
        lines = [["task", "kind", "train", "valid.", "test", "rate", "tokens/row", "cut"]]
        cut, cut_targets, several_lines, unknown_signs, scarce = 0, 0, 0, 0, list[str]()
        for task, rate in zip(self.tasks, self.rates, strict=True):
            stats = self.statistics(task.name)
            rows = [stats[split]["rows"] for split in SPLITS]
            shortened = sum(stats[split]["truncated"] for split in SPLITS)
            cut += shortened
            cut_targets += sum(stats[split]["cut_targets"] for split in SPLITS)
            several_lines += sum(stats[split]["several_lines"] for split in SPLITS)
            unknown_signs += sum(stats[split]["unknown_signs"] for split in SPLITS)
            if few := stats["train"].get("scarce"):
                scarce.append(f"{task.name} ({few})")
            numbers = [*(f"{n:,}" for n in rows), f"{rate:.1%}", f"{stats['train']['tokens'] / rows[0]:.1f}"]
            lines.append([task.name, task.kind, *numbers, f"{shortened:,}"])
        table = columns(lines, right=range(2, 8))
        notes = [
            f"rate: share of the {self.draws:,} draws an epoch, at temperature {self.temperature:g}",
            f"batch: up to {self.max_tokens:,} tokens on each process, padding counted, "
            + ("tasks mixed" if self.mixed_batches else "of one task"),
        ]
        if cut:
            notes.append("cut: rows whose prompt is longer than max_prompt_tokens and was shortened")
        if cut_targets:
            notes.append(
                f"targets: {cut_targets:,} are longer than max_target_tokens, and learned and answered as far\n"
                "         as they fit"
            )
        if several_lines:
            notes.append(
                f"lines: {several_lines:,} targets have several, and an answer ends with its first;\n"
                "       write them on one, such as {{ text | replace('\\n', ' ') }}"
            )
        if unknown_signs:
            notes.append(
                f"signs: {unknown_signs:,} targets have signs that the backbone's vocabulary lacks, so that no answer has them;\n"
                "       write others; alter doctor shows a target"
            )
        if scarce:
            classes = ", ".join(scarce)
            notes.append(
                f"scarce: classes that cannot give 2 x {self.shots or 'shots'} different rows, by number or by group, give what they "
                f"have: {classes}"
            )
        return "\n".join([table, *notes])

    # -- loading ----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the mixture, each process its own share; a resumed epoch goes on after its last batch."""
        rank, world = self._place()
        lengths = [example_lengths(self.examples(task.name, "train"), self.seq2seq) for task in self.tasks]
        sampler = MixtureBatchSampler(
            lengths,
            self.rates,
            self.draws,
            self.max_tokens,
            self.seed,
            rank,
            world,
            self.mixed_batches,
            self.first_epoch,
        )
        sampler.resume(*self._resumed)
        return self._loader("train", sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        """Every validation example once, in batches of like length, shared out over the processes.

        Batches of every length take turns, as in training, so that a part of them is a part of every task.
        """
        rank, world = self._place()
        pairs, lengths = [], []
        for index, task in enumerate(self.tasks):
            own = example_lengths(self.examples(task.name, "validation"), self.seq2seq)
            pairs += [(index, row) for row in range(len(own))]
            lengths += own.tolist()
        sorted_batches = eval_batches(lengths, self.eval_max_tokens)
        batches = [[pairs[i] for i in sorted_batches[place]] for place in in_turn(len(sorted_batches), 0.0)]
        return self._loader("validation", share_out(batches, rank, world))

    def state_dict(self) -> dict[str, int]:
        """Where a checkpoint stands in the data. Lightning's own counts come back only after it has made the loader."""
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        epoch, taken = self.trainer.current_epoch, progress.current.processed
        if taken >= self.trainer.num_training_batches:  # which a limit may have lowered, so that the sampler has more
            epoch, taken = epoch + 1, 0
        return {"epoch": epoch, "taken": taken * self.trainer.world_size}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Lets the next training loader go on there, also on another number of processes."""
        assert self.trainer is not None
        self._resumed = (state_dict["epoch"], state_dict["taken"] // self.trainer.world_size)

    @property
    def taken(self) -> int:
        """Batches of the epoch that this process had taken, or its share, where a checkpoint was loaded that is within one."""
        return self._resumed[1]

    def _loader(self, split: str, batches: Any) -> DataLoader[Any]:
        dataset = _Mixture([self.examples(task.name, split) for task in self.tasks])
        return make_loader(dataset, batches, Collator(self._pad, self.seq2seq), self.num_workers)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def data_problems(settings: Mapping[str, Any]) -> Iterator[str]:
    """What is out of its range in a recipe's ``data``, or in the same arguments of the data module."""
    yield from rate_problems(settings["temperature"], settings["cap"])
    for key in ("examples_per_epoch", "max_tokens", "eval_max_tokens"):
        if settings[key] is not None and settings[key] < 1:
            yield f"data.{key}: {settings[key]} is below 1; give a positive number."
    if settings["num_workers"] < 0:
        yield f"data.num_workers: {settings['num_workers']} is below 0; give 0 for no process of their own, or more."
    if settings["seed"] < 0:
        yield f"data.seed: {settings['seed']} is below 0; give a number from 0 on."
    if settings["shots"] is not None and settings["shots"] < 1:
        yield f"data.shots: {settings['shots']} is below 1; give how many rows of a class to learn from, such as 16."
    yield from limit_problems(settings["limit"] or {}, "data.limit")


def _limited(task: Task, limit: Mapping[str, int]) -> Task:
    """The task with no more rows of a split than the mixture's own limit."""
    if not limit:
        return task
    lower = {split: min(rows, task.limit.get(split, rows)) for split, rows in limit.items()}
    return replace(task, limit={**task.limit, **lower})


class _Mixture(Dataset[dict[str, Any]]):
    """All tasks' examples of one split, by task and row."""

    def __init__(self, tasks: Sequence[Any]) -> None:
        self.tasks = [task.select_columns(["prompt_ids", "target_ids"]) for task in tasks]

    def __getitem__(self, pair: Pair) -> dict[str, Any]:
        task, row = pair
        company = row < 0  # see share_out
        return {**self.tasks[task][~row if company else row], "task_id": task, "company": company}

    def __len__(self) -> int:
        return sum(map(len, self.tasks))


def example_lengths(examples: Any, apart: bool) -> np.ndarray:
    """Tokens of each example, or of its prompt and its target; read from Arrow's offsets without making lists."""
    import pyarrow.compute

    parts = [
        pyarrow.compute.list_value_length(examples.data[f"{name}_ids"]).to_numpy() for name in ("prompt", "target")
    ]
    return np.stack(parts, axis=1) if apart else sum(parts)
