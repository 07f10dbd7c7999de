"""The methods: each turns the recipe, which is the two-stage method, into the runs of one cell."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from alter.compare.handover import find_interpreter
from alter.errors import AlterError, did_you_mean
from alter.recipe_file import check_content, read_content
from alter.schema import find_classes_in, same_class
from alter.stage_settings import for_tasks

Config = dict[str, Any]
Runner = Literal["alter", "adapter_fusion"]


@dataclass(frozen=True)
class Budget:
    """What every method may use.

    Attributes:
        draws: training examples in all, over both stages.
        parameters: trained by the recipe's two stages.
        rates: each task's share of the draws, by name.
    """

    draws: int
    parameters: int
    rates: Mapping[str, float]


@dataclass(frozen=True)
class Training:
    """One training of a cell.

    Attributes:
        config: the complete recipe.
        name: of its folder in the cell's.
        budget: how many parameters it may train, by choice of its rank; None where it keeps the recipe's.
        runner: who trains and answers: ALTER, or AdapterFusion in an environment of its own.
    """

    config: Config
    name: str = "run"
    budget: float | None = None
    runner: Runner = "alter"


@dataclass(frozen=True)
class Method:
    """A way to tune.

    Attributes:
        about: one line for the tables.
        plan: the recipe and what may be used -> the runs.
        baseline: whether the mixture of task adapters is compared against it.
        trains: whether there is anything to train.
    """

    about: str
    plan: Callable[[Config, Budget], list[Training]]
    baseline: bool = False
    trains: bool = True


ONE_EPOCH = {"max_epochs": 1, "limit_train_batches": 1.0, "check_val_every_n_epoch": 1}


def one_stage_of(config: Config, draws: int) -> Config:
    """The recipe with stage 1 alone, which gets the draws of both and ends as the recipe does, by stage 2's schedule."""
    config = copy.deepcopy(config)
    config["stages"] = ["stage1"]
    first, last = (config[stage]["model"]["init_args"] for stage in ("stage1", "stage2"))
    first |= {key: last[key] for key in ("schedule", "warmup") if key in last}
    del config["stage2"]  # a cell goes on when what it does not use has changed
    config["data"]["examples_per_epoch"] = draws
    config["trainer"] |= ONE_EPOCH
    config["stage1"]["trainer"] = _without_length(config["stage1"]["trainer"])
    return config


HELD = ("run", "test", "seed_everything", "backbone", "generation")  # what a method cannot change
HELD_DATA = ("tasks", "root", "seed", "shots", "limit", "examples_per_epoch")
HARD = {"class_path": "alter.nn.TaskSelector", "init_args": {"hard": True}}


def _without_length(trainer: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in trainer.items() if key not in ONE_EPOCH}


def _stage1(**arguments: Any) -> Callable[[Config, Budget], list[Training]]:
    """Stage 1 alone with some arguments of its module changed."""

    def plan(config: Config, budget: Budget) -> list[Training]:
        config = one_stage_of(config, budget.draws)
        config["stage1"]["model"]["init_args"] |= copy.deepcopy(arguments)
        return [Training(config, budget=budget.parameters)]

    return plan


def _shared(config: Config, budget: Budget) -> list[Training]:
    """One expert, in LoRA's usual scale."""
    config = one_stage_of(config, budget.draws)
    given = config["stage1"]["model"]["init_args"]
    given["num_experts"] = 1
    if not same_class(given["router"]["class_path"], "alter.nn.TaskSelector"):  # others may not serve one expert
        given["router"] = copy.deepcopy(HARD)
    _usual_scale(config)
    return [Training(config, budget=budget.parameters)]


def _usual_scale(config: Config) -> None:
    """An adapter that answers alone has alpha = rank; a recipe's alpha may make up for gates below one."""
    arguments = config["stage1"]["model"]["init_args"]["expert"]["init_args"]
    if "alpha" in arguments:
        arguments["alpha"] = None


def _expert(name: str, router: str) -> Callable[[Config, Budget], list[Training]]:
    """Stage 1 alone with another kind of low-rank expert, in the recipe's scale."""

    def plan(config: Config, budget: Budget) -> list[Training]:
        given = config["stage1"]["model"]["init_args"]["expert"]["init_args"]
        scaled = {"rank": given.get("rank", 1), "alpha": given.get("alpha")}
        change = _stage1(
            expert={"class_path": f"alter.nn.{name}", "init_args": scaled},
            router={"class_path": f"alter.nn.{router}", "init_args": {}},
        )
        return change(config, budget)

    return plan


