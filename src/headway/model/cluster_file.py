"""Writes a cluster as the TOML file that `ClusterSpec.from_toml` reads."""

import tomli_w

from headway.model.cluster import ClusterSpec

__all__ = ["cluster_toml"]


def cluster_toml(spec: ClusterSpec) -> str:
    """Return a cluster as TOML. Read again, it is the same cluster.

    KV blocks that follow from a pool's memory are left out, so that they follow the memory when it is edited.
    """
    data = spec.model_dump(mode="json", exclude_none=True)
    for pool, table in zip(spec.pools, data["pools"], strict=True):
        if pool.memory is not None and spec.with_pool(pool.role).pool(pool.role) == pool:
            del table["kv_blocks"]
    return tomli_w.dumps(data)
