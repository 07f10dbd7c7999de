"""A log of metrics as one CSV, which a resumed run goes on writing."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

HEADER = ["step", "metric", "value"]


class MetricsCSV(Logger):
    """Appends a row ``step,metric,value`` for every value logged.

    Lightning's own CSVLogger deletes the file of an earlier start and rewrites it whenever a new column appears; the long
    form needs neither.

    Args:
        file: made with its folder at the first value.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    @property
    def name(self) -> str:
        """The file's name."""
        return self.file.stem

    @property
    def version(self) -> str:
        """Empty: the place is fixed."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The recipe is kept elsewhere."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends the values."""
        new = not self.file.exists()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", newline="") as stream:
            writer = csv.writer(stream)
            if new:
                writer.writerow(HEADER)
            writer.writerows([step, name, value] for name, value in metrics.items() if name != "epoch")

    @property
    def size(self) -> int:
        """Bytes that are in the file, which are on the disk when this returns."""
        if not self.file.exists():
            return 0
        with self.file.open("rb+") as stream:
            os.fsync(stream.fileno())
            return os.fstat(stream.fileno()).st_size

    @rank_zero_only
    def cut(self, size: int) -> None:
        """Drops what a killed run wrote after its first ``size`` bytes, since it will be written again."""
        if size == 0:
            self.file.unlink(missing_ok=True)
        elif self.file.exists() and self.file.stat().st_size > size:
            os.truncate(self.file, size)


class KeepLog(Callback):
    """Notes in every checkpoint how far the log goes, and goes on writing there: no row is missing or doubled.

    Args:
        metrics: of this stage.
    """

    def __init__(self, metrics: MetricsCSV) -> None:
        self.metrics = metrics

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"size": self.metrics.size}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Drops what was written after the checkpoint."""
        self.metrics.cut(state_dict["size"])
