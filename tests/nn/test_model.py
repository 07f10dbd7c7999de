"""MTAModel on every family: the properties that hold whatever the experts and routers."""

import copy
import json
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from alter.errors import AlterError
from alter.nn import (
    Bottleneck,
    Description,
    FFNCopy,
    FirstPositionGate,
    HydraLoRA,
    LoRA,
    ModSquad,
    MOELoRA,
    MTAModel,
    MTLLoRA,
    Polytropon,
    SharedGate,
    TaskGate,
    TaskSelector,
    TokenGate,
    TopK,
)
from alter.nn import choices as scoring
from alter.nn.choices import best_choices, choice_log_likelihoods, own_choice_log_likelihoods
from alter.nn.decoding import generate
from tests.nn.test_experts import one_expert, one_mixture
from tests.nn.tiny import FAMILIES, ODD, assert_alike, tiny_model

TASKS = ["a", "b", "c"]
ROUTERS = [TaskSelector(), TaskSelector(hard=True), TaskGate(), TokenGate()]
EXPERTS = [Bottleneck(rank=4), LoRA(rank=4), FFNCopy()]
DESIGNS = [TopK(k=2, noise=0.5), ModSquad(k=2, noise=0.5), Polytropon(), MOELoRA(embedding_size=8), Description()]
SHARED_A = [HydraLoRA(rank=4), MTLLoRA(rank=4)]
TWO = ["t5", "llama"]
PAIR = pytest.mark.parametrize("family", TWO)
EVERY = pytest.mark.parametrize("family", FAMILIES)


def name(template):
    return type(template).__name__ + ("Hard" if getattr(template, "hard", False) else "")


def cases(every, two, odd=()):
    """The first with every family, the second with two of them, the third with odd ones; each a tuple of what follows the family."""
    found = [(f, *c) for chosen, own in ((every, FAMILIES), (two, TWO), (odd, ODD)) for c in chosen for f in own]
    return [pytest.param(*c, id="-".join(x if isinstance(x, str) else name(x) for x in c)) for c in found]


def each(templates):
    return [(template,) for template in templates]


ROUTED = pytest.mark.parametrize(("family", "router"), cases(each(ROUTERS), each(DESIGNS)))


def make(family, expert=None, router=None, shared=None, noise=0.3, gate=None):
    torch.manual_seed(1)
    model = MTAModel(tiny_model(family), TASKS, "last:2")
    model.add_experts(expert or LoRA(rank=4), router or TaskSelector())
    if shared is not None:
        model.add_shared(shared, 2, gate or SharedGate())
    for parameter in adapters(model):
        parameter.data += noise * torch.randn_like(parameter)
    return model.eval()


def adapters(model):
    return [p for part, group in model.part_parameters().items() if part != "backbone" for p in group]


def train_batch(model, tasks=(0, 2, 1, 0), seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 9, (len(tasks),), generator=g)
    ids = torch.randint(5, 90, (len(tasks), 8), generator=g)
    mask = (torch.arange(8) < lengths[:, None]).long()
    if model.is_seq2seq:
        sizes = torch.randint(1, 5, (len(tasks),), generator=g)
        labels = torch.randint(5, 90, (len(tasks), 4), generator=g).masked_fill(torch.arange(4) >= sizes[:, None], -100)
    else:
        labels = ids.masked_fill((mask == 0) | (torch.arange(8) < 2), -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels, "task_ids": torch.tensor(tasks)}


def prompts(model, tasks=(0, 2, 1), seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 90, (len(tasks), 7), generator=g)
    lengths = torch.tensor([7, 4, 5, 6][: len(tasks)])
    mask = torch.arange(7) < lengths[:, None] if model.is_seq2seq else torch.arange(7) >= 7 - lengths[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "task_ids": torch.tensor(tasks)}


def logits(model, batch, backbone=None):
    labels = batch["labels"]
    extra = {"decoder_input_ids": model.body.shift_right(labels)} if model.is_seq2seq else {}
    model.set_examples(batch)
    with torch.no_grad():
        return (backbone or model.backbone)(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **extra
        ).logits


