"""Builds the policy of a configuration: one pool or two, a group for each model, under a lease or without."""

import random

from headway.core.cluster import ByModel, ClusterPolicy, create_cluster
from headway.core.cluster.compose import Disaggregated
from headway.core.cluster.led import Led
from headway.core.cluster.paired import Paired
from headway.front.config import FrontConfig

__all__ = ["create_policy"]


def create_policy(config: FrontConfig) -> ClusterPolicy:
    """Build the policy: one for each group of engines that serve the same models, under a lease if shared."""
    policy = ByModel(lambda number: _create_group_policy(config, number))
    return Led(policy, wait_s=config.leader.patience_s) if config.leader.shared else policy


def _create_group_policy(config: FrontConfig, number: int) -> ClusterPolicy:
    """Build the policy of a group of engines, with the seed of its number."""
    seed = f"{config.policy.seed}/policy" + (f"/{number}" if number else "")
    policy = create_cluster(
        config.policy.cluster, disaggregated=bool(config.disaggregated), rng=random.Random(seed)
    )
    if config.both_legs_at_once and isinstance(policy, Disaggregated):
        policy = Paired(policy.prefill, policy.decode)
    return policy
