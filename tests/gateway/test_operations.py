"""What operators get: logs without prompts, traces, metrics, and alerts and a dashboard that fit them."""

import asyncio
import io
import json
import logging
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from standins import CHAT, DONE, EVENT, StandIn, chat, gateway, run, running, until
from test_gateway_disaggregated import config as disaggregated

from headway.core.errors import ConfigError
from headway.core.events import PassEnded
from headway.front import logs as gateway_logs
from headway.front.config import LogsSpec
from headway.front.logs import logging_as_json
from headway.hosts.gateway import Gateway, GatewayConfig
from headway.hosts.gateway.config import TracesSpec
from headway.hosts.gateway.tracing import SpanTracing, Tracing, make_tracing

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy/prometheus/alerts.yml"
DASHBOARD = ROOT / "deploy/grafana/dashboard.json"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PROMPT = "the secret of the pharaohs"


# Logs


def logged(test, spec=None):
    """Run a test's coroutine and return the lines it logged."""
    stream = io.StringIO()
    with logging_as_json(spec or LogsSpec(), stream):
        run(test)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [line for line in lines if line["message"] != "worker up"]


def test_every_request_is_a_line_that_says_how_it_went():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            body = CHAT | {"messages": [{"role": "user", "content": PROMPT}]}
            await chat(client, body, stream=True, headers={"x-request-id": "mine", "traceparent": PARENT})
            await until(lambda: not front.driver.requests)

    (line,) = logged(check())
    assert (line["message"], line["logger"], line["level"]) == ("request", "headway.access", "info")
    assert line["request_id"].startswith("mine") and line["trace_id"] == PARENT[3:35]
    assert (line["path"], line["status"], line["code"], line["model"]) == (
        "/v1/chat/completions",
        200,
        None,
        "tiny",
    )
    assert (line["prompt_tokens"], line["output_tokens"], line["instances"]) == (7, 3, ["engine-0"])
    assert 0.0 <= line["queue_s"] <= line["ttft_s"] <= line["duration_s"] < 5.0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])


def test_no_line_holds_a_prompt_an_answer_or_a_key():
    async def check():
        async with StandIn() as engine, gateway([engine], limits={"max_body_bytes": 200}) as (_, client):
            key = {"Authorization": "Bearer sk-secret"}
            body = CHAT | {"messages": [{"role": "user", "content": PROMPT}]}
            engine.chunks = [EVENT.replace(b"tok", b"the answer"), DONE]
            await chat(client, body, headers=key, stream=True)
            await chat(client, body, headers=key, model="unknown")
            await chat(client, f'{{"messages": "{PROMPT}"'.encode(), headers=key)
            await chat(client, body, headers=key, stop=[PROMPT] * 20)
            engine.status = 400
            await chat(client, body, headers=key)
            await chat(client, {"input": PROMPT}, headers=key, path=f"/v1/embeddings?q={PROMPT}")

    lines = logged(check())
    assert [line["status"] for line in lines] == [200, 404, 400, 413, 400, 400]
    assert [line.get("code") for line in lines[1:4]] == [
        "model_not_found",
        "invalid_request",
        "body_too_large",
    ]
    for secret in (PROMPT, "pharaohs", "the answer", "sk-secret"):
        assert secret not in json.dumps(lines)


def test_a_request_that_is_refused_is_counted_and_logged_once():
    async def check():
        async with StandIn() as engine, gateway([engine], limits={"buffer_requests": 1}) as (front, client):
            front.workers.drain("engine-0")
            held = asyncio.create_task(chat(client))
            await until(lambda: len(front.driver.held()) == 1)
            assert (await chat(client))[0] == 429
            front.workers.undrain("engine-0")
            assert (await held)[0] == 200
            assert front.metrics.registry.get_sample_value("headway_requests_total", {"status": "429"}) == 1
            assert front.metrics.registry.get_sample_value("headway_requests_total", {"status": "200"}) == 1

    refused, served = logged(check())
    assert (refused["message"], refused["code"]) == ("refused", "buffer_requests")
    assert (served["message"], served["status"]) == ("request", 200)


def test_the_access_log_can_be_switched_off():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):
            await chat(client)

    assert logged(check(), LogsSpec(access=False)) == []


def test_logging_is_as_it_was_afterwards():
    root = logging.getLogger()
    before = root.handlers[:], root.level
    with pytest.raises(ZeroDivisionError), logging_as_json(LogsSpec(), io.StringIO()):
        raise ZeroDivisionError
    assert (root.handlers, root.level) == before


def messages(lines):
    return [json.loads(line)["message"] for line in lines.splitlines()]


