"""What goes wrong on purpose: refuse, hang, slow, crash mid-stream, errors at a rate; and how it ends."""

import asyncio

import aiohttp
import pytest
from emulated import completion, disaggregated, post, running, until

from headway.core.errors import ConfigError
from headway.core.events import InstanceUp
from headway.hosts.emulator import Fault
from headway.hosts.emulator.faults import parse_fault
from headway.wire import Subscriber


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_refuse_closes_the_connection_and_with_a_status_answers_it():
    async def scenario():
        async with running() as (emulator, session):
            instance = emulator.instances[0]
            instance.fault = Fault("refuse")
            with pytest.raises(aiohttp.ClientConnectionError):
                await completion(session, instance.endpoint.url)
            instance.fault = Fault("refuse", status=503)
            assert (await completion(session, instance.endpoint.url))[0] == 503
            instance.fault = None
            assert (await completion(session, instance.endpoint.url))[0] == 200

    run(scenario)


def test_hang_answers_nothing_and_loses_nothing():
    async def scenario():
        async with running() as (emulator, session):
            instance = emulator.instances[0]
            url = instance.endpoint.url
            running_one = asyncio.create_task(completion(session, url, tokens=50))
            await until(lambda: instance.requests == 1)
            instance.fault = Fault("hang")
            health = asyncio.create_task(session.get(url + "/health"))
            done, _ = await asyncio.wait((running_one, health), timeout=0.2)
            assert not done
            instance.fault = None
            assert (await running_one)[1]["usage"]["completion_tokens"] == 50
            assert (await health).status == 200

    run(scenario)


def test_slow_takes_its_time():
    async def scenario():
        async with running(speed=1.0) as (emulator, session):
            instance = emulator.instances[0]
            instance.fault = Fault("slow", factor=5.0)
            started_s = asyncio.get_running_loop().time()
            await completion(session, instance.endpoint.url, tokens=4)
            assert asyncio.get_running_loop().time() - started_s >= 0.2

    run(scenario)


def test_a_crash_cuts_streams_forgets_requests_and_comes_back_in_a_new_epoch():
    async def scenario():
        heard = []
        async with running() as (emulator, session):
            instance = emulator.instances[0]
            endpoint, epoch = instance.endpoint, instance.epoch
            async with Subscriber(endpoint.events, endpoint.snapshots, heard.append):
                body = {"prompt": "x", "max_tokens": 5000, "stream": True}
                async with session.post(endpoint.url + "/v1/completions", json=body) as response:
                    assert await response.content.readline()
                    instance.fault = Fault("crash")
                    with pytest.raises((aiohttp.ClientError, ConnectionError)):
                        await response.read()
                assert instance.requests == 0
                with pytest.raises(aiohttp.ClientConnectionError):
                    await completion(session, endpoint.url)
                instance.fault = None
                assert instance.epoch == epoch + 1
                assert (await completion(session, endpoint.url))[0] == 200
                await until(lambda: heard[-1].epoch == epoch + 1)
        ups = [event.epoch for event in heard if isinstance(event, InstanceUp)]
        assert ups == [epoch, epoch + 1]

    run(scenario)


def test_errors_come_at_their_rate_and_by_the_seed():
    async def statuses():
        async with running(seed=7) as (emulator, session):
            emulator.instances[0].fault = Fault("error_rate", rate=0.3)
            url = emulator.endpoints[0].url
            return [(await completion(session, url, tokens=1))[0] for _ in range(60)]

    async def scenario():
        first = await statuses()
        assert set(first) == {200, 500}
        assert 8 <= first.count(500) <= 28
        assert await statuses() == first

    run(scenario)


def test_faults_are_posted_and_end_by_themselves():
    async def scenario():
        async with running() as (emulator, session):
            instance = emulator.instances[0]
            url = instance.endpoint.url
            fault = {"kind": "refuse", "status": 503, "for_s": 0.05}
            assert (await post(session, url, "/fault", fault))[1] == {
                "instance": "engine-0",
                "fault": "refuse",
            }
            assert (await completion(session, url))[0] == 503
            await until(lambda: instance.fault is None)
            assert (await completion(session, url))[0] == 200
            await post(session, url, "/fault", {"kind": "crash"})
            assert (await post(session, url, "/fault", {"kind": "none"}))[0] == 200
            assert (await completion(session, url))[0] == 200
            assert (await post(session, url, "/fault", {"kind": "crsh"}))[0] == 400

    run(scenario)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "fault: "),
        (b"[]", "fault: "),
        (b'{"kind": "hnag"}', "did you mean 'hang'"),
        (b'{"kind": "slow", "fator": 2}', "fator"),
        (b'{"kind": "slow", "factor": 0}', "factor must be a positive number"),
        (b'{"kind": "slow", "factor": "3"}', "factor"),
        (b'{"kind": "error_rate", "rate": 1.5}', "rate must be between 0 and 1"),
        (b'{"kind": "refuse", "status": 200}', "status"),
    ],
)
def test_a_fault_that_is_wrong_says_what(body, says):
    with pytest.raises(ConfigError, match=says):
        parse_fault(body)


def test_the_kv_a_crashed_prefill_kept_is_lost():
    async def scenario():
        async with running(disaggregated()) as (emulator, session):
            prefill, decode = emulator.endpoints
            keep = {"do_remote_decode": True, "do_remote_prefill": False}
            _, answer = await completion(session, prefill.url, tokens=1, kv_transfer_params=keep)
            emulator.instance("prefill-0").fault = Fault("crash")
            params = answer["kv_transfer_params"]
            status, answer = await completion(session, decode.url, kv_transfer_params=params)
            assert status == 500
            assert "KV load failure" in answer["error"]["message"]

    run(scenario)
