"""vLLM: the rank in a header or a port (`legs.py`), and prefill before decode with KV handed over (NIXL).

P/D. The prefill leg is the request with one token to generate and no stream; its answer carries
`kv_transfer_params` that tell the decode engine where the KV is, and are copied into the decode leg
unread. The decode engine is chosen only then. A client that goes away while its prefill runs cuts that
leg, and vLLM drops the request; one that goes between the legs leaves its KV pinned until vLLM's lease is
over (docs/gateway.md). KV whose lease may be over is not used: its blocks may be another prompt's by now.
"""

import msgspec

from headway.core.events import Role
from headway.front.transport import Body
from headway.front.worker import Worker
from headway.hosts.gateway.dialects.contract import override, splice
from headway.hosts.gateway.flight import Flight, LegError
from headway.hosts.gateway.legs import Legs

__all__ = ["body_for", "prefill_body", "prefill_then_decode"]

_HANDOVER = (
    b'"kv_transfer_params":{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,'
    b'"remote_block_ids":null,"remote_host":null,"remote_port":null}'
)
#: What differs in the prefill call: one token, no stream and nothing that needs more, and KV to be fetched.
_PREFILL = b'"max_tokens":1,"min_tokens":0,"stream":false,"stream_options":null,' + _HANDOVER
#: By path, where it is not that. vLLM 0.32 takes and returns `kv_transfer_params` on all of them.
_PREFILLS = {
    # Chats have another name for the limit, which counts before `max_tokens`.
    "/v1/chat/completions": b'"max_completion_tokens":1,' + _PREFILL,
    "/v1/messages": b'"max_tokens":1,"stream":false,' + _HANDOVER,
    # The engine would keep the prefill's answer under the id of the client's response.
    "/v1/responses": b'"max_output_tokens":1,"store":false,"stream":false,' + _HANDOVER,
}


class _Prefilled(msgspec.Struct):
    kv_transfer_params: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_prefilled = msgspec.json.Decoder(_Prefilled)


def body_for(body: Body, worker: Worker, rank: int) -> Body:
    """Return what an aggregated engine gets: the client's bytes as they came."""
    return body


async def prefill_then_decode(legs: Legs, flight: Flight) -> None:
    """A prefill leg, then a decode leg that is placed when the prefill is done."""
    worker, dispatch = await legs.place(flight, Role.PREFILL)
    answer = await legs.ask(flight, worker, dispatch, prefill_body(flight.call.path, flight.call.body))
    flight.limit(None)
    try:
        params = bytes(_prefilled.decode(answer).kv_transfer_params or b"null")
    except msgspec.DecodeError:
        raise LegError(f"{worker.name}: the prefill's answer is not JSON", worker=worker) from None
    worker, dispatch = await legs.place(flight, Role.DECODE)
    if legs.kv_has_expired(flight):
        raise LegError("the KV waited too long for a decode engine", status=503)
    body: Body = flight.call.body
    if params != b"null":  # engines that share a KV store hand nothing over
        body = splice(body, b'"kv_transfer_params":' + params)
    await legs.stream(flight, worker, dispatch, body)


def prefill_body(path: str, body: bytes) -> Body:
    """Return the body of the prefill call: the client's fields, overridden at the end."""
    return override(body, _PREFILLS.get(path, _PREFILL))
