"""Products of few rows are the usual products, and made for few rows alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from alter.nn import LoRA, MTAModel, TaskSelector, thin
from alter.nn.decoding import generate
from alter.nn.thin import MKL_MOST_ROWS, MOST_ROWS, ThinProducts, thin_products
from tests.nn.tiny import tiny_model


class Products(TorchDispatchMode):
    """Notes the left side's rows of every matrix product."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.rows.append(len(args[0]))
        return func(*args, **(kwargs or {}))


MAKER = thin._is_intel


@pytest.fixture(autouse=True, params=[False, True], ids=["other", "intel"], scope="module")
def intel(request):
    """Whose processor it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thin, "_is_intel", lambda: request.param)
        yield request.param


def linear(x, weight, bias=None):
    """F.linear within the mode, and the rows of the left side of its product."""
    with torch.no_grad(), ThinProducts(), Products() as products:
        found = F.linear(x, weight, bias)
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
    x, weight, bias = torch.randn(4, 7), torch.randn(100, 7, requires_grad=True), torch.randn(100)
    torch.testing.assert_close(linear(x, weight, bias)[0], F.linear(x, weight, bias))
    with ThinProducts(), Products() as products:
        F.linear(x, weight).sum().backward()
    assert products.rows[0] == 4
    torch.testing.assert_close(weight.grad, x.sum(0).expand(100, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, MKL_MOST_ROWS, MKL_MOST_ROWS + 1, MOST_ROWS + 1])
def test_calls_are_looked_at_where_some_are_changed(rows, dtype, intel):
    useless = rows == 1 or (intel and dtype == torch.float32 and rows <= MKL_MOST_ROWS)
    assert isinstance(thin_products(rows, dtype, torch.device("cpu")), ThinProducts) != useless
    assert not isinstance(thin_products(rows, dtype, torch.device("cuda")), ThinProducts)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_head_reads_the_last_positions_in_one_piece(family):
    """Else torch makes a batched product of them, and copies the weight for each."""
    model = MTAModel(tiny_model(family), ["a"], "last:1")
    model.add_experts(LoRA(rank=2), TaskSelector())
    model.eval()
    strides = []
    head = model.backbone.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, args: strides.append(args[0].is_contiguous()))
    ids = torch.randint(5, 40, (3, 6))
    generate(
        model,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "task_ids": torch.zeros(3, dtype=torch.long)},
        2,
    )
    assert len(strides) == 2
    assert all(strides)


@pytest.mark.parametrize(
    ("described", "expected"), [("vendor_id\t: GenuineIntel\n", True), ("vendor_id\t: AuthenticAMD\n", False)]
)
def test_the_maker_is_read_from_the_system(described, expected, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(described)
    monkeypatch.setattr(thin, "Path", lambda _: tmp_path / "cpuinfo")
    assert MAKER.__wrapped__() is expected
