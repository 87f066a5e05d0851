"""The worst lateness is what a look at every token would find."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.model.lateness import PeakLateness

TPOT_S = 0.05
durations = st.lists(st.floats(0.001, 0.2), min_size=1, max_size=60)


def test_nothing_since_the_last_pass_is_minus_infinity():
    peaks = PeakLateness(TPOT_S)
    peaks.push(1, 0.1)
    assert peaks.since(1) == float("-inf")


def test_slow_pass_then_fast_ones_keep_the_slow_ones_peak():
    peaks = PeakLateness(TPOT_S)
    for clock, end_s in enumerate([0.04, 0.20, 0.22, 0.24], start=1):
        peaks.push(clock, end_s)
    assert peaks.since(0) == pytest.approx(0.20 - 2 * TPOT_S)
    assert peaks.since(2) == pytest.approx(0.22 - 3 * TPOT_S)


@given(durations, st.data())
def test_equals_brute_force(durations, data):
    peaks, ends, now = PeakLateness(TPOT_S), {}, 0.0
    for clock, duration in enumerate(durations, start=1):
        now += duration
        ends[clock] = now
        peaks.push(clock, now)
        since = data.draw(st.integers(0, clock - 1))
        assert peaks.since(since) == max(end - s * TPOT_S for s, end in ends.items() if s > since)


@given(durations, st.data())
def test_forgetting_the_past_changes_no_later_answer(durations, data):
    kept, pruned = PeakLateness(TPOT_S), PeakLateness(TPOT_S)
    for clock, end_s in enumerate(durations, start=1):
        kept.push(clock, end_s)
        pruned.push(clock, end_s)
    cut = data.draw(st.integers(0, len(durations)))
    pruned.forget(cut)
    for since in range(cut, len(durations) + 1):
        assert pruned.since(since) == kept.since(since)


def test_steady_passes_within_tpot_are_pruned_to_what_is_asked_for():
    peaks = PeakLateness(TPOT_S)
    for clock in range(1, 1001):
        peaks.push(clock, clock * 0.03)
    assert len(peaks) == 1000
    peaks.forget(990)
    assert len(peaks) == 10
