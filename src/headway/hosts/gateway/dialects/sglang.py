"""SGLang: the rank in the body, and prefill and decode at once, joined by a bootstrap room.

P/D. Both servers get the same request with the address of the prefill server's bootstrap and a random
room; the decode server fetches the KV when it is ready. So both must be placed at dispatch:
`core/cluster/paired.py` does that with the same policies. The prefill leg's answer is of no use but for
its first byte; the client's answer is the decode leg's.

The two legs live and die together: if one fails before the client has a byte, or the request is taken
back, the other is cut at once, for a leg whose partner is gone would hold its slot for minutes.

`data_parallel_rank` is the old name of `routed_dp_rank`: both are sent. The room is congruent to the
prefill rank modulo the ranks, which is how a decode server without `disagg_prefill_dp_rank` finds the
rank.
"""

import asyncio
import secrets
from urllib.parse import urlsplit

import orjson

from headway.core.events import Role
from headway.front.transport import Body
from headway.front.worker import Worker
from headway.hosts.gateway.dialects.contract import splice
from headway.hosts.gateway.flight import EngineSaysNo, Flight
from headway.hosts.gateway.legs import Legs

__all__ = ["body_for", "bootstrap", "prefill_and_decode"]

_ROOMS = 1 << 63


async def prefill_and_decode(legs: Legs, flight: Flight) -> None:
    """Two legs at once."""
    prefill, to_prefill = await legs.place(flight, Role.PREFILL)
    decode, to_decode = await legs.place(flight, Role.DECODE)
    body = splice(flight.call.body, bootstrap(prefill, to_prefill.rank))
    first = body_for(body, prefill, to_prefill.rank)
    second = body_for(_with_prefill_rank(body, prefill, to_prefill.rank), decode, to_decode.rank)
    try:
        async with asyncio.TaskGroup() as both:
            other = both.create_task(legs.accompany(flight, prefill, to_prefill, first))
            await legs.stream(flight, decode, to_decode, second)
            other.cancel()  # the answer is whole: what the prefill server still says is of no use
    except BaseExceptionGroup as failures:
        raise _foremost(failures) from None


def bootstrap(prefill: Worker, rank: int) -> bytes:
    """Return the fields that join the legs: where, and a room that names the prefill rank."""
    room = secrets.randbelow(_ROOMS // prefill.ranks) * prefill.ranks + rank
    fields = {
        "bootstrap_host": urlsplit(prefill.spec.url).hostname,
        "bootstrap_port": prefill.spec.bootstrap_port,
        "bootstrap_room": room,
    }
    return orjson.dumps(fields)[1:-1]


def body_for(body: Body, worker: Worker, rank: int) -> Body:
    """Add the rank to a body, where there is a choice and the port does not tell it."""
    if worker.ranks == 1 or worker.spec.rank_by == "port":
        return body
    return splice(body, b'"data_parallel_rank":%d,"routed_dp_rank":%d' % (rank, rank))


def _with_prefill_rank(body: Body, prefill: Worker, rank: int) -> Body:
    return splice(body, b'"disagg_prefill_dp_rank":%d' % rank) if prefill.ranks > 1 else body


def _foremost(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """Of what went wrong, tell the client's own fault before an engine's."""
    found = _leaves(failures)
    return next((each for each in found if isinstance(each, EngineSaysNo)), found[0])


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for each in error.exceptions for leaf in _leaves(each)]
    return [error]
