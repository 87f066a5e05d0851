"""These tests need vLLM, which has an environment of its own: `make test-engine`."""

import logging
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

collect_ignore_glob = [] if find_spec("vllm") else ["*"]


def pytest_configure(config):
    """Warnings are errors, but what torch has deprecated of its own is not ours to mend."""
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:torch")


class Clock(SimpleNamespace):
    """Stands still until it is told."""

    s = 1000.0

    def monotonic(self):
        return self.s

    def time(self):
        return self.s + 1e9


@pytest.fixture
def clock(monkeypatch):
    """The plug-in's time."""
    from headway.hosts.vllm import driver, view

    clock = Clock()
    for module in (driver, view):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def complaints():
    """Return the log records of the plug-in, as they come."""
    heard = []
    handler = logging.Handler()
    handler.emit = heard.append
    log = logging.getLogger("vllm.headway")
    log.addHandler(handler)
    yield heard
    log.removeHandler(handler)
