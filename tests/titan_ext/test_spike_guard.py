"""The guard accepts finite numbers within sigma of the last steps, and nothing else."""

import logging
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from titan_ext.training.spike_guard import MIN_HISTORY, WINDOW, NotFinite, SpikeGuard


def decide(guard: SpikeGuard, step: int, loss: float, grad_norm: float) -> bool:
    """Whether the guard skips a step."""
    skip = guard.decide(step, torch.tensor(loss, dtype=torch.float64), torch.tensor(grad_norm, dtype=torch.float64))
    assert skip.dtype == torch.float32 and skip.shape == () and skip in (0, 1)
    return bool(skip)


def steady(guard: SpikeGuard, steps: int, level: float = 2.0) -> None:
    torch.manual_seed(0)
    for step, noise in enumerate(torch.randn(steps).tolist()):
        assert not decide(guard, step, level + 0.01 * noise, 1.0 + 0.01 * noise)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sigma", [None, 6.0])
def test_numbers_that_are_not_finite_end_the_stage(bad, sigma):
    for numbers, message in (((bad, 1.0), r"step 7: loss (nan|-?inf)"), ((1.0, bad), r"step 7: loss 1\.0, gradient")):
        guard = SpikeGuard(sigma)
        assert not decide(guard, 6, 1.0, 1.0) and decide(guard, 7, *numbers)
        assert decide(guard, 8, 1.0, 1.0), "nothing is updated until the host has looked"
        with pytest.raises(NotFinite, match=message):
            guard.look()


def test_spikes_are_skipped_only_with_a_sigma_and_a_history(caplog):
    guard = SpikeGuard(6.0)
    assert not decide(guard, 0, 100.0, 1.0)
    guard = SpikeGuard(6.0)
    steady(guard, MIN_HISTORY)
    assert decide(guard, 40, 9.0, 1.0) and decide(guard, 41, 2.0, 9.0)
    with caplog.at_level(logging.WARNING, logger=logging.getLogger().name):
        logging.getLogger("torchtitan").propagate = True
        guard.look()
        guard.look()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == guard.num_skipped == 2, "each is told once"
    assert messages[0].startswith("step 40 is skipped: loss 9 is over 2.") and "gradient norm" not in messages[0]
    assert messages[1].startswith("step 41 is skipped: gradient norm 9 is over 1.") and "(6.0 sigma" in messages[1]
    never = SpikeGuard(None)
    steady(never, WINDOW)
    assert not decide(never, 200, 1e9, 1e9)


def test_a_lasting_change_of_level_is_accepted():
    guard = SpikeGuard(6.0)
    steady(guard, WINDOW)
    answers = [decide(guard, WINDOW + i, 4.0, 1.0) for i in range(WINDOW)]
    assert answers[0] and not answers[-1]


@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(0, 50)), max_size=2 * WINDOW + 9))
def test_a_step_is_skipped_if_python_says_so(steps):
    guard = SpikeGuard(2.0)
    for i, step in enumerate(steps):
        answer = decide(guard, i, *step)
        distances = [
            value - statistics.fmean(known) - 2.0 * statistics.stdev(known)
            for value, known in zip(step, zip(*steps[max(0, i - WINDOW) : i], strict=True), strict=False)
            if i >= MIN_HISTORY
        ]
        if all(abs(distance) > 1e-9 for distance in distances):
            assert answer == any(distance > 0 for distance in distances)


@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(0, 50)), max_size=2 * WINDOW + 9), st.integers(0, 300))
def test_a_resumed_guard_decides_as_one_never_stopped(steps, cut):
    whole, before = SpikeGuard(2.0), SpikeGuard(2.0)
    answers = [decide(whole, i, *step) for i, step in enumerate(steps)]
    first = [decide(before, i, *step) for i, step in enumerate(steps[:cut])]
    after = SpikeGuard(2.0)
    after.load_state_dict(before.state_dict())
    rest = [decide(after, i, *step) for i, step in enumerate(steps[cut:], len(first))]
    assert first + rest == answers
    assert after.num_skipped == whole.num_skipped
