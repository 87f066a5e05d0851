"""What vLLM's scheduler does beside forming steps goes on under a batch policy."""

import random
from unittest.mock import MagicMock

import pytest

pytest.importorskip("vllm")

from scheduler_kit import Bench
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.outputs import DraftTokenIds, KVConnectorOutput
from vllm.v1.request import RequestStatus

from headway.core.batch import StepReport
from headway.hosts.vllm import AsyncFairScheduler, FairScheduler

TIGHT = {"ttft_s": 0.05, "tpot_s": 0.02}


@pytest.fixture
def bench(tmp_path):
    made = []

    def make(cls=FairScheduler, *, headway=TIGHT, **options):
        made.append(Bench(tmp_path, cls, headway=headway, **options))
        it = made[-1]
        policy = it.scheduler.headway.driver.policy
        rng = random.Random(1)
        for n in range(64):
            new = 1 + (rng.randrange(16, 512) if n % 2 else 0)
            policy.observe(StepReport(new, 1, 100, 0.0, 0.01 + 0.0001 * new), 0.0)
        return it

    yield make
    for each in made:
        assert each.scheduler.headway.driver.tally.failures == 0
        each.close()


def drain(it, most=2000):
    """Run until all are served; return all that ran."""
    ran = []
    while it.scheduler.requests:
        ran.append(it.step())
        assert len(ran) < most
    return ran


def test_speculated_tokens_belong_to_their_decode(bench):
    it = bench(speculated=3)
    it.add(8, 40, name="a")
    it.step()
    it.scheduler.update_draft_token_ids(DraftTokenIds(["a"], [[7, 7, 7]]))
    it.add(400, 5, name="b")
    output = it.schedule()
    assert output.num_scheduled_tokens["a"] == 4
    assert output.scheduled_spec_decode_tokens["a"] == [7, 7, 7]
    it.finish(output)
    drain(it)


def test_adapters_beyond_the_most_wait(bench):
    it = bench(max_loras=1)
    for n in range(6):
        it.add(100, 5, name=f"r{n}", adapter=1 + n % 2)
    for ran in drain(it):
        assert len({int(name[1:]) % 2 for name in ran}) <= 1


def test_a_grammar_is_waited_for_without_holding_up_others(bench):
    it = bench()
    waits = it.add(100, 5, name="json", structured=StructuredOutputsParams(json="{}"))
    assert waits.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    it.add(100, 5, name="plain")
    assert set(it.step()) == {"plain"}
    waits.structured_output_request._grammar = MagicMock()
    it.scheduler.structured_output_manager.accept_tokens = lambda request, tokens: True
    it.scheduler.structured_output_manager.should_advance = lambda request: False
    drain(it)


def test_a_paused_scheduler_runs_nothing(bench):
    it = bench()
    it.add(100, 5, name="a")
    it.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert it.step() == {}
    it.scheduler.set_pause_state(PauseState.UNPAUSED)
    drain(it)


def test_throttled_prefills_are_vllms_affair(bench):
    it = bench()
    it.add(8, 50, name="a")
    it.step()
    it.add(100, 5, name="b")
    output = it.scheduler.schedule(True)
    assert set(output.num_scheduled_tokens) == {"a"}
    it._sampling[id(output)] = {"a"}
    it.finish(output)
    drain(it)


@pytest.mark.parametrize("cls", [FairScheduler, AsyncFairScheduler])
def test_kv_from_elsewhere_is_fetched_however_full_the_steps_are(bench, cls):
    it = bench(cls)
    for n in range(4):
        it.add(8, 1000, name=f"r{n}")
    it.step()
    scheduler = it.scheduler
    connector = MagicMock(spec=KVConnectorBase_V1)
    connector.get_num_new_matched_tokens.side_effect = lambda request, computed: (
        (159, True) if request.request_id == "far" and not computed else (0, False)
    )
    answers = {
        "request_finished": (False, None),
        "has_pending_block_frees": False,
        "get_loaded_kv_cache_group_ids": (),
        "get_external_cache_hit_sources": None,
        "take_events": (),
    }
    for name, answer in answers.items():
        if hasattr(connector, name):  # not every version asks all of it
            getattr(connector, name).return_value = answer
    connector.supports_divergent_local_hybrid_hits = connector.requires_kv_delivery = False
    scheduler.connector = connector
    far = it.add(160, 50, name="far")
    far.kv_transfer_params = {"do_remote_prefill": True}
    ran = it.step()
    assert set(ran) == {"r0", "r1", "r2", "r3"}
    assert far.status == RequestStatus.WAITING_FOR_REMOTE_KVS, "its transfer began, though it took no token"
    it.step()
    scheduler._update_from_kv_xfer_finished(KVConnectorOutput(finished_recving={"far"}))
    assert it.step()["far"] == 1, "one token is left to compute"


def test_a_streamed_input_is_a_new_request_with_each_piece(bench):
    it = bench()
    session = it.add(100, 2, name="talk", resumable=True, slo_ttft_ms=500)
    first = session.headway
    it.step()
    it.step()
    assert session.status == RequestStatus.WAITING_FOR_STREAMING_REQ
    piece = it.add(50, 2, name="talk", resumable=True, slo_ttft_ms=250, headway_dispatch=9)
    assert not hasattr(piece, "headway"), "vLLM takes what is in it and lets it go"
    assert it.step() == {"talk": session.num_prompt_tokens - 101}
    it.step()
    now = session.headway
    assert now.first_token_s > first.first_token_s
    assert (now.request.slo.ttft_s, now.request.prompt_tokens) == (0.25, session.num_prompt_tokens)
    it.add(1, name="talk")  # the end
    assert not it.scheduler.requests


def test_preempted_requests_come_back(bench):
    it = bench(blocks=20, seats=8)
    for n in range(6):
        it.add(40, 60, name=f"r{n}")
    preempted = set()
    for _ in range(2000):
        output = it.schedule()
        preempted |= output.preempted_req_ids or set()
        it.finish(output)
        if not it.scheduler.requests:
            break
    assert preempted
    assert not it.scheduler.requests
