"""What the guard lets pass: finite numbers within sigma of the last steps, and nothing else."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from titan_ext.training.spike_guard import MIN_HISTORY, WINDOW, UpdateGuard


def steady(guard: UpdateGuard, steps: int, level: float = 2.0) -> None:
    torch.manual_seed(0)
    for step, noise in enumerate(torch.randn(steps).tolist()):
        assert guard.admit(step, level + 0.01 * noise, 1.0 + 0.01 * noise) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sigma", [None, 6.0])
def test_numbers_that_are_not_finite_end_the_stage(bad, sigma):
    with pytest.raises(RuntimeError, match=r"step 7: loss (nan|-?inf)"):
        UpdateGuard(sigma).admit(7, bad, 1.0)
    with pytest.raises(RuntimeError, match=r"step 7: loss 1\.0, gradient norm"):
        UpdateGuard(sigma).admit(7, 1.0, bad)


def test_spikes_are_skipped_only_with_a_sigma_and_a_history():
    guard = UpdateGuard(6.0)
    assert guard.admit(0, 100.0, 1.0) is None
    guard = UpdateGuard(6.0)
    steady(guard, MIN_HISTORY)
    assert "loss 9 is over" in guard.admit(40, 9.0, 1.0)
    assert "gradient norm 9 is over" in guard.admit(41, 2.0, 9.0)
    assert guard.num_skipped == 2
    never = UpdateGuard(None)
    steady(never, WINDOW)
    assert never.admit(200, 1e9, 1e9) is None


def test_a_lasting_change_of_level_is_accepted():
    guard = UpdateGuard(6.0)
    steady(guard, WINDOW)
    answers = [guard.admit(WINDOW + i, 4.0, 1.0) for i in range(WINDOW)]
    assert answers[0] is not None and answers[-1] is None


@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(0, 50)), max_size=2 * WINDOW + 9), st.integers(0, 300))
def test_a_resumed_guard_decides_as_one_never_stopped(steps, cut):
    whole, before = UpdateGuard(2.0), UpdateGuard(2.0)
    answers = [whole.admit(i, *step) for i, step in enumerate(steps)]
    first = [before.admit(i, *step) for i, step in enumerate(steps[:cut])]
    after = UpdateGuard(2.0)
    after.load_state_dict(before.state_dict())
    rest = [after.admit(i, *step) for i, step in enumerate(steps[cut:], len(first))]
    assert first + rest == answers
    assert after.num_skipped == whole.num_skipped
