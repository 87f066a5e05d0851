"""Prefill and decode engines that crash and hang in mid-load while clients leave: everything else is served.

KV is handed over within one process, so here the engines share one, and what breaks is switched.
"""

import asyncio
import random

import aiohttp
import pytest
from loaded import Asked, cluster, run, until
from standins import pools

from headway.cli.embedded import gateway_data
from headway.core.events import Role
from headway.hosts.emulator import Emulator, Fault
from headway.hosts.gateway import Gateway, GatewayConfig

REQUESTS, OVER_S, BREAKS_AT_S = 120, 1.2, 0.5
CRASH, HANG = Fault("crash", for_s=0.8), Fault("hang", for_s=1.2)


def left(front, emulator):
    """What is under way anywhere."""
    buffer = front.serving.buffer
    sums = [
        [front.driver.requests, len(front.driver.held()), buffer.in_flight],
        [buffer.requests, buffer.tokens, buffer.bytes],
        [len(worker.legs) for worker in front.workers],
        [len(pool.ledger.placements) for pool in pools(front)],
        [rank.requests + rank.unacked_tokens for pool in pools(front) for rank in pool.ledger.ranks],
        [instance.requests for instance in emulator.instances],
    ]
    return [sum(each) for each in sums]


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
@pytest.mark.parametrize("broken", [{"prefill-0": CRASH}, {"decode-0": HANG}], ids=["crash", "hang"])
def test_what_had_no_byte_is_served_elsewhere_and_nothing_is_left(dialect, broken):
    async def check():
        rng = random.Random(7)
        spec = cluster(Role.PREFILL, Role.DECODE)
        async with Emulator(spec, speed=2.0, dialect=dialect, pair_abort_s=1.0) as emulator:
            data = gateway_data(spec, emulator.endpoints, dialect=dialect) | {"server": {"port": 0}}
            data |= {"health": {"interval_s": 0.1, "timeout_s": 0.3, "eject_after": 2}}
            async with (
                Gateway(GatewayConfig.parse(data)) as front,
                aiohttp.ClientSession(front.url, connector=aiohttp.TCPConnector(limit=0)) as client,
            ):
                asked = [Asked(number, rng.randint(3, 60)) for number in range(REQUESTS)]
                loop = asyncio.get_running_loop()
                for each in asked:
                    each.prompt = f"{each.id} " * rng.randint(2, 60)
                    each.task = asyncio.create_task(later(each, client, OVER_S * rng.random()))
                broken_s = loop.time() + BREAKS_AT_S
                await until(lambda: loop.time() > broken_s)
                for name, fault in broken.items():
                    emulator.instance(name).fault = fault
                gone, stay = asked[::3], [each for n, each in enumerate(asked) if n % 3]
                await until(lambda: front.workers.named(next(iter(broken))).state.value == "down")
                for each in gone:
                    each.task.cancel()
                await asyncio.wait([each.task for each in asked])
                assert [each.body[-200:] for each in stay if not each.whole] == []
                await until(lambda: not any(left(front, emulator)), "an empty gateway")

    run(check())


async def later(asked, client, delay_s):
    await asyncio.sleep(delay_s)
    await asked.send(client)
