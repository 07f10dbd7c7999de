"""Tokens on disk: each task is encoded once into Arrow files and read from there, memory-mapped."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from alter.data.draw import MAX_MESSAGES, draw_shots, limited_rows, numbered_rows
from alter.data.files import Row, writable
from alter.data.sources import SPLITS, Fields, Source
from alter.data.task import Task
from alter.errors import AlterError
from alter.writing import made_whole

VERSION = 9  # raise whenever the same task would be encoded differently
CHUNK = 1000
Item = TypeVar("Item")


def encode_task(task: Task, tokenizer: Any, seq2seq: bool, cache: Path, seed: int, shots: int | None = None) -> Path:
    """Encodes all splits of a task, or finds them encoded before.

    Args:
        task: the task.
        tokenizer: of the backbone.
        seq2seq: whether the backbone has an encoder.
        cache: folder of all encoded tasks.
        seed: of the training rows that ``limit`` draws, and of ``shots``.
        shots: K, to learn from few training rows alone: see ``draw_shots``; None for all.

    Returns:
        the folder with one data set a split and ``stats.json``.

    Raises:
        AlterError: with the first mistakes found in the rows, or too few of them for ``shots``; nothing is kept then.
    """
    folder = cache / f"{task.name}-{_fingerprint(task, tokenizer, seq2seq, seed, shots)}"
    if (folder / "stats.json").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "stats.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)  # without its last file
            with made_whole(folder) as beside:
                _encode(task, tokenizer, seq2seq, beside, seed, shots)
    return folder


def _encode(task: Task, tokenizer: Any, seq2seq: bool, folder: Path, seed: int, shots: int | None) -> None:
    import datasets

    if task.choices:
        _require_unlike_choices(task, tokenizer, seq2seq)
    features = datasets.Features(
        {
            "prompt_ids": datasets.List(datasets.Value("int32")),
            "target_ids": datasets.List(datasets.Value("int32")),
            "choice": datasets.Value("int32"),
            "prompt": datasets.Value("string"),
            "input": datasets.Value("string"),  # the row's part that the prompt names, as JSON
            "target": datasets.Value("string"),
        }
    )
    stats, problems = {}, list[str]()
    few = draw_shots(task, shots, seed) if shots is not None else None
    drawn = {"train": few.train, "validation": few.validation} if few else {}
    for split in SPLITS:
        origin = "train" if split in drawn else split
        rows = numbered_rows(task, origin, drawn[split]) if split in drawn else limited_rows(task, split, seed)
        encoder = _Encoder(task, tokenizer, seq2seq, origin)
        (folder / split).mkdir(parents=True)
        writer = datasets.arrow_writer.ArrowWriter(path=str(folder / split / "data.arrow"), features=features)
        try:
            with writer:
                for chunk in batched(rows, CHUNK):
                    if examples := list(encoder.encode(chunk)):
                        writer.write_batch({name: [example[name] for example in examples] for name in features})
                encoder.finish()
                writer.finalize()
        except AlterError as error:
            problems += [message for message in error.messages if message not in problems]  # of what splits share
        stats[split] = encoder.stats
    if problems:
        raise AlterError(*problems)
    if few:
        stats["train"]["scarce"] = len(few.scarce)
    (folder / "stats.json").write_text(json.dumps(stats, indent=2))


class _Encoder:
    """Encodes one split in chunks, counts, and collects the rows' mistakes."""

    def __init__(self, task: Task, tokenizer: Any, seq2seq: bool, split: str) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self.seq2seq = seq2seq
        self.split = split
        self.problems: dict[str, tuple[str, int]] = {}  # what is wrong: its first sentence, and of how many rows
        counted = ("rows", "truncated", "cut_targets", "several_lines", "unknown_signs", "tokens", "longest")
        self.stats = dict.fromkeys(counted, 0)

    def encode(self, rows: Sequence[tuple[int, Row]]) -> Iterator[dict[str, Any]]:
        good = []
        for number, row in rows:
            place = f"{self.split} row {number}"
            try:
                good.append((row, self.task.render_prompt(row, place), self.task.render_target(row, place), place))
            except AlterError as error:
                self._add(error, place)
        if not good:
            return
        prompts = prompt_ids([prompt for _, prompt, _, _ in good], self.tokenizer, self.seq2seq)
        targets = target_ids([target for _, _, target, _ in good], self.tokenizer, self.seq2seq)
        for (row, prompt, target, place), read, wanted in zip(good, prompts, targets, strict=True):
            try:
                if len(wanted) > self.task.max_target_tokens and self.task.truncate_target:
                    # Without eos: an answer that is cut here has not ended. The text stays whole for the metrics.
                    wanted = wanted[: self.task.max_target_tokens]
                    self.stats["cut_targets"] += 1
                elif len(wanted) > self.task.max_target_tokens:
                    raise AlterError(
                        f"{self.task.where}: task '{self.task.name}', {place}: the target has {len(wanted)} tokens, more than "
                        f"max_target_tokens {self.task.max_target_tokens}; raise it, shorten the target or set truncate_target: true."
                    )
                if len(read) > self.task.max_prompt_tokens:
                    prompt, read = shorten(self.task, row, self.tokenizer, self.seq2seq, place)
                    self.stats["truncated"] += 1
                _require_some(read, self.task, place)
            except AlterError as error:
                self._add(error, place)
                continue
            size = len(read) + len(wanted)
            self.stats["rows"] += 1
            self.stats["several_lines"] += "\n" in target
            if not self.task.choices:  # one of which is the answer, whatever its tokens
                text = wanted[:-1]  # before eos, which is often the same token
                self.stats["unknown_signs"] += self.tokenizer.unk_token_id in text
            self.stats["tokens"] += size
            self.stats["longest"] = max(self.stats["longest"], size)
            yield {
                "prompt_ids": read,
                "target_ids": wanted,
                "choice": self.task.choices.index(target) if self.task.choices else -1,
                "prompt": prompt,
                "input": writable(json.dumps(self.task.inputs(row), ensure_ascii=False, default=str)),
                "target": target,
            }

    def finish(self) -> None:
        """Raises what was wrong with the rows, or that there were none."""
        if self.problems:
            raise AlterError(
                *(f"{told} So it is in {n:,} rows." if n > 1 else told for told, n in self.problems.values())
            )
        if not self.stats["rows"]:
            raise AlterError(
                f"{self.task.where}: task '{self.task.name}', key 'source': the {self.split} split has no rows; name a file or "
                "split that has some, or raise its share of the training rows."
            )

    def _add(self, error: AlterError, place: str) -> None:
        for message in error.messages:
            told, count = self.problems.get(message.replace(place, ""), (message, 0))
            self.problems[message.replace(place, "")] = told, count + 1
        if len(self.problems) >= MAX_MESSAGES:
            self.finish()


