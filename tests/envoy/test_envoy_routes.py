"""Where requests go, through a real Envoy: what the picker says, what others say, and what is left behind."""

import io
import json

import pytest
from envoys import asyncio, front, run, until
from standins import error_of

from headway.core.events import Arrived

BOTH = pytest.mark.parametrize("name", ["override-host", "original-dst"])


def arrivals(front):
    seen = []
    front.picker.driver._observers += (lambda now, event, actions: seen.append(event),)
    return lambda: [event.request for event in seen if isinstance(event, Arrived)]


async def nothing_left(front):
    """Wait until all is accounted for."""
    picks = front.picker.picks
    await until(lambda: picks.under_way == 0, "the access log")
    assert (picks.buffer.requests, picks.buffer.tokens, picks.buffer.bytes, picks.buffer.in_flight) == (
        0,
        0,
        0,
        0,
    )
    assert front.picker.driver.requests == 0
    assert not any(worker.legs for worker in front.picker.workers)
    await until(lambda: front.picker.processor.open == 0, "the streams' end")


@BOTH
@pytest.mark.parametrize("bodies", ["full duplex", "buffered"])
def test_requests_go_where_the_policy_says_and_their_load_is_released(name, bodies):
    async def test():
        change = (lambda envoy: envoy.buffer_bodies()) if bodies == "buffered" else (lambda envoy: None)
        async with front(name=name, change=change, policy="round-robin") as f:
            for number in range(4):
                status, _, body = await f.chat(stream=number % 2 == 1)
                assert status == 200 and (b"[DONE]" in body if number % 2 else b'"hi"' in body)
            assert [len(engine.requests) for engine in f.engines] == [2, 2]
            headers = f.engines[0].requests[0][1]
            assert headers["x-gateway-destination-endpoint"] == f"127.0.0.1:{f.engines[0].port}"
            assert headers["x-headway-dispatch"] == "1"
            await nothing_left(f)
            assert f.metric("headway_requests_total", status="200") == 4
            assert f.metric("headway_ttft_seconds_count") == 2  # of the streams, as Envoy timed them

    run(test())


@BOTH
def test_over_tls_with_a_certificate_made_at_the_start(name):
    async def test():
        async with front(name=name, tls={"mode": "self-signed"}) as f:
            status, _, _ = await f.chat()
            assert status == 200

    run(test())


@pytest.mark.parametrize("bodies", ["full duplex", "buffered"])
def test_a_large_body_arrives_whole(bodies):
    async def test():
        def change(envoy):
            if bodies == "buffered":
                envoy.buffer_bodies()
                listener = envoy.config["static_resources"]["listeners"][0]
                listener["per_connection_buffer_limit_bytes"] = 16 << 20

        async with front(change=change) as f:
            body = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "x" * 5_000}]}
            body["padding"] = "y" * 900_000
            sent = json.dumps(body).encode()
            status, _, _ = await f.chat(body=io.BytesIO(sent))
            assert status == 200
            assert sent in (f.engines[0].bodies + f.engines[1].bodies)

    run(test())


def test_what_is_no_generation_goes_to_the_engine_with_the_least_to_do():
    async def test():
        async with front() as f:
            async with f.client.get("/v1/models") as answer:
                assert answer.status == 200 and (await answer.json())["data"][0]["id"] == "tiny"
            status, _, _ = await f.chat(path="/v1/embeddings")
            assert status == 200
            await nothing_left(f)
            assert f.metric("headway_dispatches_total", worker="e0", why="immediate") == 0

    run(test())


@BOTH
def test_a_client_cannot_say_where_it_goes(name):
    async def test():
        async with front(name=name) as f:
            spoofed = {
                "x-gateway-destination-endpoint": "127.0.0.1:1",
                "x-prefiller-host-port": "127.0.0.1:2",
                "x-headway-dispatch": "999",
            }
            status, _, _ = await f.chat(headers=spoofed)
            assert status == 200
            (told,) = [headers for engine in f.engines for _, headers, _ in engine.requests]
            assert told["x-gateway-destination-endpoint"] != "127.0.0.1:1"
            assert "x-prefiller-host-port" not in told and told["x-headway-dispatch"] == "1"
            assert f.picker.workers.get("e0").acknowledged(1) == 1

    run(test())


