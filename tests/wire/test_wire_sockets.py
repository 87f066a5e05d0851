"""Publisher and subscriber over real sockets: late joiners, gaps, restarts, garbage, nobody there."""

import asyncio
import socket
from contextlib import asynccontextmanager

import pytest
import zmq

from headway.core.errors import ConfigError
from headway.core.events import InstanceDown, InstanceUp, PassEnded, Role, Snapshot
from headway.wire import Publisher, Subscriber

ANY = "tcp://127.0.0.1:0"


class Engine:
    """An engine as far as its events go."""

    def __init__(self, epoch: int = 1) -> None:
        self.epoch, self.sequence, self.alive = epoch, 0, True

    def next(self) -> int:
        self.sequence += 1
        return self.sequence

    def ended(self) -> PassEnded:
        return PassEnded("e", self.epoch, self.next(), 0, 0.1, (1,))

    def snapshot(self):
        if not self.alive:
            return ()
        up = InstanceUp("e", Role.PREFILL, 1, 64, epoch=self.epoch)
        return (up, Snapshot("e", self.epoch, self.next(), 0, busy=False))


class Heard(list):
    """What a subscriber handed on."""

    def kinds(self):
        return [type(event).__name__ for event in self]

    def has(self, kind, **fields):
        return any(
            isinstance(event, kind) and all(getattr(event, k) == v for k, v in fields.items())
            for event in self
        )


async def until(condition, timeout_s=4.0):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def publishing(engine, events=ANY, snapshots=ANY):
    async with Publisher(events, snapshots, engine.snapshot) as publisher:
        yield publisher


@asynccontextmanager
async def listening(publisher, **options):
    heard = Heard()
    options = {"retry_s": 0.02, "silence_s": 60.0} | options
    async with Subscriber(
        publisher.endpoint, publisher.snapshot_endpoint, heard.append, **options
    ) as subscriber:
        yield subscriber, heard


async def connected(publisher, engine, heard):
    """Wait until the subscription has reached the publisher."""
    await until(lambda: heard.has(Snapshot))
    while not heard.has(PassEnded):
        publisher.publish(engine.ended())
        await asyncio.sleep(0.005)


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 10))


def test_who_comes_late_is_told_how_things_stand():
    async def scenario():
        engine = Engine(epoch=3)
        async with publishing(engine) as publisher:
            for _ in range(10):
                publisher.publish(engine.ended())
            async with listening(publisher) as (_, heard):
                await until(lambda: len(heard) >= 2)
        assert heard.kinds()[:2] == ["InstanceUp", "Snapshot"]
        assert heard[0].epoch == 3
        assert heard[1].sequence == 11

    run(scenario())


def test_a_lost_event_is_made_good_by_a_snapshot():
    async def scenario():
        engine = Engine()
        async with publishing(engine) as publisher, listening(publisher) as (subscriber, heard):
            await connected(publisher, engine, heard)
            engine.ended()  # never sent
            after_gap = engine.ended()
            publisher.publish(after_gap)
            await until(lambda: after_gap in heard and isinstance(heard[-1], Snapshot))
            assert heard[-1].sequence > after_gap.sequence
            assert subscriber.gaps >= 1

    run(scenario())


def test_one_subscribers_snapshot_is_no_gap_to_another():
    async def scenario():
        engine = Engine()
        async with (
            publishing(engine) as publisher,
            listening(publisher) as (one, heard_one),
            listening(publisher) as (two, heard_two),
        ):
            await connected(publisher, engine, heard_one)
            await connected(publisher, engine, heard_two)
            one.request_snapshot()
            answered = engine.sequence + 1
            await until(lambda: heard_two.has(Snapshot, sequence=answered))
            gaps, sequence = two.gaps, engine.sequence
            last = engine.ended()
            publisher.publish(last)
            await until(lambda: last in heard_one and last in heard_two)
            assert two.gaps == gaps
            assert engine.sequence == sequence + 1  # nobody asked again

    run(scenario())


