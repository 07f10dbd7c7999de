"""What the benchmarks share: the models, timing two sides in turn, and the result rows."""

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from alter import machine
from alter.loading import made_on
from alter.nn import LoRA, MTAModel, TaskSelector
from alter.nn.backbone import load_backbone

FROM_ENVIRONMENT = {"--t5": "ALTER_BENCH_T5", "--data": "ALTER_TEST_DATA"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # CUDA_VISIBLE_DEVICES= measures the processor of a GPU machine


def hardware():
    """The GPU where there is one, else the processor and its cores; and the version of PyTorch."""
    return f"{machine.hardware()}, torch {torch.__version__}"


def wait():
    """Until the GPU has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def placed(batch):
    """A batch where the models are."""
    return {name: value.to(DEVICE) for name, value in batch.items()}


def alternate(rounds, **sides):
    """Runs each side once for warmth, then all in turn; returns the seconds of every round by side."""
    seconds = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            wait()
            started = time.perf_counter()
            run()
            wait()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def command(given):
    """The command that measured, as another machine takes it: folders are named as such, and where its rows go is left out."""
    program, *rest = given
    for flag, variable in FROM_ENVIRONMENT.items():
        if os.environ.get(variable) and not any(word.split("=")[0] == flag for word in rest):
            rest += [flag, os.environ[variable]]
    words = iter([word for whole in rest for word in (whole.split("=", 1) if whole.startswith("--") else [whole])])
    kept = []
    for word in words:
        if word == "--out":
            next(words)
        else:
            kept.append("FOLDER" if Path(word).is_absolute() or Path(word).exists() else word)
    return shlex.join(["python", f"benchmarks/{Path(program).name}", *kept])


def row(name, ratios, target, at_most=False):
    """One result: the median ratio, the lowest and highest round, and whether the target holds."""
    ratios = [float(ratio) for ratio in ratios]
    ratio = statistics.median(ratios)
    holds = target is None or (ratio <= target if at_most else ratio >= target)
    found = {
        "name": name,
        "ratio": ratio,
        "low": min(ratios),
        "high": max(ratios),
        "target": target,
        "bound": "at most" if at_most else "at least",
        "holds": holds,
        "command": command(sys.argv),
        "hardware": hardware(),
    }
    bound = (
        ""
        if target is None
        else f" (target {'at most' if at_most else 'at least'} {target:g}: {'holds' if holds else 'DOES NOT HOLD'})"
    )
    print(f"{name}: {ratio:.3f} [{min(ratios):.3f}, {max(ratios):.3f}]{bound}", flush=True)
    return found


def ratios(over, under):
    """Round by round."""
    return [a / b for a, b in zip(over, under, strict=True)]


def options(description):
    """The arguments of a benchmark, and what it shares with the others."""
    disable_progress_bar()  # hundreds of models are loaded, and the rows would drown
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smollm2", default="smollm2-135m", help="name or folder of SmolLM2-135M")
    t5, data = map(os.environ.get, FROM_ENVIRONMENT.values())
    parser.add_argument("--t5", default=t5, help="folder of a T5; without it T5 is left out")
    parser.add_argument("--data", default=data, help="root of the real mixtures")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    return parser


def called(backbone, layers, precision, compiled=False):
    """What a row calls its model; fp32 is not told."""
    parts = [backbone, layers, "" if precision == "fp32" else precision, "compiled" if compiled else ""]
    return " ".join(filter(None, parts))


def save(rows, out):
    """Writes the rows."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rows, indent=2) + "\n")


def both_backbones(measure, args):
    """Measures SmolLM2, and T5 where it is named; writes the rows."""
    rows = measure("SmolLM2-135M", args.smollm2, args)
    if args.t5:
        rows += measure("T5", args.t5, args)
    save(rows, args.out)


def prompts(rows, length, tasks):
    """Random prompts of one length; every task in turn."""
    ids = torch.randint(100, 30000, (rows, length), generator=torch.Generator().manual_seed(0))
    return placed({"input_ids": ids, "attention_mask": torch.ones_like(ids), "task_ids": torch.arange(rows) % tasks})


def model(backbone, precision="fp32", experts=1, expert=None, router=None, layers="last:4", noise=0.02):
    """A model with as many tasks as experts, whose adapters are not at their start."""
    torch.manual_seed(0)
    tasks = [f"task{i}" for i in range(experts)]
    found = made_on(DEVICE, precision, lambda: MTAModel(load_backbone(backbone, precision), tasks, layers))
    found.add_experts(expert or LoRA(rank=16), router or TaskSelector())
    for part, parameters in found.part_parameters().items():
        for parameter in parameters if part != "backbone" else ():
            parameter.data += noise * torch.randn_like(parameter)
            parameter.requires_grad_(parameter.is_floating_point())
    return found.train()


def batch(found, rows=8, length=64, targets=8, seed=0):
    """Random tokens in the shape of a training batch; every task in turn."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(100, 30000, (rows, length), generator=g)
    labels = (
        ids[:, :targets].clone() if found.is_seq2seq else ids.masked_fill(torch.arange(length) < length - targets, -100)
    )
    made = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "task_ids": torch.arange(rows) % len(found.tasks),
    }
    return placed(made)


def stepper(found):
    """Gives what takes a whole training step of a batch, as the recipes train: forward, backward, clipping and AdamW's step.

    At a rate of zero, so that the model stays what it is, whatever has been measured before.
    """
    parameters = [p for p in found.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)

    def step(data):
        optimizer.zero_grad(set_to_none=True)
        found(data).losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


@torch.no_grad()
def forward(found, data):
    """Forward alone."""
    found(data)
