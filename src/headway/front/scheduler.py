"""What is behind every front door: a pool's engines, the policy that decides over them, and who leads.

A door adds how a request comes in and how it gets to its engine. Checking is apart from building, which needs
a running loop: a configuration is refused before anything starts.
"""

import asyncio
import time
from collections.abc import Iterable

from headway.core.events import Event
from headway.front.access import Access, Gate
from headway.front.admin import AdminSide
from headway.front.config import FrontConfig, is_loopback
from headway.front.discovery import Discovery, create_source
from headway.front.driver import Driver, Observer
from headway.front.keys import table_of
from headway.front.lease import create_elector
from headway.front.loop_lag import LoopLagMonitor
from headway.front.metrics import Metrics
from headway.front.policy import create_policy
from headway.front.transport import HttpTransport
from headway.front.workers import Workers

__all__ = ["Scheduler"]


class Scheduler:
    """Engines, policy and lease of one pool: `build` in a running loop, then `start`, and `stop`.

    `engine_key`: the API key engines want, if any. Raises ConfigError when the configuration cannot be used.
    """

    def __init__(self, config: FrontConfig, *, engine_key: str | None) -> None:
        self._config = config
        self.engine_headers = {} if engine_key is None else {"Authorization": f"Bearer {engine_key}"}
        operators = config.secret(config.admin.token_env, "admin.token_env")
        scrapers = config.secret(config.metrics.token_env, "metrics.token_env")
        self.tokens = table_of([operators])
        self.metrics_tokens = table_of([operators, scrapers])
        self.admin_gate = Gate(
            Access.THIS_MACHINE if operators is None else Access.OPERATORS, tokens=self.tokens
        )
        open_to = Access.THIS_MACHINE if is_loopback(config.metrics.host) else Access.ANYONE
        self.metrics_gate = Gate(
            open_to if scrapers is None else Access.OPERATORS,
            tokens=self.metrics_tokens,
            public_names=open_to is Access.ANYONE,
        )
        self.policy = create_policy(config)
        self._source = create_source(config)
        # Not the loop's clock, which stands still while a callback runs: a lease does not.
        self.elector = create_elector(
            config, clock=time.monotonic, feed=self.feed, on_lead=lambda: self.workers.lead()
        )

    def build(self, observers: Iterable[Observer]) -> None:
        """Build the parts. `observers` see every event with what the policy did about it."""
        self._loop = asyncio.get_running_loop()
        clock, call_at = self._loop.time, self._loop.call_at
        self.loop_lag = LoopLagMonitor()
        self.transport = HttpTransport(connect_timeout_s=self._config.limits.connect_timeout_s)
        self.workers = Workers(
            self._config,
            self.transport,
            self.feed,
            clock=clock,
            call_at=call_at,
            engine_headers=self.engine_headers,
            fence=self.elector.headers,
        )
        patience_s = self._config.server.drain_timeout_s
        self._discovery = Discovery(self._source, self.workers, timeout_s=patience_s)
        self.driver = Driver(
            self.policy, clock=clock, call_at=call_at, poll=self.workers.poll, observers=observers
        )

    def admin(self, metrics: Metrics) -> AdminSide:
        """Build the side that shows and changes the engines."""
        return AdminSide(self.workers, self.driver, metrics, self.admin_gate)

    async def start(self) -> None:
        """Check every engine once, and follow them."""
        await self.workers.start()
        await self._discovery.start()
        await self.elector.start()

    async def stop(self) -> None:
        """End it all at once."""
        self.loop_lag.stop()
        await self.elector.stop()
        await self._discovery.stop()
        await self.workers.stop()
        self.driver.stop()
        await self.transport.close()

    async def reload(self, config: FrontConfig) -> None:
        """Make the workers those of a new configuration; the rest of it needs a restart. Engines that are
        found stay as they are.
        """
        if self._config.discovery is None:
            patience_s = self._config.server.drain_timeout_s
            await self.workers.reconcile(config.instances, timeout_s=patience_s)

    def feed(self, event: Event) -> None:
        """Hand an event to the policy."""
        self.driver.feed(event)
