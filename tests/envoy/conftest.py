"""Skips all where there is no Envoy (make test-envoy gets one)."""

import pytest
from envoys import ENVOY


def pytest_collection_modifyitems(items):
    if ENVOY is None:
        for item in items:
            if "/envoy/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="no Envoy: make test-envoy"))
