"""Which rows of a task are used: a limit's, or those of a K-shot split."""

from __future__ import annotations

import heapq
import json
from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from alter.data.files import Row
from alter.data.sources import stable_fraction
from alter.data.task import Task
from alter.errors import AlterError

Rows = dict[float, int]  # by random key
MEASURED = 13  # the seed by which a limit draws validation and test rows, whatever that of the run
MAX_MESSAGES = 5


def drawn(rows: Any, most: int | None) -> Any:
    """At most so many rows of a data set, always the same; None for all. At random, since files have their classes in some order."""
    if not most or most >= len(rows):
        return rows
    return rows.select(sorted(heapq.nsmallest(most, range(len(rows)), lambda n: stable_fraction(f"{MEASURED}:{n}"))))


def limited_rows(task: Task, split: str, seed: int) -> Iterator[tuple[int, Row]]:
    """The split's rows, or ``limit`` of them drawn by seed; a second pass keeps memory flat.

    Rows to measure on are the same for every seed, so that seeds differ by what was learnt alone.
    """
    limit = task.limit.get(split)
    seed = seed if split == "train" else MEASURED
    rows = task.opened.numbered(split)
    if limit is None:
        yield from rows
        return
    chosen = {n for _, n in heapq.nsmallest(limit, ((stable_fraction(f"{seed}:{n}"), n) for n, _ in rows))}
    yield from numbered_rows(task, split, chosen)


def numbered_rows(task: Task, split: str, numbers: Collection[int]) -> Iterator[tuple[int, Row]]:
    """The split's rows of these numbers, from 1, in their order."""
    return ((n, row) for n, row in task.opened.numbered(split) if n in numbers)


class Shots(NamedTuple):
    """A K-shot split.

    Attributes:
        train: numbers of training rows, from 1, to learn from.
        validation: of others to validate on.
        scarce: the classes that give fewer than 2 K rows, since they have no more or their groups leave no more.
    """

    train: set[int]
    validation: set[int]
    scarce: list[str]


def draw_shots(task: Task, shots: int, seed: int) -> Shots:
    """Draws a K-shot split: K training rows of each class to learn from, and K others of each to validate on.

    Both come from the training split, in place of any ``limit`` on train or validation; a task without choices is one
    class. Rows with the same prompt and target count once, so that none is on both sides; nor is any of a source's groups,
    half of which are on either side. The draw is a pure function of the rows, K and the seed. A class with fewer than 2 K
    rows is short on the side that validates, and only with K or fewer on the other too: it keeps one to validate on.
    Source: Gao et al. 2021 (LM-BFF), arXiv 2012.15723, section 3.

    Args:
        task: the task.
        shots: K.
        seed: of the draw.

    Raises:
        AlterError: a class has fewer than 2 different rows, or all of its groups on one side; or a row does not fit the task.
    """
    first: defaultdict[tuple[str, str], Rows] = defaultdict(dict)  # by class and side
    for number, row in task.opened.numbered("train"):
        place = f"train row {number}"
        prompt, target = task.render_prompt(row, place), task.render_target(row, place)
        group = task.opened.group_of(row)
        side = "either" if group is None else "train" if stable_fraction(f"side:{seed}:{group}") < 0.5 else "validation"
        key = target if task.choices else "", side
        rows = first[key]
        rows.setdefault(stable_fraction(f"{seed}:{json.dumps([prompt, target])}"), number)
        if len(rows) > 4 * shots:  # so that memory stays flat
            first[key] = dict(sorted(rows.items())[: 2 * shots])
    found, problems = Shots(set(), set(), []), []
    for label in task.choices or [""]:
        either, train, validation = (first[label, side] for side in ("either", "train", "validation"))
        learned, validated = _divided({**either, **train}, {**either, **validation}, shots)
        if not (learned and validated):
            what = f"{task.where}: task '{task.name}'{f', class {label!r}' if label else ''}"
            different = len(either.keys() | train.keys() | validation.keys())
            if different > 1:
                problems.append(
                    f"{what}: data.shots needs rows of one group to learn from and of another to validate on, and by data.seed "
                    f"{seed} all are on one side; add rows, take another seed or leave the task out."
                )
            else:
                problems.append(
                    f"{what}: data.shots needs 2 different training rows or more, one to learn from and one to validate on, and "
                    f"there are {different}; add rows or leave the task out."
                )
        found.train.update(learned.values())
        found.validation.update(validated.values())
        found.scarce.extend([label] if len(learned) + len(validated) < 2 * shots else [])
    if problems:
        raise AlterError(*problems[:MAX_MESSAGES])
    return found


def _divided(to_learn: Rows, to_validate: Rows, shots: int) -> tuple[Rows, Rows]:
    """At most ``shots`` rows of either side, none on both; of few as many as can be to learn from, but one to validate on."""
    both, own = to_learn.keys() & to_validate.keys(), to_validate.keys() - to_learn.keys()
    kept = max(0, min(shots - len(own), max(0 if own else 1, len(to_learn) - shots)))
    held = sorted(both)[len(both) - min(kept, len(both)) :]
    learned = dict(sorted((key, row) for key, row in to_learn.items() if key not in held)[:shots])
    return learned, dict(sorted((key, row) for key, row in to_validate.items() if key not in learned)[:shots])