def test_the_rank_is_the_pickers_to_choose():
    async def test():
        async with front() as f:
            status, _, body = await f.chat(headers={"x-data-parallel-rank": "1"})
            assert status == 400 and b"x-data-parallel-rank" in body

    run(test())


def test_targets_objective_and_priority_reach_the_policy():
    async def test():
        tables = {"objectives": {"premium": {"priority": 7, "tpot_s": 0.02}}}
        async with front(**tables) as f:
            seen = arrivals(f)
            await f.chat(headers={"x-llm-d-slo-ttft-ms": "500", "x-llm-d-inference-objective": "premium"})
            (request,) = seen()
            assert (request.slo.ttft_s, request.slo.tpot_s, request.priority) == (0.5, 0.02, 7)
            headers = next(headers for engine in f.engines for _, headers, _ in engine.requests)
            assert headers["x-slo-ttft-ms"] == "500"

    run(test())


# A subset hint


def hint(value):
    """Have Envoy say a subset, as a gateway before the picker does."""

    def change(envoy):
        said = {
            "name": "subset",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.set_metadata.v3.Config",
                "metadata": [
                    {
                        "metadata_namespace": "envoy.lb.subset_hint",
                        "value": {"x-gateway-destination-endpoint-subset": value},
                    }
                ],
            },
        }
        envoy.connections["http_filters"].insert(0, said)

    return change


def test_of_a_subset_one_is_picked_and_without_a_policy():
    async def test():
        ports = []

        def change(envoy):
            known = envoy.cluster("engines")["load_assignment"]["endpoints"][0]["lb_endpoints"]
            ports.extend(e["endpoint"]["address"]["socket_address"]["port_value"] for e in known)
            hint([f"127.0.0.1:{ports[1]}"])(envoy)

        async with front(change=change) as f:
            for _ in range(3):
                assert (await f.chat())[0] == 200
            assert [len(engine.requests) for engine in f.engines] == [0, 3]
            assert f.oddities("subset") == 3
            await nothing_left(f)

    run(test())


def test_a_subset_of_all_leaves_the_policy_its_choice():
    async def test():
        def change(envoy):
            known = envoy.cluster("engines")["load_assignment"]["endpoints"][0]["lb_endpoints"]
            ports = [e["endpoint"]["address"]["socket_address"]["port_value"] for e in known]
            hint([f"127.0.0.1:{port}" for port in ports])(envoy)

        async with front(change=change, policy="round-robin") as f:
            for _ in range(2):
                assert (await f.chat())[0] == 200
            assert [len(engine.requests) for engine in f.engines] == [1, 1]
            assert f.oddities("subset") == 0

    run(test())


@pytest.mark.parametrize(
    ("value", "status", "code"),
    [
        ([], 503, "no_engine"),
        (["10.9.9.9:1"], 503, "no_engine"),
        (["somewhere"], 400, "invalid_request"),
        (7.0, 400, "invalid_request"),
    ],
)
def test_a_subset_that_is_empty_unknown_or_malformed(value, status, code):
    async def test():
        async with front(change=hint(value)) as f:
            told, _, body = await f.chat()
            assert (told, error_of(body)) == (status, code)

    run(test())


# Engines that are not there


def test_of_a_dead_pick_the_fallback_is_asked_and_the_dead_one_is_asked_no_more():
    async def test():
        tables = {"picker": {"fallbacks": 1}, "health": {"interval_s": 60.0, "eject_after": 1}}
        async with front(policy="round-robin", **tables) as f:
            await f.engines[0].kill()
            statuses = [(await f.chat())[0] for _ in range(4)]
            assert statuses == [200] * 4
            await until(lambda: f.oddities("elsewhere") >= 1, "the served endpoint")
            await until(lambda: f.picker.workers.get("e0").health.ejections == 1, "the ejection")
            assert len(f.engines[1].requests) == 4
            await nothing_left(f)

    run(test())


def test_without_fallbacks_a_dead_pick_is_a_503_once():
    async def test():
        async with front(name="original-dst", policy="round-robin", health={"interval_s": 60.0}) as f:
            await f.engines[0].kill()
            first = (await f.chat())[0]
            await until(lambda: f.picker.workers.get("e0").health.ejections == 1, "the ejection")
            rest = [(await f.chat())[0] for _ in range(3)]
            assert [first, *rest] == [503, 200, 200, 200]
            await nothing_left(f)

    run(test())


