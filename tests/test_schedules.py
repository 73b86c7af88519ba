"""Warm-up and cosine against the formula, step by step."""

import math

import pytest
import torch

from vidtwin.errors import UserError
from vidtwin.schedules import WarmupCosine

PEAK = 2e-4


def schedule(**arguments):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    return optimizer, WarmupCosine(optimizer, **arguments)


def rates(optimizer, scheduler, steps):
    """The rate that each step is made with."""
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.0), (2 / 3, 0.0), (0.1, 0.25)])
def test_rates_rise_linearly_and_fall_by_half_a_cosine(start, end):
    optimizer, scheduler = schedule(warmup_steps=5, total_steps=25, start_factor=start, end_factor=end)
    expected = [PEAK * (start + (1 - start) * step / 5) for step in range(5)]
    expected += [PEAK * (end + (1 - end) * math.cos(math.pi * k / 40) ** 2) for k in range(20)]
    assert rates(optimizer, scheduler, 25) == pytest.approx(expected)


def test_the_rate_stays_at_the_end_value_after_the_last_step():
    optimizer, scheduler = schedule(warmup_steps=1, total_steps=4, end_factor=0.1)
    assert rates(optimizer, scheduler, 8)[4:] == pytest.approx([0.1 * PEAK] * 4)


def test_without_warmup_the_first_step_has_the_peak_rate():
    optimizer, scheduler = schedule(warmup_steps=0, total_steps=10)
    assert rates(optimizer, scheduler, 1) == [PEAK]


def test_each_parameter_group_keeps_its_own_peak():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1.0, 10.0)]
    optimizer = torch.optim.SGD(groups)
    scheduler = WarmupCosine(optimizer, warmup_steps=2, total_steps=10)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 5.0]


def test_total_steps_are_the_trainers_unless_the_config_sets_them():
    left_open, fixed = schedule(warmup_steps=5), schedule(warmup_steps=5, total_steps=25)
    left_open[1].set_total_steps(25)
    fixed[1].set_total_steps(1000)
    assert rates(*left_open, 25) == rates(*fixed, 25)


@pytest.mark.parametrize("total", [-1, 4, 5])
def test_a_warmup_that_does_not_end_before_the_training_is_refused(total):
    with pytest.raises(UserError) as error:
        schedule(warmup_steps=5)[1].set_total_steps(total)
    assert str(error.value) == (
        f"Expected a warm-up shorter than the training, got warmup_steps=5 and {total} steps; "
        "lower --model.scheduler.warmup_steps (with a GAN --model.discriminator_scheduler.warmup_steps too), or raise "
        "trainer.max_steps."
    )


def test_a_resumed_run_continues_the_schedule():
    whole = rates(*schedule(warmup_steps=3, total_steps=12), 12)
    optimizer, scheduler = schedule(warmup_steps=3, total_steps=12)
    first = rates(optimizer, scheduler, 7)
    state = optimizer.state_dict(), scheduler.state_dict()
    optimizer, scheduler = schedule(warmup_steps=3, total_steps=12)
    optimizer.load_state_dict(state[0])
    scheduler.load_state_dict(state[1])
    assert first + rates(optimizer, scheduler, 5) == pytest.approx(whole)


def test_a_run_resumed_with_more_steps_ends_its_cosine_there():
    optimizer, scheduler = schedule(warmup_steps=2)
    scheduler.set_total_steps(10)
    rates(optimizer, scheduler, 10)
    state = scheduler.state_dict()
    optimizer, scheduler = schedule(warmup_steps=2)
    scheduler.set_total_steps(18)
    scheduler.load_state_dict(state)
    assert scheduler.get_lr() == pytest.approx([PEAK / 2])  # the middle of 2..18
