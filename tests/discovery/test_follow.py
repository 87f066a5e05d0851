"""The workers follow what a source tells: the newest set, drains at once, operators' drains left alone."""

import asyncio

from headway.core.errors import ConfigError
from headway.front.config import InstanceSpec
from headway.front.discovery import Discovery, Found


def spec(name, port=8000):
    return InstanceSpec(name=name, url=f"http://10.0.0.1:{port}")


class Worker:
    def __init__(self, spec):
        self.spec, self.draining = spec, False


class Workers:
    """Those that were reconciled; `go` lets a reconciliation end."""

    def __init__(self):
        self.there, self.sets, self.fails = {}, [], None
        self.go = asyncio.Event()
        self.go.set()

    async def reconcile(self, instances, *, timeout_s):
        self.sets.append([each.name for each in instances])
        await self.go.wait()
        if self.fails is not None:
            raise self.fails
        kept = {name: worker for name, worker in self.there.items() if worker.spec in instances}
        self.there = {each.name: kept.get(each.name) or Worker(each) for each in instances}

    def get(self, name):
        return self.there.get(name)

    def drain(self, name):
        self.there[name].draining = True
        return self.there[name]

    def undrain(self, name):
        self.there[name].draining = False


class Source:
    """Tells what a test says."""

    def check(self):
        pass

    async def follow(self, tell):
        self.tell = tell
        tell(Found(()))
        await asyncio.Event().wait()


def following(test):
    async def check():
        workers, source = Workers(), Source()
        discovery = Discovery(source, workers, timeout_s=1.0)
        await discovery.start()
        await test(workers, source.tell)
        await discovery.stop()

    asyncio.run(asyncio.wait_for(check(), 5.0))


async def settled():
    for _ in range(5):
        await asyncio.sleep(0)


def test_of_several_sets_that_wait_only_the_last_is_brought_about():
    async def test(workers, tell):
        workers.go.clear()
        for name in "abc":
            tell(Found((spec(name),)))
            await settled()
        workers.go.set()
        await settled()
        assert workers.sets == [[], ["a"], ["c"]] and list(workers.there) == ["c"]

    following(test)


def test_what_drains_gets_nothing_new_in_the_call_that_tells_it_also_while_another_set_is_brought_about():
    async def test(workers, tell):
        one, other = spec("a"), spec("b")
        tell(Found((one,)))
        await settled()
        workers.go.clear()
        tell(Found((one, other)))
        await settled()
        tell(Found((one, other), frozenset("a")))
        assert workers.there["a"].draining
        workers.go.set()
        await settled()
        assert workers.there["a"].draining and not workers.there["b"].draining
        tell(Found((one, other)))
        assert not workers.there["a"].draining

    following(test)


def test_one_that_drains_when_it_comes_drains_from_then_on():
    async def test(workers, tell):
        tell(Found((spec("a"),), frozenset("a")))
        await settled()
        assert workers.there["a"].draining

    following(test)


def test_an_operators_own_drain_is_not_taken_back():
    async def test(workers, tell):
        tell(Found((spec("a"),)))
        await settled()
        workers.drain("a")
        tell(Found((spec("a"),), frozenset("a")))
        tell(Found((spec("a"),)))
        await settled()
        assert workers.there["a"].draining

    following(test)


def test_another_engine_of_the_same_name_does_not_inherit_the_drain():
    async def test(workers, tell):
        tell(Found((spec("a"),)))
        await settled()
        tell(Found((spec("a"),), frozenset("a")))
        tell(Found((spec("a", 9000),)))
        await settled()
        assert workers.there["a"].spec.url.endswith(":9000") and not workers.there["a"].draining

    following(test)


def test_a_set_that_cannot_be_brought_about_is_one_line_and_the_next_one_counts(caplog):
    async def test(workers, tell):
        workers.fails = ConfigError("there is a worker 'a' already")
        tell(Found((spec("a"),)))
        await settled()
        workers.fails = None
        tell(Found((spec("b"),)))
        await settled()
        assert list(workers.there) == ["b"]

    following(test)
    assert caplog.messages == ["an engine that was found cannot be added: there is a worker 'a' already"]


def test_a_source_that_fails_in_a_way_nobody_thought_of_is_followed_again(caplog, monkeypatch):
    monkeypatch.setattr("headway.front.discovery.follow.AGAIN_S", 0.0)

    class Broken(Source):
        fails = 1

        async def follow(self, tell):
            if self.fails:
                self.fails -= 1
                raise RuntimeError("a bug")
            await super().follow(tell)

    async def check():
        workers = Workers()
        discovery = Discovery(Broken(), workers, timeout_s=1.0)
        await discovery.start()
        assert workers.sets == [[]]
        await discovery.stop()

    asyncio.run(asyncio.wait_for(check(), 5.0))
    assert caplog.messages == ["discovery failed"]
