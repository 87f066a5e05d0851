"""Builds the policy of a configuration: in one pool, in two, or in two at once; under a lease or without."""

import random

from headway.core.cluster import ClusterPolicy, create_cluster
from headway.core.cluster.compose import Disaggregated
from headway.core.cluster.led import Led
from headway.core.cluster.paired import Paired
from headway.front.config import FrontConfig

__all__ = ["create_policy"]


def create_policy(config: FrontConfig) -> ClusterPolicy:
    """Build the policy, with its seed."""
    rng = random.Random(f"{config.policy.seed}/policy")
    policy = create_cluster(config.policy.cluster, disaggregated=bool(config.disaggregated), rng=rng)
    if config.both_legs_at_once and isinstance(policy, Disaggregated):
        policy = Paired(policy.prefill, policy.decode)
    return Led(policy, wait_s=config.leader.patience_s) if config.leader.shared else policy
