"""The picker's port: health, TLS, garbage, and the process that serves it."""

import json
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import grpc
import pytest
from envoys import Envoy, asyncio, front, run, until
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from standins import StandIn

from headway.cli.emulate import to_toml
from headway.hosts.envoy import health as picker_health
from headway.hosts.envoy.messages import EXT_PROC
from headway.hosts.envoy.secure import self_signed

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING


async def health(port, service):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = await HealthStub(channel).Check(HealthCheckRequest(service=service))
        return answer.status


def test_health_is_told_on_its_own_port_and_on_envoys():
    async def test():
        async with front(engines=1) as f:
            for port in (f.picker.health_port, f.picker.grpc_port):
                for service in ("", "liveness", "readiness", EXT_PROC):
                    assert await health(port, service) == SERVING
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await health(f.picker.health_port, "unknown")
            assert error.value.code() is grpc.StatusCode.NOT_FOUND
            f.picker.workers.drain("e0")
            await f.picker.health.look()
            assert await health(f.picker.health_port, "liveness") == SERVING
            assert await health(f.picker.health_port, "readiness") == NOT_SERVING
            assert await health(f.picker.health_port, EXT_PROC) == NOT_SERVING

    run(test())


def test_a_blocked_event_loop_keeps_no_health_check_waiting_and_one_that_is_stuck_is_dead(monkeypatch):
    def asked(port):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            answer = HealthStub(channel).Check(HealthCheckRequest(service="liveness"), timeout=5.0)
            return answer.status

    async def test():
        async with front(engines=1) as f:
            with ThreadPoolExecutor(1) as pool:
                for stall_s, status in ((10.0, SERVING), (0.0, NOT_SERVING)):
                    monkeypatch.setattr(picker_health, "STALL_S", stall_s)
                    asking = pool.submit(asked, f.picker.health_port)
                    assert asking.result() == status  # the event loop stands still meanwhile

    run(test())


def test_garbage_on_the_port_is_an_error_of_its_stream_alone():
    async def test():
        async with front() as f:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{f.picker.grpc_port}") as channel:
                process = channel.stream_stream(f"/{EXT_PROC}/Process")
                for garbage in (b"\xff\xff\xff", b"\x12\x05ab"):
                    call = process(iter([garbage]))
                    with pytest.raises(grpc.aio.AioRpcError):
                        async for _ in call:
                            pass
                listen = channel.stream_unary("/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs")
                await listen(iter([b"\xff\xff\xff"]))  # a log that cannot be read ends
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await channel.unary_unary("/no.such/Method")(b"")
                assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
            reader, writer = await asyncio.open_connection("127.0.0.1", f.picker.grpc_port)
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            await reader.read()
            writer.close()
            assert (await f.chat())[0] == 200
            await until(lambda: f.picker.processor.open == 0, "the streams' end")

    run(test())


def test_a_certificate_that_envoy_does_not_accept_is_a_500_and_the_right_one_is_taken(tmp_path):
    mine, key = self_signed()
    (tmp_path / "tls.crt").write_bytes(mine)
    (tmp_path / "tls.key").write_bytes(key)
    (tmp_path / "other.crt").write_bytes(self_signed()[0])
    tls = {"mode": "files", "certificate": str(tmp_path / "tls.crt"), "key": str(tmp_path / "tls.key")}

    async def test(trusted, status):
        def change(envoy):
            envoy.ext_proc["failure_mode_allow"] = False
            context = envoy.cluster("picker")["transport_socket"]["typed_config"]["common_tls_context"]
            context["validation_context"] = {"trusted_ca": {"filename": str(tmp_path / trusted)}}

        async with front(change=change, tls=tls) as f:
            assert (await f.chat())[0] == status
            assert await health(f.picker.health_port, "readiness") == SERVING

    run(test("other.crt", 500))
    run(test("tls.crt", 200))


# As a process


