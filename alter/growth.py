"""``alter add-task`` and ``alter remove-task``: a trained run's tasks change, and nothing else does."""

from __future__ import annotations

import copy
import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alter.borrowing import borrowed, borrowers, describe
from alter.calibrate import calibrate
from alter.data import MultiTaskDataModule, Task
from alter.errors import AlterError
from alter.evaluate import evaluate
from alter.guess import TASK_PREDICTOR_FILE, add_to_run, read_task_predictor
from alter.loading import CALIBRATION_FILE, answered_tasks, load, model_folder, run_recipe
from alter.nn.backbone import is_seq2seq, resolve_backbone
from alter.nn.decoding import Generation
from alter.nn.files import CONFIG_FILE, WEIGHTS_FILE, read_config
from alter.nn.model import MTAModel
from alter.recipe_values import check_lengths
from alter.results import render_table, run_results
from alter.run import measure, quiet
from alter.run_folder import ADDED, differences, measured_in, peak_memory, put_back, record, records, replace_model
from alter.schema import refuse_foreign_sources
from alter.stage_settings import for_tasks, stage_epochs, stage_trainer, trunk_cache
from alter.strategy import ONE_DEVICE
from alter.training import release, say, train
from alter.writing import write_json, write_text
from alter.yaml_file import dump

CHECKS = 0.2  # of the draws, between two looks at validation
# whatever the run's own stages were cut to
WHOLE = {"limit_train_batches": 1.0, "check_val_every_n_epoch": 1, "max_steps": -1, "min_steps": None, "max_time": None}
KEPT = ("loss_average", "gradient_checkpointing", "skip_bad_batches")  # of how the run's stages trained
CONSOLIDATED = ".consolidated-"  # folders of that name in the run's ADDED, as no task is called
OWN, KEEP = 0.8, 0.8  # a newcomer's own expert among the task experts, and these among all, at the start


def add_task(
    run: Path,
    file: Path,
    shots: int | None = None,
    draws: int | None = None,
    lr: float | None = None,
    consolidate: bool = False,
    backbone: str | None = None,
) -> dict[str, Any]:
    """Trains a new task's expert and its mixture beside a finished run's model, tests it, and lets it join.

    The same call goes on where it was stopped.

    Args:
        run: folder of a finished run.
        file: the task's YAML file.
        shots: learn from this many rows of each class, as ``data.shots``.
        draws: training examples drawn; by default as many as each of the run's own tasks had on average.
        lr: learning rate; by default stage 1's.
        consolidate: whether to train stage 2's part again, on all tasks.
        backbone: where it is, when not where it was; the run's model then names it.

    Returns:
        what the task borrows: see ``borrowed``.

    Raises:
        AlterError: the run is not finished, the task's file has mistakes, its name is taken, or it does not fit.
    """
    quiet()
    if draws is not None and draws < 1:
        raise AlterError(f"--draws: {draws} is below 1; give how many training examples to draw.")
    if shots is not None and shots < 1:
        raise AlterError(f"--shots: {shots} is below 1; give how many rows of a class to learn from.")
    content = _finished_run(run)
    task = Task.from_file(file, content["data"]["root"])
    _ = task.opened
    known = answered_tasks(run, run / "model")
    folder = run / ADDED / task.name
    if consolidate:
        _require_consolidable(run, content)
    begun = records(folder)
    if task.name in known and "tested" in begun and consolidate and "consolidated" not in begun:  # stopped meanwhile
        _consolidate_with(run, folder)
        return borrowed(load(run).model, task.name)
    if task.name in known and ("tested" in begun or "added" not in begun):
        raise AlterError(f"{file}: the run has a task '{task.name}' already; give the new one another name.")
    named = backbone or _backbone(run)
    where = resolve_backbone(named)
    task = task if shots is None else replace(task, shots=shots)  # of its own, also where all tasks train again
    data = _data({**content["data"], "tasks": [task], "shots": None, **_drawn(run, content, draws)}, where)
    settings = {key: value for key, value in task.to_dict().items() if key not in ("where", "shots")}
    given = {"task": settings, "shots": shots, "draws": draws, "lr": lr}
    _claim(folder, given if task.name in known else {**given, "model of the run": _digest(run / "model")})
    say(data.summary())
    if "added" not in begun:
        say(f"\n{task.name}: trains in {folder}")
        arguments = newcomer_arguments(run, content, task.name, where, draws, lr)
        generation = Generation(**content.get("generation", {}))
        facts = train(folder, arguments, data, named, generation)[0]
        release(data)
        epochs = arguments["trainer"]["max_epochs"]
        record(folder, "added", **facts, **data.mixture()["mixture"][task.name], draws=data.draws * epochs)
    if task.name not in known:
        _join(run, folder, [*content["data"]["tasks"], task.to_dict()])
    started = time.perf_counter()
    predictor = load(run)
    found = borrowed(predictor.model, task.name)
    write_json(folder / "borrowed.json", found)
    if task.choices:
        _add_to(run / "model" / CALIBRATION_FILE, calibrate(predictor, data, [task.name]))
    add_to_run(run, predictor, data, task.name)
    results = evaluate(predictor, data, tasks=[task.name])
    _change_results(run, lambda before: {**before, **results})
    trained = records(folder)["added"]
    seconds = {"training": trained["seconds"], "test": time.perf_counter() - started}
    host, device = peak_memory([trained])
    found_out = run_results(results, {}, host, trained["trainable_parameters"], peak_device_memory=device)
    print(render_table({**found_out, "seconds": seconds}))  # it is no stage of the run
    print(f"\n{describe(task.name, found)}")
    record(folder, "tested", seconds["test"])
    if consolidate:
        _consolidate_with(run, folder)
    else:
        following = shlex.join(["alter", "predict", "--run", str(run), "--task", task.name, "--input", "FILE"])
        print(f"\nThe other tasks answer as before. Next: {following}")
    return found


