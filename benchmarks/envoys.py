"""A packaged Envoy before what the benchmarks measure, from the files under deploy/envoy."""

import json
import os
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.children import child, wait_for

ROOT = Path(__file__).resolve().parents[1]


class Envoy(NamedTuple):
    """An Envoy that runs."""

    pid: int
    url: str


def binary() -> str:
    """Return Envoy's. Raises SystemExit where there is none."""
    found = next(ROOT.glob(".venv-envoy/lib/python*/site-packages/envoy/_bin/envoy"), None)
    named = os.environ.get("ENVOY_BINARY") or (str(found) if found else None)
    if named is None:
        raise SystemExit("no Envoy: make .venv-envoy/.ready-1.40.0, or name one in ENVOY_BINARY")
    return named


def load(name: str) -> dict[str, Any]:
    """Read a configuration of deploy/envoy; the client's side and the administrator's get free ports."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "envoy" / f"{name}.yaml").read_text())
    config = json.loads(json.dumps(config))  # what an anchor names is one object
    address = config["static_resources"]["listeners"][0]["address"]["socket_address"]
    address["address"], address["port_value"] = "127.0.0.1", 0
    config["admin"]["address"]["socket_address"]["port_value"] = 0
    return config


def connections(config: dict[str, Any]) -> dict[str, Any]:
    """Return the HTTP connection manager."""
    chain = config["static_resources"]["listeners"][0]["filter_chains"][0]
    manager: dict[str, Any] = chain["filters"][0]["typed_config"]
    return manager


def cluster(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a cluster."""
    found: dict[str, Any] = next(c for c in config["static_resources"]["clusters"] if c["name"] == name)
    return found


def endpoints(urls: list[str]) -> list[dict[str, Any]]:
    """Return the endpoints of a static cluster. URLs are http://IP:PORT."""
    pairs = [url.removeprefix("http://").rpartition(":") for url in urls]
    return [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}}
        for host, _, port in pairs
    ]


def before_picker(config: dict[str, Any], picker_port: int) -> None:
    """Let a configuration ask a picker on this machine, in plain text."""
    picker = cluster(config, "picker")
    address = picker["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]
    address["socket_address"]["port_value"] = picker_port
    picker.pop("transport_socket", None)


def spread(config: dict[str, Any], streams: int) -> None:
    """Have a further connection to the picker where one has so many streams."""
    options = next(iter(cluster(config, "picker")["typed_extension_protocol_options"].values()))
    options["explicit_http_config"]["http2_protocol_options"]["max_concurrent_streams"] = streams


def without_picker(config: dict[str, Any]) -> None:
    """Leave the picker out of a configuration."""
    manager = connections(config)
    manager["http_filters"] = [f for f in manager["http_filters"] if "ext_proc" not in f["name"]]
    manager.pop("access_log", None)
    clusters = config["static_resources"]["clusters"]
    config["static_resources"]["clusters"] = [c for c in clusters if c["name"] != "picker"]


@contextmanager
def envoy(
    config: dict[str, Any], *, before: Callable[[], None] | None = None, concurrency: int = 1
) -> Iterator[Envoy]:
    """Run Envoy; yields it when it is ready."""
    with tempfile.TemporaryDirectory() as folder:
        file, admin = Path(folder) / "envoy.yaml", Path(folder) / "admin"
        file.write_text(yaml.safe_dump(config))
        command = [binary(), "-c", str(file), "--admin-address-path", str(admin), "-l", "error"]
        command += ["--use-dynamic-base-id", "--concurrency", str(concurrency)]
        with child(command, stdout=subprocess.DEVNULL, before=before) as process:
            wait_for(lambda: admin.exists() and _ready(admin.read_text()), "Envoy", process)
            with urllib.request.urlopen(f"http://{admin.read_text()}/listeners?format=json") as told:
                listener = json.load(told)["listener_statuses"][0]["local_address"]["socket_address"]
            yield Envoy(process.pid, f"http://127.0.0.1:{listener['port_value']}")


def _ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/ready") as answer:
            return answer.status == 200  # type: ignore[no-any-return]
    except OSError:
        return False
