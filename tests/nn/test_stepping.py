"""Rows that come and go against each row decoded alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alter.nn import Description, LoRA, MTAModel, SharedGate, TaskSelector
from alter.nn.decoding import generate
from alter.nn.stepping import StepDecoder
from tests.nn.tiny import tiny_model
from tests.runs import perturb

FAMILIES = ["llama", "qwen2", "gpt2"]


def made(family, router=None):
    model = MTAModel(tiny_model(family), ["a", "b", "c"], "last:2")
    model.add_experts(LoRA(rank=4), router or TaskSelector())
    model.add_shared(LoRA(rank=4), 2, SharedGate(hidden=8))
    model.add_newcomer("d")
    perturb(model)
    return model.eval()


MODELS = {family: made(family) for family in FAMILIES}
MODELS["described"] = made("llama", Description())


def prompts(rows):
    """Left-padded prompts of (task, tokens)."""
    longest = max(len(tokens) for _, tokens in rows)
    ids = torch.tensor([[0] * (longest - len(tokens)) + tokens for _, tokens in rows])
    mask = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for _, tokens in rows])
    return {"input_ids": ids, "attention_mask": mask, "task_ids": torch.tensor([task for task, _ in rows])}


ROW = st.tuples(st.integers(0, 3), st.lists(st.integers(3, 99), min_size=1, max_size=7))


@pytest.mark.parametrize("name", list(MODELS))
@settings(max_examples=12, deadline=None)
@given(rows=st.lists(st.tuples(ROW, st.integers(1, 9), st.integers(0, 6)), min_size=1, max_size=6))
def test_whenever_a_row_joins_it_says_what_it_says_alone(name, rows):
    model, ended, seen = MODELS[name], {}, {}

    def watch(key, tokens, last):
        assert len(tokens) - seen.get(key, 0) in (0, 1)
        seen[key] = len(tokens)
        if last:
            ended[key] = list(tokens)
        return True

    decoder = StepDecoder(model, (), watch)
    waiting = sorted(range(len(rows)), key=lambda key: rows[key][2])
    for step in range(200):
        now = [key for key in waiting if rows[key][2] <= step]
        if now:
            decoder.join(now, prompts([rows[key][0] for key in now]), [rows[key][1] for key in now])
            waiting = [key for key in waiting if key not in now]
        decoder.step()
        if not waiting and not decoder.rows:
            break
    for key, (row, limit, _) in enumerate(rows):
        assert ended[key] == generate(model, prompts([row]), limit)[0]


def test_a_row_that_nobody_wants_leaves_and_the_others_go_on():
    model, ended = MODELS["llama"], {}

    def watch(key, tokens, last):
        if last:
            ended[key] = list(tokens)
        return key != "unwanted" or len(tokens) < 2

    decoder = StepDecoder(model, (), watch)
    rows = [(0, [5, 6, 7]), (2, [9])]
    decoder.join(["unwanted", "wanted"], prompts(rows), [20, 6])
    for _ in range(6):
        decoder.step()
    assert decoder.rows == []
    assert ended == {"wanted": generate(model, prompts(rows[1:]), 6)[0]}


@pytest.mark.parametrize(
    ("family", "fits"), [("llama", True), ("gpt2", True), ("t5", False), ("bart", False), ("gemma2", False)]
)
def test_only_models_whose_cache_can_be_put_together_fit(family, fits):
    model = MTAModel(tiny_model(family), ["a"], "last:1")
    model.add_experts(LoRA(rank=2), TaskSelector())
    assert StepDecoder.fits(model) == fits
