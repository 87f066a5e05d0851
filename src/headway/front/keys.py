"""Keeps the keys by which clients and operators are known, and what each client's key may use.

Clients' keys come from an environment variable (comma-separated, without limits) or from a file:

    [[keys]]
    name = "team-a"
    key = "sk-…"                 # or sha256 = "…": the SHA-256 of the key, in hex
    rate_limit_rps = 10          # requests per second
    concurrent_requests = 20
    priority = 5                 # of its requests; a client's own x-priority may only lower it

Keys are looked up by a keyed hash whose key is random and lives as long as the process, so the time that a
lookup takes tells nothing about the keys.
"""

import hashlib
import secrets
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Generic, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from headway.core.complaints import complaint
from headway.core.errors import ConfigError
from headway.front.config import Spec
from headway.front.errors import Refusal, overloaded
from headway.front.requests import PRIORITY_HEADER
from headway.front.token_bucket import TokenBucket

__all__ = ["CLIENT_NAME", "Client", "ClientKeySpec", "ClientKeys", "KeyTable", "read_keys_file"]

#: Name of the key of the request that this task serves; empty where no key is checked. Logs and metrics read
#: it.
CLIENT_NAME: ContextVar[str] = ContextVar("client_name", default="")

_T = TypeVar("_T")


class ClientKeySpec(Spec):
    """A key in a keys file. Exactly one of `key` and `sha256` is given; None is no limit."""

    name: str = Field(pattern=r"^[A-Za-z0-9._:-]{1,64}$")
    key: str | None = Field(default=None, min_length=1)
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None = None
    rate_limit_rps: float | None = Field(default=None, gt=0)
    concurrent_requests: int | None = Field(default=None, ge=1)
    priority: int | None = Field(default=0, ge=-1_000_000, le=1_000_000)

    @model_validator(mode="after")
    def _one_secret(self) -> Self:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("needs one of key and sha256")
        return self

    def digest(self) -> bytes:
        """Return the SHA-256 of the key."""
        if self.sha256 is not None:
            return bytes.fromhex(self.sha256)
        return hashlib.sha256((self.key or "").encode()).digest()


class KeysFileSpec(Spec):
    """All of a keys file."""

    keys: tuple[ClientKeySpec, ...] = ()


class KeyTable(Generic[_T]):
    """Finds what belongs to a key that a request presents."""

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(32)
        self._values: dict[bytes, _T] = {}

    def __len__(self) -> int:
        return len(self._values)

    def add(self, digest: bytes, value: _T) -> None:
        """Add a key by its SHA-256. Raises ConfigError when it is there already."""
        blinded = self._blind(digest)
        if blinded in self._values:
            raise ConfigError("the same key is there twice")
        self._values[blinded] = value

    def find(self, headers: Mapping[str, str]) -> _T | None:
        """Return what belongs to the key in a request's headers, None for no key or an unknown one."""
        for key in _presented(headers):
            value = self._values.get(self._blind(hashlib.sha256(key).digest()))
            if value is not None:
                return value
        return None

    def _blind(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._salt, digest_size=32).digest()


