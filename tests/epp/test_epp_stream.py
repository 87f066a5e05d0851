"""What Envoy is answered, message by message, without a network."""

import asyncio
import json

import grpc
import pytest
from parts import TINY, AbortedError, Envoy, Stage

from headway.core.actions import Recall
from headway.core.events import Cancelled, Failed, Finished, InstanceDraining, PrefillDone
from headway.front.requests import Call
from headway.hosts.envoy.accounting import AccessLogs
from headway.hosts.envoy.desk import Served
from headway.hosts.envoy.messages import (
    BUFFERED,
    STREAMED,
    ProcessingRequest,
    StreamAccessLogsMessage,
)
from headway.testing import pass_ended


def run(test):
    async def bounded():
        async with asyncio.timeout(5.0):
            await test

    asyncio.run(bounded())


def kinds(envoy):
    return [each.WhichOneof("kind") for each in envoy.heard]


def code(refusal):
    return json.loads(refusal[2])["error"]["code"]


# The request


def test_full_duplex_nothing_is_answered_before_the_place_is_known():
    async def test():
        stage = Stage()
        envoy = Envoy(stage)
        envoy.headers()
        envoy.body(b'{"messages": [{"role": "user",', ends=False)
        await envoy.turn()
        assert envoy.heard == []
        envoy.body(b'"content": "hello"}]}')
        await envoy.turn()
        assert kinds(envoy) == ["request_headers", "request_body", "request_body"]
        header, metadata, key, _, removed = envoy.destination
        assert header == metadata == "10.0.0.0:8000"
        assert "x-prefiller-host-port" in removed and "x-data-parallel-rank" in removed
        pieces = [each.request_body.response.body_mutation.streamed_response for each in envoy.heard[1:]]
        assert [(piece.body, piece.end_of_stream) for piece in pieces] == [
            (b'{"messages": [{"role": "user",', False),
            (b'"content": "hello"}]}', True),
        ]
        await envoy.end()
        stage.picks.over(key, Served(200))
        stage.nothing_left()
        assert len(stage.heard(Finished)) == 1

    run(test())


def test_full_duplex_trailers_come_back_after_the_body():
    async def test():
        stage = Stage()
        envoy = Envoy(stage)
        envoy.headers()
        envoy.body(ends=False)
        envoy.say(request_trailers={})
        await envoy.turn()
        assert kinds(envoy) == ["request_headers", "request_body", "request_trailers"]
        assert not envoy.heard[1].request_body.response.body_mutation.streamed_response.end_of_stream
        await envoy.end()

    run(test())


def test_buffered_headers_go_on_and_the_body_is_answered_with_the_place():
    async def test():
        stage = Stage(limits={"queue_timeout_s": 30.0})
        envoy = Envoy(stage, mode=BUFFERED)
        envoy.headers()
        await envoy.turn()
        assert kinds(envoy) == ["request_headers"] and not envoy.heard[0].HasField("dynamic_metadata")
        envoy.body()
        await envoy.turn()
        assert kinds(envoy) == ["request_headers", None, "request_body"]
        assert envoy.heard[1].override_message_timeout.seconds == 31
        assert not envoy.heard[2].request_body.response.HasField("body_mutation")
        assert envoy.destination[0] == "10.0.0.0:8000"
        await envoy.end()

    run(test())


@pytest.mark.parametrize(
    ("path", "body", "tokens"),
    [
        ("/v1/messages", b'{"messages":[{"role":"user","content":"x"}],"max_tokens":9}', 9),
        ("/v1/responses", b'{"input":"x","max_output_tokens":9}', 9),
        ("/generate", b'{"text":"x","sampling_params":{"max_new_tokens":9}}', 9),
    ],
)
def test_generations_of_other_apis_are_placed_by_the_policy_too(path, body, tokens):
    async def test():
        stage = Stage()
        envoy = Envoy(stage)
        envoy.headers(path)
        envoy.body(body)
        await envoy.turn()
        assert envoy.destination[0].startswith("10.0.0.") and stage.driver.requests == 1
        assert [request.max_output_tokens for request in stage.arrived()] == [tokens]
        await envoy.end()

    run(test())


