"""A task that joins a trained model, against its equations written slowly and the model as it was."""

import pytest
import torch
from torch.nn import functional as F

from alter.errors import AlterError
from alter.nn import Bottleneck, FFNCopy, HydraLoRA, LoRA, MTAModel, MTLLoRA, SharedGate, TaskSelector, TopK
from tests.nn.tiny import FAMILIES, tiny_model
from tests.runs import perturb


def batch(tasks, seq2seq=False, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 100, (len(tasks), 9), generator=drawn)
    labels = ids[:, :4].clone() if seq2seq else ids.masked_fill(torch.arange(9) < 5, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "task_ids": torch.tensor(tasks)}


def model(family="llama", expert=None, router=None, shared=True, tasks=3):
    made = MTAModel(tiny_model(family), [f"t{i}" for i in range(tasks)], "last:2")
    made.add_experts(expert or LoRA(rank=4), router or TaskSelector())
    if shared:
        made.add_shared(expert or LoRA(rank=4), 2, SharedGate(hidden=8))
    perturb(made)
    return made.eval()


def losses(made, examples):
    with torch.no_grad():
        return made(examples).losses


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trained_tasks_compute_bit_for_bit_what_they_did(family):
    made = model(family)
    examples = batch([0, 2, 1, 1], made.is_seq2seq)
    before, state = losses(made, examples), {key: value.clone() for key, value in made.adapter_state().items()}
    made.add_newcomer("new")
    perturb(made)  # everything moves,
    made.load_trained_state({**made.adapter_state(), **state}, "")  # but what was there
    assert torch.equal(losses(made, examples), before)
    made.remove_task("new")
    assert made.adapter_state().keys() == state.keys()
    assert torch.equal(losses(made, examples), before)


def test_a_removed_tasks_name_goes_to_a_newcomer_and_what_the_others_compute_stays(tmp_path):
    made = model()
    examples = batch([0, 2, 2, 0])
    before = losses(made, examples)
    with pytest.raises(AlterError, match="has a task 't1' already"):
        made.add_newcomer("t1")
    made.remove_task("t1")
    made.add_newcomer("t1")
    assert made.tasks == ["t0", "t1 (removed)", "t2", "t1"]
    assert made.retired == ["t1 (removed)"]
    with pytest.raises(AlterError, match="has a task 't1' already"):
        made.add_newcomer("t1")
    assert torch.equal(losses(made, examples), before)
    made.remove_task("t1")  # the newcomer
    made.add_newcomer("t1 (removed)")  # a name like any other
    assert made.tasks == ["t0", "t1 (removed) (removed)", "t2", "t1 (removed)"]
    tiny_model("llama").save_pretrained(tmp_path / "backbone")
    made.save_pretrained(tmp_path / "model", str(tmp_path / "backbone"))
    again = MTAModel.from_pretrained(tmp_path / "model")
    assert (again.tasks, again.retired) == (made.tasks, made.retired)
    assert torch.equal(losses(again, examples), before)


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_in_one_batch_each_task_gets_what_it_gets_alone(family):
    made = model(family)
    made.add_newcomer("new")
    made.add_newcomer("newer", Bottleneck(rank=3))
    perturb(made)
    tasks = [3, 0, 4, 3, 2]
    together = made(batch(tasks, made.is_seq2seq))
    for row in range(len(tasks)):
        alone = {key: value[row : row + 1] for key, value in batch(tasks, made.is_seq2seq).items()}
        torch.testing.assert_close(together.losses[together.rows == row], losses(made, alone), atol=1e-5, rtol=1e-5)


def slow_ffn(layer, x, changes=None):
    """The feed-forward with its weights changed, written with the weights themselves."""

    def linear(role, values):
        module = layer.frozen.module(role)
        return values @ (module.weight + (changes[role] if changes else 0)).T

    return linear("down", F.silu(linear("gate", x)) * linear("up", x))


def lora_changes(expert, k):
    return {role: (expert.a[role][:, k] @ expert.b[role][k]).T * expert.scale for role in expert.b}


