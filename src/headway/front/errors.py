"""What a client is told when it gets no answer: OpenAI's shape, the right status, and why.

{"error": {"message": …, "type": …, "param": …, "code": …}}

400 the request is wrong         401 no valid key            404 no such model or path
408 the client was too slow      413 the body is too large   429 too much, with Retry-After
431 the headers are too large    502 the engine failed       503 no engine can serve
504 the engine was too slow
"""

import math
import traceback

import orjson

from headway.core.actions import Reject
from headway.core.cluster.led import NOT_LEADER
from headway.front.headers import without_addresses

__all__ = [
    "Refusal",
    "bad_request",
    "engine_failed",
    "model_not_found",
    "not_leader",
    "overloaded",
    "rejected",
    "release_frames",
    "unavailable",
]

#: What a client reads when engines failed its request, and the error's code.
_ENGINE_FAILED = {
    429: ("engine_overloaded", "The engine is overloaded"),
    503: ("engine_unavailable", "The engine is unavailable"),
    504: ("engine_timeout", "The engine was silent for too long"),
}

_WHY = {
    "backlog-full": "The engines are busy for longer than new work should wait.",
    "held-too-long": "No engine could take the request in time.",
}

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "internal_error",
    502: "engine_error",
    503: "unavailable_error",
    504: "timeout_error",
}


#: Anthropic's API, which has its own format of errors, and its types.
ANTHROPIC = "/v1/messages"
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class Refusal(Exception):  # noqa: N818  an answer, not a fault
    """Ends a request with an error answer. `code` is one word for programs and for metrics."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self, path: str = "") -> bytes:
        """Return the answer's body, in the format of the API that the path belongs to."""
        if path.startswith(ANTHROPIC):
            kind = _ANTHROPIC_TYPES.get(self.status, "api_error")
            return orjson.dumps({"type": "error", "error": {"type": kind, "message": str(self)}})
        error = {
            "message": str(self),
            "type": _TYPES.get(self.status, "error"),
            "param": self.param,
            "code": self.code,
        }
        return orjson.dumps({"error": error})

    def headers(self) -> dict[str, str]:
        """Return the headers that go with it. Retry-After is in whole seconds, at least 1."""
        headers = {"Content-Type": "application/json"}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def sse(self, path: str = "") -> bytes:
        """Return the error as an event, for a stream that has begun: its status can no longer tell."""
        event = b"event: error\n" if path.startswith(ANTHROPIC) else b""
        return event + b"data: " + self.body(path) + b"\n\n"


def release_frames(error: BaseException | None) -> None:
    """Clear the local variables of the frames in an exception's traceback, and in those of its causes.

    Frames and exceptions that refer to each other would keep a request and its body until the cycle
    collector runs.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def bad_request(message: str, *, param: str | None = None, code: str = "invalid_request") -> Refusal:
    """Build a 400."""
    return Refusal(400, code, message, param=param)


def model_not_found(model: str) -> Refusal:
    """Build the 404 of an unknown model. The name is cut: it is the client's text."""
    return Refusal(404, "model_not_found", f"The model {model[:100]!r} does not exist.", param="model")


def overloaded(code: str, message: str, retry_after_s: float = 1.0) -> Refusal:
    """Build a 429."""
    return Refusal(429, code, message, retry_after_s=retry_after_s)


def unavailable(code: str, message: str, retry_after_s: float = 1.0) -> Refusal:
    """Build a 503."""
    return Refusal(503, code, message, retry_after_s=retry_after_s)


def engine_failed(status: int, said: str = "", retry_after_s: float = 1.0) -> Refusal:
    """Build the answer to a request that engines failed. It names no engine: a name may be an address.

    `said`: the engine's own words. `retry_after_s`: sent with a 429 or 503.
    """
    code, text = _ENGINE_FAILED.get(status, ("engine_error", "The engine failed"))
    message = f"{text}: {without_addresses(said)}." if said else f"{text}."
    return Refusal(status, code, message, retry_after_s=retry_after_s if status in (429, 503) else None)


def not_leader() -> Refusal:
    """Build the 503 of a replica that may place nothing."""
    return unavailable("not_leader", "This replica does not lead its pool. Try again, or another one.")


def rejected(action: Reject, prompt_tokens: int) -> Refusal:
    """Build the answer to a request that the policy refuses: 429; 400 where the request is at fault, 503
    where this replica does not lead.
    """
    if action.why == NOT_LEADER:
        return not_leader()
    if action.why == "prompt-too-long" or action.retry_after_s is None:
        message = f"The prompt of about {prompt_tokens} tokens is longer than any engine can hold."
        return bad_request(message, code="context_length_exceeded", param="messages")
    message = _WHY.get(action.why, f"The request was refused: {action.why}.")
    return overloaded(action.why, message, action.retry_after_s)
