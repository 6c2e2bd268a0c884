"""The learning rate of every step, against the schedule written out here."""

import dataclasses
import math

import pytest
import torch

from titan_ext.training.schedules import tiny_stages
from titan_ext.training.trainer_config import schedule_config


def read_rates(stage):
    """Return the learning rate of every step as a share of its height, from torchtitan's scheduler."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedulers = schedule_config(stage).build(optimizers=[optimizer], training_steps=stage.steps)
    rates = []
    for _ in range(stage.steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedulers.step()
    return rates


def write_out(stage):
    """Return the same by hand: warm-up, plateau, decay to `min_lr_factor`, counting steps from 1."""
    decay = round(stage.steps * stage.decay_fraction) if stage.decay_fraction < 1 else stage.steps - stage.warmup_steps
    rates = []
    for step in range(1, stage.steps + 1):
        if step <= stage.warmup_steps:
            rates.append(step / stage.warmup_steps)
            continue
        done = max(0, step - 1 - (stage.steps - decay)) / decay
        share = 1 - done if stage.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        rates.append(stage.min_lr_factor + (1 - stage.min_lr_factor) * share)
    return rates


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("decay_fraction", [0.1, 0.2, 0.5, 1.0])
def test_the_rate_rises_stays_and_falls(schedule, decay_fraction):
    stage = dataclasses.replace(
        tiny_stages()["pretrain"], steps=40, warmup_steps=5, schedule=schedule, decay_fraction=decay_fraction
    )
    rates = read_rates(stage)
    plateau = [rate for rate in rates[5:] if rate == 1.0]
    assert len(plateau) >= 40 - 5 - round(40 * decay_fraction)
    assert rates[:5] == sorted(rates[:5]) and rates[5:] == sorted(rates[5:], reverse=True)
    assert rates == pytest.approx(write_out(stage), abs=1e-6)
