"""Engines that are killed, hang, crawl, go and come in mid-load: who pays for it, and who must not.

An engine that dies loses the streams it was sending; whatever had no byte yet is served elsewhere.
"""

import asyncio

import aiohttp
from loaded import loaded, run, until

#: Streams that last longer than it takes to break an engine, and more prompts than the engines take at once.
STREAMS, MORE = 30, 90
LONG = 60
#: Prompts that an engine has and has not answered when it breaks.
FEW = 5


async def in_mid_load(load):
    """Have every engine send streams, and prompts be at the first one or held; return all requests."""
    streams = load.ask(STREAMS, tokens=LONG)
    await until(lambda: all(each.begun for each in streams), "streams")
    for engine in load.engines:
        await load.fault(engine, kind="slow", factor=10)  # a pass lasts longer than it takes to look
    asked = streams + load.ask(MORE)
    while not (len(waiting_at(load, load.engines[0])) >= FEW and load.held()):
        await asyncio.sleep(0.05)
        asked += load.ask(FEW)  # the engines may have taken all the others at once
    await load.fault(load.engines[1], kind="none")
    return asked


def waiting_at(load, engine):
    """Ids of the requests that went there and had no byte yet."""
    begun = {each.id for each in load.asked if each.begun}
    return {name for name, tries in load.sent().items() if tries[-1] == engine.name} - begun


def begun_at(load, engine):
    """Ids of the requests whose first tokens the engine sent, as far as clients know by now."""
    sent = load.sent()
    return {each.id for each in load.asked if each.begun and sent[each.id][-1] == engine.name}


def moved_from(load, engine):
    """Ids of the requests that went out more than once; they left no other engine than this one."""
    moved = {name: tries for name, tries in load.sent().items() if len(tries) > 1}
    assert {left for tries in moved.values() for left in tries[:-1]} <= {engine.name}
    return moved.keys()


def test_a_killed_engine_loses_only_the_streams_it_was_sending(tmp_path):
    async def check():
        async with loaded(tmp_path) as load:
            victim = load.engines[0]
            asked = await in_mid_load(load)
            victim.kill()
            await load.answered()
            lost = {each.id for each in asked if not each.whole}
            assert lost and all(each.broken and each.cut for each in asked if each.id in lost)
            assert lost <= begun_at(load, victim)
            assert moved_from(load, victim)
            assert load.front.workers.named(victim.name).state.value == "down"

    run(check())


def test_a_hung_engine_loses_the_streams_it_was_sending_and_returns_when_it_wakes(tmp_path):
    async def check():
        limits = {"idle_timeout_s": 0.7}
        async with loaded(tmp_path, limits=limits) as load:
            victim = load.engines[0]
            worker = load.front.workers.named(victim.name)
            asked = await in_mid_load(load)
            await load.fault(victim, kind="hang")
            await until(lambda: worker.state.value == "down", "the health checks' word")
            await load.answered()
            lost = {each.id for each in asked if not each.whole}
            assert lost and all(each.broken and each.cut for each in asked if each.id in lost)
            assert lost <= begun_at(load, victim)
            before = len(victim.requests())
            await load.fault(victim, kind="none")
            await until(worker.takes_work, "the return")
            again = load.ask(40)
            await load.answered()
            assert all(each.whole for each in again) and len(victim.requests()) > before
            moved_from(load, victim)

    run(check())


def test_an_engine_that_hangs_and_wakes_in_time_loses_nothing(tmp_path):
    async def check():
        async with loaded(tmp_path) as load:
            victim = load.engines[0]
            asked = await in_mid_load(load)
            await load.fault(victim, kind="hang", for_s=1.0)
            await load.answered()
            assert [each.id for each in asked if not each.whole] == []
            moved_from(load, victim)

    run(check())


def test_a_slow_engine_gets_less_and_loses_nothing(tmp_path):
    async def check():
        async with loaded(tmp_path) as load:
            slow = load.engines[0]
            asked = await in_mid_load(load)
            await load.fault(slow, kind="none")
            before = [len(engine.requests()) for engine in load.engines]
            await load.fault(slow, kind="slow", factor=10)
            asked += load.ask(200, tokens=3)
            await until(lambda: sum(each.whole for each in asked[-200:]) > 150, "most of them")
            await load.fault(slow, kind="none")
            await load.answered()
            assert [each.id for each in asked if not each.whole] == []
            assert all(len(tries) == 1 for tries in load.sent().values())
            now = [len(engine.requests()) for engine in load.engines]
            assert now[0] - before[0] < now[1] - before[1]

    run(check())


def test_an_engine_is_removed_and_another_added_in_mid_load(tmp_path):
    async def check():
        async with loaded(tmp_path) as load:
            first = load.engines[0]
            asked = await in_mid_load(load)
            async with aiohttp.ClientSession(load.front.admin_url) as admin:
                spare = await load.add_engine()
                async with admin.post("/workers", json=spare.instance) as answer:
                    assert answer.status == 201
                url = f"/workers/{first.name}"
                await load.fault(first, kind="none")
                async with admin.delete(url, params={"timeout_s": "0.05"}) as answer:
                    assert answer.status == 200
            asked += load.ask(50)
            await load.answered()
            assert [each.id for each in asked if not each.whole] == []
            moved_from(load, first)
            assert spare.requests()
            assert [worker.name for worker in load.front.workers] == ["engine-1", spare.name]

    run(check())
