"""Products of few rows are the usual products, and made for few rows alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from alter.nn import LoRA, MTAModel, TaskSelector, thin
from alter.nn.decoding import generate
from alter.nn.stepping import StepDecoder
from alter.nn.thin import MKL_MOST_ROWS, MOST_ROWS, ThinProducts
from tests.nn.tiny import tiny_model


class Products(TorchDispatchMode):
    """Notes the left side's rows of every matrix product."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.matmul.default, torch.ops.aten.linear.default):
            self.rows.append(args[0][..., 0].numel())
        return func(*args, **(kwargs or {}))


MAKER = thin._is_intel


@pytest.fixture(autouse=True, params=[False, True], ids=["other", "intel"], scope="module")
def intel(request):
    """Whose processor it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thin, "_is_intel", lambda: request.param)
        yield request.param


def layer(weight, bias=None):
    """A linear map of this weight."""
    made = nn.Linear(*weight.t().shape, bias=bias is not None, dtype=weight.dtype)
    made.weight = nn.Parameter(weight)
    if bias is not None:
        made.bias = nn.Parameter(bias)
    return made


def linear(x, weight, bias=None):
    """The map of x where products are thin, and the rows of the left side of its product."""
    made = layer(weight, bias)
    with torch.no_grad(), ThinProducts(made).of(x[..., 0].numel()), Products() as products:
        found = made(x)
    return found, products.rows


@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    features=st.integers(1, 9),
    outputs=st.integers(1, 9),
    strided=st.booleans(),
)
def test_of_any_shape_it_is_the_usual_product(shape, features, outputs, strided):
    x = torch.randn(*shape, features, dtype=torch.float32)
    weight = torch.randn(features, outputs).t() if strided else torch.randn(outputs, features)
    found, _ = linear(x, weight)
    expected = (x.double().unsqueeze(-2) * weight.double()).sum(-1)
    assert found.shape == expected.shape
    assert found.is_contiguous()  # as views of it are taken
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, MKL_MOST_ROWS, MKL_MOST_ROWS + 1, MOST_ROWS, MOST_ROWS + 1])
def test_the_weight_is_on_the_left_for_few_rows_alone(rows, dtype, intel):
    _, left = linear(torch.randn(rows, 1, 7).to(dtype), torch.randn(100, 7).to(dtype))
    usual = rows in (1, MOST_ROWS + 1) or (intel and dtype == torch.float32 and rows <= MKL_MOST_ROWS)
    assert left == [rows if usual else 100]


def test_bf16_is_the_product_of_its_values():
    x, weight = torch.randn(4, 1, 7).bfloat16(), torch.randn(100, 7).bfloat16()
    found, left = linear(x, weight)
    assert left == [100]
    torch.testing.assert_close(found, F.linear(x.float(), weight.float()).bfloat16(), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_precisions_are_left_alone(dtype):
    _, left = linear(torch.randn(4, 7, dtype=dtype), torch.randn(100, 7, dtype=dtype))
    assert left == [4]


def test_a_bias_and_gradients_are_left_alone():
    x, weight, bias = torch.randn(20, 7), torch.randn(100, 7), torch.randn(100)
    torch.testing.assert_close(linear(x, weight, bias)[0], F.linear(x, weight, bias))
    made = layer(weight)
    with ThinProducts(made).of(20), Products() as products:
        made(x).sum().backward()
    assert products.rows[0] == 20
    torch.testing.assert_close(made.weight.grad, x.sum(0).expand(100, -1))


def test_a_batch_of_many_rows_is_left_alone_where_a_call_has_few():
    """Such as the last of a prompt's positions: a batch gains as a whole or not at all."""
    made = layer(torch.randn(100, 7))
    for rows in (1, MOST_ROWS + 1):
        with torch.no_grad(), ThinProducts(made).of(rows), Products() as products:
            made(torch.randn(20, 7))
        assert products.rows == [20]


def test_maps_are_as_they_were_afterwards():
    class Other(nn.Linear):
        pass

    plain, other, replaced = layer(torch.randn(100, 7)), Other(7, 100, bias=False), layer(torch.randn(100, 7))
    replaced.forward = lambda x: x
    kept = replaced.forward
    with torch.no_grad(), ThinProducts(nn.ModuleList([plain, other, replaced])).of(20), Products() as products:
        plain(torch.randn(20, 7))
        other(torch.randn(20, 7))
        replaced(torch.randn(20, 7))
    assert products.rows == [100, 20]
    assert replaced.forward is kept
    assert not any("forward" in vars(module) for module in (plain, other))
    with pytest.raises(KeyboardInterrupt), ThinProducts(plain).of(20):
        raise KeyboardInterrupt
    assert "forward" not in vars(plain)


def heads(model, decode):
    """The left side's rows of the head's products."""
    head, found = model.backbone.get_output_embeddings(), []
    with torch.inference_mode(), Products() as products:
        head.register_forward_pre_hook(lambda *_: products.rows.clear())
        head.register_forward_hook(lambda *_: found.extend(products.rows[:1]))
        decode()
    return found


@pytest.mark.parametrize("beams", [1, 3])
def test_decoding_tells_how_many_rows_it_has(beams, intel):
    rows = 2 if beams == 1 else 6
    model = answering("llama")
    found = heads(model, lambda: generate(model, prompts(2), 3, num_beams=beams))
    vocabulary = model.backbone.get_output_embeddings().weight.shape[0]
    few = rows if intel else vocabulary
    assert found == [few] * len(found)
    assert len(found) >= 2


def test_steps_tell_how_many_rows_they_have(intel):
    model = answering("llama")
    decoder = StepDecoder(model, [], lambda *_: True)
    decoder.join(["a", "b"], prompts(2), [4, 4])
    vocabulary = model.backbone.get_output_embeddings().weight.shape[0]
    assert heads(model, decoder.step) == [2 if intel else vocabulary]


def answering(family):
    """A model that answers for one task."""
    model = MTAModel(tiny_model(family), ["a"], "last:1")
    model.add_experts(LoRA(rank=2), TaskSelector())
    return model.eval()


def prompts(rows):
    """So many prompts."""
    ids = torch.randint(5, 40, (rows, 6))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "task_ids": torch.zeros(rows, dtype=torch.long),
    }


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_head_reads_the_last_positions_in_one_piece(family):
    """Else torch makes a batched product of them, and copies the weight for each."""
    model = answering(family)
    strides = []
    head = model.backbone.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, args: strides.append(args[0].is_contiguous()))
    generate(model, prompts(3), 2)
    assert len(strides) == 2
    assert all(strides)


@pytest.mark.parametrize(
    ("described", "expected"), [("vendor_id\t: GenuineIntel\n", True), ("vendor_id\t: AuthenticAMD\n", False)]
)
def test_the_maker_is_read_from_the_system(described, expected, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(described)
    monkeypatch.setattr(thin, "Path", lambda _: tmp_path / "cpuinfo")
    assert MAKER.__wrapped__() is expected
