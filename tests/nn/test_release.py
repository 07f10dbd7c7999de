"""The authors' released variant against a slow reference written from its equations: one example, one expert at a time."""

import copy

import pytest
import torch
from torch import nn

from alter.errors import AlterError
from alter.nn import AdjacentSelector, FFNCopy, FirstPositionGate, MTAModel, TaskSelector
from alter.nn.choices import choice_log_likelihoods
from alter.nn.decoding import generate
from alter.nn.routers import RouterShape, Routing
from tests.nn.test_model import adapters, logits, prompts, train_batch
from tests.nn.tiny import tiny_model

TASKS = [f"task{i}" for i in range(7)]
E, K = 5, 3


def make(family="t5", stage=2, noise=0.3):
    torch.manual_seed(1)
    model = MTAModel(tiny_model(family), TASKS, "last:1")
    model.add_experts(FFNCopy(), AdjacentSelector(), num_experts=E)
    if stage == 2:
        model.add_shared(FFNCopy(), K, FirstPositionGate())
    for parameter in adapters(model):
        parameter.data += noise * torch.randn_like(parameter)
    return model.eval()


class SlowLayer(nn.Module):
    """Stands where T5's feed-forward stood, gated or not; takes its weights from the layer that is tested."""

    def __init__(self, layer, tasks):
        super().__init__()
        self.tasks = tasks
        self.roles = ("gate", "up", "down") if "gate" in layer.experts.weight else ("up", "down")

        def expert(stack, k):
            return nn.ParameterDict({role: stack.weight[role][k].detach().clone() for role in self.roles})

        self.experts = nn.ModuleList(expert(layer.experts, k) for k in range(E))
        self.theta = nn.Parameter(layer.router.theta.detach().clone())
        self.act = copy.deepcopy(layer.frozen.activation)
        self.shared = None
        if layer.shared is not None:
            self.shared = nn.ModuleList(expert(layer.shared, k) for k in range(K))
            self.u = nn.Parameter(layer.shared_router.inner.weight.detach().clone())
            self.v = nn.Parameter(layer.shared_router.outer.weight.detach().clone())

    def run(self, expert, x):
        if "gate" in expert:
            return (self.act(x @ expert["gate"]) * (x @ expert["up"])) @ expert["down"]
        return (x @ expert["up"]).clamp_min(0) @ expert["down"]

    def forward(self, hidden_states):
        rows = []
        for x, t in zip(hidden_states, self.tasks, strict=True):
            scores = (self.theta[t] / 0.1).exp()
            w = scores / scores.sum()
            if self.shared is None:
                rows.append(sum(w[k] * self.run(self.experts[k], x) for k in range(E)))
                continue
            i, j = t % E, (t + 1) % E
            parts = [w[i] * self.run(self.experts[i], x) + w[j] * self.run(self.experts[j], x)]
            parts += [self.run(expert, x) for expert in self.shared]
            seen = torch.cat([part[0] for part in parts])
            scores = (self.v @ (self.u @ seen).clamp_min(0)).exp()
            rows.append(sum(a * part for a, part in zip(scores / scores.sum(), parts, strict=True)))
        return torch.stack(rows)


