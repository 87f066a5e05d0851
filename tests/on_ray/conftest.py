"""These tests need Ray, which has an environment of its own: `make test-ray`."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("ray") else ["*"]
