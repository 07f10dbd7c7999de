"""What the trunk cache's benchmark counts, against what torch counts."""

import copy
import importlib
import sys
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from alter.nn import LoRA, MTAModel, TaskSelector, TrunkCache

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("trunk_cache")
    for name in ("trunk_cache", "mixtures", "common"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("adapted", [1, 2, 3])
def test_the_multiply_adds_of_a_step_are_those_that_torch_counts(benchmark, tmp_path, adapted):
    config = LlamaConfig(
        vocab_size=211,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    model = MTAModel(AutoModelForCausalLM.from_config(config), ["a", "b"], f"last:{adapted}")
    model.add_experts(LoRA(rank=4), TaskSelector(hard=True))
    data = benchmark.common.batch(model.train(), rows=3, length=24, targets=5)
    data |= {"input_ids": data["input_ids"] % 211, "labels": data["labels"].where(data["labels"] < 0, 3)}
    whole, upper = benchmark.multiply_adds(model, data, 4 - adapted, rank=4, active=1)

    def counted(model):
        with FlopCounterMode(display=False) as counter:
            model(data).losses.mean().backward()
        return counter.get_total_flops() / 2

    cached = copy.deepcopy(model)
    assert counted(model) == pytest.approx(whole, rel=0.01)
    assert cached.body.cache_trunks(TrunkCache(folder=tmp_path), "here")
    cached(data)  # fills it
    assert counted(cached) == pytest.approx(upper, rel=0.01)
