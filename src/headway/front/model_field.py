"""Writes the model's name into the body of a request that asks for "whatever is served"."""

import msgspec

from headway.front.model_catalog import DEFAULT
from headway.front.requests import Call

__all__ = ["with_model"]


def with_model(call: Call, model: str | None) -> Call:
    """Return the call with `model` in place of an empty name or "default", which vLLM would not know.

    The field is put at the end of the object, where it overrides the client's: engines take the last of two.
    That copies the body, but does not read it.
    """
    if model is None or model == call.model or call.model not in ("", DEFAULT):
        return call
    field = b',"model":' + msgspec.json.encode(model) + b"}"
    return msgspec.structs.replace(call, model=model, body=call.body.rstrip(b" \t\r\n")[:-1] + field)
