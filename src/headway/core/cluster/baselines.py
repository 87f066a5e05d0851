"""The immediate policies everyone runs today: each request leaves the moment it comes.

They are given the best information a router can have (load reserved at decision, corrected at every pass
end), so that what a held batch gains is not gained against a straw man. Ties go to the rank chosen longest
ago.
"""

from collections.abc import Callable

from headway.core.cluster.ledger import RankLoad
from headway.core.cluster.pool import Immediate, cluster_policies
from headway.core.events import Role
from headway.core.request import Request

__all__ = ["LeastRequests", "LeastTokens", "PowerOfTwo", "RandomChoice", "RoundRobin", "VllmDp"]


def least(ranks: list[RankLoad], load: Callable[[RankLoad], float]) -> RankLoad:
    """Return the rank with the smallest load, of equals the one chosen longest ago."""
    return min(ranks, key=lambda rank: (load(rank), rank.chosen))


def tokens(rank: RankLoad) -> int:
    """Tokens a rank is busy with: prompt tokens to compute and, where it decodes, the context it holds."""
    info = rank.instance.info
    held = 0 if info.role is Role.PREFILL else rank.kv_blocks * info.block_tokens
    return rank.queued_tokens + held


@cluster_policies.register("round-robin")
class RoundRobin(Immediate):
    """Each rank in turn, going over the instances first so that neighbours in time go to different
    instances."""

    summary = "each rank in turn"
    _turn = -1

    def _choose(self, request: Request, ranks: list[RankLoad]) -> RankLoad:
        self._turn += 1
        active = self.ledger.active
        if ranks is not self.ledger.ranks:
            active = list(dict.fromkeys(rank.instance for rank in ranks))
        around, at = divmod(self._turn, len(active))
        own = active[at].ranks
        return own[around % len(own)]


@cluster_policies.register("random")
class RandomChoice(Immediate):
    """A rank at random."""

    summary = "a rank at random"

    def _choose(self, request: Request, ranks: list[RankLoad]) -> RankLoad:
        return ranks[self.rng.randrange(len(ranks))]


@cluster_policies.register("least-requests")
class LeastRequests(Immediate):
    """The rank with the fewest requests dispatched and not finished."""

    summary = "the rank with the fewest unfinished requests"

    def _choose(self, request: Request, ranks: list[RankLoad]) -> RankLoad:
        return least(ranks, lambda rank: rank.requests)


@cluster_policies.register("least-tokens")
class LeastTokens(Immediate):
    """The rank with the fewest tokens to compute and hold."""

    summary = "the rank with the fewest tokens to compute and hold"

    def _choose(self, request: Request, ranks: list[RankLoad]) -> RankLoad:
        return least(ranks, tokens)


@cluster_policies.register("power-of-two")
class PowerOfTwo(Immediate):
    """Two ranks at random, the one with fewer unfinished requests (Mitzenmacher 2001)."""

    summary = "of two ranks at random, the one with fewer unfinished requests"

    def _choose(self, request: Request, ranks: list[RankLoad]) -> RankLoad:
        pair = [ranks[self.rng.randrange(len(ranks))] for _ in range(2)]
        return least(pair, lambda rank: rank.requests)


@cluster_policies.register("vllm-dp")
class VllmDp(Immediate):
    """vLLM's data-parallel balancer: least `4·waiting + running`, counted locally between reports."""

    summary = "vLLM's DP balancer: least 4·waiting + running"

    def _choose(self, request: Request, ranks: list[RankLoad]) -> RankLoad:
        return least(ranks, lambda rank: 4 * rank.waiting + (rank.running or 0))
