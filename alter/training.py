"""One training: a module, its trainer, its checkpoints, and going on where it stopped."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

import alter.fsdp2  # noqa: F401 (makes the name known to Lightning)
from alter.callbacks import (
    ExactResume,
    Inside,
    Interruption,
    KeepLog,
    MetricsCSV,
    Preemption,
    StageProgress,
    Throughput,
)
from alter.callbacks.preemption import KEPT
from alter.checkpoints import CheckedCheckpoints, is_whole, last_whole
from alter.data import MultiTaskDataModule
from alter.errors import AlterError
from alter.machine import peak_device_memory_bytes, peak_memory_bytes, rank_variable
from alter.nn.decoding import Generation
from alter.requeue import REQUEUE
from alter.stages import StageModule
from alter.strategy import devices

say = rank_zero_only(print)
LOSS = "val/loss"


class StageCLI(LightningCLI):
    """One stage: instantiates trainer and module from the recipe's values."""

    def __init__(
        self,
        folder: Path,
        arguments: dict[str, Any],
        first_step: int = 0,
        generation: Generation | None = None,
        interruptible: bool = True,
    ) -> None:
        """Makes the stage's trainer and module.

        Args:
            folder: of the stage.
            arguments: what ``Recipe.stage_args`` returned.
            first_step: that will be logged.
            generation: how sample answers are decoded.
            interruptible: whether Ctrl+C and SIGTERM let it write a checkpoint first.
        """
        self.folder = folder
        self.first_step = first_step
        self.generation = generation
        self.interruptible = interruptible
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
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in given):
            own.append(StageProgress(self.folder.name, self.throughput))
        # before those of the recipe, whose checkpoints then know what a validation has chosen
        config["callbacks"] = [*self._checkpoints(given), *given]
        kept = self.folder / "checkpoints" / KEPT
        own.append(Preemption(kept, REQUEUE))
        if self.interruptible:
            own.append(Interruption(kept, [signal.SIGINT] if REQUEUE.listens else [signal.SIGINT, signal.SIGTERM]))
        config["devices"] = devices(config)
        plugins = config.get("plugins") or []
        config["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), CheckedCheckpoints()]
        return super()._instantiate_trainer(config, [*callbacks, *own])

    def _checkpoints(self, given: list[Callback]) -> list[Callback]:
        keepers = [callback for callback in given if isinstance(callback, ModelCheckpoint)]
        if any(keeper.monitor for keeper in keepers):
            return []
        return [
            ModelCheckpoint(
                self.folder / "checkpoints",
                filename="best",
                monitor=LOSS,
                save_last=not any(keeper.save_last for keeper in keepers),
                enable_version_counter=False,
            )
        ]


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
    checkpoints = folder / "checkpoints"
    last = last_whole(checkpoints, say)
    done = 0
    if last is not None:
        say(f"{folder.name}: goes on from {last}.")
        done = torch.load(last, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    cli = StageCLI(folder, arguments, done, generation)
    variable = rank_variable()
    if cli.trainer.world_size == 1 and variable:  # then nobody would write what the first one writes
        raise AlterError(
            f"trainer: it has one process, and the variable {variable}={os.environ[variable]} says that this is one of several; "
            "unset it, or set trainer.devices and trainer.num_nodes."
        )
    _suit_small_data(cli.trainer, data)
    if last is None:
        cli.metrics.cut(0)  # of a run that was killed before its first checkpoint
    try:
        with REQUEUE.held():
            cli.trainer.fit(cli.model, data, ckpt_path=None if last is None else str(last), weights_only=True)
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):  # how Lightning ends at Ctrl+C
            raise KeyboardInterrupt from None
        raise
    _keep_best(cli.trainer, cli.model)
    trained = cli.model.model.trained_state()  # asked by all processes, since each may hold a slice
    if cli.trainer.is_global_zero:
        cli.model.model.save_pretrained(folder / "model", backbone, trained)
        for file in [*checkpoints.rglob(".*.part"), checkpoints / KEPT]:  # of a killed run
            file.unlink(missing_ok=True)
    best = _best(cli.trainer)
    if best["value"] is None and cli.trainer.global_step:
        say(
            f"{folder.name}: ended before a validation, so that its last weights are kept; set trainer.val_check_interval."
        )
    facts = {
        "seconds": cli.throughput.elapsed,
        "trainable_parameters": cli.model.trainable_parameters(),
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_device_memory_bytes": peak_device_memory_bytes(),
        "tokens": cli.throughput.tokens,
        "step_seconds": cli.throughput.seconds,
        "validation_loss": best["value"] if best["metric"] == LOSS else None,
        "best": best,
    }
    return facts, cli


def release(data: MultiTaskDataModule) -> None:
    """Lets go of what ``train`` made, once nothing else names it, before another model stands beside it: it hangs in circles."""
    data.trainer = None
    gc.collect()


def _suit_small_data(trainer: Any, data: MultiTaskDataModule) -> None:
    """At least one batch, where a share of the epoch's is less, which Lightning refuses; and at least a line in the log an epoch."""
    data.trainer = trainer  # says how many processes share the batches
    batches = len(data.train_dataloader())
    if isinstance(limit := trainer.limit_train_batches, float):
        if 0 < limit * batches < 1:
            trainer.limit_train_batches = 1
        batches = int(limit * batches)
    elif limit is not None:
        batches = min(limit, batches)
    steps = batches // trainer.accumulate_grad_batches
    if trainer.log_every_n_steps:  # 0 is never
        trainer.log_every_n_steps = max(1, min(trainer.log_every_n_steps, steps))


def _keep_best(trainer: Any, module: StageModule) -> None:
    """Loads the weights of the best checkpoint: by default the one with the lowest validation loss."""
    best = getattr(_chooser(trainer), "best_model_path", "")
    if best and not is_whole(Path(best)):
        raise AlterError(
            f"{best}: missing or damaged, it is not what was written; remove {Path(best).parent} to train this stage again."
        )
    if best:
        state = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
        module.model.load_trained_state(state, best)


def _chooser(trainer: Any) -> ModelCheckpoint | None:
    """The callback that keeps the best checkpoint: the first that has something to judge by; others keep the newest."""
    return next((callback for callback in trainer.checkpoint_callbacks if getattr(callback, "monitor", None)), None)


def _best(trainer: Any) -> dict[str, Any]:
    """What the best checkpoint was chosen by: the metric, whether less or more of it is better, and how much it is there."""
    chooser = _chooser(trainer)
    score = getattr(chooser, "best_model_score", None)
    return {
        "metric": getattr(chooser, "monitor", LOSS),
        "mode": getattr(chooser, "mode", "min"),
        "value": None if score is None else float(score),
    }
