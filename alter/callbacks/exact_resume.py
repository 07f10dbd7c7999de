"""What Lightning loses between a checkpoint and the run that goes on from it."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class ExactResume(Callback):
    """A validation that was still to come, an early end, folders that were moved, where an epoch stands on other processes."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Where validation follows the batch at whose end a checkpoint is written, lets the resumed run begin with it.

        Lightning would begin with the next batch. The state is that of a checkpoint from within validation.
        """
        loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher
        state = checkpoint["loops"]["fit_loop"]
        batches, validation = state["epoch_loop.batch_progress"], state["epoch_loop.val_loop.batch_progress"]
        at_end_of_batch = batches["total"]["completed"] == batches["total"]["processed"] - 1
        if at_end_of_batch and fetcher is not None and loop._should_check_val_fx(fetcher):
            for counted in (batches["total"], batches["current"]):
                counted["completed"] += 1
            done = validation["total"]["completed"]
            validation["total"].update(ready=done + 1, started=done + 1, processed=done)
            validation["current"].update(ready=0, started=0, processed=0, completed=0)
        else:
            checkpoint["should_stop"] = trainer.should_stop

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Ends what ``EarlyStopping`` has ended, and lets ``ModelCheckpoint`` go on where the run folder was moved.

        That keeps absolute paths, and forgets the best checkpoint and its score where they do not fit. Callbacks' states are
        loaded after this.
        """
        trainer.should_stop = checkpoint.get("should_stop", False)
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and state and state["dirpath"] != callback.dirpath:
                checkpoint["callbacks"][callback.state_key] = _moved(state, state["dirpath"], str(callback.dirpath))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts anew the batches that an epoch has had. Lightning counts in each process, of which there may be more or fewer now."""
        loop = trainer.fit_loop.epoch_loop
        counts: Any = loop.batch_progress.current
        if loop.restarting and counts.processed:
            taken = whole = int(trainer.num_training_batches)
            if not loop.batch_progress.is_last_batch:
                taken = min(whole, trainer.datamodule.taken)  # type: ignore[attr-defined]
            moved = taken - counts.processed
            for count, batches in vars(counts).items():
                setattr(counts, count, batches + moved)


def _moved(value: Any, before: str, after: str) -> Any:
    if isinstance(value, dict):
        return {_moved(key, before, after): _moved(inner, before, after) for key, inner in value.items()}
    if isinstance(value, str) and (value == before or value.startswith(before + os.sep)):
        return after + value[len(before) :]
    return value
