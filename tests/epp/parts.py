"""A picker's parts without a network: workers that are up, a virtual clock, an Envoy made of two lists."""

import asyncio
import math
import random
from collections import Counter
from dataclasses import dataclass

from headway.core.cluster import PoolPolicy, PoolSettings, create_cluster
from headway.core.decision_log import DecisionLog
from headway.core.events import Arrived
from headway.core.settings import setting
from headway.front.body_reader import BodyReader
from headway.front.driver import Driver
from headway.front.lengths import Lengths
from headway.front.model_catalog import ModelCard, ModelCatalog
from headway.front.worker import Worker
from headway.hosts.envoy import wire
from headway.hosts.envoy.config import EppConfig
from headway.hosts.envoy.messages import FULL_DUPLEX_STREAMED, ProcessingRequest
from headway.hosts.envoy.picks import Picks
from headway.hosts.envoy.processors import Child
from headway.hosts.envoy.remote import RemoteDesk
from headway.hosts.envoy.stream import Streams, Tools

TINY = b'{"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}'


@dataclass(frozen=True, slots=True)
class CrowdSettings(PoolSettings):
    most: int = setting(2, "so many are held, then all are let go", at_least=1)


class Crowd(PoolPolicy):
    """Holds until so many are there."""

    Settings = CrowdSettings
    settings: CrowdSettings
    summary = "hold until there are many"

    def _place(self, now):
        if len(self.buffer) >= self.settings.most:
            for waiting in list(self.buffer.values()):
                self._dispatch(waiting, min(self.ledger.ranks, key=lambda rank: rank.requests), now, "all")


class Clock:
    """A loop's `time` and `call_at`; timers ring when they are told to."""

    def __init__(self):
        self.now = 0.0
        self.timers = []

    def time(self):
        return self.now

    def call_at(self, when, callback, *args):
        timer = Timer(when, callback, args)
        self.timers.append(timer)
        return timer

    def advance(self, until):
        while due := [t for t in self.timers if t.when <= until and not t.cancelled]:
            timer = min(due, key=lambda t: t.when)
            self.timers.remove(timer)
            self.now = max(self.now, timer.when)
            timer.callback(*timer.args)
        self.now = until


class Timer:
    def __init__(self, when, callback, args):
        self.when, self.callback, self.args, self.cancelled = when, callback, args, False

    def cancel(self):
        self.cancelled = True


class NoInference:
    """Nothing is worked out: the script says when passes end."""

    acknowledged = 0

    def sent(self, *_, **__):
        pass

    prefilled = gone = sent


class Leader:
    """Leads, and has no fence to show."""

    def leads(self):
        return True

    def headers(self):
        return {}


class Workers:
    """Engines that are up, as `front.workers.Workers` has them."""

    def __init__(self, config):
        self.config = config
        self.list = [Worker(spec) for spec in config.instances]
        self.blamed = []
        self.asked_again = 0
        for worker in self.list:
            worker.health.admit(0.0)
            worker.inference = NoInference()
            worker.models = {"tiny": ModelCard(id="tiny", max_model_len=1000)}
            worker.asked_for_models = True
        self.catalog = ModelCatalog(config.server, lambda: self.list, self.ask_again, clock=lambda: 0.0)

    async def ask_again(self):
        self.asked_again += 1

    def __iter__(self):
        return iter(self.list)

    def get(self, name):
        return next((worker for worker in self.list if worker.name == name), None)

    def models(self):
        return self.catalog.lengths()

    def ready(self):
        return any(worker.takes_work() for worker in self.list)

    def missing_since_s(self, roles, model=None):
        return None if self.ready() else -math.inf

    async def until(self, condition, timeout_s):
        return condition()

    def failed(self, worker, why, *, refused):
        self.blamed.append((worker.name, "failed"))

    def at_fault(self, worker, why):
        self.blamed.append((worker.name, "at fault"))

    def unreachable(self, worker, why):
        self.blamed.append((worker.name, "unreachable"))

    def pushed_back(self, worker, retry_after_s):
        self.blamed.append((worker.name, "pushed back"))

    def check_soon(self, worker):
        pass

    def worked(self, worker):
        worker.health.served(0.0)


