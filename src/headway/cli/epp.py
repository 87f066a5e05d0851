"""Decides which picker `headway epp` starts: a file's, or one for an InferencePool by llm-d's flags."""

import asyncio
import logging
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from headway.cli.console import friendly, option, stdout
from headway.cli.serve import loop_factory, need_extra, summary
from headway.core.errors import ConfigError

if TYPE_CHECKING:
    from headway.hosts.envoy import EppConfig, Picker

__all__ = ["epp"]

log = logging.getLogger("headway.picker")

_WHAT, _WHERE, _POOL = "What is picked", "Where", "Engines of an InferencePool (flags as llm-d's)"


@friendly
def epp(
    config: Annotated[Path | None, option("A picker's file.", _WHAT, metavar="FILE")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check the configuration, start nothing.", rich_help_panel=_WHAT)
    ] = False,
    policy: Annotated[
        str | None, option("The cluster policy [dim](default: staggered)[/].", _WHAT, metavar="NAME")
    ] = None,
    pool_name: Annotated[str | None, option("The InferencePool's name.", _POOL, metavar="NAME")] = None,
    pool_namespace: Annotated[
        str | None, option("Its namespace [dim](default: this pod's)[/].", _POOL, metavar="NAME")
    ] = None,
    endpoint_selector: Annotated[
        str | None,
        option("Without a pool: a label selector of the engines' pods.", _POOL, metavar="app=NAME"),
    ] = None,
    endpoint_target_ports: Annotated[
        str | None, option("The ports of such a pod, a rank each.", _POOL, metavar="8000,8001")
    ] = None,
    host: Annotated[str | None, option("Address [dim](default: 0.0.0.0)[/].", _WHERE)] = None,
    grpc_port: Annotated[
        int | None,
        typer.Option(help="For Envoy [dim](default: 9002)[/].", rich_help_panel=_WHERE, min=0, max=65535),
    ] = None,
    grpc_health_port: Annotated[
        int | None,
        typer.Option(
            help="For gRPC health checks [dim](default: 9003)[/].", rich_help_panel=_WHERE, min=0, max=65535
        ),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            help="For /metrics over HTTP [dim](default: 9090)[/].", rich_help_panel=_WHERE, min=0, max=65535
        ),
    ] = None,
    secure_serving: Annotated[
        bool | None,
        typer.Option(
            "--secure-serving/--no-secure-serving",
            help="TLS for Envoy, self-signed unless --cert-path [dim](default: on)[/].",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    cert_path: Annotated[
        Path | None, option("A folder with tls.crt and tls.key.", _WHERE, metavar="FOLDER")
    ] = None,
    processors: Annotated[
        int | None,
        typer.Option(
            help="Processes that speak with Envoy [dim](default: 1)[/].",
            rich_help_panel=_WHERE,
            min=1,
            max=64,
        ),
    ] = None,
    drain_timeout: Annotated[
        str | None,
        option("How long SIGTERM waits [dim](default: 30s)[/].", _WHERE, metavar="DURATION"),
    ] = None,
    log_level: Annotated[
        str | None, option("debug, info, warning or error.", "Logs", metavar="LEVEL")
    ] = None,
) -> None:
    """Pick endpoints for an Envoy: hold its requests for the right moment, name the right rank.

    Speaks the Endpoint Picker Protocol of the Gateway API Inference Extension (an Envoy external processor).
    What the command line says overrules the file. docs/epp.md has the reference, deploy/envoy Envoy's side.

    [bold]Examples[/]

    Your engines, listed in a file, behind the Envoy of deploy/envoy:
    [cyan]headway epp --config epp.toml --check && headway epp --config epp.toml[/]

    In place of llm-d's picker, in a pod:
    [cyan]headway epp --pool-name qwen --pool-namespace llm-d --grpc-port 9002 --metrics-port 9090[/]
    """
    need_extra("envoy", "httptools", "msgspec", "prometheus_client", "zmq", "google.protobuf", "grpc_health")
    said: dict[str, dict[str, Any]] = {
        "server": {
            "host": host,
            "grpc_port": grpc_port,
            "grpc_health_port": grpc_health_port,
            "processors": processors,
            "drain_timeout_s": None if drain_timeout is None else _seconds(drain_timeout),
        },
        "metrics": {"port": metrics_port},
        "policy": {"cluster": policy},
        "logs": {"level": log_level},
        "discovery": {
            "pool": pool_name,
            "namespace": pool_namespace,
            "selector": endpoint_selector,
            "target_ports": None if endpoint_target_ports is None else _ports(endpoint_target_ports),
        },
        "tls": _tls(secure_serving, cert_path),
    }
    where = "command line" if config is None else str(config)
    if config is None and pool_name is None and endpoint_selector is None:
        raise ConfigError("which engines? say --config FILE, --pool-name NAME or --endpoint-selector")

    def read() -> "EppConfig":
        from headway.hosts.envoy import EppConfig

        data = {} if config is None else EppConfig.from_toml(config).model_dump(exclude_unset=True)
        for table, keys in said.items():
            spoken = {key: value for key, value in keys.items() if value is not None}
            if spoken:
                data[table] = (data.get(table) or {}) | spoken
        return EppConfig.parse(data, where=where)

    picker = _picker(read(), where)
    about = f"{where}: {summary(picker.config)}"
    if check:
        stdout().print(f"[green]sound:[/] {escape(about)}", soft_wrap=True, highlight=False)
    else:
        _run(picker, about, None if config is None else read)


def _ports(text: str) -> list[int]:
    """Read ports with commas between."""
    try:
        return [int(port) for port in text.split(",")]
    except ValueError:
        raise ConfigError(f"--endpoint-target-ports: not ports with commas between: {text!r}") from None


def _seconds(text: str) -> float:
    """Read a duration as Go writes it (1m30s, 500ms); a plain number is seconds."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?(?:(\d+)ms)?", text)
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if found is None or not any(found.groups()):
        raise ConfigError(f"--drain-timeout: not a duration as 30s or 1m30s: {text!r}")
    hours, minutes, seconds, thousandths = (float(part or 0) for part in found.groups())
    return 3600 * hours + 60 * minutes + seconds + thousandths / 1000


def _tls(secure: bool | None, folder: Path | None) -> dict[str, Any]:
    if folder is not None:
        if secure is False:
            raise ConfigError("--cert-path: with --no-secure-serving there is no certificate")
        return {"mode": "files", "certificate": folder / "tls.crt", "key": folder / "tls.key"}
    return {} if secure is None else {"mode": "self-signed" if secure else "off"}


def _picker(config: "EppConfig", where: str) -> "Picker":
    """Build the picker, which checks what parsing cannot: secrets, certificates, the tokenizer."""
    from headway.hosts.envoy import Picker

    try:
        return Picker(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _run(picker: "Picker", about: str, again: "Callable[[], EppConfig] | None") -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP reads the file again, where there is one."""
    from headway.hosts.envoy import serve as until_stopped

    tasks: set[asyncio.Task[None]] = set()

    async def read_again() -> None:
        assert again is not None
        try:
            await picker.reload(again())
            log.info("configuration read again: [[instances]]; the rest needs a restart")
        except ConfigError as error:
            log.error("configuration not read again: %s", error)

    def reload() -> None:
        if again is None:
            log.warning("SIGHUP is ignored: there is no file to read again")
            return
        task = asyncio.get_running_loop().create_task(read_again())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def ready() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
        _greet(picker, about)

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(until_stopped(picker, ready))


def _greet(picker: "Picker", about: str) -> None:
    """Say where it is."""
    config = picker.config
    secure = {"off": "plain text", "self-signed": "TLS, self-signed", "files": "TLS"}[config.tls.mode]
    lines = [
        f"[bold]headway picks[/] on [bold]{config.server.host}:{picker.grpc_port}[/] ({secure}): "
        f"{escape(about)}",
        f"  health   {config.server.host}:{picker.health_port or picker.grpc_port} (gRPC)",
    ]
    if picker.metrics_url is not None:
        lines.append(f"  metrics  {picker.metrics_url}/metrics")
    if picker.admin_url is not None:
        lines.append(f"  admin    {picker.admin_url}")
    for line in lines:
        stdout().print(line, soft_wrap=True, highlight=False)
