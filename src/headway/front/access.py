"""Decides who may come in: API keys for clients, a token for operators. Both come from the environment.

Where operators need no token, a browser is the way in: a page of any site can have it send requests to what
only this machine can reach. Browsers say which site it was; those requests are refused.
"""

import hmac
import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from headway.front.errors import Refusal

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

    def check_operator(self, headers: Mapping[str, str], *, local: bool) -> None:
        """As `check`; and where no key is needed, raise Refusal (403) for what another site had sent.

        `local`: only this machine can connect, so names other than its own were pointed here by others
        (DNS rebinding).
        """
        self.check(headers)
        if not self._open:
            return  # a site cannot know the key
        host, origin = headers.get("host", ""), headers.get("origin")
        if origin is not None and _netloc(origin) != host.lower():
            raise _other_site("This request comes from another site's page.")
        if local and host and not _is_here(host):
            raise _other_site("Where no key is needed, ask localhost or an address, not a name.")


def _other_site(message: str) -> Refusal:
    return Refusal(403, "other_site", message)


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def _is_here(host: str) -> bool:
    """Whether a Host header says localhost or an address: what no name server has a say in."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name) is not None
    except ValueError:
        return False
