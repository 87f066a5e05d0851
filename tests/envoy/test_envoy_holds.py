"""What happens to requests that are held, through a real Envoy."""

import resource

import aiohttp
import pytest
from envoys import Envoy, asyncio, config, front, run, until
from gate import GATES
from standins import error_of

from headway.core.events import TimerFired

GATE = "gate:Gate"


def let_go(front):
    for gate in GATES:
        gate.shut = False
    front.picker.driver.feed(TimerFired())


def many_files():
    """Take all the open files this process may have: each request takes two, in Envoy and here."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def asked_without_picker(front, status):
    """Ask until Envoy knows that its picker is gone."""
    seen = []
    for _ in range(200):
        seen.append((await front.chat())[0])
        if seen[-1] == status:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"statuses: {set(seen)}")


def test_full_duplex_is_not_subject_to_the_message_timeout():
    async def test():
        async with front(policy=GATE + ":hold_s=0.6") as f:
            assert f.envoy.ext_proc["message_timeout"] == "0.2s"
            status, _, _ = await f.chat()
            assert status == 200

    run(test())


def test_buffered_a_hold_is_cut_by_the_message_timeout_with_504_and_the_request_is_withdrawn():
    async def test():
        def change(envoy):
            envoy.buffer_bodies()
            envoy.ext_proc["max_message_timeout"] = "0s"
            envoy.ext_proc["failure_mode_allow"] = False

        async with front(change=change, policy=GATE) as f:
            status, _, _ = await f.chat()
            assert status == 504
            await until(lambda: f.held == 0 and f.picker.driver.requests == 0, "the withdrawal")
            assert not any(engine.requests for engine in f.engines)

    run(test())


def test_buffered_a_hold_lasts_where_envoy_grants_more_time():
    async def test():
        async with front(change=lambda e: e.buffer_bodies(), policy=GATE + ":hold_s=0.6") as f:
            status, _, _ = await f.chat()
            assert status == 200

    run(test())


def test_a_client_that_leaves_a_hold_is_withdrawn():
    async def test():
        async with front(policy=GATE) as f:
            asked = asyncio.create_task(f.chat())
            await until(lambda: f.held == 1, "the hold")
            asked.cancel()
            await until(lambda: f.held == 0 and f.picker.driver.requests == 0, "the withdrawal")
            await until(lambda: f.picker.processor.open == 0, "the stream's end")
            let_go(f)
            assert (await f.chat())[0] == 200
            assert sum(len(engine.requests) for engine in f.engines) == 1

    run(test())


def test_a_hold_that_is_too_long_is_shed_with_a_reason_and_when_to_come_back():
    async def test():
        async with front(policy=GATE + ":max_hold_s=0.05") as f:
            status, headers, body = await f.chat()
            assert (status, error_of(body)) == (429, "held-too-long")
            assert headers["retry-after"] == "1" and headers["x-headway-reason"] == "held-too-long"
            assert headers["content-type"] == "application/json"

    run(test())


def test_a_full_buffer_sheds_and_one_flow_cannot_fill_it():
    async def test():
        tables = {"limits": {"buffer_requests": 2}, "picker": {"flow_share": 0.5}}
        async with front(policy=GATE, **tables) as f:
            flow = {"x-llm-d-inference-fairness-id": "a"}
            first = asyncio.create_task(f.chat(headers=flow))
            await until(lambda: f.held == 1, "the hold")
            status, _, body = await f.chat(headers=flow)
            assert (status, error_of(body)) == (429, "flow_full")
            other = asyncio.create_task(f.chat())
            await until(lambda: f.held == 2, "another flow's hold")
            status, _, body = await f.chat(headers={"x-llm-d-inference-fairness-id": "b"})
            assert (status, error_of(body)) == (429, "buffer_requests")
            let_go(f)
            assert [(await first)[0], (await other)[0]] == [200, 200]

    run(test())


def test_what_is_held_when_its_engine_goes_waits_for_another():
    async def test():
        async with front(policy=GATE, health={"interval_s": 0.02, "eject_after": 1}) as f:
            asked = asyncio.create_task(f.chat())
            await until(lambda: f.held == 1, "the hold")
            await f.engines[0].kill()
            await until(lambda: not f.picker.workers.get("e0").takes_work(), "the ejection")
            let_go(f)
            assert (await asked)[0] == 200
            assert len(f.engines[1].requests) == 1

    run(test())


def test_a_burst_of_5000_is_held_and_not_one_stream_is_shed():
    async def test():
        many_files()  # before Envoy starts, which takes over the limit
        async with front(policy=GATE) as f:
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(f.envoy.url, connector=connector) as client:
                f.client = client
                asked = [asyncio.create_task(f.chat()) for _ in range(5000)]
                try:
                    for _ in range(6000):
                        if f.held == 5000:
                            break
                        await asyncio.sleep(0.01)
                    assert f.held == 5000
                    let_go(f)
                    statuses = [(await each)[0] for each in asked]
                finally:
                    for each in asked:
                        each.cancel()
            assert statuses == [200] * 5000
            assert sum(len(engine.requests) for engine in f.engines) == 5000
            await until(lambda: f.picker.picks.under_way == 0, "the access log")
            assert f.picker.driver.requests == 0 and f.picker.picks.buffer.in_flight == 0

    run(test(), seconds=120.0)


@pytest.mark.parametrize(
    ("open_", "status"),
    [(False, 500), (True, 500)],
    ids=["closed", "open"],
)
def test_a_picker_that_goes_in_mid_hold(open_, status):
    """Envoy has sent the body on by then, so that it cannot go on without the picker either."""

    async def test():
        def change(envoy):
            envoy.ext_proc["failure_mode_allow"] = open_

        async with front(change=change, policy=GATE) as f:
            asked = asyncio.create_task(f.chat())
            await until(lambda: f.held == 1, "the hold")
            await f.picker.processor.stop()
            assert (await asked)[0] == status
            await until(lambda: f.held == 0, "the withdrawal")
            # What comes when Envoy's health check has noticed: there is no picker to ask.
            await asked_without_picker(f, 200 if open_ else 500)

    run(test())


def test_without_a_picker_at_all_a_closed_envoy_fails_and_an_open_one_picks_itself():
    async def test():
        async with front() as f:
            for open_, name in ((True, "override-host"), (False, "override-host"), (True, "original-dst")):
                envoy = Envoy(name)
                envoy.ask(1)
                if name == "override-host":
                    envoy.knows(*(engine.port for engine in f.engines))
                envoy.ext_proc["failure_mode_allow"] = open_
                async with envoy, aiohttp.ClientSession(envoy.url) as client:
                    f.client = client
                    spoofed = {"x-gateway-destination-endpoint": f"127.0.0.1:{f.engines[1].port}"}
                    status, _, _ = await f.chat(headers=spoofed)
                    expected = {(True, "override-host"): 200, (True, "original-dst"): 503}
                    assert status == expected.get((open_, name), 500)

    run(test())


def test_a_drain_answers_what_is_held_and_says_at_once_that_it_is_not_ready():
    async def test():
        async with front(policy=GATE) as f:
            asked = asyncio.create_task(f.chat())
            await until(lambda: f.held == 1, "the hold")
            drained = asyncio.create_task(f.picker.drain())
            await until(lambda: f.picker.health._told is False, "the health")
            let_go(f)
            assert (await asked)[0] == 200
            assert await drained

    run(test())


def test_config_builds_what_the_tests_ask_for():
    with pytest.raises(Exception, match="not the name 'localhost'"):
        config(type("Engine", (), {"url": "http://localhost:1"}))
