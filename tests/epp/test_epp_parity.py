"""One script of events through gateway and picker gives one decision log, byte for byte."""

import asyncio
import random

import pytest
from parts import Apart, Stage

from headway.core.cluster import create_cluster
from headway.core.decision_log import DecisionLog
from headway.core.events import Finished, PrefillDone
from headway.core.request import Slo
from headway.front.driver import Driver
from headway.front.requests import read_call
from headway.hosts.envoy.desk import Asked, Served
from headway.hosts.gateway.flight import Flight
from headway.testing import ScriptedHost, arrived, pass_ended, up

BODY = b'{"prompt": "%s"}'
# (time, prompt tokens) of arrivals; passes end at literal times.
SCRIPT = [
    (0.00, up("e0", ranks=2, chunk=1000)),
    (0.00, up("e1", ranks=2, chunk=1000)),
    (0.10, ("a", 900)),
    (0.10, ("b", 800)),
    (0.11, ("c", 100)),
    (0.12, ("d", 2500)),
    (0.40, pass_ended("e0", 1, ran=(900, 800), acknowledged=2, queued=(0, 0), duration=0.3)),
    (0.41, PrefillDone("a")),
    (0.45, ("e", 700)),
    (0.60, pass_ended("e1", 1, ran=(100, 1000), acknowledged=2, queued=(0, 1500), duration=0.25)),
    (0.80, Finished("a", 8)),
    (0.90, pass_ended("e0", 2, ran=(700, 0), acknowledged=3, queued=(0, 0), duration=0.3)),
    (1.20, Finished("b", 8)),
    (1.30, Finished("c", 8)),
    (1.40, Finished("d", 8)),
    (1.50, Finished("e", 8)),
]
POLICIES = ["staggered", "least-tokens", "round-robin", "power-of-two", "least-requests"]


def instances():
    return [
        {"name": name, "url": f"http://10.0.0.{n}:80", "ranks": 2, "chunk_tokens": 1000, "lockstep": True}
        for n, name in enumerate(("e0", "e1"))
    ]


def events():
    """The script for hosts that take events."""
    for at_s, what in SCRIPT:
        yield at_s, arrived(what[0], at=at_s, prompt=what[1]) if isinstance(what, tuple) else what


def build(policy):
    return create_cluster(policy, disaggregated=False, rng=random.Random(1))


class Quiet:
    started = False


async def through_the_gateway(policy):
    """The gateway's flights wait; they are ended as its serving ends them."""
    from parts import Clock

    clock, log = Clock(), DecisionLog()
    driver = Driver(build(policy), clock=clock.time, call_at=clock.call_at, observers=[log])
    for at_s, event in events():
        clock.advance(at_s)
        if hasattr(event, "request"):
            call = read_call("/v1/completions", BODY % b"x")
            flight = Flight(event.request, call, {}, Quiet(), role_of=lambda name: None, clock=clock.time)
            driver.arrive(event.request, flight)
        else:
            driver.feed(event)
            if isinstance(event, Finished):
                driver.leave(event.request_id)
    return log.text()


async def through_the_picker(policy, *, apart=False):
    """Requests come to the picker's desk, and end by its accounts. `apart`: from another process."""
    stage = Stage(policy, instances=instances())
    for worker in stage.workers:
        worker.models = {}
    stage.log.lines.clear()
    desk = Apart(stage.picks).desk if apart else stage.picks
    tasks, names = {}, {}
    for at_s, event in SCRIPT[2:]:
        stage.clock.advance(at_s)
        if isinstance(event, tuple):
            name, tokens = event
            tasks[name] = asyncio.create_task(desk.place(asked(name, at_s, tokens)))
            await turn()
            names[name] = stage.arrived()[-1].id
        elif isinstance(event, PrefillDone):
            desk.first_byte((await tasks[event.request_id]).key)
        elif isinstance(event, Finished):
            desk.over((await tasks[event.request_id]).key, Served(200))
        else:
            stage.driver.feed(event)
            await turn()
    text = stage.log.text()
    for name, given in names.items():  # ids here carry a number, so that two clients may choose one
        text = text.replace(f'"{given}"', f'"{name}"')
    stage.nothing_left()
    return text


def asked(name, at_s, tokens):
    exact, size = True, 1
    return Asked(name, at_s, "/v1/completions", None, False, None, tokens, exact, Slo(), 0, size)


async def turn():
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.parametrize("policy", POLICIES)
def test_gateway_picker_and_scripted_host_decide_alike(policy):
    host = ScriptedHost(build(policy))
    host.run(list(events()))
    expected = host.log.text()
    assert expected
    assert asyncio.run(through_the_gateway(policy)) == expected
    assert asyncio.run(through_the_picker(policy)) == expected
    assert asyncio.run(through_the_picker(policy, apart=True)) == expected
