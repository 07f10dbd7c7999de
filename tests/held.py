"""A run that waits at a step, so that what a test does to it comes while it trains, however busy the machine is."""

import time
from contextlib import suppress
from pathlib import Path

from lightning import Callback

HOLD, HELD = "hold", "held"  # files in the run's working folder: where to wait, and that it does


class Held(Callback):
    """Waits at the step that the file ``hold`` names, until that is gone."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        step = f"{type(pl_module).__name__} {trainer.global_step}"
        with suppress(FileNotFoundError):
            while Path(HOLD).read_text() == step:
                Path(HELD).touch()
                time.sleep(0.01)


def hold(folder, stage, whole, draw):
    """Has the next run of a recipe with the callback wait at a drawn step of a stage; ``whole`` is one that has ended."""
    last = (whole / stage / "metrics.csv").read_text().splitlines()[-1]
    (folder / HELD).unlink(missing_ok=True)  # which the run before may have written while it was let go
    step = draw.randint(1, int(last.split(",")[0]) - 1)
    (folder / HOLD).write_text(f"{stage.capitalize()}Module {step}")


def until_held(folder):
    """A function that waits until the run does, or is no longer alive."""

    def wait(alive):
        while alive() and not (folder / HELD).exists():
            time.sleep(0.01)

    return wait


def let_go(folder):
    """Has a run that waits go on."""
    (folder / HOLD).rename(folder / "gone")  # at once for all its processes
    (folder / HELD).unlink(missing_ok=True)