@asynccontextmanager
async def process(engine, policy, tmp_path, *, processors=1):
    """Run `headway epp` with the tests' policies at hand; yields it, its port and its metrics' URL."""
    data = {
        "server": {"host": "127.0.0.1", "grpc_port": 0, "grpc_health_port": 0, "drain_timeout_s": 10.0}
        | {"processors": processors},
        "metrics": {"host": "127.0.0.1", "port": 0},
        "instances": [{"name": "e0", "url": engine.url}],
        "policy": {"cluster": policy},
        "tls": {"mode": "off"},
    }
    (tmp_path / "epp.toml").write_text(to_toml(data))
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from headway.cli import main; main()", "epp"),
        *("--config", str(tmp_path / "epp.toml")),
        cwd=Path(__file__).parent,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        said = ""
        while "metrics" not in said:
            line = await child.stdout.readline()
            assert line, (await child.stderr.read()).decode()
            said += line.decode()
        port, metrics = re.search(r"picks on \S+:(\d+)", said)[1], re.search(r"metrics +(\S+)", said)[1]
        yield child, int(port), metrics
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


async def held(metrics):
    async with aiohttp.ClientSession() as client:
        for _ in range(2000):
            async with client.get(metrics) as answer:
                if "headway_held_requests 1.0" in await answer.text():
                    return
            await asyncio.sleep(0.005)
    raise AssertionError("nothing is held")


async def asked(envoy):
    async with aiohttp.ClientSession(envoy.url) as client:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
        async with client.post("/v1/chat/completions", json=body) as answer:
            return answer.status


@pytest.mark.parametrize("processors", [1, 2])
def test_sigterm_answers_what_is_held_and_ends_with_status_0(processors, tmp_path):
    async def test():
        async with (
            StandIn() as engine,
            process(engine, "gate:Gate:hold_s=1.5", tmp_path, processors=processors) as (
                child,
                port,
                metrics,
            ),
        ):
            envoy = Envoy("original-dst")
            envoy.ask(port)
            async with envoy:
                asking = asyncio.create_task(asked(envoy))
                await held(metrics)
                child.send_signal(signal.SIGTERM)
                assert await asking == 200
                assert await child.wait() == 0
                lines = [json.loads(line) for line in (await child.stderr.read()).splitlines()]
                assert not [line for line in lines if line["level"] == "error"]

    run(test())


def children_of(pid):
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_processes_of_a_picker_that_is_killed_end_with_it(tmp_path):
    async def test():
        async with (
            StandIn() as engine,
            process(engine, "gate:Gate", tmp_path, processors=2) as (child, port, metrics),
        ):
            envoy = Envoy("original-dst")
            envoy.ask(port)
            async with envoy:
                asking = asyncio.create_task(asked(envoy))
                await held(metrics)
                children = children_of(child.pid)
                assert len(children) == 2
                child.kill()
                assert await asking == 500
                await until(lambda: not any(map(alive, children)), "their end")

    run(test())


@pytest.mark.parametrize("name", ["original-dst", "override-host"])
def test_a_picker_killed_in_mid_hold_is_a_500_and_the_engine_never_hears_of_it(name, tmp_path):
    async def test():
        async with StandIn() as engine, process(engine, "gate:Gate", tmp_path) as (child, port, metrics):
            envoy = Envoy(name)
            envoy.ask(port)
            if name == "override-host":
                envoy.knows(engine.port)
            async with envoy:
                asking = asyncio.create_task(asked(envoy))
                await held(metrics)
                child.kill()
                assert await asking == 500
                assert engine.requests == []
                # When Envoy knows that it has no picker an open one goes on by itself, a closed one does not.
                last = 200 if name == "override-host" else 500
                seen = [await asked(envoy)]
                while seen[-1] != last:
                    assert seen[-1] == 500 and len(seen) < 500, seen
                    await asyncio.sleep(0.02)
                    seen.append(await asked(envoy))

    run(test())
