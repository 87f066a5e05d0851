"""These tests need vLLM, which has an environment of its own: `make test-engine`."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") else ["*"]


def pytest_configure(config):
    """Warnings are errors, but what torch has deprecated of its own is not ours to mend."""
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:torch")
