"""The way from a recipe to a tested model.

It leaves ``recipe.yaml`` (what was run, complete), ``env.txt``, ``stage1/`` and ``stage2/`` (TensorBoard, metrics.csv, checkpoints, the
stage's model), ``model/`` (what ``alter.load`` reads), ``results.json``, ``answers.jsonl`` and ``inside.json`` (what the
report is drawn from), ``report.html`` and its pictures in ``report/``.
"""

from __future__ import annotations

import gc
import json
import logging
import shlex
import time
import warnings
from pathlib import Path
from typing import Any

from alter import report
from alter.calibrate import calibrate_run
from alter.data import MultiTaskDataModule
from alter.errors import AlterError
from alter.evaluate import evaluate
from alter.guess import fit_run
from alter.loading import load, run_recipe
from alter.machine import is_first
from alter.nn.backbone import backbone_fingerprint, resolve_backbone
from alter.nn.decoding import Generation
from alter.precision import slow_precision
from alter.predict import Predictor
from alter.recipe import Recipe
from alter.recipe_file import STAGES
from alter.results import render_table, run_results
from alter.run_folder import changing, claim, measured_in, peak_memory, record, records, replace_model, stage_records
from alter.schema import refuse_foreign_sources
from alter.training import release, say, train
from alter.writing import write_json


def fit(recipe: Recipe) -> None:
    """Runs the stages that are not finished, then the test.

    Raises:
        AlterError: the run folder holds another recipe, another process changes it, or something on the way is
            wrong with the input.
    """
    if is_first():
        try:
            recipe.run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AlterError(
                f"{recipe.run}: the run folder cannot be made ({error.strerror}); name another by --run."
            ) from error
    with changing(recipe.run):
        _fit(recipe)


def _fit(recipe: Recipe) -> None:
    run = recipe.run
    quiet()
    claim(run, recipe)
    backbone = resolve_backbone(recipe.config["backbone"])
    started = time.perf_counter()
    data = recipe.open_data(backbone)
    precision = recipe.config["precision"]
    say(f"run folder: {run}\nbackbone:   {recipe.config['backbone']} ({backbone}), {precision}\n")
    if slow := slow_precision(precision, recipe.config["trainer"]["accelerator"]):
        say(f"precision: {slow}\n")
    say(data.summary())
    origin = {"backbone": backbone_fingerprint(backbone)}  # by which it is known where it has moved
    record(run, "data", time.perf_counter() - started, **data.mixture(), **origin)
    trained = [_run_stage(stage, recipe, str(backbone), data) for stage in STAGES if stage in recipe.config["stages"]]
    if not recipe.config["test"] or not is_first():
        return
    results = run / "results.json"
    if results.is_file() and (run / report.REPORT).is_file() and not any(trained):  # the report is written last
        say(f"test: finished before ({results}), skipped; `alter test --run {run}` tests again.\n")
        print(render_table(json.loads(results.read_text())))
        print(_last_words(run, recipe.tasks[0].name))
    else:
        measure(run, data=data)


def measure(
    run: Path, data: MultiTaskDataModule | None = None, split: str = "test", backbone: str | None = None
) -> dict[str, Any]:
    """Measures a finished run, writes ``results.json`` (for the test split) and prints the table."""
    started = time.perf_counter()
    predictor, data = ready(run, data, backbone)
    first_task = predictor.tasks[0]
    answers: dict[str, list[str]] = {}
    tasks = evaluate(predictor, data, split, keep=answers.__setitem__)
    seconds = {name: known["seconds"] for name, known in records(run).items()}
    if split == "test":
        seconds["test"] = time.perf_counter() - started
    trained = list(stage_records(run).values())
    host, device = peak_memory(trained)
    results = run_results(
        tasks,
        seconds,
        host,
        max((known["trainable_parameters"] for known in trained), default=0),
        peak_device_memory=device,
    )
    name = "results.json" if split == "test" else f"results.{split}.json"
    write_json(run / name, results)
    print(render_table(results))
    if split == "test":
        report.look_inside(run, predictor, data, answers)
        folder = predictor.tokenizer.name_or_path
        del predictor  # before stage 1's model stands beside it
        gc.collect()
        report.look_at_stage1(run, data, folder)
        report.write_report(run)
    print(_last_words(run, first_task, name))
    return results


def _last_words(run: Path, task: str, results: str = "results.json") -> str:
    """Where everything is, and what to do with it."""
    drawn = f"\nReport:  {run / report.REPORT}\n" if results == "results.json" else ""
    following = shlex.join(["alter", "predict", "--run", str(run), "--task", task, "--input", "FILE"])
    return f"{drawn}Results: {run / results}\nNext:    {following}"


def ready(
    run: Path, data: MultiTaskDataModule | None = None, backbone: str | None = None
) -> tuple[Predictor, MultiTaskDataModule]:
    """Loads a finished run with its data; calibrates it and fits its task predictor where that has not been done."""
    quiet()
    predictor = load(run, backbone)
    if data is None:
        arguments = run_recipe(run)["data"]
        refuse_foreign_sources(arguments["tasks"], run / "recipe.yaml")
        data = MultiTaskDataModule(
            **arguments, tokenizer=predictor.tokenizer.name_or_path, seq2seq=predictor.model.is_seq2seq
        )
        data.setup()
    calibrate_run(run, predictor, data)
    fit_run(run, predictor, data)
    return predictor, data


def quiet() -> None:
    """Keeps the libraries' advertisements and progress bars from the screen; their warnings stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Lightning's own use of a torch function; one process where SLURM is, which may well be meant; and a resume that our
    # sampler makes exact, though Lightning cannot know.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # examples are encoded before training
    warnings.filterwarnings("ignore", message="The `srun` command is available")
    # Metrics that are the same on all processes.
    warnings.filterwarnings("ignore", message=".*recommended to use `self.log.*sync_dist=True.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")  # of a resumed run


def _run_stage(stage: str, recipe: Recipe, backbone: str, data: MultiTaskDataModule) -> bool:
    """Trains a stage, or goes on with it; returns False where it was finished before."""
    folder = recipe.run / stage
    if stage in records(recipe.run):
        say(f"{stage}: finished before ({folder / 'model'}), skipped.")
        return False
    if stage == "stage2" and "stage1" not in records(recipe.run):
        raise AlterError(f"{recipe.run / 'stage1'}: stage2 needs a finished stage1; run with --stages [stage1,stage2].")
    say(f"\n{stage}: trains in {folder}")
    data.first_epoch = recipe.epochs_before(stage)
    generation = Generation(**recipe.config["generation"])
    facts, cli = train(folder, recipe.stage_args(stage, backbone), data, recipe.config["backbone"], generation)
    if cli.trainer.is_global_zero:
        for outdated in [*measured_in(recipe.run), recipe.run / report.REPORT]:  # of an earlier stage
            outdated.unlink(missing_ok=True)
        replace_model(folder / "model", recipe.run / "model")
        record(recipe.run, stage, **facts)
    cli.trainer.strategy.barrier()
    del cli
    release(data)
    return True
