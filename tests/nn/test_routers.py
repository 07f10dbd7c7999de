"""Routers against references written from their equations."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alter.errors import AlterError
from alter.nn.routers import (
    AdjacentSelector,
    Description,
    FirstPositionGate,
    ModSquad,
    MOELoRA,
    Polytropon,
    RouterShape,
    Routing,
    SharedGate,
    TaskGate,
    TaskSelector,
    TokenGate,
    TopK,
)

T, E, D, P = 3, 4, 6, 5
PRIOR = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.6, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
ALL = [TaskSelector, TokenGate, TaskGate, SharedGate, TopK, ModSquad, Polytropon, MOELoRA, Description]


def build(router, noise=0.0, prior=PRIOR, own=None):
    torch.manual_seed(0)
    router.check()
    own = torch.arange(len(prior)) % prior.shape[1] if own is None else own
    router.build(RouterShape(*prior.shape, D, prior, own, prompt_size=P))
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


@pytest.mark.parametrize("kind", [*ALL, AdjacentSelector, FirstPositionGate, partial(MOELoRA, embedding_size=1)])
def test_routers_say_whether_they_start_at_their_prior(kind):
    """Stage 2 makes up for the share that a gate leaves to the task experts where it does."""
    prior = PRIOR[1:2].repeat(T, 1)
    router = build(kind(), prior=prior).eval()
    tasks = torch.arange(T).repeat(40)
    gates = router(torch.randn(len(tasks), 5, D), Routing(tasks, prompt=torch.randn(len(tasks), P)))
    starts = torch.allclose(gates.mean((0, 1)), router.first_gates(prior)[0], atol=0.05)
    assert starts == router.starts_at_prior


@pytest.mark.parametrize("kind", [*ALL, AdjacentSelector, FirstPositionGate])
def test_routers_say_whether_they_read_the_task(kind):
    router = build(kind(), noise=1.0).eval()
    x, prompt = torch.randn(1, 5, D), torch.randn(1, P)
    first, second = (router(x, Routing(torch.tensor([task]), prompt=prompt)) for task in (0, 1))
    assert torch.equal(first, second) != router.reads_task


@pytest.mark.parametrize("kind", [MOELoRA, Polytropon, ModSquad])
def test_other_routers_that_know_the_task_start_at_its_prior_too(kind):
    router = build(kind(k=E) if kind is ModSquad else kind()).eval()
    tasks = torch.tensor([2, 0, 1])
    gates = router(torch.randn(3, 5, D), Routing(tasks)).expand(3, 5, E)
    torch.testing.assert_close(
        gates, PRIOR[tasks].unsqueeze(1).expand(3, 5, E), atol=0.1 if kind is ModSquad else 1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("router", "near"),
    [(SharedGate(), 1e-6), (TokenGate(), 1e-6), (TokenGate(0.1), 1e-6), (TopK(k=E), 0.1), (Description(), 0.1)],
)
def test_routers_that_do_not_know_the_task_start_at_the_mean_prior(router, near):
    routing = Routing(torch.tensor([0, 1]), prompt=torch.randn(2, P))
    gates = build(router).eval()(torch.randn(2, 5, D), routing).expand(2, 5, E)
    torch.testing.assert_close(gates, PRIOR.mean(0).expand(2, 5, E), atol=near, rtol=0)


@pytest.mark.parametrize("kind", ALL)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 4), length=st.integers(1, 5), training=st.booleans())
def test_gates_are_a_distribution_of_the_right_shape(kind, seed, rows, length, training):
    router = build(kind(), noise=1.0).train(training)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, D, generator=generator)
    routing = Routing(torch.randint(T, (rows,), generator=generator), prompt=torch.randn(rows, P, generator=generator))
    gates = router(x, routing)
    assert gates.shape in {(rows, length, E), (rows, 1, E)}
    assert (gates >= 0).all()
    assert router.normalised
    torch.testing.assert_close(gates.sum(-1), torch.ones(gates.shape[:-1]))
    if router.active is not None:
        assert ((gates > 0).sum(-1) <= router.active).all()
    if not router.training:
        assert torch.equal(gates, router(x, routing))  # no noise in answers


def test_a_shared_gate_decides_alike_however_large_what_it_reads_is():
    router = build(SharedGate(hidden=5), noise=1.0)
    torch.nn.init.zeros_(router.inner.bias)
    x = torch.randn(2, 3, D)
    routing = Routing(torch.tensor([0, 0]))
    torch.testing.assert_close(router(1000 * x, routing), router(x, routing), atol=1e-3, rtol=1e-3)


def test_a_hard_selector_takes_the_tasks_own_expert_alone_and_learns_nothing():
    router = build(TaskSelector(hard=True))
    gates = router(torch.randn(2, 5, D), Routing(torch.tensor([1, 0])))
    assert gates.squeeze(1).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert router.active == 1
    assert not any(parameter.requires_grad for parameter in router.parameters())


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("make", [lambda k: TopK(k=k), lambda k: ModSquad(k=k), lambda k: TaskSelector(hard=k == 1)])
def test_the_first_gates_are_those_that_a_new_router_gives(make, k):
    router = build(make(k), prior=PRIOR[:1]).eval()
    gates = router(torch.zeros(1, 1, D), Routing(torch.tensor([0])))  # a state that the gates' small weights don't see
    torch.testing.assert_close(gates.flatten(), make(k).first_gates(PRIOR[0]), atol=1e-5, rtol=0)


def test_fixed_gates_need_no_parameter():
    class Fixed(TaskSelector):
        def build(self, shape):
            self.register_buffer("gates", shape.prior.clone())

        def forward(self, hidden_states, routing):
            return self.gates[routing.rows(hidden_states.shape[0])].unsqueeze(1)

    torch.testing.assert_close(build(Fixed()).task_gates(1), PRIOR[1])


def test_arguments_that_are_handed_on_to_a_base_class_are_described_too():
    class Sharp(TopK):
        def __init__(self, sharpen=1.0, **kwargs):
            super().__init__(**kwargs)
            self.sharpen = sharpen

    class One(TopK):
        def __init__(self, **kwargs):
            super().__init__(k=1, **kwargs)

    for router, expected in (
        (Sharp(k=1, noise=0.5), {"sharpen": 1.0, "k": 1, "noise": 0.5}),
        (Sharp(2.0), {"sharpen": 2.0}),
        (One(noise=0.5), {"noise": 0.5}),
    ):
        given = router.fresh().describe()["init_args"]
        assert given == expected
        made = type(router)(**given)
        assert (made.k, made.noise) == (router.k, router.noise)


def test_rows_of_one_example_stand_together():
    routing = Routing(torch.tensor([5, 7]), prompt=torch.tensor([[1.0], [2.0]]))
    assert routing.rows(6).tolist() == [5, 5, 5, 7, 7, 7]
    assert routing.prompt_rows(4).tolist() == [[1.0], [1.0], [2.0], [2.0]]


# -- gates, losses and their gradients against loops -------------------------------------------------------------------

TASKS = torch.tensor([1, 2, 1])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)


def softmax(logits):
    powers = [math.e**value for value in logits]
    return torch.stack([power / sum(powers) for power in powers])


def largest(p, k):
    kept = sorted(range(E), key=lambda e: -p[e].item())[:k]
    return torch.stack([p[e] / sum(p[i] for i in kept) if e in kept else 0 * p[e] for e in range(E)])


def run(router, x, mask=MASK, tasks=TASKS, prompt=None):
    """Gates and the loss of one forward pass that trains."""
    routing = Routing(tasks, prompt=torch.zeros(len(x), P) if prompt is None else prompt, mask=mask, losses=[])
    gates = router.train()(x, routing)
    return gates, torch.stack(routing.losses).sum() if routing.losses else None


def assert_same(router, x, found, expected):
    """Equal gates and losses, and equal gradients of a function of both."""
    (gates, loss), (wanted_gates, wanted_loss) = found, expected
    torch.testing.assert_close(gates.expand_as(wanted_gates), wanted_gates)
    torch.testing.assert_close(loss, wanted_loss)
    weights = torch.rand(wanted_gates.shape, generator=torch.Generator().manual_seed(5))
    inputs = [x, *router.parameters()]
    results = []
    for g, auxiliary in ((gates.expand_as(weights), loss), (wanted_gates, wanted_loss)):
        total = (g * weights).sum() + (0 if auxiliary is None else 10 * auxiliary)
        results.append(torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=True))
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_task_selector_equals_its_equation(temperature):
    router = build(TaskSelector(temperature), noise=1.0)
    x = torch.randn(3, 4, D, requires_grad=True)
    expected = [softmax(router.theta[t] / temperature).expand(4, E) for t in TASKS]
    assert_same(router, x, run(router, x), (torch.stack(expected), None))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_token_gate_equals_its_equation(temperature):
    router = build(TokenGate(temperature), noise=1.0)
    x = torch.randn(3, 4, D, requires_grad=True)
    w, bias = router.gate.weight, router.gate.bias
    expected = [softmax((w @ x[b, s] + bias) / temperature) for b in range(3) for s in range(4)]
    assert_same(router, x, run(router, x), (torch.stack(expected).view(3, 4, E), None))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_task_gate_equals_its_equation(temperature):
    router = build(TaskGate(temperature), noise=1.0)
    x = torch.randn(3, 4, D, requires_grad=True)
    w, bias = router.weight, router.bias
    expected = [softmax((x[b, s] @ w[t] + bias[t]) / temperature) for b, t in enumerate(TASKS) for s in range(4)]
    assert_same(router, x, run(router, x), (torch.stack(expected).view(3, 4, E), None))


def test_shared_gate_equals_its_equation():
    router = build(SharedGate(hidden=5), noise=1.0)
    x = torch.randn(3, 4, D, requires_grad=True)
    expected = []
    for b in range(3):
        for s in range(4):
            units = router.inner.weight @ x[b, s] + router.inner.bias
            away = units - units.sum() / 5
            inner = (away / (away.square().sum() / 5 + 1e-5).sqrt()).clamp_min(0)
            expected.append(softmax(router.outer.weight @ inner + router.outer.bias))
    assert_same(router, x, run(router, x), (torch.stack(expected).view(3, 4, E), None))


@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("weights", [(0.5, 0.0), (0.0, 0.3), (0.5, 0.3)])
def test_top_k_equals_its_equations(k, weights):
    router = build(TopK(k, *weights), noise=1.0)
    x = torch.randn(3, 4, D, requires_grad=True)
    gates, counted, sizes, used = [], [], [], [0] * E
    for b in range(3):
        for s in range(4):
            logits = router.gate.weight @ x[b, s] + router.gate.bias
            p = softmax(logits)
            gates.append(largest(p, k))
            if MASK[b, s]:
                counted.append(p)
                sizes.append(torch.log(sum(math.e**value for value in logits)) ** 2)
                for e in range(E):
                    used[e] += int(gates[-1][e] > 0)
    count = len(counted)
    balance = E * sum(used[e] / (k * count) * sum(p[e] for p in counted) / count for e in range(E))
    loss = weights[0] * balance + weights[1] * sum(sizes) / count
    assert_same(router, x, run(router, x), (torch.stack(gates).view(3, 4, E), loss))


def test_a_balanced_load_has_the_least_loss():
    router = build(TopK(1, load_balance=1.0, z_loss=0.0))
    router.gate.weight.data.zero_()
    router.gate.weight.data[:, :E] = 8 * torch.eye(E)
    even, odd = torch.eye(D)[:E].unsqueeze(0), torch.eye(D)[:1].expand(1, E, D)
    assert run(router, even, None, TASKS[:1])[1].item() == pytest.approx(1, abs=0.1)
    assert run(router, odd, None, TASKS[:1])[1].item() == pytest.approx(E, abs=0.1)


@pytest.mark.parametrize("tasks", [[1, 2, 1], [0, 0, 0], [2, 1, 0]])
def test_mod_squad_equals_its_equations_over_two_batches(tasks):
    router = build(ModSquad(k=2, mutual_information=0.5, momentum=0.8, noise=0.0), noise=1.0)
    average = [[PRIOR[t, e].clone() for e in range(E)] for t in range(T)]
    for _ in range(2):
        x = torch.randn(3, 4, D, requires_grad=True)
        gates, seen = [], {t: [] for t in range(T)}
        for b in range(3):
            for s in range(4):
                p = softmax(router.weight[tasks[b]] @ x[b, s] + router.bias[tasks[b]])
                gates.append(largest(p, 2))
                if MASK[b, s]:
                    seen[tasks[b]].append(p)
        for t in range(T):
            if seen[t]:
                average[t] = [
                    0.8 * average[t][e].detach() + 0.2 * sum(p[e] for p in seen[t]) / len(seen[t]) for e in range(E)
                ]
        loss = 0
        for t in range(T):
            for e in range(E):
                joint, marginal = average[t][e] / T, sum(average[i][e] / T for i in range(T))
                loss = loss - joint * torch.log(joint / (marginal / T))
        assert_same(
            router, x, run(router, x, tasks=torch.tensor(tasks)), (torch.stack(gates).view(3, 4, E), 0.5 * loss)
        )


def test_mod_squads_average_is_saved_and_moves_in_counted_passes_alone():
    router = build(ModSquad(noise=0.0)).train()
    x = torch.randn(3, 4, D)
    _, first = run(router, x)
    state = {name: value.clone() for name, value in router.state_dict().items()}
    router(x, Routing(TASKS, mask=MASK))  # as activation checkpointing's second pass
    router.eval()(x, Routing(TASKS, losses=[]))
    assert all(torch.equal(state[name], value) for name, value in router.state_dict().items())
    again = build(ModSquad(noise=0.0))
    again.load_state_dict(state)
    assert run(again, x)[1] == run(router, x)[1] != first


def test_mod_squads_loss_is_least_where_each_task_has_its_own_experts():
    apart, alike = torch.eye(3).clamp(0.01), torch.full((3, 3), 1 / 3)
    losses = []
    for prior in (apart, alike):
        router = build(ModSquad(k=1, mutual_information=1.0, noise=0.0), prior=prior)
        losses.append(run(router, torch.zeros(3, 2, D), None, torch.arange(3))[1].item())
    assert losses[0] < -0.8
    assert losses[1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_polytropon_equals_its_equations(training):
    router = build(Polytropon(temperature=0.5), noise=1.0).train(training)
    x = torch.randn(3, 4, D, requires_grad=True)
    torch.manual_seed(7)
    gates = router(x, Routing(TASKS))
    torch.manual_seed(7)
    uniform = torch.rand(3, 1, E)
    expected = []
    for b in range(3):
        z = []
        for e in range(E):
            value = 1 / (1 + torch.exp(-router.skills[TASKS[b], e]))
            if training:  # the relaxed Bernoulli as the paper writes it
                u = uniform[b, 0, e]
                odds = value * u / ((1 - value) * (1 - u))
                value = 1 / (1 + torch.exp(-torch.log(odds) / 0.5))
            z.append(value)
        expected.append(torch.stack([value / sum(z) for value in z]).expand(4, E))
    assert_same(router, x, (gates, None), (torch.stack(expected), None))


def test_moe_lora_equals_its_equation_and_reads_the_task_alone():
    router = build(MOELoRA(embedding_size=5), noise=1.0)
    x = torch.randn(3, 4, D, requires_grad=True)
    expected = [softmax(router.gate.weight @ router.embedding.weight[t]).expand(4, E) for t in TASKS]
    assert_same(router, x, run(router, x), (torch.stack(expected), None))


@pytest.mark.parametrize("supervision", [0.0, 0.4])
def test_description_equals_its_equations(supervision):
    router = build(Description(temperature=0.5, supervision=supervision), noise=1.0)
    x, prompt = torch.randn(3, 4, D, requires_grad=True), torch.randn(3, P)
    expected, loss = [], 0
    for b in range(3):
        centred = prompt[b] - prompt[b].mean()
        p = softmax((router.gate.weight @ (centred / (centred.square().mean() + 1e-5).sqrt()) + router.gate.bias) / 0.5)
        expected.append(p.expand(4, E))
        loss = loss - supervision * torch.log(p[TASKS[b]]) / 3
    found = run(router, x, prompt=prompt)
    assert_same(router, x, found, (torch.stack(expected), loss if supervision else None))
    for tasks in (TASKS, TASKS * 0):  # an answer does not look at the task
        assert torch.equal(router.eval()(x, Routing(tasks, prompt=prompt)), found[0])


def test_description_is_supervised_by_itself_only_where_each_task_has_an_expert_of_its_own():
    own = torch.full((3, 3), 0.05).fill_diagonal_(0.9)
    stage2 = torch.tensor([0.9, 0.05, 0.05]).repeat(3, 1)
    assert build(Description(), prior=own).weight == 0.01
    assert build(Description(supervision=0.0), prior=own).weight == 0
    assert build(Description(), prior=stage2, own=torch.zeros(3, dtype=torch.long)).weight == 0
    assert build(Description(), prior=PRIOR).weight == 0


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_own_expert_is_the_tasks_own_though_it_starts_with_the_smaller_share(share):
    prior = torch.full((2, 2), 1 - share).fill_diagonal_(share)
    described = build(Description(), prior=prior)
    assert (described.own.tolist(), described.weight) == ([0, 1], 0.01)
    hard = build(TaskSelector(hard=True), prior=prior)
    gates = hard(torch.randn(2, 5, D), Routing(torch.tensor([0, 1])))
    assert gates.squeeze(1).tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    "router", [TopK(), ModSquad(noise=0.0), Description(supervision=1.0)], ids=lambda r: type(r).__name__
)
def test_padding_and_what_stands_in_it_do_not_count_in_the_losses(router):
    router = build(router, noise=1.0)
    x = torch.randn(3, 4, D)
    losses = []
    for padding in (torch.zeros(D), 100 * torch.randn(D)):
        fresh = build(router.fresh(), noise=1.0)
        losses.append(run(fresh, torch.where(MASK.unsqueeze(-1), x, padding))[1])
    assert torch.equal(*losses)
    assert run(build(router.fresh(), noise=1.0), x, mask=MASK & False)[1].isfinite()


@pytest.mark.parametrize("kind", ALL)
def test_there_is_no_loss_in_answers(kind):
    routing = Routing(TASKS, prompt=torch.zeros(3, P), losses=[])
    build(kind()).eval()(torch.randn(3, 4, D), routing)
    assert routing.losses == []


@pytest.mark.parametrize(
    "router", [TopK(k=2, noise=1.0), ModSquad(noise=1.0), Polytropon()], ids=lambda r: type(r).__name__
)
def test_noise_is_drawn_while_training_alone(router):
    router = build(router).train()
    x = torch.randn(3, 4, D)
    assert not torch.equal(router(x, Routing(TASKS)), router(x, Routing(TASKS)))


@pytest.mark.parametrize("kind", [TopK, ModSquad], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_noise_has_the_deviation_that_is_given(kind, noise):
    router = build(kind(k=E, noise=noise), prior=torch.full((T, E), 1 / E)).train()
    gates = router(torch.zeros(1, 20_000, D), Routing(TASKS[:1]))
    differences = (gates.log() - gates.log()[..., :1])[0, :, 1:]  # of two logits' noise
    assert differences.mean(0).abs().max() < 0.05 * noise
    assert differences.std(0).tolist() == pytest.approx([2**0.5 * noise] * (E - 1), rel=0.03)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (TopK(k=5), "TopK: k is 5; give 1 to 4, the number of experts."),
        (TopK(k=0), "TopK: k is 0; give 1 to 4"),
        (ModSquad(k=5), "ModSquad: k is 5; give 1 to 4"),
        (TopK(load_balance=-1.0), "TopK: load_balance is -1.0; give 0 to leave it out, or more."),
        (TopK(z_loss=-1.0), "TopK: z_loss is -1.0"),
        (TopK(noise=-1.0), "TopK: noise is -1.0"),
        (ModSquad(mutual_information=-1.0), "ModSquad: mutual_information is -1.0"),
        (ModSquad(momentum=1.0), "ModSquad: momentum is 1.0; give 0 or more, and less than 1."),
        (Polytropon(temperature=0.0), "Polytropon: temperature is 0.0; give a number above 0"),
        (MOELoRA(embedding_size=0), "MOELoRA: embedding_size is 0; give 1 or more"),
        (Description(supervision=-1.0), "Description: supervision is -1.0"),
        (Description(temperature=-1.0), "Description: temperature is -1.0"),
        (TaskSelector(temperature=0.0), "TaskSelector: temperature is 0.0"),
        (AdjacentSelector(temperature=-1.0), "AdjacentSelector: temperature is -1.0"),
        (TokenGate(temperature=0.0), "TokenGate: temperature is 0.0"),
        (TaskGate(temperature=0.0), "TaskGate: temperature is 0.0"),
        (SharedGate(hidden=0), "SharedGate: hidden is 0; give 2 or more."),
        (FirstPositionGate(hidden=-1), "FirstPositionGate: hidden is -1; give 1 or more, or none."),
    ],
)
def test_arguments_that_do_not_fit_are_one_sentence(router, message):
    with pytest.raises(AlterError) as error:
        build(router)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_batch_that_is_not_finite_does_not_stay_in_mod_squads_average(value):
    router = build(ModSquad(k=2, noise=0.0)).train()
    x = torch.randn(3, 5, D)
    router(x, Routing(torch.tensor([0, 1, 1]), losses=[]))
    before = router.after.clone()
    x[0] = value  # of task 0 alone
    router(x, Routing(torch.tensor([0, 1, 1]), losses=[]))
    torch.testing.assert_close(router.after[0], before[0])
    assert not torch.equal(router.after[1], before[1])
    routing = Routing(torch.tensor([0, 1, 1]), losses=[])
    router(torch.randn(3, 5, D), routing)
    assert all(loss.isfinite() for loss in routing.losses)
