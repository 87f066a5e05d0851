"""Keeps the lease in a Valkey (or Redis) server: a hash per pool, changed by one script, in its time.

    headway:leader:POOL    holder, token, until_ms, lease_ms

The record has no expiry of its own: the token in it must outlive the lease. It must not be evicted
(`maxmemory-policy noeviction`, the server's default).
"""

from typing import Any

from valkey.asyncio import Valkey
from valkey.exceptions import ValkeyError

from headway.core.leadership import Claim
from headway.front.lease.contract import Granted, StoreError, Taken

__all__ = ["ValkeyStore"]

#: ARGV: holder, lease in ms, token to be above. A lease that ends later than its length from now was granted
#: before the clock was put back: it ends after its length.
_CLAIM = """
local time = server.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease, above = tonumber(ARGV[2]), tonumber(ARGV[3])
local record = server.call('HMGET', KEYS[1], 'holder', 'token', 'until_ms', 'lease_ms')
local holder, token = record[1], tonumber(record[2] or 0)
local left = tonumber(record[3] or 0) - now
local longest = tonumber(record[4] or 0)
if left > longest then
  left = longest
  server.call('HSET', KEYS[1], 'until_ms', string.format('%.0f', now + left))
end
if left > 0 and holder ~= ARGV[1] then
  return {0, holder, left}
end
if left <= 0 or token <= above then
  token = math.max(token + 1, above + 1, now)
end
server.call('HSET', KEYS[1], 'holder', ARGV[1], 'token', string.format('%.0f', token),
  'until_ms', string.format('%.0f', now + lease), 'lease_ms', lease)
return {1, string.format('%.0f', token), lease}
"""

#: ARGV: holder, token.
_RELEASE = """
local record = server.call('HMGET', KEYS[1], 'holder', 'token')
if record[1] == ARGV[1] and record[2] == ARGV[2] then
  server.call('HSET', KEYS[1], 'until_ms', 0)
end
return 0
"""


class ValkeyStore:
    """The lease of `pool` for `holder`, whose name nobody else has. `timeout_s`: for the server to answer."""

    def __init__(
        self, url: str, pool: str, holder: str, lease_s: float, *, timeout_s: float, password: str | None
    ) -> None:
        self._key = f"headway:leader:{pool}"
        self._holder = holder
        self._lease_ms = round(lease_s * 1000)
        self._client: Any = Valkey.from_url(
            url,
            password=password,
            decode_responses=True,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
        )

    async def claim(self, claim: Claim) -> Granted | Taken:
        """See `Store.claim`."""
        granted, what, left_ms = await self._run(_CLAIM, self._holder, self._lease_ms, claim.above)
        return Granted(int(what)) if granted else Taken(what, left_ms / 1000)

    async def release(self, token: int) -> None:
        """See `Store.release`."""
        await self._run(_RELEASE, self._holder, token)

    async def close(self) -> None:
        """See `Store.close`."""
        await self._client.aclose()

    async def _run(self, script: str, *arguments: object) -> Any:
        try:
            return await self._client.eval(script, 1, self._key, *arguments)
        except (ValkeyError, OSError) as error:
            raise StoreError(str(error).strip() or type(error).__name__) from None
