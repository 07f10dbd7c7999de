"""Attention that trains in bf16 on a processor."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from alter.nn import LoRA, MTAModel, TaskSelector
from alter.nn.attention import TrainableAttention, trainable_attention
from tests.nn.tiny import tiny_model


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
    with TrainableAttention(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = attend(narrow, None if mask is None else mask.bfloat16())
    found.float().square().sum().backward()
    assert found.dtype == torch.bfloat16
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


@pytest.mark.parametrize(
    ("dtype", "device", "needed"),
    [(torch.bfloat16, "cpu", True), (torch.float32, "cpu", False), (torch.bfloat16, "meta", False)],
)
def test_it_is_entered_for_bf16_on_a_processor_alone(dtype, device, needed):
    weight = torch.empty(2, dtype=dtype, device=device)
    assert isinstance(trainable_attention(weight), TrainableAttention) is needed
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(trainable_attention(weight), TrainableAttention) is (device == "cpu")


class Attention(TorchDispatchMode):
    """Notes what attention is computed in, with and without gradients."""

    def __init__(self):
        super().__init__()
        self.forward, self.backward = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in func.name() and "cpu" in func.name():
            noted, query = (self.backward, args[1]) if "backward" in func.name() else (self.forward, args[0])
            noted.append(query.dtype)
        return func(*args, **(kwargs or {}))


def batch_of_two():
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "task_ids": torch.tensor([0, 1])}


def model_of(family):
    torch.manual_seed(0)
    model = MTAModel(tiny_model(family).bfloat16(), ["a", "b"], "last:2")
    model.add_experts(LoRA(rank=2), TaskSelector())
    return model


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_model_in_bf16_has_no_backward_pass_of_attention_in_bf16(family):
    with Attention() as attention:
        model_of(family)(batch_of_two()).losses.mean().backward()
    assert attention.forward
    assert set(attention.backward) == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_checkpointing_computes_again_is_what_was(family):
    """In the backward pass, outside of what the forward pass ran in."""
    gradients = []
    for checkpointing in (False, True):
        model = model_of(family).train()
        if checkpointing:
            model.checkpoint_activations()
        model(batch_of_two()).losses.mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(gradient.any() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        largest = gradient.abs().max().clamp_min(1e-6)
        torch.testing.assert_close(gradients[1][name] / largest, gradient / largest, atol=0.1, rtol=0)  # of bf16
