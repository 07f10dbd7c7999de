"""What a cell hands over to AdapterFusion in its own environment, and the answers that come back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from alter.answering import MAX_BATCH_TOKENS, answer_ends, answer_text
from alter.data import MultiTaskDataModule, Task, encode_choices, eval_batches
from alter.data.sampler import MixtureBatchSampler
from alter.errors import AlterError, Diverged
from alter.nn.backbone import load_backbone, load_tokenizer, resolve_backbone
from alter.nn.feed_forward import find_feed_forwards, select_layers
from alter.recipe import Recipe
from alter.stage_settings import stage_trainer
from alter.writing import write_json

INTERPRETER = "ALTER_ADAPTERS_PYTHON"
SCRIPT = Path(__file__).with_name("adapter_fusion.py")
DIVERGED = 3  # the script's exit status, as it is written there: it imports nothing of ALTER
FUSION_LR = 0.1  # on the adapters' learning rate: the fusion's matrices are whole, as those of full fine-tuning are
ADAPTERS, FUSION = 0, 1  # the epochs of the draws: the first half and the second


def find_interpreter() -> str:
    """The Python whose environment holds the adapters library.

    Raises:
        AlterError: there is none.
    """
    file = Path(os.environ.get(INTERPRETER) or ".nox/fusion/bin/python").expanduser()
    if not file.is_file():
        raise AlterError(
            f"--methods: adapter_fusion needs the adapters library in an environment of its own, and there is no {file}; "
            f"run `nox -s fusion` in a checkout of ALTER and set {INTERPRETER} to the python that it names."
        )
    return str(file.absolute())  # not resolved: the link says which environment it is


def train_and_answer(recipe: Recipe, split: str) -> tuple[dict[str, Any], list[tuple[Task, list[str], list[str]]]]:
    """Trains AdapterFusion, or goes on after its last finished training, and answers a split.

    Args:
        recipe: stage 1 alone, with two epochs of half the draws each.
        split: whose rows are answered.

    Returns:
        what was measured, and for each task its answers and targets.

    Raises:
        Diverged: the loss is no number any more.
        SystemExit: the script has failed otherwise; what it said stands in the log.
    """
    backbone = resolve_backbone(recipe.config["backbone"])
    data = recipe.open_data(backbone)
    tokenizer = load_tokenizer(backbone)
    folder = recipe.run / "handover"
    write_files(folder, recipe, data, tokenizer, split)
    status = subprocess.run([find_interpreter(), "-I", str(SCRIPT), str(folder)]).returncode  # -I: not ALTER's modules
    if status == DIVERGED:
        raise Diverged(
            f"{folder}: the loss is no number any more, as the line above says; lower optimizer.init_args.lr."
        )
    if status:
        sys.exit(status)
    result = json.loads((folder / "result.json").read_text())
    answered = []
    for task, found in zip(recipe.tasks, result.pop("answers"), strict=True):
        answers = [task.choices[given] if task.choices else answer_text(tokenizer, given) for given in found]
        answered.append((task, answers, data.examples(task.name, split)["target"][:]))
    shutil.rmtree(folder)
    return result, answered


def write_files(folder: Path, recipe: Recipe, data: MultiTaskDataModule, tokenizer: Any, split: str) -> None:
    """Writes ``plan.json`` and, as lines of batches, what is trained on, validated on and asked."""
    folder.mkdir(parents=True, exist_ok=True)
    adapters = list(_training_batches(data, ADAPTERS, mixed=False))
    for i, task in enumerate(recipe.tasks):
        _write_lines(folder / f"task{i}.jsonl", [_line(batch) for batch in adapters if batch[0]["task_id"] == i])
        _write_lines(folder / f"validation{i}.jsonl", map(_line, _validation_batches(data, task)))
        _write_lines(folder / f"questions{i}.jsonl", _question_batches(data, task, split))
    fusion = _training_batches(data, FUSION, mixed=recipe.config["data"]["mixed_batches"])
    _write_lines(folder / "fusion.jsonl", map(_line, fusion))
    write_json(folder / "plan.json", _plan(recipe, data, tokenizer))


def _plan(recipe: Recipe, data: MultiTaskDataModule, tokenizer: Any) -> dict[str, Any]:
    config, arguments = recipe.config, recipe.config["stage1"]["model"]["init_args"]
    trainer = stage_trainer(config, "stage1")
    backbone = resolve_backbone(config["backbone"])
    blocks = select_layers(find_feed_forwards(load_backbone(backbone), arguments["ffn"]), arguments["layers"])
    interval = trainer.get("val_check_interval")
    optimizer_args = arguments["optimizer"]["init_args"]
    return {
        "backbone": str(backbone.absolute()),
        "seq2seq": data.seq2seq,
        "bf16": config["precision"] == "bf16",  # else fp32: the library does not adapt quantised maps as ALTER does
        "cuda": trainer.get("accelerator") != "cpu",
        "seed": config["seed_everything"],
        "blocks": [f"{block.stack}.{block.index}" for block in blocks],
        "bottleneck": arguments["expert"]["init_args"]["rank"],
        "optimizer": arguments["optimizer"]["class_path"].rpartition(".")[2],
        "optimizer_args": optimizer_args,
        "fusion_optimizer_args": optimizer_args
        | {key: value * FUSION_LR for key, value in optimizer_args.items() if key == "lr"},
        **{key: arguments[key] for key in ("schedule", "warmup", "loss_average")},
        "clip": trainer.get("gradient_clip_val"),
        "accumulate_grad_batches": trainer.get("accumulate_grad_batches", 1),
        "validations": round(1 / interval) if isinstance(interval, float) else 1,
        "pad": tokenizer.pad_token_id,
        "stop_tokens": answer_ends(tokenizer),
        "tasks": [
            {
                "name": task.name,
                "choices": encode_choices(task, tokenizer, data.seq2seq) if task.choices else None,
                "max_new_tokens": task.max_target_tokens,
            }
            for task in recipe.tasks
        ],
    }


def _training_batches(data: MultiTaskDataModule, epoch: int, mixed: bool) -> Iterable[list[dict[str, Any]]]:
    """The examples of each batch of an epoch, as the training loader takes them."""
    data.mixed_batches = mixed
    loader = data.train_dataloader()
    sampler = cast(MixtureBatchSampler, loader.batch_sampler)
    sampler.set_epoch(epoch)
    return ([loader.dataset[pair] for pair in pairs] for pairs in sampler)


def _validation_batches(data: MultiTaskDataModule, task: Task) -> Iterable[list[dict[str, Any]]]:
    examples = data.examples(task.name, "validation").select_columns(["prompt_ids", "target_ids"])[:]
    rows = [dict(zip(examples, row, strict=True)) for row in zip(*examples.values(), strict=True)]
    lengths = [len(row["prompt_ids"]) + len(row["target_ids"]) for row in rows]
    return ([rows[i] for i in batch] for batch in eval_batches(lengths, data.eval_max_tokens))


def _question_batches(data: MultiTaskDataModule, task: Task, split: str) -> Iterable[dict[str, Any]]:
    prompts = data.examples(task.name, split)["prompt_ids"][:]
    longest = 0 if task.choices else task.max_target_tokens
    batches = eval_batches([len(prompt) + longest for prompt in prompts], MAX_BATCH_TOKENS)
    return ({"rows": rows, "prompts": [prompts[i] for i in rows]} for rows in batches)


def _line(batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "prompts": [example["prompt_ids"] for example in batch],
        "targets": [example["target_ids"] for example in batch],
    }


def _write_lines(file: Path, lines: Iterable[dict[str, Any]]) -> None:
    with file.open("w") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)
