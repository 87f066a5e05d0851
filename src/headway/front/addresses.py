"""Keeps two engines from having one address: an engine under two names would count, and be loaded, twice."""

from collections.abc import Iterable
from typing import Protocol
from urllib.parse import urlsplit

from headway.core.errors import ConfigError

__all__ = ["Addresses", "address_of"]


class _Addressed(Protocol):
    """An engine that listens at one or more URLs."""

    @property
    def name(self) -> str:
        """Its name."""

    def urls(self) -> Iterable[str]:
        """Return the URL of each rank."""


class Addresses:
    """The addresses that are taken, each by the name of its engine."""

    def __init__(self, instances: Iterable[_Addressed] = ()) -> None:
        self._owners: dict[str, str] = {}
        for each in instances:
            self.claim(each)

    def claim(self, instance: _Addressed) -> None:
        """Take an engine's addresses. Raises ConfigError, and takes none, when another engine has one."""
        own = {address_of(url): url for url in instance.urls()}
        for address, url in own.items():
            owner = self._owners.get(address, instance.name)
            if owner != instance.name:
                raise ConfigError(
                    f"instance {instance.name!r}: {url} is the address of {owner!r} already: "
                    "an engine has one name"
                )
        self._owners |= dict.fromkeys(own, instance.name)

    def release(self, instance: _Addressed) -> None:
        """Give an engine's addresses back."""
        for url in instance.urls():
            if self._owners.get(address_of(url)) == instance.name:
                del self._owners[address_of(url)]

    def owners(self, instance: _Addressed) -> set[str]:
        """Return the names of the engines that have an address of this one."""
        found = (self._owners.get(address_of(url)) for url in instance.urls())
        return {name for name in found if name is not None}


def address_of(url: str) -> str:
    """Return host, port and path of a URL, in the same letters however it is written.

    >>> address_of("http://Engine-0") == address_of("http://engine-0:80/")
    True
    """
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"{(parts.hostname or '').lower()}|{port}|{parts.path.rstrip('/')}"
