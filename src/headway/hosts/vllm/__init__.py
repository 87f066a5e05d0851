"""Headway inside vLLM: a scheduler class that forms each step by a batch policy, and what goes with it.

    vllm serve MODEL --scheduler-cls headway.hosts.vllm.AsyncFairScheduler --middleware
    headway.hosts.vllm.Middleware

The names are found on first use: a process that needs only the middleware does not load vLLM's scheduler, and
the version of vLLM is looked at before anything of its inside is imported.
"""

from importlib import import_module
from typing import Any

from headway.hosts.vllm.versions import require_supported

__all__ = ["AsyncFairScheduler", "FairScheduler", "Middleware", "StatLogger"]

_HOMES = {
    "AsyncFairScheduler": "scheduler",
    "FairScheduler": "scheduler",
    "Middleware": "middleware",
    "StatLogger": "metrics",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module. Raises ConfigError under a version of vLLM not supported."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "Middleware":
        require_supported()
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
