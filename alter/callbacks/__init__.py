"""Loggers and callbacks of a run."""

from alter.callbacks.metrics_csv import MetricsCSV

__all__ = ["MetricsCSV"]