def test_without_a_body_the_headers_are_answered_with_a_place():
    async def test():
        stage = Stage()
        envoy = Envoy(stage, mode=0)
        envoy.headers("/v1/models", method="GET", ends=True)
        await envoy.turn()
        assert kinds(envoy) == ["request_headers"] and envoy.destination[0] == "10.0.0.0:8000"
        assert stage.arrived() == []
        await envoy.end()
        stage.picks.over(envoy.destination[2], Served(200))
        stage.nothing_left()

    run(test())


def test_the_rank_is_a_header_or_a_port():
    async def test(rank_by, expected):
        spec = {"name": "e", "url": "http://10.0.0.1:8000", "ranks": 2, "rank_by": rank_by, "lockstep": False}
        stage = Stage("round-robin", instances=[spec])
        told = []
        for _ in range(2):
            envoy = Envoy(stage)
            envoy.headers()
            envoy.body()
            await envoy.turn()
            header, _, _, headers, _ = envoy.destination
            told.append((header, headers.get("x-data-parallel-rank")))
            await envoy.end()
        assert told == expected

    run(test("header", [("10.0.0.1:8000", "0"), ("10.0.0.1:8000", "1")]))
    run(test("port", [("10.0.0.1:8000", None), ("10.0.0.1:8001", None)]))


def test_fallbacks_follow_in_order_of_what_is_under_way():
    async def test():
        stage = Stage("round-robin", roles=["aggregated"] * 4, picker={"fallbacks": 2})
        stage.workers.list[1].legs.add("busy")
        envoy = Envoy(stage)
        envoy.headers()
        envoy.body()
        await envoy.turn()
        header, metadata, *_ = envoy.destination
        assert header == metadata == "10.0.0.0:8000,10.0.0.2:8000,10.0.0.3:8000"
        await envoy.end()

    run(test())


@pytest.mark.parametrize(("mode", "pieces"), [(4, [TINY]), (BUFFERED, [])])
def test_of_a_held_request_only_what_goes_back_is_kept(mode, pieces):
    async def test():
        stage = Stage("staggered", roles=["aggregated"])
        stage.driver.feed(InstanceDraining("e0"))
        envoy = Envoy(stage, mode=mode)  # held: the policy has nowhere to send it
        envoy.headers()
        envoy.body()
        await envoy.turn()
        assert (stage.picks.buffer.requests, stage.picks.buffer.bytes) == (1, len(TINY))
        pick = stage.driver._waiters[stage.arrived()[0].id]
        assert pick.call.body == b""
        assert bodies_in(envoy.task) == pieces
        envoy.task.cancel()
        await asyncio.gather(envoy.task, return_exceptions=True)
        assert stage.heard(Cancelled)[-1].request_id == pick.request.id
        assert (stage.picks.buffer.requests, stage.picks.buffer.bytes) == (0, 0)

    run(test())


def bodies_in(task):
    """Return the distinct bodies that the frames of a waiting task hold."""
    found, frame = [], task.get_coro()
    while hasattr(frame, "cr_frame") and frame.cr_frame is not None:
        for value in frame.cr_frame.f_locals.values():
            values = value if isinstance(value, list) else [value]
            found += [each for each in values if isinstance(each, bytes) and each not in found]
            found += [each.body for each in [value] if isinstance(value, Call) and each.body not in found]
            assert not isinstance(value, ProcessingRequest)
        frame = frame.cr_await
    return found


# Refusals


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"not json", (400, "invalid_json")),
        (b'{"messages": []}', (400, "invalid_request")),
        (
            b'{"messages": [{"role": "user", "content": "x"}], "kv_transfer_params": {}}',
            (400, "invalid_request"),
        ),
        (b'{"model": "other", "messages": [{"role": "user", "content": "x"}]}', (404, "model_not_found")),
        (b"x" * 101, (413, "body_too_large")),
        (b"\xff\xfe", (400, "invalid_json")),
    ],
)
@pytest.mark.parametrize("mode", [4, BUFFERED])
def test_bad_bodies_are_answered_in_the_shape_clients_know(mode, body, expected):
    async def test():
        stage = Stage(limits={"max_body_bytes": 100})
        envoy = Envoy(stage, mode=mode)
        envoy.headers()
        envoy.body(body)
        await envoy.task
        status, headers, _ = envoy.refusal
        assert (status, code(envoy.refusal)) == expected
        assert headers["content-type"] == "application/json"
        assert headers["x-headway-reason"] == expected[1] and len(stage.refused) == 1
        stage.nothing_left()

    run(test())


