"""The emulator as a process of its own: ready, killed, started again, stopped."""

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

CODE = """
import sys
sys.path.insert(0, sys.argv[1])
from emulated import cluster
from headway.hosts.emulator import run_emulator
def ready(endpoints):
    print(endpoints[0].url, flush=True)
run_emulator(cluster(), speed=10.0, base_port=0, on_ready=ready)
print("stopped", flush=True)
"""


def start() -> tuple[subprocess.Popen[str], str]:
    """Start an emulator; return it and its URL."""
    here = str(Path(__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, here], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline().strip()


def engine_id(url: str) -> str:
    """Ask a prefill of the engine; its answer says under which life the KV is kept."""
    body = {"prompt": "x", "kv_transfer_params": {"do_remote_decode": True}}
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=5) as response:
        return json.load(response)["kv_transfer_params"]["remote_engine_id"]


def test_sigterm_stops_it_cleanly():
    process, url = start()
    assert engine_id(url).startswith("engine-0@")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=5)
    assert (process.returncode, out, err) == (0, "stopped\n", "")


def test_killed_it_comes_back_in_a_higher_epoch():
    epochs = []
    for _ in range(2):
        process, url = start()
        epochs.append(int(engine_id(url).partition("@")[2]))
        process.kill()
        process.communicate(timeout=5)
    assert epochs[1] > epochs[0]
