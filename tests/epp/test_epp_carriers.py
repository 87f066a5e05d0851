"""Requests end with the Envoy that carries them, and by the word of nobody else."""

import asyncio

from parts import Envoy, Stage

from headway.hosts.envoy.accounting import AccessLogs
from headway.hosts.envoy.carriers import Carriers
from headway.hosts.envoy.connections import Connections
from headway.hosts.envoy.desk import Served
from headway.hosts.envoy.messages import StreamAccessLogsMessage

ONE, TWO, THREE = (f"ipv4:10.1.0.{number}:40000" for number in (1, 2, 3))


def run(test):
    asyncio.run(asyncio.wait_for(test, 5.0))


def carriers(**keys):
    """Return carriers with a grace of 2 s; keyword arguments: key → connection."""
    made = Carriers(2.0)
    for key, peer in keys.items():
        made.carry(key, peer)
    return made


# The rules, by themselves


def test_what_a_broken_connection_carries_is_lost_after_the_grace():
    c = carriers(a=ONE, b=ONE, other=TWO)
    c.broke(ONE, now=10.0)
    assert c.wake_at() == 12.0
    assert c.lost(11.9) == set()
    assert c.lost(12.0) == {"a", "b"}
    assert c.wake_at() is None
    assert c.lost(100.0) == set()


def test_a_request_that_is_over_by_then_is_not_lost():
    c = carriers(a=ONE, b=ONE)
    c.broke(ONE, now=0.0)
    c.over("a")
    assert c.lost(2.0) == {"b"}
    c = carriers(a=ONE)
    c.broke(ONE, now=0.0)
    c.over("a")
    assert c.wake_at() is None


def test_an_envoy_that_reports_a_key_after_it_reconnected_keeps_the_rest():
    c = carriers(a=ONE, b=ONE)
    c.broke(ONE, now=0.0)
    c.prove("a", TWO)
    c.over("a")
    assert c.lost(9.0) == set()
    c.broke(TWO, now=10.0)
    assert c.lost(12.0) == {"b"}


def test_of_an_envoy_with_several_connections_the_one_that_logs_stands_for_the_others():
    c = carriers(a=ONE, b=ONE, c=TWO)
    c.prove("a", TWO)
    c.broke(ONE, now=0.0)
    assert c.wake_at() is None
    c.broke(TWO, now=1.0)
    assert c.lost(3.0) == {"a", "b", "c"}


def test_all_connections_of_an_envoy_that_dies_break_in_whatever_order():
    for first, second in ((ONE, TWO), (TWO, ONE)):
        c = carriers(a=ONE, b=TWO)
        c.prove("a", TWO)
        c.broke(first, now=0.0)
        c.broke(second, now=0.0)
        assert c.lost(2.0) == {"a", "b"}


def test_a_report_by_id_is_believed_from_the_connection_that_carries_the_request_alone():
    c = carriers(a=ONE)
    assert c.believes("a", ONE)
    assert not c.believes("a", TWO)
    assert not c.believes("unknown", ONE)


def test_a_report_by_id_that_came_before_the_proof_is_believed_with_it():
    c = carriers(a=ONE, b=ONE)
    assert not c.believes("b", TWO)
    assert not c.believes("b", THREE)
    assert c.prove("a", TWO) == {"b"}
    assert c.believes("b", TWO)
    assert not c.believes("b", THREE)


def test_a_claim_goes_with_its_request_and_claims_are_bounded(monkeypatch):
    c = carriers(a=ONE, b=ONE, c=ONE)
    c.believes("a", TWO)
    c.over("a")
    assert not c._claims
    monkeypatch.setattr("headway.hosts.envoy.carriers.MOST_CLAIMS", 1)
    c.carry("d", ONE)
    c.believes("b", TWO)
    c.believes("d", TWO)
    assert c.prove("c", TWO) == {"b"}


