"""Routers against references written from their equations."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alter.nn.routers import RouterShape, Routing, SharedGate, TaskGate, TaskSelector, TokenGate

T, E, D, P = 3, 4, 6, 5
PRIOR = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.6, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
SOFT = [TaskSelector, TokenGate, TaskGate, SharedGate]


def build(router, noise=0.0):
    torch.manual_seed(0)
    router.build(RouterShape(T, E, D, PRIOR, prompt_size=P))
    for parameter in router.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return router


@pytest.mark.parametrize("kind", [TaskSelector, TaskGate])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_task_routers_start_at_the_prior_of_the_task(kind, temperature):
    router = build(kind(temperature))
    tasks = torch.tensor([2, 0, 1])
    gates = router(torch.randn(3, 5, D), Routing(tasks)).expand(3, 5, E)
    torch.testing.assert_close(gates, PRIOR[tasks].unsqueeze(1).expand(3, 5, E))


@pytest.mark.parametrize("kind", [TokenGate, SharedGate])
def test_token_routers_start_at_the_mean_of_the_logarithms_of_the_mean_prior(kind):
    gates = build(kind())(torch.randn(2, 5, D), Routing(torch.tensor([0, 1])))
    torch.testing.assert_close(gates, PRIOR.mean(0).expand(2, 5, E))


@pytest.mark.parametrize("kind", SOFT)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 4), length=st.integers(1, 5))
def test_gates_are_a_distribution_of_the_right_shape(kind, seed, rows, length):
    router = build(kind(), noise=1.0)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, D, generator=generator)
    gates = router(x, Routing(torch.randint(T, (rows,), generator=generator)))
    assert gates.shape in {(rows, length, E), (rows, 1, E)}
    assert (gates >= 0).all()
    torch.testing.assert_close(gates.sum(-1), torch.ones(gates.shape[:-1]))


def test_task_gate_equals_its_equation():
    router = build(TaskGate(temperature=0.5), noise=1.0)
    x, tasks = torch.randn(3, 4, D), torch.tensor([1, 2, 1])
    gates = router(x, Routing(tasks))
    for b in range(3):
        for s in range(4):
            logits = (x[b, s] @ router.weight[tasks[b]] + router.bias[tasks[b]]) / 0.5
            torch.testing.assert_close(gates[b, s], logits.exp() / logits.exp().sum())


def test_shared_gate_equals_its_equation():
    router = build(SharedGate(hidden=5), noise=1.0)
    x = torch.randn(2, 3, D)
    gates = router(x, Routing(torch.tensor([0, 0])))
    for b in range(2):
        for s in range(3):
            inner = (router.inner.weight @ x[b, s] + router.inner.bias).clamp_min(0)
            logits = router.outer.weight @ inner + router.outer.bias
            torch.testing.assert_close(gates[b, s], logits.exp() / logits.exp().sum())


def test_a_hard_selector_takes_the_likeliest_expert_alone_and_learns_nothing():
    router = build(TaskSelector(hard=True))
    gates = router(torch.randn(2, 5, D), Routing(torch.tensor([1, 0])))
    assert gates.squeeze(1).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert router.active == 1
    assert not any(parameter.requires_grad for parameter in router.parameters())


def test_rows_of_one_example_stand_together():
    assert Routing(torch.tensor([5, 7])).rows(6).tolist() == [5, 5, 5, 7, 7, 7]
