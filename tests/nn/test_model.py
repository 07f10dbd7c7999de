"""MTAModel on every family: the properties that hold whatever the experts and routers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from alter.errors import AlterError
from alter.nn import Bottleneck, FFNCopy, LoRA, MTAModel, SharedGate, TaskGate, TaskSelector, TokenGate
from alter.nn.decoding import choice_log_likelihoods, generate
from tests.nn.tiny import FAMILIES, tiny_model

TASKS = ["a", "b", "c"]
ROUTERS = [TaskSelector(), TaskSelector(hard=True), TaskGate(), TokenGate()]
EXPERTS = [Bottleneck(rank=4), LoRA(rank=4), FFNCopy()]
PAIR = pytest.mark.parametrize("family", ["t5", "llama"])
EVERY = pytest.mark.parametrize("family", FAMILIES)


def name(template):
    return type(template).__name__ + ("Hard" if getattr(template, "hard", False) else "")


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


@EVERY
@pytest.mark.parametrize("router", ROUTERS, ids=name)
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


@EVERY
@pytest.mark.parametrize("expert", [Bottleneck(rank=4), LoRA(rank=4)], ids=name)
@pytest.mark.parametrize("router", ROUTERS, ids=name)
def test_fresh_experts_that_start_at_zero_leave_the_logits_exactly_as_they_were(family, expert, router):
    model = make(family, expert, router, noise=0.0)
    batch = train_batch(model)
    assert torch.equal(logits(model, batch), logits(model, batch, tiny_model(family)))


@EVERY
def test_fresh_copies_leave_the_logits_as_they_were(family):
    model = make(family, FFNCopy(), noise=0.0)
    batch = train_batch(model)
    torch.testing.assert_close(logits(model, batch), logits(model, batch, tiny_model(family)), atol=1e-5, rtol=1e-5)


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
    total = 0
    for i in range(len(batch["task_ids"])):
        total = total + model({key: value[i : i + 1] for key, value in batch.items()}).losses.sum()
    return total


@EVERY
@pytest.mark.parametrize("router", ROUTERS, ids=name)
@pytest.mark.parametrize("expert", EXPERTS, ids=name)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_mixed_batch_equals_its_examples_one_by_one_forward_and_backward(family, router, expert, checkpointing):
    model = make(family, expert, router, shared=expert)
    wanted = [p for p in adapters(model) if p.requires_grad]
    batch = train_batch(model)
    expected = one_by_one(model, batch)
    expected_gradients = torch.autograd.grad(expected, wanted)
    if checkpointing:
        model.backbone.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    mixed = model(batch).losses.sum()
    gradients = torch.autograd.grad(mixed, wanted)
    torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=1e-5)
    scale = max(g.abs().max() for g in expected_gradients)
    for got, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got / scale, want / scale, atol=1e-5, rtol=1e-4)


@EVERY
@pytest.mark.parametrize("router", [*ROUTERS, SharedGate()], ids=name)
@pytest.mark.parametrize("beams", [1, 3])
def test_cached_generation_equals_uncached_and_a_mixed_batch_equals_single_prompts(family, router, beams):
    gate = router if isinstance(router, SharedGate) else None
    model = make(family, LoRA(rank=4), TaskGate() if gate else router, shared=Bottleneck(rank=4), gate=gate)
    batch = prompts(model)
    cached = generate(model, batch, 6, num_beams=beams)
    assert any(cached)
    assert cached == generate(model, batch, 6, num_beams=beams, use_cache=False)
    for i, answer in enumerate(cached):
        keep = slice(None) if model.is_seq2seq else slice(7 - int(batch["attention_mask"][i].sum()), None)
        alone = {key: value[i : i + 1, keep] if value.dim() == 2 else value[i : i + 1] for key, value in batch.items()}
        assert generate(model, alone, 6, num_beams=beams) == [answer]


@EVERY
def test_choices_scored_together_equal_the_loss_of_each_alone(family):
    model = make(family, router=TokenGate(), shared=LoRA(rank=4))
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
            torch.testing.assert_close(scores[i, c], alone, atol=1e-4, rtol=1e-4)


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
@pytest.mark.parametrize("task_expert", EXPERTS, ids=name)
@pytest.mark.parametrize("shared", EXPERTS, ids=name)
def test_stage_two_computes_its_equation(family, task_expert, shared):
    model = make(family, task_expert, TaskGate(), shared=shared)
    layer = next(iter(model.layers.values()))
    model.set_examples({"task_ids": torch.tensor([2, 0])})
    x = torch.randn(2, 3, 32)
    frozen = layer.ffn(x)

    def addition(expert, value):  # A_k(x), whichever way the expert returns it
        return value - frozen.view(*frozen.shape[:2], *[1] * (value.dim() - 3), -1) if expert.contains_ffn else value

    gates = layer.router(x, layer.routing)
    e = addition(layer.experts, layer.experts.mix(x, gates, layer.frozen, None, layer.routing))
    shares = addition(layer.shared, layer.shared.each(x, layer.frozen, layer.routing))
    seen = torch.cat(
        [
            layer.experts.mix(x, gates, layer.frozen, None, layer.routing)[:, :, None],
            layer.shared.each(x, layer.frozen, layer.routing),
        ],
        2,
    )
    a = layer.shared_router(seen.flatten(-2), layer.routing)
    expected = frozen + a[..., :1] * e + (a[..., 1:, None] * shares).sum(-2)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


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
