"""The chunked loss against the whole cross-entropy, and the head by itself against the model's own logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from alter.nn import MTAModel, loss
from alter.nn.loss import token_losses
from tests.nn.tiny import FAMILIES, tiny_model


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 20), st.integers(1, 12), st.integers(0, 1000))
def test_losses_and_gradients_are_those_of_the_whole_logits_whatever_the_chunks(tokens, rows, seed):
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, 6, generator=g, requires_grad=True)
    plain = states.detach().clone().requires_grad_()
    head, targets = torch.randn(6, 11, generator=g), torch.randint(0, 11, (tokens,), generator=g)
    weights = torch.randn(tokens, generator=g)
    sizes = []

    def logits(h):
        sizes.append(len(h))
        return h @ head

    before, loss.MAX_LOGITS = loss.MAX_LOGITS, rows * 11
    try:
        found = token_losses(states, targets, logits, 11)
    finally:
        loss.MAX_LOGITS = before
    expected = F.cross_entropy(plain @ head, targets, reduction="none")
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert max(sizes) <= rows  # never more logits at a time
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states.grad, plain.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_by_itself_gives_the_models_own_logits(family):
    model = MTAModel(tiny_model(family), ["a"], "last:1")
    ids = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        if model.is_seq2seq:
            expected = model.backbone(**inputs, decoder_input_ids=ids).logits
            states = model.body.decode(ids, encoder_hidden_states=model.body.encode(**inputs)).last_hidden_state
        else:
            expected = model.backbone(**inputs).logits
            states = model.body.decode(**inputs).last_hidden_state
        found = model.body.logits(states.flatten(0, 1)).view_as(expected)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_a_head_that_trains_gets_its_gradient_whatever_the_chunks(rows, monkeypatch):
    monkeypatch.setattr(loss, "MAX_LOGITS", rows * 11)
    states, head = torch.randn(7, 6, requires_grad=True), torch.randn(6, 11, requires_grad=True)
    targets, weights = torch.randint(0, 11, (7,)), torch.rand(7)
    found = token_losses(states, targets, lambda h: h @ head, 11, head_trains=True)
    expected = F.cross_entropy(states @ head, targets, reduction="none")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad((found * weights).sum(), (states, head)),
        torch.autograd.grad((expected * weights).sum(), (states, head)),
    )
