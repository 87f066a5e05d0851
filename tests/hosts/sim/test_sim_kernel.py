"""The kernel: order within and between instants, and how a run ends."""

import math

import pytest

from headway.core.errors import InvariantError
from headway.hosts.sim.kernel import ARRIVAL, DELIVERY, FAULT, PASS_END, REPORT, START, TIMER, Kernel


def test_events_happen_in_order_of_time_then_kind_then_sequence():
    kernel, seen = Kernel(), []
    note = lambda now, name: seen.append((now, name))  # noqa: E731
    kernel.at(2.0, ARRIVAL, note, "later")
    kernel.at(1.0, TIMER, note, "timer")
    kernel.at(1.0, START, note, "start")
    kernel.at(1.0, REPORT, note, "report")
    kernel.at(1.0, DELIVERY, note, "first delivery")
    kernel.at(1.0, DELIVERY, note, "second delivery")
    kernel.at(1.0, PASS_END, note, "pass end")
    kernel.at(1.0, FAULT, note, "fault")
    kernel.run()
    assert [name for _, name in seen] == [
        "fault", "pass end", "first delivery", "second delivery", "report", "start", "timer", "later"
    ]  # fmt: skip
    assert kernel.now == 2.0


def test_what_is_delivered_at_an_instant_comes_before_the_engine_starts_at_it():
    kernel, seen = Kernel(), []
    kernel.at(1.0, START, lambda now: seen.append("start"))
    kernel.at(1.0, REPORT, lambda now: kernel.at(now, DELIVERY, lambda _: seen.append("delivered")))
    kernel.run()
    assert seen == ["delivered", "start"]


def test_stop_lets_the_instant_end():
    kernel, seen = Kernel(), []
    kernel.at(1.0, REPORT, lambda now: kernel.stop())
    kernel.at(1.0, TIMER, lambda now: seen.append("same instant"))
    kernel.at(1.5, TIMER, lambda now: seen.append("later"))
    kernel.run()
    assert seen == ["same instant"]
    assert kernel.pending(TIMER) and not kernel.pending(ARRIVAL, PASS_END)


@pytest.mark.parametrize("time_s", [0.5, math.nan])
def test_the_past_and_no_time_at_all_are_refused(time_s):
    kernel = Kernel()
    kernel.at(1.0, REPORT, lambda now: kernel.at(time_s, REPORT, print))
    with pytest.raises(InvariantError, match=r"when it is 1\.0 s already"):
        kernel.run()
