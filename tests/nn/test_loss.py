"""The chunked loss against the whole cross-entropy, and the head by itself against the model's own logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from alter.nn import MTAModel, loss
from alter.nn.loss import token_losses
from tests.nn.tiny import FAMILIES, tiny_model


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 20), st.integers(1, 12), st.integers(0, 1000), st.booleans())
def test_losses_and_gradients_are_those_of_the_whole_logits_whatever_the_chunks(tokens, rows, seed, frozen):
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, 6, generator=g, requires_grad=True)
    plain = states.detach().clone().requires_grad_()
    head, targets = torch.randn(6, 11, generator=g), torch.randint(0, 11, (tokens,), generator=g)
    plain_head = head.clone().requires_grad_()
    head.requires_grad_(not frozen)
    weights = torch.randn(tokens, generator=g)
    sizes = []

    def logits(h):
        sizes.append(len(h))
        return h @ head

    before, loss.MAX_LOGITS = loss.MAX_LOGITS, rows * 11
    try:
        found = token_losses(states, targets, logits, 11, not frozen)
    finally:
        loss.MAX_LOGITS = before
    expected = F.cross_entropy(plain @ plain_head, targets, reduction="none")
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert max(sizes) <= rows  # never more logits at a time
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states.grad, plain.grad, atol=1e-5, rtol=1e-5)
    if not frozen:
        torch.testing.assert_close(head.grad, plain_head.grad, atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backward_pass_makes_no_copy_of_the_logits(family):
    model = MTAModel(tiny_model(family), ["a"], "last:1")
    states, targets = torch.randn(7, 32, requires_grad=True), torch.arange(7)
    made = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.numel() == 7 * model.body.vocabulary:
                made.append(func.overloadpacket)
            return found

    with Seen():
        token_losses(states, targets, model.body.logits, model.body.vocabulary).mean().backward()
    assert torch.ops.aten.mm in made
    assert not {torch.ops.aten.copy_, torch.ops.aten.clone, torch.ops.aten.new_zeros} & set(made)
