"""Whatever a policy plans and whoever gives up: nothing is lost, every counter equals a count."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LOCKSTEP, FirstCome, policies, pool, request

from headway.core.batch.contract import BatchPolicy, Plan
from headway.core.events import Role
from headway.core.request import Slo
from headway.core.settings import Settings
from headway.model.engine import Engine, Work


class Erratic(BatchPolicy):
    """Plans at random, until told to be sane."""

    sane = False

    def plan(self, view, now):
        if self.sane:
            return FirstCome.plan(self, view, now)
        draw = self.rng.random
        prompts = [one for one in (*view.prefilling, *view.waiting) if draw() < 0.6]
        chunks = [(one, 1 + self.rng.randrange(12)) for one in prompts]
        return Plan(chunks, [one for one in view.decodes if draw() < 0.3], decode=draw() < 0.8)


class Witness:
    """Drives an engine and keeps the books by brute force."""

    def __init__(self, seed: int, role: Role, ranks: int, blocks: int) -> None:
        self.rng = random.Random(seed)
        self.ranks = ranks
        self.policies = [Erratic(Settings(), random.Random(seed + rank)) for rank in range(ranks)]
        spec = pool(role, kv_blocks=blocks, token_cap=16, ranks=ranks, costs=LOCKSTEP, jitter=0.1)
        self.engine = Engine(spec, self.policies, random.Random(seed))
        self.now, self.works, self.left = 0.0, {}, {}
        self.deliveries: dict[str, list[float]] = {}

    def submit(self) -> None:
        name = f"r{len(self.works)}"
        prompt = self.rng.randint(1, min(30, self.engine.pool.kv_tokens - 1))
        prefix = [self.rng.choice([10, 20]) + depth for depth in range(prompt // 8)]
        slo = Slo(0.3, self.rng.choice([0.02, 0.05]))
        asked = request(name, prompt, arrival_s=self.now, slo=slo, prefix=prefix)
        prefilled = self.engine.pool.role is Role.DECODE
        work = Work(asked, self.rng.randint(2 if prefilled else 1, 25), prefilled)
        self.works[name] = work
        self.deliveries[name] = []
        self.engine.submit(work, self.rng.randrange(self.ranks), self.now)

    def cancel(self) -> None:
        here = [name for name in self.works if name not in self.left]
        if here:
            name = self.rng.choice(here)
            assert self.engine.cancel(name) is self.works[name]
            self.left[name] = "cancelled"

    def run_pass(self, meanwhile=None) -> None:
        before = {name: work.generated_tokens for name, work in self.works.items()}
        duration_s = self.engine.start_pass(self.now)
        if duration_s is None:
            return
        if meanwhile:
            meanwhile()
        assert before == {name: work.generated_tokens for name, work in self.works.items()}
        self.now += duration_s
        outcome = self.engine.end_pass(self.now)
        for work in outcome.finished:
            self.leave(work, "finished")
        for work in outcome.first_tokens:
            assert before[work.request.id] == 0
            if self.engine.pool.role is Role.PREFILL and not work.finished:
                self.leave(work, "prefilled")
        self.note(before)

    def leave(self, work: Work, how: str) -> None:
        assert work.request.id not in self.left
        self.left[work.request.id] = how

    def note(self, before: dict[str, int]) -> None:
        for name, tokens in before.items():
            if self.left.get(name) == "cancelled":
                continue
            gained = self.works[name].generated_tokens - tokens
            assert gained in (0, 1)
            self.deliveries[name] += [self.now] * gained

    def audit(self) -> None:
        engine = self.engine
        apart = (engine.queued_tokens(), engine.kv_blocks(), engine.running(), engine.waiting(), None)
        assert engine.state(self.now, pab=False) == apart
        for rank in self.engine._ranks:
            decoding, begun = list(rank.decodes), rank.prefilling
            assert rank.decode_context_tokens == sum(work.context_tokens for work in decoding)
            assert rank.queued_tokens == sum(work.todo_tokens for work in (*begun, *rank.waiting))
            assert rank.kv.used == self.blocks_in_use(rank, [*decoding, *begun])
            assert rank.free_blocks >= 0 and rank.kv.used + rank.kv.cached <= rank.kv.blocks
            assert rank.free_seats >= 0

    @staticmethod
    def blocks_in_use(rank, works) -> int:
        shared = {number for work in works for number in work.request.prefix[: work.held_hashes]}
        private = [-(-work.context_tokens // 4) - 2 * work.held_hashes for work in works]
        return 2 * len(shared) + sum(max(blocks, 0) for blocks in private)


@settings(max_examples=120, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(list(Role)),
    st.integers(1, 3),
    st.integers(9, 40),
    st.lists(st.sampled_from(["submit", "submit", "cancel", "pass", "pass", "pass", "late"]), max_size=80),
)
def test_nothing_is_lost_and_every_counter_counts(seed, role, ranks, blocks, script):
    witness = Witness(seed, role, ranks, blocks)
    for step in script:
        if step == "submit":
            witness.submit()
        elif step == "cancel":
            witness.cancel()
        else:
            witness.run_pass(meanwhile=witness.cancel if step == "late" else None)
        witness.audit()
    for policy in witness.policies:
        policy.sane = True
    for _ in range(3000):
        if not witness.engine.has_work:
            break
        witness.run_pass()
        witness.audit()
    check_the_end(witness)


def check_the_end(witness: Witness) -> None:
    engine = witness.engine
    assert not engine.has_work and set(witness.left) == set(witness.works)
    assert engine.kv_blocks() == engine.queued_tokens() == engine.running() == (0,) * witness.ranks
    for name, work in witness.works.items():
        if witness.left[name] == "cancelled":
            continue
        asked, times = work.request, witness.deliveries[name]
        most = engine.pool.kv_tokens - asked.prompt_tokens + 1
        want = 1 if witness.left[name] == "prefilled" else min(work.output_tokens, most)
        assert work.generated_tokens == want
        assert work.truncated == (witness.left[name] == "finished" and want < work.output_tokens)
        first = 1 if work.prefilled else 0
        assert len(times) == want - first
        line = asked.slo.deadline_s
        late = [at - line(asked.arrival_s, token) for token, at in enumerate(times, start=first)]
        assert work.lateness_s == pytest.approx(max(late), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_same_seed_same_run(seed):
    def run():
        witness = Witness(seed, Role.AGGREGATED, 2, 12)
        for _ in range(10):
            witness.submit()
            witness.run_pass()
        return witness.now, witness.deliveries

    assert run() == run()


def test_lateness_survives_the_pruning_of_the_past():
    engine = Engine(pool(kv_blocks=10_000), policies(FirstCome), random.Random(0))
    work, now = Work(request("a", 4, slo=Slo(1.0, 0.02)), 9_000), 0.0
    engine.submit(work, 0, now)
    for number in range(9_000):
        now += engine.start_pass(now) + (50.0 if number == 10 else 0.0)
        engine.end_pass(now)
    assert work.finished
    assert work.lateness_s == pytest.approx(0.014 + 10 * 0.011 + 50.0 - 1.0 - 10 * 0.02)