def lines_in(said):
    """How many lines these speak of, written or dropped."""
    dropped = [message for message in said if message.endswith(" lines were dropped")]
    return len(said) - len(dropped) + sum(int(message.split()[0]) for message in dropped)


def test_lines_that_nobody_reads_are_dropped_and_counted():
    handler = gateway_logs._Queue(queue.Queue(2))
    for number in range(5):
        handler.handle(logging.makeLogRecord({"msg": f"{number}"}))
    assert [handler.queue.get().getMessage() for _ in range(2)] == ["0", "1"]
    assert [handler.take_dropped(), handler.take_dropped()] == [3, 0]


def test_logging_ends_though_nobody_reads_and_says_later_what_it_dropped(monkeypatch):
    monkeypatch.setattr(gateway_logs, "MOST_LINES", 10)
    monkeypatch.setattr(gateway_logs, "LAST_LINES_S", 0.05)
    reader, writer = os.pipe()
    with os.fdopen(reader) as read:
        with os.fdopen(writer, "w") as stream:
            with logging_as_json(LogsSpec(), stream):
                for _ in range(100):  # the pipe takes six of these
                    logging.getLogger("headway").warning("x" * 10_000)
            (thread,) = (each for each in threading.enumerate() if each.name == "logs")
            said = ""
            while lines_in(messages(said)) < 100:
                said += read.readline()
            thread.join()
        assert lines_in(messages(said + read.read())) == 100


def test_what_was_dropped_is_said_at_the_end():
    stream = io.StringIO()
    with logging_as_json(LogsSpec(), stream):
        logging.getLogger().handlers[0].drop(7)
    assert messages(stream.getvalue()) == ["7 lines were dropped"]


def test_a_line_that_cannot_be_written_is_counted_and_the_next_is_written():
    stream = io.StringIO()
    with logging_as_json(LogsSpec(), stream):
        logging.getLogger("headway").warning("%d", "not a number")
        logging.getLogger("headway").warning("fine")
    assert sorted(messages(stream.getvalue())) == ["1 lines were dropped", "fine"]


def test_what_an_engine_says_goes_to_the_client_and_into_no_log():
    async def check():
        health = {"eject_after": 1, "breaker": "consecutive"}
        async with StandIn() as engine, gateway([engine], health=health) as (_, client):
            engine.status, engine.says = 500, f"cannot tokenize {PROMPT!r}"
            status, _, body = await chat(client)
            assert status == 500 and PROMPT in json.loads(body)["error"]["message"]

    lines = logged(check())
    assert {"worker ejected", "request"} <= {line["message"] for line in lines}
    assert next(line["reason"] for line in lines if "reason" in line) == "engine-0 answers 500"
    assert "pharaohs" not in json.dumps(lines)


# Traces


def test_trace_context_goes_on_to_the_engine_as_it_came():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):
            await chat(client, headers={"traceparent": PARENT, "tracestate": "a=1,b=2", "baggage": "k=v"})
            await chat(client)
            (_, given, _), (_, without, _) = engine.requests
            assert (given["traceparent"], given["tracestate"], given["baggage"]) == (PARENT, "a=1,b=2", "k=v")
            assert "traceparent" not in without  # none is invented: an engine may sample as it likes

    run(check())


@pytest.mark.parametrize(
    "header",
    [
        "garbage",
        PARENT.upper(),
        PARENT + "-more",
        "ff" + PARENT[2:],
        PARENT.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32),
        PARENT.replace("b7ad6b7169203331", "0" * 16),
        PARENT[:-1],
        " " + PARENT,
    ],
)
def test_trace_context_that_cannot_be_read_is_dropped_with_its_state(header):
    trace = Tracing().begin("/v1/completions", {"traceparent": header, "tracestate": "a=1"}, 0.0)
    assert (trace.headers, trace.trace_id) == ({}, None)


def test_trace_context_of_a_later_version_may_have_more():
    trace = Tracing().begin("/", {"traceparent": "01" + PARENT[2:] + "-more"}, 0.0)
    assert trace.trace_id == PARENT[3:35]


@pytest.fixture
def spans():
    pytest.importorskip("opentelemetry.sdk", reason="needs headway[traces]")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    exporter.provider = provider
    return exporter


def traced(data, spans):
    """A gateway from plain data whose spans are kept."""
    return running(data, tracing=SpanTracing(spans.provider, time.monotonic))


def seconds(span):
    return (span.end_time - span.start_time) / 1e9


