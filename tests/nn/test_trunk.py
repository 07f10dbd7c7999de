"""Starting from the trunk's states against running the whole backbone."""

import pytest
import torch

from alter.nn import Description, LoRA, MTAModel, SharedGate, TaskSelector, TopK, TrunkCache
from alter.nn.backbone import load_backbone
from alter.nn.trunk import Trunk
from tests.elsewhere import GPU, a_gpu
from tests.nn.test_model import adapters, train_batch
from tests.nn.tiny import FAMILIES, assert_alike, tiny_model

TASKS = ["a", "b", "c"]
DECODER_ONLY = {"t5": [4, 5], "bart": [4, 5]}  # layers are counted over the encoder first
PLACES = [(family, "last:1") for family in FAMILIES] + [(f, DECODER_ONLY[f]) for f in DECODER_ONLY]


def make(family, layers, cache=None, shared=False, router=None):
    torch.manual_seed(1)
    model = MTAModel(tiny_model(family), TASKS, layers)
    model.add_experts(LoRA(rank=4), router or TaskSelector())
    if shared:
        model.add_shared(LoRA(rank=4), 2, router or SharedGate(hidden=8))
    for parameter in adapters(model):
        parameter.data += 0.3 * torch.randn_like(parameter)
    if cache is not None:
        assert model.body.cache_trunks(cache, "tiny"), model.body.uncached
    return model


def step(model, batch):
    model.zero_grad()
    found = model(batch)
    (found.losses.mean() + found.auxiliary).backward()
    return [found.losses.detach(), *(p.grad for p in adapters(model))]


def count_runs(model):
    """How often each block below the cut computes."""
    runs = []
    for cached in model.body.cached.values():
        blocks = cached.trunk.blocks[: cached.trunk.cut] or [cached.trunk.stack]
        for block in blocks:
            norm = next(m for m in block.modules() if "orm" in type(m).__name__)
            norm.register_forward_hook(lambda *_: runs.append(1))
    return runs


def trained(model, epochs=2):
    """The adapters after every epoch of a few steps."""
    optimizer = torch.optim.AdamW(adapters(model), lr=1e-3)
    for _ in range(epochs):
        for seed in range(3):
            step(model, train_batch(model, seed=seed))
            optimizer.step()
        yield [parameter.detach().clone() for parameter in adapters(model)]


@pytest.mark.parametrize(("family", "layers"), PLACES)
@pytest.mark.parametrize("shared", [False, True])
def test_in_fp32_weights_are_exactly_those_of_plain_training_cold_and_warm(tmp_path, family, layers, shared):
    plain, cached = make(family, layers, shared=shared), make(family, layers, TrunkCache(folder=tmp_path), shared)
    before = [parameter.detach().clone() for parameter in adapters(plain)]
    expected = list(trained(plain))
    assert not any(torch.equal(*pair) for pair in zip(before, expected[0], strict=True))
    runs = count_runs(cached)
    for epoch, found in enumerate(trained(cached)):
        assert all(torch.equal(*pair) for pair in zip(found, expected[epoch], strict=True))
        assert bool(runs) is (epoch == 0)  # nothing below the cut runs again
        runs.clear()
    again = make(family, layers, TrunkCache(folder=tmp_path), shared)  # another process finds it all
    runs = count_runs(again)
    for found, wanted in zip(trained(again), expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert not runs


@pytest.mark.parametrize(
    ("family", "router"), [("llama", None), ("t5", Description(supervision=0.5)), ("gpt2", TopK(k=2))]
)
def test_on_a_gpu_losses_and_gradients_are_those_of_the_cpu(tmp_path, family, router):
    plain = make(family, "last:1", shared=True, router=router)
    expected = step(plain.train(), train_batch(plain))
    with a_gpu():
        cached = make(family, "last:1", TrunkCache(folder=tmp_path), True, router).to(GPU)
        for _ in range(2):
            batch = {name: value.to(GPU) for name, value in train_batch(cached).items()}
            found = [value.cpu() for value in step(cached.train(), batch)]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "layers"), PLACES)
