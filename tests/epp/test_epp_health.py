"""What the picker makes of answers that Envoy reports: full engines are held back, poison ejects none."""

import asyncio

import parts
import pytest
from parts import Envoy, Stage

from headway.front.model_catalog import ModelCard
from headway.front.workers import Workers
from headway.hosts.envoy.desk import Served


@pytest.fixture
def make_stage(monkeypatch):
    """Build a stage whose engines have the real health and limits; no engine is checked."""

    def make(**tables):
        stages = []

        def live(config):
            workers = Workers(
                config,
                None,
                lambda event: stages[0].driver.feed(event),
                clock=lambda: stages[0].clock.now if stages else 0.0,
                call_at=lambda *timer: stages[0].clock.call_at(*timer),
            )
            for spec in config.instances:
                worker = workers._create(spec)
                worker.health.admit(0.0)
                worker.inference = parts.NoInference()
                worker.models = {"tiny": ModelCard(id="tiny", max_model_len=1000)}
                worker.asked_for_models = True
                workers._changed(worker)
            return workers

        class Live(Stage):
            def __init__(self, **tables):
                stages.append(self)
                self.clock = parts.Clock()
                super().__init__(**tables)

        monkeypatch.setattr(parts, "Workers", live)
        return Live(**tables)

    return make


def run(test):
    async def bounded():
        async with asyncio.timeout(5.0):
            await test

    asyncio.run(bounded())


async def ask(stage):
    """Ask for a place; return the stream, which has its answer if there was one."""
    envoy = Envoy(stage)
    envoy.headers()
    envoy.body()
    await envoy.turn()
    return envoy


def placed(envoy):
    return bool(envoy.heard) and any(each.HasField("dynamic_metadata") for each in envoy.heard)


async def end(stage, envoy, status):
    """Let Envoy report how a request ended."""
    await envoy.end()
    stage.picks.over(envoy.destination[2], Served(status))
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("full", [503, 429])
def test_an_engine_that_answers_that_it_is_full_gets_what_it_takes_and_is_not_ejected(make_stage, full):
    async def test():
        stage = make_stage(roles=["aggregated"])
        streams = [await ask(stage) for _ in range(8)]
        for refused in streams[4:]:
            await end(stage, refused, full)
        stage.clock.advance(1.0)
        worker = stage.workers.get("e0")
        assert worker.limit.limit == 4 and worker.limit.refusals == 4
        waiting = await ask(stage)
        assert not placed(waiting)
        await end(stage, streams[0], 200)
        assert placed(waiting)
        for envoy in (*streams[1:4], waiting):
            await end(stage, envoy, 200)
        assert worker.state.value == "up" and worker.health.failures == 0
        assert stage.oddities["backpressure"] == 4
        stage.nothing_left()

    run(test())


def test_requests_that_fail_at_every_engine_eject_none(make_stage):
    async def test():
        stage = make_stage(roles=["aggregated"] * 3)
        for number in range(60):
            good, bad = await ask(stage), await ask(stage)
            await end(stage, bad, 500)
            await end(stage, good, 200)
            assert stage.workers.ready(), number
        assert [worker.health.ejections for worker in stage.workers] == [0, 0, 0]

    run(test())


def test_an_engine_that_fails_what_it_is_given_while_others_serve_is_ejected(make_stage):
    async def test():
        stage = make_stage(roles=["aggregated"] * 3)
        broken = stage.workers.get("e1")
        for _ in range(60):
            envoy = await ask(stage)
            await end(stage, envoy, 500 if envoy.destination[0] == "10.0.0.1:8000" else 200)
        assert [worker.health.ejections for worker in stage.workers] == [0, 1, 0]
        assert broken.state.value == "ejected"

    run(test())


def test_the_last_engine_is_not_ejected_for_its_answers(make_stage):
    async def test():
        stage = make_stage(roles=["aggregated"])
        for _ in range(40):
            await end(stage, await ask(stage), 500)
        assert stage.workers.get("e0").state.value == "up"

    run(test())


def test_what_the_policy_does_not_place_waits_for_an_engine_too(make_stage):
    async def test():
        stage = make_stage(roles=["aggregated"])
        worker = stage.workers.get("e0")
        stage.workers.drain("e0")
        envoy = Envoy(stage)
        envoy.headers("/v1/models", method="GET", ends=True)
        await envoy.turn()
        assert not envoy.heard
        stage.workers.undrain("e0")
        await envoy.turn()
        assert placed(envoy)
        await end(stage, envoy, 200)
        assert worker.takes_work()
        stage.nothing_left()

    run(test())
