"""The files that ``alter init`` writes, and what it says."""

from __future__ import annotations

import json
import os
import re
import shlex
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import yaml

from alter import terminal
from alter.data.files import Row, is_chat, read_chats, read_file
from alter.data.sources import SPLITS, Files
from alter.data.task import AUTO
from alter.errors import AlterError, did_you_mean
from alter.init.columns import NO_ANSWER, read_columns
from alter.init.guess import TaskGuess, guess_task

SPLIT_NAMES = {"train": "train", "training": "train", "dev": "validation", "valid": "validation"}
SPLIT_NAMES |= {"val": "validation", "validation": "validation", "test": "test", "eval": "test"}
SHARE = 0.1  # of the rows, for a split without a file; twice that of few rows
FEWEST, FEW = 20, 400
DEFAULT_SEED = 13
SAMPLE = 300
LIMIT = {"validation": 200, "test": 500}  # rows that are enough to choose by, and to measure within a few points
WIDTH = 110  # of the files


@dataclass
class Proposal:
    """A task with the files it reads.

    Attributes:
        name: of the task.
        guess: what it is.
        files: a file for each split that has one of its own; ``train`` always.
        arguments: of its source.
        rows: of each split.
    """

    name: str
    guess: TaskGuess
    files: dict[str, Path]
    arguments: dict[str, Any]
    rows: dict[str, int]