def test_without_an_engine_it_is_a_503_with_when_to_come_back():
    async def test():
        stage = Stage(limits={"no_engine_timeout_s": 0.02})
        for worker in stage.workers:
            worker.draining = True
            stage.driver.feed(InstanceDraining(worker.name))
        envoy = Envoy(stage)
        envoy.headers()
        envoy.body()
        await envoy.task
        status, headers, _ = envoy.refusal
        assert (status, code(envoy.refusal), headers["retry-after"]) == (503, "no_engine", "1")

    run(test())


def test_a_full_buffer_is_a_429():
    async def test():
        stage = Stage(limits={"buffer_bytes": 10})
        envoy = Envoy(stage)
        envoy.headers()
        envoy.body()
        await envoy.task
        assert (envoy.refusal[0], code(envoy.refusal)) == (429, "buffer_bytes")

    run(test())


@pytest.mark.parametrize(
    ("say", "why"),
    [
        (lambda e: e.body(), "begins with request_headers"),
        (lambda e: (e.headers(), e.say(response_headers={})), "body is missing"),
        (lambda e: (e.headers(), e.half_close()), "body is missing"),
    ],
)
def test_what_no_envoy_says_ends_the_stream_with_a_status(say, why):
    async def test():
        stage = Stage()
        envoy = Envoy(stage)
        say(envoy)
        with pytest.raises(AbortedError, match=why):
            await envoy.task
        assert envoy.status[0] is grpc.StatusCode.FAILED_PRECONDITION
        stage.nothing_left()

    run(test())


def test_a_body_mode_without_whole_bodies_is_said_to_be_wrong():
    async def test():
        envoy = Envoy(Stage(), mode=STREAMED)
        envoy.headers()
        with pytest.raises(AbortedError, match="request_body_mode must be"):
            await envoy.task

    run(test())


# Accounts


def held_one(stage):
    envoy = Envoy(stage)
    envoy.headers()
    envoy.body()
    return envoy


@pytest.mark.parametrize(
    ("served", "last", "blamed"),
    [
        (Served(200), Finished, []),
        (Served(0), Cancelled, []),
        (Served(422), Cancelled, []),
        (Served(500), Failed, [("e0", "failed")]),
        (Served(503), Failed, [("e0", "pushed back")]),
        (Served(429), Cancelled, [("e0", "pushed back")]),
        (Served(503, unreached=True), Failed, [("e0", "unreachable")]),
        (Served(504, blame=False), Failed, []),
        (Served(200, endpoint="10.0.0.1:8000"), Finished, [("e0", "at fault")]),
        (Served(200, endpoint="10.0.0.0:8000"), Finished, []),
    ],
)
def test_how_a_request_ended_is_one_event_and_says_something_of_its_engine(served, last, blamed):
    async def test():
        stage = Stage()
        envoy = held_one(stage)
        await envoy.turn()
        key = envoy.destination[2]
        await envoy.end()
        stage.picks.over(key, served)
        assert isinstance(stage.events[-1], last) and stage.workers.blamed == blamed
        stage.nothing_left()
        stage.picks.over(key, served)
        assert stage.oddities["unknown_key"] == 1

    run(test())


def test_a_request_nobody_tells_of_is_given_up_after_a_time():
    async def test():
        stage = Stage(accounting={"forget_after_s": 60.0})
        envoy = held_one(stage)
        await envoy.turn()
        await envoy.end()
        stage.clock.advance(59.0)
        assert stage.picks.under_way == 1
        stage.clock.advance(66.0)
        assert stage.oddities["forgotten"] == 1
        stage.nothing_left()

    run(test())


def test_a_stream_that_is_reset_after_its_answer_says_nothing_and_the_log_knows_envoys_id():
    async def test():
        stage = Stage()
        envoy = Envoy(stage)
        envoy.headers(x_request_id="envoys-own")
        envoy.body()
        await envoy.turn()
        envoy.task.cancel()
        await asyncio.gather(envoy.task, return_exceptions=True)
        assert stage.picks.under_way == 1
        logs = AccessLogs(stage.picks)
        said = {"log_entry": [{"request": {"request_id": "other"}}]}
        logs.hear(StreamAccessLogsMessage(http_logs=said), envoy.peer())
        assert stage.picks.under_way == 1
        said = {"log_entry": [{"request": {"request_id": "envoys-own"}}]}
        logs.hear(StreamAccessLogsMessage(http_logs=said), envoy.peer())
        stage.nothing_left()
        assert [status for _, status in stage.done] == [499]

    run(test())


