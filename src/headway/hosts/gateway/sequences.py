"""Serve a request for several sequences where prefill and decode are apart: as one request for each.

A handover of KV belongs to one sequence. vLLM 0.32 answers a prefill of several prompts with the transfer
parameters of the first alone (`completion/serving.py`), and SGLang counts rooms per sequence, which a router
cannot foresee. So `n` samples or a list of prompts become requests of their own, each placed by the policy,
and their answers are joined (`joined.py`).

Rule 1. The choices are numbered as an engine would: sample j of prompt i is choice i × n + j.
Rule 2. The sequences end together: when one fails or is refused, or the client leaves, the rest is cancelled.
Rule 3. What cannot be joined exactly is refused: beams, and the best of more samples than are returned, are
        ranked inside one engine.
Rule 4. The number of sequences (`limits.max_sequences`) and the bytes of their bodies are bounded.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from itertools import chain
from typing import Any

import msgspec

from headway.core.request import Slo
from headway.front.config import LimitsSpec
from headway.front.errors import Refusal, bad_request
from headway.front.json_body import ABSENT, decode, whole
from headway.front.requests import Call
from headway.front.transport import Sink
from headway.hosts.gateway.joined import Choices, EventSplitter, join_whole
from headway.hosts.gateway.serving import Serving

__all__ = ["Sequences"]

#: The bodies of all sequences together. Decoding holds Python's global lock, in a thread too: 1 ms a MiB.
MOST_BYTES = 4 << 20
#: Larger bodies and answers are split and joined in a thread, so that streams can go on between the steps.
INLINE_BYTES = 256 << 10
#: The APIs whose answers can be joined.
JOINABLE = ("/v1/chat/completions", "/v1/completions")
#: What an engine does with sequences as a group.
_GROUPED = ("use_beam_search", "best_of", "prompt_embeds")

_Fields = dict[str, msgspec.Raw]
_fields = msgspec.json.Decoder(_Fields)
_prompts = msgspec.json.Decoder(list[msgspec.Raw])
_anything = msgspec.json.Decoder(Any)

#: Reads the body of a generation.
Reader = Callable[[str, bytes], Awaitable[Call]]


class Sequences:
    """Split requests, serve the parts at once, and join their answers."""

    def __init__(self, serving: Serving, read: Reader, limits: LimitsSpec) -> None:
        self._serving = serving
        self._read = read
        self._limits = limits

    async def serve(
        self, call: Call, headers: Mapping[str, str], request_id: str, slo: Slo, priority: int, sink: Sink
    ) -> None:
        """Serve a request for several sequences to its end.

        Raises Refusal when it cannot be served, and ConnectionError when the client is gone or does not read.
        """
        most = self._limits.max_sequences
        inline = len(call.body) <= INLINE_BYTES
        bodies, samples = split(call, most) if inline else await asyncio.to_thread(split, call, most)
        calls = {body: await self._read(call.path, body) for body in dict.fromkeys(bodies)}
        joiner = _Joiner(sink, len(bodies), samples, stream=call.stream)

        async def one(number: int, body: bytes) -> None:
            part = _PartSink(joiner, number)
            flight = await self._serving.take_in(calls[body], headers, request_id, slo, priority, part)
            await self._serving.serve(flight)
            if part.refused is not None:
                raise part.refused

        try:
            async with asyncio.TaskGroup() as group:
                for number, body in enumerate(bodies):
                    group.create_task(one(number, body))
        except BaseExceptionGroup as failures:
            failure = _foremost(failures)
            if not isinstance(failure, _RefusedByEngine):
                raise failure from None
            if sink.started:
                message = "The engine refused one of the request's sequences."
                raise Refusal(failure.status, "engine_refused", message) from None
            await sink.answer(failure.status, failure.headers, failure.body)
            return
        await joiner.finish()


def split(call: Call, most: int) -> tuple[list[bytes], int]:
    """Return a body for each sequence, in the order of the choices, and the samples of each prompt.

    Raises Refusal (400) for more sequences than `most`, and for those that belong together.
    """
    if call.path not in JOINABLE:
        raise bad_request(
            "Several sequences in one request are not served where prefill and decode are apart."
        )
    if len(call.body) > MOST_BYTES:
        raise _too_large()
    fields = decode(_fields, call.body)
    prompts = _prompts_of(fields)
    if call.sequences > most:
        message = f"{call.sequences} sequences in one request: at most {most} are served."
        raise bad_request(message, param=_too_many(fields, len(prompts), most))
    samples = _count(fields, "n")
    fields.pop("n", None)
    _refuse_grouped(fields, samples)
    seed = _number(fields.get("seed"))
    rest = sum(len(bytes(value)) for name, value in fields.items() if name != "prompt")
    size = len(prompts) * rest + len(bytes(fields.get("prompt", b"")))
    if size * (1 if seed is None else samples) > MOST_BYTES:
        raise _too_large()
    bodies = [_bodies(fields, prompt, samples, seed) for prompt in prompts]
    return list(chain.from_iterable(bodies)), samples


def _bodies(fields: _Fields, prompt: msgspec.Raw | None, samples: int, seed: int | None) -> list[bytes]:
    """Return the bodies of one prompt's samples; with a seed each has its own, as vLLM gives them."""
    own = fields if prompt is None else fields | {"prompt": prompt}
    if seed is None:
        return [msgspec.json.encode(own)] * samples
    seeds = (msgspec.Raw(b"%d" % (seed + sample)) for sample in range(samples))
    return [msgspec.json.encode(own | {"seed": each}) for each in seeds]


