"""What makes no sense among the values of a recipe, said before anything is loaded; stage 2 begins perhaps hours later."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import Trainer

from alter.data import Task
from alter.data.module import data_problems
from alter.errors import AlterError, did_you_mean
from alter.nn import Expert, Router, TrunkCache
from alter.nn.backbone import check_trainable, is_seq2seq, most_positions
from alter.nn.decoding import Generation
from alter.nn.model import check_shared_experts, check_task_experts
from alter.precision import check_precision
from alter.run_folder import STAGES
from alter.schema import check, import_name
from alter.stage_settings import named_callbacks, stage_epochs, stage_trainer
from alter.strategy import check_strategy

Config = Mapping[str, Any]
FACTORS = ("router_lr", "task_expert_lr", "backbone_lr")  # on a stage's learning rate
DIVIDED_BY = ("val_check_interval", "check_val_every_n_epoch", "accumulate_grad_batches")  # by the trainer
WHOLE = ("bf16-true", "16-true", "64-true", "64", 64)  # precisions of Lightning that convert all weights
UNFIT = {  # keys of the trainer that work against what a run is, with what to do instead
    "fast_dev_run": "it would leave a run that counts as trained; leave it out, and try the recipe with `alter doctor --config "
    "RECIPE`, which trains some steps of each stage and writes nothing",
    "overfit_batches": "a mixture draws other batches in every epoch; leave it out, and learn from few rows with "
    "data.limit: {train: 32}",
}
AVERAGING = ("WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging")  # callbacks of Lightning
LARGEST_SEED = 2**32 - 1  # of numpy


def check_values(config: Config) -> list[str]:
    """What is wrong with a complete recipe's values.

    Args:
        config: plain; what is written in files may still be of another type than it ought to be.
    """
    problems = [
        f"stages: '{name}' is not a stage; it is one of {', '.join(STAGES)}.{did_you_mean(str(name), STAGES)}"
        for name in config["stages"]
        if name not in STAGES
    ]
    if not config["data"]["tasks"]:
        problems.append("data.tasks: the recipe names no task; list task files under it.")
    problems += check_precision(config["precision"])
    problems += check_strategy(config["trainer"]["strategy"], config["precision"])
    for stage in STAGES:
        trainer = config[stage]["trainer"]
        if trainer is None:
            problems.append(
                f"{stage}.trainer: it is empty; write the keys that differ from trainer's, or leave it out."
            )
        else:
            problems += check(Trainer, trainer, f"{stage}.trainer") if trainer else []
            problems += [
                f"{stage}.{problem}" for problem in check_strategy(trainer.get("strategy"), config["precision"])
            ]
        if config[stage]["model"] is None:
            problems.append(f"{stage}.model: it is empty; write class_path and init_args under it, or leave it out.")
    return problems


def check_ranges(config: Config, num_tasks: int) -> list[str]:
    """What is out of its range in a complete recipe whose values have their types.

    Args:
        config: plain.
        num_tasks: how many its ``data.tasks`` name.
    """
    problems = list(data_problems(config["data"]))
    if not 0 <= config["seed_everything"] <= LARGEST_SEED:
        problems.append(f"seed_everything: {config['seed_everything']} is no seed; give 0 to {LARGEST_SEED}.")
    problems += _refused(Generation, **config["generation"])
    problems += _refused(TrunkCache, **config["trunk_cache"])
    problems += _check_trainer(config["trainer"], "trainer")
    for stage in STAGES:
        where = f"{stage}.model.init_args"
        arguments = config[stage]["model"].get("init_args") or {}
        problems += _check_trainer(config[stage]["trainer"], f"{stage}.trainer")
        problems += [f"{where}.{problem}" for problem in _stage_problems(arguments)]
        if stage in config["stages"]:
            problems += _refused(check_trainable, config["precision"], arguments.get("backbone_lr", 0))
            problems += _check_length(stage_trainer(config, stage), stage)
        problems += [
            f"{where}.{message}" if message[0].islower() else f"{where}: {message}"
            for message in _refused(_check_adapters, arguments, num_tasks, where)
        ]
    return problems


def check_lengths(tasks: Sequence[Task], backbone: Path) -> None:
    """Checks that a backbone has a position for every token that the tasks allow.

    Raises:
        AlterError: with the tasks for which it has not.
    """
    most, apart = most_positions(backbone), is_seq2seq(backbone)  # an encoder's positions are not the decoder's
    join = max if apart else sum
    problems = [
        f"{task.where}: task '{task.name}': max_prompt_tokens {task.max_prompt_tokens} {'or' if apart else 'and'} "
        f"max_target_tokens {task.max_target_tokens} {'is' if apart else 'are together'} more than the {most} positions that the "
        "backbone has; lower them."
        for task in tasks
        if most is not None and join((task.max_prompt_tokens, task.max_target_tokens)) > most
    ]
    if problems:
        raise AlterError(*problems)


def _refused(make: Callable[..., Any], *given: Any, **arguments: Any) -> list[str]:
    try:
        make(*given, **arguments)
    except AlterError as error:
        return list(error.messages)
    return []


def _check_trainer(trainer: Config, where: str) -> Iterator[str]:
    for key in DIVIDED_BY:
        if isinstance(trainer.get(key), int | float) and trainer[key] <= 0:
            yield f"{where}.{key}: {trainer[key]} is not above 0; give a positive number, or leave it out."
    for key, remedy in UNFIT.items():
        if trainer.get(key):
            yield f"{where}.{key}: {remedy}."
    if trainer.get("enable_checkpointing") is False:
        yield (
            f"{where}.enable_checkpointing: without checkpoints there is no best model, and a run that is stopped is lost; "
            "leave it out."
        )
    if trainer.get("precision") in WHOLE:
        yield (
            f"{where}.precision: {trainer['precision']} would convert the adapters too; write precision: bf16 for the frozen "
            f"backbone alone, or {where}.precision: bf16-mixed."
        )
    if trainer.get("limit_val_batches") == 0:
        yield f"{where}.limit_val_batches: without a validation nothing says which model is best; leave it out."
    for name, arguments in named_callbacks(trainer):
        if name.rpartition(".")[2] in AVERAGING:
            yield f"{where}.callbacks: {name} averages weights beside the model, which a stage does not keep; leave it out."
        if arguments.get("dirpath") is not None:
            yield (
                f"{where}.callbacks: a stage's checkpoints lie in its own folder, where the same command finds them and no other "
                "run's; leave dirpath out, and put the run folder where there is room (run: FOLDER)."
            )
        named = re.fullmatch(r"(val|train)_(.+)", str(arguments.get("monitor")))
        if named:
            yield f"{where}.callbacks: nothing is logged as {named[0]}; write monitor: {named[1]}/{named[2]}."


def _check_length(trainer: Config, stage: str) -> Iterator[str]:
    """Lightning would train for a thousand epochs, and in few of them never validate."""
    epochs, every = stage_epochs(trainer), trainer.get("check_val_every_n_epoch")
    if epochs and isinstance(every, int) and every > epochs:
        yield (
            f"trainer.check_val_every_n_epoch: {every} is more than the epochs of {stage}, {epochs}, and without a validation nothing "
            "says which model is best; give as many at most."
        )
    if trainer.get("max_epochs") is None and trainer.get("max_steps") in (None, -1) and trainer.get("max_time") is None:
        yield f"trainer.max_epochs: nothing says when {stage} ends; write max_epochs: 1, or max_steps or max_time."


def _stage_problems(given: Config) -> Iterator[str]:
    """Of the arguments of a stage's module."""
    if not 0 <= given.get("warmup", 0) <= 1:
        yield f"warmup: {given['warmup']} is no share of the steps; give 0 to 1, such as 0.05."
    for key in FACTORS:
        if given.get(key, 0) < 0:
            yield f"{key}: {given[key]} is below 0; give 0 to freeze, or a factor on the learning rate."
    if given.get("skip_bad_batches", 0) < 0:
        yield f"skip_bad_batches: {given['skip_bad_batches']} is below 0; give 0 to leave none out, or how many."
    optimizer = (given.get("optimizer") or {}).get("init_args") or {}
    if isinstance(lr := optimizer.get("lr"), int | float) and lr < 0:
        yield f"optimizer.init_args.lr: {lr} is below 0; give a positive learning rate."


def _check_adapters(given: Config, num_tasks: int, where: str) -> None:
    """Makes a stage's templates, of which its model will be asked the same.

    Raises:
        AlterError: they make no sense.
    """
    templates = [
        import_name(given[key]["class_path"], where, base)(**(given[key].get("init_args") or {}))
        for key, base in (("expert", Expert), ("router", Router))
        if given.get(key)
    ]
    if {"num_shared", "keep"} <= given.keys():
        check_shared_experts(given["num_shared"], given["keep"], *templates)
    elif {"own", "num_experts"} <= given.keys():
        check_task_experts(given["own"], given["num_experts"], num_tasks, *templates)