def entry(key, **common):
    namespaces = {"headway": {"key": key}} | common.pop("metadata", {})
    message = StreamAccessLogsMessage()
    told = message.http_logs.log_entry.add(
        common_properties=common, response={"response_code": {"value": 200}}
    )
    for namespace, values in namespaces.items():
        told.common_properties.metadata.filter_metadata[namespace].update(values)
    return message


@pytest.mark.parametrize(
    ("common", "status"),
    [
        ({}, 200),
        ({"response_flags": {"downstream_connection_termination": True}}, 499),
        ({"response_flags": {"upstream_connection_termination": True}}, 502),
        ({"response_flags": {"upstream_protocol_error": True}}, 502),
        ({"intermediate_log_entry": True}, None),
    ],
)
def test_an_entry_of_the_log_tells_how_it_ended(common, status):
    async def test():
        stage = Stage()
        envoy = held_one(stage)
        await envoy.turn()
        await envoy.end()
        AccessLogs(stage.picks).hear(entry(envoy.destination[2], **common))
        assert [status for _, status in stage.done] == ([] if status is None else [status])

    run(test())


def test_the_log_says_when_the_answer_began_and_who_served():
    async def test():
        stage = Stage()
        envoy = held_one(stage)
        await envoy.turn()
        await envoy.end()
        times = {"time_to_first_upstream_rx_byte": {"nanos": 250_000_000}, "duration": {"seconds": 2}}
        address = {"socket_address": {"address": "10.0.0.1", "port_value": 8000}}
        said = entry(envoy.destination[2], **times, upstream_remote_address=address)
        AccessLogs(stage.picks).hear(said)
        ((over, _),) = stage.done
        assert (over.first_byte_s, over.ended_s) == (0.25, 2.0)
        assert stage.oddities["elsewhere"] == 1 and stage.workers.blamed == [("e0", "at fault")]

    run(test())


def test_reports_of_engines_take_over_what_they_account_for():
    async def test():
        stage = Stage(roles=["aggregated"], accounting={"by": "events"})
        for _ in range(2):
            envoy = held_one(stage)
            await envoy.turn()
            await envoy.end()
        assert stage.picks.under_way == 2
        stage.driver.feed(pass_ended("e0", 1, ran=(10,), acknowledged=1, queued=(0,), duration=0.1))
        stage.clock.advance(0.0)
        assert stage.picks.under_way == 1
        stage.driver.feed(pass_ended("e0", 2, ran=(10,), acknowledged=2, queued=(0,), duration=0.1))
        stage.clock.advance(0.0)
        stage.nothing_left()

    run(test())


def test_answers_that_come_by_tell_of_the_first_byte_and_the_tokens():
    async def test():
        stage = Stage(accounting={"by": "response"})
        envoy = held_one(stage)
        await envoy.turn()
        headers = [
            {"key": ":status", "raw_value": b"200"},
            {"key": "content-type", "raw_value": b"text/event-stream"},
        ]
        envoy.say(response_headers={"headers": {"headers": headers}})
        await envoy.turn()
        assert not stage.heard(PrefillDone)
        stage.clock.now = 0.25
        envoy.say(response_body={"body": b'data: {"choices":[{"text":"a"}]}\n\n'})
        await envoy.turn()
        assert len(stage.heard(PrefillDone)) == 1
        usage = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\ndata: [DONE]\n\n'
        envoy.say(response_body={"body": usage, "end_of_stream": True})
        await envoy.turn()
        assert kinds(envoy)[-3:] == ["response_headers", "response_body", "response_body"]
        (finished,) = stage.heard(Finished)
        assert finished.output_tokens == 3
        over, status = stage.done[0]
        assert (status, over.first_byte_s, over.prompt_tokens) == (200, 0.25, 7)
        await envoy.end()
        stage.nothing_left()

    run(test())


def test_a_stream_that_ends_before_its_answer_is_whole_is_withdrawn():
    async def test():
        stage = Stage(accounting={"by": "response"})
        envoy = held_one(stage)
        await envoy.turn()
        envoy.say(response_headers={"headers": {"headers": [{"key": ":status", "raw_value": b"200"}]}})
        await envoy.end()
        assert len(stage.heard(Cancelled)) == 1
        stage.nothing_left()

    run(test())