@pytest.mark.parametrize("family", ["t5", "t5-ungated"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("whole", [False, True], ids=["adapters", "with the backbone"])
def test_losses_and_gradients_of_a_batch_are_those_of_the_equations(family, stage, whole):
    model = make(family, stage)
    assert all(("gate" in layer.experts.weight) == (family == "t5") for layer in model.layers.values())
    batch = train_batch(model, tasks=(0, 4, 2, 6))
    slow = tiny_model(family).requires_grad_(whole)
    slow_layers = {}
    for name, layer in model.layers.items():
        slow_layers[name] = SlowLayer(layer, batch["task_ids"].tolist())
        slow.set_submodule(name, slow_layers[name])
    if whole:
        model.train_backbone()

    losses = model(batch).losses
    losses.mean().backward()
    labels = batch["labels"]
    whole_logits = slow(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).logits
    expected = torch.stack([-whole_logits[b, s].log_softmax(-1)[labels[b, s]] for b, s in (labels != -100).nonzero()])
    expected.mean().backward()

    def close(found, wanted):
        scale = wanted.abs().max().clamp_min(1e-3)
        # single precision rounds the reference itself by 1e-4 of its largest gradient (against double)
        torch.testing.assert_close(found / scale, wanted / scale, atol=3e-4, rtol=1e-4)

    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    for name, layer in model.layers.items():
        reference = slow_layers[name]
        close(layer.router.theta.grad, reference.theta.grad)
        for stack, experts in ((layer.experts, reference.experts), (layer.shared, reference.shared)):
            for role in reference.roles if experts else ():
                gradients = [expert[role].grad for expert in experts]  # None for one that no task chose
                wanted = torch.stack([torch.zeros_like(experts[0][role]) if g is None else g for g in gradients])
                close(stack.weight[role].grad, wanted)
        if stage == 2:
            close(layer.shared_router.inner.weight.grad, reference.u.grad)
            close(layer.shared_router.outer.weight.grad, reference.v.grad)
    if whole:
        found = dict(model.backbone.named_parameters())
        wanted = {n: p for n, p in slow.named_parameters() if not any(n.startswith(layer) for layer in model.layers)}
        assert "shared.weight" in wanted
        for name, parameter in wanted.items():
            close(found[name].grad, parameter.grad)


def test_a_task_starts_on_two_adjacent_experts_and_wraps_around():
    router = AdjacentSelector()
    router.build(RouterShape(7, E, 4, torch.zeros(7, E), torch.arange(7) % E))
    gates = router(torch.randn(7, 2, 4), Routing(torch.arange(7)))
    assert gates.shape == (7, 1, E)
    high, low = torch.tensor([2.2, 2.0]).exp()
    for t in range(7):
        expected = torch.full((E,), low)
        expected[[t % E, (t + 1) % E]] = high
        torch.testing.assert_close(gates[t, 0], expected / expected.sum())
    assert router.active is None
    router.join_shared()
    assert router.active == 2
    alone = router(torch.randn(7, 2, 4), Routing(torch.arange(7)))
    for t in range(7):
        kept = [t % E, (t + 1) % E]
        assert torch.equal(alone[t, 0, kept], gates[t, 0, kept])
        assert alone[t, 0].count_nonzero() == 2


@pytest.mark.parametrize("experts", [1, 2])
def test_few_experts_are_all_the_tasks_pair(experts):
    router = AdjacentSelector()
    router.build(RouterShape(3, experts, 4, torch.zeros(3, experts), torch.arange(3) % experts))
    router.join_shared()
    assert router.active == experts
    gates = router(torch.randn(3, 2, 4), Routing(torch.arange(3)))
    torch.testing.assert_close(gates, torch.full((3, 1, experts), 1 / experts))


@pytest.mark.parametrize("family", ["t5", "bart", "llama", "gpt2"])
@pytest.mark.parametrize("beams", [1, 3])
def test_cached_generation_equals_uncached_and_a_mixed_batch_equals_single_prompts(family, beams):
    model = make(family, noise=0.5)
    batch = prompts(model, tasks=(0, 6, 3))
    cached = generate(model, batch, 6, num_beams=beams)
    assert any(cached)
    assert cached == generate(model, batch, 6, num_beams=beams, use_cache=False)
    for i, answer in enumerate(cached):  # every prompt anew: nothing is left from the last
        keep = slice(None) if model.is_seq2seq else slice(7 - int(batch["attention_mask"][i].sum()), None)
        alone = {key: value[i : i + 1, keep] if value.dim() == 2 else value[i : i + 1] for key, value in batch.items()}
        assert generate(model, alone, 6, num_beams=beams) == [answer]


def test_the_first_position_of_each_step_would_answer_otherwise():
    """The fault that is kept out: forgetting the kept gates changes the answers, so the test above can fail."""
    model = make(noise=0.8)
    batch = prompts(model, tasks=(0, 6, 3))
    right = choice_of_next(model, batch)
    for layer in model.layers.values():
        forward = layer.shared_router.forward

        def fresh(states, routing, forward=forward):
            routing.cached = 0
            return forward(states, routing)

        layer.shared_router.forward = fresh
    assert not torch.allclose(choice_of_next(model, batch), right, atol=1e-4)


def choice_of_next(model, batch):
    model.set_examples(batch)
    ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    output = model.backbone.generate(
        **ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(output.logits)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_scored_choices_equal_the_loss_of_each_alone(family):
    model = make(family)
    batch = prompts(model, tasks=(0, 6, 3))
    choices = [[11, 12, 1], [13, 1], [14, 15, 16, 1]]
    scores = choice_log_likelihoods(model, batch, choices)
    for i in range(3):
        ids = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        for c, choice in enumerate(choices):
            answer = torch.tensor(choice)
            row = ids if model.is_seq2seq else torch.cat([ids, answer])
            labels = answer if model.is_seq2seq else torch.cat([torch.full_like(ids, -100), answer])
            single = {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None], "labels": labels[None]}
            alone = -model({**single, "task_ids": batch["task_ids"][i : i + 1]}).losses.sum()
            torch.testing.assert_close(scores[i, c], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_loss_is_that_of_the_whole_logits_though_the_last_block_computes_at_few_positions(family, checkpointing):
    model = make(family)
    batch = train_batch(model, tasks=(0, 4, 2, 6))
    whole, labels = logits(model, batch), batch["labels"]
    if not model.is_seq2seq:
        whole, labels = whole[:, :-1], labels[:, 1:]
    expected = torch.nn.functional.cross_entropy(whole[labels != -100], labels[labels != -100], reduction="none")
    wanted = torch.autograd.grad(model(batch).losses.sum(), adapters(model))
    if checkpointing:
        model.checkpoint_activations()
        model.train()
    losses = model(batch).losses
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), adapters(model)), wanted, atol=1e-5, rtol=1e-4)


