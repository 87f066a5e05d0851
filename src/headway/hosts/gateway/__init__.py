"""The gateway: the OpenAI-compatible front door of a cluster, driven by a cluster policy."""

from headway.front.config import InstanceSpec
from headway.front.driver import Driver
from headway.hosts.gateway.config import GatewayConfig
from headway.hosts.gateway.gateway import Gateway, serve

__all__ = ["Driver", "Gateway", "GatewayConfig", "InstanceSpec", "serve"]
