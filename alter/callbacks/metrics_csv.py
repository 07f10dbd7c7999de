"""A log of metrics as one CSV, which a resumed run goes on writing."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

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
        """None: the place is fixed."""
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

    @rank_zero_only
    def forget_after(self, step: int) -> None:
        """Drops the rows that a killed run wrote after its last checkpoint, since they will be written again."""
        if not self.file.exists():
            return
        with self.file.open(newline="") as stream:
            rows = list(csv.reader(stream))
        kept = [row for row in rows if len(row) == 3 and row[0].isdigit() and int(row[0]) < step]
        beside = self.file.with_suffix(".csv.new")
        with beside.open("w", newline="") as stream:
            csv.writer(stream).writerows([HEADER, *kept])
        beside.replace(self.file)
