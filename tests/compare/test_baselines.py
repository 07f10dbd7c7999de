"""The baselines against the libraries' own use."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from alter.compare.baselines import BaselineModel, BaselineModule
from alter.errors import AlterError
from tests.nn.tiny import FAMILIES, tiny_model

peft = pytest.importorskip("peft")
TASKS = ["a", "b", "c"]


def batch(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 90, (3, 7), generator=g)
    labels = ids[:, :4].clone() if model.is_seq2seq else ids.masked_fill(torch.arange(7) < 4, -100)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "task_ids": torch.tensor([2, 0, 1]),
    }


def moved(model):
    torch.manual_seed(1)
    for parameter in model.tuned().values():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning_has_the_losses_and_gradients_of_the_backbone_itself(family):
    plain = tiny_model(family)
    model = BaselineModel(copy.deepcopy(plain), TASKS, "last:1", kind="full").train()
    data = batch(model)
    losses = model(data).losses
    losses.mean().backward()
    inputs = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"]}
    reference = plain.requires_grad_(True)
    if model.is_seq2seq:
        logits, targets = reference(**inputs, labels=data["labels"]).logits, data["labels"]
    else:
        logits, targets = reference(**inputs).logits[:, :-1], data["labels"][:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    expected.backward()
    torch.testing.assert_close(losses.mean(), expected)
    gradients = {name.replace(".ffn", ""): p.grad for name, p in model.backbone.named_parameters()}
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_is_the_librarys_own(family):
    model = moved(BaselineModel(tiny_model(family), TASKS, "last:2", kind="lora", rank=3)).eval()
    layers = list(model.layers.values())
    assert len(model.tuned()) == 2 * sum(len(layer.frozen.shapes) for layer in layers)
    # merged into the maps' weights, the same numbers come out of the untouched architecture
    data = batch(model)
    with torch.no_grad():
        losses = model(data).losses
        for module in model.backbone.modules():
            if hasattr(module, "merge"):
                module.merge()
                for key in module.lora_B:
                    module.lora_B[key].weight.zero_()
        torch.testing.assert_close(model(data).losses, losses, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_poly_mixes_each_rows_skills_by_its_task(family):
    """``W + (sum_s w_s A_s)(sum_s w_s B_s) / rank``, w the sigmoids of the task's row over their sum."""
    rank, plain = 2, tiny_model(family)
    model = moved(BaselineModel(tiny_model(family), TASKS, "last:2", kind="poly", rank=rank)).eval()
    values = {name.replace(".ffn", ""): value for name, value in model.backbone.named_parameters()}
    skills = [name.removesuffix(".poly_lora_A.default") for name in values if name.endswith(".poly_lora_A.default")]
    assert len(skills) == sum(len(layer.frozen.shapes) for layer in model.layers.values())
    data = batch(model)
    with torch.no_grad():
        mixed = model(data)
        for row, task in enumerate(data["task_ids"].tolist()):
            changed = copy.deepcopy(plain)
            for name in skills:
                a, b = (values[f"{name}.poly_lora_{part}.default"][0] for part in "AB")
                sigmoids = [1 / (1 + math.exp(-z)) for z in values[f"{name}.poly_router.default.module_logits"][task]]
                w = [value / sum(sigmoids) for value in sigmoids]
                change = sum(w[s] * a[s] for s in range(3)) @ sum(w[s] * b[s] for s in range(3)) / rank
                changed.get_submodule(name).weight += change.T
            alone = {name: value[row : row + 1] for name, value in data.items() if name != "task_ids"}
            expected = changed(**alone).loss
            torch.testing.assert_close(mixed.losses[mixed.rows == row].mean(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["full", "lora", "poly"])
def test_a_baseline_is_saved_and_restored(tmp_path, kind):
    folder = tmp_path / "backbone"
    tiny_model("llama").save_pretrained(folder)
    module = BaselineModule(str(folder), TASKS, layers="last:2", kind=kind, rank=3)
    module.configure_model()
    model = moved(module.model)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in model.tuned().values()}
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    fresh = BaselineModule(str(folder), TASKS, layers="last:2", kind=kind, rank=3)
    fresh.on_load_checkpoint(checkpoint)
    model.save_pretrained(tmp_path / "model", str(folder))
    again = BaselineModel.from_pretrained(tmp_path / "model")
    data = batch(model)
    with torch.no_grad():
        expected = model.eval()(data).losses
        assert torch.equal(again(data).losses, expected)
        assert torch.equal(fresh.model.eval()(data).losses, expected)


def test_a_backbone_that_the_library_does_not_take_is_refused_in_a_sentence():
    with pytest.raises(AlterError, match="does not take this backbone"):
        BaselineModel(tiny_model("gpt2"), TASKS, "last:2", kind="poly")
