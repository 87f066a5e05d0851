"""Runs jobs on a Ray cluster, or on a Ray of its own on this machine.

Ray's own retries are off: a job whose worker or node is lost comes back as lost, so that one rule bounds the
tries wherever jobs run. Headway must be installed on every node in this very version, which each job checks:
results of two versions in one table would be worse than none. Ray is imported only here, when it is asked
for.
"""

import os
import re
import socket
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from headway import __version__
from headway.core.errors import ConfigError, HeadwayError
from headway.hosts.sim.workers.contract import Ended, Work, Workers, attempt

__all__ = ["RayWorkers"]

#: Of a Ray of our own: what is shared and what comes back is small, and a third of the memory is Ray's
#: default.
_OBJECT_STORE_BYTES = 256 * 2**20
_CONNECT_TIMEOUT_S = 5.0
#: How HTTP/2 begins (RFC 9113, §3.4), and an empty frame SETTINGS: length, type 4, flags, stream 0.
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HTTP2_SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_MISSING = re.compile(r"No module named (\S+)")


class RayWorkers(Workers):
    """Jobs as Ray tasks of one CPU each, at most `count` at a time (None: what the cluster has, and one to
    spare).

    `address`: "HOST:PORT" or "auto" of a running cluster, "ray://HOST:PORT" of one behind Ray Client; None
    takes the environment's RAY_ADDRESS, or else starts a Ray on this machine with `count` CPUs. A Ray that
    this process is connected to already is used, and left running. Raises ConfigError when Ray is not
    installed or the address does not answer.
    """

    def __init__(self, work: Work, shared: Any, *, address: str | None, count: int | None) -> None:
        self._ray = _installed()
        self._count = count
        self._ours = not self._ray.is_initialized()
        if self._ours:
            _connect(self._ray, address or os.environ.get("RAY_ADDRESS"), count)
        self._work = self._ray.put(work)
        self._shared = self._ray.put(shared)
        self._task = self._ray.remote(num_cpus=1, max_retries=0)(_attempt_there)
        self._numbers: dict[Any, int] = {}

    @property
    def slots(self) -> int:
        """As many as asked for, or one more than there are CPUs, so that none waits for this process."""
        return self._count or 1 + int(self._ray.cluster_resources().get("CPU", 0))

    def start(self, number: int, call: Any) -> None:
        """Submit a task."""
        task = self._task.remote(__version__, self._work, self._shared, call)
        self._numbers[task] = number

    def wait(self) -> list[Ended]:
        """Wait for a task to end."""
        ended, _ = self._ray.wait(list(self._numbers), num_returns=1)
        return [self._ended(task) for task in ended]

    def close(self) -> None:
        """Cancel what runs, and end a Ray of our own or the connection."""
        for task in self._numbers:
            with suppress(Exception):  # what cannot be cancelled any more is gone
                self._ray.cancel(task, force=True)
        self._numbers.clear()
        if self._ours:
            self._ray.shutdown()

    def _ended(self, task: Any) -> Ended:
        number = self._numbers.pop(task)
        try:
            result, error = self._ray.get(task)
        except self._ray.exceptions.RayTaskError as broken:
            return Ended(number, error=_there(broken))
        except self._ray.exceptions.RuntimeEnvSetupError as broken:
            return Ended(number, error=ConfigError(f"Ray: {_first_line(broken)}"))
        except self._ray.exceptions.RayError as gone:
            return Ended(number, lost=f"{type(gone).__name__}: {_first_line(gone)}")
        return Ended(number, result, error)


def _attempt_there(
    version: str, work: Work, shared: Any, call: Any
) -> tuple[Any, BaseException | None]:  # pragma: no cover - runs in Ray's workers
    if version != __version__:
        return None, ConfigError(
            f"Ray node {socket.gethostname()} has headway {__version__}, this machine {version}: "
            "install the same on all"
        )
    return attempt(work, shared, call)


def _installed() -> Any:
    # Ray reads these when it is imported: no report of its use to anyone, no word about GPUs that are not
    # asked for.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise ConfigError("backend ray: Ray is not installed: pip install 'headway[ray]'") from None
    return ray


def _connect(ray: Any, address: str | None, count: int | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        what = "a Ray on this machine could not be started"
        options = quiet | {
            "num_cpus": count or os.cpu_count(),
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
    else:
        what = f"no Ray cluster at {address}"
        options = quiet
        _check_reachable(address)
    try:
        ray.init(address or "local", **options)
    except Exception as error:
        raise ConfigError(f"backend ray: {what}: {_first_line(error)}") from None


def _check_reachable(address: str) -> None:
    """Knock first: where nobody or somebody else answers, Ray itself tries for minutes."""
    if address == "auto":
        return
    url = urlsplit(address if "://" in address else f"gcs://{address}")
    try:
        host, port = url.hostname, url.port
    except ValueError:
        host = port = None
    if not host or not port or url.scheme not in ("gcs", "ray"):
        raise ConfigError(f"address {address!r}: write HOST:PORT, ray://HOST:PORT or auto")
    try:
        with socket.create_connection((host, port), _CONNECT_TIMEOUT_S) as connection:
            spoken = _speaks_http2(connection)
    except OSError as error:
        raise ConfigError(f"backend ray: no Ray cluster at {address}: {error.strerror or error}") from None
    if not spoken:
        raise ConfigError(f"backend ray: no Ray cluster at {address}: what answers there is not Ray")


def _speaks_http2(connection: socket.socket) -> bool:
    """Whether a server greets as gRPC's do, the cluster's and Ray Client's; with TLS there is no telling."""
    if os.environ.get("RAY_USE_TLS") == "1":
        return True
    connection.settimeout(_CONNECT_TIMEOUT_S)
    connection.sendall(_HTTP2_PREFACE + _HTTP2_SETTINGS)
    greeting = connection.recv(4)
    return len(greeting) == 4 and greeting[3] == _HTTP2_SETTINGS[3]


def _there(broken: Any) -> HeadwayError:
    """What stopped a task before it came to its work: most likely a module that its node has not."""
    text = _first_line(broken.cause if isinstance(broken.cause, Exception) else broken)
    if missing := _MISSING.search(text):
        return ConfigError(f"a Ray node has no module {missing[1]}: install it there, Headway and all")
    return HeadwayError(f"a Ray node could not take the job: {text}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
