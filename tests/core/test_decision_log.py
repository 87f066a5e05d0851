"""One line of JSON per action; equal inputs give equal bytes."""

import json

from headway.core.actions import Dispatch, Poll, Recall, Reject
from headway.core.decision_log import DecisionLog, encode
from headway.core.events import Arrived, TimerFired
from headway.core.request import Request

ARRIVAL = Arrived(Request("r7", 12.25, 100))


def test_a_dispatch():
    assert encode(12.25, ARRIVAL, Dispatch("r7", "prefill-0", 3, 41, "slot")) == (
        '{"at":12.25,"on":"Arrived","do":"Dispatch","request_id":"r7","instance":"prefill-0","rank":3,"number":41,'
        '"why":"slot"}'
    )


def test_every_action_says_when_on_what_and_what():
    for action in (Dispatch("r7", "e", 0, 1), Reject("r7", "full", 1.0), Recall("r7", "e"), Poll("e")):
        record = json.loads(encode(1.0, TimerFired(), action))
        assert list(record)[:3] == ["at", "on", "do"]
        assert (record["at"], record["on"], record["do"]) == (1.0, "TimerFired", type(action).__name__)


def test_times_are_rounded_to_the_microsecond():
    record = json.loads(encode(0.1 + 0.2, TimerFired(), Reject("r7", "backlog-full", 1 / 3)))
    assert record["at"] == 0.3
    assert record["retry_after_s"] == 0.333333


def test_unknown_is_null():
    assert '"retry_after_s":null' in encode(0.0, ARRIVAL, Reject("r7", "prompt-too-long"))


def test_the_log_keeps_the_order_of_actions():
    log = DecisionLog()
    log(1.0, ARRIVAL, [])
    log(2.0, TimerFired(), [Poll("a"), Poll("b")])
    assert [json.loads(line)["instance"] for line in log.lines] == ["a", "b"]
    assert log.text() == log.lines[0] + "\n" + log.lines[1] + "\n"


def test_an_empty_log_is_empty_text():
    assert DecisionLog().text() == ""