@ROUTED
@pytest.mark.parametrize("shared", [None, Bottleneck(rank=4)], ids=["stage1", "stage2"])
def test_gradients_are_those_of_the_whole_logits(family, router, shared):
    model = make(family, router=router, shared=shared)
    batch = train_batch(model)
    weights = torch.rand(100, generator=torch.Generator().manual_seed(3))
    losses = model(batch).losses
    trained = [p for p in adapters(model) if p.requires_grad]
    found = torch.autograd.grad((losses * weights[: len(losses)]).sum(), trained)
    model.set_examples(batch)
    labels = batch["labels"]
    extra = {"decoder_input_ids": model.body.shift_right(labels)} if model.is_seq2seq else {}
    whole = model.backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **extra).logits
    if not model.is_seq2seq:
        whole, labels = whole[:, :-1], labels[:, 1:]
    expected = torch.nn.functional.cross_entropy(whole[labels != -100], labels[labels != -100], reduction="none")
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad((expected * weights[: len(losses)]).sum(), trained)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@ROUTED
@pytest.mark.parametrize("expert", [Bottleneck(rank=4), LoRA(rank=4)], ids=name)
def test_fresh_experts_that_start_at_zero_leave_the_logits_exactly_as_they_were(family, expert, router):
    model = make(family, expert, router, noise=0.0)
    batch = train_batch(model)
    assert torch.equal(logits(model, batch), logits(model, batch, tiny_model(family)))


@EVERY
@pytest.mark.parametrize(("expert", "near"), [(FFNCopy(), 1e-5), *((expert, 5e-3) for expert in SHARED_A)])
def test_other_fresh_experts_leave_the_logits_as_they_were(family, expert, near):
    model = make(family, expert, noise=0.0)
    batch = train_batch(model)
    torch.testing.assert_close(logits(model, batch), logits(model, batch, tiny_model(family)), atol=near, rtol=1e-5)


@PAIR
@pytest.mark.parametrize("expert", SHARED_A, ids=name)
def test_experts_with_one_a_grow_apart_under_gates_that_start_equal(family, expert):
    model = make(family, expert, TokenGate(), noise=0.0).train()
    optimizer = torch.optim.AdamW(adapters(model), lr=3e-3)
    for seed in range(60):
        optimizer.zero_grad()
        model(train_batch(model, seed=seed % 4)).losses.mean().backward()
        optimizer.step()
    b = list(model.layers.values())[-1].experts.b["down"].detach()
    assert (b - b.mean(0)).norm() > 0.15 * b.norm()  # 0 had they started at zero


@EVERY
@pytest.mark.parametrize("expert", EXPERTS, ids=name)
def test_trained_experts_change_the_logits_and_switching_them_off_restores_the_backbone(family, expert):
    model = make(family, expert)
    batch = train_batch(model)
    untouched = logits(model, batch, tiny_model(family))
    assert (logits(model, batch) - untouched).abs().max() > 1e-3
    with model.adapters_disabled():
        assert torch.equal(logits(model, batch), untouched)
    assert (logits(model, batch) - untouched).abs().max() > 1e-3


@EVERY
def test_the_loss_is_the_cross_entropy_of_the_whole_logits(family):
    model = make(family)
    batch = train_batch(model)
    losses, rows, _ = model(batch)
    whole, labels = logits(model, batch), batch["labels"]
    if not model.is_seq2seq:
        whole, labels = whole[:, :-1], labels[:, 1:]
    expected = [
        -whole[b, s].log_softmax(-1)[labels[b, s]]
        for b in range(labels.shape[0])
        for s in range(labels.shape[1])
        if labels[b, s] != -100
    ]
    torch.testing.assert_close(losses, torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert rows.tolist() == (labels != -100).nonzero()[:, 0].tolist()


def one_by_one(model, batch):
    rows = ({key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["task_ids"])))
    return torch.cat([model(row).losses for row in rows])


@pytest.mark.parametrize(
    ("family", "router", "expert"),
    cases(
        [(r, e) for r in ROUTERS for e in EXPERTS],
        [(r, e) for r in DESIGNS for e in EXPERTS] + [(r, e) for r in (TaskSelector(), TokenGate()) for e in SHARED_A],
        [(TokenGate(), e) for e in EXPERTS],
    ),
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_mixed_batch_equals_its_examples_one_by_one_forward_and_backward(family, router, expert, checkpointing):
    model = make(family, expert, router, shared=expert, noise=0.1)
    wanted = [p for p in adapters(model) if p.requires_grad]
    batch = train_batch(model)
    expected = one_by_one(model, batch)
    expected_gradients = torch.autograd.grad(expected.sum(), wanted)
    if checkpointing and family == "openai-gpt":
        with pytest.raises(AlterError, match="gradient_checkpointing: OpenAIGPTLMHeadModel cannot"):
            model.checkpoint_activations()
        return
    if checkpointing:
        model.checkpoint_activations()
        model.train()
        for layer in model.layers.values():
            layer.router.eval()  # no noise
    mixed = model(batch).losses
    gradients = torch.autograd.grad(mixed.sum(), wanted)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)
    largest = max(g.abs().max() for g in expected_gradients)
    for got, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got / largest, want / largest, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "router", "gate"),
    cases(
        [*((r, SharedGate()) for r in ROUTERS), (TaskGate(), SharedGate())],
        [*((r, SharedGate()) for r in DESIGNS), *((TaskGate(), r) for r in DESIGNS)],
        [(TokenGate(), SharedGate())],
    ),
)
@pytest.mark.parametrize("beams", [1, 3])
def test_cached_generation_equals_uncached_and_a_mixed_batch_equals_single_prompts(family, router, gate, beams):
    model = make(family, LoRA(rank=4), router, shared=Bottleneck(rank=4), gate=gate)
    batch = prompts(model)
    cached = generate(model, batch, 6, num_beams=beams)
    assert any(cached)
    assert cached == generate(model, batch, 6, num_beams=beams, use_cache=False)
    for i, answer in enumerate(cached):
        keep = slice(None) if model.is_seq2seq else slice(7 - int(batch["attention_mask"][i].sum()), None)
        alone = {key: value[i : i + 1, keep] if value.dim() == 2 else value[i : i + 1] for key, value in batch.items()}
        assert generate(model, alone, 6, num_beams=beams) == [answer]


