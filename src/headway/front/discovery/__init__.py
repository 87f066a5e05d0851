"""Which engines there are, where the configuration does not list them: an InferencePool's, or a file's."""

from headway.front.config import FrontConfig
from headway.front.discovery.contract import Found, Source
from headway.front.discovery.file import FileSource
from headway.front.discovery.follow import Discovery

__all__ = ["Discovery", "Found", "Source", "create_source"]


def create_source(config: FrontConfig) -> Source | None:
    """Build what `[discovery]` asks for and check that it can work; None without one. Raises ConfigError."""
    spec = config.discovery
    if spec is None:
        return None
    source: Source
    if spec.file is not None:
        source = FileSource(spec, spec.file, config.check_instance)
    else:
        from headway.front.discovery.kubernetes import KubernetesSource  # it needs aiohttp, nothing else does

        source = KubernetesSource(spec, config.check_instance)
    source.check()
    return source
