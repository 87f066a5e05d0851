"""Decides what an engine's refusal looks like: OpenAI's error object, filled in as vLLM does."""

from collections.abc import Mapping
from http import HTTPStatus

import orjson

__all__ = ["ApiError"]

_KINDS = {400: "BadRequestError", 404: "NotFoundError", 500: "InternalServerError"}


class ApiError(Exception):
    """A refusal with its HTTP status, and `headers` that go with it."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.headers = headers or {}
        self.status = status
        self.param = param

    def body(self) -> bytes:
        """Return the JSON to answer with."""
        kind = _KINDS.get(self.status, HTTPStatus(self.status).phrase.title().replace(" ", ""))
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.status}
        return orjson.dumps({"error": error})
