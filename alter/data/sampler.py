"""Which examples make up each batch: a pure function of seed, epoch, rank and step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

Pair = tuple[int, int]  # task, example
WINDOW = 16384  # examples sorted by length together: large enough for little padding


class MixtureBatchSampler(Sampler[list[Pair]]):
    """Draws tasks at their rates and packs examples of like length into batches of a token budget.

    An epoch draws ``examples_per_epoch`` examples. Each task's share is its rate exactly, up to rounding at random; its
    examples come without replacement, in a new order for every pass over the task, and the next epoch goes on where this
    one ended. Nothing is remembered: what earlier epochs drew is computed again from the seed, so a resumed run and every
    rank see the same plan.

    Examples of one length are mostly of one task, so batches of every length take turns (see ``in_turn``): the few that
    an optimizer accumulates, or that its averages remember, are then a fair draw of the mixture.

    Every epoch has as many batches as the first: a trainer counts them once, and plans its validations and its learning
    rate by that count. Where the drawn examples would fill fewer, the largest batches are halved; where they would fill
    more, the budget grows by percents until they fit.

    Args:
        lengths: for each task the tokens of its examples, as ``eval_batches`` takes them.
        rates: for each task its share of the draws.
        examples_per_epoch: draws an epoch.
        max_tokens: of a batch, padding counted; a longer example makes a batch by itself. Kept exactly in the first epoch.
        seed: of the draws.
        rank: this process; it takes every ``world_size``-th batch, see ``share_out``.
        world_size: number of processes.
        mixed: whether a batch mixes tasks.
        first_epoch: epochs drawn before, by an earlier stage; this one goes on after them.
    """

    def __init__(
        self,
        lengths: Sequence[np.ndarray],
        rates: np.ndarray,
        examples_per_epoch: int,
        max_tokens: int,
        seed: int = 13,
        rank: int = 0,
        world_size: int = 1,
        mixed: bool = True,
        first_epoch: int = 0,
    ) -> None:
        self.lengths = [np.asarray(task_lengths) for task_lengths in lengths]
        self.rates = np.asarray(rates, dtype=float)
        self.examples_per_epoch = examples_per_epoch
        self.max_tokens = max_tokens
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.mixed = mixed
        self.epoch = self.first_epoch = first_epoch
        self._resumed = (first_epoch, 0)  # epoch, batches of it that were taken before
        self._planned: tuple[int, list[list[Pair]]] | None = None
        self._number: int | None = None  # of batches an epoch, over all ranks

    @property
    def sampler(self) -> MixtureBatchSampler:
        """Itself: where Lightning looks for ``set_epoch`` of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of this stage; Lightning calls it before each."""
        self.epoch = self.first_epoch + epoch

    def resume(self, epoch: int, taken: int) -> None:
        """Goes on in an epoch of which some batches were taken before, or in the next where all were."""
        self.set_epoch(epoch)
        if taken >= len(self):
            self.set_epoch(epoch + 1)
            taken = 0
        self._resumed = (self.epoch, taken)

    def __iter__(self) -> Iterator[list[Pair]]:
        epoch, taken = self._resumed
        yield from self._own_batches()[taken if epoch == self.epoch else 0 :]

    def __len__(self) -> int:
        return len(self._own_batches())

    def counts(self, epoch: int) -> np.ndarray:
        """How many examples of each task an epoch draws, [tasks], summing to ``examples_per_epoch``."""
        expected = self.rates * self.examples_per_epoch
        counts = np.floor(expected).astype(int)
        rest = expected - counts
        missing = self.examples_per_epoch - counts.sum()
        if missing:  # systematic sampling: each task gets its remainder with just that probability
            point = self._rng(epoch, "counts").random()
            counts += np.diff(np.floor(np.concatenate([[0], rest.cumsum().round(9)]) + point)).astype(int)
        return counts

    def draws(self, epoch: int) -> list[Pair]:
        """The epoch's examples, in shuffled order."""
        before = sum((self.counts(e) for e in range(epoch)), np.zeros(len(self.rates), dtype=int))
        pairs = [
            (task, int(example))
            for task, count in enumerate(self.counts(epoch))
            for example in self._examples(task, before[task], count)
        ]
        order = self._rng(epoch, "order").permutation(len(pairs))
        return [pairs[i] for i in order]

    def _examples(self, task: int, start: int, count: int) -> np.ndarray:
        """Draws number ``start`` to ``start + count`` of a task, one permutation after another."""
        size = len(self.lengths[task])
        passes = range(start // size, (start + count - 1) // size + 1) if count else []
        drawn = [self._rng(task, "pass", number).permutation(size) for number in passes]
        return np.concatenate([*drawn, np.empty(0, dtype=int)])[start % size :][:count]

    def _own_batches(self) -> list[list[Pair]]:
        if self._planned is None or self._planned[0] != self.epoch:
            self._planned = (self.epoch, share_out(self._batches(self.epoch), self.rank, self.world_size))
        return self._planned[1]

    def _batches(self, epoch: int) -> list[list[Pair]]:
        budget = self.max_tokens
        batches = self._packed(epoch, budget)
        if self._number is None:
            first = batches if epoch == self.first_epoch else self._packed(self.first_epoch, budget)
            self._number = max(len(first), self._fewest())
        while len(batches) > self._number:
            budget += max(1, budget // 100)
            batches = self._packed(epoch, budget)
        while len(batches) < self._number:
            largest = max(range(len(batches)), key=lambda i: len(batches[i]))
            half = len(batches[largest]) // 2
            batches[largest : largest + 1] = [batches[largest][:half], batches[largest][half:]]
        return [batches[i] for i in in_turn(len(batches), self._rng(epoch, "batches").random())]

    def _fewest(self) -> int:
        """Batches that no budget could bring an epoch below, for a task may get one draw more than in the first."""
        if self.mixed:
            return 1
        most = np.floor(self.rates * self.examples_per_epoch) + 1
        return min(self.examples_per_epoch, int(np.ceil(most / WINDOW).sum()))

    def _packed(self, epoch: int, max_tokens: int) -> list[list[Pair]]:
        draws = self.draws(epoch)
        groups = [draws] if self.mixed else [[p for p in draws if p[0] == task] for task in range(len(self.rates))]
        batches = []
        for group in groups:
            for start in range(0, len(group), WINDOW):
                window = group[start : start + WINDOW]
                lengths = np.array([self.lengths[task][example] for task, example in window])
                batches += [[window[i] for i in rows] for rows in eval_batches(lengths, max_tokens)]
        return batches

    def _rng(self, *key: int | str) -> np.random.Generator:
        numbers = [part if isinstance(part, int) else int.from_bytes(part.encode(), "big") for part in key]
        return np.random.default_rng([self.seed, *numbers])


def in_turn(number: int, start: float) -> np.ndarray:
    """An order of ``number`` sorted things in which any few that follow each other lie evenly over the whole range.

    The golden ratio's multiples, modulo 1, leave no large gap after any number of them (the three-distance theorem); a
    random order would.

    Args:
        number: how many things.
        start: where the order starts, from 0 to 1.

    Returns:
        a permutation, [number].
    """
    places = (start + np.arange(number) * (5**0.5 - 1) / 2) % 1
    return places.argsort().argsort()


def share_out(batches: Sequence[Sequence[Pair]], rank: int, world_size: int) -> list[list[Pair]]:
    """Every ``world_size``-th batch, as many for each rank, since they step together.

    Where batches do not come out even, the last ranks get the first batches again for company: their examples are numbered
    ``~example``, below zero, and must not count.
    """
    short = -len(batches) % world_size
    company = [[(task, ~example) for task, example in batches[i % len(batches)]] for i in range(short)]
    return [*map(list, batches), *company][rank::world_size]


def eval_batches(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[list[int]]:
    """Packs every example once, sorted by length.

    Where prompt and target are padded apart, as for an encoder and a decoder, examples are divided by the target's length
    into strips of as many tokens each, and sorted by the prompt's within a strip, so that both are alike in a batch.

    Args:
        lengths: tokens of each example, [examples]; or of prompt and target where they are padded apart, [examples, 2].
        max_tokens: of a batch, padding counted; a longer example makes a batch by itself.

    Returns:
        the examples' indices, batch by batch; for one length each, the longest first.
    """
    sizes = np.asarray(lengths)
    sizes = sizes[:, None] if sizes.ndim == 1 else sizes
    if sizes.shape[1] == 1:
        strips = [np.arange(len(sizes))]
    else:
        order = np.argsort(-sizes[:, 1], kind="stable")
        tokens = sizes[order].sum(1).cumsum()
        count = max(1, round((tokens.max(initial=0) / max_tokens) ** 0.5))  # square in the two lengths
        strips = np.split(order, np.searchsorted(tokens, tokens.max(initial=0) * np.arange(1, count) / count))
    batches = []
    for strip in strips:
        batches += _pack(strip[np.argsort(-sizes[strip, 0], kind="stable")].tolist(), sizes, max_tokens)
    return batches


def _pack(order: Sequence[int], sizes: np.ndarray, max_tokens: int) -> list[list[int]]:
    """Fills batches in this order."""
    batches: list[list[int]] = []
    longest: list[int] = []
    # Numbers of Python, since arrays of one or two take ten times as long.
    for index, size in zip(order, sizes[order].tolist(), strict=True):
        grown = list(map(max, longest, size))
        if batches and (len(batches[-1]) + 1) * sum(grown) <= max_tokens:
            batches[-1].append(index)
            longest = grown
        else:
            batches.append([index])
            longest = size
    return batches
