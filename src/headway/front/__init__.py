"""What the front doors share, each of which lets a cluster policy place the requests of real clients.

The machine that drives a policy, the engines and their health, what is told or worked out of their passes,
the reading of requests, bounds, and what is counted and logged. The doors are hosts: `hosts/gateway` carries
the requests itself, `hosts/envoy` tells an Envoy where to.
"""