@pytest.mark.parametrize("shared", [True, False])
def test_lora_against_the_equations(shared):
    made = model(shared=shared)
    made.add_newcomer("new", own=0.7, keep=0.6)
    perturb(made)
    layer = next(iter(made.layers.values()))
    newcomer = layer.newcomers[0]
    made.routing.task_ids = torch.tensor([3, 3])
    x = torch.randn(2, 5, 32)
    g = torch.exp(newcomer.rates["selector"]) / torch.exp(newcomer.rates["selector"]).sum()
    assert len(g) == 4
    lent = [lora_changes(layer.experts, k) for k in range(3)]
    blend = {role: sum(g[k] / (g[0] + g[1] + g[2]) * lent[k][role] for k in range(3)) for role in lent[0]}
    e = (1 - g[3]) * slow_ffn(layer, x, blend) + g[3] * slow_ffn(layer, x, lora_changes(newcomer.expert, 0))
    expected = e
    if shared:
        a = torch.exp(newcomer.rates["gate"]) / torch.exp(newcomer.rates["gate"]).sum()
        expected = a[0] * e + sum(a[1 + k] * slow_ffn(layer, x, lora_changes(layer.shared, k)) for k in range(2))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


def test_additions_beside_the_block_against_the_equations():
    made = model(expert=Bottleneck(rank=4))
    made.add_newcomer("new")
    perturb(made)
    layer = next(iter(made.layers.values()))
    newcomer, x = layer.newcomers[0], torch.randn(1, 5, 32)
    made.routing.task_ids = torch.tensor([3])
    g, a = newcomer.gates()
    lent, own = layer.experts.each(x, layer.frozen, made.routing), newcomer.expert.each(x, layer.frozen, made.routing)
    both = layer.shared.each(x, layer.frozen, made.routing)
    e = sum(g[k] * lent[..., k, :] for k in range(3)) + g[3] * own[..., 0, :]
    expected = slow_ffn(layer, x) + a[0] * e + sum(a[1 + k] * both[..., k, :] for k in range(2))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("router", [TaskSelector(hard=True), TopK(k=2)])
@pytest.mark.parametrize("expert", [FFNCopy(), HydraLoRA(rank=4)])
def test_every_design_takes_a_newcomer_that_comes_back_from_disk(tmp_path, expert, router):
    backbone = tiny_model("llama")
    backbone.save_pretrained(tmp_path / "backbone")
    made = MTAModel(backbone, ["t0", "t1"], "last:1")
    made.add_experts(expert, router)
    made.add_newcomer("new", LoRA(rank=2))
    perturb(made)
    made.remove_task("t0")
    made.save_pretrained(tmp_path / "model", str(tmp_path / "backbone"))
    again = MTAModel.from_pretrained(tmp_path / "model")
    assert (again.tasks, again.base_tasks, again.retired) == (["t0", "t1", "new"], 2, ["t0"])
    assert torch.equal(losses(again, batch([2, 1])), losses(made.eval(), batch([2, 1])))


def test_only_the_newcomer_has_gradients_where_it_alone_trains():
    made = model()
    made.add_newcomer("new")
    perturb(made)
    for name, parameters in made.part_parameters().items():
        for parameter in parameters:
            parameter.requires_grad_(name.startswith("newcomers.0."))
    made(batch([3, 3, 0])).losses.mean().backward()
    moved = {
        name for name, group in made.part_parameters().items() for p in group if p.grad is not None and p.grad.any()
    }
    assert moved == {"newcomers.0.expert", "newcomers.0.rates"}


def test_what_cannot_join_or_leave_is_told():
    with pytest.raises(AlterError, match="hold something for each task"):
        model(expert=MTLLoRA(rank=2), shared=False).add_newcomer("new")
    made = model(tasks=2)
    with pytest.raises(AlterError, match="a task 't1' already"):
        made.add_newcomer("t1")
    with pytest.raises(AlterError, match="no task 't2'; it is one of t0, t1"):
        made.remove_task("t2")
    made.remove_task("t0")
    with pytest.raises(AlterError, match="no task 't0'"):
        made.remove_task("t0")
    with pytest.raises(AlterError, match="'t1' is the model's last task"):
        made.remove_task("t1")


@pytest.mark.parametrize(("own", "keep"), [(1.0, 1.0), (0.0, 0.0), (1.0, 0.5)])
def test_shares_of_all_and_of_nothing_can_be_learned_from(own, keep):
    made = model()
    made.add_newcomer("new", own=own, keep=keep)
    (g, a) = next(iter(made.layers.values())).newcomers[0].gates()
    assert float(g[-1]) == pytest.approx(own, abs=1e-5)
    assert float(a[0]) == pytest.approx(keep, abs=1e-5)
    made(batch([3, 3])).losses.sum().backward()
    gradients = [
        p.grad for part in next(iter(made.layers.values())).newcomers[0].parts().values() for p in part.parameters()
    ]
    assert all(g is not None and g.isfinite().all() for g in gradients)
