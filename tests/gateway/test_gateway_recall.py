"""A request that is taken back in the very turn of the loop in which its first byte comes."""

import asyncio

import pytest
from standins import DONE, EVENT, USAGE, StandIn, chat, gateway, run, until

from headway.core.actions import Recall
from headway.core.events import Failed


def recall(front, flight):
    """Take a request back, and have the policy place it again."""
    flight.recalled(Recall(flight.request.id, "engine-0", "silent"))
    front.driver.feed(Failed(flight.request.id, "silent", retry=True))


@pytest.mark.parametrize("stream", [False, True])
def test_the_client_gets_one_answer_and_no_byte_twice(stream):
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            engine.go.clear()
            engine.more.clear()
            asked = asyncio.create_task(chat(client, stream=stream))
            await until(lambda: engine.requests)
            (flight,) = front.workers.named("engine-0").legs
            (connection,) = front.scheduler.transport.connections
            came = connection.data_received

            def comes_and_is_recalled(data):
                came(data)
                if connection._body and len(engine.requests) == 1:
                    recall(front, flight)
                    engine.more.set()

            connection.data_received = comes_and_is_recalled
            engine.go.set()
            status, _, body = await asked
            assert status == 200 and len(engine.requests) == 2
            if stream:
                assert body == EVENT + EVENT + USAGE + DONE

    run(check())
