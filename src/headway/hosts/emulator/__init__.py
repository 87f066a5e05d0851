"""OpenAI-compatible engines that run the simulator's very engine model in wall time (docs/emulator.md)."""

from headway.hosts.emulator.emulator import Emulated, Emulator, Endpoint, run_emulator
from headway.hosts.emulator.faults import Fault

__all__ = ["Emulated", "Emulator", "Endpoint", "Fault", "run_emulator"]
