"""Decides who may come in: API keys for clients, a token for operators. Both come from the environment."""

import hmac
from collections.abc import Mapping

from headway.hosts.gateway.errors import Refusal

__all__ = ["Keys"]


class Keys:
    """A set of keys, `None` for an open door. Keys are compared in constant time."""

    def __init__(self, text: str | None) -> None:
        keys = [key.strip().encode() for key in (text or "").split(",")]
        self._keys = [key for key in keys if key]
        self._open = text is None

    def check(self, headers: Mapping[str, str]) -> None:
        """Raise Refusal (401) unless a valid bearer key is there. Names of headers are in lower case."""
        if self._open:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = given.strip().encode(errors="replace")
        # Compare with every key, so that the time does not tell which was near.
        matches = [hmac.compare_digest(key, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise Refusal(401, "invalid_api_key", "A valid API key is needed: Authorization: Bearer KEY.")
