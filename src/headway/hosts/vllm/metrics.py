"""Shows `headway_*` on vLLM's own `/metrics`: a plug-in of vLLM's front end (`vllm.stat_logger_plugins`).

With another scheduler it shows nothing. vLLM with several API servers shows only metrics that are files
(Prometheus's multi-process mode), so ours are missing there; pass events are not.
"""

from typing import Any

from prometheus_client import REGISTRY
from vllm.v1.metrics.loggers import StatLoggerBase

from headway.hosts.vllm.exposition import Collector
from headway.hosts.vllm.reports import address

__all__ = ["StatLogger"]


class StatLogger(StatLoggerBase):  # type: ignore[misc]
    """vLLM makes one per rank in its front end; that of the first rank shows for all."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        scheduler = str(vllm_config.scheduler_config.scheduler_cls)
        self._shows = engine_index == 0 and "headway" in scheduler
        if self._shows:
            REGISTRY.register(Collector(address(vllm_config.instance_id, "stats")))

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Take in vLLM's own numbers: vLLM shows those itself."""

    def log_engine_initialized(self) -> None:
        """Say nothing."""
