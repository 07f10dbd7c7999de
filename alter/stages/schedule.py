"""The course of a learning rate."""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["constant", "linear", "cosine"]


def make_scheduler(optimizer: Optimizer, schedule: Schedule, warmup: float, steps: int) -> LambdaLR:
    """Multiplies the optimizer's learning rates: from 0 up to 1 in the warm-up, then as the schedule says, to 0 at the end.

    transformers has the same, but to import it brings its Trainer and what that needs, and its ``constant`` has no warm-up.

    Args:
        optimizer: whose rates they are.
        schedule: after the warm-up; ``constant`` stays at 1.
        warmup: share of the steps over which the rate rises.
        steps: in all.
    """
    rising = round(warmup * steps)

    def factor(step: int) -> float:
        if step < rising:
            return step / rising
        if schedule == "constant":
            return 1.0
        passed = min(1.0, (step - rising) / max(1, steps - rising))
        return 1.0 - passed if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * passed))

    return LambdaLR(optimizer, factor)
