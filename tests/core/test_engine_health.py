"""When an engine is ejected, is down and returns: literal times, no engine."""

from itertools import product

import pytest

from headway.core.engine_health import (
    FORGIVEN_S,
    TRANSITIONS,
    EngineHealth,
    EngineState,
    HealthRules,
    OutcomeRate,
    Signal,
    is_outlier,
)

NOBODY, CLEAN, MIXED = OutcomeRate(), OutcomeRate(served=50), OutcomeRate(served=30, failed=20)


def engine_that_is_up(**rules):
    health = EngineHealth(HealthRules(**rules), now=0.0)
    assert health.check_passed(0.0)
    health.admit(0.0)
    return health


def test_every_pair_of_state_and_signal_moves_or_stays():
    for state, signal in product(EngineState, Signal):
        new = TRANSITIONS.get((state, signal))
        assert new is None or new is not state
    assert EngineState.STARTING not in TRANSITIONS.values()


def test_three_failures_that_others_serve_eject_and_a_success_between_starts_anew():
    health = engine_that_is_up()
    assert [health.failed(t, "500", last=False) for t in (1.0, 2.0)] == [None, None]
    health.served(3.0)
    assert [health.failed(t, "500", last=False) for t in (4.0, 5.0)] == [None, None]
    change = health.failed(6.0, "500", last=False)
    assert (change.old, change.new, change.reason) == (EngineState.UP, EngineState.EJECTED, "500")


def test_after_a_return_one_more_failure_ejects_again_until_it_serves():
    health = engine_that_is_up()
    for t in (1.0, 2.0, 3.0):
        health.failed(t, "500", last=False)
    assert health.check_passed(4.0) and health.admit(4.0)
    assert health.failed(5.0, "500", last=False).new is EngineState.EJECTED
    assert not health.check_passed(6.0)  # twice as many checks now
    assert health.check_passed(7.0) and health.admit(7.0)
    health.served(8.0)
    assert health.failed(9.0, "500", last=False) is None


def test_the_last_engine_of_a_role_is_not_ejected_for_its_answers_but_for_refusing_connections():
    health = engine_that_is_up()
    assert [health.failed(float(t), "500", last=True) for t in range(10)] == [None] * 10
    assert [health.failed_alone(float(t), "500", others=NOBODY, last=True) for t in range(10)] == [None] * 10
    assert health.unreachable(11.0, "refused").new is EngineState.EJECTED
    assert health.check_failed(11.2, "refused", unreachable=True).new is EngineState.DOWN


def test_failures_nobody_else_tried_eject_only_where_others_do_not_fail_alike():
    assert next(k for k in range(1, 12) if is_outlier(k, CLEAN)) == 3
    assert next(k for k in range(1, 20) if is_outlier(k, MIXED)) == 13
    assert next(k for k in range(1, 30) if is_outlier(k, NOBODY)) == 17
    health = engine_that_is_up()
    changes = [health.failed_alone(float(t), "500", others=CLEAN, last=False) for t in range(3)]
    assert [change is not None for change in changes] == [False, False, True]


def test_requests_that_fail_everywhere_count_against_no_engine_but_make_it_less_credible():
    health = engine_that_is_up()
    for _ in range(3):
        assert health.credible
        health.exonerated()
    assert not health.credible and health.failures == 0 and health.state is EngineState.UP
    health.served(1.0)
    assert health.credible


def test_a_breaker_that_counts_consecutively_ejects_the_last_engine_and_keeps_it_out_for_its_time():
    health = engine_that_is_up(consecutive=True, eject_for_s=3.0)
    changes = [health.failed_alone(float(t), "500", others=NOBODY, last=True) for t in (1, 2, 3)]
    assert changes[:2] == [None, None] and changes[2].new is EngineState.EJECTED
    assert not health.check_passed(5.9)
    assert health.check_passed(6.0) and health.admit(6.0)
    assert health.failed_alone(7.0, "500", others=NOBODY, last=True).new is EngineState.EJECTED


def test_without_a_breaker_no_answer_ejects_and_health_checks_still_do():
    health = engine_that_is_up(eject_after=0, down_after=2)
    assert [health.failed(float(t), "500", last=False) for t in range(9)] == [None] * 9
    assert health.check_failed(10.0, "404", unreachable=False) is None
    assert health.check_failed(11.0, "404", unreachable=False).new is EngineState.DOWN


@pytest.mark.parametrize("ejections", [1, 2, 3, 8])
def test_each_ejection_doubles_the_checks_of_a_return_up_to_the_most(ejections):
    health = engine_that_is_up(return_most=16)
    for _ in range(ejections):
        health.unreachable(1.0, "refused")
        checks = 1
        while not health.check_passed(1.0):
            checks += 1
        health.admit(1.0)
    assert checks == min(16, 2 ** (ejections - 1))
    health.check_passed(1.0 + FORGIVEN_S + 0.1)
    assert health.ejections == 0


def test_an_engine_that_announced_its_end_returns_only_when_it_was_away_or_in_a_new_epoch():
    for ends in (lambda h: h.reached_end(), lambda h: h.check_failed(3.0, "refused", unreachable=True)):
        health = engine_that_is_up()
        assert health.drains(1.0, "it drains").new is EngineState.EJECTED
        assert not any(health.check_passed(2.0 + n) for n in range(40))
        ends(health)
        assert health.check_passed(50.0)
    assert engine_that_is_up().left(1.0, "bye").new is EngineState.DOWN


def test_why_an_engine_never_came_up_is_reported_first_at_each_change_and_every_minute():
    health = EngineHealth(HealthRules(), now=0.0)
    reported = []
    for t in range(0, 200, 2):
        health.check_failed(float(t), "refused" if t < 30 else "404", unreachable=t < 30)
        if health.report_due(float(t)):
            reported.append((t, health.reason))
    assert reported == [(0, "refused"), (6, "refused"), (30, "404"), (36, "404"), (96, "404"), (156, "404")]
    assert health.state is EngineState.STARTING
    assert health.check_passed(200.0) and health.admit(200.0) and not health.report_due(200.0)


def test_an_engine_that_answers_nothing_at_all_is_ejected_also_when_it_is_the_last():
    health = engine_that_is_up()
    assert [health.silent(t, "silent") is not None for t in (1.0, 2.0, 3.0)] == [False, False, True]
