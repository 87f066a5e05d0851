"""Decides who may ask what, on which bind, from the configuration alone; docs/gateway.md has the table.

Clients need a key where one is configured. Operators' functions (the page and its data, the worker API) need
an operator token, with two exceptions: nobody else can connect and no client has a key, so that whoever asks
is on this machine; or `worker_api.open` lets clients change engines.
"""

from collections.abc import Iterator
from typing import NamedTuple

from headway.front.access import Access
from headway.front.config import is_loopback
from headway.hosts.gateway.config import GatewayConfig

__all__ = ["Posture", "posture_of", "warnings"]


class Posture(NamedTuple):
    """Who may use each function of the public bind."""

    api: Access
    metrics: Access
    page: Access
    worker_api: Access


def posture_of(config: GatewayConfig) -> Posture:
    """Return who may use each function of a gateway with this configuration."""
    keys, local = config.auth.checks_keys, is_loopback(config.server.host)
    token = config.admin.token_env is not None
    clients = Access.CLIENTS if keys else Access.ANYONE
    operators = Access.OPERATORS if token else Access.THIS_MACHINE if local and not keys else Access.NOBODY
    return Posture(
        api=clients,
        metrics=_metrics(config, operators, clients),
        page=operators,
        worker_api=clients if config.worker_api.open and not token else operators,
    )


def _metrics(config: GatewayConfig, operators: Access, clients: Access) -> Access:
    """Return who may read /metrics on the public bind. Labels may be addresses of engines."""
    if config.metrics.token_env is not None:
        return Access.OPERATORS
    if operators is Access.OPERATORS and clients is Access.CLIENTS:
        return operators
    if is_loopback(config.server.host) and clients is Access.ANYONE:
        return Access.THIS_MACHINE
    return clients if config.metrics.port is None else operators


def warnings(config: GatewayConfig) -> Iterator[str]:
    """Return a line for each function that is open to more than this machine without a key or token."""
    posture = posture_of(config)
    server, metrics = config.server, config.metrics
    public = f"whoever can connect to {server.host}:{server.port}"
    if not is_loopback(server.host):
        if posture.api is Access.ANYONE:
            yield f"{public} can send requests without a key: set [auth] api_keys_env or keys_file"
        if posture.metrics is Access.ANYONE:
            yield f"{public} can read /metrics without a key: set [metrics] token_env"
    if config.worker_api.enabled and config.worker_api.open:
        if posture.worker_api is Access.ANYONE:
            who = public if not is_loopback(server.host) else "every process of this machine"
            yield f"{who} can add and remove engines ([worker_api] open): set [admin] token_env"
        elif posture.worker_api is Access.CLIENTS:
            yield "every client with a key can add and remove engines ([worker_api] open)"
    if metrics.port is not None and metrics.token_env is None and not is_loopback(metrics.host):
        yield (
            f"whoever can connect to {metrics.host}:{metrics.port} can read /metrics without a token: "
            "set [metrics] token_env"
        )
    if "*" in config.cors.allowed_origins and posture.api is Access.ANYONE:
        yield "pages of every site can send requests without a key ([cors] allowed_origins has '*')"