def test_a_port_that_is_used_again_does_not_inherit():
    c = carriers(a=ONE)
    c.broke(ONE, now=0.0)
    assert c.lost(2.0) == {"a"}
    c.carry("b", ONE)
    assert c.lost(9.0) == set()


# Through the picker's parts


async def under_way(stage, *peers, **headers):
    """Let an Envoy at each peer have a request under way; return their streams."""
    envoys = [Envoy(stage, peer=peer) for peer in peers]
    for number, envoy in enumerate(envoys):
        envoy.headers(x_request_id=f"r{number}", **headers)
        envoy.body()
        await envoy.turn()
        await envoy.end()
    return envoys


def by_id(request_id):
    return StreamAccessLogsMessage(http_logs={"log_entry": [{"request": {"request_id": request_id}}]})


def by_key(key):
    message = StreamAccessLogsMessage()
    entry = message.http_logs.log_entry.add(response={"response_code": {"value": 200}})
    entry.common_properties.metadata.filter_metadata["headway"].update({"key": key})
    return message


def test_of_two_envoys_only_the_dead_ones_requests_are_settled():
    async def test():
        stage = Stage(accounting={"reconnect_s": 1.5})
        _, other = await under_way(stage, ONE, TWO)
        stage.picks.broke(ONE)
        stage.clock.advance(1.4)
        assert stage.picks.under_way == 2
        stage.clock.advance(1.5)
        assert stage.picks.under_way == 1
        assert stage.oddities["envoy_gone"] == 1
        assert [status for _, status in stage.done] == [499]
        stage.picks.over(other.destination[2], Served(200), TWO)
        stage.nothing_left()

    run(test())


def test_room_that_a_dead_envoy_took_is_free_again_within_seconds():
    async def test():
        stage = Stage(limits={"concurrent_requests": 2})
        await under_way(stage, ONE, ONE)
        (refused,) = await under_way(stage, TWO)
        assert refused.refusal[0] == 429
        stage.picks.broke(ONE)
        stage.clock.advance(2.0)
        (served,) = await under_way(stage, TWO)
        assert served.destination[0] in ("10.0.0.0:8000", "10.0.0.1:8000")

    run(test())


def test_an_entry_that_names_anothers_request_by_its_id_ends_nothing():
    async def test():
        stage = Stage()
        await under_way(stage, ONE)
        logs = AccessLogs(stage.picks)
        logs.hear(by_id("r0"), TWO)
        assert stage.picks.under_way == 1 and stage.oddities["not_its_envoy"] == 1
        logs.hear(by_id("r0"), ONE)
        stage.nothing_left()

    run(test())


def test_keys_cannot_be_guessed_from_one_another():
    async def test():
        stage = Stage()
        keys = [envoy.destination[2] for envoy in await under_way(stage, ONE, ONE, ONE)]
        assert all(len(key) >= 20 for key in keys)
        prefixes = {key[:8] for key in keys} | {key[-8:] for key in keys}
        assert len(prefixes) == 6

    run(test())


def test_an_envoy_that_reconnects_goes_on_where_it_was():
    async def test():
        stage = Stage()
        first, second = await under_way(stage, ONE, ONE)
        stage.picks.broke(ONE)
        logs = AccessLogs(stage.picks)
        logs.hear(by_key(first.destination[2]), TWO)
        stage.clock.advance(60.0)
        assert stage.picks.under_way == 1
        logs.hear(by_key(second.destination[2]), TWO)
        stage.nothing_left()
        assert [status for _, status in stage.done] == [200, 200]

    run(test())


# What is looked at


def test_a_connection_that_is_gone_is_told_once():
    broke, there = [], {ONE, TWO}
    connections = Connections(broke.append, lambda: set(there))
    connections.note(ONE)
    connections.look()
    assert broke == []
    there.discard(ONE)
    connections.look()
    connections.look()
    assert broke == [ONE]
    connections.note(ONE)  # by a stream that was placed in the same moment
    connections.look()
    assert broke == [ONE, ONE]
