"""Backbones: how they are found, loaded, checked and told from others."""

import io
import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GenerationConfig,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from alter.answering import answer_text
from alter.errors import AlterError
from alter.nn import MTAModel, backbone, hub
from alter.nn.backbone import backbone_fingerprint, is_seq2seq, load_backbone, load_tokenizer, resolve_backbone
from alter.nn.feed_forward import find_feed_forwards
from alter.nn.linear import dense_weight, linear_shape
from alter.nn.stepping import StepDecoder
from tests.nn.tiny import FAMILIES, tiny_model

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def write_tokenizer(folder, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "<pad>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special).save_pretrained(folder)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Folders of a tiny Llama and a tiny T5, whose sizes suit 4-bit blocks."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA)).save_pretrained(root / "llama")
    t5 = T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    T5ForConditionalGeneration(t5).save_pretrained(root / "t5")
    for name in ("llama", "t5"):
        write_tokenizer(root / name, eos_token="</s>")
    return root


@pytest.fixture
def llama(saved, tmp_path):
    """A copy of the tiny Llama's folder, to be changed."""
    return shutil.copytree(saved / "llama", tmp_path / "llama")


# -- finding ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_taken_as_it_is(saved):
    assert resolve_backbone(str(saved / "llama")) == saved / "llama"


def test_the_bundled_name_is_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr(backbone, "fetch", lambda name: tmp_path / name)
    assert resolve_backbone("smollm2-135m") == tmp_path / "smollm2-135m"


def test_a_hub_id_comes_from_the_cache_then_the_network(monkeypatch, saved):
    asked = []
    monkeypatch.setattr(backbone, "download_snapshot", lambda name: asked.append(name) or saved / "t5")
    monkeypatch.setattr(backbone, "cached_snapshot", lambda _: saved / "llama")
    assert resolve_backbone("owner/model") == saved / "llama"
    assert asked == []
    monkeypatch.setattr(backbone, "cached_snapshot", lambda _: None)
    assert resolve_backbone("owner/model") == saved / "t5"
    assert asked == ["owner/model"]


def test_the_hubs_own_cache_is_read_without_the_network(monkeypatch, saved, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo, commit = tmp_path / "models--owner--model", "0" * 40
    shutil.copytree(saved / "llama", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert resolve_backbone("owner/model") == repo / "snapshots" / commit
    (repo / "snapshots" / commit / "model.safetensors").unlink()  # what another program may have left
    assert hub.cached_snapshot("owner/model") is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "smollm2-135",
            "backbone: 'smollm2-135' is no folder and no bundled .*HF_HUB_OFFLINE.*Did you mean 'smollm2-135m'",
        ),
        ("owner/model", "backbone: 'owner/model' .*pass a folder or a bundled name by --backbone"),
        ("./nowhere", r"backbone: there is no folder \./nowhere"),
        ("/no/where", "backbone: there is no folder"),
        ("two words", "backbone: 'two words' is neither a folder nor a hub id"),
        ("", "backbone|config.json"),
    ],
)
def test_what_is_not_found_is_one_sentence_and_offline_nobody_is_asked(name, message, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address) or [])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AlterError, match=message) as error:
        resolve_backbone(name)
    assert len(error.value.messages) == 1
    assert not asked


