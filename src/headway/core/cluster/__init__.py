"""Cluster policies: which instance and rank, and when. Importing this registers them all."""

from headway.core.cluster import baselines, decode_placement, pab, staggered, triage
from headway.core.cluster.by_model import ByModel
from headway.core.cluster.compose import check_cluster, create_cluster
from headway.core.cluster.contract import ClusterPolicy, Held
from headway.core.cluster.paired import Paired
from headway.core.cluster.pool import Immediate, PoolPolicy, PoolSettings, cluster_policies

__all__ = [
    "ByModel",
    "ClusterPolicy",
    "Held",
    "Immediate",
    "Paired",
    "PoolPolicy",
    "PoolSettings",
    "baselines",
    "check_cluster",
    "cluster_policies",
    "create_cluster",
    "decode_placement",
    "pab",
    "staggered",
    "triage",
]
