"""Experts against slow references written from their equations: one token, one expert at a time."""

import pytest
import torch
from torch import nn

from alter.nn.experts import Bottleneck, FFNCopy, HydraLoRA, LoRA, MTLLoRA
from alter.nn.feed_forward import FeedForward
from alter.nn.frozen import FrozenFeedForward
from alter.nn.routers import Routing
from tests.nn.tiny import assert_alike

D, H, E, T = 12, 20, 5, 3
ROUTING = Routing(torch.tensor([2, 0]))


class Block(nn.Module):
    """A feed-forward block, gated or not, with biases or not."""

    act = staticmethod(nn.functional.silu)

    def __init__(self, gated: bool, bias: bool) -> None:
        super().__init__()
        self.gated = gated
        self.up, self.down = nn.Linear(D, H, bias=bias), nn.Linear(H, D, bias=bias)
        if gated:
            self.gate = nn.Linear(D, H, bias=bias)

    def forward(self, x):
        return self.down(
            nn.functional.silu(self.gate(x)) * self.up(x) if self.gated else nn.functional.silu(self.up(x))
        )


def make(expert, gated=True, bias=False):
    torch.manual_seed(0)
    block = Block(gated, bias).requires_grad_(False)
    found = FeedForward(
        name="block",
        layer=0,
        stack="",
        index=0,
        inline=False,
        gate="gate" if gated else None,
        up="up",
        down="down",
        activation=nn.functional.silu,
        hidden_size=D,
        intermediate_size=H,
    )
    frozen = FrozenFeedForward(block, found, torch.float32)
    expert.build(frozen, E, T)
    for parameter in expert.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return block, frozen, expert


def change(expert, role, k, task):
    """What expert k adds to the weight [out, in] for this task, from the equations."""
    scale = 1.0 if expert.alpha is None else expert.alpha / expert.rank
    if isinstance(expert, LoRA):
        return scale * (expert.a[role][:, k] @ expert.b[role][k]).T
    middle = expert.task[role][task].T if isinstance(expert, MTLLoRA) else torch.eye(expert.rank)
    return scale * expert.b[role][k].T @ middle @ expert.a[role].T


def one_expert(block, expert, k, x, task):
    """A_k(x) or F_k(x) of one token [d], from the equations."""
    return one_mixture(block, expert, [float(i == k) for i in range(k + 1)], x, task)


def one_mixture(block, expert, gates, x, task):
    """e of one token: the blended block's output, or the gates' sum of each expert's."""

    def linear(role, v, k=None):
        module = getattr(block, role)
        bias = module.bias if module.bias is not None else 0
        if expert.blends_parameters:
            return (module.weight + sum(g * change(expert, role, i, task) for i, g in enumerate(gates))) @ v + bias
        return expert.weight[role][k].T @ v + (expert.bias[role][k] if role in expert.bias else 0)

    def whole(k=None):
        first = linear("up", x, k)
        return linear("down", block.act(linear("gate", x, k)) * first if block.gated else block.act(first), k)

    if expert.blends_parameters:
        return whole()
    if isinstance(expert, Bottleneck):
        each = [expert.up[k].T @ nn.functional.gelu(expert.down[:, k].T @ x) for k in range(len(gates))]
    else:
        each = [whole(k) for k in range(len(gates))]
    return sum(g * output for g, output in zip(gates, each, strict=True))


