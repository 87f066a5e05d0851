"""Decides which gateway `headway serve` starts: a file's, one by another router's flags, or one before an
embedded cluster.
"""

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import orjson
import typer
from rich.markup import escape

from headway.cli.console import friendly, option, port_number, stderr, stdout
from headway.cli.emulate import Batch, DialectName, Seed, Speed
from headway.core.errors import ConfigError

if TYPE_CHECKING:
    from headway.front.config import FrontConfig
    from headway.hosts.gateway import Gateway, GatewayConfig

__all__ = ["OTHER_FLAGS", "loop_factory", "need_extra", "serve", "summary"]

log = logging.getLogger("headway.gateway")

#: Flags of other routers take several words each; they are read by `drop_in.py`.
OTHER_FLAGS = {"ignore_unknown_options": True, "allow_extra_args": True}

#: What runs where nothing is said. At this pace two cores carry gateway, engines and client.
CLUSTER, SPEED = "dsv3-h200-pd", 0.25

_WHAT, _WHERE = "What is served", "Where"

#: Printed in place of the page's address. Square brackets are escaped: rich reads them as markup.
_NO_PAGE = escape("needs an operator token ([admin] token_env) or a bind for operators ([admin] port)")


class _Said(NamedTuple):
    """What the command line says whatever else there is; it overrules a file."""

    host: str | None
    port: int | None
    policy: str | None
    log_level: str | None

    def over(self, config: "GatewayConfig", where: str) -> "GatewayConfig":
        """Return a configuration with this said."""
        data = config.model_dump()
        level = {"warn": "warning", "critical": "error"}.get(self.log_level or "", self.log_level)
        for table, key, value in (
            ("server", "host", self.host),
            ("server", "port", self.port),
            ("policy", "cluster", self.policy),
            ("logs", "level", level),
        ):
            if value is not None:
                data[table][key] = value
        return type(config).parse(data, where=where)


class _Plan(NamedTuple):
    """A gateway to be, what a person is told about it, and where it is from. `again` reads its file once
    more.
    """

    config: "GatewayConfig"
    about: str
    where: str
    again: "Callable[[], GatewayConfig] | None" = None


@friendly
def serve(
    context: typer.Context,
    config: Annotated[Path | None, option("A gateway file.", _WHAT, metavar="FILE")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check the configuration, start nothing.", rich_help_panel=_WHAT)
    ] = False,
    policy: Annotated[
        str | None, option("The cluster policy [dim](default: staggered)[/].", _WHAT, metavar="NAME")
    ] = None,
    cluster: Annotated[
        str | None,
        option(
            f"Without a file: the embedded cluster [dim](default: {CLUSTER})[/].",
            "Which engines",
            metavar="PRESET|FILE",
        ),
    ] = None,
    batch: Batch = "vllm-v1",
    speed: Speed = SPEED,
    dialect: DialectName = "vllm",
    seed: Seed = 0,
    events: Annotated[
        bool,
        typer.Option(
            "--events/--no-events",
            help="Whether the embedded engines tell when passes end, or it is inferred.",
            rich_help_panel="Which engines",
        ),
    ] = True,
    host: Annotated[str | None, option("Address [dim](default: 127.0.0.1)[/].", _WHERE)] = None,
    port: Annotated[
        int | None,
        typer.Option(
            help="Port; 0: a free one [dim](default: 8080)[/].",
            rich_help_panel=_WHERE,
            parser=port_number,
            metavar="PORT",
        ),
    ] = None,
    log_level: Annotated[
        str | None, option("debug, info, warning or error.", "Logs", metavar="LEVEL")
    ] = None,
) -> None:
    """Serve an OpenAI-compatible API: hold requests for the right moment, place them on the right rank.

    Without a file a cluster of emulated engines runs along, so that one command shows it working. The flags
    of [bold]vllm-router[/] and [bold]smg launch[/] are understood too: a start script swaps the program's
    name. docs/gateway.md has the reference.

    [bold]Examples[/]

    DeepSeek-V3, prefill and decode apart, emulated at a quarter of its speed:
    [cyan]headway serve[/]

    Your engines:
    [cyan]headway serve --config gateway.toml --check && headway serve --config gateway.toml[/]

    In place of another router:
    [cyan]headway serve --worker-urls http://10.0.0.1:8000 http://10.0.0.2:8000 --port 30000[/]
    [cyan]headway serve --vllm-pd-disaggregation --prefill http://p:8000 --decode http://d:8000[/]
    """
    need_extra("gateway", "httptools", "msgspec", "prometheus_client", "zmq")
    said = _Said(host, port, policy, log_level)
    if context.args and (config is not None or cluster is not None):
        _refuse_unknown(context.args)
    if cluster is not None and (config is not None or context.args):
        raise ConfigError("--cluster is for the embedded cluster, where no other engines are named")
    if config is not None:
        plans = _from_file(config, context.args, said)
    elif context.args:
        plans = _before_engines(context.args, said)
    else:
        need_extra("gateway", "aiohttp")  # the emulated engines' server
        options = {"batch": batch, "speed": speed, "dialect": dialect, "seed": seed}
        plans = _before_embedded(cluster or CLUSTER, said, options, events=events, start=not check)
    with plans as plan:
        gateway = _gateway(plan)
        if check:
            from headway.hosts.gateway.posture import warnings

            for warning in warnings(plan.config):
                stderr().print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True, highlight=False)
            stdout().print(f"[green]sound:[/] {escape(plan.about)}", soft_wrap=True, highlight=False)
        else:
            _run(gateway, plan)