def prompt_ids(texts: list[str], tokenizer: Any, seq2seq: bool) -> list[list[int]]:
    """Token ids of prompts: with what the tokenizer puts in front; ending in eos for an encoder, never for a decoder."""
    ids = tokenizer([writable(text) for text in texts]).input_ids
    end = tokenizer.eos_token_id
    if seq2seq:
        return [row if row[-1:] == [end] else [*row, end] for row in ids]
    return [row[:-1] if row[-1:] == [end] and len(row) > 1 else row for row in ids]


def target_ids(texts: list[str], tokenizer: Any, seq2seq: bool) -> list[list[int]]:
    """Token ids of targets, ending in eos. A decoder's continues its prompt, hence the space."""
    spaced = [writable(text if seq2seq else f" {text}") for text in texts]
    return [[*row, tokenizer.eos_token_id] for row in tokenizer(spaced, add_special_tokens=False).input_ids]


def _require_some(ids: list[int], task: Task, place: str) -> None:
    """Without a token there is no position to predict the answer from; some tokenizers put one in front of every text."""
    if not ids:
        raise AlterError(
            f"{task.where}: task '{task.name}', {place}: the prompt is empty; remove the row, or write something beside the "
            "field into the key 'prompt'."
        )


def encode_choices(task: Task, tokenizer: Any, seq2seq: bool) -> list[list[int]]:
    """Token ids of each choice, just as of a row's target."""
    return target_ids(list(task.choices or []), tokenizer, seq2seq)


def _require_unlike_choices(task: Task, tokenizer: Any, seq2seq: bool) -> None:
    """Choices of the same tokens would be equally likely for ever; some vocabularies lack signs such as ≥."""
    seen: dict[tuple[int, ...], str] = {}
    for choice, ids in zip(task.choices or (), encode_choices(task, tokenizer, seq2seq), strict=True):
        other = seen.setdefault(tuple(ids), choice)
        if other != choice:
            raise AlterError(
                f"{task.where}: task '{task.name}', key 'choices': '{other}' and '{choice}' are the same tokens to this backbone, "
                "whose vocabulary lacks a sign of theirs; write them in other words, also in the key 'target'."
            )


