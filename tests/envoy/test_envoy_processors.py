"""Several ext_proc processes before one that decides, through a real Envoy."""

import os
import signal

import pytest
from envoys import Envoy, asyncio, config, front, run, until
from gate import GATES

from headway.core.errors import ConfigError
from headway.core.events import TimerFired
from headway.hosts.envoy import Picker

GATE = "gate:Gate"
TWO = {"processors": 2}


def let_go(front):
    for gate in GATES:
        gate.shut = False
    front.picker.driver.feed(TimerFired())


async def all_over(front):
    picks = front.picker.picks
    await until(lambda: picks.under_way == 0 and front.picker.driver.requests == 0, "the access log")
    await until(lambda: front.picker.processor.open == 0, "the streams' end")
    assert picks.buffer.requests == picks.buffer.in_flight == 0


@pytest.mark.parametrize("by", ["access-log", "response"])
def test_requests_are_placed_and_accounted_for_by_both(by):
    async def test():
        def change(envoy):
            envoy.spread(4)
            if by == "response":
                envoy.send_answers()

        async with front(change=change, server=TWO, accounting={"by": by}, policy=GATE) as f:
            # More than a connection takes: Envoy opens further ones, and the kernel deals them out.
            asked = [asyncio.create_task(f.chat()) for _ in range(90)]
            await until(lambda: f.held == 90, "the hold")
            await until(lambda: f.picker.processor.open == 90, "the counts")
            assert all(child.open for child in f.picker.processor._children)
            let_go(f)
            assert [(await each)[0] for each in asked] == [200] * 90
            assert {len(engine.requests) for engine in f.engines} == {45}
            await all_over(f)

    run(test())


def test_a_refusal_at_the_door_and_one_of_the_policy_look_as_with_one_process():
    async def test():
        async with front(server=TWO, policy=GATE, limits={"buffer_requests": 1}) as f:
            status, _, _ = await f.chat(body=b"{")
            assert status == 400
            held = asyncio.create_task(f.chat())
            await until(lambda: f.held == 1, "the hold")
            status, headers, _ = await f.chat()
            assert (status, headers["x-headway-reason"], headers["retry-after"]) == (
                429,
                "buffer_requests",
                "1",
            )
            let_go(f)
            assert (await held)[0] == 200

    run(test())


def test_a_client_that_leaves_a_hold_is_withdrawn():
    async def test():
        async with front(server=TWO, policy=GATE) as f:
            asked = asyncio.create_task(f.chat())
            await until(lambda: f.held == 1, "the hold")
            asked.cancel()
            await all_over(f)

    run(test())


def test_a_process_that_is_killed_costs_what_it_held_and_is_started_again():
    async def test():
        async with front(change=Envoy.spread, server=TWO, policy=GATE) as f:
            asked = [asyncio.create_task(f.chat()) for _ in range(90)]
            await until(lambda: f.held == 90, "the hold")
            victim, other = sorted(f.picker.processor._children, key=lambda child: -child.open)
            await until(lambda: victim.open + other.open == 90, "the counts")
            lost, process = victim.open, victim.process
            os.kill(process.pid, signal.SIGKILL)
            await until(lambda: f.held == 90 - lost, "the withdrawal")
            let_go(f)
            statuses = [(await each)[0] for each in asked]
            assert statuses.count(500) == lost and statuses.count(200) == 90 - lost
            await until(lambda: victim.process is not process and victim.serves, "the new process")
            os.kill(other.process.pid, signal.SIGKILL)
            await until(lambda: not other.serves, "the other's end")
            # Only the new one listens now; Envoy may have to find out that the other has gone.
            while (await f.chat())[0] != 200:
                assert not other.serves
            await all_over(f)

    run(test(), seconds=40.0)


def test_a_drain_while_a_process_is_started_again_waits_for_nobody():
    async def test():
        async with front(server=TWO, policy=GATE) as f:
            victim, other = f.picker.processor._children
            os.kill(victim.process.pid, signal.SIGKILL)
            await until(lambda: not victim.serves, "the end")
            assert not await f.picker.drain()  # it did not end by itself
            assert not other.serves and f.picker.processor.open == 0

    run(test())


def test_not_ready_where_no_process_listens():
    async def test():
        async with front(server=TWO) as f:
            await until(f.picker.ready, "readiness")
            for child in f.picker.processor._children:
                os.kill(child.process.pid, signal.SIGKILL)
            await until(lambda: not f.picker.ready(), "the end of readiness")
            await until(f.picker.ready, "readiness again")

    run(test())


def test_a_drain_answers_what_is_held():
    async def test():
        async with front(change=Envoy.spread, server=TWO, policy=GATE) as f:
            asked = [asyncio.create_task(f.chat()) for _ in range(50)]
            await until(lambda: f.held == 50, "the hold")
            drained = asyncio.create_task(f.picker.drain())
            await until(lambda: f.picker.draining, "the drain")
            let_go(f)
            assert [(await each)[0] for each in asked] == [200] * 50
            assert await drained

    run(test())


def test_a_port_that_is_taken_is_said_in_one_line():
    async def test():
        async with front() as f:
            taken = {"grpc_port": f.picker.grpc_port, **TWO}
            picker = Picker(config(*f.engines, server=taken))
            with pytest.raises(ConfigError, match="it is taken"):
                await picker.start()

    run(test())


def test_with_certificates_they_all_serve_the_same():
    async def test():
        async with front(change=Envoy.spread, server=TWO, tls={"mode": "self-signed"}) as f:
            statuses = await asyncio.gather(*(f.chat() for _ in range(100)))
            assert {status for status, _, _ in statuses} == {200}

    run(test())