# Prefill and decode apart

PD = ("prefill", "prefill", "decode", "decode")


def test_a_sidecar_is_told_of_both():
    async def test():
        stage = Stage("round-robin+round-robin", PD)
        envoy = held_one(stage)
        await envoy.turn()
        header, _, key, headers, removed = envoy.destination
        assert (header, headers["x-prefiller-host-port"]) == ("10.0.0.2:8000", "10.0.0.0:8000")
        assert "x-headway-dispatch" in removed and "x-prefiller-host-port" not in removed
        assert [len(worker.legs) for worker in stage.workers] == [1, 0, 1, 0]
        await envoy.end()
        stage.picks.over(key, Served(200))
        stage.nothing_left()

    run(test())


def phase(stage, name, body=None):
    envoy = Envoy(stage)
    envoy.headers(x_request_id="r1", epp_profile=name)
    envoy.body(body) if body else envoy.body()
    return envoy


DECODE = b'{"messages": [{"role": "user", "content": "hello"}], "kv_transfer_params": {"a": 1}}'


def test_in_phases_decode_is_placed_when_its_prefill_is_over():
    async def test():
        stage = Stage("round-robin+round-robin", PD, picker={"handover": "phases"})
        first = phase(stage, "prefill")
        await first.turn()
        assert first.destination[0] == "10.0.0.0:8000"
        assert not stage.heard(PrefillDone)
        stage.clock.now = 0.5
        stage.picks.over(first.destination[2], Served(200))
        assert len(stage.heard(PrefillDone)) == 1
        second = phase(stage, "decode", DECODE)
        await second.turn()
        assert second.destination[0] == "10.0.0.2:8000"
        assert len(stage.arrived()) == 1 and len(stage.heard(PrefillDone)) == 1
        await first.end()
        await second.end()
        stage.picks.over(second.destination[2], Served(200))
        assert len(stage.heard(Finished)) == 1
        stage.nothing_left()

    run(test())


def test_a_decode_that_comes_before_the_log_says_that_its_prefill_is_over_says_so_itself():
    async def test():
        stage = Stage("round-robin+round-robin", PD, picker={"handover": "phases"})
        first = phase(stage, "prefill")
        await first.turn()
        second = phase(stage, "decode", DECODE)
        await second.turn()
        assert second.destination[0] == "10.0.0.2:8000"
        assert len(stage.heard(PrefillDone)) == 1 and stage.oddities["unknown_phase"] == 0
        stage.picks.over(first.destination[2], Served(200))
        stage.picks.over(second.destination[2], Served(200))
        await first.end()
        await second.end()
        assert len(stage.heard(Finished)) == 1
        stage.nothing_left()

    run(test())


def test_a_prefill_whose_decode_never_comes_is_over_when_its_kv_is():
    async def test():
        stage = Stage(
            "round-robin+round-robin", PD, picker={"handover": "phases"}, limits={"kv_lease_s": 25.0}
        )
        first = phase(stage, "prefill")
        await first.turn()
        await first.end()
        stage.picks.over(first.destination[2], Served(200))
        stage.clock.advance(24.0)
        assert stage.driver.requests == 1
        stage.clock.advance(25.0)
        assert stage.oddities["no_decode"] == 1
        stage.nothing_left()

    run(test())


def test_a_prefill_that_fails_is_the_end():
    async def test():
        stage = Stage("round-robin+round-robin", PD, picker={"handover": "phases"})
        first = phase(stage, "prefill")
        await first.turn()
        await first.end()
        stage.picks.over(first.destination[2], Served(500))
        assert isinstance(stage.events[-1], Failed) and stage.workers.blamed == [("e0", "failed")]
        stage.nothing_left()

    run(test())


def test_a_decode_of_nobody_goes_to_the_decode_engine_with_the_least_to_do():
    async def test():
        stage = Stage("round-robin+round-robin", PD, picker={"handover": "phases"})
        second = phase(stage, "decode", DECODE)
        await second.turn()
        assert second.destination[0] == "10.0.0.2:8000" and stage.oddities["unknown_phase"] == 1
        assert stage.arrived() == []
        await second.end()
        stage.picks.over(second.destination[2], Served(200))
        stage.nothing_left()

    run(test())


