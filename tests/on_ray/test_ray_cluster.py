"""A Ray cluster of two nodes on this machine, reached by its address; and addresses that lead nowhere."""

import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

import headway
from headway.core.errors import ConfigError
from headway.hosts.sim.workers import ray as ray_workers

COMPARE = ["compare", "--cluster", "llama8b-h100", "--requests", "40", "--policies", "round-robin"]
COMPARE += ["--batch", "vllm-v1", "--load", "0.3,0.6"]
OPTIONS = {"cluster": "llama8b-h100", "requests": 1500, "policies": ["least-tokens"], "batch": ["vllm-v1"]}


@pytest.fixture
def cluster():
    """A head without a CPU for jobs, and two nodes of one each."""
    store = {"object_store_memory": 80 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **store})
    made.nodes = [made.add_node(num_cpus=1, **store) for _ in range(2)]
    yield made
    ray.shutdown()
    made.shutdown()


def headway_(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "headway", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def without_wall(result) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "wall_s"} for row in result.rows()]


def test_a_node_lost_half_way_changes_nothing(cluster: Cluster, tmp_path: Path):
    options = {**OPTIONS, "load": [0.3, 0.6], "seeds": 4}
    lost = []

    def lose(done: int, total: int) -> None:
        if done >= total // 2 and not lost:
            lost.append(cluster.nodes[1])
            cluster.remove_node(lost[0], allow_graceful=False)

    result = headway.compare(**options, backend="ray", address=cluster.address, progress=lose)
    assert lost and not ray.is_initialized()
    assert without_wall(result) == without_wall(headway.compare(**options, workers=1))


def test_the_command_reaches_the_cluster_by_its_address(cluster: Cluster, tmp_path: Path):
    out = tmp_path / "r.parquet"
    done = headway_(*COMPARE, "--backend", "ray", "--address", cluster.address, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert out.is_file() and len(out.with_suffix(".jsonl").read_text().splitlines()) == 2


def test_the_command_starts_a_ray_of_its_own_and_ends_it():
    done = headway_(*COMPARE, "--backend", "ray", "--workers", "2")
    assert (done.returncode, done.stderr) == (0, "")
    tables = done.stdout
    assert tables == headway_(*COMPARE, "--workers", "2").stdout


def test_a_policy_in_the_working_directory_is_found(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "from headway.core.cluster import Immediate\n"
        "class First(Immediate):\n"
        "    def _choose(self, request, ranks):\n"
        "        return ranks[0]\n"
    )
    options = [*COMPARE[:-6], "--policies", "mine:First", *COMPARE[-4:], "--backend", "ray", "--workers", "2"]
    code = "from headway.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "First" in done.stdout


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1: Connection refused"),
        ("ray://127.0.0.1:1", "no Ray cluster at ray://127.0.0.1:1: Connection refused"),
        ("no-such-host.invalid:6379", "no Ray cluster at no-such-host.invalid:6379: "),
        ("auto", "no Ray cluster at auto: "),
        ("somewhere", "address 'somewhere': write HOST:PORT, ray://HOST:PORT or auto"),
        ("http://127.0.0.1:80", "address 'http://127.0.0.1:80': write HOST:PORT"),
    ],
)
def test_an_address_that_leads_nowhere_is_one_line(address: str, message: str):
    done = headway_(*COMPARE, "--backend", "ray", "--address", address)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_server_that_is_not_ray_is_told_from_one(says: bytes, monkeypatch: pytest.MonkeyPatch):
    """One that says nothing at all is given up too; Ray would try it for minutes."""

    def answer() -> None:
        with server.accept()[0] as peer, suppress(ConnectionResetError):
            peer.sendall(says)
            while peer.recv(1024):
                pass

    monkeypatch.setattr(ray_workers, "_CONNECT_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        answering = threading.Thread(target=answer)
        answering.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"^backend ray: no Ray cluster at {address}: "):
            headway.compare(**OPTIONS, backend="ray", address=address)
        answering.join()
