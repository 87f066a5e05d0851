"""Thousands of engines are checked a few at a time, and less often than a few are."""

from headway.front.config import FrontConfig, InstanceSpec
from headway.front.pacing import Pacer
from headway.front.workers import CHECKS_PER_S, Workers


def test_what_comes_at_once_beyond_the_burst_is_spread_at_the_rate():
    pacer = Pacer(per_s=10.0, burst=3, clock=lambda: 0.0)
    delays = [round(pacer.delay_s(), 3) for _ in range(6)]
    assert delays == [0.0, 0.0, 0.0, 0.1, 0.2, 0.3]


def test_a_rest_earns_the_burst_and_no_more():
    now = [0.0]
    pacer = Pacer(per_s=10.0, burst=2, clock=lambda: now[0])
    for _ in range(2):
        assert pacer.delay_s() == 0.0
    now[0] = 100.0
    assert [round(pacer.delay_s(), 3) for _ in range(4)] == [0.0, 0.0, 0.1, 0.2]


def test_the_time_between_checks_grows_where_there_are_thousands_of_engines():
    config = FrontConfig.parse({"health": {"interval_s": 2.0}})
    workers = Workers(config, None, lambda event: None, clock=lambda: 0.0, call_at=lambda *_: None)
    for number in range(10):
        workers._create(InstanceSpec(name=f"e{number}", url=f"http://10.0.0.{number}"))
    assert workers._interval_s() == 2.0
    for number in range(5000):
        workers._create(InstanceSpec(name=f"m{number}", url=f"http://10.1.{number // 250}.{number % 250}"))
    assert workers._interval_s() == 5010 / CHECKS_PER_S
