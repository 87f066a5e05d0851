"""Asks engines over HTTP: whether they are healthy, which models they serve, how loaded they are."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress

from headway.front.config import HealthSpec, InstanceSpec
from headway.front.model_catalog import ModelCard, read_models
from headway.front.scrape import Load, read_loads, read_metrics
from headway.front.transport import ExhaustedError, Transport, TransportError

__all__ = ["EngineProbe"]


class EngineProbe:
    """Asks engines. `headers()` returns what is sent with every question."""

    def __init__(
        self, transport: Transport, health: HealthSpec, headers: Callable[[], Mapping[str, str]]
    ) -> None:
        self._transport = transport
        self._health = health
        self._headers = headers

    async def check(self, spec: InstanceSpec) -> tuple[str | None, bool]:
        """Return what is wrong with an engine, None if nothing is, and whether connections are refused.

        Raises ExhaustedError when this machine cannot connect to anything.
        """
        path, timeout_s = self._health.path, self._health.timeout_s
        urls = {spec.rank_url(rank) for rank in range(spec.ranks)}
        try:
            async with asyncio.timeout(timeout_s):
                for url in sorted(urls):
                    status, _ = await self._get(url + path)
                    if status >= 300:
                        return f"{path} answers {status}", False
        except ExhaustedError:
            raise
        except TransportError as error:
            return str(error), error.refused
        except TimeoutError:
            return f"no answer to {path} in {timeout_s:g} s", False
        return None, False

    async def models(self, spec: InstanceSpec) -> dict[str, ModelCard] | None:
        """Return the models an engine lists; None when it lists none."""
        with suppress(TransportError, TimeoutError):
            async with asyncio.timeout(self._health.timeout_s):
                status, body = await self._get(f"{spec.url}/v1/models")
            return read_models(body) if status == 200 else None
        return None

    async def load(self, spec: InstanceSpec) -> Load:
        """Return what an engine's public pages say of its load; nothing known without an answer."""
        with suppress(TransportError, TimeoutError):
            async with asyncio.timeout(self._health.timeout_s):
                return await self._load(spec)
        return Load()

    async def _load(self, spec: InstanceSpec) -> Load:
        if spec.rank_by == "port" and spec.ranks > 1:
            return Load()  # one page for each rank: not worth it for what is old when it is read
        if spec.dialect == "sglang":
            status, body = await self._get(f"{spec.url}/v1/loads")
            load = read_loads(body, spec.ranks) if status == 200 else None
            if load is not None:
                return load
        status, body = await self._get(f"{spec.url}/metrics")
        return read_metrics(body.decode(errors="replace"), spec.ranks) if status == 200 else Load()

    async def _get(self, url: str) -> tuple[int, bytes]:
        answer = await self._transport.send("GET", url, self._headers(), None)
        try:
            return answer.status, await answer.read()
        finally:
            answer.close()
