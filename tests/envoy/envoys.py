"""A real Envoy before a picker and stand-in engines, from the files under deploy/envoy.

`ENVOY_BINARY` names it; else it is the one in .venv-envoy (make test-envoy).
"""

import asyncio
import copy
import os
import signal
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import yaml
from standins import StandIn, until

from headway.hosts.envoy import EppConfig, Picker

ROOT = Path(__file__).resolve().parents[2]
FOUND = next(ROOT.glob(".venv-envoy/lib/python*/site-packages/envoy/_bin/envoy"), None)
ENVOY = os.environ.get("ENVOY_BINARY") or (str(FOUND) if FOUND else None)


def run(test, seconds=20.0):
    """Run a test's coroutine; none may take longer."""

    async def bounded():
        async with asyncio.timeout(seconds):
            await test

    asyncio.run(bounded())


class Envoy:
    """A configuration to be changed before the start, and the process."""

    def __init__(self, name):
        self.config = yaml.safe_load((ROOT / "deploy" / "envoy" / f"{name}.yaml").read_text())
        self.config = copy.deepcopy(self.config)  # anchors are shared objects
        self.url = self.admin_url = ""
        self.process = None
        self.errors = ""
        self._serve_on_free_ports()

    def _serve_on_free_ports(self):
        listener = self.config["static_resources"]["listeners"][0]["address"]["socket_address"]
        listener["address"], listener["port_value"] = "127.0.0.1", 0
        self.config["admin"]["address"]["socket_address"]["port_value"] = 0

    @property
    def connections(self):
        filters = self.config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"]
        return filters[0]["typed_config"]

    @property
    def ext_proc(self):
        return self.connections["http_filters"][0]["typed_config"]

    @property
    def route(self):
        return self.connections["route_config"]["virtual_hosts"][0]["routes"][0]["route"]

    def cluster(self, name):
        return next(each for each in self.config["static_resources"]["clusters"] if each["name"] == name)

    def ask(self, port, *, tls=False):
        """Say where the picker is."""
        picker = self.cluster("picker")
        address = picker["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]
        address["socket_address"]["port_value"] = port
        if not tls:
            picker.pop("transport_socket", None)

    def knows(self, *ports):
        """Say where the engines are (override_host)."""
        self.cluster("engines")["load_assignment"]["endpoints"][0]["lb_endpoints"] = [
            {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}}
            for port in ports
        ]

    def buffer_bodies(self):
        self.ext_proc["processing_mode"] |= {"request_body_mode": "BUFFERED", "request_trailer_mode": "SKIP"}

    def spread(self, streams=16):
        """Open a further connection to the picker where one has so many streams."""
        options = next(iter(self.cluster("picker")["typed_extension_protocol_options"].values()))
        options["explicit_http_config"]["http2_protocol_options"]["max_concurrent_streams"] = streams

    def send_answers(self):
        self.ext_proc["processing_mode"] |= {"response_header_mode": "SEND", "response_body_mode": "STREAMED"}

    async def __aenter__(self):
        self.folder = tempfile.TemporaryDirectory()
        folder = Path(self.folder.name)
        (folder / "envoy.yaml").write_text(yaml.safe_dump(self.config))
        self.log = (folder / "log").open("w+")
        self.process = await asyncio.create_subprocess_exec(
            ENVOY,
            *("-c", str(folder / "envoy.yaml"), "--admin-address-path", str(folder / "admin")),
            *("--use-dynamic-base-id", "--concurrency", "1", "-l", os.environ.get("ENVOY_LOG", "error")),
            stdout=self.log,
            stderr=self.log,
        )
        admin = folder / "admin"
        await until(lambda: self._failed() or (admin.exists() and ":" in admin.read_text()), "Envoy")
        self.admin_url = f"http://{admin.read_text()}"
        async with aiohttp.ClientSession() as client:
            for _ in range(2000):
                async with client.get(f"{self.admin_url}/ready") as answer:
                    if answer.status == 200:
                        break
                await asyncio.sleep(0.005)
            async with client.get(f"{self.admin_url}/listeners?format=json") as answer:
                told = (await answer.json())["listener_statuses"][0]["local_address"]["socket_address"]
        self.url = f"http://127.0.0.1:{told['port_value']}"
        return self

    def _failed(self):
        if self.process.returncode is not None:
            self.log.seek(0)
            raise AssertionError(f"Envoy ended: {self.log.read()[-2000:]}")
        return False

    async def __aexit__(self, *_):
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGKILL)
            await self.process.wait()
        self.log.seek(0)
        self.errors = self.log.read()
        self.log.close()
        self.folder.cleanup()

    async def numbers(self):
        """Return Envoy's counters by name."""
        async with aiohttp.ClientSession() as client, client.get(f"{self.admin_url}/stats") as answer:
            lines = (await answer.text()).splitlines()
        pairs = (line.rpartition(": ") for line in lines)
        return {name: int(value) for name, _, value in pairs if value.isdigit()}


def config(*engines, policy="least-requests", **tables):
    """A picker's configuration before stand-ins that run, on free ports and without TLS."""
    data = {
        "server": {"host": "127.0.0.1", "grpc_port": 0, "grpc_health_port": 0, "drain_timeout_s": 2.0},
        "metrics": {"host": "127.0.0.1", "port": 0},
        "instances": [{"name": f"e{number}", "url": engine.url} for number, engine in enumerate(engines)],
        "policy": {"cluster": policy},
        "health": {"interval_s": 0.05, "eject_after": 2},
        "tls": {"mode": "off"},
    }
    for name, table in tables.items():
        data[name] = data.get(name, {}) | table if isinstance(table, dict) else table
    return EppConfig.parse(data)


class Front:
    """Envoy, picker and engines of one test."""

    def __init__(self, envoy, picker, engines, client):
        self.envoy, self.picker, self.engines, self.client = envoy, picker, engines, client

    async def chat(self, *, body=None, headers=None, path="/v1/chat/completions", **fields):
        """Send a chat; return status, headers and body."""
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], **fields}
        sent = {"json": chat} if body is None else {"data": body}
        async with self.client.post(path, headers=headers, **sent) as answer:
            return answer.status, answer.headers, await answer.read()

    @property
    def held(self):
        return self.picker.picks.buffer.requests

    def metric(self, name, **labels):
        return self.picker.metrics.registry.get_sample_value(name, labels) or 0.0

    def oddities(self, what):
        return self.metric("headway_picker_oddities_total", what=what)


@asynccontextmanager
async def front(*, engines=2, name="override-host", change=lambda envoy: None, **tables):
    """Start all of it. `change(envoy)`: before Envoy starts. `tables`: of the picker's configuration."""
    standins = [StandIn() for _ in range(engines)]
    async with _all(standins), Picker(config(*standins, **tables)) as picker:
        envoy = Envoy(name)
        envoy.ask(picker.grpc_port, tls=picker.config.tls.mode != "off")
        if name == "override-host":
            envoy.knows(*(int(each.url.rpartition(":")[2]) for each in standins))
        change(envoy)
        async with envoy, aiohttp.ClientSession(envoy.url) as client:
            yield Front(envoy, picker, standins, client)


@asynccontextmanager
async def _all(standins):
    for each in standins:
        await each.__aenter__()
    try:
        yield
    finally:
        for each in standins:
            await each.__aexit__(None, None, None)