def newcomer_arguments(
    run: Path, content: Mapping[str, Any], task: str, backbone: Path, draws: int | None, lr: float | None
) -> dict[str, Any]:
    """What ``alter.training.train`` takes to train a newcomer beside a run's model; its arguments as for ``add_task``."""
    stage1 = content["stage1"]["model"]["init_args"]
    optimizer = copy.deepcopy(stage1["optimizer"])
    if lr is not None:
        optimizer["init_args"]["lr"] = lr
    given = {"expert": _newcomer_expert(run, content), "own": OWN, "keep": KEEP, "optimizer": optimizer}
    given |= {key: stage1[key] for key in KEPT if key in stage1}  # its schedule is its own: stage 1's may never fall
    whole = _drawn(run, content, draws)["examples_per_epoch"] is None
    length = {**WHOLE, "max_epochs": _epochs(content) if whole else 1, "val_check_interval": CHECKS}
    trainer = {**for_tasks(stage_trainer(content, "stage1"), [task]), **ONE_DEVICE, **length}
    return _arguments(content, "AddTaskModule", [task], run, backbone, given, trainer)


def _newcomer_expert(run: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The run's kind of expert; a LoRA is scaled so that with its share of the mixture it counts as much as alone."""
    expert: dict[str, Any] = copy.deepcopy(content["stage1"]["model"]["init_args"]["expert"])
    arguments = expert.get("init_args", {})
    if "alpha" in arguments:
        share = OWN * (KEEP if _has_shared(run) else 1.0)
        arguments["alpha"] = (arguments["alpha"] or arguments["rank"]) / share
    return expert


def remove_task(run: Path, name: str, consolidate: bool = False, backbone: str | None = None) -> None:
    """Takes a task out of a finished run; the others answer as before.

    Args:
        run: folder of a finished run.
        name: of the task.
        consolidate: whether to train stage 2's part again, on the tasks that are left.
        backbone: where it is, when not where it was; the run's model then names it.

    Raises:
        AlterError: the run is not finished, or has no such task, or no other.
    """
    quiet()
    content = _finished_run(run)
    if consolidate:
        _require_consolidable(run, content)
        stopped_in_it = name not in _names(content) and _consolidation(run, _names(content)).is_dir()
        if stopped_in_it:
            consolidate_run(run)
            return
    named = backbone or _backbone(run)
    model = MTAModel.from_pretrained(run / "model", named, content["precision"])
    trained_together = name in model.tasks[: model.base_tasks]
    users = borrowers(model, name) if trained_together else []
    answered = [task for task in model.tasks if task not in model.retired]
    if name in answered or name not in _names(content):  # else stopped after it had left the model
        _take_out(run, model, name, named)
    if not trained_together:
        shutil.rmtree(run / ADDED / name, ignore_errors=True)
    _change_results(run, lambda before: {task: found for task, found in before.items() if task != name})
    left = [task for task in content["data"]["tasks"] if task["name"] != name]
    if consolidate:
        _consolidation(run, [task["name"] for task in left]).mkdir(parents=True, exist_ok=True)
    # Last: while it names the task, the same command begins again, and then goes on with the consolidation.
    write_text(run / "recipe.yaml", dump({**content, "data": {**content["data"], "tasks": left}}))
    if trained_together:
        print(f"{name} is no longer answered. Its expert stays, since others may borrow from it: {', '.join(users)}.")
    else:
        print(f"{name} is gone, with all that it brought.")
    if consolidate:
        consolidate_run(run)
    else:
        print("The other tasks answer as before.")


def _take_out(run: Path, model: MTAModel, name: str, backbone: str) -> None:
    """Replaces a run's model by one without a task."""
    model.remove_task(name)
    beside = run / f".without.{name}"
    model.save_pretrained(beside, backbone)
    _carry_on(run / "model", beside)
    _drop_from(beside / CALIBRATION_FILE, name)
    if known := read_task_predictor(beside):
        known.without(name).save(beside / TASK_PREDICTOR_FILE)
    _replace(beside, run)
    shutil.rmtree(beside)


def consolidate_run(run: Path) -> None:
    """Trains the shared experts and their gate again on all of a run's tasks, and what was added; then tests all.

    Raises:
        AlterError: the run has no stage 2, or a task's data is no longer there.
    """
    content = _finished_run(run)
    _require_consolidable(run, content)
    named = _backbone(run)
    backbone = resolve_backbone(named)
    data = _data(content["data"], backbone)
    names = [task.name for task in data.tasks]
    folder = _consolidation(run, names)
    print(f"\nstage 2 again, for all tasks: trains in {folder}")
    print(data.summary())
    stage2 = content["stage2"]["model"]["init_args"]
    own = {key: stage2[key] for key in ("task_expert_lr", "optimizer", "schedule", "warmup", *KEPT) if key in stage2}
    trainer = {**for_tasks(stage_trainer(content, "stage2"), names), **ONE_DEVICE}
    arguments = _arguments(content, "ConsolidateModule", names, run, backbone, own, trainer)
    train(folder, arguments, data, named, Generation(**content.get("generation", {})))
    release(data)
    replace_model(folder / "model", run / "model")
    measure(run, data=data)
    shutil.rmtree(folder)  # last: while it is there, the same command goes on


def _consolidate_with(run: Path, folder: Path) -> None:
    """Consolidates a run after an addition, and notes there that it is done."""
    started = time.perf_counter()
    consolidate_run(run)
    record(folder, "consolidated", time.perf_counter() - started)


# -- parts ------------------------------------------------------------------------------------------------------------


def _finished_run(run: Path) -> dict[str, Any]:
    content = run_recipe(run)
    if model_folder(run) == run or "stage1" not in content:
        raise AlterError(f"{run}: what save_pretrained wrote has no recipe to go on with; name the run folder itself.")
    put_back(run / "model")
    read_config(run / "model")
    return content


def _names(content: Mapping[str, Any]) -> list[str]:
    return [task["name"] for task in content["data"]["tasks"]]


def _backbone(run: Path) -> str:
    """Where the run's model names its backbone."""
    return str(read_config(run / "model")["backbone"]["name"])


def _consolidation(run: Path, tasks: Sequence[str]) -> Path:
    """Where a consolidation of these tasks trains, and goes on."""
    return run / ADDED / f"{CONSOLIDATED}{hashlib.sha256(json.dumps(tasks).encode()).hexdigest()[:12]}"


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Notes what an addition was begun with.

    Args:
        folder: of the addition.
        settings: what is compared; what else was noted stays as it was.

    Raises:
        AlterError: it was begun with something else.
    """
    file = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    begun = file.is_file() and ((folder / "checkpoints").is_dir() or "added" in records(folder))
    noted = json.loads(file.read_text()) if begun else {}
    if begun and (changed := differences(noted, {**noted, **settings})):
        raise AlterError(
            f"{file}: this addition was begun with another {', '.join(changed)}; give the same again, or remove {folder} to "
            "begin anew."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, {**noted, **settings})


def _digest(model: Path) -> str:
    """Tells a model from what it was before another change of the run."""
    return hashlib.sha256(b"".join((model / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE))).hexdigest()


def _require_consolidable(run: Path, content: Mapping[str, Any]) -> None:
    refuse_foreign_sources(content["data"]["tasks"], run / "recipe.yaml")
    if not _has_shared(run):
        raise AlterError(f"{run}: --consolidate trains stage 2's part again, and the run has none; leave it out.")


def _has_shared(run: Path) -> bool:
    """Whether the run's model has what stage 2 brings."""
    return bool(read_config(run / "model")["num_shared"] > 0)


def _epochs(content: Mapping[str, Any]) -> int:
    """Of stage 1."""
    return stage_epochs(stage_trainer(content, "stage1")) or 1


def _drawn(run: Path, content: Mapping[str, Any], draws: int | None) -> dict[str, int | None]:
    """Training examples: by default as many as each task of the first ones had; None where the recipe leaves it to their sizes."""
    an_epoch, model = content["data"]["examples_per_epoch"], read_config(run / "model")
    first = len(model["tasks"]) - len(model.get("newcomers", []))
    return {"examples_per_epoch": draws or (an_epoch and -(-an_epoch * _epochs(content) // first))}


def _data(settings: Mapping[str, Any], backbone: Path) -> MultiTaskDataModule:
    data = MultiTaskDataModule(**settings, tokenizer=str(backbone), seq2seq=is_seq2seq(backbone))
    check_lengths(data.tasks, backbone)
    data.setup()
    return data


def _arguments(
    content: Mapping[str, Any],
    module: str,
    tasks: list[str],
    run: Path,
    backbone: Path,
    own: Mapping[str, Any],
    trainer: Mapping[str, Any],
) -> dict[str, Any]:
    init_args = {
        "backbone": str(backbone),
        "tasks": tasks,
        "precision": content["precision"],
        "start_from": str(run / "model"),
        "trunk_cache": trunk_cache(content),
        **own,
    }
    return {
        "seed_everything": content["seed_everything"],
        "trainer": trainer,
        "model": {"class_path": f"alter.stages.{module}", "init_args": init_args},
    }


def _carry_on(source: Path, target: Path) -> None:
    """Takes what belongs to a model folder beside weights and description along."""
    for name in (CALIBRATION_FILE, TASK_PREDICTOR_FILE):
        if (source / name).is_file():
            shutil.copy(source / name, target / name)


def _join(run: Path, folder: Path, tasks: list[dict[str, Any]]) -> None:
    """The recipe first: a task there that the model lacks does no harm, the other way round would."""
    content = run_recipe(run)
    if [task["name"] for task in content["data"]["tasks"]] != [task["name"] for task in tasks]:
        names = {task["name"]: task for task in tasks}
        # Of the tasks that were there; the new one has learned from all that it was given.
        shots = content["data"]["shots"]
        earlier = {
            task["name"]: {**task, "shots": task.get("shots") or shots} for task in content["data"]["tasks"] if shots
        }
        joined = {**content["data"], "tasks": list({**names, **earlier}.values()), "shots": None}
        write_text(run / "recipe.yaml", dump({**content, "data": joined}))
    _carry_on(run / "model", folder / "model")
    _replace(folder / "model", run)


def _replace(model: Path, run: Path) -> None:
    """Gives a run another model; a consolidation of the one before that was stopped has nothing to go on with."""
    for begun in (run / ADDED).glob(f"{CONSOLIDATED}*"):
        shutil.rmtree(begun)
    replace_model(model, run / "model")


def _add_to(file: Path, entries: Mapping[str, Any]) -> None:
    before = json.loads(file.read_text()) if file.is_file() else {}
    write_json(file, {**before, **entries})


def _drop_from(file: Path, name: str) -> None:
    if file.is_file():
        write_json(file, {key: value for key, value in json.loads(file.read_text()).items() if key != name})


def _change_results(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Changes the tasks of ``results.json``; what else was measured, of other rows or without names, is of other tasks."""
    file, *others = measured_in(run)
    for outdated in others:
        outdated.unlink()
    if file.is_file():
        results = json.loads(file.read_text())
        write_json(file, {**results, "tasks": change(results["tasks"])})
