"""Two `headway serve` processes under one lease: the leader is killed, or stands still and wakes up later."""

import asyncio
import json
import re
import signal
import subprocess
import sys
from contextlib import AsyncExitStack, contextmanager

import aiohttp
from leading import FencedEngine, ready, tables, valkey
from standins import chat, until

from headway.cli.emulate import to_toml

HEADWAY = (sys.executable, "-c", "from headway.cli import main; main()", "serve", "--config")
PATIENCE_S = 30.0


def run(test):
    async def bounded():
        async with asyncio.timeout(60.0):
            await test

    asyncio.run(bounded())


@contextmanager
def process(folder, engine, server, name):
    """Run a gateway; yields it and its URL. It is killed in the end, also where it stands still."""
    file = folder / f"{name}.toml"
    file.write_text(to_toml(tables([engine], server, name=name, wait_s=PATIENCE_S)))
    with (folder / f"{name}.log").open("w") as log:
        child = subprocess.Popen([*HEADWAY, str(file)], stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield child
        finally:
            child.kill()
            child.communicate()


def url_of(child):
    return re.search(r"serves on (\S+?):? ", child.stdout.readline())[1]


def lines(folder, name):
    """What it logged."""
    return [json.loads(line) for line in (folder / f"{name}.log").read_text().splitlines() if line]


class World:
    """An engine, a Valkey server, a leader and a follower, each gateway a process of its own."""

    def __init__(self, folder):
        self.folder = folder

    async def __aenter__(self):
        self.stack = AsyncExitStack()
        enter = self.stack.enter_async_context
        server = self.stack.enter_context(valkey())
        self.engine = await enter(FencedEngine())
        self.children, self.clients = {}, {}
        for name in ("gw-0", "gw-1"):
            child = self.stack.enter_context(process(self.folder, self.engine, server, name))
            url = await asyncio.to_thread(url_of, child)
            self.children[name] = child
            self.clients[name] = await enter(aiohttp.ClientSession(url))
            await self.until_leads("gw-0")
        await self.until(self._follows("gw-1", "gw-0/"))
        return self

    async def __aexit__(self, *_):
        await self.stack.aclose()

    async def until(self, condition):
        async with asyncio.timeout(PATIENCE_S):
            while not await condition():
                await asyncio.sleep(0.02)

    async def until_leads(self, name):
        async def leads():
            return (await ready(self.clients[name]))[1]["leads"]

        await self.until(leads)

    def _follows(self, name, leader):
        async def follows():
            return ((await ready(self.clients[name]))[1]["leader"] or "").startswith(leader)

        return follows

    def ask(self, name, count):
        return [asyncio.create_task(chat(self.clients[name])) for _ in range(count)]


async def statuses(tasks):
    return [status for status, _, _ in await asyncio.gather(*tasks)]


def test_a_leader_that_is_killed_costs_only_the_requests_whose_sockets_died(tmp_path):
    async def test():
        async with World(tmp_path) as world:
            world.engine.go.clear()  # the leader's requests are under way
            dead = world.ask("gw-0", 3)
            await until(lambda: world.engine.under_way == 3, "the leader's requests")
            held = world.ask("gw-1", 20)
            world.children["gw-0"].send_signal(signal.SIGKILL)
            world.engine.go.set()
            assert await statuses(held) == [200] * 20
            for task in dead:
                assert isinstance(await asyncio.gather(task, return_exceptions=True), list)
                assert isinstance(task.exception(), aiohttp.ClientError)
            await world.until_leads("gw-1")
            assert await statuses(world.ask("gw-1", 3)) == [200] * 3
            tokens = world.engine.tokens()
            assert len(set(tokens)) == 2 and tokens == sorted(tokens)
            said = [line["message"] for line in lines(tmp_path, "gw-1")]
            assert "another replica leads" in said and "this replica leads" in said

    run(test())


def test_a_leader_that_stood_still_does_not_act_when_it_wakes_up(tmp_path):
    """What came to its sockets meanwhile is served: by it alone if it leads again, else by nobody."""

    async def test():
        async with World(tmp_path) as world:
            assert await statuses(world.ask("gw-0", 2)) == [200] * 2
            world.children["gw-0"].send_signal(signal.SIGSTOP)
            asleep = world.ask("gw-0", 5)  # the kernel takes them in; nobody reads them
            await world.until_leads("gw-1")
            assert await statuses(world.ask("gw-1", 5)) == [200] * 5
            world.children["gw-0"].send_signal(signal.SIGCONT)
            await world.until(world._follows("gw-0", "gw-1/"))
            before = len(world.engine.requests)
            assert await statuses(world.ask("gw-1", 5)) == [200] * 5
            tokens = world.engine.tokens()
            assert tokens == sorted(tokens) and len(set(tokens)) == 2
            assert len(tokens) == before + 5  # none of those that wait at the one that slept
            world.children["gw-1"].send_signal(signal.SIGKILL)
            assert await statuses(asleep) == [200] * 5  # now it leads
            tokens = world.engine.tokens()
            assert tokens == sorted(tokens) and len(set(tokens)) == 3
            assert world.engine.refused == 0
            said = [
                line for line in lines(tmp_path, "gw-0") if line["message"] == "this replica leads no more"
            ]
            assert len(said) == 1

    run(test())


def test_sigterm_gives_the_lease_back(tmp_path):
    async def test():
        async with World(tmp_path) as world:
            world.children["gw-0"].send_signal(signal.SIGTERM)
            await world.until_leads("gw-1")
            assert await asyncio.to_thread(world.children["gw-0"].wait, 10) == 0
            warned = [line for line in lines(tmp_path, "gw-0") if line["level"] == "warning"]
            assert warned == []

    run(test())
