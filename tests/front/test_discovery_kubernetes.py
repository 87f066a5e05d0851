"""A pool and its pods, watched through a real socket: what is told, and what if the server fails."""

import asyncio
import datetime
import ipaddress
import logging
import ssl
from contextlib import asynccontextmanager

import aiohttp
import aiohttp.web
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fake_kubernetes import FakeKubernetes, pod, pool

from headway.core.errors import ConfigError
from headway.front.config import FrontConfig
from headway.front.discovery import api as kube_api
from headway.front.discovery import create_source
from headway.front.discovery import kubernetes as source_module
from headway.hosts.gateway import Gateway, GatewayConfig


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Failures are tried again at once."""
    monkeypatch.setattr(source_module, "BACKOFF_S", 0.002)
    monkeypatch.setattr(source_module, "MOST_BACKOFF_S", 0.004)


def run(test):
    asyncio.run(asyncio.wait_for(test, 10.0))


async def until(condition, what="the condition"):
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError(f"{what} did not come true")


class Heard:
    """The sets that a source told."""

    def __init__(self):
        self.sets = []

    @property
    def names(self):
        return sorted(each.name for each in self.sets[-1].instances) if self.sets else None

    @property
    def draining(self):
        return set(self.sets[-1].draining) if self.sets else None


def config(server, kind=FrontConfig, *, cluster=None, **discovery):
    if not discovery.keys() & {"selector"}:
        discovery.setdefault("pool", "llama")
    table = {"api_server": server.url, "namespace": "inference"} | discovery
    return kind.parse({"discovery": table} | (cluster or {}))


@asynccontextmanager
async def following(server, **discovery):
    heard = Heard()
    source = create_source(config(server, **discovery))
    task = asyncio.create_task(source.follow(heard.sets.append))
    try:
        yield heard
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# What is told


def test_the_pods_of_a_pool_are_told_as_they_come_change_and_go():
    async def check():
        async with FakeKubernetes() as server:
            await server.put("inferencepools", pool(ports=(8000, 8001)))
            await server.put("pods", pod("a", "10.0.0.1"))
            await server.put("pods", pod("stranger", app="other"))
            async with following(server) as heard:
                await until(lambda: heard.names == ["a"])
                assert heard.sets[-1].instances[0].rank_url(1) == "http://10.0.0.1:8001"
                await server.put("pods", pod("b", "10.0.0.2", ready=False))
                await server.put("pods", pod("b", "10.0.0.2"))
                await until(lambda: heard.names == ["a", "b"])
                await server.put("pods", pod("a", "10.0.0.1", leaving=True))
                await until(lambda: heard.draining == {"a"})
                await server.delete("pods", "a")
                await until(lambda: heard.names == ["b"])
                assert len(server.lists("pods")) == len(server.lists("inferencepools")) == 1

    run(check())


def test_only_the_own_pool_and_the_selected_pods_are_asked_for():
    async def check():
        async with FakeKubernetes() as server:
            await server.put("inferencepools", pool("other", app="nothing"))
            await server.put("inferencepools", pool(app="vllm", tier="prod"))
            async with following(server) as heard:
                await until(lambda: heard.names == [])
            assert {query["fieldSelector"] for query in server.lists("inferencepools")} == {
                "metadata.name=llama"
            }
            (query,) = server.lists("pods")
            assert query["labelSelector"] == "app=vllm,tier=prod"
            assert {path for path, _ in server.asked} == {
                "/api/v1/namespaces/inference/pods",
                "/apis/inference.networking.k8s.io/v1/namespaces/inference/inferencepools",
            }

    run(check())


def test_a_selector_needs_no_pool():
    async def check():
        async with FakeKubernetes() as server:
            await server.put("pods", pod("a"))
            async with following(server, selector="app=vllm", target_ports=[8000, 8001]) as heard:
                await until(lambda: heard.names == ["a"])
                assert heard.sets[-1].instances[0].ranks == 2
            assert not server.lists("inferencepools")

    run(check())


def test_a_pool_that_changes_takes_other_ports_and_other_pods():
    async def check():
        async with FakeKubernetes() as server:
            await server.put("inferencepools", pool())
            await server.put("pods", pod("a"))
            await server.put("pods", pod("b", app="sglang"))
            async with following(server) as heard:
                await until(lambda: heard.names == ["a"])
                await server.put("inferencepools", pool(ports=(9000, 9001, 9002)))
                await until(lambda: heard.sets[-1].instances[0].ranks == 3)
                await server.put("inferencepools", pool(app="sglang"))
                await until(lambda: heard.names == ["b"])
                assert all(each.instances for each in heard.sets)  # never nothing in between

    run(check())


def test_a_pool_that_is_deleted_leaves_its_engines_draining_until_it_is_back():
    async def check():
        async with FakeKubernetes() as server:
            await server.put("inferencepools", pool())
            await server.put("pods", pod("a"))
            async with following(server) as heard:
                await until(lambda: heard.names == ["a"])
                await server.delete("inferencepools", "llama")
                await until(lambda: heard.draining == {"a"})
                assert heard.names == ["a"]
                await server.put("inferencepools", pool())
                await until(lambda: heard.draining == set())
                assert heard.names == ["a"]

    run(check())


def test_a_pool_may_come_after_its_picker(caplog):
    async def check():
        async with FakeKubernetes() as server, following(server) as heard:
            await until(lambda: heard.names == [])
            await server.put("pods", pod("a"))
            await server.put("inferencepools", pool())
            await until(lambda: heard.names == ["a"])

    run(check())
    assert "there is no InferencePool llama in namespace inference" in caplog.messages


def test_a_pod_that_does_not_fit_is_told_in_one_line_once(caplog):
    async def check():
        async with FakeKubernetes() as server:
            await server.put("inferencepools", pool())
            await server.put("pods", pod("bad", **{"llm-d.ai/role": "decode"}))
            async with following(server) as heard:
                await until(lambda: heard.names == [])
                await server.put("pods", pod("good"))
                await until(lambda: heard.names == ["good"])

    run(check())
    (record,) = [each for each in caplog.records if each.getMessage() == "pod left out"]
    assert record.pod == "bad" and "the cluster is aggregated" in record.reason


# The server fails


def test_a_watch_that_breaks_off_goes_on_where_it_was():
    async def check():
        async with FakeKubernetes() as server:
            await server.put("inferencepools", pool())
            await server.put("pods", pod("a"))
            async with following(server) as heard:
                await until(lambda: heard.names == ["a"] and len(server.watches("pods")) == 1)
                server.cut()
                await server.put("pods", pod("b"))
                await until(lambda: heard.names == ["a", "b"])
                assert len(server.lists("pods")) == 1 and len(server.watches("pods")) > 1

    run(check())


def test_a_watch_that_ends_goes_on_where_it_was():
    async def check():
        async with FakeKubernetes() as server:
            await server.put("inferencepools", pool())
            async with following(server) as heard:
                for name in ("a", "b"):
                    await until(lambda: server.watching("pods"))
                    await server.end()
                    await server.put("pods", pod(name))
                    await until(lambda name=name: heard.names and name in heard.names)
                assert len(server.lists("pods")) == 1

    run(check())


def test_a_watch_that_is_silent_for_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr(kube_api, "WATCH_S", 0.0)  # the fake never ends it then
    monkeypatch.setattr(kube_api, "PATIENCE_S", 0.05)

    async def check():
        async with FakeKubernetes() as server:
            await server.put("inferencepools", pool())
            async with following(server) as heard:
                await until(lambda: len(server.watches("pods")) > 2, "silent watches given up")
                await server.put("pods", pod("a"))
                await until(lambda: heard.names == ["a"])
                assert len(server.lists("pods")) == 1

    run(check())


@pytest.mark.parametrize("as_event", [False, True])
def test_gone_lists_anew(as_event, caplog):
    async def check():
        async with FakeKubernetes() as server:
            await server.put("inferencepools", pool())
            await server.put("pods", pod("a"))
            async with following(server) as heard:
                await until(lambda: heard.names == ["a"] and len(server.watches("pods")) == 1)
                if as_event:
                    await server.say("ERROR", {"kind": "Status", "code": 410, "message": "too old"})
                    await server.put("pods", pod("b"))
                else:
                    await server.go_away()
                    await server.delete("pods", "a")
                    await server.put("pods", pod("b"))
                    server.compact()
                    await server.come_back()
                await until(lambda: "b" in heard.names)
                assert heard.names == (["a", "b"] if as_event else ["b"])
                assert len(server.lists("pods")) == 2

    run(check())
    assert not [message for message in caplog.messages if "410" in message]


def test_bookmarks_move_the_version_on():
    async def check():
        async with FakeKubernetes() as server:
            await server.put("inferencepools", pool())
            async with following(server) as heard:
                await until(lambda: server.watching("pods") and server.watching("inferencepools"))
                await server.say("BOOKMARK", {"kind": "Pod", "metadata": {"resourceVersion": "4711"}})
                await server.end()
                await until(lambda: len(server.watches("pods")) == 2)
                assert server.watches("pods")[-1]["resourceVersion"] == "4711" and heard.names == []

    run(check())


def test_a_server_that_is_away_keeps_the_last_set_and_is_told_once_each_way(caplog):
    async def check():
        async with FakeKubernetes() as server:
            await server.put("pods", pod("a"))
            async with following(server, selector="app=vllm", target_ports=[8000]) as heard:
                await until(lambda: heard.names == ["a"])
                await server.go_away()
                await until(lambda: any("Cannot connect" in message for message in caplog.messages))
                told = len(heard.sets)
                await asyncio.sleep(0.05)  # many tries
                assert len(heard.sets) == told
                await server.come_back()
                await server.put("pods", pod("b"))
                await until(lambda: heard.names == ["a", "b"])

    with caplog.at_level(logging.INFO, "headway.discovery"):
        run(check())
    away = [message for message in caplog.messages if "Cannot connect" in message]
    assert len(away) == 1 and away[0].startswith("cannot watch /api/v1/namespaces/inference/pods: ")
    assert caplog.messages.count("/api/v1/namespaces/inference/pods can be watched again") == 1


def test_what_is_forbidden_is_said_in_the_servers_words_and_tried_again(caplog):
    message = 'pods is forbidden: User "system:serviceaccount:x:y" cannot list resource "pods"'

    async def check():
        async with FakeKubernetes() as server:
            server.refuse["pods"] = (403, message)
            await server.put("inferencepools", pool())
            await server.put("pods", pod("a"))
            async with following(server) as heard:
                await until(lambda: len(server.lists("pods")) > 3)
                assert heard.names is None
                server.refuse.clear()
                await until(lambda: heard.names == ["a"])

    run(check())
    assert caplog.messages == [f"cannot watch /api/v1/namespaces/inference/pods: 403 {message}"]


@pytest.mark.parametrize(
    "garbage",
    [b"<html>", b'{"kind": "List"}', b'{"metadata": {"resourceVersion": "1"}, "items": 3}'],
)
def test_an_answer_that_is_none_is_one_line_and_tried_again(garbage, caplog, monkeypatch):
    sound = kube_api.Api.list
    answers = [garbage]

    async def once(self, path, params):
        return answers.pop() if answers else await sound(self, path, params)

    monkeypatch.setattr(kube_api.Api, "list", once)

    async def check():
        async with FakeKubernetes() as server:
            await server.put("pods", pod("a"))
            async with following(server, selector="app=vllm", target_ports=[8000]) as heard:
                await until(lambda: heard.names == ["a"])

    run(check())
    (line,) = caplog.messages
    assert line.startswith("cannot watch /api/v1/namespaces/inference/pods: not a ") and "\n" not in line


# Objects that cannot be read


def unreadable(name, ip="10.0.0.9"):
    return pod(name, ip) | {"status": None}


def test_a_pod_that_cannot_be_read_keeps_no_other_out_and_is_named_once(caplog):
    async def check():
        async with FakeKubernetes() as server:
            await server.put("inferencepools", pool())
            await server.put("pods", pod("a"))
            await server.put("pods", unreadable("odd"))  # in the list
            async with following(server) as heard:
                await until(lambda: heard.names == ["a"])
                await server.put("pods", unreadable("odd2"))  # as events
                await server.put("pods", unreadable("odd"))
                await server.put("pods", pod("b"))
                await until(lambda: heard.names == ["a", "b"])
                await server.put("pods", pod("odd", "10.0.0.9"))
                await until(lambda: heard.names == ["a", "b", "odd"])
                await server.delete("pods", "odd2")
                await server.put("pods", pod("c"))
                await until(lambda: heard.names == ["a", "b", "c", "odd"])
            assert len(server.lists("pods")) == 1

    run(check())
    named = [each.object for each in caplog.records if "cannot be read" in each.getMessage()]
    assert named == ["odd", "odd2"]


def test_a_pod_that_cannot_be_read_any_more_stays_what_it_was():
    async def check():
        async with FakeKubernetes() as server:
            await server.put("inferencepools", pool())
            await server.put("pods", pod("a"))
            async with following(server) as heard:
                await until(lambda: heard.names == ["a"])
                await server.put("pods", unreadable("a"))
                await server.put("pods", pod("b"))
                await until(lambda: heard.names == ["a", "b"])

    run(check())


def test_a_pool_that_cannot_be_read_leaves_its_engines_as_they_are():
    async def check():
        async with FakeKubernetes() as server:
            await server.put("inferencepools", pool())
            await server.put("pods", pod("a"))
            async with following(server) as heard:
                await until(lambda: heard.names == ["a"])
                await server.put("inferencepools", pool() | {"spec": None})
                await server.put("pods", pod("b"))
                await until(lambda: heard.names == ["a", "b"])
                assert not heard.draining

    run(check())


def test_two_pods_at_one_address_are_one_engine(caplog):
    async def check():
        async with FakeKubernetes() as server:
            await server.put("inferencepools", pool())
            await server.put("pods", pod("a", "10.0.0.1"))
            async with following(server) as heard:
                await until(lambda: heard.names == ["a"])
                await server.put("pods", pod("twin", "10.0.0.1"))
                await server.put("pods", pod("b"))
                await until(lambda: heard.names == ["a", "b"])

    run(check())
    assert [each.pod for each in caplog.records if each.getMessage() == "pod left out"] == ["twin"]


# Who we are


def test_the_token_is_read_anew_when_it_was_rotated(tmp_path):
    token = tmp_path / "token"
    token.write_text("first\n")

    async def check():
        async with FakeKubernetes(token="first") as server:
            await server.put("pods", pod("a"))
            asked = {"selector": "app=vllm", "target_ports": [8000], "token_file": str(token)}
            async with following(server, **asked) as heard:
                await until(lambda: heard.names == ["a"])
                server.token = "second"
                server.cut()
                await server.put("pods", pod("b"))
                await until(lambda: len(server.lists("pods")) > 3)
                assert heard.names == ["a"]
                token.write_text("second\n")
                await until(lambda: heard.names == ["a", "b"])

    run(check())


@pytest.fixture
def certificate(tmp_path):
    """A certificate for 127.0.0.1 that vouches for itself; returns its file and the server's context."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kubernetes")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    chain, secret = tmp_path / "ca.crt", tmp_path / "key.pem"
    chain.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(chain, secret)
    return chain, context


