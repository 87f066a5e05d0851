"""Builds what Envoy is answered.

A destination goes into a header and into dynamic metadata, the same in both: proxies read one or the other.
With it, headers go that only we may set; those of them that a client sent are removed.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headway.core.leadership import FENCE_HEADER
from headway.front.errors import Refusal
from headway.hosts.envoy.desk import Answer
from headway.hosts.envoy.messages import ADD_OR_OVERWRITE, ProcessingResponse

__all__ = [
    "DESTINATION",
    "KEY",
    "KEY_NAMESPACE",
    "NAMESPACE",
    "SERVED",
    "SUBSET",
    "SUBSET_NAMESPACE",
    "Replies",
]

DESTINATION = "x-gateway-destination-endpoint"
SERVED = "x-gateway-destination-endpoint-served"
SUBSET = "x-gateway-destination-endpoint-subset"
NAMESPACE, SUBSET_NAMESPACE = "envoy.lb", "envoy.lb.subset_hint"
#: Dynamic metadata of our own: the key by which the access log names a request.
KEY_NAMESPACE, KEY = "headway", "key"

#: Set by us or by nobody.
_OURS = (
    "x-prefiller-host-port",
    "x-headway-dispatch",
    "x-data-parallel-rank",
    FENCE_HEADER,
    SUBSET,
    SERVED,
)


class Replies:
    """The messages to Envoy."""

    def go_on(self) -> Any:
        """Have the request's headers go on as they are: its body comes next."""
        return ProcessingResponse(request_headers={})

    def more_time(self, seconds: float) -> Any:
        """Ask for so long until a message counts as timed out; an Envoy that does not allow it goes on."""
        reply = ProcessingResponse()
        reply.override_message_timeout.FromMilliseconds(int(seconds * 1000))
        return reply

    def destination(self, answer: Answer, headers: Mapping[str, str], *, at_body: bool) -> Any:
        """Send the request on its way, with further `headers` for the engine. `at_body`: in answer to it."""
        wanted = {DESTINATION: answer.endpoints, **headers, **answer.headers}
        mutation = {
            "set_headers": [_set(name, value) for name, value in wanted.items()],
            "remove_headers": [name for name in _OURS if name not in wanted],
        }
        common = {"response": {"header_mutation": mutation}}
        metadata = {NAMESPACE: {DESTINATION: answer.endpoints}, KEY_NAMESPACE: {KEY: answer.key}}
        reply = ProcessingResponse(**{"request_body" if at_body else "request_headers": common})
        reply.dynamic_metadata.update(metadata)
        return reply

    def body(self, pieces: Sequence[bytes], *, ends: bool) -> Iterator[Any]:
        """Send the request's body back, a message at a time. `ends`: no trailers follow."""
        last = len(pieces) - 1
        for number, piece in enumerate(pieces):
            yield ProcessingResponse(request_body=_streamed(piece, ends and number == last))
        if ends and not pieces:
            yield ProcessingResponse(request_body=_streamed(b"", True))

    def trailers(self) -> Any:
        """Have the request's trailers go on as they are."""
        return ProcessingResponse(request_trailers={})

    def refusal(self, refusal: Refusal) -> Any:
        """Answer the client in Envoy's stead."""
        headers = {**refusal.headers(), "x-headway-reason": refusal.code}
        return ProcessingResponse(
            immediate_response={
                "status": {"code": refusal.status},
                "headers": {"set_headers": [_set(name.lower(), value) for name, value in headers.items()]},
                "body": refusal.body(),
                "details": f"headway_{refusal.code}",
            }
        )

    def response(self, message: Any, *, full_duplex: bool) -> Any | None:
        """Have a piece of the engine's answer go on as it is; None for what is none."""
        kind = message.WhichOneof("kind")
        if kind == "response_body" and full_duplex:
            piece = message.response_body
            return ProcessingResponse(response_body=_streamed(piece.body, piece.end_of_stream))
        if kind in ("response_headers", "response_body", "response_trailers"):
            return ProcessingResponse(**{kind: {}})
        return None


def _set(name: str, value: str) -> dict[str, Any]:
    return {"header": {"key": name, "raw_value": value.encode()}, "append_action": ADD_OR_OVERWRITE}


def _streamed(piece: bytes, end: bool) -> dict[str, Any]:
    return {"response": {"body_mutation": {"streamed_response": {"body": piece, "end_of_stream": end}}}}