@PAIR
@pytest.mark.parametrize(("router", "asked"), [(TaskSelector(), 1), (TaskGate(), 6)], ids=["task", "tokens"])
def test_decoding_asks_a_router_once_for_what_the_task_alone_decides(family, router, asked):
    model = make(family, LoRA(rank=4), router)
    batch, calls = prompts(model), []
    list(model.layers.values())[-1].router.register_forward_hook(lambda *_: calls.append(1))
    first = generate(model, batch, 6, min_new_tokens=6)
    assert len(calls) == asked
    with torch.no_grad():
        for parameter in (p for router in model.routers() for p in router.parameters()):
            parameter.copy_(parameter.flip(0))  # what belonged to one task is another's
    assert generate(model, {**batch, "task_ids": 2 - batch["task_ids"]}, 6, min_new_tokens=6) == first
    assert generate(model, batch, 6, min_new_tokens=6) != first


@pytest.mark.parametrize(
    ("family", "router", "gate", "expert"),
    cases(
        [(TokenGate(), SharedGate(), LoRA(rank=4))],
        [*((r, r, LoRA(rank=4)) for r in DESIGNS), *((TokenGate(), SharedGate(), e) for e in SHARED_A)],
        [(TokenGate(), SharedGate(), LoRA(rank=4))],
    ),
)
def test_choices_scored_together_equal_the_loss_of_each_alone(family, router, gate, expert):
    model = make(family, expert, router, shared=expert, gate=gate)
    batch = prompts(model)
    choices = [[11, 12, 1], [13, 1], [14, 15, 16, 1]]
    scores = choice_log_likelihoods(model, batch, choices)
    for i in range(len(batch["task_ids"])):
        ids = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        for c, choice in enumerate(choices):
            answer = torch.tensor(choice)
            row = ids if model.is_seq2seq else torch.cat([ids, answer])
            labels = answer if model.is_seq2seq else torch.cat([torch.full_like(ids, -100), answer])
            single = {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None], "labels": labels[None]}
            alone = -model({**single, "task_ids": batch["task_ids"][i : i + 1]}).losses.sum()
            torch.testing.assert_close(scores[i, c], alone, atol=1e-5, rtol=1e-5)


