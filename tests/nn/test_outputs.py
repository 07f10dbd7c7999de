"""Outputs that are not made whole against those that are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from alter.nn.experts import Bottleneck, LoRA
from alter.nn.outputs import Outputs
from alter.nn.routers import Routing
from tests.nn.test_experts import D, E, make
from tests.nn.tiny import assert_alike

ROUTING = Routing(torch.tensor([2, 0]))


def outputs_of(bias=False, tokens=40):
    """A mixture and five experts of one block, whole and not."""
    _, frozen, experts = make(LoRA(rank=3, alpha=5.0), bias=bias)
    x = torch.randn(2, tokens, D)
    gates = torch.rand(2, 1, E)
    once = frozen.reading(x)
    mixed = experts.mixed_outputs(x, gates, once, None, ROUTING)
    kept = Outputs.beside([mixed, experts.own_outputs(x, once, ROUTING)])
    mix = experts.mix(x, gates, frozen, None, ROUTING)
    whole = torch.cat([mix.unsqueeze(-2), experts.each(x, frozen, ROUTING)], -2)
    return kept, Outputs(whole.movedim(2, 0)), experts


@settings(max_examples=20, deadline=None)
@given(bias=st.booleans(), tokens=st.sampled_from([1, 3, 40]), units=st.integers(1, 9), own_bias=st.booleans())
def test_what_is_read_and_weighted_is_that_of_the_whole(bias, tokens, units, own_bias):
    kept, whole, experts = outputs_of(bias, tokens)
    linear = nn.Linear((1 + E) * D, units, bias=own_bias)
    weights = torch.rand(2, tokens, 1 + E)  # of no particular sum
    parameters = [*experts.parameters(), *linear.parameters()]
    found = [[outputs.read(linear), outputs.weighted(weights)] for outputs in (kept, whole)]
    gradients = [torch.autograd.grad(read.square().sum() + mixed.square().sum(), parameters) for read, mixed in found]
    assert_alike(*found)
    assert_alike(*gradients, near=1e-4)  # one of few units is a small difference of large sums
    torch.testing.assert_close(kept.whole(), whole.whole(), atol=1e-5, rtol=1e-5)


def test_a_map_is_applied_once():
    """The first maps to every token once, and of many tokens the last one to their weighted sum alone."""
    block, frozen, experts = make(LoRA(rank=3))
    rows = []
    for name, linear in block.named_modules():
        linear.register_forward_hook(lambda _, args, __, name=name: rows.append((name, args[0][..., 0].numel())))
    x = torch.randn(2, 40, D)
    once = frozen.reading(x)
    gates = torch.rand(2, 1, E)
    kept = Outputs.beside([experts.mixed_outputs(x, gates, once, None, ROUTING), experts.own_outputs(x, once, ROUTING)])
    kept.read(nn.Linear((1 + E) * D, 4))
    kept.weighted(torch.rand(2, 40, 1 + E))
    assert sorted(rows) == [("down", 80), ("gate", 80), ("up", 80)]


def test_of_few_tokens_every_output_is_made_at_once():
    block, frozen, experts = make(LoRA(rank=3))
    rows = []
    block.down.register_forward_hook(lambda _, args, __: rows.append(args[0][..., 0].numel()))
    x = torch.randn(2, 2, D)
    kept = experts.own_outputs(x, frozen, ROUTING)
    kept.read(nn.Linear(E * D, 64))
    kept.weighted(torch.rand(2, 2, E))
    assert rows == [4 * E]


def test_experts_of_other_kinds_stand_beside_each_other():
    _, frozen, lora = make(LoRA(rank=3))
    _, _, bottleneck = make(Bottleneck(rank=3))
    x = torch.randn(2, 40, D)
    both = Outputs.beside([lora.own_outputs(x, frozen, ROUTING), bottleneck.own_outputs(x, frozen, ROUTING)])
    expected = torch.cat([lora.each(x, frozen, ROUTING), bottleneck.each(x, frozen, ROUTING)], -2)
    torch.testing.assert_close(both.whole(), expected)
    linear = nn.Linear(2 * E * D, 3)
    torch.testing.assert_close(both.read(linear), linear(expected.flatten(-2)))


def test_a_quantised_last_map_is_not_read_through(monkeypatch):
    kept, whole, _ = outputs_of()
    monkeypatch.setattr("alter.nn.outputs.plain_weight", lambda linear: None)
    linear = nn.Linear((1 + E) * D, 2)
    torch.testing.assert_close(kept.read(linear), whole.read(linear), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("other", [torch.randn(2, 40, D), None])
def test_another_input_is_not_taken_for_the_one_that_was_read(other):
    _, frozen, _ = make(LoRA(rank=3))
    x = torch.randn(2, 40, D)
    other = x + 1 if other is None else other
    once = frozen.reading(x)
    once.inner(x, once.linear)
    assert torch.equal(once.inner(other, once.linear), frozen.inner(other, frozen.linear))


def test_what_is_read_is_multiplied_once_for_all_experts():
    _, frozen, _ = make(LoRA(rank=3))
    x = torch.randn(2, 40, D)
    calls = []
    frozen.module("up").register_forward_hook(lambda *_: calls.append(1))
    once = frozen.reading(x)
    assert torch.equal(once.linear("up", x), once.linear("up", x))
    assert len(calls) == 1
    frozen.linear("up", x)
    assert len(calls) == 2