def test_a_disaggregated_request_is_a_span_with_queue_prefill_and_decode_inside(spans):
    async def check():
        async with StandIn() as prefill, StandIn() as decode:
            prefill.extra = {"kv_transfer_params": {"remote_engine_id": "e"}}
            async with traced(disaggregated([prefill], [decode]), spans) as (_, client):
                assert (await chat(client, stream=True, headers={"traceparent": PARENT}))[0] == 200
            by_name = {span.name: span for span in spans.get_finished_spans()}
            root = by_name.pop("POST /v1/chat/completions")
            assert set(by_name) == {"queue", "prefill", "decode"}
            assert f"{root.context.trace_id:032x}" == PARENT[3:35]
            assert f"{root.parent.span_id:016x}" == PARENT[36:52]
            assert {span.parent.span_id for span in by_name.values()} == {root.context.span_id}
            assert sum(map(seconds, by_name.values())) == pytest.approx(seconds(root), abs=0.02)
            assert root.attributes["http.response.status_code"] == 200
            assert root.attributes["gen_ai.usage.output_tokens"] == 3
            assert root.attributes["headway.instances"] == ("prefill-0", "decode-0")
            for engine in (prefill, decode):  # whose spans hang under ours
                sent = engine.requests[0][1]["traceparent"]
                assert sent == f"00-{PARENT[3:35]}-{root.context.span_id:016x}-01"

    run(check())


def test_an_answer_that_does_not_stream_hides_where_its_prefill_ended(spans):
    async def check():
        async with StandIn() as engine:
            data = {"server": {"port": 0}, "instances": [{"name": "engine-0", "url": engine.url}]}
            async with traced(data | {"policy": {"cluster": "round-robin"}}, spans) as (_, client):
                await chat(client)
            assert [span.name for span in spans.get_finished_spans()] == [
                "queue",
                "generate",
                "POST /v1/chat/completions",
            ]

    run(check())


def test_a_request_that_fails_is_an_error_and_one_that_is_not_sampled_leaves_nothing(spans):
    async def check():
        async with StandIn() as engine:
            data = {"server": {"port": 0}, "instances": [{"name": "engine-0", "url": engine.url}]}
            async with traced(data | {"policy": {"cluster": "round-robin"}}, spans) as (_, client):
                engine.status = 500
                assert (await chat(client, headers={"traceparent": PARENT[:-1] + "0"}))[0] == 500
                assert not spans.get_finished_spans()
                assert engine.requests[0][1]["traceparent"].endswith("-00")
                assert (await chat(client))[0] == 500
            assert spans.get_finished_spans()[-1].status.status_code.name == "ERROR"
            assert not any(PROMPT in str(span.attributes) for span in spans.get_finished_spans())

    run(check())


def test_without_the_packages_an_endpoint_is_a_configuration_error(monkeypatch):
    spec = TracesSpec(otlp_endpoint="http://collector:4318")
    for name in [each for each in sys.modules if each.startswith("opentelemetry.exporter")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)
    with pytest.raises(ConfigError, match=r"traces.otlp_endpoint: .* is missing, install headway\[traces\]"):
        make_tracing(spec, lambda: 0.0)
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        Gateway(GatewayConfig(traces=spec))


# Metrics, alerts, dashboard

UNITS = re.compile(
    r"headway_(.*_)?(seconds|tokens|bytes|requests|ratio|legs|ejections|ready|up|slo|info|leader)(_total)?|headway_\w+_total"
)
#: What Prometheus adds to every series it scrapes.
TARGET_LABELS = {"job", "instance"}


def exported():
    """Every metric the gateway exports: series name → label names."""
    found = {}

    async def check():
        nonlocal found
        async with StandIn() as engine, gateway([engine]) as (front, _):
            for collector in front.metrics.registry._collector_to_names:
                for family in collector.collect():
                    labels = getattr(family, "_labelnames", None) or getattr(collector, "_labelnames", ())
                    found |= {series: set(labels) for series in series_of(family)}

    run(check())
    return found


def series_of(family):
    if family.type == "counter":
        return [f"{family.name}_total"]
    if family.type == "histogram":
        return [f"{family.name}_{part}" for part in ("bucket", "sum", "count")]
    return [family.name]


def alert_expressions():
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    return {rule["alert"]: rule["expr"] for rule in rules}


def dashboard_expressions():
    dashboard = json.loads(DASHBOARD.read_text())
    texts = {
        f"{p['title']} {t['refId']}": t["expr"] for p in dashboard["panels"] for t in p.get("targets", ())
    }
    return texts | {v["name"]: v["definition"] for v in dashboard["templating"]["list"] if "definition" in v}