def encode_prompt(task: Task, row: Fields, tokenizer: Any, seq2seq: bool, place: str = "the row") -> list[int]:
    """Token ids of one row's prompt, shortened where it is too long.

    Raises:
        AlterError: the row lacks a field, is empty, or cannot be shortened.
    """
    ids = prompt_ids([task.render_prompt(row, place)], tokenizer, seq2seq)[0]
    if len(ids) > task.max_prompt_tokens:
        ids = shorten(task, row, tokenizer, seq2seq, place)[1]
    _require_some(ids, task, place)
    return ids


def shorten(task: Task, row: Fields, tokenizer: Any, seq2seq: bool, place: str) -> tuple[str, list[int]]:
    """Cuts the end of the field that the task names, a text or a list, until the prompt fits; nothing else of it changes.

    Raises:
        AlterError: the task names no field, or the rest alone does not fit.
    """
    name = f"{task.where}: task '{task.name}', {place}"
    limit = task.max_prompt_tokens
    if task.truncate is None or task.truncate not in row:
        raise AlterError(
            f"{name}: the prompt has more than max_prompt_tokens {limit} tokens and the key 'truncate' names "
            f"{'no field' if task.truncate is None else repr(task.truncate) + ', which the row does not have'}; "
            "name the field to shorten, or raise max_prompt_tokens."
        )
    field = row[task.truncate]
    if isinstance(field, Mapping):
        raise AlterError(
            f"{name}: the prompt has more than max_prompt_tokens {limit} tokens and the key 'truncate' names '{task.truncate}', which "
            "has parts of its own; name a field that is a text or a list of words, or raise max_prompt_tokens."
        )
    whole = list(field) if isinstance(field, (list, tuple)) else str(field)
    ends = range(1, len(whole) + 1) if isinstance(whole, list) else _token_ends(whole, tokenizer)
    low, high = 0, len(ends)  # the most of the field that fits; tokens at the seam may merge, so search
    best: tuple[str, list[int]] | None = None
    while low <= high:
        middle = (low + high) // 2
        prompt = task.render_prompt({**row, task.truncate: whole[: ends[middle - 1] if middle else 0]}, place)
        ids = prompt_ids([prompt], tokenizer, seq2seq)[0]
        if len(ids) <= limit:
            best, low = (prompt, ids), middle + 1
        else:
            high = middle - 1
    if best is None:
        raise AlterError(
            f"{name}: the prompt is longer than max_prompt_tokens {limit} even without its field '{task.truncate}'; "
            "raise max_prompt_tokens."
        )
    return best


def _token_ends(text: str, tokenizer: Any) -> list[int]:
    """The character behind each token; of a tokenizer in Python, which does not tell, behind each character."""
    if not tokenizer.is_fast:
        return list(range(1, len(text) + 1))
    offsets = tokenizer(writable(text), add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    return [end for _, end in offsets]


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of up to ``size`` items."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _fingerprint(task: Task, tokenizer: Any, seq2seq: bool, seed: int, shots: int | None) -> str:
    plain = {
        key: value
        for key, value in task.to_dict().items()
        if key not in ("where", "weight", "metrics", "license", "shots")
    }
    parts = [VERSION, plain, task.opened.fingerprint(), _tokenization(tokenizer), tokenizer.eos_token_id, seq2seq, seed]
    parts += [] if shots is None else [f"{shots} shots"]
    parts += [*_own_code(task), *_own_code(task.opened)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def _own_code(made: Task | Source) -> Iterator[str]:
    """The modules of a class and its base classes that are not ALTER's, which may make other prompts or rows of the same settings."""
    for kind in type(made).__mro__:
        if kind.__module__.partition(".")[0] not in ("alter", "abc", "builtins", "typing"):
            yield kind.__qualname__
            with suppress(OSError, TypeError):  # typed into a shell
                yield inspect.getsource(sys.modules[kind.__module__])


@lru_cache(maxsize=1)  # most of the time of finding a task that is encoded; a mixture's tasks have one tokenizer
def _tokenization(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()
