"""The guard accepts finite numbers within sigma of the last steps, and nothing else."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from titan_ext.training.spike_guard import MIN_HISTORY, WINDOW, SpikeGuard


def steady(guard: SpikeGuard, steps: int, level: float = 2.0) -> None:
    torch.manual_seed(0)
    for step, noise in enumerate(torch.randn(steps).tolist()):
        assert guard.check_update(step, level + 0.01 * noise, 1.0 + 0.01 * noise) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sigma", [None, 6.0])
def test_numbers_that_are_not_finite_end_the_stage(bad, sigma):
    with pytest.raises(RuntimeError, match=r"step 7: loss (nan|-?inf)"):
        SpikeGuard(sigma).check_update(7, bad, 1.0)
    with pytest.raises(RuntimeError, match=r"step 7: loss 1\.0, gradient norm"):
        SpikeGuard(sigma).check_update(7, 1.0, bad)


def test_spikes_are_skipped_only_with_a_sigma_and_a_history():
    guard = SpikeGuard(6.0)
    assert guard.check_update(0, 100.0, 1.0) is None
    guard = SpikeGuard(6.0)
    steady(guard, MIN_HISTORY)
    assert "loss 9 is over" in guard.check_update(40, 9.0, 1.0)
    assert "gradient norm 9 is over" in guard.check_update(41, 2.0, 9.0)
    assert guard.num_skipped == 2
    never = SpikeGuard(None)
    steady(never, WINDOW)
    assert never.check_update(200, 1e9, 1e9) is None


def test_a_lasting_change_of_level_is_accepted():
    guard = SpikeGuard(6.0)
    steady(guard, WINDOW)
    answers = [guard.check_update(WINDOW + i, 4.0, 1.0) for i in range(WINDOW)]
    assert answers[0] is not None and answers[-1] is None


@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(0, 50)), max_size=2 * WINDOW + 9), st.integers(0, 300))
def test_a_resumed_guard_decides_as_one_never_stopped(steps, cut):
    whole, before = SpikeGuard(2.0), SpikeGuard(2.0)
    answers = [whole.check_update(i, *step) for i, step in enumerate(steps)]
    first = [before.check_update(i, *step) for i, step in enumerate(steps[:cut])]
    after = SpikeGuard(2.0)
    after.load_state_dict(before.state_dict())
    rest = [after.check_update(i, *step) for i, step in enumerate(steps[cut:], len(first))]
    assert first + rest == answers
    assert after.num_skipped == whole.num_skipped
