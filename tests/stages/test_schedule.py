"""The course of a learning rate, against transformers'."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from alter.stages.schedule import make_scheduler

THEIRS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def rates(make, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("schedule", THEIRS)
@given(steps=st.integers(1, 60), warmup=st.floats(0, 1))
def test_is_transformers_schedule(schedule, steps, warmup):
    ours = rates(lambda o: make_scheduler(o, schedule, warmup, steps), steps)
    theirs = rates(lambda o: get_scheduler(THEIRS[schedule], o, round(warmup * steps), steps), steps)
    assert ours == pytest.approx(theirs, abs=1e-12)


def test_constant_warms_up():
    assert rates(lambda o: make_scheduler(o, "constant", 0.5, 8), 8) == pytest.approx(
        [0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5]
    )


def test_resumes_where_it_was():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(optimizer, "linear", 0.0, 4)
    optimizer.step()
    scheduler.step()
    again = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    resumed = make_scheduler(again, "linear", 0.0, 4)
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    again.step()
    resumed.step()
    assert again.param_groups[0]["lr"] == pytest.approx(0.5)