BLENDS = [lambda: LoRA(rank=3, alpha=6), lambda: HydraLoRA(rank=3, alpha=6), lambda: MTLLoRA(rank=3, alpha=6)]
KINDS = [lambda: Bottleneck(rank=3), FFNCopy, *BLENDS]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_equals_its_equation(kind, gated, bias):
    block, frozen, expert = make(kind(), gated, bias)
    x = torch.randn(2, 3, D)
    each = expert.each(x, frozen, ROUTING)
    assert each.shape == (2, 3, E, D)
    for b in range(2):
        for s in range(3):
            for k in range(E):
                expected = one_expert(block, expert, k, x[b, s], ROUTING.task_ids[b])
                torch.testing.assert_close(each[b, s, k], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("per_token", [True, False])
def test_a_mixture_of_outputs_is_the_weighted_sum_of_the_experts_forward_and_backward(kind, per_token):
    block, frozen, expert = make(kind(), bias=True)
    x = torch.randn(2, 3, D, requires_grad=True)
    gates = torch.rand(2, 3 if per_token else 1, E).softmax(-1).requires_grad_(True)
    mixed = expert.mix(x, gates, frozen, None, ROUTING)
    expected = torch.stack(
        [
            torch.stack([one_mixture(block, expert, gates[b, s if per_token else 0], x[b, s], None) for s in range(3)])
            for b in range(2)
        ]
    )
    wanted = [x, gates, *expert.parameters()]
    found, slow = ((y, *torch.autograd.grad(y.square().sum(), wanted)) for y in (mixed, expected))
    assert_alike(found, slow)


@pytest.mark.parametrize("kind", BLENDS)
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_mixture_of_low_rank_changes_blends_the_weights_forward_and_backward(kind, per_token, beams):
    block, frozen, expert = make(kind(), bias=True)
    rows = 2 * beams
    x = torch.randn(rows, 3, D, requires_grad=True)
    gates = torch.rand(rows, 3 if per_token else 1, E, requires_grad=True)
    mixed = expert.mix(x, gates, frozen, None, ROUTING)
    tasks = [2] * beams + [0] * beams

    def linear(role, v, g, task):
        module = getattr(block, role)
        return (module.weight + sum(g[k] * change(expert, role, k, task) for k in range(E))) @ v + module.bias

    expected = torch.empty(rows, 3, D)
    for b in range(rows):
        for s in range(3):
            g, v, task = gates[b, s if per_token else 0], x[b, s], tasks[b]
            inner = nn.functional.silu(linear("gate", v, g, task)) * linear("up", v, g, task)
            expected[b, s] = linear("down", inner, g, task)
    wanted = [x, gates, *expert.parameters()]
    found, slow = ((y, *torch.autograd.grad(y.square().sum(), wanted)) for y in (mixed, expected))
    assert_alike(found, slow)


@pytest.mark.parametrize("active", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_sparse_copies_equal_dense_ones_forward_and_backward(active, bias):
    _, frozen, expert = make(FFNCopy(), bias=bias)
    x = torch.randn(4, 6, D, requires_grad=True)
    scores = torch.rand(4, 6, E)
    gates = torch.zeros_like(scores).scatter(-1, scores.topk(active).indices, scores.topk(active).values)
    gates.requires_grad_()
    results = []
    for setting in (None, active):
        output = expert.mix(x, gates, frozen, setting, ROUTING)
        wanted = [x, *expert.parameters()]
        results.append((output, *torch.autograd.grad(output.square().sum(), wanted)))
    assert_alike(*results)


@pytest.mark.parametrize("expert", [Bottleneck(rank=3), LoRA(rank=3, alpha=5)], ids=["Bottleneck", "LoRA"])
@pytest.mark.parametrize("active", [1, 2])
@pytest.mark.parametrize("seq", [1, 6])
def test_gathered_experts_equal_dense_ones_forward_and_backward(expert, active, seq):
    _, frozen, expert = make(expert)
    for parameter in expert.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x = torch.randn(4, seq, D, requires_grad=True)
    scores = torch.rand(4, 1, E)
    gates = torch.zeros_like(scores).scatter(-1, scores.topk(active).indices, scores.topk(active).values)
    gates.requires_grad_()
    results = []
    for setting in (None, active):
        output = expert.mix(x, gates, frozen, setting, ROUTING)
        wanted = [x, *expert.parameters()]
        results.append((output, *torch.autograd.grad(output.square().sum(), wanted)))
    assert_alike(*results)


@pytest.mark.parametrize("gated", [True, False])
def test_fresh_experts_start_as_the_frozen_block(gated):
    torch.manual_seed(0)
    block = Block(gated, True).requires_grad_(False)
    found = FeedForward("b", 0, "", 0, False, "gate" if gated else None, "up", "down", nn.functional.silu, D, H)
    frozen = FrozenFeedForward(block, found, torch.float32)
    x, gates = torch.randn(2, 3, D), torch.rand(2, 3, E).softmax(-1)
    bottleneck, copy, *changes = Bottleneck(), FFNCopy(), LoRA(), HydraLoRA(), MTLLoRA()
    for expert in (bottleneck, copy, *changes):
        expert.build(frozen, E, T)
    lora, *sharing = changes
    assert torch.equal(lora.mix(x, gates, frozen, None, ROUTING), block(x))
    for expert in sharing:
        torch.testing.assert_close(expert.mix(x, gates, frozen, None, ROUTING), block(x), atol=2e-3, rtol=1e-2)
        alike = torch.full_like(gates, 1 / E)
        torch.testing.assert_close(expert.mix(x, alike, frozen, None, ROUTING), block(x), atol=1e-6, rtol=1e-5)
    assert torch.equal(bottleneck.mix(x, gates, frozen, None, ROUTING), torch.zeros_like(x))
    torch.testing.assert_close(copy.mix(x, gates, frozen, None, ROUTING), block(x), atol=1e-5, rtol=1e-5)


def test_a_template_describes_itself_and_its_copies_are_apart():
    expert = LoRA(rank=7, alpha=3.5)
    assert expert.describe() == {"class_path": "alter.nn.LoRA", "init_args": {"rank": 7, "alpha": 3.5}}
    _, _, built = make(expert.fresh())
    assert list(built.parameters())
    assert not list(expert.parameters())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "expert",
    [Bottleneck(rank=4), LoRA(rank=3), HydraLoRA(rank=3), MTLLoRA(rank=3), FFNCopy()],
    ids=lambda e: type(e).__name__,
)
def test_a_share_of_strengthened_experts_is_what_all_was(expert, bias):
    """Exactly where they add to what a map gives: here to the last one alone."""
    _, frozen, expert = make(expert, bias=bias)
    for parts in ("a", "b", "weight", "bias"):
        for role in ("gate", "up"):
            if role in getattr(expert, parts, {}):  # as the frozen map
                part = getattr(expert, parts)[role]
                linear = frozen.module(role)
                part.data.copy_({"weight": linear.weight.t(), "bias": linear.bias}.get(parts, torch.zeros(())))
    x = torch.randn(2, 6, D)
    plain = frozen.run(x, frozen.linear).unsqueeze(-2) if expert.contains_ffn else 0.0
    before = expert.each(x, frozen, ROUTING) - plain
    expert.strengthen(4.0, frozen)
    torch.testing.assert_close((expert.each(x, frozen, ROUTING) - plain) / 4, before, atol=1e-5, rtol=1e-4)
