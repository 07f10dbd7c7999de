"""Attention that trains in bf16 on a processor."""

import pytest
import torch
from torch.nn import functional as F

from alter.nn.attention import TrainableAttention


def inputs(dtype, grad=True):
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(2, heads, 6, 8, generator=g) for heads in (4, 2, 2)]
    return [tensor.to(dtype).requires_grad_(grad) for tensor in made]


def attend(tensors, mask=None):
    return F.scaled_dot_product_attention(*tensors, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_bf16_is_computed_in_fp32_and_returned_in_bf16(masked, autocast):
    mask = torch.full((6, 6), -1e4).triu(1) if masked else None
    narrow = inputs(torch.bfloat16)
    wide = [tensor.detach().float().requires_grad_() for tensor in narrow]
    reference = attend(wide, mask)
    reference.square().sum().backward()
    seen = []
    with TrainableAttention(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = attend(narrow, None if mask is None else mask.bfloat16())
        seen.append(found.dtype)
    found.float().square().sum().backward()
    assert seen == [torch.bfloat16]
    assert torch.equal(found, reference.bfloat16())
    for a, b in zip(narrow, wide, strict=True):
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("dtype", "grad"), [(torch.float32, True), (torch.bfloat16, False)])
def test_all_else_is_as_it_was(dtype, grad):
    tensors = inputs(dtype, grad)
    plain = attend(tensors)
    with TrainableAttention():
        found = attend(tensors)
    assert torch.equal(found, plain)
    assert found.dtype == dtype


def test_without_gradients_the_fast_forward_pass_of_bf16_is_taken():
    tensors = inputs(torch.bfloat16)
    with torch.no_grad():
        plain = attend(tensors)
        with TrainableAttention():
            assert torch.equal(attend(tensors), plain)
