"""What is set for a step in vLLM's queues, and that it is put back, whatever vLLM did meanwhile."""

import random
from collections import deque
from types import SimpleNamespace

import pytest

from headway.hosts.vllm import queueing
from headway.hosts.vllm.steering import Applied, Steering


class Inner(SimpleNamespace):
    """A request of vLLM's, as far as steering looks."""

    def __init__(self, name):
        super().__init__(name=name, next_decode_eligible_step=0, num_preemptions=0, arrival_time=0.0)

    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


def scheduler(running="", waiting=""):
    made = {name: Inner(name) for name in running + waiting}
    config = SimpleNamespace(long_prefill_token_threshold=0)
    queues = {"running": [made[n] for n in running], "waiting": deque([made[n] for n in waiting])}
    return made, SimpleNamespace(
        scheduler_config=config, max_num_scheduled_tokens=256, current_step=0, **queues
    )


def names(queue):
    return "".join(inner.name for inner in queue)


def preempt(sut, inner):
    """As vLLM does it: from the end of those that run to the front of those that wait."""
    sut.running.remove(inner)
    inner.num_preemptions += 1
    sut.waiting.appendleft(inner)


@pytest.mark.parametrize(
    ("wanted", "during", "begin", "after"),
    [
        ("C", "CABDE", 0, "ABCDE"),
        ("C", "CABDE", 1, "ABDE"),
        ("DB", "DBACE", 1, "ABCE"),
        ("DB", "DBACE", 3, "CE"),  # tokens were left, and vLLM went on with A
        ("AB", "ABCDE", 1, "BCDE"),
        ("EDCBA", "EDCBA", 0, "ABCDE"),
    ],
)
def test_those_that_did_not_begin_are_where_they_were(wanted, during, begin, after):
    made, sut = scheduler(waiting="ABCDE")
    applied = Applied(sut, Steering(10, waiting=[made[name] for name in wanted]))
    assert names(sut.waiting) == during
    for _ in range(begin):
        sut.running.append(sut.waiting.popleft())
    applied.undo()
    assert names(sut.waiting) == after
    assert sut.max_num_scheduled_tokens == 256


@pytest.mark.parametrize("waiting", ["ABC", "ABCDE"])
def test_whom_vllm_preempts_meanwhile_stays_in_front(waiting):
    made, sut = scheduler("XPQ", waiting)
    applied = Applied(sut, Steering(10, waiting=[made["C"]]))
    preempt(sut, made["Q"])
    preempt(sut, made["P"])
    applied.undo()
    assert names(sut.waiting) == "PQ" + waiting
    assert names(sut.running) == "X"


def test_one_preempted_before_keeps_its_place_as_well():
    made, sut = scheduler("XP", "ABCDE")
    made["A"].num_preemptions = made["D"].num_preemptions = 1
    applied = Applied(sut, Steering(10, waiting=[made["C"]]))
    preempt(sut, made["P"])
    applied.undo()
    assert names(sut.waiting) == "PABCDE"


def test_a_request_in_another_queue_stays_there():
    made, sut = scheduler("X", "ABC")
    applied = Applied(sut, Steering(10, waiting=[Inner("elsewhere"), made["B"]]))
    assert names(sut.waiting) == "BAC"
    applied.undo()
    assert names(sut.waiting) == "ABC"


def test_prompts_come_last_and_nobody_runs_who_did_not():
    made, sut = scheduler("abcd", "W")
    applied = Applied(sut, Steering(10, prompts=[made["c"], made["W"], made["a"]]))
    assert names(sut.running) == "bdca"
    sut.running.append(sut.waiting.popleft())
    applied.undo()
    assert names(sut.running) == "abcdW"


@pytest.mark.parametrize("near", [1, 4, 256])
@pytest.mark.parametrize("seed", range(60))
def test_however_deep_they_lie_those_that_did_not_begin_keep_their_order(monkeypatch, near, seed):
    monkeypatch.setattr(queueing, "_NEAR", near)
    rng = random.Random(seed)
    inners = [Inner(f"r{n}") for n in range(rng.randrange(1, 40))]
    for n, inner in enumerate(inners):
        inner.arrival_time = float(n) if rng.random() < 0.9 else rng.random() * 40  # some came by other ways
    wanted = rng.sample(inners, rng.randrange(1, min(len(inners), 8) + 1))
    queue = deque(inners)
    moved = queueing.Moved(queue)
    moved.to_front(wanted)
    assert list(queue) == wanted + [inner for inner in inners if inner not in wanted]
    begun = [queue.popleft() for _ in range(rng.randrange(len(wanted) + 1))]
    if not begun and rng.random() < 0.5:
        skipped = queue.popleft()  # vLLM passes it over, and puts it back in front
        queue.appendleft(skipped)
    preempted = [Inner(f"p{n}") for n in range(rng.randrange(3))] if not begun else []
    for inner in preempted:
        inner.num_preemptions = 1
        queue.appendleft(inner)
    moved.undo()
    assert list(queue) == preempted[::-1] + [inner for inner in inners if inner not in begun]
