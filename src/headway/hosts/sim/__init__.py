"""The simulator: a discrete-event host that drives policies in virtual time against the engine model."""

from headway.hosts.sim.faults import Fault, parse_fault
from headway.hosts.sim.simulate import SimResult, simulate

__all__ = ["Fault", "SimResult", "parse_fault", "simulate"]
