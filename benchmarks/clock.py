"""When each step of a training ended, for `alter fit` to take in as a callback by its name."""

import time

import torch
from lightning import Callback

ends = []


class Clock(Callback):
    """Notes the ends of steps."""

    def on_train_batch_end(self, *_, **__):
        """After a step, once the GPU has done it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
