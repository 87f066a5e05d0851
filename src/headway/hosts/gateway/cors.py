"""Answers browsers that ask which other sites' pages may use the clients' API (CORS).

A preflight is answered before keys are checked: browsers send none with it. Credentials (cookies) are never
allowed, so an API key has to be in a header that the page sets.
"""

from collections.abc import Mapping

from headway.front.errors import Refusal
from headway.front.protocol import HttpRequest, HttpResponse, refused
from headway.hosts.gateway.config import CorsSpec

__all__ = ["Cors"]

#: Headers of an answer that a page may read beside those that it always may.
_EXPOSED = "Retry-After, x-request-id"


class Cors:
    """Decides about requests that carry an `Origin`."""

    def __init__(self, spec: CorsSpec) -> None:
        self._spec = spec
        self._all = "*" in spec.allowed_origins
        self._enabled = bool(spec.allowed_origins)

    def preflight(self, request: HttpRequest) -> HttpResponse | None:
        """Return the answer to a preflight, None for any other request."""
        asked = request.headers.get("access-control-request-method")
        if (
            not self._enabled
            or request.method != "OPTIONS"
            or asked is None
            or "origin" not in request.headers
        ):
            return None
        headers = self.headers(request.headers)
        if "Access-Control-Allow-Origin" not in headers:
            message = "This origin is not in cors.allowed_origins."
            answer = refused(Refusal(403, "origin_not_allowed", message))
            answer.headers |= headers
            return answer
        wanted = request.headers.get("access-control-request-headers", "")
        names = wanted if "*" in self._spec.allow_headers else ", ".join(self._spec.allow_headers)
        headers |= {
            "Access-Control-Allow-Methods": ", ".join(self._spec.allow_methods),
            "Access-Control-Max-Age": str(self._spec.max_age_s),
            "Vary": "Origin, Access-Control-Request-Headers",
        }
        if names:
            headers["Access-Control-Allow-Headers"] = names
        return HttpResponse(204, b"", headers)

    def headers(self, asked: Mapping[str, str]) -> dict[str, str]:
        """Return the headers that every answer to a request carries, errors and streams included."""
        origin = asked.get("origin")
        if not self._enabled:
            return {}
        if self._all:
            return {} if origin is None else _allowed("*")
        vary = {"Vary": "Origin"}
        if origin is None or origin.lower() not in self._spec.allowed_origins:
            return vary
        return _allowed(origin) | vary


def _allowed(origin: str) -> dict[str, str]:
    return {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": _EXPOSED}
