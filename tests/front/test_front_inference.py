"""Passes worked out from first bytes, in literal times."""

import pytest
from test_front_driver import VirtualClock

from headway.core.events import PassEnded
from headway.front.inference import FIRST_PASS_S, FIRST_TOKEN_S, Inference
from headway.front.scrape import read_loads, read_metrics


class Instance:
    name, ranks, chunk_tokens, epoch = "engine-0", 2, 1000, 4

    def __init__(self):
        self.sequence = 0

    def next_sequence(self):
        self.sequence += 1
        return self.sequence


class Bench:
    def __init__(self, gather_s=0.01):
        self.clock, self.passes, self.assumed = VirtualClock(), [], []
        self.inference = Inference(
            Instance(),
            self.passes.append,
            self.assumed.append,
            clock=self.clock.time,
            call_at=self.clock.call_at,
            gather_s=gather_s,
        )

    def at(self, now):
        self.clock.advance(now, inclusive=True)
        return self.inference


def test_first_bytes_close_together_are_one_pass():
    bench = Bench()
    bench.at(1.0).sent("a", 0, 1, 300, streams=True)
    bench.at(1.0).sent("b", 1, 2, 200, streams=True)
    bench.at(1.1).sent("c", 0, 3, 500, streams=True)
    bench.at(1.2).prefilled("a")
    bench.at(1.205).prefilled("b")
    bench.at(1.5).prefilled("c")
    bench.at(2.0)
    first, second = bench.passes
    assert first == PassEnded("engine-0", 4, 1, 2, pytest.approx(0.2), (300, 200))
    assert second == PassEnded("engine-0", 4, 2, 3, pytest.approx(0.3), (500, 0))  # since the pass before


def test_the_last_first_byte_of_an_instance_does_not_wait_for_others():
    bench = Bench()
    bench.at(1.0).sent("a", 0, 1, 300, streams=True)
    bench.at(1.2).prefilled("a")
    bench.at(1.2)
    assert len(bench.passes) == 1


def test_a_prompt_longer_than_the_chunk_took_several_passes():
    bench = Bench()
    bench.at(1.0).sent("a", 0, 1, 2500, streams=True)
    bench.at(1.9).prefilled("a")
    bench.at(2.0)
    assert bench.passes == [PassEnded("engine-0", 4, 1, 1, pytest.approx(0.3), (834, 0))]


def test_what_was_withdrawn_teaches_nothing_but_that_it_is_gone():
    bench = Bench()
    bench.at(1.0).sent("a", 0, 1, 300, streams=True)
    bench.at(1.3).gone("a")
    bench.at(2.0)
    assert bench.passes == [PassEnded("engine-0", 4, 1, 1, 0.0, (0, 0))]


def test_an_answer_that_does_not_stream_is_taken_as_prefilled_after_a_while():
    bench = Bench()
    bench.at(1.0).sent("a", 0, 1, 1000, streams=False)
    bench.at(1.0 + FIRST_PASS_S + 1000 * FIRST_TOKEN_S - 0.001)
    assert not bench.assumed
    bench.at(1.2)
    assert bench.assumed == ["a"] and len(bench.passes) == 1
    bench.at(5.0).prefilled("a")  # its real end changes nothing
    bench.at(6.0)
    assert len(bench.passes) == 1


def test_a_snapshot_accounts_for_what_was_sent_well_before_it():
    bench = Bench()
    bench.at(1.0).sent("a", 0, 1, 300, streams=True)
    bench.at(2.0).sent("b", 0, 2, 300, streams=True)
    told = bench.inference.snapshot(2.01, running=(1, 0))
    assert (told.acknowledged, told.busy, told.running, told.queued_tokens) == (1, True, (1, 0), None)


def test_vllms_metrics_by_rank():
    text = "\n".join(
        f'{name}{{engine="{rank}",model_name="m"}} {value + rank}'
        for name, value in (("vllm:num_requests_running", 3.0), ("vllm:num_requests_waiting", 0.0))
        for rank in range(2)
    )
    load = read_metrics(text + '\nvllm:kv_cache_usage_perc{engine="0"} 0.25\nvllm:x{engine="z"} y', 2)
    assert (load.running, load.waiting, load.kv_usage) == ((3, 4), (0, 1), None)


def metrics_of(*labels):
    """A page with 10 running, 20 waiting and 0.1 of the KV in use on rank 1, twice as much on rank 2, …"""
    return "\n".join(
        f'vllm:{name}{{engine="{label}",model_name="m"}} {value * (label + 1)}'
        for name, value in (
            ("num_requests_running", 10.0),
            ("num_requests_waiting", 20.0),
            ("kv_cache_usage_perc", 0.125),
        )
        for label in labels
    )


@pytest.mark.parametrize(
    ("labels", "ranks", "running", "usage"),
    [
        ((0, 1), 2, (10, 20), (0.125, 0.25)),  # internal load balancing
        ((4, 5), 2, (50, 60), (0.625, 0.75)),  # hybrid, start rank 4
        ((3,), 1, (40,), (0.5,)),  # external, rank 3
        ((10, 9), 2, (100, 110), (1.25, 1.375)),  # by number, not by text
    ],
)
def test_global_ranks_are_the_instances_own_in_order(labels, ranks, running, usage):
    load = read_metrics(metrics_of(*labels), ranks)
    assert (load.running, load.kv_usage, load.doubt) == (running, usage, "")
    assert load.waiting == tuple(2 * each for each in running)


def test_several_ranks_configured_as_one_are_their_sum_and_said_to_be():
    load = read_metrics(metrics_of(0, 1), 1)
    assert (load.running, load.waiting, load.kv_usage) == ((30,), (60,), (0.1875,))
    assert load.doubt == "its metrics are of ranks 0, 1, configured is ranks = 1: taken as one, their sum"


@pytest.mark.parametrize(("labels", "ranks"), [((0, 1, 2), 2), ((0,), 2), ((0, 2), 2), ((0, 1, 2, 3), 8)])
def test_ranks_that_contradict_the_configuration_are_not_read_and_said_to_be(labels, ranks):
    load = read_metrics(metrics_of(*labels), ranks)
    assert (load.running, load.waiting, load.kv_usage) == (None, None, None)
    assert load.doubt.endswith(f"configured is ranks = {ranks}: its load is not read")


def test_loads_of_sglangs_ranks_configured_as_one_are_their_sum():
    body = b'{"loads":[{"dp_rank":0,"num_running_reqs":3},{"dp_rank":1,"num_running_reqs":4}]}'
    assert read_loads(body, 1).running == (7,)


def test_sglangs_loads_and_what_is_none():
    body = (
        b'{"loads":[{"dp_rank":1,"num_running_reqs":2,"num_waiting_reqs":0},'
        b'{"dp_rank":0,"num_running_reqs":1}]}'
    )
    load = read_loads(body, 2)
    assert (load.running, load.waiting) == ((1, 2), None)
    assert read_loads(b"<html>", 2) is None and read_loads(body, 3) is None