class Stage:
    """Picks over a policy, in virtual time. `events`: what the policy heard, `done`: what is over."""

    def __init__(self, policy="least-requests", roles=("aggregated", "aggregated"), **tables):
        data = {
            "instances": [
                {"name": f"e{n}", "url": f"http://10.0.0.{n}:8000", "role": role}
                for n, role in enumerate(roles)
            ],
            "policy": {"cluster": policy},
            "tls": {"mode": "off"},
        }
        self.config = EppConfig.parse(data | tables)
        self.clock, self.log, self.events = Clock(), DecisionLog(), []
        self.done, self.oddities, self.refused = [], Counter(), []
        self.workers = Workers(self.config)
        disaggregated = bool(self.config.disaggregated)
        self.policy = create_cluster(policy, disaggregated=disaggregated, rng=random.Random(1))
        if self.config.both_legs_at_once:
            from headway.core.cluster.paired import Paired

            self.policy = Paired(self.policy.prefill, self.policy.decode)
        self.driver = Driver(
            self.policy,
            clock=self.clock.time,
            call_at=self.clock.call_at,
            observers=[self.log, lambda now, event, actions: self.events.append(event), self._reported],
        )
        self.picks = Picks(
            self.config,
            self.driver,
            self.workers,
            elector=Leader(),
            clock=self.clock.time,
            call_at=self.clock.call_at,
            on_done=lambda over, status: self.done.append((over, status)),
            count_as=lambda what: self.oddities.update([what]),
        )
        self.lengths, self.reader = Lengths(), BodyReader()
        self.streams = Streams(
            Tools(
                self.config,
                self.picks,
                self.lengths,
                self.reader,
                self.clock.time,
                lambda *refused: self.refused.append(refused),
                self.driver.reads_prefixes,
            )
        )
        for worker in self.workers:
            worker.told = worker.up_event()
            self.driver.feed(worker.told)

    def _reported(self, now, event, actions):
        if self.config.accounting.by == "events":
            self.picks.reported(now, event, actions)

    def heard(self, *kinds):
        return [event for event in self.events if isinstance(event, kinds)]

    def arrived(self):
        return [event.request for event in self.heard(Arrived)]

    def nothing_left(self):
        buffer = self.picks.buffer
        assert (buffer.requests, buffer.tokens, buffer.bytes, buffer.in_flight) == (0, 0, 0, 0)
        assert self.driver.requests == self.picks.under_way == self.streams.open == 0
        assert not any(worker.legs for worker in self.workers)
        pools = [self.policy.prefill, self.policy.decode] if self.config.disaggregated else [self.policy]
        assert not any(pool.ledger.placements or pool.buffer for pool in pools)


class Pipe:
    """A transport that hands on what is written, in pieces of some size, at once."""

    def __init__(self, to, piece=7):
        self.to, self.piece = to, piece

    def write(self, data):
        for start in range(0, len(data), self.piece):
            self.to.data_received(data[start : start + self.piece])

    def close(self):
        self.to = wire.Link(lambda message: None, lambda: None)


class Apart:
    """A desk in another process: both ends of its socket, without the socket."""

    def __init__(self, desk, *, by_response=False):
        self.refused, self.answers = [], []
        self.child = Child(desk, lambda *refused: self.refused.append(refused), by_response)
        ours = self.child.connect()
        theirs = wire.Link(self._hear, lambda: None)
        ours._transport, theirs._transport = Pipe(theirs), Pipe(ours)
        self.send = theirs.send
        self.desk = RemoteDesk(theirs.send)

    def _hear(self, message):
        self.answers.append(message)
        self.desk.hear(message)

    def die(self):
        """The process ends: its socket closes."""
        self.child.forget()


class AbortedError(Exception):
    pass


class Envoy:
    """One ext_proc stream, from Envoy's side."""

    def __init__(self, stage, *, mode=FULL_DUPLEX_STREAMED, response=0, peer="ipv4:10.1.0.1:40000"):
        self._peer = peer
        self.stage, self.mode, self.response = stage, mode, response
        self.sent, self.heard, self.status = asyncio.Queue(), [], None
        self.task = asyncio.create_task(stage.streams.process(None, self))

    # grpc.aio's context

    def peer(self):
        return self._peer

    async def read(self):
        return await self.sent.get()

    async def write(self, message):
        self.heard.append(message)

    async def abort(self, code, details=""):
        self.status = (code, details)
        raise AbortedError(details)

    # what a test says

    def headers(self, path="/v1/chat/completions", *, method="POST", ends=False, subset=None, **headers):
        message = ProcessingRequest()
        message.protocol_config.request_body_mode = self.mode
        message.protocol_config.response_body_mode = self.response
        told = {":method": method, ":path": path} | {k.replace("_", "-"): v for k, v in headers.items()}
        for key, value in told.items():
            message.request_headers.headers.headers.add(key=key, raw_value=value.encode())
        message.request_headers.end_of_stream = ends
        if subset is not None:
            said = {"x-gateway-destination-endpoint-subset": subset}
            message.metadata_context.filter_metadata["envoy.lb.subset_hint"].update(said)
        self.sent.put_nowait(message)

    def body(self, piece=TINY, *, ends=True):
        self.sent.put_nowait(ProcessingRequest(request_body={"body": piece, "end_of_stream": ends}))

    def say(self, **message):
        self.sent.put_nowait(ProcessingRequest(**message))

    def half_close(self):
        self.sent.put_nowait(object())

    async def turn(self):
        """Let everything run that can."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def end(self):
        self.half_close()
        await self.task

    # what it was told

    @property
    def destination(self):
        """Return (endpoints in the header, in the metadata, our key, all headers set, headers removed)."""
        reply = next(
            each for each in self.heard if each.WhichOneof("kind") and each.HasField("dynamic_metadata")
        )
        common = getattr(reply, reply.WhichOneof("kind")).response
        set_ = {
            each.header.key: each.header.raw_value.decode() for each in common.header_mutation.set_headers
        }
        metadata = reply.dynamic_metadata
        name = "x-gateway-destination-endpoint"
        return (
            set_[name],
            metadata["envoy.lb"][name],
            metadata["headway"]["key"],
            set_,
            list(common.header_mutation.remove_headers),
        )

    @property
    def refusal(self):
        (reply,) = [each.immediate_response for each in self.heard if each.HasField("immediate_response")]
        headers = {each.header.key: each.header.raw_value.decode() for each in reply.headers.set_headers}
        return reply.status.code, headers, reply.body