# -- saving -------------------------------------------------------------------------------------------------------------


def changed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("trained", [False, True])
def test_a_saved_model_comes_back_with_its_experts_and_the_backbone_where_it_trained(tmp_path, trained):
    tiny_model("t5").save_pretrained(tmp_path / "backbone")
    model = make()
    if trained:
        model.train_backbone()
        changed(model)
    model.save_pretrained(tmp_path / "model", str(tmp_path / "backbone"))
    again = MTAModel.from_pretrained(tmp_path / "model")
    batch = train_batch(model, tasks=(0, 4, 2, 6))
    with torch.no_grad():
        assert torch.equal(again(batch).losses, model(batch).losses)
        with again.adapters_disabled(), model.adapters_disabled():
            untouched = MTAModel(tiny_model("t5"), TASKS, "last:1")(batch).losses
            assert torch.equal(again(batch).losses, untouched)
            assert torch.equal(model(batch).losses, untouched)
        assert torch.equal(again(batch).losses, model(batch).losses)
    assert (again.num_experts, again.num_shared, again.has_own_backbone) == (E, K, trained)
    held = {key.split(".")[0] for key in model.trained_state()}
    assert held == {"encoder", "decoder", *(["backbone"] if trained else [])}


def test_a_trained_backbone_cannot_be_quantised_on_loading(tmp_path):
    tiny_model("t5").save_pretrained(tmp_path / "backbone")
    model = make()
    model.train_backbone()
    model.save_pretrained(tmp_path / "model", str(tmp_path / "backbone"))
    with pytest.raises(AlterError, match="backbone was trained too, so its precision cannot be int8"):
        MTAModel.from_pretrained(tmp_path / "model", precision="int8")
    assert MTAModel.from_pretrained(tmp_path / "model", precision="bf16").has_own_backbone


def test_a_number_of_experts_is_checked_and_tasks_share_them_in_turn():
    model = MTAModel(tiny_model("t5"), TASKS, "last:1")
    with pytest.raises(AlterError, match="num_experts: 0 is below 1"):
        model.add_experts(FFNCopy(), AdjacentSelector(), num_experts=0)
    model.add_experts(FFNCopy(), TaskSelector(), own=0.8, num_experts=3)
    gates = next(iter(model.layers.values())).router(torch.randn(7, 1, 32), Routing(torch.arange(7)))
    torch.testing.assert_close(gates[:, 0].argmax(-1), torch.arange(7) % 3)
    torch.testing.assert_close(gates[:, 0].amax(-1), torch.full((7,), 0.8))
