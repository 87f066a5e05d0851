"""Every example prints what the file beside it says."""

import subprocess
import sys
from pathlib import Path

import pytest

from headway.hosts.gateway import GatewayConfig

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_prints_what_is_expected(name: str) -> None:
    run = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True, check=False, cwd=EXAMPLES
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == (EXAMPLES / f"{name}.txt").read_text()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("**/*.toml")), ids=lambda path: path.stem)
def test_a_gateway_file_is_sound(path: Path) -> None:
    assert GatewayConfig.from_toml(path).instances
