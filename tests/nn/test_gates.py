"""How alike experts are, against what each of them adds by itself."""

import pytest
import torch

from alter.nn import Bottleneck, FFNCopy, LoRA, MTAModel, SharedGate, TaskSelector
from alter.nn.gates import expert_cosines
from tests.nn.tiny import tiny_model

TASKS = ["a", "b", "c"]
BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8]]),
    "attention_mask": torch.ones(1, 4, dtype=torch.long),
    "labels": torch.tensor([[-100, -100, 9, 1]]),
    "task_ids": torch.tensor([1]),
}


def model_of(family, expert, moved):
    model = MTAModel(tiny_model(family), TASKS, "last:2")
    model.add_experts(expert, TaskSelector())
    model.add_shared(expert, 2, SharedGate())
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameters in model.part_parameters().items():
            for parameter in parameters if moved and name in ("experts", "shared") else ():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
@pytest.mark.parametrize("expert", [Bottleneck(rank=4), LoRA(rank=4), FFNCopy()], ids=lambda e: type(e).__name__)
def test_the_cosines_are_those_of_what_one_hot_gates_add(family, expert):
    model = model_of(family, expert, moved=True)
    seen = {}
    for name, layer in model.layers.items():
        layer.router.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, args))
    found = expert_cosines(model, BATCH)
    assert found.keys() == {"experts", "shared"}
    for name, layer in model.layers.items():
        x, routing = seen[name]
        plain = layer.frozen.run(x, layer.frozen.linear) if layer.experts.contains_ffn else 0
        with torch.no_grad():
            alone = [layer.experts.mix(x, gate.view(1, 1, -1), layer.frozen, None, routing) for gate in torch.eye(3)]
        expected = [[torch.cosine_similarity(a - plain, b - plain, dim=-1).mean() for b in alone] for a in alone]
        torch.testing.assert_close(found["experts"][name], torch.tensor(expected), atol=1e-4, rtol=1e-4)
        assert found["shared"][name].shape == (2, 2)
        assert torch.allclose(found["shared"][name].diagonal(), torch.ones(2), atol=1e-4)


def test_experts_that_add_nothing_are_like_none():
    found = expert_cosines(model_of("llama", Bottleneck(rank=4), moved=False), BATCH)
    assert all(torch.equal(table, torch.zeros(3, 3)) for table in found["experts"].values())
