"""The run folder, and the way from a recipe to a tested model.

``recipe.yaml`` (what was run, complete), ``env.txt``, ``stage1/`` and ``stage2/`` (TensorBoard, metrics.csv, checkpoints, the
stage's model), ``model/`` (what ``alter.load`` reads), ``results.json``, ``answers.jsonl`` and ``inside.json`` (what the
report is drawn from), ``report.html`` and its pictures in ``report/``.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import platform
import re
import shutil
import time
import warnings
from collections.abc import Mapping
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

import alter.fsdp2  # noqa: F401 (makes the name known to Lightning)
from alter import report
from alter.calibrate import calibrate_run
from alter.callbacks import ExactResume, Inside, KeepLog, MetricsCSV, Preemption, StageProgress, Throughput
from alter.callbacks.preemption import KEPT
from alter.checkpoints import CheckedCheckpoints, is_whole, last_whole
from alter.data import MultiTaskDataModule
from alter.errors import AlterError
from alter.evaluate import evaluate
from alter.guess import fit_run
from alter.loading import load, run_recipe
from alter.nn.backbone import resolve_backbone
from alter.nn.decoding import Generation
from alter.precision import slow_precision
from alter.predict import Predictor
from alter.recipe import STAGES, Recipe
from alter.requeue import REQUEUE
from alter.results import peak_device_memory_bytes, peak_memory_bytes, render_table, run_results
from alter.schema import refuse_foreign_sources
from alter.stages import StageModule
from alter.writing import write_json, write_text
from alter.yaml_file import read_yaml

say = rank_zero_only(print)
# Keys that may differ between two calls for one run folder, since they do not change what is computed.
UNCOMPARED = re.compile(
    r"run|stages.*|test|trunk_cache.*|data\.tasks\.\d+\.license|trainer\.(accelerator|devices|num_nodes|strategy)(\..*)?"
)


class StageCLI(LightningCLI):
    """One stage: instantiates trainer and module from the recipe's values."""

    def __init__(
        self, folder: Path, arguments: dict[str, Any], first_step: int = 0, generation: Generation | None = None
    ) -> None:
        """Makes the stage's trainer and module.

        Args:
            folder: of the stage.
            arguments: what ``Recipe.stage_args`` returned.
            first_step: that will be logged.
            generation: how sample answers are decoded.
        """
        self.folder = folder
        self.first_step = first_step
        self.generation = generation
        self.metrics = MetricsCSV(folder / "metrics.csv")
        self.throughput = Throughput()
        super().__init__(
            StageModule,
            args=arguments,
            run=False,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            seed_everything_default=arguments["seed_everything"],
        )

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Takes the values as they are; the base class would warn that a command line is there too."""
        self.config = parser.parse_object(args)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Adds what every stage has: fixed folders, so that the same command finds its checkpoint, and logs."""
        events = TensorBoardLogger(
            self.folder.parent,
            name=self.folder.name,
            version="",
            purge_step=self.first_step,  # TensorBoard leaves out what a killed run wrote from there on
        )
        return super().instantiate_trainer(
            logger=[events, self.metrics],
            default_root_dir=self.folder,
            use_distributed_sampler=False,
            enable_model_summary=False,
            **kwargs,
        )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Any:
        own: list[Callback] = [self.throughput, KeepLog(self.metrics), ExactResume(), Inside(self.generation)]
        if config.get("enable_progress_bar") is not False:
            own.append(StageProgress(self.folder.name, self.throughput))
        own += self._checkpoints(config.get("callbacks") or [])
        own.append(Preemption(self.folder / "checkpoints" / KEPT, REQUEUE))
        plugins = config.get("plugins") or []
        config["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), CheckedCheckpoints()]
        return super()._instantiate_trainer(config, [*callbacks, *own])

    def _checkpoints(self, given: list[Callback]) -> list[Callback]:
        if any(isinstance(callback, ModelCheckpoint) for callback in given):
            return []
        return [
            ModelCheckpoint(
                self.folder / "checkpoints",
                filename="best",
                monitor="val/loss",
                save_last=True,
                enable_version_counter=False,
            )
        ]


def fit(recipe: Recipe) -> None:
    """Runs the stages that are not finished, then the test.

    Raises:
        AlterError: the run folder holds another recipe, or something on the way is wrong with the input.
    """
    run = recipe.run
    quiet()
    _claim(run, recipe)
    backbone = resolve_backbone(recipe.config["backbone"])
    started = time.perf_counter()
    data = recipe.open_data(backbone)
    precision = recipe.config["precision"]
    say(f"run folder: {run}\nbackbone:   {recipe.config['backbone']} ({backbone}), {precision}\n")
    if slow := slow_precision(precision, recipe.config["trainer"]["accelerator"]):
        say(f"precision: {slow}\n")
    say(data.summary())
    record(run, "data", time.perf_counter() - started)
    trained = [_run_stage(stage, recipe, str(backbone), data) for stage in STAGES if stage in recipe.config["stages"]]
    data.trainer = None
    gc.collect()  # the stages' models and optimizers, before the test loads another
    if not recipe.config["test"] or not _is_first():
        return
    results = run / "results.json"
    if results.is_file() and (run / report.REPORT).is_file() and not any(trained):  # the report is written last
        say(f"test: finished before ({results}), skipped; `alter test --run {run}` tests again.\n")
        print(render_table(json.loads(results.read_text())))
        print(_last_words(run, recipe.tasks[0].name))
    else:
        measure(run, data=data)


def measure(run: Path, data: MultiTaskDataModule | None = None, split: str = "test") -> dict[str, Any]:
    """Measures a finished run, writes ``results.json`` (for the test split) and prints the table."""
    started = time.perf_counter()
    predictor, data = ready(run, data)
    answers: dict[str, list[str]] = {}
    tasks = evaluate(predictor, data, split, keep=answers.__setitem__)
    seconds = {name: known["seconds"] for name, known in records(run).items()}
    if split == "test":
        seconds["test"] = time.perf_counter() - started
    trained = list(stage_records(run).values())
    results = run_results(
        tasks,
        seconds,
        max([peak_memory_bytes(), *(known["peak_memory_bytes"] for known in trained)]),
        max((known["trainable_parameters"] for known in trained), default=0),
        peak_device_memory=peak_device_memory_bytes(),
    )
    name = "results.json" if split == "test" else f"results.{split}.json"
    write_json(run / name, results)
    print(render_table(results))
    if split == "test":
        report.look_inside(run, predictor, data, answers)
        report.write_report(run)
    print(_last_words(run, predictor.tasks[0], name))
    return results


def _last_words(run: Path, task: str, results: str = "results.json") -> str:
    """Where everything is, and what to do with it."""
    drawn = f"\nReport:  {run / report.REPORT}\n" if results == "results.json" else ""
    return f"{drawn}Results: {run / results}\nNext:    alter predict --run {run} --task {task} --input FILE"


def ready(run: Path, data: MultiTaskDataModule | None = None) -> tuple[Predictor, MultiTaskDataModule]:
    """Loads a finished run with its data; calibrates it and fits its task predictor where that has not been done."""
    quiet()
    predictor = load(run)
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
    warnings.filterwarnings("ignore", message="The `srun` command is available")
    # Metrics that are the same on all processes.
    warnings.filterwarnings("ignore", message=".*recommended to use `self.log.*sync_dist=True.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")  # of a resumed run


def _claim(run: Path, recipe: Recipe) -> None:
    """Writes the recipe and the environment, or checks that the folder holds the same recipe."""
    if not _is_first() or begun_with(run, recipe):
        return
    run.mkdir(parents=True, exist_ok=True)
    (run / "env.txt").write_text(_environment())
    write_text(run / "recipe.yaml", recipe.text)


def begun_with(run: Path, recipe: Recipe) -> bool:
    """Whether a folder holds a run of this recipe that has begun; before, there is nothing to lose or to mix up.

    Raises:
        AlterError: it holds one of another recipe.
    """
    file = run / "recipe.yaml"
    if not (file.is_file() and any((run / stage / "checkpoints").is_dir() for stage in STAGES)):
        return False
    changed = [key for key in differences(read_yaml(file), recipe.config) if not UNCOMPARED.fullmatch(key)]
    if changed:
        raise AlterError(
            f"{file}: this run was started with another recipe (it differs in {', '.join(changed[:5])}"
            f"{' and more' if len(changed) > 5 else ''}); give a new folder with --run, or remove {run} to start again."
        )
    return True


def differences(before: Any, after: Any, key: str = "") -> list[str]:
    """The keys in which two recipes differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = [*before, *(name for name in after if name not in before)]
        return [d for n in names for d in differences(before.get(n), after.get(n), f"{key}.{n}".lstrip("."))]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [d for i, (b, a) in enumerate(zip(before, after, strict=True)) for d in differences(b, a, f"{key}.{i}")]
    return [] if before == after else [key]


@cache
def _environment() -> str:
    versions = sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()}, key=str.lower)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    machine = f"python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores, {device}"
    return "\n".join([f"# {machine}", *versions, ""])


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
        for outdated in ("results.json", report.REPORT):  # of an earlier stage
            (recipe.run / outdated).unlink(missing_ok=True)
        replace_model(folder / "model", recipe.run / "model")
        record(recipe.run, stage, **facts)
    cli.trainer.strategy.barrier()
    return True


def train(
    folder: Path,
    arguments: dict[str, Any],
    data: MultiTaskDataModule,
    backbone: str,
    generation: Generation | None = None,
) -> tuple[dict[str, Any], StageCLI]:
    """Trains a module, or goes on where it stopped, and writes its best model to ``folder/model``.

    Args:
        folder: for checkpoints and logs.
        arguments: ``seed_everything``, ``trainer`` and ``model``, as ``Recipe.stage_args`` gives them.
        data: set up.
        backbone: its name, for the model's description.
        generation: how the log's sample answers are decoded; greedily by default.

    Returns:
        what is known of it (seconds, trainable parameters and so on), and the trainer with its module.
    """
    started = time.perf_counter()
    folders = _checkpoint_folders(folder, arguments["trainer"])
    last = last_whole(folders, say)
    done = 0
    if last is not None:
        say(f"{folder.name}: goes on from {last}.")
        done = torch.load(last, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    cli = StageCLI(folder, arguments, done, generation)
    _suit_small_data(cli.trainer, data)
    if last is None:
        cli.metrics.cut(0)  # of a run that was killed before its first checkpoint
    try:
        with REQUEUE.held():
            cli.trainer.fit(cli.model, data, ckpt_path=None if last is None else str(last), weights_only=True)
    except SystemExit:  # how Lightning ends at Ctrl+C
        if not cli.trainer.interrupted:
            raise
    if cli.trainer.interrupted:
        raise KeyboardInterrupt
    _keep_best(cli.trainer, cli.model)
    trained = cli.model.model.trained_state()  # asked by all processes, since each may hold a slice
    if cli.trainer.is_global_zero:
        cli.model.model.save_pretrained(folder / "model", backbone, trained)
        halves = [file for each in folders for file in each.glob(".*.part")]  # of a killed run
        for file in [*halves, folders[0] / KEPT]:
            file.unlink(missing_ok=True)
    facts = {
        "seconds": time.perf_counter() - started,
        "trainable_parameters": cli.model.trainable_parameters(),
        "peak_memory_bytes": peak_memory_bytes(),
        "tokens": cli.throughput.tokens,
        "step_seconds": cli.throughput.seconds,
        "validation_loss": _best_score(cli.trainer),
    }
    return facts, cli


def _suit_small_data(trainer: Any, data: MultiTaskDataModule) -> None:
    """At least one batch, where a share of the epoch's is less, which Lightning refuses; and at least one line in the log."""
    data.trainer = trainer  # says how many processes share the batches
    batches = len(data.train_dataloader())
    if isinstance(limit := trainer.limit_train_batches, float):
        if 0 < limit * batches < 1:
            trainer.limit_train_batches = 1
        batches = int(limit * batches)
    trainer.log_every_n_steps = max(1, min(trainer.log_every_n_steps, batches))


def _checkpoint_folders(folder: Path, trainer: Mapping[str, Any]) -> list[Path]:
    """The stage's own, and those that the recipe's callbacks name."""
    given = trainer.get("callbacks") or []
    named = [
        (callback.get("init_args") or {}).get("dirpath") for callback in (given if isinstance(given, list) else [given])
    ]
    return [folder / "checkpoints", *(Path(path).expanduser() for path in named if path)]


def _keep_best(trainer: Any, module: StageModule) -> None:
    """Loads the weights of the best checkpoint: by default the one with the lowest validation loss."""
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if best and not is_whole(Path(best)):
        raise AlterError(
            f"{best}: missing or damaged, it is not what was written; remove {Path(best).parent} to train this stage again."
        )
    if best:
        state = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
        module.model.load_trained_state(state, best)


def _best_score(trainer: Any) -> float | None:
    score = getattr(trainer.checkpoint_callback, "best_model_score", None)
    return None if score is None else float(score)


def replace_model(source: Path, target: Path) -> None:
    """Copies a stage's model to where ``alter.load`` reads, never leaving half of one there."""
    beside, before = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    put_back(target)
    for outdated in (beside, before):
        shutil.rmtree(outdated, ignore_errors=True)
    shutil.copytree(source, beside)
    if target.exists():
        target.rename(before)
    beside.rename(target)
    shutil.rmtree(before, ignore_errors=True)


def put_back(target: Path) -> None:
    """Ends what a kill in the middle of ``replace_model`` began, between its two renamings."""
    before = target.with_name(f".{target.name}.old")
    if before.is_dir() and not target.exists():
        before.rename(target)


def stage_records(run: Path) -> dict[str, dict[str, Any]]:
    """What is known of each finished stage: seconds, trainable parameters, tokens, peak memory, validation loss."""
    return {step: known for step, known in records(run).items() if step in STAGES}


def records(run: Path) -> dict[str, dict[str, Any]]:
    """What is known of each finished step of a run: its seconds and more."""
    file = run / "progress.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def record(run: Path, step: str, seconds: float, **facts: Any) -> None:
    """Notes a finished step, with the time it took; the first record stands, since a repeat only reads caches."""
    if _is_first() and step not in (before := records(run)):
        write_json(run / "progress.json", {**before, step: {"seconds": seconds, **facts}})


def _is_first() -> bool:
    """Whether this is the one process, or the first of several, which writes."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)
