"""How many requests an engine takes at once is learned from its refusals: literal times."""

from headway.core.concurrency_limit import FORGET_AFTER_S, ConcurrencyLimit


def after_a_burst():
    """Twelve requests went to an engine of four slots: eight come back, one after the other."""
    limit = ConcurrencyLimit()
    for in_flight in range(11, 3, -1):
        limit.refused(0.0, in_flight, None)
    return limit


def test_a_burst_shows_the_engines_slots():
    limit = after_a_burst()
    assert (limit.limit, limit.refusals) == (4, 8)
    assert (limit.allowed(0.01), limit.allowed(0.03)) == (0, 4)


def test_one_refusal_takes_at_most_half():
    limit = after_a_burst()
    limit.refused(1.0, 0, None)
    assert limit.limit == 2


def test_a_limit_that_binds_grows_faster_the_longer_it_goes_well_and_stops_at_a_refusal():
    limit = after_a_burst()
    grown = []
    for tenth in range(1, 85):
        limit.answered(tenth / 10, limit.limit)
        grown.append(limit.limit)
    assert (grown[18], grown[20], grown[41], grown[63], grown[83]) == (4, 5, 7, 11, 19)
    limit.refused(8.5, 10, None)
    limit.answered(10.6, 10)
    assert limit.limit == 11


def test_a_limit_that_does_not_bind_stays_and_is_dropped_in_the_end():
    limit = after_a_burst()
    limit.answered(100.0, 2)
    assert limit.limit == 4
    limit.answered(FORGET_AFTER_S, 2)
    assert limit.limit is None


def test_an_engine_full_of_others_work_is_left_alone_for_as_long_as_it_says():
    limit = ConcurrencyLimit()
    limit.refused(10.0, 0, 7.0)
    assert (limit.allowed(16.9), limit.resumes_s(16.9)) == (0, 17.0)
    assert (limit.allowed(17.0), limit.resumes_s(17.0)) == (1, None)
    limit.refused(20.0, 0, 1e9)
    assert limit.resumes_s(20.0) == 80.0
    limit.forget()
    assert limit.allowed(20.0) is None


def test_with_work_of_ours_there_its_end_makes_room_before_retry_after():
    limit = ConcurrencyLimit()
    limit.refused(10.0, 4, 60.0)
    assert limit.allowed(10.1) == 4
