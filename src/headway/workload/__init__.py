"""What arrives: request lengths, prefixes and times, from a recorded trace or from a fit to one.

A `Workload` holds rows in the order and at the times they were recorded; `make_items` turns it into the
arrivals of one run at the rate asked for. Nothing here knows of clusters or policies.
"""

from headway.workload.arrivals import make_items
from headway.workload.items import Item, Items, Workload
from headway.workload.parametric import parametric, parametric_names
from headway.workload.traces import load_trace

__all__ = ["Item", "Items", "Workload", "load_trace", "make_items", "parametric", "parametric_names"]
