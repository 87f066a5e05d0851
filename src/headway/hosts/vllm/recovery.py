"""Brings a vLLM scheduler back to a sound state after an exception in one of its steps.

A step that fails in `schedule()` has already changed state: KV blocks were allocated that no worker will hear
of, blocks were entered in the prefix cache that will never be computed, requests were taken from the queues.
Calling `schedule()` again as if nothing had happened would corrupt answers. So:

Rule 1. Every running request is preempted and computed again from its start, and the prefix cache is emptied.
        It is what vLLM itself does in `reset_prefix_cache(reset_running_requests=True)`. Tokens that were
        delivered stay delivered; those of a step still under way are computed again.
Rule 2. Requests that the step had taken from every queue return to the front of the waiting queue.
Rule 3. Where a KV or encoder connector was told of a request in the failed step, there is no way to take that
        back: its transfer may write into blocks that belong to others by then. The exception is passed on.
Rule 4. A failure in `update_from_output()` cannot be tried again: tokens it had taken in are lost to their
        clients. The requests of that step end with an error (HTTP 500); all others go on.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from headway.hosts.vllm.view import second_queue

__all__ = ["Checkpoint", "end_with_error"]


class Checkpoint:
    """What has to be known of a scheduler from before a step, to recover from its failure."""

    __slots__ = ("_loading", "_running")

    def __init__(self, scheduler: Any) -> None:
        self._running = list(scheduler.running)
        connected = _has_connector(scheduler)
        self._loading = [each for each in second_queue(scheduler) if _is_loading(each)] if connected else []

    def is_recoverable(self, scheduler: Any) -> bool:
        """Return whether no connector was told of a request since (rule 3)."""
        if not _has_connector(scheduler):
            return True
        known = {id(inner) for inner in (*self._running, *self._loading)}
        loading = [inner for inner in scheduler.requests.values() if _is_loading(inner)]
        told = all(id(inner) in known for inner in (*scheduler.running, *loading))
        return told and not _lost(scheduler)

    def recover(self, scheduler: Any, in_flight: Mapping[str, int]) -> None:
        """Restore a sound state after `schedule()` raised (rules 1 and 2).

        `in_flight`: tokens of each request in steps that were scheduled before and have not ended.
        """
        before = {id(inner) for inner in self._running}
        admitted = [inner for inner in scheduler.running if id(inner) not in before]
        back = sorted([*_lost(scheduler), *admitted], key=lambda inner: inner.arrival_time)
        # One that waits may hold blocks for an admission that did not come about.
        unadmitted = [*back, *(inner for inner in scheduler.waiting if not inner.num_computed_tokens)]
        _evict(scheduler, (*self._running, *unadmitted))
        scheduler.running = [inner for inner in scheduler.running if id(inner) in before]
        for inner in unadmitted:
            scheduler.kv_cache_manager.free(inner)
        for inner in admitted:
            _take_back(scheduler, inner)
        for inner in (*scheduler.running, *back):
            inner.num_in_flight_tokens = in_flight.get(inner.request_id, 0)
        for inner in reversed(back):
            scheduler.waiting.prepend_request(inner)
        scheduler.encoder_cache_manager.reset()
        # It raises where transfers under way hold blocks. What the step touched is evicted in any case.
        with suppress(RuntimeError):
            scheduler.reset_prefix_cache(reset_running_requests=True)


def _evict(scheduler: Any, inners: Iterable[Any]) -> None:
    """Take the blocks of these requests out of the prefix cache: not all of them will have been computed."""
    manager = scheduler.kv_cache_manager
    for inner in inners:
        for blocks in manager.get_block_ids(inner.request_id):
            manager.evict_blocks(set(blocks))


def _take_back(scheduler: Any, inner: Any) -> None:
    """Undo the admission of a request: no worker has heard of it."""
    inner.status = RequestStatus.PREEMPTED if inner.num_preemptions else RequestStatus.WAITING
    inner.num_computed_tokens = 0
    inner.num_output_placeholders = 0
    inner.spec_token_ids = []
    scheduler._inflight_prefills.discard(inner)


def end_with_error(scheduler: Any, requests: Iterable[Any]) -> dict[int, EngineCoreOutputs]:
    """End the requests of a step whose results could not be taken in; return what tells their clients
    (rule 4).
    """
    requests = list(requests)
    scheduler.running = [inner for inner in scheduler.running if not inner.is_finished()]
    ended = [inner for inner in scheduler.waiting if inner.is_finished()]
    if ended:
        scheduler.waiting.remove_requests(ended)
    still = [inner for inner in requests if scheduler.requests.get(inner.request_id) is inner]
    scheduler.finish_requests([inner.request_id for inner in still], RequestStatus.FINISHED_ERROR)
    if not _has_connector(scheduler):
        for inner in still:  # stopped by the step, but not let go of yet
            if scheduler.requests.get(inner.request_id) is inner:
                scheduler._free_request(inner)
    outputs: dict[int, list[EngineCoreOutput]] = {}
    for inner in requests:
        error = EngineCoreOutput(inner.request_id, [], finish_reason=FinishReason.ERROR)
        outputs.setdefault(inner.client_index, []).append(error)
    found = {client: EngineCoreOutputs(outputs=of_client) for client, of_client in outputs.items()}
    finished: dict[int, set[str]] | None = scheduler.finished_req_ids_dict
    if finished:  # several engines: the front end keeps count of what each of them has
        for client, ids in finished.items():
            found.setdefault(client, EngineCoreOutputs()).finished_requests = set(ids)
        finished.clear()
    return found


def _has_connector(scheduler: Any) -> bool:
    return scheduler.connector is not None or getattr(scheduler, "ec_connector", None) is not None


def _is_loading(inner: Any) -> bool:
    return bool(inner.status == RequestStatus.WAITING_FOR_REMOTE_KVS)


def _lost(scheduler: Any) -> list[Any]:
    """Return the requests that are in none of the queues."""
    waiting = getattr(scheduler.waiting, "_heap", scheduler.waiting)
    queued = {id(inner) for inner in (*scheduler.running, *waiting, *second_queue(scheduler))}
    every = scheduler.requests.values()
    return [inner for inner in every if id(inner) not in queued and not inner.is_finished()]
