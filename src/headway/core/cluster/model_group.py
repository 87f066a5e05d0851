"""A group of instances that share base models, with the policy that places requests on them."""

from collections import Counter

from headway.core.cluster.contract import ClusterPolicy
from headway.core.events import InstanceUp, Role

__all__ = ["ModelGroup"]

#: Models whose ranks a group remembers. Names may come from clients, so the memory must be bounded.
_MOST_MODELS = 1024


class ModelGroup:
    """Instances that share base models, and the policy that places requests on them.

    `requests`: how many requests it has that are not over.
    """

    def __init__(self, policy: ClusterPolicy) -> None:
        self.policy = policy
        self.requests = 0
        self._instances: dict[str, InstanceUp] = {}
        self._draining: set[str] = set()
        self._last: InstanceUp | None = None  # the last instance that left
        self._names: Counter[str] = Counter()  # how many instances serve a model
        self._base_names: Counter[str] = Counter()
        self._serve_any = 0  # instances that serve any model
        self._ranks_for: dict[str | None, int] = {}  # kept until an instance changes

    @property
    def is_new(self) -> bool:
        """Whether it never had an instance."""
        return not self._instances and self._last is None

    @property
    def is_unused(self) -> bool:
        """Whether it has neither instances nor requests."""
        return not (self._instances or self.requests)

    def ranks_for(self, model: str | None) -> int:
        """Return how many ranks can serve a model now, of the role with the fewest; 0 if a role has none."""
        found = self._ranks_for.get(model)
        if found is None:
            if len(self._ranks_for) >= _MOST_MODELS:
                self._ranks_for.clear()
            found = self._ranks_for[model] = self._count_ranks(model)
        return found

    def _count_ranks(self, model: str | None) -> int:
        ranks: dict[Role, int] = {}
        for name, info in self._instances.items():
            able = name not in self._draining and info.serves(model)
            ranks[info.role] = ranks.get(info.role, 0) + (info.ranks if able else 0)
        return min(ranks.values(), default=0)

    def has(self, model: str | None) -> bool:
        """Return whether an instance serves the model, draining or not; without instances, the last did."""
        if self._instances:
            return model is None or self._serve_any > 0 or model in self._names
        return self._last is not None and self._last.serves(model)

    def takes(self, info: InstanceUp) -> bool:
        """Return whether the instance shares a base model with those that are here, or with the last one."""
        if self._instances:
            shares_any = info.models is None or self._serve_any > 0
            return shares_any or any(name in self._base_names for name in _base_models(info))
        last = self._last
        if last is None or last.models is None or info.models is None:
            return True
        return not _base_models(last).isdisjoint(_base_models(info))

    def add(self, info: InstanceUp) -> None:
        """Add an instance that is up, or replace what is known of it."""
        self._count(self._instances.get(info.instance), -1)
        self._instances[info.instance] = info
        self._draining.discard(info.instance)
        self._count(info, +1)

    def drain(self, instance: str) -> None:
        """Note that an instance takes no new work."""
        self._draining.add(instance)
        self._ranks_for.clear()

    def remove(self, instance: str) -> None:
        """Remove an instance that is down."""
        self._last = self._instances.pop(instance)
        self._draining.discard(instance)
        self._count(self._last, -1)

    def _count(self, info: InstanceUp | None, change: int) -> None:
        """Count the models of an instance that comes (+1) or goes (-1)."""
        self._ranks_for.clear()
        if info is None:
            return
        self._serve_any += change * (info.models is None)
        for counts, names in ((self._names, info.models or ()), (self._base_names, _base_models(info))):
            for name in names:
                counts[name] += change
                if not counts[name]:
                    del counts[name]


def _base_models(info: InstanceUp) -> frozenset[str]:
    return info.base_models or info.models or frozenset()