def need_extra(extra: str, *modules: str) -> None:
    """Say what to install where the dependencies of a front door are not there."""
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise ConfigError(f"{error.name} is missing: pip install 'headway[{extra}]'") from None


def _refuse_unknown(words: list[str]) -> None:
    """Raise ConfigError for a flag that does not exist, before flags that do not fit are refused."""
    from headway.cli.drop_in import check_flags

    check_flags(words)


def _gateway(plan: _Plan) -> "Gateway":
    """Build the gateway, which checks what parsing cannot: secrets, certificates, the tokenizer."""
    from headway.hosts.gateway import Gateway

    try:
        return Gateway(plan.config)
    except ConfigError as error:
        raise ConfigError(f"{plan.where}: {error}") from None


# Three ways to a configuration


@contextmanager
def _from_file(file: Path, rest: list[str], said: _Said) -> Iterator[_Plan]:
    from headway.hosts.gateway import GatewayConfig

    if rest:
        raise ConfigError(f"{rest[0]}: with --config, what a gateway is stands in the file")

    def read() -> GatewayConfig:
        return said.over(GatewayConfig.from_toml(file), str(file))

    config = read()
    yield _Plan(config, f"{file}: {summary(config)}", str(file), read)


@contextmanager
def _before_engines(words: list[str], said: _Said) -> Iterator[_Plan]:
    from headway.cli.drop_in import read_flags

    drop_in = read_flags(words, host=said.host, port=said.port, policy=said.policy)
    for note in drop_in.notes:
        stderr().print(f"[yellow]warning:[/] {escape(note)}", soft_wrap=True, highlight=False)
    config = said._replace(policy=None).over(drop_in.config, "command line")
    yield _Plan(config, summary(config), "command line")


