"""Decides by which `ip:port` Envoy knows a rank, and picks where the policy has no say.

The policy places generations over all engines. It is not asked for what else engines answer (models,
embeddings), nor where a subset hint leaves out engines that take work: a policy knows no subsets. Those go to
the engine with the fewest requests under way, at once.
"""

from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from headway.core.events import Role
from headway.front.errors import unavailable
from headway.front.worker import Worker
from headway.front.workers import Workers

__all__ = ["Endpoints", "Place"]

Place = tuple[Worker, int]


class Endpoints:
    """The addresses of the workers' ranks."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._known: WeakKeyDictionary[Worker, Sequence[str]] = WeakKeyDictionary()

    def of(self, worker: Worker) -> Sequence[str]:
        """Return a worker's endpoints, by rank; one for all where the rank is a header's."""
        known = self._known.get(worker)
        if known is None:
            spec = worker.spec
            ranks = range(spec.ranks if spec.rank_by == "port" else 1)
            known = self._known[worker] = [_endpoint(spec.rank_url(rank)) for rank in ranks]
        return known

    def at(self, worker: Worker, rank: int) -> str:
        """Return the endpoint of a rank."""
        known = self.of(worker)
        return known[rank] if len(known) > 1 else known[0]

    def find(self, endpoint: str) -> Worker | None:
        """Return the worker at an endpoint; None when there is none (any more)."""
        return next((worker for worker in self._workers if endpoint in self.of(worker)), None)

    def able(self, role: Role | None = None, model: str | None = None) -> list[Worker]:
        """Return the workers that take work for a model: of a role, else those that a client may speak to."""
        return [
            worker
            for worker in self._workers
            if worker.takes_work()
            and worker.serves(model)
            and (worker.spec.role is role if role is not None else worker.spec.role is not Role.DECODE)
        ]

    def leaves_out(
        self, subset: frozenset[str] | None, roles: Iterable[Role], model: str | None = None
    ) -> bool:
        """Whether a hint keeps work from a rank that the policy might choose."""
        if subset is None:
            return False
        able = [worker for role in roles for worker in self.able(role, model)]
        return not all(subset.issuperset(self.of(worker)) for worker in able)

    def least_busy(self, role: Role | None, subset: frozenset[str] | None, model: str | None = None) -> Place:
        """Pick without the policy. Raises Refusal (503) when no endpoint is eligible."""
        places = [
            (worker, rank)
            for worker in self.able(role, model)
            for rank, endpoint in enumerate(self.of(worker))
            if subset is None or endpoint in subset
        ]
        if not places:
            where = "" if subset is None else " of the subset"
            raise unavailable("no_engine", f"No engine{where} is up that could take the request.")
        return min(places, key=lambda place: (len(place[0].legs), place[0].name, place[1]))

    def fallbacks(
        self, worker: Worker, most: int, subset: frozenset[str] | None, model: str | None = None
    ) -> list[str]:
        """Return where Envoy may go in place of a worker, the one with least to do first."""
        able = self.able(worker.spec.role, model) if most else []
        others = [other for other in able if other is not worker]
        others.sort(key=lambda other: len(other.legs))
        endpoints = [endpoint for other in others for endpoint in self.of(other)[:1]]
        return [each for each in endpoints if subset is None or each in subset][:most]


def _endpoint(url: str) -> str:
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{host}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
