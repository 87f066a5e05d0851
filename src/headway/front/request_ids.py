"""Decides which `x-request-id` of a client is kept."""

import re
from collections.abc import Mapping

__all__ = ["given_request_id"]

_SOUND_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


def given_request_id(headers: Mapping[str, str]) -> str | None:
    """Return the request id that a client sends, None when there is none or it cannot be passed on safely."""
    given = headers.get("x-request-id")
    return given if given is not None and _SOUND_ID.fullmatch(given) else None
