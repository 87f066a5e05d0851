"""The endpoint picker of Envoy and Kubernetes: an external processor, driven by a cluster policy."""