@contextmanager
def _before_embedded(
    cluster: str, said: _Said, options: dict[str, Any], *, events: bool, start: bool
) -> Iterator[_Plan]:
    from headway.cli.embedded import embedded, gateway_data
    from headway.hosts.gateway import GatewayConfig
    from headway.model.presets import load_cluster

    spec, speed, dialect = load_cluster(cluster), options["speed"], options["dialect"]
    # Said wrongly, it is told before any engine is started. A person watches: the page and errors will do.
    logs = {"level": "warning", "access": said.log_level is not None}
    config = GatewayConfig.parse({"disaggregated": spec.disaggregated, "logs": logs})
    config = said.over(config, "command line")
    pace = f"{spec.name}, emulated at {speed:g} × its speed"
    if not start:
        yield _Plan(config, f"{config.policy.cluster} over {pace}", "command line")
        return
    with embedded(spec, **options) as endpoints:
        data = config.model_dump() | gateway_data(
            spec, endpoints, speed=speed, dialect=dialect, events=events
        )
        config = GatewayConfig.parse(data, where=cluster)
        yield _Plan(config, f"{summary(config)} of {pace}", cluster)


def summary(config: "FrontConfig") -> str:
    """Write a configuration in a few words: who decides, over what."""
    pools = [
        f"{len(ranks)} {role} × {'/'.join(map(str, sorted(set(ranks))))} ranks"
        for role in ("prefill", "decode", "aggregated")
        if (ranks := [each.ranks for each in config.instances if each.role.value == role])
    ]
    found = config.discovery
    where = "no engine yet"
    if found is not None:
        pool = f"InferencePool {found.pool}" if found.pool else found.watched
        where = f"the engines of {found.file or pool}"
    return f"{config.policy.cluster} over {', '.join(pools) or where}"


# Running


def _run(gateway: "Gateway", plan: _Plan) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP reads the file again, where there is one."""
    from headway.hosts.gateway import serve as until_stopped

    def ready() -> None:
        again = _ignored if plan.again is None else _reloader(gateway, plan.again)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, again)
        _greet(gateway, plan)

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(until_stopped(gateway, ready))


def _reloader(gateway: "Gateway", read: "Callable[[], GatewayConfig]") -> Callable[[], None]:
    """Return what SIGHUP does. A file that is wrong changes nothing; what needs a restart is named."""
    from headway.hosts.gateway.config import waits_for_restart

    reloads: set[asyncio.Task[None]] = set()

    async def again() -> None:
        try:
            config = read()
            await gateway.reload(config)
            log.info("configuration read again")
            if tables := waits_for_restart(gateway.config, config):
                log.warning(
                    "only [[instances]] and keys in files change at once, a restart is needed for: %s",
                    ", ".join(tables),
                )
        except ConfigError as error:
            log.error("configuration not read again: %s", error)

    def reload() -> None:
        task = asyncio.get_running_loop().create_task(again())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    return reload


def _ignored() -> None:
    """Take no notice of SIGHUP: it would end the gateway without a drain."""
    log.warning("SIGHUP is ignored: there is no file to read again")


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's, where it is there."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _greet(gateway: "Gateway", plan: _Plan) -> None:
    """Say where it is and how to ask it something."""
    url = _reachable(gateway.url)
    lines = [f"[bold]headway serves[/] on [bold]{gateway.url}[/]: {escape(plan.about)}"]
    page = gateway.page_url
    lines.append(f"  page     {_NO_PAGE if page is None else _reachable(page)}")
    if gateway.admin_url is not None:
        lines.append(f"  admin    {gateway.admin_url}")
    lines.append(f"  metrics  {gateway.metrics_url or url}/metrics")
    lines.append(f"  try      {escape(_curl(url, gateway))}")
    for line in lines:
        stdout().print(line, soft_wrap=True, highlight=False)


def _reachable(url: str) -> str:
    """Return a URL that works from here, also where the gateway listens everywhere."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def _curl(url: str, gateway: "Gateway") -> str:
    models = sorted(gateway.workers.models())
    body = {
        "model": models[0] if models else "MODEL",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 16,
        "stream": True,
    }
    key = "" if not gateway.config.auth.checks_keys else " -H 'Authorization: Bearer KEY'"
    return (
        f"curl -N {url}/v1/chat/completions{key} -H 'Content-Type: application/json' "
        f"-d '{orjson.dumps(body).decode()}'"
    )