def _prompts_of(fields: _Fields) -> list[msgspec.Raw | None]:
    """Return the prompts of a completion; a chat has one, which is not in `prompt`."""
    prompt = fields.get("prompt")
    if prompt is None or bytes(prompt)[:1] != b"[":
        return [None]
    prompts = decode(_prompts, bytes(prompt))
    several = bytes(prompts[0])[:1] in (b'"', b"[")
    return [*prompts] if several else [None]


def _too_many(fields: _Fields, prompts: int, most: int) -> str:
    """Return the field that asks for more than `most` sequences; of several, the prompts come first."""
    if prompts > most:
        return "prompt"
    return "best_of" if _count(fields, "best_of") > _count(fields, "n") else "n"


def _too_large() -> Refusal:
    message = f"The bodies of the request's sequences take more than {MOST_BYTES} bytes: send fewer at once."
    return bad_request(message)


def _refuse_grouped(fields: _Fields, samples: int) -> None:
    """Raise Refusal (400) for what an engine does with sequences as a group; drop what asks for none."""
    for name in _GROUPED:
        value = fields.pop(name, None)
        asked: object = None if value is None else decode(_anything, bytes(value))
        if asked and not (name == "best_of" and asked == samples):
            message = f"{name} with several sequences is not served where prefill and decode are apart."
            raise bad_request(message, param=name)


def _count(fields: _Fields, name: str) -> int:
    """Return a number of samples, read as the engines read it; one where the body has none."""
    return whole(fields.get(name, ABSENT), name, 1) or 1


def _number(value: msgspec.Raw | None) -> int | None:
    number = None if value is None else decode(_anything, bytes(value))
    return int(number) if isinstance(number, int | float) else None


class _RefusedByEngine(Exception):  # noqa: N818  an answer, not a fault
    """An engine refused a sequence (4xx): its answer is the client's."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        super().__init__(f"the engine answers {status}")
        self.status = status
        self.headers = headers
        self.body = body


class _Joiner:
    """Collects the parts of an answer for the client. The parts' sinks call it."""

    def __init__(self, sink: Sink, sequences: int, samples: int, *, stream: bool) -> None:
        self.sink = sink
        self.choices = Choices(samples)
        self._samples = samples
        self._stream = stream
        self._whole: list[bytes] = [b""] * sequences
        self._headers: Mapping[str, str] = {}
        self._started = False

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Begin the client's stream with the first part's."""
        if not self._started:
            self._started = True
            await self.sink.start(status, headers)

    def keep(self, number: int, headers: Mapping[str, str], body: bytes) -> None:
        """Keep a whole answer. Raises Refusal (502) where a stream was asked for."""
        if self._stream:
            raise Refusal(502, "engine_error", "The engine failed: it did not stream.")
        self._whole[number] = body
        self._headers = headers

    async def finish(self) -> None:
        """Send what is left when all parts have ended well."""
        if self._started:
            if not self.sink.push(self.choices.end()):
                await self.sink.written()
            await self.sink.end()
        else:
            body = await self._join()
            await self.sink.answer(200, self._headers, body)

    async def _join(self) -> bytes:
        if sum(map(len, self._whole)) <= INLINE_BYTES:
            return join_whole(self._whole, samples=self._samples)
        return await asyncio.to_thread(join_whole, self._whole, samples=self._samples)


class _PartSink:
    """Where the answer for one sequence goes. `started`: this sequence cannot be generated again."""

    def __init__(self, joiner: _Joiner, number: int) -> None:
        self.started = False
        self.refused: _RefusedByEngine | None = None
        self._joiner = joiner
        self._number = number
        self._events = EventSplitter()

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """See `Sink.start`."""
        self.started = True
        await self._joiner.start(status, headers)

    def push(self, chunk: bytes) -> bool:
        """See `Sink.push`."""
        choices = self._joiner.choices
        events = b"".join(choices.event(self._number, event) for event in self._events.feed(chunk))
        return self._joiner.sink.push(events) if events else True

    async def written(self) -> None:
        """See `Sink.written`."""
        await self._joiner.sink.written()

    async def write(self, chunk: bytes) -> None:
        """See `Sink.write`."""
        if not self.push(chunk):
            await self.written()

    async def end(self) -> None:
        """See `Sink.end`. The joined stream ends when all parts have."""

    async def answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """See `Sink.answer`."""
        self.started = True
        if status >= 300:
            self.refused = _RefusedByEngine(status, headers, body)
        else:
            self._joiner.keep(self._number, headers, body)


def _foremost(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the failure that the client is told: an engine's refusal before the gateway's."""
    found = list(_leaves(failures))
    return min(found, key=lambda each: 0 if isinstance(each, _RefusedByEngine) else 1)


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for each in error.exceptions for leaf in _leaves(each)]
    return [error]
