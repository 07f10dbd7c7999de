from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from alter.data import MixtureBatchSampler, eval_batches
from alter.data.sampler import in_turn

LENGTHS = [np.arange(5, 45), np.full(200, 12), np.random.default_rng(0).integers(3, 60, 900)]
RATES = np.array([0.2, 0.3, 0.5])


def make(**changes):
    return MixtureBatchSampler(
        **{"lengths": LENGTHS, "rates": RATES, "examples_per_epoch": 700, "max_tokens": 256, **changes}
    )


def flat(batches):
    return [pair for batch in batches for pair in batch]


def test_over_many_draws_the_tasks_come_at_their_rates_and_the_examples_evenly():
    rates = np.array([0.123, 0.345, 0.532])
    sampler = make(rates=rates, examples_per_epoch=1003)
    drawn = []
    for epoch in range(100):
        sampler.set_epoch(epoch)
        drawn += flat(sampler)
    assert len(drawn) == 100_300
    tasks = Counter(task for task, _ in drawn)
    assert chisquare([tasks[t] for t in range(3)], rates * len(drawn)).pvalue > 0.01
    for task, lengths in enumerate(LENGTHS):
        counts = Counter(example for t, example in drawn if t == task)
        assert max(counts.values()) - min(counts[i] for i in range(len(lengths))) <= 1  # without replacement


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 100), budget=st.integers(60, 600), epoch=st.integers(0, 3), mixed=st.booleans())
def test_batches_keep_the_budget_and_lose_nothing(seed, budget, epoch, mixed):
    sampler = make(seed=seed, max_tokens=budget, mixed=mixed)
    number = len(sampler)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler) == number
    if epoch > 0:
        budget *= 1.1  # by which an epoch may be packed tighter than the first
    for batch in batches:
        longest = max(LENGTHS[t][i] for t, i in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
        assert mixed or len({t for t, _ in batch}) == 1
    assert sorted(flat(batches)) == sorted(sampler.draws(epoch))


@settings(deadline=None, max_examples=200)
@given(number=st.integers(1, 400), start=st.floats(0, 1), data=st.data())
def test_any_few_that_follow_each_other_lie_over_the_whole_range(number, start, data):
    order = in_turn(number, start)
    assert sorted(order) == list(range(number))
    few = data.draw(st.integers(1, number))
    first = data.draw(st.integers(0, number - few))
    gaps = np.diff([-1, *sorted(order[first : first + few]), number])
    assert gaps.max() <= 2.2 * number / few + 2  # in a random order, some gap is about log(few) times the mean


def test_batches_that_follow_each_other_are_a_fair_draw_of_the_mixture():
    lengths = [np.full(500, 10), np.full(500, 20), np.full(500, 60)]  # each batch is of one task, but for two
    sampler = make(lengths=lengths, rates=np.full(3, 1 / 3), examples_per_epoch=1500, max_tokens=240)
    batches = list(sampler)
    share = np.array([500 * 10, 500 * 20, 500 * 60]) / 45000
    for start in range(len(batches) - 36):
        counts = np.bincount([task for task, _ in [b[0] for b in batches[start : start + 36]]], minlength=3)
        assert np.abs(counts / 36 - share).max() < 0.08


@settings(deadline=None, max_examples=60)
@given(draws=st.integers(1, 80), budget=st.sampled_from([1, 30, 60, 200, 10**9]), mixed=st.booleans(), data=st.data())
def test_every_epoch_has_as_many_batches_as_the_first(draws, budget, mixed, data):
    rates = np.array([0.01, 0.04, 0.95])
    asked = {"rates": rates, "examples_per_epoch": draws, "max_tokens": budget, "mixed": mixed}
    sampler = make(**asked, first_epoch=data.draw(st.integers(0, 3)))
    number = len(list(sampler))
    for epoch in range(1, 6):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == number
        assert all(batches)
        assert sorted(flat(batches)) == sorted(sampler.draws(sampler.epoch))


def test_padding_is_small():
    batches = list(make(examples_per_epoch=4000, max_tokens=512))
    tokens = sum(LENGTHS[t][i] for t, i in flat(batches))
    padded = sum(len(b) * max(LENGTHS[t][i] for t, i in b) for b in batches)
    assert 1 - tokens / padded < 0.05


def test_padding_is_small_where_prompt_and_target_are_padded_apart():
    rng = np.random.default_rng(0)
    lengths = [np.stack([rng.integers(5, 60, size), rng.integers(2, 40, size)], 1) for size in (3000, 5000, 9000)]
    batches = list(make(lengths=lengths, examples_per_epoch=16000, max_tokens=512))
    tokens = sum(lengths[t][i].sum() for t, i in flat(batches))
    padded = sum(len(b) * np.max([lengths[t][i] for t, i in b], axis=0).sum() for b in batches)
    assert 1 - tokens / padded < 0.05


def test_the_plan_is_a_pure_function_of_seed_and_epoch():
    first, second = make(), make()
    for epoch in (3, 1, 3, 0):
        first.set_epoch(epoch)
        list(first)
    second.set_epoch(0)
    assert list(first) == list(second)
    second.set_epoch(1)
    assert list(first) != list(second)
    assert list(make(seed=14)) != list(first)


@settings(deadline=None, max_examples=20)
@given(world=st.integers(2, 9), draws=st.integers(1, 700), budget=st.integers(60, 4000))
def test_ranks_share_every_example_once_and_take_equally_many_batches(world, draws, budget):
    asked = {"examples_per_epoch": draws, "max_tokens": budget}
    whole = list(make(**asked))
    shards = [list(make(rank=rank, world_size=world, **asked)) for rank in range(world)]
    assert len({len(shard) for shard in shards}) == 1
    taken = [batch for step in zip(*shards, strict=True) for batch in step]  # a step takes one of each rank
    counted = [batch for batch in taken if all(example >= 0 for _, example in batch)]
    assert counted == whole  # in the plan's own order, whatever the number of ranks
    company = taken[len(whole) :]
    assert len(company) < world
    assert all([(task, ~example) for task, example in batch] in whole for batch in company)


@pytest.mark.parametrize("start", [0, 1, 7])
def test_a_resumed_epoch_yields_just_the_rest(start):
    whole = list(make())
    resumed = make()
    resumed.resume(0, start)
    assert list(resumed) == whole[start:]
    for sampler in (resumed, whole_run := make()):
        sampler.set_epoch(1)
    assert list(resumed) == list(whole_run)  # the next epoch begins at its beginning


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(10, 200))
def test_evaluation_batches_hold_every_example_once_longest_first(lengths, budget):
    batches = eval_batches(lengths, budget)
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget for b in batches)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=60), st.integers(10, 200))
def test_evaluation_batches_keep_the_budget_of_prompt_and_target_padded_apart(lengths, budget):
    sizes = np.array(lengths).reshape(-1, 2)
    batches = eval_batches(sizes, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * sizes[b].max(0).sum() <= budget for b in batches)