@PAIR
@settings(max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(2, 40),
    starts=st.integers(1, 20),
    scored=st.integers(1, 5),
    positions=st.sampled_from([1, 200, 4096]),
    left_out=st.integers(0, 39),
)
def test_the_best_choice_is_that_of_all_scores(family, seed, count, starts, scored, positions, left_out):
    model = make(family, LoRA(rank=4), TaskSelector())
    batch = prompts(model)
    g = random.Random(seed)
    drawn = {(11 + g.randrange(starts), *(g.randrange(11, 90) for _ in range(g.randrange(4))), 1) for _ in range(count)}
    choices = [list(choice) for choice in sorted(drawn)]
    own = [choices[: max(1, len(choices) - row * left_out)] for row in range(len(batch["input_ids"]))]  # of other tasks
    before = scoring.SCORED_FIRST, scoring.MAX_SCORED_POSITIONS
    scoring.SCORED_FIRST, scoring.MAX_SCORED_POSITIONS = scored, positions
    try:
        best, scores = best_choices(model, batch, own), choice_log_likelihoods(model, batch, choices)
    finally:
        scoring.SCORED_FIRST, scoring.MAX_SCORED_POSITIONS = before
    for row, (found, known) in enumerate(zip(best, own, strict=True)):
        torch.testing.assert_close(scores[row, found], scores[row, : len(known)].amax(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "gate"),
    cases([(SharedGate(),)], [(FirstPositionGate(),)]),
)
@settings(max_examples=10)
@given(
    rows=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=20), min_size=3, max_size=3),
    padding=st.sampled_from([0, 3, 20]),
    positions=st.sampled_from([1, 200, 4096]),
)
def test_choices_in_groups_of_like_length_have_the_same_scores(family, gate, rows, padding, positions):
    model = make(family, LoRA(rank=4), TaskSelector(), shared=LoRA(rank=4), gate=gate)
    batch, g = prompts(model), random.Random(len(rows[0]))
    own = [[[*(g.randrange(11, 90) for _ in range(length - 1)), 1] for length in lengths] for lengths in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "MOST_PADDING", 10**6)
        together = own_choice_log_likelihoods(model, batch, own)
        patch.setattr(scoring, "MOST_PADDING", padding)
        patch.setattr(scoring, "MAX_SCORED_POSITIONS", positions)
        grouped = own_choice_log_likelihoods(model, batch, own)
    for found, expected in zip(grouped, together, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@PAIR
@settings(max_examples=10)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30), padding=st.sampled_from([0, 3, 20]))
def test_hardly_more_is_read_than_the_choices_own_tokens(family, lengths, padding):
    model = make(family, LoRA(rank=4), TaskSelector())
    batch, read = prompts(model), []
    choices = [[11] * (length - 1) + [1] for length in lengths]
    embeddings = model.body.decoder.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "MOST_PADDING", padding)
        choice_log_likelihoods(model, batch, choices)
    # a causal prompt is read too and tells the first token, and nothing stands behind a choice's last
    needed = sum(lengths) - (0 if model.is_seq2seq else len(lengths))
    behind = sum(read) - (0 if model.is_seq2seq else batch["input_ids"].numel())
    assert 3 * needed <= behind <= 3 * (needed + padding * len(set(lengths)))


@PAIR
def test_a_task_answers_with_its_own_expert(family):
    model = make(family, LoRA(rank=4), TaskSelector(hard=True))
    batch = train_batch(model, tasks=(0, 1))
    before = logits(model, batch)
    with torch.no_grad():
        for layer in model.layers.values():
            for b in layer.experts.b.values():
                b[1] += 1.0
    after = logits(model, batch)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


@PAIR
@pytest.mark.parametrize("keep", [0.5, 0.9])
@pytest.mark.parametrize("task_expert", EXPERTS, ids=name)
def test_stage_two_starts_where_stage_one_ended(family, task_expert, keep):
    """Exactly with a bottleneck; with changes before an activation nearly, far nearer than a share of them alone would be."""
    model = make(family, task_expert, TaskGate(), noise=0.001)
    batch = train_batch(model)
    before = logits(model, batch)
    with model.adapters_disabled():
        learned = (before - logits(model, batch)).norm()
    model.add_shared(LoRA(rank=4), 2, SharedGate(), keep)
    moved = (logits(model, batch) - before).norm()
    assert moved < learned * (1e-3 if isinstance(task_expert, Bottleneck) else 0.05)


@PAIR
@pytest.mark.parametrize("gate", [TopK(k=1), TopK(k=2), ModSquad(k=1), TaskSelector(hard=True)], ids=name)
def test_stage_two_starts_where_stage_one_ended_under_a_gate_that_leaves_experts_out(family, gate):
    model = make(family, Bottleneck(rank=4), TaskGate(), noise=0.001)
    batch = train_batch(model)
    before = logits(model, batch)
    with model.adapters_disabled():
        learned = (before - logits(model, batch)).norm()
    model.add_shared(LoRA(rank=4), 2, gate, keep=0.6)
    assert (logits(model.eval(), batch) - before).norm() < learned * 0.03


