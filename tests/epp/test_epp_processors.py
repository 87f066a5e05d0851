"""Streams in one process, decisions in another: what goes between them, without the socket."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from parts import TINY, Apart, Envoy, Stage

from headway.core.events import Cancelled, Role
from headway.core.request import Slo
from headway.front.errors import Refusal
from headway.hosts.envoy import wire
from headway.hosts.envoy.desk import Answer, Asked, Served
from headway.hosts.envoy.stream import Streams, Tools


def asked(name="a", tokens=10, **more):
    return Asked(name, 0.0, "/v1/completions", None, False, None, tokens, True, Slo(1.0, 0.1), 0, 1, **more)


MESSAGES = [
    wire.Start(b"{}", 9002, b"", b"", b"", True, False),
    wire.Up("port taken"),
    wire.Place(1, asked(phase=Role.PREFILL, subset=frozenset({"10.0.0.1:80"}), prefix=(-(2**62), 5))),
    wire.Second(2, "a", None),
    wire.Aside(3, Role.DECODE, frozenset()),
    wire.Withdraw(1),
    wire.Placed(1, Answer("10.0.0.1:80", "k-1", {"x-data-parallel-rank": "3"})),
    wire.Denied(2, 429, "flow_full", "3 requests wait", "messages", 1.5),
    wire.Told("k-1", "envoy", "ipv4:10.1.0.1:40000"),
    wire.FirstByte("k-1"),
    wire.Tokens("k-1", 10, None),
    wire.Over("k-1", Served(502, ttft_s=0.5, endpoint="10.0.0.2:80", unreached=True, blame=False), ""),
    wire.BrokeOff("envoy", Served(0), "ipv4:10.1.0.1:40000"),
    wire.Broke("ipv4:10.1.0.1:40000"),
    wire.Refused("/v1/completions", "a", 413, "body_too_large"),
    wire.Open(7),
    wire.Ready(True),
    wire.Drain(30.0),
    wire.Drained(True),
]


@given(st.lists(st.sampled_from(MESSAGES), max_size=8), st.integers(1, 40))
def test_messages_come_as_they_were_sent_however_the_socket_cuts_them(messages, piece):
    came = []
    to = wire.Link(came.append, lambda: None)
    link = wire.Link(lambda message: None, lambda: None)

    class Cutter:
        def write(self, data):
            for start in range(0, len(data), piece):
                to.data_received(data[start : start + piece])

    link._transport = Cutter()
    for message in messages:
        link.send(message)
    assert came == messages


def test_a_message_that_cannot_be_read_costs_itself_only():
    came = []
    link = wire.Link(came.append, lambda: None)
    link.data_received(b"\x00\x00\x00\x02\xff\xff")
    own = wire.Link(lambda message: None, lambda: None)
    own._transport = type("To", (), {"write": lambda self, data: link.data_received(data)})()
    own.send(wire.Open(1))
    assert came == [wire.Open(1)]


async def turn():
    for _ in range(10):
        await asyncio.sleep(0)


def test_what_is_placed_and_over_leaves_nothing():
    async def run():
        stage = Stage()
        desk = Apart(stage.picks).desk
        answer = await desk.place(asked())
        assert answer.endpoints == "10.0.0.0:8000"
        assert stage.picks.under_way == 1
        desk.over(answer.key, Served(200))
        stage.nothing_left()

    asyncio.run(run())


def test_a_refusal_keeps_its_status_reason_and_when_to_try_again():
    async def run():
        stage = Stage(limits={"buffer_requests": 1}, policy="parts:Crowd:most=9")
        desk = Apart(stage.picks).desk
        held = asyncio.create_task(desk.place(asked("a")))
        await turn()
        with pytest.raises(Refusal) as caught:
            await desk.place(asked("b"))
        assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (
            429,
            "buffer_requests",
            1.0,
        )
        held.cancel()
        await turn()
        stage.nothing_left()

    asyncio.run(run())


def test_a_client_that_goes_away_is_withdrawn():
    async def run():
        stage = Stage(policy="parts:Crowd:most=9")
        held = asyncio.create_task(Apart(stage.picks).desk.place(asked()))
        await turn()
        assert stage.picks.buffer.requests == 1
        held.cancel()
        await turn()
        assert len(stage.heard(Cancelled)) == 1
        stage.nothing_left()

    asyncio.run(run())


def test_an_answer_whose_client_left_while_it_came_is_given_back():
    async def run():
        stage = Stage()
        apart = Apart(stage.picks)
        held = asyncio.create_task(apart.desk.place(asked()))
        await asyncio.sleep(0)  # it has asked; its answer comes in a task of its own
        held.cancel()
        # The withdrawal is on its way, and so is the answer.
        apart.desk._send = lambda message: isinstance(message, wire.Withdraw) or apart.send(message)
        await asyncio.sleep(0)
        apart.desk._send = apart.send
        await turn()
        stage.nothing_left()


def test_what_is_withdrawn_before_it_was_looked_at_never_arrives():
    async def run():
        stage = Stage()
        apart = Apart(stage.picks)
        apart.send(wire.Place(1, asked()))
        apart.send(wire.Withdraw(1))
        await turn()
        assert not stage.arrived() and not apart.child._asked

    asyncio.run(run())

    asyncio.run(run())


@pytest.mark.parametrize(
    ("by_response", "told", "left"),
    [(False, False, 0), (False, True, 1), (True, True, 0)],
    ids=["Envoy has no answer yet", "Envoy's log will tell", "the answer passed by"],
)
def test_a_process_that_dies_takes_along_what_it_held_and_what_only_it_would_tell(by_response, told, left):
    async def run():
        stage = Stage(policy="parts:Crowd:most=2")
        apart = Apart(stage.picks, by_response=by_response)
        first = asyncio.create_task(apart.desk.place(asked("a")))
        second = asyncio.create_task(apart.desk.place(asked("b")))
        answer, other = await asyncio.gather(first, second)
        apart.desk.over(other.key, Served(200))
        if told:
            apart.desk.told(answer.key, "envoy")
        held = asyncio.create_task(apart.desk.place(asked("c")))
        await turn()
        apart.die()
        await turn()
        assert stage.picks.buffer.requests == 0
        assert stage.picks.under_way == left
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)

    asyncio.run(run())


def test_a_bug_of_ours_is_an_error_of_that_request_alone():
    class Broken:
        async def place(self, asked):
            raise KeyError("bug")

    async def run():
        desk = Apart(Broken()).desk
        with pytest.raises(Refusal, match="The picker failed"):
            await desk.place(asked())

    asyncio.run(run())


def test_a_whole_stream_over_a_desk_apart():
    async def run():
        stage = Stage()
        apart = Apart(stage.picks)
        tools = Tools(
            stage.config, apart.desk, stage.lengths, stage.reader, stage.clock.time, lambda *_: None
        )
        stage.streams = Streams(tools)
        envoy = Envoy(stage)
        envoy.headers()
        envoy.body(TINY)
        await envoy.turn()
        await envoy.turn()
        endpoint, in_metadata, key, *_ = envoy.destination
        assert endpoint == in_metadata == "10.0.0.0:8000"
        await envoy.end()
        apart.desk.over(key, Served(200))
        stage.nothing_left()

    asyncio.run(run())


def test_notes_reach_the_desk_in_order():
    heard = []

    class Notes:
        def __getattr__(self, name):
            return lambda *arguments: heard.append((name, *arguments))

    async def run():
        apart = Apart(Notes())
        apart.desk.told("k", "e", "ipv4:10.1.0.1:40000")
        apart.desk.first_byte("k")
        apart.desk.tokens("k", 3, 4)
        apart.desk.broke_off("e", Served(0), "ipv4:10.1.0.2:40000")
        apart.desk.broke("ipv4:10.1.0.1:40000")
        apart.send(wire.Refused("/v1/completions", "a", 413, "body_too_large"))
        apart.send(wire.Open(5))
        assert apart.refused == [("/v1/completions", "a", 413, "body_too_large")]
        assert apart.child.open == 5

    asyncio.run(run())
    assert heard == [
        ("told", "k", "e", "ipv4:10.1.0.1:40000"),
        ("first_byte", "k"),
        ("tokens", "k", 3, 4),
        ("broke_off", "e", Served(0), "ipv4:10.1.0.2:40000"),
        ("broke", "ipv4:10.1.0.1:40000"),
    ]
