"""Where simulations run: `open_workers` chooses by name. Processes of this machine are the default."""

import os
from dataclasses import dataclass
from typing import Any

from headway.core.errors import ConfigError, unknown_name
from headway.hosts.sim.workers.contract import Ended, Work, Workers
from headway.hosts.sim.workers.here import Here
from headway.hosts.sim.workers.processes import Processes

__all__ = ["BACKENDS", "Ended", "Where", "Work", "Workers", "open_workers"]

BACKENDS = ("processes", "ray")


@dataclass(frozen=True, slots=True)
class Where:
    """Where jobs run. `workers`: how many at a time, None for one per core; `address` is Ray's.

    Raises ConfigError for a backend nobody knows, for no workers, and for an address without Ray.
    """

    backend: str = "processes"
    address: str | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise unknown_name("backend", self.backend, BACKENDS)
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers must be at least 1, got {self.workers}")
        if self.address is not None and self.backend != "ray":
            raise ConfigError(f"address {self.address!r} is for the backend ray, not {self.backend}")


def open_workers(where: Where, work: Work, shared: Any, jobs: int) -> Workers:
    """Return workers for `jobs` jobs, to be closed by the caller. Raises ConfigError as `RayWorkers` does."""
    if where.backend == "ray":
        from headway.hosts.sim.workers.ray import RayWorkers

        return RayWorkers(work, shared, address=where.address, count=where.workers)
    count = min(where.workers or os.cpu_count() or 1, jobs)
    return Here(work, shared) if count == 1 else Processes(work, shared, count)