def test_the_server_proves_itself_by_the_clusters_ca(certificate, caplog):
    chain, context = certificate

    async def check():
        async with FakeKubernetes(tls=context) as server:
            await server.put("pods", pod("a"))
            asked = {"selector": "app=vllm", "target_ports": [8000]}
            async with following(server, **asked, ca_file=str(chain)) as heard:
                await until(lambda: heard.names == ["a"])
            async with following(server, **asked) as heard:
                await until(lambda: caplog.messages)
                assert heard.names is None

    run(check())
    assert "certificate verify failed" in caplog.messages[0]


def test_a_pod_finds_server_namespace_token_and_ca_by_itself(tmp_path, monkeypatch, certificate):
    _, context = certificate
    (tmp_path / "token").write_text("mine")
    (tmp_path / "namespace").write_text("inference")
    monkeypatch.setattr(kube_api, "ACCOUNT", tmp_path)
    monkeypatch.delenv("NAMESPACE", raising=False)

    async def check():
        async with FakeKubernetes(tls=context, token="mine") as server:
            monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
            monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
            await server.put("inferencepools", pool())
            await server.put("pods", pod("a"))
            heard, source = Heard(), create_source(FrontConfig.parse({"discovery": {"pool": "llama"}}))
            task = asyncio.create_task(source.follow(heard.sets.append))
            await until(lambda: heard.names == ["a"])
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert "/api/v1/namespaces/inference/pods" in {path for path, _ in server.asked}

    run(check())


