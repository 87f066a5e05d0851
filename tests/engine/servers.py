"""Starts vLLM servers on the CPU, waits until they serve, and ends them surely.

    with serving(Engine(tiny_llama())) as (server,):
        ask(server.url)

Several engines start side by side. Every server leads a session of its own; when the context is left, whoever
is in it is ended, engine cores and workers too. Standard library only: `python` names the environment with
vLLM.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

__all__ = ["Engine", "Server", "free_ports", "serving"]

#: The CPU's default puts scheduler and model into two processes, and the former spins while the latter
#: computes: on two cores an engine would leave none to its front end. By its dotted name vLLM takes it all
#: the same; why it would not, threads bound to cores, does not concern an engine of one thread.
ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
START_S, END_S, LOOK_S = 300.0, 20.0, 0.1
LOG_TAIL_BYTES = 6000
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every engine wants the first cores for itself
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True, slots=True)
class Engine:
    """What to serve. `scheduler`: dotted class; None: vLLM's own. `threads`: of each rank.

    `ranks` of an MoE model march in lockstep, with the plug-in in `lockstep_plugin/`: without expert
    parallelism, for which the CPU has no kernel, they meet in every MoE layer all the same.
    `batch_tokens`: most tokens of one step of a rank. `dummy`: random weights, of which a folder has none.
    `port`: None is any free one. `arguments` and `environment` come last and so have the last word.
    """

    model: Path
    scheduler: str | None = None
    additional_config: Mapping[str, object] | None = None
    ranks: int = 1
    threads: int = 1
    dummy: bool = True
    max_model_len: int = 4096
    batch_tokens: int = 2048
    port: int | None = None
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self, python: str, port: int) -> list[str]:
        """Return the command line."""
        command = [python, "-m", "vllm.entrypoints.cli.main", "serve", str(self.model)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", self.model.name]
        command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(self.max_model_len)]
        command += ["--max-num-batched-tokens", str(self.batch_tokens)]
        command += ["--distributed-executor-backend", ONE_PROCESS]
        if self.dummy:
            command += ["--load-format", "dummy"]
        if self.ranks > 1:
            command += ["--data-parallel-size", str(self.ranks), "--api-server-count", "1"]
        if self.scheduler is not None:
            command += ["--scheduler-cls", self.scheduler]
        if self.additional_config is not None:
            command += ["--additional-config", json.dumps(self.additional_config)]
        return [*command, *self.arguments]


class Server:
    """A server that runs. `url`: where it listens."""

    def __init__(self, engine: Engine, log: Path, python: str) -> None:
        self.engine = engine
        self.port = free_ports(1)[0] if engine.port is None else engine.port
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        environment = (
            os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(engine.threads)} | dict(engine.environment)
        )
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                engine.command(python, self.port),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, until_s: float) -> None:
        """Wait until it is healthy. Raises RuntimeError with the end of its log when it never is."""
        while not self._healthy():
            if self.process.poll() is not None:
                raise RuntimeError(f"vLLM ended with {self.process.returncode}:\n{self.tail()}")
            if time.monotonic() > until_s:
                raise RuntimeError(f"vLLM is not healthy after {START_S:g} s:\n{self.tail()}")
            time.sleep(LOOK_S)

    def tail(self) -> str:
        """Return the end of the log."""
        return self.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")

    def members(self) -> list[int]:
        """Return the processes of its session that are alive."""
        alive = (int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit())
        return [pid for pid in alive if self._is_member(pid)]

    def kill(self) -> None:
        """End it as a crash would; only its shared memory, which a crash would leave behind, is removed."""
        left = self._shared_memory()
        self._signal(signal.SIGKILL)
        self.process.wait()
        for path in left:
            path.unlink(missing_ok=True)

    def end(self) -> None:
        """End all its processes: kindly, then not."""
        self._signal(signal.SIGTERM)
        if not self._gone_in(END_S):
            self.kill()
            if not self._gone_in(END_S):
                raise RuntimeError(f"processes {self.members()} of vLLM do not end")
        self.process.wait()

    def _gone_in(self, patience_s: float) -> bool:
        until_s = time.monotonic() + patience_s
        while self.members() and time.monotonic() < until_s:
            time.sleep(LOOK_S)
        return not self.members()

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.members():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _shared_memory(self) -> set[Path]:
        """Return the files of shared memory that its processes have in their maps."""
        maps: list[str] = []
        for pid in self.members():
            with suppress(OSError):
                maps += Path(f"/proc/{pid}/maps").read_text().splitlines()
        return {Path(line.split()[5]) for line in maps if " /dev/shm/" in line}

    def _is_member(self, pid: int) -> bool:
        self.process.poll()  # a zombie is no member
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return int(state[3]) == self.process.pid and state[0] not in "ZX"

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2.0) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False


@contextmanager
def serving(
    *engines: Engine, python: str = sys.executable, logs: Path | None = None
) -> Iterator[tuple[Server, ...]]:
    """Serve while the context lasts. `logs`: a folder that keeps the logs; None: they go with the servers."""
    with ExitStack() as stack:
        folder = logs or Path(stack.enter_context(TemporaryDirectory(prefix="vllm-")))
        servers = []
        for number, engine in enumerate(engines):
            server = Server(engine, folder / f"vllm-{number}.log", python)
            stack.callback(server.end)
            servers.append(server)
        until_s = time.monotonic() + START_S
        for server in servers:
            server.wait(until_s)
        yield tuple(servers)


def free_ports(count: int) -> list[int]:
    """Return ports in a row that nobody listens at.

    Below those the system gives to connections: one of these may be gone when an engine binds a minute later.
    """
    while True:
        first = random.SystemRandom().randrange(15_000, 32_000)
        with ExitStack() as stack, suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return list(range(first, first + count))