def check_expression(name, expression, known):
    bare = expression.replace("$__rate_interval", "5m")
    series = set(re.findall(r"\b(?:headway|process)_[a-z_]+", bare))
    assert series, f"{name}: no metric in {expression}"
    for each in series:
        assert each in known, f"{name}: the gateway does not export {each}"
    for each, braces in re.findall(r"\b([a-z_]+)\{([^}]*)\}", bare):
        used = set(re.findall(r"(\w+)\s*=~?\"", braces)) - TARGET_LABELS
        assert used <= known[each], f"{name}: {each} has no label {used - known[each]}"
    for names in re.findall(r"by \(([^)]*)\)", bare):
        have = set().union(*(known[each] for each in series)) | TARGET_LABELS | {"le"}
        assert set(names.replace(" ", "").split(",")) <= have, f"{name}: {names}"


def test_metrics_are_in_base_units_and_their_labels_are_few():
    known = exported()
    ours = [name for name in known if name.startswith("headway_")]
    assert len(ours) > 30 and all(UNITS.match(name) for name in ours), [n for n in ours if not UNITS.match(n)]
    labels = set().union(*known.values())
    assert labels == {"status", "reason", "worker", "why", "target", "met", "role", "pool", "client"}
    assert {"process_cpu_seconds_total", "process_resident_memory_bytes"} <= set(known)


@pytest.mark.parametrize("source", [alert_expressions, dashboard_expressions])
def test_alerts_and_dashboard_use_only_what_is_exported(source):
    known = exported()
    expressions = source()
    assert len(expressions) >= 10
    for name, expression in expressions.items():
        check_expression(name, expression, known)


def test_the_documentation_names_every_metric():
    text = (ROOT / "docs/operations.md").read_text()
    families = {
        re.sub(r"_(bucket|sum|count)$", "", name) for name in exported() if name.startswith("headway_")
    }
    assert sorted(name for name in families if f"`{name}" not in text) == []


def test_passes_are_counted_with_what_they_had_room_for():
    async def check():
        async with (
            StandIn() as engine,
            gateway([engine], instance={"chunk_tokens": 100, "ranks": 2}) as (front, _),
        ):
            front.driver.feed(PassEnded("engine-0", 0, 1, 0, 0.25, (60, 20)))
            front.driver.feed(PassEnded("engine-0", 0, 2, 0, 0.25, (0, 0)))  # decodes only: no chunk to fill
            front.driver.feed(PassEnded("nobody", 0, 3, 0, 0.25, (9, 9)))
            value = front.metrics.registry.get_sample_value
            labels = {"worker": "engine-0"}
            assert value("headway_passes_total", labels) == 2
            assert value("headway_pass_prompt_tokens_total", labels) == 80
            assert value("headway_pass_capacity_tokens_total", labels) == 200
            assert value("headway_pass_seconds_sum", {"role": "aggregated"}) == 0.5
            assert b'worker="nobody"' not in front.metrics.text()
            front.metrics.forget("engine-0")
            assert value("headway_passes_total", labels) is None

    run(check())


def promtool(*arguments):
    tool = os.environ.get("PROMTOOL") or shutil.which("promtool")
    if tool is None:
        pytest.skip("needs promtool (Debian: prometheus)")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_alerts():
    promtool("check", "rules", str(ALERTS))


def test_alerts_fire_when_they_should():
    promtool("test", "rules", str(Path(__file__).with_name("alerts_test.yml")))


def test_promtool_accepts_the_metrics():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            await chat(client, stream=True)
            return front.metrics.text()

    text = asyncio.run(check())
    tool = os.environ.get("PROMTOOL") or shutil.which("promtool")
    if tool is None:
        pytest.skip("needs promtool (Debian: prometheus)")
    done = subprocess.run(
        [tool, "check", "metrics"], input=text, capture_output=True, timeout=20, check=False
    )
    complaints = done.stdout + done.stderr
    assert b"error while linting" not in complaints and b"no help text" not in complaints, complaints


def test_a_port_in_use_is_one_plain_line():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, _):
            port = int(front.url.rpartition(":")[2])
            line = f"^cannot listen on 127.0.0.1:{port}: address already in use$"
            with pytest.raises(ConfigError, match=line):
                async with gateway([engine], server={"port": port}):
                    pass

    run(check())


def test_a_worker_that_is_nested_too_deeply_is_refused():
    async def check():
        async with StandIn() as engine, gateway([engine], admin={"port": 0}) as (front, client):
            body, kind = b"[" * 5000 + b"]" * 5000, {"Content-Type": "application/json"}
            async with client.post(f"{front.admin_url}/workers", data=body, headers=kind) as answer:
                error = (await answer.json())["error"]
            assert (answer.status, error["code"]) == (400, "body_too_complex")
            assert error["message"] == "The body is nested too deeply."

    run(check())
