"""The longest lag of the event loop in the last minute, by a clock of the test."""

from headway.front.loop_lag import LoopLag


def test_the_longest_lag_of_the_last_minute_is_kept_however_often_it_is_read():
    lag = LoopLag(100.0)
    lag.note(101.0, 0.2)
    lag.note(102.0, 4.3)
    lag.note(103.0, 0.1)
    assert [lag.longest_s(now) for now in (103.0, 103.0, 162.0)] == [4.3, 4.3, 4.3]
    lag.note(163.0, 0.3)
    assert lag.longest_s(165.0) == 0.3  # the slot of 100 to 105 is more than a minute old


def test_a_loop_that_is_never_late_has_no_lag():
    lag = LoopLag(0.0)
    assert lag.longest_s(0.0) == 0.0
    lag.note(1.0, 0.0)
    assert (lag.longest_s(1e6), lag.stalls) == (0.0, 0)


def test_lags_longer_than_50_ms_count_as_stalls():
    lag = LoopLag(0.0)
    for at_s, lag_s in ((1.0, 0.049), (2.0, 0.051), (3.0, 2.0)):
        lag.note(at_s, lag_s)
    assert lag.stalls == 2
