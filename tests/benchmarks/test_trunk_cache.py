"""What the trunk cache's benchmark counts, against what torch counts."""

import copy

import pytest
from torch.utils.flop_counter import FlopCounterMode

from alter.nn import LoRA, MTAModel, TaskSelector, TrunkCache
from tests.nn.test_model import train_batch
from tests.nn.tiny import tiny_model


@pytest.mark.parametrize("adapted", [1, 2, 3])
def test_the_multiply_adds_of_a_step_are_those_that_torch_counts(program, tmp_path, adapted):
    backbone = tiny_model("llama")
    backbone.set_attn_implementation("eager")  # whose products torch counts
    model = MTAModel(backbone, ["a", "b"], f"last:{adapted}").train()
    model.add_experts(LoRA(rank=4), TaskSelector(hard=True))
    data = train_batch(model, tasks=(0, 1, 1, 0))
    whole, upper = program("trunk_cache").multiply_adds(model, data, 4 - adapted, rank=4, active=1)

    def counted(model):
        with FlopCounterMode(display=False) as counter:
            model(data).losses.mean().backward()
        return counter.get_total_flops() / 2

    cached = copy.deepcopy(model)
    assert counted(model) == pytest.approx(whole, rel=0.01)
    assert cached.body.cache_trunks(TrunkCache(folder=tmp_path), "here")
    cached(data)  # fills it
    assert counted(cached) == pytest.approx(upper, rel=0.01)
