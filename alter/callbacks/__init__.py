"""Loggers and callbacks of a run."""

from alter.callbacks.exact_resume import ExactResume
from alter.callbacks.inside import Inside
from alter.callbacks.interruption import Interruption
from alter.callbacks.metrics_csv import KeepLog, MetricsCSV
from alter.callbacks.preemption import Preemption
from alter.callbacks.progress import StageProgress
from alter.callbacks.task_metrics import TaskMetrics
from alter.callbacks.throughput import Throughput

__all__ = [
    "ExactResume",
    "Inside",
    "Interruption",
    "KeepLog",
    "MetricsCSV",
    "Preemption",
    "StageProgress",
    "TaskMetrics",
    "Throughput",
]
