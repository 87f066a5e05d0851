"""A worker that checks what vLLM's scheduler tells it, and a seeded stream of events for a scheduler.

`CheckedWorker` keeps the block tables and the contents of the KV cache as a real worker would, and fails when
a request is to attend to KV that was never computed for it. `run_stream` drives a scheduler through adds,
aborts, resets of the prefix cache, preemptions, adapters, drafts and grammars.
"""

import random
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import MagicMock

from scheduler_kit import Bench
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import RequestStatus

BLOCK = 16


def token_of(request_id: str, place: int) -> int:
    """Return the output token that the model puts out at a place, whatever the batch it runs in."""
    return 50 + (sum(map(ord, request_id)) * 31 + place * 17) % 9000


@dataclass
class _Known:
    """What the worker knows of a request."""

    tokens: list[int]
    prompt: int
    blocks: list[int]
    computed: int


class CheckedWorker:
    """Runs steps, and asserts that each is one that a worker could run."""

    def __init__(self, bench: Bench, max_loras: int, seed: int) -> None:
        self.computed: dict[str, int] = {}
        self._scheduler = bench.scheduler
        self._max_loras = max_loras
        self._rng = random.Random(seed)
        self._known: dict[str, _Known] = {}
        self._kv: dict[int, list[int]] = {}
        self._most = self._scheduler.scheduler_config.max_num_batched_tokens

    def check_scheduled(self, output: Any) -> None:
        """Assert the limits of a step when it was scheduled."""
        scheduler = self._scheduler
        tokens = output.num_scheduled_tokens
        assert sum(tokens.values()) == output.total_num_scheduled_tokens <= self._most
        assert len(scheduler.running) <= scheduler.max_num_running_reqs
        assert len({id(inner) for inner in scheduler.running}) == len(scheduler.running)
        waiting = {id(inner) for inner in scheduler.waiting}
        assert not waiting & {id(inner) for inner in scheduler.running}
        if self._max_loras:
            go_on = [inner for inner in scheduler.running if not _ends_with_this(inner)]
            assert len(_adapters(go_on)) <= self._max_loras, "those that sit the step out count"
            run = [scheduler.requests[each] for each in tokens]
            assert len(_adapters(run)) <= self._max_loras

    def run(self, output: Any) -> ModelRunnerOutput:
        """Run a step: compute its tokens, and sample where a request has no more to compute."""
        self._take_in(output)
        sampled = []
        for request_id, count in output.num_scheduled_tokens.items():
            sampled.append(self._compute(request_id, count, output))
            self.computed[request_id] = self.computed.get(request_id, 0) + count
        ids = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={each: n for n, each in enumerate(ids)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )

    def _take_in(self, output: Any) -> None:
        for request_id in output.finished_req_ids:
            self._known.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            prompt = list(new.prompt_token_ids)
            blocks = list(new.block_ids[0])
            self._known[new.req_id] = _Known(prompt, len(prompt), blocks, new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for n, request_id in enumerate(cached.req_ids):
            known = self._known[request_id]
            added = cached.new_block_ids[n]
            if request_id in cached.resumed_req_ids:
                known.blocks = list(added[0])
                known.computed = cached.num_computed_tokens[n]
                # What was put out but not delivered before the preemption is put out again.
                del known.tokens[known.prompt + cached.num_output_tokens[n] :]
            elif added is not None:
                known.blocks += added[0]
            assert cached.num_computed_tokens[n] >= known.computed or output.scheduled_spec_decode_tokens
            known.computed = min(known.computed, cached.num_computed_tokens[n])

    def _compute(self, request_id: str, count: int, output: Any) -> list[int]:
        known = self._known[request_id]
        drafts = output.scheduled_spec_decode_tokens.get(request_id, ())
        start, end = known.computed, known.computed + count
        assert len(known.blocks) * BLOCK >= end, f"{request_id}: too few blocks"
        for block in range(-(-start // BLOCK)):
            size = min(start - block * BLOCK, BLOCK)
            held = self._kv.get(known.blocks[block], [])[:size]
            assert held == known.tokens[block * BLOCK :][:size], f"{request_id}: KV of others in {block}"
        new = known.tokens[start:end]
        assert len(new) + len(drafts) == count, f"{request_id}: tokens that nobody put out"
        # A draft is right or wrong; the KV of a wrong one is written, and overwritten later.
        right = self._rng.randrange(len(drafts) + 1) if drafts else 0
        for place, token in enumerate([*new, *([-1] * len(drafts))], start):
            slots = self._kv.setdefault(known.blocks[place // BLOCK], [])
            del slots[place % BLOCK :]
            slots.append(token)
        known.computed = end - len(drafts)
        if known.computed < len(known.tokens):
            return []
        first = len(known.tokens) - known.prompt
        put_out = [token_of(request_id, first + n) for n in range(right + 1)]
        for n, token in enumerate(put_out[:-1]):  # the KV of drafts that were right is there
            place = known.computed + n
            self._kv[known.blocks[place // BLOCK]][place % BLOCK] = token
        known.computed += right
        known.tokens += put_out
        return put_out


def _ends_with_this(inner: Any) -> bool:
    """Whether the last token of the request is under way: it needs no further step."""
    under_way = inner.num_output_placeholders
    last = inner.num_prompt_tokens + inner.max_tokens
    return under_way > 0 and inner.num_computed_tokens + 1 - under_way >= last - 1


def _adapters(inners: Any) -> set[int]:
    return {inner.lora_request.lora_int_id for inner in inners if inner.lora_request}


@dataclass
class Served:
    """What became of a stream. `outputs`: of each request, its tokens; `ended`: how."""

    outputs: dict[str, list[int]] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    preempted: set[str] = field(default_factory=set)
    wanted: dict[str, tuple[int, int]] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    computed: dict[str, int] = field(default_factory=dict)
    steps: int = 0


def run_stream(bench: Bench, seed: int, clock: Any, *, adapters: int = 0, arrivals: int = 120) -> Served:
    """Drive the scheduler through a seeded stream until all are served; the stream does not depend on it."""
    scheduler = bench.scheduler
    worker = CheckedWorker(bench, scheduler.lora_config.max_loras if scheduler.lora_config else 0, seed)
    blocks = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    served = Served()
    in_flight: list[Any] = []
    depth = 2 if isinstance(scheduler, AsyncScheduler) else 1
    manager = scheduler.structured_output_manager
    manager.accept_tokens = lambda request, tokens: True
    manager.should_advance = lambda request: False
    compiling: list[Any] = []
    for step in range(6000):
        rng = random.Random(f"{seed}/{step}")
        if step < arrivals:
            _bring(bench, rng, step, adapters, compiling, served)
        if compiling and step % 5 == 0:
            grammar = MagicMock()
            grammar.validate_tokens = lambda tokens: tokens
            compiling.pop(0).structured_output_request._grammar = grammar
        if step < arrivals and rng.random() < 0.04 and served.wanted:
            name = rng.choice(sorted(served.wanted))
            if scheduler.requests.get(name) and name not in served.ended:
                scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
                served.aborted.add(name)
        if step < arrivals and rng.random() < 0.02:
            scheduler.reset_prefix_cache(reset_running_requests=rng.random() < 0.5)
        output = scheduler.schedule()
        worker.check_scheduled(output)
        served.preempted |= output.preempted_req_ids or set()
        in_flight.append(output)
        clock.s += 0.008 + 0.00005 * output.total_num_scheduled_tokens
        if len(in_flight) == depth:
            _end(bench, worker, in_flight.pop(0), served, rng)
        if step > arrivals and not scheduler.requests:
            break
    for output in in_flight:
        _end(bench, worker, output, served, random.Random(seed))
    assert not scheduler.requests, "all are served"
    assert not scheduler.running and not len(scheduler.waiting)
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == blocks, "no KV block is lost"
    served.computed, served.steps = worker.computed, step
    return served


def _bring(bench: Bench, rng: Any, step: int, adapters: int, compiling: list[Any], served: Served) -> None:
    for n in range(rng.randrange(1, 4) if rng.random() < 0.4 else 0):
        name = f"r{step}-{n}"
        # Some begin alike, which the prefix cache finds.
        prompt = [rng.randrange(3, 6)] * rng.randrange(1, 300) + [
            rng.randrange(10, 40) for _ in range(rng.randrange(1, 60))
        ]
        outputs = rng.randrange(1, 40)
        targets = {}
        if rng.random() < 0.5:
            targets["slo_ttft_ms"] = rng.choice([1e-6, 15, 500, 60_000])
        if rng.random() < 0.5:
            targets["slo_tpot_ms"] = rng.choice([1e-9, 9, 14, 40, 60_000])
        structured = StructuredOutputsParams(json="{}") if rng.random() < 0.1 else None
        request = bench.add(
            prompt,
            outputs,
            name=name,
            priority=rng.randrange(3),
            adapter=rng.randrange(adapters + 1) if adapters else 0,
            structured=structured,
            **targets,
        )
        if structured:
            compiling.append(request)
        served.wanted[name] = (len(prompt), outputs)


def _end(bench: Bench, worker: CheckedWorker, output: Any, served: Served, rng: Any) -> None:
    scheduler = bench.scheduler
    for outputs in scheduler.update_from_output(output, worker.run(output)).values():
        for each in outputs.outputs:
            served.outputs.setdefault(each.request_id, []).extend(each.new_token_ids)
            if each.finish_reason is not None:
                assert each.request_id not in served.ended, "a request ends once"
                served.ended[each.request_id] = str(each.finish_reason)
    if scheduler.num_spec_tokens and not isinstance(scheduler, AsyncScheduler):
        ids = [each for each in output.num_scheduled_tokens if each in scheduler.requests]
        drafts = [[7] * rng.randrange(scheduler.num_spec_tokens + 1) for _ in ids]
        scheduler.update_draft_token_ids(DraftTokenIds(ids, drafts))


def check_served(served: Served, *, exact: bool = False) -> None:
    """Assert that every request that was not aborted got all its tokens, each of them once.

    `exact`: and that none was computed twice.
    """
    for name, (prompt, outputs) in served.wanted.items():
        if name in served.aborted:
            continue
        assert served.ended.get(name) == "length", name
        assert served.outputs[name] == [token_of(name, n) for n in range(outputs)], name
        if exact:
            assert served.computed[name] == prompt + outputs - 1, name