def _router(name: str, **init_args: Any) -> Callable[[Config, Budget], list[Training]]:
    return _stage1(router={"class_path": f"alter.nn.{name}", "init_args": init_args})


def _as_it_is(config: Config, budget: Budget) -> list[Training]:
    return [Training(copy.deepcopy(config))]


def _one_stage(config: Config, budget: Budget) -> list[Training]:
    """All parts at once: stage 1 makes the experts without a step, stage 2 trains everything at stage 1's rate."""
    config = copy.deepcopy(config)
    config["data"]["examples_per_epoch"] = budget.draws
    config["trainer"] |= ONE_EPOCH
    config["stage1"]["trainer"] = {**_without_length(config["stage1"]["trainer"]), "max_steps": 0}
    config["stage2"]["trainer"] = _without_length(config["stage2"]["trainer"])
    first, second = (config[stage]["model"]["init_args"] for stage in ("stage1", "stage2"))
    second |= {"task_expert_lr": 1.0, "optimizer": copy.deepcopy(first["optimizer"])}
    return [Training(config)]


def _alone(config: Config, budget: Budget) -> list[Training]:
    """A task at a time, each with its share of the draws and an equal share of the parameters."""
    config = copy.deepcopy(config)
    for section in (
        config,
        config["stage1"],
    ):  # what watches one task would choose it by another measure than the others
        section["trainer"] = for_tasks(section["trainer"], [])
    runs = []
    for task in config["data"]["tasks"]:
        own = one_stage_of(config, max(1, round(budget.draws * budget.rates[task["name"]])))
        own["data"]["tasks"] = [task]
        own["stage1"]["model"]["init_args"]["router"] = copy.deepcopy(HARD)
        own["stage1"]["model"]["init_args"].pop("num_experts", None)  # one a task
        _usual_scale(own)
        runs.append(Training(own, task["name"], budget.parameters / len(config["data"]["tasks"])))
    return runs


def _baseline(kind: str) -> Callable[[Config, Budget], list[Training]]:
    """One of `alter.compare.baselines`."""

    def plan(config: Config, budget: Budget) -> list[Training]:
        if kind in ("lora", "poly") and find_spec("peft") is None:
            raise AlterError(
                '--methods: peft_lora and peft_poly need the peft package; pip install "alter-mta[compare]", or leave them out.'
            )
        config = one_stage_of(config, budget.draws)
        given = config["stage1"]["model"]["init_args"]
        kept = (
            "layers",
            "ffn",
            "optimizer",
            "schedule",
            "warmup",
            "loss_average",
            "gradient_checkpointing",
            "skip_bad_batches",
        )
        arguments = {key: given[key] for key in kept if key in given} | {"kind": kind, "rank": 1}
        config["stage1"]["model"] = {
            "class_path": "alter.compare.baselines.BaselineModule",
            "init_args": arguments,
        }
        if kind in OWN_LR:
            optimizer = arguments["optimizer"]
            optimizer["init_args"] = {**optimizer["init_args"], "lr": OWN_LR[kind]}
        if kind == "full":
            if config["precision"] == "bf16":
                config["trainer"]["precision"] = "bf16-mixed"
            config["precision"] = "fp32"  # bf16 weights cannot take small steps
            return [Training(config)]
        return [Training(config, budget=budget.parameters)]

    return plan


