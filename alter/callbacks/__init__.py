"""Loggers and callbacks of a run."""

from alter.callbacks.metrics_csv import MetricsCSV
from alter.callbacks.task_metrics import TaskMetrics
from alter.callbacks.throughput import Throughput

__all__ = ["MetricsCSV", "TaskMetrics", "Throughput"]