def test_experts_stay_as_they_are_under_a_gate_that_starts_anywhere():
    model = make("llama")
    before = [p.clone() for p in model.part_parameters()["experts"]]
    model.add_shared(LoRA(rank=4), 2, FirstPositionGate(), keep=0.5)
    assert all(torch.equal(p, b) for p, b in zip(model.part_parameters()["experts"], before, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_the_last_feed_forward_are_made_at_labels_alone(family):
    model = make(family)
    batch = train_batch(model)
    down = [*model.layers.values()][-1].frozen.module("down")
    rows = {"head": 0, "down": 0}

    def count(module, place):
        def add(_, inputs):
            rows[place] += inputs[0].shape[:-1].numel()

        return module.register_forward_pre_hook(add)

    count(model.backbone.get_output_embeddings(), "head")
    count(down, "down")
    model(batch).losses.mean().backward()
    each = (batch["labels"] != -100).sum(1)  # of six or fewer of a causal model's eight tokens
    assert rows == {"head": int(each.sum()), "down": len(each) * int(each.max())}


def with_gradients(output, x, layer):
    wanted = [x, *(p for part in layer.parts().values() for p in part.parameters())]
    return output, *torch.autograd.grad(output.square().sum(), wanted)


@pytest.mark.parametrize("family", [*TWO, "t5-ungated"])
@pytest.mark.parametrize("task_expert", EXPERTS, ids=name)
@pytest.mark.parametrize("shared", EXPERTS, ids=name)
def test_stage_two_computes_its_equation_forward_and_backward(family, task_expert, shared):
    """``F(x) + a_0 e + sum_k a_k S_k(x)``, token by token, where e and S_k are what the experts add to F."""
    model = make(family, task_expert, TaskGate(), shared=shared)
    layer, tasks = next(iter(model.layers.values())), [2, 0]
    model.set_examples({"task_ids": torch.tensor(tasks)})
    x = torch.randn(2, 3, 32, requires_grad=True)
    found = with_gradients(layer(x), x, layer)
    layer, x = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()  # for the reference
    roles = {role: layer.frozen.module(role) for role in layer.frozen.shapes}
    block = SimpleNamespace(gated="gate" in roles, act=layer.frozen.activation, **roles)
    router, gate = layer.router, layer.shared_router

    def expected(v, task):
        first = block.act(block.gate(v)) * block.up(v) if block.gated else block.act(block.up(v))
        frozen = block.down(first)
        gates = (v @ router.weight[task] + router.bias[task]).exp()
        outputs = [one_mixture(block, layer.experts, gates / gates.sum(), v, task)]
        outputs += [one_expert(block, layer.shared, k, v, task) for k in range(2)]
        units = gate.inner.weight @ torch.cat(outputs) + gate.inner.bias
        away = units - units.mean()
        a = (gate.outer.weight @ (away / (away.square().mean() + 1e-5).sqrt()).relu() + gate.outer.bias).exp()
        whole = [layer.experts.contains_ffn, *[layer.shared.contains_ffn] * 2]
        added = [y - frozen if held else y for y, held in zip(outputs, whole, strict=True)]
        return frozen + sum(share * y for share, y in zip(a / a.sum(), added, strict=True))

    slow = torch.stack([torch.stack([expected(v, task) for v in row]) for row, task in zip(x, tasks, strict=True)])
    assert_alike([value.double() for value in found], with_gradients(slow, x, layer), 2e-5)  # fp32 against fp64


# -- what routers see, and their own losses -----------------------------------------------------------------------------

LOSSES = [TopK(k=2, noise=0.5), ModSquad(k=2, noise=0.5), Description(supervision=0.5)]


def gates_of(model, run):
    """The gates of every call of every router, in order."""
    found, routers = [], list(model.routers())
    hooks = [router.register_forward_hook(lambda _, __, gates: found.append(gates.detach())) for router in routers]
    result = run()
    for hook in hooks:
        hook.remove()
    assert len(found) >= len(routers)
    return found, result


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shared", [None, LoRA(rank=4)], ids=["stage1", "stage2"])
def test_a_description_gates_alike_in_training_decoding_beams_and_scoring(family, shared):
    model = make(family, router=Description(), shared=shared, gate=Description())
    asked = prompts(model, tasks=(0, 2, 1))
    answer = torch.tensor([11, 12, 1])
    rows = [ids[mask.bool()] for ids, mask in zip(asked["input_ids"], asked["attention_mask"], strict=True)]
    wholes = rows if model.is_seq2seq else [torch.cat([ids, answer]) for ids in rows]

    def pad(parts, fill):
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)

    train = {
        "input_ids": pad(wholes, 0),
        "attention_mask": pad([torch.ones_like(ids) for ids in wholes], 0),
        "labels": answer.repeat(3, 1)
        if model.is_seq2seq
        else pad([torch.cat([torch.full_like(ids, -100), answer]) for ids in rows], -100),
        "task_ids": asked["task_ids"],
    }
    trained, _ = gates_of(model, lambda: model(train))
    expected = trained[: len(list(model.routers()))]
    assert len({tuple(row) for row in expected[0].squeeze(1).tolist()}) == 3  # prompts are told apart
    runs = {
        "greedy": lambda: generate(model, asked, 4),
        "beams": lambda: generate(model, asked, 4, num_beams=3),
        "choices": lambda: choice_log_likelihoods(model, asked, [[11, 12, 1], [13, 14, 1]]),
        "another task": lambda: generate(model, {**asked, "task_ids": asked["task_ids"] * 0}, 4),
    }
    width = {gates.shape[-1] for gates in expected}
    for run in runs.values():
        for gates in gates_of(model, run)[0]:
            assert gates.shape[1] == 1
            assert gates.shape[-1] in width
            own = gates[:: len(gates) // 3]
            torch.testing.assert_close(gates, own.repeat_interleave(len(gates) // 3, 0), atol=1e-6, rtol=0)
            assert any(w.shape == own.shape and torch.allclose(own, w, atol=1e-6) for w in expected)


@EVERY
@pytest.mark.parametrize("gate", [Description(), SharedGate()], ids=name)
def test_two_stages_behind_a_description_compute_the_same_whatever_the_task_is(family, gate):
    def for_each_task(model):
        batch = train_batch(model)
        return [logits(model, {**batch, "task_ids": torch.full_like(batch["task_ids"], task)}) for task in range(3)]

    first, *others = for_each_task(make(family, router=Description(), shared=LoRA(rank=4), gate=gate))
    assert all(torch.equal(first, other) for other in others)
    first, *others = for_each_task(make(family, shared=LoRA(rank=4), gate=gate))  # a selector's are not
    assert not any(torch.allclose(first, other, atol=1e-3) for other in others)


@EVERY
def test_a_description_does_not_read_the_targets(family):
    model = make(family, router=Description(), shared=LoRA(rank=4), gate=Description())
    batch = train_batch(model)
    before, losses = gates_of(model, lambda: model(batch))
    target = batch["labels"] != -100
    other = {**batch, "labels": torch.where(target, (batch["labels"] + 7) % 90 + 5, -100)}
    if not model.is_seq2seq:
        other["input_ids"] = torch.where(target, other["labels"], batch["input_ids"])
    after, other_losses = gates_of(model, lambda: model(other))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.allclose(losses.losses, other_losses.losses)
    changed = {
        **batch,
        "input_ids": torch.where(batch["attention_mask"].bool() & (torch.arange(8) == 0), 33, batch["input_ids"]),
    }
    assert not torch.equal(gates_of(model, lambda: model(changed))[0][0], before[0])


def noisy_step(model, batch):
    torch.manual_seed(11)
    found = model(batch)
    trained = [p for p in adapters(model) if p.requires_grad]
    gradients = torch.autograd.grad(found.losses.mean() + found.auxiliary, trained)
    return found.auxiliary.detach(), gradients, {k: v.clone() for k, v in model.adapter_state().items()}


@pytest.mark.parametrize("family", ["t5", "llama", "bart"])
@pytest.mark.parametrize("router", LOSSES, ids=name)
def test_a_routers_loss_is_the_same_with_activation_checkpointing_and_made_anew_each_time(family, router):
    results = []
    for checkpointing in (False, True):
        model = make(family, router=router, shared=LoRA(rank=4), gate=router).train()
        if checkpointing:
            model.checkpoint_activations()
        results.append([noisy_step(model, train_batch(model, seed=seed)) for seed in (0, 1)])
        assert model.routing.losses is None
        assert results[-1][0][0] != 0
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)  # of fp32 sums in another order


@PAIR
@pytest.mark.parametrize("router", LOSSES, ids=name)
def test_routers_losses_are_added_over_layers_and_stages_and_absent_in_evaluation(family, router):
    model = make(family, router=router, shared=LoRA(rank=4), gate=router)
    batch = train_batch(model)
    assert model(batch).auxiliary == 0
    model.train()
    collected = []
    for r in model.routers():
        r.forward = counting(r.forward, model.routing, collected)
    total = model(batch).auxiliary
    assert len(collected) == len(model.layers) * 2
    torch.testing.assert_close(total, torch.stack(collected).sum())
    with torch.no_grad():
        model.eval()
        assert not model(batch).auxiliary.requires_grad
        assert model(batch).auxiliary == 0


def counting(forward, routing, collected):
    def call(*args):
        before = len(routing.losses)
        gates = forward(*args)
        collected.extend(routing.losses[before:])
        return gates

    return call


@EVERY
@pytest.mark.parametrize("router", [TopK(k=2), ModSquad(k=2, noise=0.0)], ids=name)
def test_more_padding_does_not_change_a_routers_loss(family, router):
    batch = train_batch(make(family))
    longer = {
        key: value
        if key == "task_ids"
        else torch.nn.functional.pad(value, (0, 3), value=-100 if key == "labels" else 0)
        for key, value in batch.items()
    }
    longer["input_ids"] = torch.where(longer["attention_mask"].bool(), longer["input_ids"], 77)
    losses = [
        make(family, router=router, shared=LoRA(rank=4), gate=router).train()(b).auxiliary for b in (batch, longer)
    ]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-5)


def test_fewer_experts_than_tasks_are_shared_by_turns():
    model = MTAModel(tiny_model("llama"), TASKS, "last:1")
    model.add_experts(LoRA(rank=4), TaskSelector(), own=0.8, num_experts=2)
    (layer,) = model.layers.values()
    expected = torch.tensor([[0.8, 0.2], [0.2, 0.8], [0.8, 0.2]])
    torch.testing.assert_close(layer.router.theta.softmax(-1), expected)
    assert model.num_experts == 2
    one_a_task = make("llama")
    per_expert = [
        sum(p.numel() for p in m.part_parameters()["experts"]) / len(m.layers) / m.num_experts
        for m in (model, one_a_task)
    ]
    assert per_expert[0] == per_expert[1]
    with pytest.raises(AlterError, match="num_experts: 0 is below 1"):
        model.add_experts(LoRA(rank=4), TaskSelector(), num_experts=0)


@pytest.mark.parametrize("expert", EXPERTS + SHARED_A, ids=name)
def test_gates_that_do_not_sum_to_one_are_refused_where_the_experts_need_it(expert):
    class Free(TaskSelector):
        normalised = False

    model = MTAModel(tiny_model("llama"), TASKS, "last:1")
    if isinstance(expert, FFNCopy):
        with pytest.raises(AlterError, match="FFNCopy experts need gates that sum to one"):
            model.add_experts(expert, Free())
    else:
        model.add_experts(expert, Free())


# -- saving -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    backbone = tmp_path / "backbone"
    tiny_model("llama").save_pretrained(backbone)
    from alter.nn.backbone import load_backbone

    torch.manual_seed(1)
    model = MTAModel(load_backbone(str(backbone)), TASKS, "last:2")
    model.add_experts(LoRA(rank=4, alpha=2.0), TaskSelector(temperature=0.5))
    model.add_shared(Bottleneck(rank=3), 2, SharedGate(hidden=8))
    for parameter in adapters(model):
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model", str(backbone))
    return model.eval(), tmp_path / "model", backbone


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    tiny_model("llama").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("router", "expert"),
    [*((r, LoRA(rank=4)) for r in DESIGNS), (TokenGate(), HydraLoRA(rank=4)), (TaskSelector(), MTLLoRA(rank=4))],
    ids=name,
)
@pytest.mark.parametrize("num_experts", [None, 4])
def test_every_design_is_saved_with_all_that_it_has_learned(tmp_path, tiny_folder, router, expert, num_experts):
    from alter.nn.backbone import load_backbone

    torch.manual_seed(1)
    model = MTAModel(load_backbone(tiny_folder), TASKS, "last:2")
    model.add_experts(expert, router, num_experts=num_experts)
    model.add_shared(expert, 2, router)
    for parameter in adapters(model):
        parameter.data += 0.3 * torch.randn_like(parameter)
    batch = train_batch(model)
    model.train()(batch)
    model.save_pretrained(tmp_path, tiny_folder)
    again = MTAModel.from_pretrained(tmp_path)
    assert again.num_experts == (num_experts or 3)
    state = again.adapter_state()
    assert all(torch.equal(value, state[key]) for key, value in model.adapter_state().items())
    assert torch.equal(logits(again, batch), logits(model.eval(), batch))
    torch.manual_seed(0)
    expected = model.train()(batch).auxiliary
    torch.manual_seed(0)
    assert torch.equal(again.train()(batch).auxiliary, expected)


def test_a_model_from_before_experts_were_counted_has_one_a_task(saved):
    model, folder, _ = saved
    config = json.loads((folder / "alter.json").read_text())
    assert config.pop("num_experts") == 3
    (folder / "alter.json").write_text(json.dumps(config))
    assert torch.equal(logits(MTAModel.from_pretrained(folder), train_batch(model)), logits(model, train_batch(model)))


def test_a_saved_model_comes_back_whole_and_holds_the_adapters_alone(saved):
    model, folder, _ = saved
    assert sorted(file.name for file in folder.iterdir()) == ["adapters.safetensors", "alter.json"]
    again = MTAModel.from_pretrained(folder)
    batch = train_batch(model)
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert again.tasks == TASKS
    assert sum(t.numel() for t in load_file(folder / "adapters.safetensors").values()) == sum(
        p.numel() for p in adapters(model)
    )


@pytest.mark.parametrize("damage", ["missing", "surplus", "misshapen"])
def test_a_key_that_does_not_match_is_refused(saved, damage):
    _, folder, _ = saved
    file = folder / "adapters.safetensors"
    state = load_file(file)
    key = sorted(state)[0]
    if damage == "missing":
        del state[key]
    elif damage == "surplus":
        key = "nobody"
        state[key] = torch.zeros(1)
    else:
        state[key] = torch.zeros(3)
    save_file(state, file)
    with pytest.raises(AlterError, match=key):
        MTAModel.from_pretrained(folder)


def test_another_backbone_is_refused(saved, tmp_path):
    _, folder, _ = saved
    other = tiny_model("llama")
    with torch.no_grad():
        next(other.parameters()).add_(0.01)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(AlterError, match="another backbone"):
        MTAModel.from_pretrained(folder, str(tmp_path / "other"))


def test_a_moved_backbone_is_taken(saved, tmp_path):
    model, folder, backbone = saved
    backbone.rename(tmp_path / "elsewhere")
    assert MTAModel.from_pretrained(folder, str(tmp_path / "elsewhere")).tasks == model.tasks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["parts"]["router"].update(class_path="os.system"), "not part of ALTER|not a Router"),
        (
            lambda c: c["parts"]["router"].update(class_path="alter.nn.routers.TaskSelektor"),
            "Did you mean 'TaskSelector'",
        ),
        (lambda c: c["parts"]["router"].update(init_args={"heat": 1}), "heat"),
        (lambda c: c.update(format=99), "format"),
    ],
)
def test_a_model_description_that_does_not_fit_is_refused(saved, change, message):
    _, folder, _ = saved
    config = json.loads((folder / "alter.json").read_text())
    change(config)
    (folder / "alter.json").write_text(json.dumps(config))
    with pytest.raises(AlterError, match=message):
        MTAModel.from_pretrained(folder)


