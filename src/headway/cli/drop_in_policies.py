"""Decides which of our cluster policies stands for one of another router's."""

from headway.core.cluster import cluster_policies
from headway.core.errors import unknown_name

__all__ = ["BY_LOAD", "BY_PREFIX", "POLICIES", "our_policy"]

#: Their policies and ours. What goes by prefix there goes to the policy that counts cached prefixes; what
#: goes by key or session goes by load.
POLICIES = {
    "random": "random",
    "round_robin": "round-robin",
    "passthrough": "round-robin",
    "power_of_two": "power-of-two",
    "least_load": "least-tokens",
    "bucket": "least-tokens",
    "cache_aware": "staggered",
    "kv_aware": "staggered",
    "prefix_hash": "staggered",
    "consistent_hash": "least-tokens",
    "consistent_hashing": "least-tokens",
    "sticky_least_loaded": "least-tokens",
    "manual": "least-tokens",
}
BY_PREFIX = frozenset(("cache_aware", "kv_aware", "prefix_hash"))
BY_LOAD = frozenset(name for name, ours in POLICIES.items() if ours == "least-tokens") - {"least_load"}


def our_policy(flag: str, name: str, notes: list[str]) -> str:
    """Return our policy for a name of theirs, or for one of ours with its settings; ours by default.

    `notes` gets a line where it differs from theirs. Raises ConfigError for an unknown name.
    """
    if not name:
        return "staggered"
    if name in BY_PREFIX:
        return _by_prefix(flag, name, notes)
    if name in POLICIES:
        if name in BY_LOAD:
            notes.append(f"{flag} {name}: {POLICIES[name]}, which goes by load and keeps no affinity")
        return POLICIES[name]
    plain = name.partition("+")[0].partition(":")[0]
    if ":" not in name and plain not in cluster_policies.names():
        raise unknown_name("policy", name, (*POLICIES, *cluster_policies.names()), where=flag)
    return name


def _by_prefix(flag: str, name: str, notes: list[str]) -> str:
    """Prefill goes where a prompt's beginning is cached; a decode pool gets its KV from there."""
    if flag == "--decode-policy":
        notes.append(f"{flag} {name}: least-tokens, for decode has no prompt to compute")
        return "least-tokens"
    ours = POLICIES[name]
    notes.append(f"{flag} {name}: {ours}, which looks for cached prefixes on the ranks free next")
    return ours
