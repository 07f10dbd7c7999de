"""Feed-forward blocks are found by structure, with the right roles."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.bloom.modeling_bloom import BloomForCausalLM

from alter.errors import AlterError
from alter.nn.feed_forward import find_feed_forwards, select_layers
from alter.nn.linear import dense_weight, linear_shape
from tests.nn.tiny import FAMILIES, tiny_model

# By hand from the models' sources: names of the first and last block, (gate, up, down), sizes, blocks.
EXPECTED = {
    "t5": (
        "encoder.block.0.layer.1.DenseReluDense",
        "decoder.block.2.layer.2.DenseReluDense",
        ("wi_0", "wi_1", "wo"),
        48,
        6,
    ),
    "bart": ("model.encoder.layers.0", "model.decoder.layers.2", (None, "fc1", "fc2"), 48, 6),
    "gpt2": ("transformer.h.0.mlp", "transformer.h.3.mlp", (None, "c_fc", "c_proj"), 128, 4),
    "llama": ("model.layers.0.mlp", "model.layers.3.mlp", ("gate_proj", "up_proj", "down_proj"), 48, 4),
    "qwen2": ("model.layers.0.mlp", "model.layers.3.mlp", ("gate_proj", "up_proj", "down_proj"), 48, 4),
    "gemma2": ("model.layers.0.mlp", "model.layers.3.mlp", ("gate_proj", "up_proj", "down_proj"), 48, 4),
}  # fmt: skip
DECODER = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def others():
    """More families, a few layers each: (model, blocks, roles, inline)."""
    torch.manual_seed(0)
    yield (
        Qwen3ForCausalLM(Qwen3Config(**DECODER, head_dim=8, num_key_value_heads=2)),
        2,
        ("gate_proj", "up_proj"),
        False,
    )
    yield (
        Gemma3ForCausalLM(Gemma3TextConfig(**DECODER, head_dim=8, num_key_value_heads=2)),
        2,
        ("gate_proj", "up_proj"),
        False,
    )
    yield GPTNeoXForCausalLM(GPTNeoXConfig(**DECODER)), 2, (None, "dense_h_to_4h"), False
    opt = OPTConfig(
        vocab_size=50, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    yield OPTForCausalLM(opt), 2, (None, "fc1"), True
    t5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    yield T5ForConditionalGeneration(T5Config(**t5)), 4, (None, "wi"), False  # d = h, and ReLU


def weights(model, block):
    """gate, up and down as functions, from the tensors alone."""
    owner = model.get_submodule(block.name)

    def function(name):
        weight, bias = dense_weight(owner.get_submodule(name))
        return lambda x: F.linear(x, weight, bias)

    return [None if name is None else function(name) for name in (block.gate, block.up, block.down)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_of_every_family_is_found(family):
    first, last, roles, intermediate, count = EXPECTED[family]
    found = find_feed_forwards(tiny_model(family))
    assert [block.layer for block in found] == list(range(count))
    assert (found[0].name, found[-1].name) == (first, last)
    assert {(b.gate, b.up, b.down) for b in found} == {roles}
    assert {(b.hidden_size, b.intermediate_size) for b in found} == {(32, intermediate)}
    assert {b.inline for b in found} == {family == "bart"}
    half = count // 2
    assert [b.index for b in found] == ([*range(half)] * 2 if family in ("t5", "bart") else [*range(count)])
    assert len({b.stack for b in found}) == (2 if family in ("t5", "bart") else 1)


@pytest.mark.parametrize("case", range(5))
def test_other_families(case):
    model, count, roles, inline = list(others())[case]
    found = find_feed_forwards(model)
    assert len(found) == count
    assert {(b.gate, b.up) for b in found} == {roles}
    assert {b.inline for b in found} == {inline}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "bart"])
def test_the_roles_give_what_the_block_gives(family):
    model = tiny_model(family)
    for block in find_feed_forwards(model):
        gate, up, down = weights(model, block)
        x = torch.randn(2, 3, 32)
        inner = block.activation(up(x)) if gate is None else block.activation(gate(x)) * up(x)
        torch.testing.assert_close(down(inner), model.get_submodule(block.name)(x), rtol=1e-4, atol=1e-6)


def test_the_inline_roles_give_what_the_layer_gives():
    model = tiny_model("bart")
    for block in find_feed_forwards(model):
        layer, seen = model.get_submodule(block.name), {}
        layer.get_submodule(block.up).register_forward_pre_hook(lambda _, args, s=seen: s.update(x=args[0]))
        layer.get_submodule(block.down).register_forward_hook(lambda _, args, out, s=seen: s.update(y=out))
        model(input_ids=torch.arange(6)[None], decoder_input_ids=torch.arange(4)[None])
        _, up, down = weights(model, block)
        torch.testing.assert_close(down(block.activation(up(seen["x"]))), seen["y"], rtol=1e-4, atol=1e-6)


def test_the_gate_is_told_from_its_partner_by_what_they_do_not_by_order_or_name():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.a(F.silu(self.c(x)) * self.b(x))  # the activation is held nowhere

    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"x": Block()}) for _ in range(3))
    found = find_feed_forwards(model)
    assert [(b.name, b.gate, b.up, b.down) for b in found] == [(f"layers.{i}.x", "c", "b", "a") for i in range(3)]


def test_a_block_of_another_function_is_not_taken():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.act = nn.Linear(8, 16), nn.Linear(16, 8), nn.GELU()

        def forward(self, x):
            return self.down(F.layer_norm(self.act(self.up(x)), (16,)))

    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"ffn": Normed()}) for _ in range(2))
    with pytest.raises(AlterError, match=r"^ffn: no feed-forward block of Module .*ffn: '\*\.mlp'"):
        find_feed_forwards(model)
    with pytest.raises(AlterError, match=r"ffn: '\*\.ffn' matches layers\.0\.ffn, but Normed does not compute"):
        find_feed_forwards(model, "*.ffn")


def test_an_inline_block_of_another_function_is_not_taken():
    model = tiny_model("bart")
    layer = model.model.encoder.layers[1]
    layer.fc2.register_forward_pre_hook(lambda _, args: (F.layer_norm(args[0], (48,)),), prepend=True)
    assert [block.layer for block in find_feed_forwards(model)] == [0, 2, 3, 4, 5]
    with pytest.raises(AlterError, match=r"ffn: .*model\.encoder\.layers\.1, but BartEncoderLayer does not compute"):
        find_feed_forwards(model, "model.encoder.layers.?")


def test_a_model_is_looked_through_wherever_new_tensors_are_made():
    model = tiny_model("llama")
    with torch.device("meta"):  # as Lightning makes a GPU the default while a model is made
        found = find_feed_forwards(model)
    assert found == find_feed_forwards(model)


def test_attention_alone_is_no_feed_forward():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.MultiheadAttention(16, 4) for _ in range(2))
    with pytest.raises(AlterError, match="ffn"):
        find_feed_forwards(model)
    # BERT's two maps stand in two modules, of which the second adds and normalises
    with pytest.raises(AlterError, match="BertModel"):
        find_feed_forwards(BertModel(BertConfig(**DECODER)))


@pytest.mark.parametrize("pattern", ["mlp", "*.mlp", r"model\.layers\.\d+\.mlp", "model.layers.*.mlp", "*mlp*"])
def test_an_explicit_pattern(pattern):
    model = tiny_model("llama")
    found = find_feed_forwards(model, pattern)
    plain = find_feed_forwards(model)
    assert [(b.name, b.layer, b.stack, b.gate, b.up) for b in found] == [
        (b.name, b.layer, b.stack, b.gate, b.up) for b in plain
    ]


def test_a_pattern_that_names_some_layers_keeps_their_numbers():
    model = tiny_model("t5")
    found = find_feed_forwards(model, r"decoder\.block\.[12]\.layer\.2\.DenseReluDense")
    assert [(b.layer, b.index, b.stack) for b in found] == [(1, 1, "decoder.block"), (2, 2, "decoder.block")]


def test_a_block_outside_of_any_stack_needs_a_pattern():
    model = nn.Module()
    model.mlp = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    with pytest.raises(AlterError, match="ffn"):
        find_feed_forwards(model)
    (block,) = find_feed_forwards(model, "mlp")
    assert (block.name, block.up, block.down, block.layer, block.intermediate_size) == ("mlp", "0", "2", 0, 12)


def test_a_block_that_cannot_be_run_alone_is_taken_inline_where_it_is_named():
    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4)).eval()
    found = find_feed_forwards(model, "*.mlp")
    assert [(b.name, b.inline, b.up) for b in found] == [
        (f"transformer.h.{i}.mlp", True, "dense_h_to_4h") for i in (0, 1)
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.mpl", "ffn: '.*mpl' matches no module of LlamaForCausalLM.*Did you mean 'mlp'"),
        ("*.self_attn", "ffn: .*matches model.layers.0.self_attn, but LlamaAttention does not compute"),
        ("*.input_layernorm", "ffn: .*LlamaRMSNorm does not compute"),
        ("(", "ffn: .*matches no module"),
    ],
)
def test_a_wrong_pattern_says_so(pattern, message):
    with pytest.raises(AlterError, match=message):
        find_feed_forwards(tiny_model("llama"), pattern)


def test_a_mixture_of_experts_is_not_taken_for_plain_blocks():
    model, block = nn.Module(), tiny_model("llama").model.layers[0].mlp
    experts = [nn.ModuleDict({"experts": nn.ModuleList(copy.deepcopy(block) for _ in range(3))}) for _ in range(2)]
    model.layers = nn.ModuleList(experts)
    with pytest.raises(AlterError, match="ffn"):
        find_feed_forwards(model)


def test_looking_changes_nothing(tiny_models):
    tiny_models.train()
    tiny_models.get_submodule(find_feed_forwards(tiny_models)[0].name).eval()
    before = copy.deepcopy(tiny_models.state_dict())
    flags = [module.training for module in tiny_models.modules()]
    random = torch.get_rng_state()
    find_feed_forwards(tiny_models)
    assert flags == [module.training for module in tiny_models.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert all(not module._forward_pre_hooks for module in tiny_models.modules())
    assert all(torch.equal(before[key], value) for key, value in tiny_models.state_dict().items())


def test_dropout_does_not_hide_a_block():
    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.5)
    assert len(find_feed_forwards(T5ForConditionalGeneration(config).train())) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tiny_models):
    exact = find_feed_forwards(tiny_models)
    rounded = find_feed_forwards(tiny_models.to(dtype))
    assert [(b.name, b.gate, b.up) for b in rounded] == [(b.name, b.gate, b.up) for b in exact]


@pytest.mark.parametrize("family", FAMILIES)
def test_select_layers(family):
    found = find_feed_forwards(tiny_model(family))
    numbers = {
        selection: [b.layer for b in select_layers(found, selection)] for selection in ("all", "last:2", "last:1")
    }
    both = family in ("t5", "bart")
    assert numbers == {
        "all": [0, 1, 2, 3, 4, 5] if both else [0, 1, 2, 3],
        "last:2": [1, 2, 4, 5] if both else [2, 3],
        "last:1": [2, 5] if both else [3],
    }
    assert [b.layer for b in select_layers(found, [3, 0, 3])] == [0, 3]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("last:101%", "layers: 'last:101%' asks for more"),
        ("last:40", "layers: 'last:40' asks for more layers than the backbone's 4; write last:4"),
        ("last:0", "layers: 'last:0' is not understood"),
        ("lest:4", "layers: 'lest:4' is not understood.*Did you mean 'last:4'"),
        ("last:-1", "layers"),
        ("", "layers"),
        ([], r"layers: \[\] names no layer"),
        ([0, 4, 9], "layers: .* in layer 4, 9; its layers are 0 to 3"),
        ([-1], "layers: .* in layer -1"),
        ([True], "layers"),
        (["1"], "layers"),
    ],
)
def test_wrong_layers_say_so(layers, message):
    with pytest.raises(AlterError, match=message):
        select_layers(find_feed_forwards(tiny_model("llama")), layers)


def test_last_counts_each_stack():
    with pytest.raises(AlterError, match="the backbone's 3 in a stack; write last:3"):
        select_layers(find_feed_forwards(tiny_model("t5")), "last:4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_weight_of_linear_and_conv1d(dtype):
    from transformers.pytorch_utils import Conv1D

    for linear in (nn.Linear(6, 10), nn.Linear(6, 10, bias=False), Conv1D(10, 6)):
        linear = linear.to(dtype)
        assert linear_shape(linear) == (6, 10)
        weight, bias = dense_weight(linear)
        assert weight.shape == (10, 6)
        assert weight.dtype == torch.float32
        assert weight.is_contiguous()
        x = torch.randn(3, 6).to(dtype)
        torch.testing.assert_close(F.linear(x.float(), weight, bias), linear(x).float(), rtol=0.02, atol=0.02)
        weight.zero_()  # a copy
        assert linear.weight.abs().sum() > 0
    assert linear_shape(nn.LayerNorm(4)) is None


@pytest.mark.slow
def test_the_real_models(smollm2, t5_small):
    from alter.nn.backbone import load_backbone

    for folder, count in ((smollm2, 30), (t5_small, 16)):
        model = load_backbone(folder)
        found = find_feed_forwards(model)
        assert len(found) == count
        for block in (found[0], found[-1]):
            gate, up, down = weights(model, block)
            x = torch.randn(2, 3, block.hidden_size)
            expected = model.get_submodule(block.name)(x)
            torch.testing.assert_close(down(block.activation(gate(x)) * up(x)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("share", "of_three", "of_four"), [("last:40%", 2, 2), ("last:1%", 1, 1), ("last:100%", 3, 4)])
def test_a_share_of_the_layers_is_taken_of_each_stack_and_rounded_up(share, of_three, of_four):
    assert len(select_layers(find_feed_forwards(tiny_model("t5")), share)) == 2 * of_three
    assert len(select_layers(find_feed_forwards(tiny_model("llama")), share)) == of_four