def init(folder: Path, files: Sequence[Path], backbone: str, answer: str | None = None) -> str:
    """Proposes a task for every file, or for files that are named as splits of one, and writes tasks and a recipe.

    Args:
        folder: for the recipe and its tasks; made where it does not exist.
        files: CSV, TSV, JSONL, Parquet or Excel.
        backbone: that the recipe names.
        answer: the column to learn, of the files that have it; elsewhere it is guessed.

    Returns:
        what was guessed, for the terminal.

    Raises:
        AlterError: with the mistakes of all files, or a file to write is there already; nothing is written then.
    """
    recipe = folder / "recipe.yaml"
    proposals, problems = [], list[str]()
    for name, parts in _by_task(files).items():
        try:
            proposals.append(_propose(name, parts, answer))
        except AlterError as error:
            problems += error.messages
    if answer is not None and not problems and all(proposal.guess.target.name != answer for proposal in proposals):
        names = {column.name for proposal in proposals for column in [proposal.guess.target, *proposal.guess.inputs]}
        problems.append(f"--answer: no file has a column '{answer}'.{did_you_mean(answer, names)}")
    targets = [recipe, *(folder / "tasks" / f"{proposal.name}.yaml" for proposal in proposals)]
    problems += [f"{file}: is there already; name another folder, or remove it." for file in targets if file.exists()]
    if problems:
        raise AlterError(*problems)
    texts = [_recipe_text(proposals, recipe, backbone), *(_task_text(p, folder / "tasks") for p in proposals)]
    try:
        for file, text in zip(targets, texts, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AlterError(f"{folder}: cannot be written ({error.strerror}); name another folder.") from error
    said = [line for proposal in proposals for line in [*_said(proposal), ""]]
    return "\n".join(
        [
            *said,
            f"Written: {recipe}",
            *(f"         {file}" for file in targets[1:]),
            "Correct there what is guessed wrong.",
            "",
            f"Next: alter doctor --config {shlex.quote(str(recipe))}",
            f"      alter fit --config {shlex.quote(str(recipe))}",
        ]
    )


def _by_task(files: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """Files by task and split; ``x.train.csv`` and ``x.test.csv``, or ``x/train.csv``, are splits of a task x."""
    tasks: dict[str, dict[str, Path]] = {}
    for file in files:
        words = _words(file.stem)
        # of intents_train and train_intents; not of blood_test_notes
        at = next((place for place in (-1, 0) if words and words[place] in SPLIT_NAMES), None)
        split = None if at is None else SPLIT_NAMES[words.pop(at)]
        name = "_".join(words or _words(file.resolve().parent.name))
        name = "auto_task" if name == AUTO else name  # which no task may be called
        parts = tasks.setdefault(name or "task", {})
        if (split or "train") in parts:
            raise AlterError(
                f"{file}: its task and split ({name}, {split or 'train'}) are also those of {parts[split or 'train']}; "
                "rename one of them."
            )
        parts[split or "train"] = file
    return tasks


def _words(text: str) -> list[str]:
    """The words of a file's name, in any script."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFC", text).lower())


def _propose(name: str, files: dict[str, Path], answer: str | None) -> Proposal:
    starts = {split: next(read_file(file), {}) for split, file in files.items()}  # no file is told as that first
    if "train" not in files:
        split, file = next(iter(files.items()))
        raise AlterError(
            f"{file}: by its name these are the {split} rows of a task '{name}', and there is no file of its training rows; add "
            "one, or rename this."
        )
    chat = next((column for column, value in starts["train"].items() if is_chat(value)), None)

    def read(file: Path) -> Iterator[Row]:
        return read_file(file) if chat is None else read_chats(file, chat)

    columns, rows = read_columns(chain.from_iterable(map(read, files.values())))
    if rows < FEWEST:
        raise AlterError(f"{files['train']}: {rows} rows are too few to train and to test on; give {FEWEST} or more.")
    guess = guess_task(columns, rows, str(files["train"]), islice(read(files["train"]), SAMPLE), answer)
    given = {split: str(file.resolve()) for split, file in files.items()}
    share = SHARE if rows >= FEW else 2 * SHARE
    arguments: dict[str, Any] = {split: given.get(split, share) for split in SPLITS}
    if chat is not None:
        arguments["chat"] = chat
    groups = [guess.group] if len(files) < len(SPLITS) else [None]
    if isinstance(groups[0], list):
        groups.append(None)  # of a few values each, which make few pairs
    for group in groups:
        grouped = {**arguments, "group": group} if group else arguments
        for seed in range(DEFAULT_SEED, DEFAULT_SEED + 20):  # by chance a share of a few rows is empty
            source = Files(**grouped, seed=seed)
            sizes = {split: sum(1 for _ in source.rows(split)) for split in SPLITS}
            if min(sizes.values()):
                return Proposal(name, guess, files, {**grouped, "seed": seed}, sizes)
    raise AlterError(
        f"{files['train']}: no split of its rows leaves some for each of {', '.join(SPLITS)}"
        f"{f' with equal {guess.group} on one side' if isinstance(guess.group, str) else ''}; add rows, or files of their own."
    )


# -- texts ------------------------------------------------------------------------------------------------------------


def _said(proposal: Proposal) -> list[str]:
    """A task's guesses, a line each."""
    guess = proposal.guess
    inputs = ", ".join(f"{c.name} ({c.mean:.0f} characters on average)" for c in guess.inputs)
    facts = {"reads": inputs, "answers": f"{guess.target.name} ({guess.reason})"}
    if guess.target.answers:
        facts["answers"] += f", of its texts the first; {NO_ANSWER} where there is none"
    if "chat" in proposal.arguments:
        facts["chat"] = f"each role of {proposal.arguments['chat']} is a column of its own"
    if guess.choices:
        counts = [f"{choice} {guess.target.values[choice]:,}" for choice in guess.choices]
        shown = ", ".join(counts[:8]) + (f" and {len(counts) - 8} more" if len(counts) > 8 else "")
        facts["choices"] = f"{len(counts)}: {shown}"
        if alike := _alike(guess.choices):
            facts["alike"] = f"{' and '.join(alike)} may be one answer in two spellings"
    shares = [split for split in SPLITS if split not in proposal.files]
    if len(shares) == 1:
        origin = f"{shares[0]} a share of train drawn by a seed, {next(s for s in SPLITS[1:] if s not in shares)} as its file has it"
    else:
        origin = "shares drawn by a seed" if shares else "files of their own"
    facts["rows"] = " / ".join(f"{proposal.rows[split]:,} {split}" for split in SPLITS) + f" ({origin})"
    if "group" in proposal.arguments:
        facts["together"] = f"rows of the same {_names(proposal.arguments['group'])} stay in one split"
        if len(shares) == 1:
            facts["together"] += f" where {proposal.files['train'].name} is divided"
        if guess.ungrouped:
            facts["together"] += f"; {guess.ungrouped:,} rows have none"
    facts |= {f"not {name}": reason for name, reason in guess.left_out.items()}
    lines = [f"{proposal.name}: {guess.kind}, from {', '.join(map(str, proposal.files.values()))}"]
    width = max(map(len, facts)) + 2
    for label, fact in facts.items():
        first = f"  {label:<{width}}"
        lines += textwrap.wrap(fact, terminal.width(), initial_indent=first, subsequent_indent=" " * len(first))
    return lines


def _alike(choices: Sequence[str]) -> list[str]:
    """The first choices that differ by case, blanks, how a letter or a number is written, or the words for yes and no alone."""
    by_meaning: dict[str, list[str]] = {}
    for choice in choices:
        plain = " ".join(unicodedata.normalize("NFC", choice.casefold()).split())
        plain = re.sub(r"^(-?\d+)\.0+$", r"\1", plain)
        by_meaning.setdefault({"true": "yes", "false": "no"}.get(plain, plain), []).append(choice)
    return next((names for names in by_meaning.values() if len(names) > 1), [])


def _names(group: str | list[str]) -> str:
    return group if isinstance(group, str) else " and ".join(group)


def _task_text(proposal: Proposal, folder: Path) -> str:
    guess = proposal.guess
    arguments = dict(proposal.arguments)
    for split, file in proposal.files.items():
        arguments[split] = Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()
    if arguments["seed"] == DEFAULT_SEED or len(proposal.files) == len(SPLITS):
        del arguments["seed"]
    prompt = textwrap.indent(guess.prompt, "  ")
    lines = [
        f"# {guess.kind.capitalize()}: {_line(guess.target.name)}, from {', '.join(_line(c.name) for c in guess.inputs)}. "
        "Guessed by alter init; every line may be changed.",
        f"name: {_inline(proposal.name)}",  # 2024 or yes in quotes
        "source:",
        "  class_path: Files",
        f"  init_args: {_inline(arguments)}",
        f"prompt: |\n{prompt}",
        f"target: {json.dumps(guess.answer, ensure_ascii=False)}",
    ]
    if guess.choices:
        lines += [_wrapped("choices", guess.choices)]
    if guess.metrics:
        lines += [f"metrics: {_inline(guess.metrics)}"]
    lines += [
        f"truncate: {_inline(guess.longest_input.name)}  # what is shortened where a prompt is too long",
        f"max_prompt_tokens: {guess.max_prompt_tokens}",
        f"max_target_tokens: {guess.max_target_tokens}",
    ]
    if not guess.choices:
        lines += ["truncate_target: true  # a longer answer is learned from as far as it fits"]
    limit = {split: most for split, most in LIMIT.items() if proposal.rows[split] > most}
    if limit:
        lines += [f"limit: {_inline(limit)}  # of many rows, to be tested in minutes"]
    return "\n".join(lines) + "\n"


RECIPE = """\
# {about}
#
#   alter doctor --config {file}    looks at the data and the machine first
#   alter fit --config {file}
#
# Any field is a flag too (--stage2.model.router.hidden 32); --print_config shows them all, with comments.
run: {run}
seed_everything: 13
backbone: {backbone}   # a hub id, a folder, or the bundled name smollm2-135m
precision: auto              # of the frozen backbone: bf16 where the machine is fast in it, else fp32; or int8, nf4

data:
  tasks:
{tasks}
  temperature: 2             # a task's rate ~ weight * size^(1/temperature): 1 proportional, large equal
  examples_per_epoch: {examples}   # draws; {rows} training rows in all
  max_tokens: {tokens}            # of a batch, padding counted; its rows are of like length

trainer:
  accelerator: auto          # a GPU where there is one
  max_epochs: 1
  accumulate_grad_batches: 2 # so that a step takes batches of different lengths, and of different tasks
  gradient_clip_val: 1.0
  val_check_interval: 0.5    # validates twice an epoch; the best checkpoint is kept
  num_sanity_val_steps: 0
  log_every_n_steps: 10

stage1:                      # intra-task: one expert a task, mixed by the task's selector
  model:
    init_args:
      layers: last:40%         # of the blocks, in each stack; all learns more and takes longer
      expert: {{class_path: alter.nn.LoRA, init_args: {{rank: 16, alpha: 64}}}}
      own: 0.5                 # a task's own expert at the start; the others help from the first step
      optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 2.0e-3, weight_decay: 0.0}}}}
      schedule: constant       # stage 2 goes on at this rate and lets it fall
  trainer:
    limit_train_batches: 0.4   # of the epoch's batches: stage 2 has most of them

stage2:                      # inter-task: shared experts and their gate join
  model:
    init_args:
      expert: {{class_path: alter.nn.LoRA, init_args: {{rank: 16, alpha: 32}}}}
      num_shared: 2
      keep: 0.8                # the task experts' share at the start
      task_expert_lr: 1.0      # they go on learning
      router: {{class_path: alter.nn.SharedGate, init_args: {{hidden: 16}}}}
      optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 2.0e-3, weight_decay: 0.0}}}}
  trainer:
    limit_train_batches: 0.9
"""


def _recipe_text(proposals: Sequence[Proposal], file: Path, backbone: str) -> str:
    rows = sum(proposal.rows["train"] for proposal in proposals)
    names = ", ".join(proposal.name for proposal in proposals)
    return RECIPE.format(
        about=f"One small language model for {names}; proposed by alter init.",
        file=file,
        run=_inline(f"runs/{file.resolve().parent.name}"),
        backbone=_inline(backbone),
        tasks="\n".join(f"    - tasks/{proposal.name}.yaml" for proposal in proposals),
        examples=min(16_000, max(600, 3 * rows)),
        tokens=min(1024, max(256, *(proposal.guess.max_example_tokens for proposal in proposals))),
        rows=f"{rows:,}",
    )


def _line(name: str) -> str:
    """A column's name for a comment; a sheet's may have several lines."""
    return " ".join(name.split())


def _inline(value: Any) -> str:
    """YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.strip().removesuffix("...").strip()


def _wrapped(key: str, values: Sequence[str]) -> str:
    text = f"{key}: {_inline(list(values))}"
    if len(text) <= WIDTH:
        return text
    lines = [""]
    for item in (f"{_inline([value])[1:-1]}," for value in values):  # a value that is broken reads with one blank there
        lines[-1:] = [f"{lines[-1]} {item}".strip()] if len(lines[-1]) + len(item) < WIDTH else [lines[-1], item]
    return f"{key}:\n  [\n" + "\n".join(f"    {line}" for line in lines if line) + "\n  ]"