@pytest.mark.parametrize("file", ["alter.json", "adapters.safetensors"])
def test_a_truncated_file_is_refused(saved, file):
    _, folder, _ = saved
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(AlterError, match=file):
        MTAModel.from_pretrained(folder)


def test_placement_in_chosen_layers():
    for layers, count in (("all", 4), ("last:1", 1), ([0, 2], 2)):
        backbone = tiny_model("llama")
        total = backbone.config.num_hidden_layers
        model = MTAModel(backbone, TASKS, layers)
        assert len(model.layers) == (total if layers == "all" else count)


@EVERY
@pytest.mark.parametrize("expert", [*EXPERTS, *SHARED_A], ids=name)
@pytest.mark.parametrize("router", [TaskSelector(), TaskSelector(hard=True), TopK(k=2)], ids=name)
def test_experts_that_are_kept_as_they_compute_answer_bit_for_bit_alike(family, expert, router):
    torch.manual_seed(1)
    model = MTAModel(tiny_model(family).bfloat16(), TASKS, "last:2")
    model.add_experts(expert, router)
    model.add_shared(expert, 2, SharedGate())
    if not expert.holds_tasks:
        model.add_newcomer("new")
    for parameter in adapters(model):
        parameter.data += 0.3 * torch.randn_like(parameter)
    batch = prompts(model.eval(), [0, 2, 0 if expert.holds_tasks else 3])
    batch["labels"] = batch["input_ids"]
    assert {parameter.dtype for parameter in adapters(model)} == {torch.float32}
    before = logits(model, batch)
    after = logits(model.settle(), batch)
    layer = next(iter(model.layers.values()))
    kept = torch.float32 if isinstance(expert, FFNCopy) else torch.bfloat16
    assert {parameter.dtype for parameter in layer.experts.parameters()} == {kept}
    assert {parameter.dtype for parameter in layer.router.parameters()} == {torch.float32}  # as are its rates
    assert torch.equal(before, after)


def test_in_fp32_settling_changes_nothing():
    model = make("llama", shared=LoRA(rank=4))
    before = [parameter.data_ptr() for parameter in adapters(model)]
    assert [parameter.data_ptr() for parameter in adapters(model.settle())] == before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("expert", [Bottleneck(rank=4), LoRA(rank=4)], ids=name)
def test_an_fp32_backbone_that_trains_may_be_under_autocast(family, expert):
    model = make(family, expert, TaskSelector())
    batch = train_batch(model)
    expected = model(batch).losses
    model.train_backbone()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch).losses
    losses.float().sum().backward()
    torch.testing.assert_close(losses.float(), expected, atol=0.2, rtol=0.05)
    assert all(p.grad is not None for p in adapters(model) if p.requires_grad)
