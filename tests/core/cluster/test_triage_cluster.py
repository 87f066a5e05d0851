"""Triage: under pressure the lost go last and the others shortest first; otherwise it is staggered."""

from cluster_scripts import order, rejects
from test_staggered import PATIENT, came, ended, staggered

from headway.core.request import Slo

HURRIED = Slo(ttft_s=5.0)
LOST = Slo(ttft_s=0.2)  # cannot make it in a pass of 1 s


def triage(**settings):
    return staggered(policy="triage", **({"aging_tokens_s": 0.0} | settings))


def batch(host, *held):
    """The requests that leave when the pass of r0 (10 s to 11 s) ends, in order."""
    host.run([came("r0", 10.0), *held, ended(11.0, 2, 1)])
    return order(host)[1:]


def test_without_pressure_the_order_is_that_of_staggered():
    held = [came("a", 10.1, 200), came("b", 10.2, 500), came("c", 10.3, 300)]
    assert batch(triage(), *held) == batch(staggered(), *held) == ["b", "c", "a"]


def test_under_pressure_those_that_would_miss_their_target_anyway_go_last():
    held = [came("lost", 10.1, 500, LOST), came("a", 10.2, 600, HURRIED), came("b", 10.3, 400, HURRIED)]
    assert batch(triage(), *held) == ["b", "a"]


def test_under_pressure_the_others_go_shortest_first():
    held = [
        came("long", 10.1, 900, HURRIED),
        came("short", 10.2, 300, HURRIED),
        came("lost", 10.3, 1000, LOST),
    ]
    assert batch(triage(), *held) == ["short"]
    assert batch(staggered(), *held) == ["lost"]  # longest first, though it is for nothing


def test_a_backlog_that_outlasts_somebodys_slack_is_pressure():
    """Three full passes are held and each could make its 2.5 s alone, but not the last behind the others."""
    slo = Slo(ttft_s=2.5)
    held = [came("a", 10.9, 1000, slo), came("b", 10.9, 900, slo), came("c", 10.9, 800, slo)]
    assert batch(triage(), *held) == ["c"]
    assert batch(triage(), *held[1:2]) == ["b"]


def test_with_aging_a_long_prompt_does_not_wait_for_ever():
    """At 11.0: 900 less 0.9 s, and 500 less 0.1 s, at 1,000 tokens a second: 0 and 400."""
    held = [
        came("old", 10.1, 900, HURRIED),
        came("young", 10.9, 500, HURRIED),
        came("lost", 10.95, 1000, LOST),
    ]
    assert batch(triage(aging_tokens_s=1000.0), *held) == ["old"]
    assert batch(triage(aging_tokens_s=0.0), *held) == ["young"]


def test_the_relegated_are_served_when_nobody_else_is_there():
    host = triage()
    assert batch(host, came("lost", 10.1, 700, LOST), came("a", 10.2, 400, HURRIED)) == ["a"]
    host.run([ended(12.0, 3, 2, ran=(400,))])
    assert order(host)[-1] == "lost"


def test_the_relegated_wait_is_bounded():
    host = triage(max_hold_s=3.0)
    batch(host, came("lost", 10.1, 1000, LOST), came("a", 10.2, 1000, HURRIED))
    host.wait(13.2)
    assert rejects(host) == [(13.1, "lost", "held-too-long")]


def test_every_rule_of_staggered_holds():
    host = triage(spacing=0.0)
    host.run([came("r1", 10.0, slo=PATIENT), came("r2", 10.1), ended(11.5, 2, 1)])
    assert order(host) == ["r1", "r2"]
