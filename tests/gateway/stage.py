"""A gateway before an emulated cluster, on a thread of its own: for tests that block, as a browser's do."""

import asyncio
import json
import os
import random
import threading
from contextlib import AsyncExitStack, contextmanager, suppress

import aiohttp

from headway.hosts.emulator import Emulator
from headway.hosts.gateway import Gateway, GatewayConfig
from headway.model.presets import load_cluster


def instances_of(emulator):
    pools = {pool.role: pool for pool in emulator.cluster.pools}
    return [
        {
            "name": each.instance,
            "url": each.url,
            "role": each.role.value,
            "ranks": each.ranks,
            "rank_by": each.rank_by,
            "lockstep": pools[each.role].lockstep,
            "events": each.events,
            "snapshots": each.snapshots,
        }
        for each in emulator.endpoints
    ]


class Stage:
    """What plays. `say(fault)` breaks engines, `load(rps)` sends chats until told otherwise."""

    def __init__(self, cluster, policy, speed, seed, tables):
        self.cluster, self.policy, self.speed, self.tables = cluster, policy, speed, tables
        self.rng = random.Random(seed)
        self.loop = asyncio.new_event_loop()
        self.rps = 0.0
        self.prompt_bytes, self.output_tokens = (2_000, 20_000), (5, 60)
        self.headers = {}
        self.statuses = []

    async def open(self):
        self.stack = AsyncExitStack()
        cluster = load_cluster(self.cluster) if isinstance(self.cluster, str) else self.cluster
        self.emulator = await self.stack.enter_async_context(Emulator(cluster, "vllm-v1", speed=self.speed))
        data = {
            "server": {"port": 0},
            "instances": instances_of(self.emulator),
            "policy": {"cluster": self.policy},
            "health": {"interval_s": 0.1, "eject_after": 1},
        }
        self.gateway = await self.stack.enter_async_context(Gateway(GatewayConfig.parse(data | self.tables)))
        self.client = await self.stack.enter_async_context(aiohttp.ClientSession(self.gateway.url))
        self.tasks = {asyncio.create_task(self._send())}

    async def close(self):
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.stack.aclose()

    async def _send(self):
        while True:
            await asyncio.sleep(self.rng.expovariate(self.rps) if self.rps else 0.02)
            if self.rps:
                task = asyncio.create_task(self.chat())
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)

    async def chat(self, **fields):
        words = f"{self.rng.random()} " * (self.rng.randint(*self.prompt_bytes) // 20)
        body = {
            "messages": [{"role": "user", "content": words}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": self.rng.randint(*self.output_tokens),
        }
        with suppress(aiohttp.ClientError):
            async with self.client.post(
                "/v1/chat/completions", data=json.dumps(body | fields), headers=self.headers
            ) as answer:
                await answer.read()
                self.statuses.append(answer.status)

    def do(self, function, *args):
        """Call something on the stage's own thread and return what it returns."""

        async def called():
            result = function(*args)
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(called(), self.loop).result(20.0)

    def load(self, rps):
        self.rps = rps

    def fault(self, instance, fault):
        self.do(lambda: setattr(self.emulator.instance(instance), "fault", fault))


@contextmanager
def stage(cluster, policy="staggered", *, speed=1.0, seed=3, **tables):
    """Play a cluster while the context lasts."""
    played = Stage(cluster, policy, speed, seed, tables)
    thread = threading.Thread(target=played.loop.run_forever, daemon=True)
    thread.start()
    try:
        played.do(played.open)
        yield played
    finally:
        with suppress(AttributeError):
            played.do(played.close)
        played.loop.call_soon_threadsafe(played.loop.stop)
        thread.join(5.0)
        played.loop.close()


@contextmanager
def chromium(profile, *, width=1300, height=1000):
    """Run Debian's Chromium without a window; its console and its network are recorded."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    for argument in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        f"user-data-dir={profile}",
        f"window-size={width},{height}",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = Service(os.environ.get("CHROMEDRIVER", "/usr/bin/chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()
