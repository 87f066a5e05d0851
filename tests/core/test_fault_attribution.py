"""Whose fault a failed request is: the engine's, the request's or this host's."""

import pytest

from headway.core.events import Role
from headway.core.fault_attribution import EngineFailure, Fault, RequestFaults, Verdict

GIVE_UP, AGAIN, AGAIN_ON_BUDGET = Verdict(), Verdict(retry=True), Verdict(retry=True, costs_budget=True)


def engine(name, role=Role.AGGREGATED):
    return EngineFailure(name, role, f"{name} failed")


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.BROKEN])
def test_what_two_engines_fail_is_the_requests_fault_and_ends_there(fault):
    faults = RequestFaults(retries=5)
    assert faults.failed(fault, engine("a")).retry
    verdict = faults.failed(fault, engine("b"))
    assert not verdict.retry and set(verdict.exonerated) == {engine("a"), engine("b")}
    assert faults.ended() == ((), ())


def test_what_another_engine_serves_is_the_fault_of_the_first():
    faults = RequestFaults(retries=2)
    assert faults.failed(Fault.ERROR, engine("a")) == AGAIN_ON_BUDGET
    assert faults.served() == (engine("a"),)
    assert faults.ended() == ((), ()) and faults.served() == ()


def test_an_engine_that_lately_failed_everything_proves_nothing_and_a_third_is_asked():
    faults = RequestFaults(retries=2)
    faults.failed(Fault.ERROR, engine("a"), credible=False)
    assert faults.failed(Fault.ERROR, engine("b"), credible=False) == AGAIN_ON_BUDGET
    assert set(faults.served()) == {engine("a"), engine("b")}
    faults = RequestFaults(retries=9)
    for name in "ab":
        faults.failed(Fault.ERROR, engine(name), credible=False)
    assert len(faults.failed(Fault.ERROR, engine("c"), credible=False).exonerated) == 3


def test_a_request_counts_once_against_an_engine_however_often_it_failed_there():
    faults = RequestFaults(retries=2)
    for _ in range(3):
        faults.failed(Fault.BROKEN, engine("a"))
    assert faults.ended() == ((engine("a"),), ())


def test_failures_of_a_prefill_and_of_a_decode_engine_do_not_explain_each_other():
    faults = RequestFaults(retries=3)
    faults.failed(Fault.ERROR, engine("p", Role.PREFILL))
    assert faults.failed(Fault.ERROR, engine("d", Role.DECODE)).retry
    assert faults.tried(Role.DECODE) == {"d"}
    alone, exonerated = faults.ended()
    assert {each.engine for each in alone} == {"p", "d"} and exonerated == ()


def test_an_error_is_not_asked_of_the_same_engine_again():
    assert RequestFaults(retries=2).failed(Fault.ERROR, engine("a"), elsewhere=False).retry is False


def test_the_twelfth_refusal_by_one_engine_is_the_answer():
    faults = RequestFaults(retries=1)
    verdicts = [faults.failed(Fault.BACKPRESSURE, engine("a")) for _ in range(12)]
    assert [each.hold for each in verdicts] == [True] * 11 + [False]
    assert not verdicts[-1].retry and sum(each.wait_s for each in verdicts) == pytest.approx(13.1)


def test_backpressure_is_no_try_and_costs_no_budget():
    faults = RequestFaults(retries=1)
    verdicts = [faults.failed(Fault.BACKPRESSURE, engine(name)) for name in "abcde" for _ in range(11)]
    assert all(each.retry and each.hold and not each.costs_budget for each in verdicts)
    assert faults.attempts == 0
    assert faults.ended() == ((), ())
    assert RequestFaults(retries=0).failed(Fault.BACKPRESSURE, engine("a")).retry is False


@pytest.mark.parametrize(
    ("fault", "streams", "expected"),
    [
        (Fault.UNREACHABLE, True, AGAIN),
        (Fault.DOWN, False, AGAIN),
        (Fault.OURS, False, AGAIN),
        (Fault.SILENT, True, AGAIN),
        (Fault.SILENT, False, False),
        (Fault.SLOW, True, False),
        (Fault.SLOW, False, False),
    ],
)
def test_what_an_engine_worked_on_for_long_is_not_computed_again(fault, streams, expected):
    verdict = RequestFaults(retries=2).failed(fault, engine("a"), streams=streams)
    assert verdict == expected if expected else not verdict.retry


def test_nothing_is_tried_again_once_the_client_has_a_byte_or_the_tries_are_used_up():
    assert not RequestFaults(retries=2).failed(Fault.BROKEN, engine("a"), begun=True).retry
    faults = RequestFaults(retries=1)
    assert [faults.failed(Fault.UNREACHABLE, engine("a")).retry for _ in range(2)] == [True, False]


def test_a_request_that_an_engine_refuses_again_and_again_waits_longer_each_time():
    faults = RequestFaults(retries=1)
    waits = [faults.failed(Fault.BACKPRESSURE, engine("a")).wait_s for _ in range(8)]
    assert waits == [0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert faults.failed(Fault.BACKPRESSURE, engine("b")).wait_s == 0.0
