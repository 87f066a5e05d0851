"""Writes the model's name into the body of a request that asks for "whatever is served"."""

import msgspec

from headway.front.model_catalog import DEFAULT
from headway.front.requests import Call

__all__ = ["body_with_model", "with_model"]


def with_model(call: Call, model: str | None) -> Call:
    """Return the call with `model` in place of an empty name or "default", which vLLM would not know."""
    if model is None or call.model is None:
        return call
    body = body_with_model(call.body, call.model, model)
    return call if body is call.body else msgspec.structs.replace(call, model=model, body=body)


def body_with_model(body: bytes, asked: str, model: str | None) -> bytes:
    """Return the body of a request for the model `asked`, with `model` where that names none.

    The field is put at the end of the object, where it overrides the client's: engines take the last of two.
    That copies the body, but does not read it.
    """
    if model is None or model == asked or asked not in ("", DEFAULT):
        return body
    return body.rstrip(b" \t\r\n")[:-1] + b',"model":' + msgspec.json.encode(model) + b"}"