def test_an_engine_that_envoy_does_not_know_is_noticed_by_who_served():
    async def test():
        def change(envoy):
            known = envoy.cluster("engines")["load_assignment"]["endpoints"][0]["lb_endpoints"]
            del known[0]

        async with front(change=change, policy="round-robin", health={"interval_s": 60.0}) as f:
            for _ in range(4):
                assert (await f.chat())[0] == 200
            await until(lambda: f.oddities("elsewhere") == 2, "the served endpoint")
            assert [len(engine.requests) for engine in f.engines] == [0, 4]

    run(test())


def test_an_engine_that_fails_what_it_gets_is_ejected_and_the_last_one_is_not():
    async def test():
        async with front(engines=2, health={"interval_s": 60.0, "eject_after": 2}) as f:
            bad, good = (f.picker.workers.get(name) for name in ("e0", "e1"))
            f.engines[0].status = 500
            for _ in range(100):
                await f.chat()
                if bad.health.ejections:
                    break
            assert (bad.health.ejections, good.health.ejections) == (1, 0)
            f.engines[1].status = 500
            assert [(await f.chat())[0] for _ in range(5)] == [500] * 5
            assert good.takes_work()


def test_a_full_engine_is_held_back_and_not_ejected():
    async def test():
        async with front(engines=1) as f:
            f.engines[0].status = 503
            assert (await f.chat())[0] == 503
            worker = f.picker.workers.get("e0")
            await until(lambda: worker.limit.refusals == 1, "the log's word")
            f.engines[0].status = 200
            assert [(await f.chat())[0] for _ in range(3)] == [200] * 3
            assert worker.health.ejections == 0

    run(test())


def test_a_stream_that_breaks_is_a_failure_whatever_its_head_said():
    async def test():
        async with front(engines=1) as f:
            f.engines[0].break_after = 1
            with pytest.raises(Exception, match="payload"):
                await f.chat(stream=True)
            await nothing_left(f)
            assert f.metric("headway_requests_total", status="502") == 1

    run(test())


# Other ways to account


def test_answers_that_come_by_tell_of_first_bytes_and_tokens():
    async def test():
        tables = {"accounting": {"by": "response"}}
        async with front(engines=1, change=lambda envoy: envoy.send_answers(), **tables) as f:
            f.engines[0].more.clear()
            asked = asyncio.create_task(f.chat(stream=True))
            await until(lambda: f.engines[0].under_way == 1, "the request")
            pick = next(iter(f.picker.driver._waiters.values()))
            await until(lambda: pick.first_byte_s is not None, "the first byte")
            assert pick.prefilled and not pick.over
            f.engines[0].more.set()
            assert (await asked)[0] == 200
            await nothing_left(f)
            assert (pick.prompt_tokens, pick.output_tokens) == (7, 3)
            assert (await f.chat())[0] == 200
            await nothing_left(f)

    run(test())


def test_a_client_that_leaves_in_mid_answer_is_told_by_either():
    async def test(tables, change):
        async with front(engines=1, change=change, **tables) as f:
            f.engines[0].more.clear()
            asked = asyncio.create_task(f.chat(stream=True))
            await until(lambda: f.engines[0].under_way == 1, "the request")
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            await nothing_left(f)
            await until(lambda: f.engines[0].aborted == 1, "the end at the engine")
            assert f.metric("headway_requests_total", status="499") == 1

    run(test({}, lambda envoy: None))
    run(test({"accounting": {"by": "response"}}, lambda envoy: envoy.send_answers()))


def test_a_request_nobody_tells_of_is_given_up():
    async def test():
        def change(envoy):
            del envoy.connections["access_log"]

        async with front(change=change, accounting={"forget_after_s": 0.01}) as f:
            assert (await f.chat())[0] == 200
            assert f.picker.picks.under_way == 1
            f.picker.picks._sweep()
            await until(lambda: f.picker.picks._sweep() or f.picker.picks.under_way == 0, "the sweep")
            assert f.oddities("forgotten") == 1

    run(test())
