"""Decides who may use the operators' functions of a bind: by a token, or by where a request comes from.

Where no token is needed, a browser on an operator's machine is a way in: a page of any site can have it send
requests to what only that machine can reach. Three checks keep it out:

Rule 1. A request that a browser sends for another origin's page is refused (`Origin`, `Sec-Fetch-Site`).
Rule 2. `Host` must be an address or a name that no public name server answers for. A site's own name that
        was pointed at this machine (DNS rebinding) is none.
Rule 3. Where only this machine may come in, a request that a proxy forwarded is refused: it came from
        somewhere else.
"""

import ipaddress
from collections.abc import Mapping
from enum import StrEnum
from urllib.parse import urlsplit

from headway.front.errors import Refusal
from headway.front.keys import ClientKeys, KeyTable, no_valid_key

__all__ = ["Access", "Gate"]

#: Top-level names that are reserved for private networks, or that nobody can register.
_PRIVATE_SUFFIXES = (".localhost", ".local", ".internal", ".svc", ".home.arpa", ".lan")
_FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-real-ip")


class Access(StrEnum):
    """Who may use a function of a bind."""

    ANYONE = "anyone who can connect"
    THIS_MACHINE = "this machine"
    CLIENTS = "a client key"
    OPERATORS = "an operator token"
    NOBODY = "nobody"


class Gate:
    """Checks requests for one function.

    `closed`: what a client reads where nobody may use it. `public_names`: whether a request may name this
    server by a public name, which is for what is harmless to show where others can connect anyway.
    """

    def __init__(
        self,
        access: Access,
        *,
        tokens: KeyTable[str] | None = None,
        clients: ClientKeys | None = None,
        closed: str = "This is not available here.",
        public_names: bool = False,
    ) -> None:
        self.access = access
        self._tokens = tokens
        self._clients = clients
        self._closed = closed
        self._public_names = public_names

    def check(self, headers: Mapping[str, str]) -> None:
        """Raise Refusal (401 or 403) unless a request may pass. Names of headers are in lower case."""
        if self.access is Access.NOBODY:
            raise Refusal(403, "operator_token_needed", self._closed)
        if self.access is Access.OPERATORS:
            if self._tokens is None or self._tokens.find(headers) is None:
                raise no_valid_key("An operator token is needed: Authorization: Bearer TOKEN.")
        elif self.access is Access.CLIENTS:
            assert self._clients is not None
            self._clients.check(headers)
        else:
            self._refuse_other_sites(headers)

    def _refuse_other_sites(self, headers: Mapping[str, str]) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        foreign = origin is not None and _netloc(origin) != host.lower()
        if foreign or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise _other_site("This request comes from another site's page.")
        if host and not self._public_names and not _is_private(host):
            raise _other_site("Without a key or token, use an address or localhost, not a public name.")
        if self.access is Access.THIS_MACHINE and any(name in headers for name in _FORWARDED):
            raise _other_site("Without a token, only this machine may ask, and a proxy forwarded this.")


def _other_site(message: str) -> Refusal:
    return Refusal(403, "other_site", message)


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def _is_private(host: str) -> bool:
    """Return whether a Host header is an address, or a name that no public name server answers for."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if "." not in name and ":" not in name:
        return bool(name)
    if name.endswith(_PRIVATE_SUFFIXES) or name.endswith(".svc.cluster.local"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
