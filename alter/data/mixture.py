"""How often each task is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from alter.errors import AlterError


def mixture_rates(
    sizes: Sequence[int], temperature: float = 1.0, cap: int | None = None, weights: Sequence[float] | None = None
) -> np.ndarray:
    """Returns each task's share of the draws, ``rate_m ~ weight_m * min(n_m, K) ** (1 / T)``.

    Source: Raffel et al., arXiv 1910.10683, section 3.5.2.

    Args:
        sizes: training rows n of each task.
        temperature: T; 1 is proportional to size, large is equal.
        cap: K, the size above which a task counts as no larger; None for no cap.
        weights: of each task, all 1 by default.

    Returns:
        [tasks], summing to one.

    Raises:
        AlterError: the temperature or the cap is not above 0, or too near to it, or a task is empty.
    """
    if problems := list(rate_problems(temperature, cap)):
        raise AlterError(*problems)
    if not len(sizes) or min(sizes) < 1:
        raise AlterError("data.tasks: a task has no training rows; give every task some.")
    counted = np.minimum(np.asarray(sizes, dtype=float), np.inf if cap is None else cap)
    rates = counted ** (1 / temperature) * (1.0 if weights is None else np.asarray(weights, dtype=float))
    if not (np.isfinite(rates).all() and 0 < rates.sum() < np.inf):
        raise AlterError(
            f"data.temperature: {temperature} is too near to 0 for tasks of these sizes; give a larger one."
        )
    return rates / rates.sum()


def rate_problems(temperature: float, cap: int | None) -> Iterator[str]:
    """What is wrong with the two numbers of the rates."""
    if not temperature > 0:
        yield f"data.temperature: {temperature} is not above 0; 1 is proportional, larger is more equal."
    if cap is not None and cap < 1:
        yield f"data.cap: {cap} is below 1; give a number of rows or leave it out."