def test_a_folder_that_lacks_files_says_which(llama):
    weights = llama / "model.safetensors"
    weights.rename(llama / "pytorch_model.bin")
    with pytest.raises(AlterError, match=r"pickle.*safetensors"):
        resolve_backbone(llama)
    (llama / "pytorch_model.bin").unlink()
    with pytest.raises(AlterError, match=r"no model\.safetensors"):
        resolve_backbone(llama)
    (llama / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(AlterError, match=r"names model-1\.safetensors, which the folder lacks"):
        resolve_backbone(llama)
    (llama / "config.json").write_text("{")
    with pytest.raises(AlterError, match=r"config\.json: not readable as JSON"):
        resolve_backbone(llama)
    (llama / "config.json").unlink()
    with pytest.raises(AlterError, match=r"no config\.json"):
        resolve_backbone(llama)


# -- loading ----------------------------------------------------------------------------------------------------------


def test_seq2seq_is_read_from_the_configuration_alone(saved, tmp_path):
    assert is_seq2seq(saved / "t5")
    assert not is_seq2seq(saved / "llama")
    shutil.copy(saved / "t5" / "config.json", tmp_path)
    assert is_seq2seq(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_frozen_and_gives_the_same(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    loaded = load_backbone(tmp_path)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.dtype == torch.float32
    ids = {"input_ids": torch.arange(3, 9)[None]}
    if is_seq2seq(tmp_path):
        ids["decoder_input_ids"] = ids["input_ids"]
    torch.testing.assert_close(loaded(**ids).logits, model(**ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize(
    ("precision", "linear", "tolerance"),
    [("fp32", "Linear", 0), ("bf16", "Linear", 0.05), ("int8", "Linear8bitLt", 0.05), ("nf4", "Linear4bit", 0.3)],
)
def test_precisions_run_forward_and_backward(saved, name, precision, linear, tolerance):
    exact, model = load_backbone(saved / name), load_backbone(saved / name, precision)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert type(model.get_output_embeddings()) is nn.Linear
    found = find_feed_forwards(model)
    assert [(b.name, b.gate, b.up) for b in found] == [(b.name, b.gate, b.up) for b in find_feed_forwards(exact)]
    assert type(model.get_submodule(f"{found[0].name}.{found[0].up}")).__name__ == linear
    embedded = model.get_input_embeddings()(torch.arange(3, 9)[None]).detach().requires_grad_()
    extra = {"decoder_input_ids": torch.arange(3)[None]} if name == "t5" else {}
    logits = model(inputs_embeds=embedded, **extra).logits
    logits.float().square().sum().backward()
    assert embedded.grad.abs().sum() > 0
    expected = exact(inputs_embeds=embedded.detach().float(), **extra).logits
    error = (logits.float() - expected).norm() / expected.norm()
    assert error <= tolerance
    assert precision == "fp32" or error > 0


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_dense_weight_of_quantised_maps(saved, precision):
    exact, model = load_backbone(saved / "llama"), load_backbone(saved / "llama", precision)
    name = "model.layers.0.mlp.down_proj"
    linear, original = model.get_submodule(name), exact.get_submodule(name)
    assert linear_shape(linear) == (128, 64)
    weight, bias = dense_weight(linear)
    assert weight.shape == (64, 128)
    assert weight.dtype == torch.float32
    assert bias is None
    assert (weight - original.weight).norm() / original.weight.norm() < (0.02 if precision == "int8" else 0.15)
    x = torch.randn(3, 128)
    torch.testing.assert_close(x @ weight.T, linear(x), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_quantised_maps_pass_gradients_back_after_inference_too(saved, precision):
    model = load_backbone(saved / "llama", precision)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 9)[None])  # bitsandbytes may choose a kernel here, and stay with it
    for block in find_feed_forwards(model):
        linear = model.get_submodule(f"{block.name}.{block.up}")
        weight, _ = dense_weight(linear)
        x, direction = torch.randn(5, 64, requires_grad=True), torch.randn(5, 128)
        linear(x).backward(direction)
        torch.testing.assert_close(x.grad, direction @ weight, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
@pytest.mark.parametrize(("place", "dtype"), [("cpu", torch.float32), ("cuda:0", torch.bfloat16)])
def test_quantised_maps_are_made_where_they_stay(saved, precision, place, dtype, monkeypatch):
    told = {}

    def from_pretrained(path, **options):
        told.update(options)
        raise OSError("no such device")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a GPU that nobody asks for
    with torch.device(place), pytest.raises(AlterError, match="no such device"):
        load_backbone(saved / "llama", precision)
    assert told["device_map"] == {"": torch.device(place)}
    assert told["dtype"] == dtype
    if precision == "nf4":
        assert told["quantization_config"].bnb_4bit_compute_dtype == dtype


@pytest.mark.parametrize(("precision", "hint"), [("bf61", "Did you mean 'bf16'"), ("int4", "fp32, bf16, int8, nf4")])
def test_an_unknown_precision(saved, precision, hint):
    with pytest.raises(AlterError, match=rf"precision: '{precision}'.*{hint}"):
        load_backbone(saved / "llama", precision)


def test_models_that_cannot_write_are_refused(tmp_path):
    bert = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    t5 = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    vit = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    untied = GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, tie_word_embeddings=False)
    cases = {
        "bert": (BertModel(bert), "bert is an encoder"),
        "masked": (BertForMaskedLM(bert), "bert is an encoder"),
        "encoder": (T5EncoderModel(t5), "weights lack|no language model head"),
        "vit": (ViTModel(vit), "vit has no language model head"),
        "headless": (GPT2Model(untied), r"weights lack lm_head\.weight"),
    }
    for name, (model, message) in cases.items():
        model.save_pretrained(tmp_path / name)
        with pytest.raises(AlterError, match=message):
            load_backbone(tmp_path / name)


def test_code_of_the_model_is_never_run(llama, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "n")
    config = json.loads((llama / "config.json").read_text())
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (llama / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": code}))
    (llama / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(AlterError, match="transformers does not know this model"):
        load_backbone(llama)
    assert not asked  # whether to run it


def test_truncated_weights_are_refused(llama):
    weights = llama / "model.safetensors"
    for kept in (weights.stat().st_size - 5, 40, 3):
        weights.write_bytes(weights.read_bytes()[:kept])
        with pytest.raises(AlterError, match="not a whole safetensors file"):
            load_backbone(llama)
        with pytest.raises(AlterError, match="not a whole safetensors file"):
            backbone_fingerprint(llama)


def test_quantised_weights_are_refused(llama):
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(AlterError, match="quantised already"):
        load_backbone(llama)


def test_backbones_of_more_than_1b_are_refused_before_they_are_loaded(llama, monkeypatch):
    monkeypatch.setattr(backbone, "MAX_PARAMETERS", 1000)
    with pytest.raises(AlterError, match="ALTER is for backbones under 1B parameters"):
        load_backbone(llama)


@pytest.mark.parametrize(("name", "forced"), [("llama", None), ("t5", 4)])
def test_answers_are_decoded_without_a_backbones_own_habits(saved, tmp_path, name, forced):
    folder = shutil.copytree(saved / name, tmp_path / name)
    habits = GenerationConfig(
        bos_token_id=2, eos_token_id=[1, 7], pad_token_id=0, decoder_start_token_id=0, repetition_penalty=1.3,
        no_repeat_ngram_size=2, min_length=9, forced_bos_token_id=forced, suppress_tokens=[3, 5], num_beams=4, do_sample=True,
    )  # fmt: skip
    habits.save_pretrained(folder)
    plain, chatty = load_backbone(saved / name), load_backbone(folder)
    ids = torch.arange(8, 20).view(2, 6)
    for key, value in {"eos_token_id": [1, 7], "pad_token_id": 0, "decoder_start_token_id": 0}.items():
        setattr(plain.generation_config, key, value)
    expected, found = (model.generate(input_ids=ids, max_new_tokens=12) for model in (plain, chatty))
    assert torch.equal(found, expected)
    assert chatty.generation_config.eos_token_id == [1, 7]
    if name == "llama":
        assert StepDecoder.fits(MTAModel(chatty, ["a"], "all"))


# -- tokenizer --------------------------------------------------------------------------------------------------------


def test_a_missing_padding_token_becomes_the_end_token(saved, tmp_path):
    tokenizer = load_tokenizer(saved / "llama")
    assert tokenizer.pad_token == "</s>"
    assert tokenizer("a b")["input_ids"] == [3, 4]
    write_tokenizer(tmp_path, eos_token="</s>", pad_token="<pad>")
    assert load_tokenizer(tmp_path).pad_token == "<pad>"


def test_an_answer_keeps_the_spaces_of_its_target(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "</s>", *(f"\u2581{word}" for word in ("Crohn", "'s", "disease", ",", "exon", "5", "do", "n't"))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    options = {"unk_token": "<unk>", "eos_token": "</s>", "clean_up_tokenization_spaces": True}
    PreTrainedTokenizerFast(tokenizer_object=made, **options).save_pretrained(tmp_path)
    tokenizer, text = load_tokenizer(tmp_path), "Crohn 's disease , exon 5 do n't"
    assert answer_text(tokenizer, tokenizer(text).input_ids) == text


def test_a_tokenizer_that_is_missing_or_has_no_end(llama, tmp_path):
    for file in llama.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(AlterError, match="tokenizer"):
        load_tokenizer(llama)
    write_tokenizer(llama)
    with pytest.raises(AlterError, match="eos_token"):
        load_tokenizer(llama)


# -- identity ---------------------------------------------------------------------------------------------------------


def test_the_fingerprint_stays_with_a_copy_and_with_other_files(saved, llama):
    original = backbone_fingerprint(saved / "llama")
    assert backbone_fingerprint(llama) == original
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "transformers_version": "9", "use_cache": False}))
    state = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, llama / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    assert backbone_fingerprint(llama) == original
    load_backbone(llama)


def test_the_fingerprint_tells_other_weights_and_another_function(saved, llama):
    original = backbone_fingerprint(saved / "llama")
    state = load_file(saved / "llama" / "model.safetensors")
    for name in state:  # any one tensor
        changed = {**state, name: state[name] + 0.01}
        save_file(changed, llama / "model.safetensors", metadata={"format": "pt"})
        assert backbone_fingerprint(llama) != original
    half = {name: value.bfloat16() for name, value in state.items()}
    save_file(half, llama / "model.safetensors", metadata={"format": "pt"})
    assert backbone_fingerprint(llama) != original
    shutil.copy(saved / "llama" / "model.safetensors", llama)
    assert backbone_fingerprint(llama) == original
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert backbone_fingerprint(llama) != original


class CountingFile(io.FileIO):
    """Counts the bytes that are read of all its kind."""

    read_bytes = 0

    def read(self, size=-1):
        found = super().read(size)
        CountingFile.read_bytes += len(found)
        return found

    def readinto(self, buffer):
        count = super().readinto(buffer)
        CountingFile.read_bytes += count
        return count


@pytest.mark.slow
def test_the_fingerprint_of_a_real_model_reads_little_of_it(smollm2, monkeypatch):
    opened = Path.open

    def counted(self, mode="r", buffering=-1, **named):
        if mode != "rb":
            return opened(self, mode, buffering, **named)
        file = CountingFile(self)
        return io.BufferedReader(file, max(buffering, io.DEFAULT_BUFFER_SIZE)) if buffering else file

    monkeypatch.setattr(Path, "open", counted)
    monkeypatch.setattr(CountingFile, "read_bytes", 0)
    backbone_fingerprint(smollm2)
    size = sum(file.stat().st_size for file in hub.weight_files(smollm2))
    assert 0 < CountingFile.read_bytes < size / 50


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4"])
def test_real_models_in_every_precision(smollm2, precision):
    model = load_backbone(smollm2, precision)
    assert len(find_feed_forwards(model)) == 30
    tokenizer = load_tokenizer(smollm2)
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    assert "Paris" in tokenizer.decode(logits.topk(5).indices)


@pytest.mark.slow
def test_a_real_seq2seq(t5_small):
    model, tokenizer = load_backbone(t5_small), load_tokenizer(t5_small)
    assert is_seq2seq(t5_small)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "</s>")
    assert len(find_feed_forwards(model)) == 16