def _presented(headers: Mapping[str, str]) -> Iterator[bytes]:
    """Return the keys that a request presents: `Authorization: Bearer KEY` and `x-api-key: KEY`."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and bearer.strip():
        yield bearer.strip().encode(errors="replace")
    if key := headers.get("x-api-key", "").strip():
        yield key.encode(errors="replace")


def table_of(texts: Iterable[str | None]) -> KeyTable[str]:
    """Return a table of comma-separated keys, for which only their being known counts."""
    table = KeyTable[str]()
    for key in {key for text in texts for key in _split(text)}:
        table.add(hashlib.sha256(key.encode()).digest(), "operator")
    return table


def _split(text: str | None) -> list[str]:
    return [key.strip() for key in (text or "").split(",") if key.strip()]


class Client:
    """A client, known by its key: what it may use and what it uses."""

    def __init__(self, spec: ClientKeySpec, clock: Callable[[], float]) -> None:
        self.spec = spec
        self.in_flight = 0
        self._bucket = TokenBucket(clock)

    def enter(self, headers: dict[str, str]) -> None:
        """Count a request in, and bound the priority in its headers. Raises Refusal (429) over a limit."""
        spec = self.spec
        if spec.concurrent_requests is not None and self.in_flight >= spec.concurrent_requests:
            message = f"The key {spec.name!r} has {self.in_flight} requests under way: concurrent_requests."
            raise overloaded("key_concurrent_requests", message)
        self._limit_rate()
        self.in_flight += 1
        if spec.priority is not None:
            headers[PRIORITY_HEADER] = _bounded(headers.get(PRIORITY_HEADER), spec.priority)

    def leave(self) -> None:
        """Count a request out."""
        self.in_flight -= 1

    def replace(self, spec: ClientKeySpec) -> None:
        """Give the client other limits. What it has under way still counts."""
        self.spec = spec

    def _limit_rate(self) -> None:
        rate = self.spec.rate_limit_rps
        if rate is not None and (wait_s := self._bucket.take(rate)):
            message = f"The key {self.spec.name!r} may send {rate:g} requests per second: rate_limit_rps."
            raise overloaded("key_rate_limit", message, wait_s)


def _bounded(text: str | None, most: int) -> str:
    """Return a priority header's value within a key's class. What is no number is left to be refused."""
    if text is None:
        return str(most)
    plain = text.strip()
    if not (plain.isascii() and plain.removeprefix("-").isdigit() and len(plain) <= 8):
        return text
    return str(min(int(plain), most))


class ClientKeys:
    """The keys that clients may use. Without any (`required` is False) no client needs one.

    `text`: comma-separated keys, which have no limits. `file`: a keys file, read again by `reload`. Raises
    ConfigError when the file cannot be used.
    """

    def __init__(self, text: str | None, file: Path | None, clock: Callable[[], float]) -> None:
        self.required = text is not None or file is not None
        self._file = file
        self._clock = clock
        self._plain = [
            ClientKeySpec(name=f"key-{number}", key=key, priority=None)
            for number, key in enumerate(_split(text), 1)
        ]
        self._clients: dict[str, Client] = {}
        self._table = KeyTable[Client]()
        self.reload()

    def reload(self) -> None:
        """Read the keys file again. Raises ConfigError, and changes nothing, when it cannot be used."""
        specs = [*self._plain, *(read_keys_file(self._file) if self._file is not None else ())]
        table = KeyTable[Client]()
        clients: dict[str, Client] = {}
        for spec in specs:
            client = self._clients.get(spec.name)
            if spec.name in clients:
                raise ConfigError(f"{self._file}: two keys are called {spec.name!r}")
            if client is None:
                client = Client(spec, self._clock)
            clients[spec.name] = client
            try:
                table.add(spec.digest(), client)
            except ConfigError as error:
                raise ConfigError(f"{self._file}: {spec.name}: {error}") from None
        for spec in specs:
            clients[spec.name].replace(spec)
        self._table, self._clients = table, clients

    def check(self, headers: Mapping[str, str]) -> Client | None:
        """Return the client whose key is in a request's headers, None where no key is needed.

        Raises Refusal (401) when there is no valid key. Names of headers are in lower case.
        """
        if not self.required:
            return None
        client = self._table.find(headers)
        if client is None:
            raise no_valid_key("A valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY.")
        return client


def no_valid_key(message: str) -> Refusal:
    """Build the 401 of a request without a valid key."""
    return Refusal(401, "invalid_api_key", message)


def read_keys_file(path: Path) -> tuple[ClientKeySpec, ...]:
    """Read a keys file. Raises ConfigError: one line with file and key path, without any secret."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the keys file: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    try:
        return KeysFileSpec.model_validate(data).keys
    except ValidationError as error:
        # The value that is wrong may be a secret, so the message goes without it.
        told = [{**each, "input": None} for each in error.errors(include_url=False)]
        raise complaint(told, _known_keys, where=str(path)) from None


def _known_keys(table: object) -> tuple[str, ...]:
    return tuple((ClientKeySpec if table else KeysFileSpec).model_fields)