def test_a_request_without_a_phase_is_told_so_and_clients_cannot_steer_where_there_are_none():
    async def test():
        stage = Stage("round-robin+round-robin", PD, picker={"handover": "phases"})
        envoy = held_one(stage)
        await envoy.task
        assert (envoy.refusal[0], b"EPP-Profile" in envoy.refusal[2]) == (400, True)
        stage = Stage("round-robin+round-robin", PD)
        second = phase(stage, "decode", DECODE)
        await second.task
        assert second.refusal[0] == 400 and b"kv_transfer_params" in second.refusal[2]

    run(test())


def test_a_recall_before_the_answer_waits_for_another_place_and_after_it_is_off_the_books():
    async def test():
        stage = Stage()
        envoy = held_one(stage)
        await envoy.turn()
        (pick,) = stage.driver._waiters.values()
        pick.recalled(Recall(pick.request.id, "e0", "silent"))
        stage.clock.advance(0.0)
        assert isinstance(stage.events[-1], Cancelled) and stage.oddities["recalled_late"] == 1
        stage.picks.over(envoy.destination[2], Served(200))
        await envoy.end()
        stage.nothing_left()

    run(test())


# What a client may cost


def test_a_stream_that_says_nothing_is_ended():
    async def test():
        stage = Stage(limits={"header_timeout_s": 0.01})
        envoy = Envoy(stage)
        with pytest.raises(AbortedError):
            await envoy.task
        assert envoy.status[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        stage.nothing_left()

    run(test())


def test_every_byte_of_unfinished_uploads_counts_at_once_and_is_given_back():
    async def test():
        stage = Stage(limits={"buffer_bytes": 1000, "max_body_bytes": 1000})
        envoys = [Envoy(stage) for _ in range(3)]
        for envoy in envoys:
            envoy.headers()
            envoy.body(b"x" * 400, ends=False)
            await envoy.turn()
        assert stage.streams.budget.used == 800
        assert [bool(envoy.heard) for envoy in envoys] == [False, False, True]
        status, headers, _ = envoys[2].refusal
        assert (status, headers["x-headway-reason"]) == (429, "buffer_bytes")
        for envoy in envoys[:2]:
            envoy.task.cancel()
        await asyncio.gather(*(envoy.task for envoy in envoys), return_exceptions=True)
        assert stage.streams.budget.used == 0
        stage.nothing_left()

    run(test())


def test_a_body_counts_until_it_went_back():
    async def test():
        stage = Stage(policy="parts:Crowd:most=2")
        envoy = Envoy(stage)
        envoy.headers()
        envoy.body()
        await envoy.turn()
        assert stage.streams.budget.used == len(TINY)
        other = Envoy(stage, mode=BUFFERED)
        other.headers()
        other.body()
        await other.turn()
        assert stage.streams.budget.used == 0
        assert envoy.destination and other.destination
        await envoy.end()
        await other.end()

    run(test())


def test_streams_whose_requests_arrive_are_bounded_as_those_that_wait():
    async def test():
        stage = Stage(limits={"buffer_requests": 2})
        envoys = [Envoy(stage) for _ in range(3)]
        await envoys[0].turn()
        with pytest.raises(AbortedError):
            await envoys[2].task
        assert envoys[2].status[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        for envoy in envoys[:2]:
            envoy.task.cancel()
        await asyncio.gather(*(envoy.task for envoy in envoys), return_exceptions=True)
        assert (stage.streams.open, stage.streams.arriving) == (0, 0)

    run(test())


def test_a_body_of_many_tiny_pieces_goes_back_whole_in_few():
    async def test():
        stage = Stage()
        envoy = Envoy(stage)
        envoy.headers()
        padding = b'"padding": "' + b"y" * 1000 + b'", '
        body = TINY[:1] + padding + TINY[1:]
        for at in range(len(body)):
            envoy.body(body[at : at + 1], ends=at == len(body) - 1)
        while not (envoy.heard and stage.streams.arriving == 0 and len(envoy.heard) > 60):
            await envoy.turn()
        pieces = [
            each.request_body.response.body_mutation.streamed_response
            for each in envoy.heard
            if each.HasField("request_body")
        ]
        assert b"".join(piece.body for piece in pieces) == body
        assert len(pieces) <= 70 and pieces[-1].end_of_stream
        assert not any(piece.end_of_stream for piece in pieces[:-1])
        await envoy.end()

    run(test())