def endpoints():
    """Two addresses to come back to, below the ports that the kernel gives to those who connect.

    One who connects again and again to a port of theirs where nobody listens ends up connected to itself.
    """
    found = []
    for port in range(21_000, 32_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(f"tcp://127.0.0.1:{port}")
        if len(found) == 2:
            return found
    raise AssertionError("no port is free")


def test_a_publisher_that_restarts_is_found_again_in_its_new_epoch():
    async def scenario():
        async with (
            publishing(Engine(epoch=1), *endpoints()) as first,
            listening(first, silence_s=0.05) as (_, heard),
        ):
            await until(lambda: heard.has(InstanceUp, epoch=1))
            first.close()
            async with publishing(Engine(epoch=2), first.endpoint, first.snapshot_endpoint):
                await until(lambda: heard.has(Snapshot, epoch=2))
        assert [event.epoch for event in heard if isinstance(event, InstanceUp)] == [1, 2]

    run(scenario())


def test_a_subscriber_waits_for_a_publisher_that_is_not_there_yet():
    async def scenario():
        events, snapshots = endpoints()
        heard = Heard()
        async with Subscriber(events, snapshots, heard.append, retry_s=0.02):
            await asyncio.sleep(0)
            async with publishing(Engine(epoch=9), events, snapshots):
                await until(lambda: heard.has(InstanceUp, epoch=9))

    run(scenario())


def test_an_engine_that_is_down_does_not_answer_and_is_asked_again():
    async def scenario():
        engine = Engine()
        engine.alive = False
        async with publishing(engine) as publisher, listening(publisher) as (subscriber, heard):
            await until(lambda: publisher.answer() == 0)
            assert not heard
            engine.alive = True
            await until(lambda: heard.has(Snapshot))
            assert subscriber.snapshots >= 1

    run(scenario())


def test_a_goodbye_arrives_though_the_publisher_closes_at_once():
    async def scenario():
        engine = Engine()
        async with publishing(engine) as publisher, listening(publisher) as (_, heard):
            await connected(publisher, engine, heard)
            publisher.publish(InstanceDown("e"))
            publisher.close()
            await until(lambda: heard.has(InstanceDown))

    run(scenario())


def test_garbage_is_counted_and_does_not_end_the_subscription():
    async def scenario():
        engine = Engine()
        async with publishing(engine) as publisher, listening(publisher) as (subscriber, heard):
            await connected(publisher, engine, heard)
            publisher._events.send_multipart([b"headway.pass/1/e", b"\xc1"])
            publisher._events.send_multipart([b"headway.pass/2/e", b"\x80"])
            last = engine.ended()
            publisher.publish(last)
            await until(lambda: last in heard)
            assert subscriber.garbage == 2

    run(scenario())


def test_a_listener_that_fails_is_reported_and_hears_the_next_event():
    async def scenario():
        engine, heard, reported = Engine(), Heard(), []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))

        def listen(event):
            heard.append(event)
            if isinstance(event, InstanceUp):
                raise ValueError("broken")

        async with (
            publishing(engine) as publisher,
            Subscriber(publisher.endpoint, publisher.snapshot_endpoint, listen),
        ):
            await until(lambda: heard.has(Snapshot))
        assert [str(context["exception"]) for context in reported] == ["broken"]

    run(scenario())


def test_strange_requests_are_ignored():
    async def scenario():
        engine = Engine()
        async with publishing(engine) as publisher:
            with zmq.Context.instance().socket(zmq.DEALER) as stranger:
                stranger.linger = 0
                stranger.connect(publisher.snapshot_endpoint)
                stranger.send_multipart([b"", b"GET / HTTP/1.1"])
                async with listening(publisher) as (_, heard):
                    await until(lambda: heard.has(Snapshot))
                assert not stranger.poll(0)

    run(scenario())


def test_nobody_who_listens_slowly_holds_the_engine_up():
    async def scenario():
        engine = Engine()
        async with publishing(engine) as publisher:
            with zmq.Context.instance().socket(zmq.SUB) as slow:
                slow.setsockopt(zmq.SUBSCRIBE, b"")
                slow.setsockopt(zmq.RCVHWM, 1)
                slow.linger = 0
                slow.connect(publisher.endpoint)
                started_s = asyncio.get_running_loop().time()
                for _ in range(20_000):
                    publisher.publish(engine.ended())
                assert asyncio.get_running_loop().time() - started_s < 3.0

    run(scenario())


def test_without_snapshots_events_are_handed_on_as_they_come():
    async def scenario():
        engine, heard = Engine(), Heard()
        async with Publisher(ANY) as publisher, Subscriber(publisher.endpoint, None, heard.append):
            while not heard:
                publisher.publish(engine.ended())
                await asyncio.sleep(0.005)
        assert isinstance(heard[0], PassEnded)

    run(scenario())


@pytest.mark.parametrize("endpoint", ["tcp://nowhere.invalid:1", "carrier-pigeon://x", "tcp://127.0.0.1"])
def test_an_endpoint_that_cannot_be_is_a_configuration_error(endpoint):
    with pytest.raises(ConfigError, match="cannot bind pass events"):
        Publisher(endpoint)


def test_a_taken_port_is_a_configuration_error_and_leaves_nothing_open():
    async def scenario():
        async with publishing(Engine()) as publisher:
            with pytest.raises(ConfigError, match=r"cannot bind pass events to .*in use"):
                Publisher(ANY, publisher.endpoint)

    run(scenario())


@pytest.mark.parametrize("turns", range(4))
def test_a_subscriber_that_is_woken_to_ask_as_it_closes_does_close(turns):
    async def scenario():
        async with publishing(Engine()) as publisher, listening(publisher) as (subscriber, heard):
            await until(lambda: heard.has(Snapshot))
            subscriber.request_snapshot()
            for _ in range(turns):
                await asyncio.sleep(0)

    run(scenario())


def test_a_subscriber_says_which_endpoint_cannot_be():
    async def scenario():
        with pytest.raises(ConfigError, match="cannot connect to pass events at 'tcp://no port'"):
            async with Subscriber("tcp://no port", None, print):
                pass

    run(scenario())
