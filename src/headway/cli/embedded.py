"""Decides how the embedded cluster runs: emulated engines in a child process, and the gateway's view of them.

Why a child: on one event loop a burst at the door would stretch the passes of the engines, and what one
measures would be the sharing. It is also what real engines are: something else that can be killed. The child
lives no longer than its parent, however that ends: a pipe between them closes with either.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from headway.core.errors import ConfigError, EngineError
from headway.hosts.emulator import Endpoint, run_emulator
from headway.hosts.emulator.metrics import Dialect
from headway.hosts.gateway.config import GatewayConfig
from headway.model.cluster import ClusterSpec

__all__ = ["embedded", "gateway_data"]

START_S, STOP_S = 30.0, 5.0


@contextmanager
def embedded(
    cluster: ClusterSpec,
    batch: str = "vllm-v1",
    *,
    speed: float = 1.0,
    dialect: Dialect = "vllm",
    seed: int = 0,
) -> Iterator[list[Endpoint]]:
    """Run emulated engines on free ports of this machine; yields where they are.

    Raises ConfigError for what the emulator cannot be, EngineError when it does not come up.
    """
    context = multiprocessing.get_context("spawn")  # a fork would take along whatever threads there are
    ours, theirs = context.Pipe()
    options = {"speed": speed, "dialect": dialect, "seed": seed}
    child = context.Process(target=_engines, args=(theirs, cluster, batch, options), daemon=True)
    child.start()
    theirs.close()
    try:
        yield _endpoints(ours)
    finally:
        ours.close()
        child.join(STOP_S)
        if child.is_alive():
            child.kill()
            child.join()
        child.close()


def _endpoints(pipe: Connection) -> list[Endpoint]:
    try:
        if not pipe.poll(START_S):
            raise EngineError(f"the embedded cluster did not start within {START_S:g} s")
        told = pipe.recv()
    except EOFError:
        raise EngineError("the embedded cluster died while it started") from None
    if isinstance(told, str):
        raise ConfigError(told)
    return list(told)


def _engines(pipe: Connection, cluster: ClusterSpec, batch: str, options: dict[str, Any]) -> None:
    """Run in the child. A session of its own spares it the terminal's Ctrl-C: the gateway drains first."""
    os.setsid()
    threading.Thread(target=_die_with, args=(pipe,), daemon=True).start()
    try:
        run_emulator(cluster, batch, base_port=0, on_ready=pipe.send, **options)
    except ConfigError as error:
        pipe.send(str(error))


def _die_with(pipe: Connection) -> None:
    """Wait for the parent's end of the pipe to close, then stop."""
    try:
        pipe.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)


def gateway_data(
    cluster: ClusterSpec,
    endpoints: Sequence[Endpoint],
    *,
    dialect: Dialect = "vllm",
    speed: float = 1.0,
    events: bool = True,
) -> dict[str, Any]:
    """Return the tables of a gateway configuration for emulated engines. Times in it are wall time.

    `events=False`: as if the engines published none; passes are inferred.
    """
    slow = max(1.0, 1.0 / speed)
    limits = GatewayConfig().limits
    waits = ("queue_timeout_s", "first_byte_timeout_s", "idle_timeout_s")
    return {
        "instances": [_instance(cluster, endpoint, dialect, events) for endpoint in endpoints],
        "slo": {"ttft_s": cluster.slo.ttft_s / speed, "tpot_s": cluster.slo.tpot_s / speed},
        "limits": {name: slow * getattr(limits, name) for name in waits},
    }


def _instance(cluster: ClusterSpec, endpoint: Endpoint, dialect: Dialect, events: bool) -> dict[str, Any]:
    pool = next(pool for pool in cluster.pools if endpoint.instance in pool.instance_names())
    up = pool.instance_up(endpoint.instance, 0)
    told = {
        "name": endpoint.instance,
        "url": endpoint.url,
        "role": endpoint.role.value,
        "dialect": dialect,
        "ranks": endpoint.ranks,
        "rank_by": endpoint.rank_by,
        "ports": _ports(endpoint),
        "lockstep": up.lockstep,
        "chunk_tokens": up.chunk_tokens,
        "kv_blocks": up.kv_blocks,
        "block_tokens": up.block_tokens,
        "max_running": up.max_running,
        "events": endpoint.events if events else None,
        "snapshots": endpoint.snapshots if events else None,
        "bootstrap_port": endpoint.bootstrap_port,
    }
    return {key: value for key, value in told.items() if value is not None}


def _ports(endpoint: Endpoint) -> list[int] | None:
    """Return the ports of the ranks; None where they are in a row."""
    ports = [int(url.rpartition(":")[2]) for url in endpoint.urls]
    return None if ports == list(range(ports[0], ports[0] + len(ports))) else ports
