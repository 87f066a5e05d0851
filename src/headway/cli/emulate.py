"""Decides what `headway emulate` takes and shows: engines without a GPU, for a gateway to stand before."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

from headway.cli.console import friendly, option, plain_table, stdout
from headway.core.errors import ConfigError

if TYPE_CHECKING:
    from headway.hosts.emulator import Endpoint
    from headway.model.cluster import ClusterSpec

__all__ = ["Batch", "Cluster", "DialectName", "Seed", "Speed", "emulate", "to_toml"]

_ENGINES, _WHERE = "Which engines", "Where"

Cluster = Annotated[
    str, option("A preset (see headway presets) or a .toml file.", _ENGINES, metavar="PRESET|FILE")
]
Batch = Annotated[str, option("Their batch policy.", _ENGINES, metavar="NAME")]
Speed = Annotated[
    float, option("Their pace: 0.1 runs ten times as slow as the real thing.", _ENGINES, metavar="X")
]
DialectName = Annotated[str, option("vllm or sglang.", _ENGINES, "--dialect", metavar="NAME")]
Seed = Annotated[int, option("Equal seeds jitter alike.", _ENGINES, metavar="S")]


@friendly
def emulate(
    cluster: Cluster = "dsv3-h200-pd",
    batch: Batch = "vllm-v1",
    speed: Speed = 1.0,
    dialect: DialectName = "vllm",
    rank_by: Annotated[
        str, option("How a rank is named: header, or port (one for each).", _ENGINES, metavar="HOW")
    ] = "header",
    model: Annotated[
        str | None, option("The model's name [dim](default: the cluster's)[/].", _ENGINES, metavar="NAME")
    ] = None,
    only: Annotated[
        str | None, option("Instances to run [dim](default: all)[/].", _ENGINES, metavar="A,B,…")
    ] = None,
    seed: Seed = 0,
    host: Annotated[str, option("Address.", _WHERE)] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(help="First of a row of ports; 0: free ones.", rich_help_panel=_WHERE, min=0, max=65535),
    ] = 8100,
    write_config: Annotated[
        Path | None, option("Write a gateway file for headway serve --config.", _WHERE, metavar="FILE")
    ] = None,
) -> None:
    """Run OpenAI-compatible engines without a GPU: the simulator's engine model, in wall time.

    Passes take as long as the model says, times 1/speed; prefill and decode hand over as vLLM and SGLang
    do; faults are switched on while it runs (POST /fault). docs/emulator.md has the rest.

    [bold]Examples[/]

    DeepSeek-V3, prefill and decode apart, at a tenth of its speed, and a gateway before it:
    [cyan]headway emulate --speed 0.1 --write-config gateway.toml[/]
    [cyan]headway serve --config gateway.toml[/]

    Four dense engines that speak SGLang:
    [cyan]headway emulate --cluster llama8b-h100-x4 --dialect sglang[/]
    """
    from headway.cli.embedded import gateway_data
    from headway.hosts.emulator import run_emulator
    from headway.model.presets import load_cluster

    if write_config is not None and not write_config.parent.is_dir():
        raise ConfigError(f"{write_config}: there is no directory {str(write_config.parent)!r}")
    spec = load_cluster(cluster)

    def ready(endpoints: "list[Endpoint]") -> None:
        _show(spec, endpoints, speed)
        if write_config is not None:
            data = gateway_data(spec, endpoints, dialect=dialect, speed=speed)  # type: ignore[arg-type]
            write_config.write_text(to_toml(data), encoding="utf-8")
            stdout().print(f"wrote {write_config}: headway serve --config {write_config}", soft_wrap=True)

    run_emulator(
        spec,
        batch,
        seed=seed,
        speed=speed,
        host=host,
        base_port=port,
        dialect=dialect,  # type: ignore[arg-type]  # checked by the emulator itself
        rank_by=rank_by,  # type: ignore[arg-type]
        model=model,
        only=None if only is None else [name.strip() for name in only.split(",")],
        on_ready=ready,
    )


def _show(spec: "ClusterSpec", endpoints: "Sequence[Endpoint]", speed: float) -> None:
    table = plain_table(
        f"{spec.name} at {speed:g} × its speed", "instance", "role", "ranks", "HTTP", "pass events"
    )
    for each in endpoints:
        where = each.url if len(each.urls) == 1 else f"{each.url} … {each.urls[-1].rpartition(':')[2]}"
        table.add_row(f"[cyan]{each.instance}[/]", each.role.value, str(each.ranks), where, each.events)
    stdout().print(table)


def to_toml(data: dict[str, Any]) -> str:
    """Write the tables of a gateway configuration. Strings are JSON's, which TOML reads alike."""
    parts = []
    for name, value in data.items():
        tables = value if isinstance(value, list) else [value]
        head = f"[[{name}]]" if isinstance(value, list) else f"[{name}]"
        for table in tables:
            lines = [f"{key} = {orjson.dumps(each).decode()}" for key, each in table.items()]
            parts.append("\n".join([head, *lines]))
    return "\n\n".join(parts) + "\n"