def _adapter_fusion(config: Config, budget: Budget) -> list[Training]:
    """The first epoch is for the tasks' adapters, the second for their fusion; `alter.compare.handover` reads this."""
    find_interpreter()
    config = one_stage_of(config, max(1, budget.draws // 2))
    config["trainer"]["max_epochs"] = 2
    arguments = config["stage1"]["model"]["init_args"]
    arguments["expert"] = {"class_path": "alter.nn.Bottleneck", "init_args": {"rank": 1}}
    if not arguments["optimizer"]["class_path"].startswith("torch.optim."):
        raise AlterError("--methods: adapter_fusion takes optimizers of torch.optim alone; leave the method out.")
    return [Training(config, budget=budget.parameters, runner="adapter_fusion")]


# Where adapters take 2e-3; `alter compare --tune` searches around both. Whole weights take a tenth of it. Peft divides
# Polytropon's changes by their rank and has no alpha, so that its steps are as much smaller.
OWN_LR = {"full": 2e-4, "poly": 2e-2}

METHODS: dict[str, Method] = {
    "untouched": Method("the backbone as it came", _as_it_is, baseline=True, trains=False),
    "full": Method("all weights of the backbone, on the mixture", _baseline("full"), baseline=True),
    "shared": Method("one adapter for all tasks", _shared, baseline=True),
    "alone": Method("an adapter a task, each trained alone", _alone, baseline=True),
    "peft_lora": Method("LoRA on the mixture, by the peft library", _baseline("lora"), baseline=True),
    "peft_poly": Method("Polytropon, by the peft library", _baseline("poly"), baseline=True),
    "adapter_fusion": Method("AdapterFusion, by the adapters library", _adapter_fusion, baseline=True),
    "stage1": Method("MTA, stage 1 alone", _stage1()),
    "one_stage": Method("MTA, all parts at once", _one_stage),
    "two_stage": Method("MTA, both stages: the recipe itself", _as_it_is),
    "task_gate": Method("a linear gate a task, at every token", _router("TaskGate")),
    "token_gate": Method("one linear gate, at every token", _router("TokenGate")),
    "top_k": Method("the two likeliest experts of a token", _router("TopK", k=2)),
    "mod_squad": Method("noisy top-2 a task, mutual-information loss", _router("ModSquad", k=2)),
    "polytropon": Method("a learned table of skills a task", _router("Polytropon")),
    "moelora": Method("a gate over task embeddings", _router("MOELoRA")),
    "hydralora": Method("one A, many B, a gate at every token", _expert("HydraLoRA", router="TokenGate")),
    "mtl_lora": Method("one A, a task's own transform, many B", _expert("MTLLoRA", router="TaskSelector")),
    "description": Method("a gate that reads the prompt, no task name needed", _router("Description")),
}


def find_method(name: str) -> tuple[str, Method]:
    """A method by name, or a recipe overlay of the user's own by file.

    Args:
        name: of a method, or a YAML file whose keys are laid over the recipe; it runs as the recipe does, or as the methods of
            one stage do where it names stage 1 alone.

    Returns:
        the name for folders and tables, and the method.

    Raises:
        AlterError: there is no such method or file, or the file has mistakes, or sets what is alike for all methods.
    """
    if name in METHODS:
        return name, METHODS[name]
    file = Path(name)
    if file.suffix not in (".yaml", ".yml") or not file.is_file():
        raise AlterError(
            f"--methods: '{name}' is neither a method nor a YAML file to lay over the recipe; the methods are "
            f"{', '.join(METHODS)}.{did_you_mean(name, METHODS)}"
        )
    if file.stem in METHODS:
        raise AlterError(f"--methods: {file} is called as the method '{file.stem}'; rename the file.")
    overlay = read_content(file)
    find_classes_in(file.parent)
    if problems := [*check_content(overlay, str(file)), *_held(overlay, file)]:
        raise AlterError(*problems)

    def plan(config: Config, budget: Budget) -> list[Training]:
        config = _laid_over(copy.deepcopy(config), overlay)
        return [Training(one_stage_of(config, budget.draws) if config.get("stages") == ["stage1"] else config)]

    return file.stem, Method(f"the recipe with {file.name}", plan)


def _held(overlay: Mapping[str, Any], file: Path) -> Iterator[str]:
    """What an overlay may not set."""
    data = overlay.get("data")
    found = [key for key in HELD if key in overlay]
    found += [f"data.{key}" for key in HELD_DATA if isinstance(data, Mapping) and key in data]
    yield from (
        f"{file}: {key}: it is the same for all methods of a comparison; leave it out of this file." for key in found
    )


def _laid_over(config: Config, overlay: Mapping[str, Any]) -> Config:
    for key, value in overlay.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), Mapping):
            other_class = "class_path" in value and not same_class(value["class_path"], config[key].get("class_path"))
            config[key] = _laid_over({} if other_class else config[key], value)
        else:
            config[key] = value
    return config
