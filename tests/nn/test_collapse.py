"""One task's plain model against the mixture, and what is refused."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from alter.errors import AlterError
from alter.nn import (
    Bottleneck,
    Description,
    FFNCopy,
    FirstPositionGate,
    HydraLoRA,
    LoRA,
    MOELoRA,
    MTAModel,
    MTLLoRA,
    Polytropon,
    Routing,
    SharedGate,
    TaskGate,
    TaskSelector,
    TokenGate,
    TopK,
)
from alter.nn.collapse import merged, one_adapter
from alter.nn.routers import AdjacentSelector, ModSquad
from tests.nn.tiny import FAMILIES, tiny_model

TASKS = ["a", "b", "c"]
BY_TASK = [TaskSelector(), TaskSelector(hard=True), AdjacentSelector(), Polytropon(), MOELoRA(embedding_size=8)]


def mixture(family, expert, router, shared=None):
    backbone = tiny_model(family)
    model = MTAModel(backbone, TASKS, "last:2")
    model.add_experts(expert, router)
    if shared:
        model.add_shared(*shared)
    torch.manual_seed(1)
    for layer in model.layers.values():
        for part in layer.parts().values():
            for parameter in part.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def inputs(model):
    torch.manual_seed(2)
    batch = {"input_ids": torch.randint(3, 100, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    if model.is_seq2seq:
        batch["decoder_input_ids"] = torch.randint(3, 100, (2, 5))
    return batch


@torch.no_grad()
def logits(model, task):
    model.set_examples({"task_ids": torch.tensor([model.tasks.index(task)] * 2)})
    return model.backbone(**inputs(model)).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_merged_model_is_loaded_by_transformers_alone_and_gives_the_mixtures_logits(family, tmp_path):
    model = mixture(family, LoRA(rank=4, alpha=8), TaskSelector())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = {task: logits(model, task) for task in TASKS}
    with merged(model, "b") as backbone:
        backbone.save_pretrained(tmp_path / "b")
    auto = AutoModelForSeq2SeqLM if model.is_seq2seq else AutoModelForCausalLM
    plain, info = auto.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(plain) is type(model.backbone)
    with torch.no_grad():
        found = plain.eval()(**inputs(model)).logits
    assert (found - expected["b"]).abs().max() <= 1e-5
    assert (found - expected["a"]).abs().max() > 1e-3  # another task's model is another
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model, "b"), expected["b"])


@pytest.mark.parametrize("router", BY_TASK, ids=lambda router: f"{type(router).__name__}{getattr(router, 'hard', '')}")
@pytest.mark.parametrize(
    "expert", [LoRA(rank=4), HydraLoRA(rank=4), MTLLoRA(rank=4, alpha=2)], ids=lambda e: type(e).__name__
)
def test_every_router_by_task_and_every_low_rank_expert_merge(expert, router):
    model = mixture("llama", expert, router)
    for task in TASKS:
        expected = logits(model, task)
        with merged(model, task) as backbone, torch.no_grad():
            found = backbone(**inputs(model)).logits
        assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["t5", "bart", "gpt2"])
def test_full_copies_merge_where_one_answers_and_are_refused_where_several_do(family):
    model = mixture(family, FFNCopy(), TaskSelector(hard=True))
    expected = logits(model, "c")
    with merged(model, "c") as backbone, torch.no_grad():
        assert (backbone(**inputs(model)).logits - expected).abs().max() <= 1e-5
    soft = mixture(family, FFNCopy(), TaskSelector())
    with pytest.raises(AlterError, match=r"FFNCopy experts is no feed-forward.*--format onnx"), merged(soft, "c"):
        pass


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shared", [None, (Bottleneck(rank=3), 2, TaskSelector())], ids=["stage1", "stage2"])
def test_parallel_bottlenecks_become_one_adapter(family, shared, tmp_path):
    model = mixture(family, Bottleneck(rank=4), Polytropon(), shared)
    plain = one_adapter(model, "b", tiny_model(family))
    assert plain.tasks == ["b"]
    assert plain.num_experts == 1
    assert next(iter(plain.layers.values())).experts.rank == 3 * 4 + (2 * 3 if shared else 0)
    assert (logits(plain, "b") - logits(model, "b")).abs().max() <= 1e-5


@pytest.mark.parametrize("router", BY_TASK, ids=lambda router: f"{type(router).__name__}{getattr(router, 'hard', '')}")
def test_bottlenecks_of_every_router_by_task_become_one_adapter(router):
    model = mixture("llama", Bottleneck(rank=4), router)
    for task in TASKS:
        plain = one_adapter(model, task, tiny_model("llama"))
        assert (logits(plain, task) - logits(model, task)).abs().max() <= 1e-5


def test_an_expert_that_a_hard_selector_leaves_out_takes_no_room():
    model = mixture("llama", Bottleneck(rank=4, activation="silu"), TaskSelector(hard=True))
    plain = one_adapter(model, "a", tiny_model("llama"))
    assert {layer.experts.rank for layer in plain.layers.values()} == {4}
    assert (logits(plain, "a") - logits(model, "a")).abs().max() <= 1e-5


def test_a_trained_backbone_goes_along():
    model = mixture("llama", Bottleneck(rank=4), TaskSelector())
    model.train_backbone()
    for parameter in model.part_parameters()["backbone"]:
        parameter.data += 0.05 * torch.randn_like(parameter)
    plain = one_adapter(model, "b", tiny_model("llama"))
    assert (logits(plain, "b") - logits(model, "b")).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "router", [TokenGate(), TaskGate(), TopK(), ModSquad(), Description()], ids=lambda r: type(r).__name__
)
def test_a_stage_1_router_that_reads_the_input_is_refused_with_the_way_out(router):
    model = mixture("llama", LoRA(rank=4), router)
    with pytest.raises(AlterError) as refused, merged(model, "a"):
        pass
    (message,) = refused.value.messages
    assert message.startswith(f"{type(router).__name__}, the router of stage 1, reads the ")
    assert "--format alter" in message
    assert ("--format onnx" in message) == (not router.reads_prompt)
    assert "--stage stage1" not in message


@pytest.mark.parametrize("gate", [SharedGate(hidden=4), FirstPositionGate(hidden=4)], ids=lambda r: type(r).__name__)
def test_a_stage_2_gate_that_reads_the_input_is_refused_and_names_stage_1(gate):
    model = mixture("llama", Bottleneck(rank=4), TaskSelector(), (Bottleneck(rank=4), 2, gate))
    before = copy.deepcopy(model.state_dict())
    for collapse in (lambda: merged(model, "a").__enter__(), lambda: one_adapter(model, "a", tiny_model("llama"))):
        with pytest.raises(AlterError, match=r"the router of stage 2, reads the hidden states.*--stage stage1"):
            collapse()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("expert", "shared", "message"),
    [
        (Bottleneck(rank=4), None, "--format adapter"),
        (LoRA(rank=4), (LoRA(rank=4), 2, TaskSelector()), "--stage stage1"),
    ],
)
def test_what_is_no_feed_forward_is_not_merged(expert, shared, message):
    with pytest.raises(AlterError, match=message), merged(mixture("llama", expert, TaskSelector(), shared), "a"):
        pass


@pytest.mark.parametrize(
    ("expert", "shared", "message"),
    [
        (LoRA(rank=4), None, "--format hf"),
        (Bottleneck(rank=4), (Bottleneck(rank=4, activation="relu"), 2, TaskSelector()), "different activations"),
    ],
)
def test_what_does_not_concatenate_is_refused(expert, shared, message):
    with pytest.raises(AlterError, match=message):
        one_adapter(mixture("llama", expert, TaskSelector(), shared), "a", tiny_model("llama"))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31), rows=st.integers(1, 3), length=st.integers(1, 5), which=st.integers(0, len(BY_TASK) - 1)
)
def test_a_router_that_says_it_reads_the_task_alone_does(seed, rows, length, which):
    model = mixture("llama", LoRA(rank=2), BY_TASK[which])
    router = next(iter(model.layers.values())).router
    x = torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(seed)) * 10
    task = seed % len(TASKS)
    gates = router(x, Routing(torch.full((rows,), task)))
    assert gates.shape == (rows, 1, len(TASKS))
    assert torch.allclose(gates, router.task_gates(task).expand_as(gates))