def test_outside_of_a_cluster_the_server_must_be_said(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match=r"discovery\.api_server: missing, and this is no pod"):
        create_source(FrontConfig.parse({"discovery": {"pool": "llama"}}))


# Before a gateway


def test_a_gateway_serves_from_the_pods_of_a_pool_and_drains_those_that_leave():
    """Engines on ports of their own at 127.0.0.1: a pod that leaves keeps its stream and gets nothing new."""

    async def check():
        async with FakeKubernetes() as server, engines(2) as (first, second):
            await server.put("inferencepools", pool(ports=(first.port,)))
            await server.put("pods", pod("a"))
            cluster = {"server": {"port": 0}, "health": {"interval_s": 0.05}}
            asked = config(server, GatewayConfig, cluster=cluster)
            async with Gateway(asked) as front, aiohttp.ClientSession(front.url) as client:
                assert (await chat(client), first.requests) == (200, 1)
                await server.put("pods", pod("a", leaving=True))
                await until(lambda: front.workers.named("a").draining)
                async with client.get("/ready") as answer:
                    assert answer.status == 503
                await server.put("pods", pod("a"))
                await until(lambda: not front.workers.named("a").draining)
                assert await chat(client) == 200
                await server.put("inferencepools", pool(ports=(second.port,)))
                await until(lambda: [each.spec.url for each in front.workers] == [second.url])
                await until(front.workers.ready)
                assert (await chat(client), second.requests) == (200, 1)
                await server.delete("pods", "a")
                await until(lambda: not list(front.workers))

    run(check())


class Engine:
    """Answers chats and checks."""

    requests = 0

    async def handle(self, request):
        if request.path != "/v1/chat/completions":
            return aiohttp.web.json_response({"data": []})
        self.requests += 1
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        return aiohttp.web.json_response({"choices": [{"message": {"content": "hi"}}], "usage": usage})


@asynccontextmanager
async def engines(count):
    started = []
    try:
        for _ in range(count):
            engine = Engine()
            runner = aiohttp.web.ServerRunner(aiohttp.web.Server(engine.handle), shutdown_timeout=0.05)
            await runner.setup()
            await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
            engine.port = runner.addresses[0][1]
            engine.url = f"http://127.0.0.1:{engine.port}"
            started.append((engine, runner))
        yield [engine for engine, _ in started]
    finally:
        for _, runner in started:
            await runner.cleanup()


async def chat(client):
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    async with client.post("/v1/chat/completions", json=body) as answer:
        await answer.read()
        return answer.status
