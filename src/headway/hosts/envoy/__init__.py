"""The endpoint picker of Envoy and Kubernetes: an external processor, driven by a cluster policy."""

from headway.hosts.envoy.config import EppConfig
from headway.hosts.envoy.picker import Picker, serve

__all__ = ["EppConfig", "Picker", "serve"]