@pytest.mark.parametrize("router", [Description(supervision=0.5), TopK(k=2)], ids=["Description", "TopK"])
def test_routers_that_read_prompts_or_have_losses_see_the_same_too(tmp_path, family, layers, router):
    plain, cached = (make(family, layers, cache, True, router) for cache in (None, TrunkCache(folder=tmp_path)))
    expected = step(plain.train(), train_batch(plain))
    for _ in range(2):
        torch.testing.assert_close(step(cached.train(), train_batch(cached)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "layers"), PLACES)
def test_examples_met_in_another_company_train_the_same_weights(tmp_path, family, layers):
    """Cached states come from batches of other examples and other lengths; the weights stay those of plain training."""

    def train(model):
        optimizer = torch.optim.AdamW(adapters(model), lr=1e-3)
        whole = train_batch(model, tasks=(0, 1, 2, 0, 1, 2), seed=5)
        for epoch in range(4):
            order = torch.randperm(6, generator=torch.Generator().manual_seed(epoch))
            for rows in order.split(2):
                part = {name: value[rows] for name, value in whole.items()}
                longest = int(part["attention_mask"].sum(1).max())
                cut = {"input_ids", "attention_mask"} if model.is_seq2seq else {*part} - {"task_ids"}
                step(model, {n: v[:, :longest] if n in cut else v for n, v in part.items()})
                optimizer.step()
        return adapters(model)

    found, expected = train(make(family, layers, TrunkCache(folder=tmp_path))), train(make(family, layers))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_with_activation_checkpointing_too(tmp_path, family):
    plain, cached = make(family, "last:1"), make(family, "last:1", TrunkCache(folder=tmp_path))
    for model in (plain, cached):
        model.train().checkpoint_activations()
    batch = train_batch(plain)
    expected = step(plain, batch)
    for _ in range(2):
        torch.testing.assert_close(step(cached, batch), expected, atol=1e-5, rtol=1e-5)


def test_bf16_states_of_an_fp32_backbone_differ_by_their_rounding_and_warm_repeats_cold(tmp_path):
    plain, cached = make("llama", "last:1"), make("llama", "last:1", TrunkCache(folder=tmp_path, dtype="bf16"))
    batch = train_batch(plain)
    cold, warm = step(cached, batch), step(cached, batch)
    assert all(torch.equal(a, b) for a, b in zip(cold, warm, strict=True))
    torch.testing.assert_close(warm[0], step(plain, batch)[0], atol=2e-2, rtol=2e-2)


def test_what_else_the_states_depend_on_is_another_store(tmp_path):
    first = make("llama", "last:1", TrunkCache(folder=tmp_path))
    step(first, train_batch(first))
    for layers, identity in (("last:2", "tiny"), ("last:1", "another backbone")):
        model = make("llama", layers)
        (cached,) = model.body.cache_trunks(TrunkCache(folder=tmp_path), identity).values()
        assert len(cached.store) == 0
    (cached,) = make("llama", "last:1").body.cache_trunks(TrunkCache(folder=tmp_path, dtype="bf16"), "tiny").values()
    assert len(cached.store) == 0
    (cached,) = make("llama", "last:1").body.cache_trunks(TrunkCache(folder=tmp_path), "tiny").values()
    assert len(cached.store) == 4


@pytest.mark.parametrize("family", DECODER_ONLY)
def test_a_decoders_states_are_those_of_prompt_and_target_together(tmp_path, family):
    plain, cached = (make(family, DECODER_ONLY[family], cache) for cache in (None, TrunkCache(folder=tmp_path)))
    assert set(cached.body.cached) == {"encoder", "decoder"}
    assert set(make(family, "last:1", TrunkCache(folder=tmp_path)).body.cached) == {"encoder"}  # whose output moves
    batch = train_batch(plain)
    batch["labels"][:] = batch["labels"][0]  # prompts alone tell the examples apart
    expected = step(plain, batch)
    for _ in range(2):
        torch.testing.assert_close(step(cached, batch), expected, atol=1e-5, rtol=1e-5)
    assert len(cached.body.cached["decoder"].store) == len(batch["labels"])


