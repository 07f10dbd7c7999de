"""The grid of methods x seeds: planned, run or resumed, cells spread over processes."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alter.cells import run_cells
from alter.compare.cell import PLAN, TRAINED, cell_folder
from alter.compare.methods import Budget, Config, Method, Training
from alter.errors import AlterError
from alter.nn import Expert, Router
from alter.nn.backbone import backbone_fingerprint, load_backbone, resolve_backbone
from alter.nn.model import MTAModel
from alter.nn.template import make_template
from alter.recipe import Recipe
from alter.stage_settings import stage_epochs, stage_trainer
from alter.writing import write_json, write_text
from alter.yaml_file import dump

MEASURED = [f"{part}.json" for part in (TRAINED, "validation", "test")]  # each with its own time
SMALLEST = 64  # the largest reduction of a bottleneck that the paper of AdapterFusion tries
PLACES = {"run", "folder", "root", "cache_dir", "where"}  # where things are, which changes no result
SEEDS = (13, 21, 42, 87, 100)  # those of the few-shot literature (arXiv 2012.15723)


@dataclass(frozen=True)
class Grid:
    """What is to be compared.

    Attributes:
        folder: of the comparison.
        recipe: the two-stage method.
        methods: by name, in the order of the tables.
        seeds: of training and of the mixture.
        split: whose rows are answered: test, or validation while methods are developed.
        factors: on each method's learning rate, tried with the first seed and chosen by validation.
        processes: cells run at once.
    """

    folder: Path
    recipe: Recipe
    methods: dict[str, Method]
    seeds: Sequence[int]
    split: str = "test"
    factors: Sequence[float] = (1.0,)
    processes: int = 1

    def cell(self, method: str, seed: int, factor: float) -> Path:
        """The folder of one cell."""
        return cell_folder(self.folder, method, seed, factor)


def run_grid(grid: Grid, planner: Planner) -> tuple[dict[str, dict[int, Path]], float]:
    """Runs every cell that is not complete; one that fails is told, and the others go on.

    Returns:
        the cells' folders by method and seed, with the learning rate that was chosen for the method, and the seconds
        that all cells took, trials of learning rates too.

    Raises:
        AlterError: the folder holds other settings, or cells have failed.
    """
    tuned = {name: grid.factors if method.trains else (1.0,) for name, method in grid.methods.items()}
    trials = [
        _plan(grid, planner, name, grid.seeds[0], factor)
        for name, factors in tuned.items()
        for factor in (factors if len(factors) > 1 else ())
    ]
    failed = _run_cells(grid, trials, TRAINED) if trials else []
    chosen = {name: _best_factor(grid, name, factors) for name, factors in tuned.items()}
    # A method whose rates have not all been tried waits: another than it ends with would read the split.
    ready = {name: factor for name, factor in chosen.items() if factor is not None}
    cells = [_plan(grid, planner, name, seed, factor) for seed in grid.seeds for name, factor in ready.items()]
    failed += _run_cells(grid, cells, grid.split)
    if failed:
        every = len(trials) + len(grid.seeds) * len(grid.methods)
        missing = len(failed) + len(grid.seeds) * (len(chosen) - len(ready))
        raise AlterError(f"{missing} of {every} cells are not complete; the same command tries them again.", *failed)
    found = {name: {seed: grid.cell(name, seed, factor) for seed in grid.seeds} for name, factor in ready.items()}
    measured = [file for cell in {*trials, *cells} for file in map(cell.joinpath, MEASURED) if file.is_file()]
    return found, sum(json.loads(file.read_text())["seconds"] for file in measured)


def _best_factor(grid: Grid, name: str, factors: Sequence[float]) -> float | None:
    """The factor with the best validation, by what the recipe chooses checkpoints by; None where not all have been tried."""
    if len(factors) == 1:
        return factors[0]
    files = {factor: grid.cell(name, grid.seeds[0], factor) / f"{TRAINED}.json" for factor in factors}
    if not all(file.is_file() for file in files.values()):
        return None
    found = {factor: json.loads(file.read_text()) for factor, file in files.items()}
    return min(found, key=lambda factor: _badness(found[factor]))


def _badness(trial: Mapping[str, Any]) -> float:
    """The lower the better: the validation loss, unless the recipe names another metric."""
    best = trial.get("best", {"mode": "min", "value": trial["validation_loss"]})  # adapter_fusion's is always the loss
    if best["value"] is None:
        return math.inf
    return float(best["value"] if best["mode"] == "min" else -best["value"])


# -- planning ---------------------------------------------------------------------------------------------------------


class Planner:
    """Knows what the two-stage recipe uses, and gives every other method as much.

    Args:
        recipe: the two-stage method.

    Raises:
        AlterError: the recipe's length cannot be shared out.
    """

    def __init__(self, recipe: Recipe) -> None:
        config = recipe.config
        path = resolve_backbone(config["backbone"])
        data = recipe.open_data(path)
        arguments = config["stage1"]["model"]["init_args"]
        tasks = [task.name for task in recipe.tasks]
        self.model = MTAModel(load_backbone(path), tasks, arguments.get("layers", "last:4"), arguments.get("ffn"))
        draws = round(data.draws * sum(_epochs(config, stage) for stage in config["stages"]))
        self.budget = Budget(draws, self.count(config), dict(zip(tasks, data.rates.tolist(), strict=True)))
        self.data = data.digest()
        self.backbone = {  # a name alone can stand for other weights elsewhere
            "name": config["backbone"],
            "parameters": sum(p.numel() for p in self.model.part_parameters()["backbone"]),
            "fingerprint": backbone_fingerprint(path),
        }

    def count(self, config: Config) -> int:
        """How many parameters a recipe trains."""
        first = config["stage1"]["model"]
        arguments = first["init_args"]
        if "kind" in arguments:  # a baseline
            if arguments["kind"] == "full":
                return sum(p.numel() for p in self.model.part_parameters()["backbone"])
            maps = [shape for layer in self.model.layers.values() for shape in layer.frozen.shapes.values()]
            skills = len(self.model.tasks) if arguments["kind"] == "poly" else 1
            selectors = skills**2 * len(maps) if arguments["kind"] == "poly" else 0
            return arguments["rank"] * skills * sum(map(sum, maps)) + selectors
        experts = arguments.get("num_experts") or len(config["data"]["tasks"])
        self.model.add_experts(_template(arguments, "expert"), _template(arguments, "router"), num_experts=experts)
        parts = ["experts", "router"]
        if "stage2" in config["stages"]:
            second = config["stage2"]["model"]["init_args"]
            self.model.add_shared(_template(second, "expert"), second.get("num_shared", 2), _template(second, "router"))
            parts += ["shared", "shared_router"]
        found = self.model.part_parameters()
        return sum(p.numel() for part in parts for p in found[part] if p.requires_grad)

    def match(self, run: Training) -> None:
        """Sets the rank with which a run trains as many parameters as it may, and keeps alpha / rank; others stay."""
        if run.budget is None:
            return
        arguments = run.config["stage1"]["model"]["init_args"]
        if run.runner == "adapter_fusion":
            arguments["expert"]["init_args"]["rank"] = self._bottleneck(run.budget)
            return
        holder = arguments if "kind" in arguments else arguments["expert"]["init_args"]
        if "rank" not in holder:
            return
        scale = holder["alpha"] / holder["rank"] if holder.get("alpha") is not None else None
        counts: dict[int, int] = {}
        rank = 1
        while rank not in counts:  # nearly linear in the rank, so that this ends after a few
            holder["rank"] = rank
            counts[rank] = self.count(run.config)
            rank = max(1, round(rank * run.budget / counts[rank]))
        budget = run.budget
        holder["rank"] = min(counts, key=lambda r: abs(counts[r] - budget))
        if scale is not None:
            holder["alpha"] = scale * holder["rank"]

    def _bottleneck(self, budget: float) -> int:
        """Of AdapterFusion's adapters; a small one where the fusion's square matrices leave nothing of the budget."""
        width, blocks, tasks = self.model.backbone.config.hidden_size, len(self.model.layers), len(self.model.tasks)
        fusion = blocks * (3 * width**2 + 2 * width)  # query and key with biases, and value
        per_unit, biases = tasks * blocks * (2 * width + 1), tasks * blocks * width
        return max(1, width // SMALLEST, round((budget - fusion - biases) / per_unit))


def _template(arguments: Mapping[str, Any], name: str) -> Any:
    return make_template(arguments[name], Expert if name == "expert" else Router, "the recipe")


def _epochs(config: Config, stage: str) -> float:
    trainer = stage_trainer(config, stage)
    epochs = stage_epochs(trainer)
    limit = trainer.get("limit_train_batches")
    limit = 1.0 if limit is None else limit
    if epochs is None or isinstance(limit, int) or trainer.get("max_steps") not in (None, -1):
        raise AlterError(
            f"{stage}.trainer: a comparison shares out the examples drawn, so give the length as max_epochs and, as a "
            "share such as 0.3, limit_train_batches."
        )
    if isinstance(trainer.get("val_check_interval"), int):
        raise AlterError(
            f"{stage}.trainer: the epochs of a comparison's methods have unlike numbers of batches, so give val_check_interval as a "
            "share of the epoch, such as 0.25."
        )
    return epochs * limit


def _plan(grid: Grid, planner: Planner, name: str, seed: int, factor: float) -> Path:
    """Writes what a cell needs; what is there has to be the same."""
    folder, method = grid.cell(name, seed, factor), grid.methods[name]
    config = copy.deepcopy(grid.recipe.config) | {"seed_everything": seed, "test": False}
    config["data"]["seed"] = seed
    runs = method.plan(config, planner.budget)
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        run.config["run"] = str(folder / run.name)
        planner.match(run)
        for stage in run.config["stages"]:
            _scale(run.config[stage]["model"]["init_args"], factor)
    plan = {
        "recipes": [f"{run.name}.yaml" for run in runs],
        "trains": method.trains,
        "runner": runs[0].runner,
        "data": planner.data,
        "settings": _digest([{**run.config, "backbone": planner.backbone["fingerprint"]} for run in runs]),
    }
    file = folder / PLAN
    # cells of before rows were looked at name no data
    before = {"data": plan["data"], **json.loads(file.read_text())} if file.is_file() else plan
    if before != plan:
        other = "rows of the tasks" if {**before, "data": plan["data"]} == plan else "settings"
        raise AlterError(
            f"{file}: this cell was started with other {other}; give a new folder with --out, or remove {folder}."
        )
    for run in runs:
        write_text(folder / f"{run.name}.yaml", dump(run.config))  # whole, since a cell may be reading it
    write_json(file, plan)
    return folder


def _digest(configs: Sequence[Config]) -> str:
    """Tells settings from others, wherever they are run."""

    def placeless(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: placeless(inner) for key, inner in value.items() if key not in PLACES}
        return [placeless(inner) for inner in value] if isinstance(value, list) else value

    return hashlib.sha256(json.dumps(placeless(list(configs)), sort_keys=True).encode()).hexdigest()


def _scale(arguments: dict[str, Any], factor: float) -> None:
    if factor == 1.0:
        return
    if "lr" not in arguments.get("optimizer", {}).get("init_args", {}):
        raise AlterError("--tune: the recipe's optimizers have no init_args.lr to vary; write it there.")
    arguments["optimizer"]["init_args"]["lr"] *= factor


# -- running ----------------------------------------------------------------------------------------------------------


def _run_cells(grid: Grid, cells: Sequence[Path], split: str) -> list[str]:
    """Runs cells in processes of their own; returns a line for each that failed."""
    todo = [cell for cell in cells if not (cell / f"{split}.json").is_file()]
    done = len(cells) - len(todo)
    print(f"{len(cells)} cells, {done} complete before" + (", learning rates" if split == TRAINED else ""), flush=True)

    def command(cell: Path) -> list[str]:
        return ["-m", "alter.compare.cell", str(cell), split]

    return run_cells(todo, command, lambda cell: str(cell.relative_to(grid.folder / "cells")), grid.processes)
