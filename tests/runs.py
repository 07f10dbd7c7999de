"""Run folders as training leaves them, made without training: tiny models with random adapters."""

import os
from contextlib import chdir, contextmanager

import torch
import yaml
from transformers import AutoTokenizer

import alter
from alter.nn import LoRA, MTAModel, SharedGate, TaskSelector
from tests.data.conftest import task_dict
from tests.nn.tiny import tiny_model

CHOICES = ["w1", "w2 w3", "w4", "w5 w6 w7", "w8"]


def tasks(folder):
    """Two classifications of different choices, a generation, and one whose prompt has two fields."""
    return [
        task_dict(folder, "sort", license="CC BY 4.0"),
        task_dict(folder, "pick", choices=CHOICES, target="{{ ['w1', 'w4'][(text | length) % 2] }}"),
        task_dict(
            folder,
            "echo",
            choices=None,
            prompt="w9 {{ text }} :",
            max_target_tokens=3,
            truncate_target=True,
            target="{{ text }}",
        ),
        task_dict(folder, "pair", choices=None, prompt="{{ text }} w10 {{ label }} :", max_target_tokens=5),
    ]


def make_run(folder, words, family="llama", expert=None, router=None, shared="gate", own_backbone=False, blocks=None):
    """A finished run of both stages, or without ``shared`` of stage 1 alone; returns its folder."""
    backbone = tiny_model(family, blocks)
    backbone.resize_token_embeddings(510)
    torch.manual_seed(2)
    backbone.get_input_embeddings().weight.data.normal_(std=0.02)  # resizing makes new words all alike
    backbone.save_pretrained(folder / "backbone")
    AutoTokenizer.from_pretrained(words).save_pretrained(folder / "backbone")
    content = {
        "precision": "fp32",
        "generation": {},
        "backbone": "b",
        "data": {"tasks": tasks(folder), "temperature": 1.0},
    }
    run = folder / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(content))
    model = MTAModel(backbone, [task["name"] for task in content["data"]["tasks"]], "last:2")
    model.add_experts(expert or LoRA(rank=4), router or TaskSelector())
    if own_backbone:
        model.train_backbone()
    perturb(model)
    model.save_pretrained(run / "stage1" / "model", folder / "backbone")
    if shared:
        model.add_shared(expert or LoRA(rank=4), 2, SharedGate(hidden=8) if shared == "gate" else shared)
        perturb(model)
    model.save_pretrained(run / "model", folder / "backbone")
    return run


@contextmanager
def inside(folder):
    """What a fixture of a whole module runs in a folder leaves the environment as it was; the tests' own fixtures come later."""
    before = dict(os.environ)
    os.environ["ALTER_HOME"] = str(folder / "home")
    try:
        with chdir(folder):
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def perturb(model):
    torch.manual_seed(1)
    for name, parameters in model.part_parameters().items():
        for parameter in parameters:
            if name != "backbone" or parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)


def add_newcomer(run, name="new"):
    """Lets a task join a finished run, without training, with parts that are not at their start."""
    model = alter.load(run).model
    model.add_newcomer(name)
    torch.manual_seed(3)
    for part, parameters in model.part_parameters().items():
        for parameter in parameters if part.startswith("newcomers") else ():
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(run / "model", str(run.parent / "backbone"))
    content = yaml.safe_load((run / "recipe.yaml").read_text())
    task = task_dict(run.parent, name, choices=None, prompt="w9 {{ text }} :", max_target_tokens=4)
    content["data"]["tasks"].append(task)
    (run / "recipe.yaml").write_text(yaml.safe_dump(content))