@pytest.mark.slow
def test_a_real_models_losses_and_gradients_from_states_of_other_batches(tmp_path, smollm2):
    def made(cache):
        torch.manual_seed(1)
        model = MTAModel(load_backbone(smollm2), TASKS, "last:2")
        model.add_experts(LoRA(rank=4), TaskSelector())
        for parameter in adapters(model):
            parameter.data += 0.02 * torch.randn_like(parameter)
        if cache:
            assert model.body.cache_trunks(TrunkCache(folder=tmp_path), "smollm2")
        return model

    def batch(rows):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(100, 30000, (6, 24), generator=generator)
        lengths = torch.tensor([24, 9, 16, 24, 12, 20])
        mask = (torch.arange(24) < lengths[:, None]).long()
        labels = ids.masked_fill((mask == 0) | (torch.arange(24) < 5), -100)
        whole = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
        longest = int(lengths[rows].max())
        return {**{name: value[rows, :longest] for name, value in whole.items()}, "task_ids": torch.tensor(rows) % 3}

    plain, cached = made(cache=False), made(cache=True)
    for rows in ([0, 1, 2], [3, 4, 5]):
        step(cached, batch(rows))
    (states,) = cached.body.cached.values()
    for rows in ([1, 4], [2, 5], [0, 3]):
        found, expected = step(cached, batch(rows)), step(plain, batch(rows))
        torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
        assert_alike(found[1:], expected[1:])
    assert len(states.store) == 6


def off(model, tmp_path, **options):
    assert model.body.cache_trunks(TrunkCache(folder=tmp_path, **options), "tiny") == {}
    return model.body.uncached


def test_it_is_off_by_itself_where_it_would_be_wrong_or_useless(tmp_path):
    assert "no block stands below" in off(make("llama", "all"), tmp_path)
    assert "no block stands below" in off(make("t5", [0, 5]), tmp_path)  # the encoder's output moves
    assert "enabled" in off(make("llama", "last:1"), tmp_path, enabled=False)
    model = make("llama", "last:1")
    model.backbone.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    assert "train" in off(model, tmp_path)
    model = make("llama", "last:1")
    model.backbone.model.layers[0].add_module("noise", torch.nn.Dropout(0.1))
    assert "dropout" in off(model, tmp_path)
    model = make("llama", "last:1")
    inner = model.backbone.model.layers[-1].forward
    model.backbone.model.layers[-1].forward = lambda x, *a, **k: inner(x, *a, **k) + len(seen(model.backbone))
    assert "does not start" in off(model, tmp_path)


def seen(backbone):
    """Stands for a backbone whose last block looks back at the first one's computation."""
    return [] if "forward" in backbone.model.layers[0].__dict__ else [1]


def test_an_answer_after_training_does_not_use_the_cache(tmp_path):
    plain, cached = make("llama", "last:1"), make("llama", "last:1", TrunkCache(folder=tmp_path))
    step(cached, train_batch(cached))
    ids = torch.randint(5, 90, (2, 5), generator=torch.Generator().manual_seed(3))
    for model in (plain, cached):
        model.set_examples({"task_ids": torch.tensor([0, 1])})
    assert torch.equal(cached.backbone(input_ids=ids).logits, plain.backbone(input_ids=ids).logits)


def test_a_stack_that_does_not_run_its_blocks_is_told(tmp_path):
    model = tiny_model("llama")
    trunk = Trunk(model.model, torch.nn.ModuleList([torch.nn.Linear(2, 2)]), 0)
    with pytest.raises(RuntimeError, match="in order"):
        trunk.states(input_ids=torch.tensor([[1, 2]]))
